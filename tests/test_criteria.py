"""Criteria against the equations of their papers in plain numpy, statistics by brute force from what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from criteria_cases import CASES, DAMPING, Array, Case, Reader, conv, dense, every_row, grouped, mlp, norm, pixels, scored  # noqa: F401
from repair_cases import network, weights_of
from test_trace import net

import spa

# ------------------------------------------------------------------------------------------------ what channels carry

def by_amp(r: Reader) -> Array:
    """Blocks of columns: mean over rows of the L1 norm of what they add to the output. Single columns: mean |x|."""
    if (np.bincount(r.of[0]) == 1).all():
        return r.statistic(lambda x: np.abs(x).mean(0)).ravel()
    found = np.zeros(r.size)
    for c in range(r.size):
        for x, w, of in zip(r.x, r.w, r.of, strict=True):
            found[c] += np.mean([np.abs(w[:, of == c] @ row[of == c]).sum() for row in x])
    return found


BY_LAYER: dict[str, Callable[[Reader], Array]] = {
    "activation": lambda r: r.mean(r.statistic(lambda x: np.abs(x).mean(0))),
    "variance": lambda r: r.mean(r.statistic(lambda x: x.var(0))),
    "apoz": lambda r: r.mean(r.statistic(lambda x: 1 - (x <= 0).mean(0))),
    "wanda": lambda r: r.sum(np.abs(r.w).mean(1) * r.statistic(lambda x: np.sqrt((x**2).mean(0)))),
    "flap": lambda r: r.sum((r.w**2).sum(1) * r.statistic(lambda x: x.var(0))),
    "amp": by_amp,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("criterion", BY_LAYER)
def test_of_activations(criterion: str, name: str) -> None:
    case = CASES[name]()
    rows = [BY_LAYER[criterion](r) for r in case.readers()]
    expected = sum(rows) / (len(rows) if criterion in ("activation", "variance", "apoz") else 1)
    found = scored(case, criterion)
    assert len(np.unique(found)) > 0.7 * len(found)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


# ------------------------------------------------------------------------------------------------ errors after repair

def covariances(r: Reader) -> list[Array]:
    """Damped, one a part."""
    found = []
    for x in r.x:
        c = np.cov(x.T, bias=True)
        assert np.diagonal(c).min() > 1e-3 * np.diagonal(c).mean()
        found.append(c + DAMPING * np.diagonal(c).mean() * np.eye(len(c)))
    return found


def by_obs(r: Reader) -> Array:
    found = np.zeros(r.size)
    for c, w, of in zip(covariances(r), r.w, r.of, strict=True):
        np.add.at(found, of, (w**2).sum(0) / np.diagonal(np.linalg.inv(c)))
    return found


def by_obspa(r: Reader) -> Array:
    found = np.zeros(r.size)
    for c, w, of in zip(covariances(r), r.w, r.of, strict=True):
        inverse = np.linalg.inv(c)
        for k in range(r.size):
            b = of == k
            found[k] += np.trace(w[:, b] @ np.linalg.inv(inverse[np.ix_(b, b)]) @ w[:, b].T)
    return found


def by_prototype(r: Reader) -> Array:
    found = np.zeros(r.size)
    for c, w, of in zip(covariances(r), r.w, r.of, strict=True):
        upper = np.linalg.cholesky(np.linalg.inv(c)).T  # C⁻¹ = UᵀU, as torch.linalg.cholesky(…, upper=True)
        np.add.at(found, of, (w**2).sum(0) / np.diagonal(upper) ** 2)
    return found


CURVED = {"obs": by_obs, "obspa": by_obspa, "obspa-prototype": by_prototype}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("criterion", CURVED)
def test_of_errors(criterion: str, name: str) -> None:
    case = CASES[name]()
    rows = [CURVED[criterion](r) for r in case.readers()]
    expected = np.median(rows, axis=0) if criterion == "obspa-prototype" else np.sum(rows, axis=0)
    np.testing.assert_allclose(scored(case, criterion), expected, rtol=1e-4)


def least_error(readers: Sequence[Reader], gone: Sequence[int]) -> float:
    """What is left of each output when all other columns are fitted anew: ridge regression with an intercept, by lstsq."""
    total = 0.0
    for r in readers:
        for x, w, of in zip(r.x, r.w, r.of, strict=True):
            x = (x - x.mean(0)) / np.sqrt(len(x))
            stack = np.concatenate([x, np.sqrt(DAMPING * (x**2).sum(0).mean()) * np.eye(x.shape[1])])
            target, rest = stack @ w.T, stack[:, ~np.isin(of, gone)]
            fit = np.linalg.lstsq(rest, target, rcond=None)[0]
            total += ((target - rest @ fit) ** 2).sum()
    return float(total)


@pytest.mark.parametrize("name", CASES)
def test_obspa_is_the_error_of_least_squares(name: str) -> None:
    case = CASES[name]()
    readers = case.readers()
    expected = [least_error(readers, [c]) for c in range(readers[0].size)]
    np.testing.assert_allclose(scored(case, "obspa"), expected, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_greedy_takes_the_cheapest_each_time(name: str) -> None:
    case = CASES[name]()
    readers = case.readers()
    order: list[int] = []
    errors = []
    for _ in range(readers[0].size):
        left = [c for c in range(readers[0].size) if c not in order]
        costs = [least_error(readers, [*order, c]) for c in left]
        order.append(left[int(np.argmin(costs))])
        errors.append(min(costs))
    found = scored(case, "obspa-greedy")
    assert np.argsort(found).tolist() == order
    np.testing.assert_allclose(np.sort(found), errors, rtol=1e-4)


@pytest.mark.parametrize("criterion", ["obspa", "obspa-greedy", "obspa-prototype"])
def test_a_channel_that_is_there_twice_goes_first(criterion: str) -> None:
    case = CASES["mlp"]()
    for tensor in case.model.graph.initializer:
        if tensor.name in ("w1", "b1"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[..., 7] = array[..., 2]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    found = scored(case, criterion)
    np.testing.assert_array_less(found[[2, 7]].min(), np.delete(found, [2, 7]).min() * 0.7)
    if criterion == "obspa":  # either may go
        assert set(np.argsort(found)[:2]) == {2, 7}
    else:
        assert np.argmin(found) in (2, 7)


@pytest.mark.parametrize("criterion", ["obs", "obspa"])
def test_a_depthwise_convolution_loses_nothing(criterion: str) -> None:
    body = "a = Conv(x, w1, b1) r = Relu(a) d = Conv <group=6, pads=[1,1,1,1]> (r, w2) y = Conv(d, w3)"
    made = net("float[n,3,6,6] x -> float[n,4,6,6] y", body, w1=(6, 3, 1, 1), b1=(6,), w2=(6, 1, 3, 3), w3=(4, 6, 1, 1))
    case = Case(made, "w1:0", (3, 6, 6), ("d",), lambda d, w: [dense(pixels(d["d"]), w["w3"].reshape(4, 6).T, np.arange(6))])
    expected = CURVED[criterion](case.readers()[0])
    np.testing.assert_allclose(scored(case, criterion), expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ weights alone

def tensors_of(case: Case) -> tuple[list[Array], list[Array]]:
    """Stored tensors of the group as (size, elements): matrices times what a norm multiplies, and norms' scales."""
    w = {n: v.astype(np.float64) for n, v in weights_of(case.model).items()}
    if case.group == "wq:1#2":
        return [*(w[n].reshape(6, 4, 3).transpose(1, 0, 2).reshape(4, -1) for n in ("wq", "wk", "wv")), w["wo"].reshape(4, -1)], []
    if case.group == "w1:0#2":  # of eight channels, four in two groups
        return [w["w1"].reshape(2, 4, 3).transpose(1, 0, 2).reshape(4, -1), w["w2"].transpose(1, 0, 2, 3).reshape(4, -1)], []
    if case.group == "w1:1":
        return [w["w1"].T, w["w2"], w["w3"]], []
    assert case.group == "w1:0"
    gain = w["ns"] / np.sqrt(w["nv"] + 1e-5)
    return [w["w1"].reshape(8, -1) * gain[:, None], w["w2"].transpose(1, 0, 2, 3).reshape(8, -1)], [w["ns"]]


STORED = ("conv", "mlp", "heads", "grouped")


def by_lamp(case: Case) -> Array:
    squares = sum((t**2).sum(1) for t in tensors_of(case)[0])
    return np.array([s / squares[squares >= s].sum() for s in squares])


def by_fpgm(case: Case) -> Array:
    return sum(np.array([sum(np.linalg.norm(a - b) for b in t) for a in t]) for t in tensors_of(case)[0])


def by_scale(case: Case) -> Array:
    matrices, scales = tensors_of(case)
    return np.abs(scales[0]) if scales else np.sqrt(sum((t**2).sum(1) for t in matrices))


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("criterion, by_hand", [("lamp", by_lamp), ("fpgm", by_fpgm), ("bn-scale", by_scale)])
def test_of_weights(criterion: str, by_hand: Callable[[Case], Array], name: str) -> None:
    case = CASES[name]()
    analysis = spa.analyze(case.model)
    found = spa.score(analysis.normal.model.graph, analysis.groups, criterion).values[analysis.groups.by_name[case.group].coordinates]
    np.testing.assert_allclose(found, by_hand(case), rtol=1e-5)
    if criterion == "lamp":
        assert found.max() == 1


def test_scales_of_all_norms_of_a_group() -> None:
    made, _ = network("residual")
    w = weights_of(made)
    analysis = spa.analyze(made)
    found = spa.score(analysis.normal.model.graph, analysis.groups, "bn-scale").values
    np.testing.assert_allclose(found[analysis.groups.by_name["w1:0"].coordinates], np.abs(w["ns"]) + np.abs(w["ps"]), rtol=1e-6)
    np.testing.assert_allclose(found[analysis.groups.by_name["w2:0"].coordinates], np.abs(w["os"]), rtol=1e-6)
