"""Methods of transformer pruning against plain numpy: scores of heads and neurons, widths by parameters, widths under a drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from criteria_cases import attention, every_row, mlp  # noqa: F401
from repair_cases import drawn, outputs_of, weights_of
from test_choose import chain
from test_depth import D as WIDTH
from test_depth import data, decoder
from test_trace import groups_of, net

import spa
from spa.budgets.adaptive import adaptive
from spa.budgets.budget import Budget
from spa.criteria.score import Scores
from spa.criteria.views import Data
from spa.errors import BadOption
from spa.plans.choose import Options, choose
from spa.plans.spread import log_shares

Array = np.ndarray


def scores(model: onnx.ModelProto, criterion: str, batches: list[dict[str, Array]], **options: Any) -> dict[str, Array]:
    analysis = spa.analyze(model)
    data = Data(analysis.normal.model, batches, **options)
    found = spa.score(analysis.normal.model.graph, analysis.groups, criterion, data=data)
    return {g.name: found.values[g.coordinates] for g in analysis.groups.free()}


def heads_read(model: onnx.ModelProto, batches: list[dict[str, Array]]) -> tuple[Array, Array]:
    """What the output projection reads, (samples, tokens, heads, width), and its weight (heads, width, outputs)."""
    tapped = onnx.ModelProto.FromString(model.SerializeToString())
    tapped.graph.output.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, None))
    read = np.concatenate([found["h"] for found in outputs_of(tapped, batches)]).astype(np.float64)
    return read.reshape(*read.shape[:2], 4, 3), weights_of(model)["wo"].reshape(4, 3, -1).astype(np.float64)


BATCHES = [{"x": drawn((n, 5, 6), n)} for n in (7, 4)]


def test_two_ssp_is_the_mean_norm_over_samples() -> None:
    model = net("float[n,5,6] x -> float[n,5,4] y", "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)", w1=(6, 10), w2=(10, 4))
    h = np.concatenate([np.maximum(b["x"] @ weights_of(model)["w1"], 0) for b in BATCHES]).astype(np.float64)  # (samples, tokens, 10)
    expected = np.linalg.norm(h, axis=1).mean(axis=0)
    np.testing.assert_allclose(scores(model, "2ssp", BATCHES)["w1:1"], expected, rtol=1e-5)


def test_two_ssp_where_tokens_and_samples_share_an_axis() -> None:
    """A reshape to (samples tokens) before the layer: samples are still the outer factor."""
    body = "f = Reshape(x, s) h = MatMul(f, w1) r = Relu(h) k = MatMul(r, w2) y = Reshape(k, t)"
    model = net("float[n,5,6] x -> float[n,5,4] y", body, w1=(6, 10), w2=(10, 4), s=np.array([-1, 6]), t=np.array([-1, 5, 4]))
    h = np.concatenate([np.maximum(b["x"] @ weights_of(model)["w1"], 0) for b in BATCHES]).astype(np.float64)
    np.testing.assert_allclose(scores(model, "2ssp", BATCHES)["w1:1"], np.linalg.norm(h, axis=1).mean(axis=0), rtol=1e-5)


def test_usage_is_how_often_a_head_adds_most() -> None:
    model = attention()
    read, weight = heads_read(model, BATCHES)
    norms = np.linalg.norm(np.einsum("bthd,hdo->btho", read, weight), axis=-1)
    expected = np.bincount(norms.argmax(-1).ravel(), minlength=4) / norms[..., 0].size
    np.testing.assert_allclose(scores(model, "usage", BATCHES)["wq:1#2"], expected)


def test_amp_projects_heads_and_takes_the_l1_norm() -> None:
    model = attention()
    read, weight = heads_read(model, BATCHES)
    expected = np.abs(np.einsum("bthd,hdo->btho", read, weight)).sum(-1).mean((0, 1))
    np.testing.assert_allclose(scores(model, "amp", BATCHES)["wq:1#2"], expected, rtol=1e-5)


def test_amp_gives_to_neurons_what_heads_leave_by_rounding() -> None:
    model, neuron = decoder(2), 2 * WIDTH  # parameters of a neuron; there are three heads a layer, so that a share of them is seldom met
    for left in (0.9, 0.8, 0.7, 0.6):
        result = spa.prune(model, target=Budget((f"params={left}",), "uniform"), criterion="amp", units=["head", "neuron"], multiple_of=1,
                           calibration=data())  # fmt: skip
        kinds = [g.kind for g in result.analysis.groups.free() if g.name in result.plan.groups]
        assert "neuron" in kinds
        limit = left * result.before.parameters
        assert limit - neuron < result.after.parameters <= limit
        for kind in ("head", "neuron"):
            widths = [len(e["kept"]) for n, e in result.plan.groups.items() if result.analysis.groups.by_name[n].kind == kind]
            assert not widths or max(widths) - min(widths) <= 1  # alike in all layers


def test_loraprune_is_the_weight_times_what_adapters_see_of_the_gradient() -> None:
    torch = pytest.importorskip("torch")
    model = mlp()
    batch = {"x": drawn((9, 6), 3)}
    parameters = {n: torch.tensor(w.copy(), requires_grad=True) for n, w in weights_of(model).items()}
    h = torch.relu(torch.tensor(batch["x"]) @ parameters["w1"] + parameters["b1"])
    y = torch.log_softmax(h @ parameters["w2"], -1)
    (-(y.exp() * y).sum(-1).mean()).backward()  # the entropy of the first output
    expected = np.zeros(10)
    for name, axis in (("w1", 1), ("w2", 0), ("w3", 0)):
        gradient = parameters[name].grad
        if gradient is None:  # the entropy does not see the second output
            continue
        w, g = (v.detach().numpy().astype(np.float64) for v in (parameters[name], gradient))
        a = np.random.default_rng(w.shape[0]).standard_normal((8, w.shape[0])) / np.sqrt(8)  # weights are (inputs, outputs) here
        summed = np.abs(w * (g.T @ a.T @ a).T).sum(1 - axis)
        expected += summed / np.linalg.norm(summed)
    np.testing.assert_allclose(scores(model, "loraprune", [batch], loss="entropy")["w1:1"], expected, rtol=1e-3)


def test_loraprune_of_weights_stored_the_other_way_round() -> None:
    """And under other names, and behind a transpose: adapters lie between inputs and outputs, not between axes of a file."""
    pytest.importorskip("torch", reason="gradients run in torch")
    w, v = drawn((6, 10), 1), drawn((10, 4), 2)
    kept = net("float[9,6] x -> float[9,4] y", "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)", w=w, v=v)
    gemm = net("float[9,6] x -> float[9,4] y", "h = Gemm<transB=1>(x, a) r = Relu(h) y = Gemm<transB=1>(r, b)", a=w.T.copy(), b=v.T.copy())
    turned = net("float[9,6] x -> float[9,4] y", "t = Transpose<perm=[1,0]>(a) h = MatMul(x, t) r = Relu(h) y = MatMul(r, v)",
                 a=w.T.copy(), v=v)  # fmt: skip
    batch = {"x": drawn((9, 6), 3)}
    first, *others = (next(iter(scores(m, "loraprune", [batch], loss="entropy").values())) for m in (kept, gemm, turned))
    for found in others:
        np.testing.assert_allclose(found, first, rtol=1e-4)


# ---------------------------------------------------------------------- widths


def test_scope_cost_removes_a_share_of_the_parameters() -> None:
    """FLAP's rule: scores standardised in each group, sorted together, and cut where the parameters add up to the share."""
    groups = groups_of(net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) k = MatMul(h, w2) y = MatMul(k, w3)",
                           w1=(4, 40), w2=(40, 8), w3=(8, 5)))  # fmt: skip
    rng = np.random.default_rng(0)
    values = rng.random(groups.total)
    chosen = choose(groups, Scores("test", values), Options(0.4, "cost", 1, normalize="standardize"))
    pooled = []
    for g in groups.free():
        z = values[g.coordinates]
        pooled += [(s, g.parameters, g.start + i) for i, s in enumerate((z - z.mean()) / z.std())]
    pooled.sort()
    total, left = sum(c for _, c, _ in pooled), 0.0
    gone = set()
    for _, cost, coordinate in pooled:
        left += cost
        if left > 0.4 * total:
            break
        gone.add(coordinate)
    assert set(np.flatnonzero(chosen.gone).tolist()) == gone
    by_number = choose(groups, Scores("test", values), Options(0.4, "global", 1, normalize="standardize"))
    assert not np.array_equal(by_number.gone, chosen.gone)


@pytest.mark.parametrize("count, ratio", [(2, 0.25), (6, 0.25), (12, 0.5), (32, 0.5), (12, 0.8)])
def test_log_shares_grow_with_depth_and_keep_the_mean(count: int, ratio: float) -> None:
    found = log_shares(count, ratio)
    assert found.mean() == pytest.approx(ratio)
    assert (np.diff(found) > 0).all()
    assert found[0] > 0
    assert found[-1] <= 0.95 + 1e-9
    rise = (found - found[0]) / (found[-1] - found[0])
    np.testing.assert_allclose(rise, [np.log(i + 1) / np.log(count) for i in range(count)], atol=1e-12)


def test_scope_log_goes_by_depth_among_groups_of_a_kind() -> None:
    weights = {f"w{i}": (20 if i else 4, 20 if i < 5 else 5) for i in range(6)}
    body = " ".join(f"{'y' if i == 5 else f'h{i}'} = MatMul({'x' if i == 0 else f'h{i - 1}'}, w{i})" for i in range(6))
    groups = groups_of(net("float[2,4] x -> float[2,5] y", body, **weights))
    chosen = choose(groups, Scores("test", np.arange(groups.total, dtype=np.float64)), Options(0.5, "log", 1))
    gone = [int(chosen.gone[g.coordinates].sum()) for g in groups.free()]
    assert gone == [20 - int(20 * (1 - share) + 1e-6) for share in log_shares(5, 0.5)]


def test_groups_with_a_ratio_of_their_own_keep_it_in_scope_log() -> None:
    groups = groups_of(chain())
    chosen = choose(groups, Scores("test", np.arange(groups.total, dtype=np.float64)), Options(0.5, "log", 1, ratios={"w1:1": 0.25}))
    assert int(chosen.gone[groups.by_name["w1:1"].coordinates].sum()) == 8


def restated(sizes: list[int], loss: Any, budget: float) -> tuple[dict[int, int], float]:
    """The paper's loop over layers, last to first, six halvings of the interval (left too narrow, right good enough)."""
    kept: dict[int, int] = {}
    before, share = 0.0, budget / len(sizes)
    for layer in reversed(range(len(sizes))):
        left, right = 0, sizes[layer]
        accepted = before
        for _ in range(6):
            if right - left < 2:
                break
            middle = (left + right) // 2
            now = loss({**kept, layer: middle})
            if now - before <= share:
                right, accepted = middle, now
            else:
                left = middle
        if right < sizes[layer]:
            kept[layer] = right
        before = accepted
    return kept, before


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.3, 2.0, 100.0])
def test_adaptive_widths_are_the_papers(budget: float) -> None:
    sizes = [40, 64, 24]

    def loss(widths: Any) -> float:
        return sum((i + 1) * (1 - widths.get(i, n) / n) ** 2 for i, n in enumerate(sizes))

    ladders = [(i, np.arange(1, n + 1)) for i, n in enumerate(sizes)]
    found, lost = adaptive(ladders, loss, budget)
    expected, before = restated(sizes, loss, budget)
    assert found == expected
    assert lost == pytest.approx(before)
    assert lost <= budget


def test_adaptive_spends_a_drop() -> None:
    model = chain()
    data = [{"x": np.random.default_rng(i).standard_normal((2, 4)).astype(np.float32)} for i in range(24)]
    plan = spa.plan(model, target=spa.Budget((), "adaptive", max_drop=0.2, metric="error"), calibration=data, multiple_of=1)
    before, after = plan.options["budget"]["quality"]["error"]
    assert after - before <= 0.2
    assert plan.options["budget"]["allocation"] == "adaptive"
    assert plan.groups


@pytest.mark.parametrize("budget", [{"target": ("macs=0.5",)}, {"target": ("macs=0.5",), "max_drop": 1.0}, {}])
def test_adaptive_needs_a_drop_and_nothing_else(budget: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="give --max-drop, and no --target"):
        spa.Budget(allocation="adaptive", **budget)
