"""Scores, masks and scales that a user brings: masks decide, scores stand in for the criterion's, scales end up in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from criteria_cases import CASES, attention, grouped, mlp
from repair_cases import drawn, outputs_of, weights_of
from test_cli import refused, run
from test_trace import net

import spa
from spa.exact import scales
from spa.plans.edits import KINDS, Kind

Array = np.ndarray
RNG = np.random.default_rng(3)


def multiplied(model: onnx.ModelProto, value: str, factor: Array) -> onnx.ModelProto:
    """The model in which a value is multiplied wherever it is read."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    for node in made.graph.node:
        node.input[:] = [f"{value}_times" if name == value else name for name in node.input]
    at = next(i for i, node in enumerate(made.graph.node) if value in node.output)
    made.graph.node.insert(at + 1, onnx.helper.make_node("Mul", [value, "factor_of_it"], [f"{value}_times"]))
    made.graph.initializer.append(onnx.numpy_helper.from_array(factor.astype(np.float32), "factor_of_it"))
    return made


def spread(name: str, numbers: Array) -> Array:
    """Numbers of a case's group along the value that its readers read."""
    along = {"conv": lambda s: s[:, None, None], "mlp": lambda s: s, "heads": lambda s: np.repeat(s, 3),
             "head width": lambda s: np.tile(s, 4), "grouped": lambda s: np.tile(s, 2)[:, None, None],
             "behind grouped": lambda s: np.tile(s, 2)[:, None, None]}  # fmt: skip
    return along[name](numbers)


def same(one: onnx.ModelProto, other: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    for a, b in zip(outputs_of(one, [{"x": drawn((4, *shape), 1)}]), outputs_of(other, [{"x": drawn((4, *shape), 1)}]), strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gates_give_what_the_gated_network_gives(name: str) -> None:
    case = CASES[name]()
    size = spa.analyze(case.model).groups.by_name[case.group].size
    gate = RNG.uniform(0.3, 2, size)
    gate[1] = 0
    result = spa.prune(case.model, scores={f"gate:{case.group}": gate})
    assert result.plan.groups == {case.group: {"size": size, "kept": [i for i in range(size) if i != 1]}}
    assert result.check is not None
    assert result.check.passed
    same(result.to_proto(), multiplied(case.model, case.values[0], spread(name, gate)), case.shape)


def test_a_fold_that_is_wrong_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, *, factors: Any, inputs: Any = None) -> int:
        return scales.fold(graph, factors={n: {**e, "axes": {a: x[::-1] for a, x in e["axes"].items()}} for n, e in factors.items()})

    monkeypatch.setitem(KINDS, scales.EDIT, Kind(wrong, scales.insert))
    with pytest.raises(spa.CheckFailed):
        spa.prune(mlp(), scores={"mask:w1:1": np.arange(10) > 2, "scale:w1:1": np.arange(1.0, 11)})


def test_a_plan_carries_scales_to_another_checkpoint(tmp_path: Path) -> None:
    gate = np.array([0, 1, 2, 3, 0.5] * 2)
    plan = spa.plan(mlp(), scores={"gate:w1:1": gate})
    plan.save(tmp_path / "p.json")
    other = mlp(scale=(2, 0.5))
    result = spa.apply(other, tmp_path / "p.json", other_weights=True)
    same(result.to_proto(), multiplied(other, "r", gate), (6,))
    kept = np.flatnonzero(gate)
    np.testing.assert_allclose(weights_of(result.to_proto())["w2"], (weights_of(other)["w2"] * gate[:, None])[kept], rtol=1e-6)


def test_masks_decide_and_a_ratio_is_for_the_others() -> None:
    model = chain()
    mask = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
    alone = spa.prune(model, scores={"w1:0": mask})
    assert {n: e["kept"] for n, e in alone.plan.groups.items()} == {"w1:0": [0, 2, 3, 4, 6, 7]}
    both = spa.prune(model, 0.5, scores={"w1:0": mask}, multiple_of=1)
    assert both.plan.groups["w1:0"]["kept"] == [0, 2, 3, 4, 6, 7]
    assert len(both.plan.groups["w2:0"]["kept"]) == 3


@pytest.mark.parametrize("key", ["w1:1", "r:1", "score:w1:1", "b1"])
def test_scores_stand_in_for_the_criterion(key: str) -> None:
    importance = RNG.permutation(10) + 0.5
    plan = spa.plan(mlp(), 0.5, scores={key: importance}, multiple_of=1)
    assert plan.groups["w1:1"]["kept"] == sorted(np.argsort(importance)[5:].tolist())


def chain() -> onnx.ModelProto:
    body = "a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b) y = Conv(s, w3)"
    return net("float[n,3,4,4] x -> float[n,2,4,4] y", body, w1=(8, 3, 1, 1), w2=(6, 8, 1, 1), w3=(2, 6, 1, 1))


def test_groups_without_scores_go_by_the_criterion() -> None:
    plain = spa.plan(chain(), 0.5, multiple_of=1).groups
    plan = spa.plan(chain(), 0.5, scores={"w1:0": np.array([3.0, 2, 1, 0, 7, 6, 5, 4])}, multiple_of=1)
    assert plan.groups == {"w1:0": {"size": 8, "kept": [4, 5, 6, 7]}, "w2:0": plain["w2:0"]}


def test_numbers_by_position_are_those_of_the_axis() -> None:
    """Six channels of two convolution groups: three coordinates, each at two positions."""
    scores = np.array([3.5, 1.5, 2.5, 3.5, 1.5, 2.5])
    plan = spa.plan(grouped(), scores={"mask:w2:0": (scores > 2).astype(int)}, multiple_of=1)
    assert plan.groups["w2:0"]["kept"] == [0, 2]
    with pytest.raises(spa.BadOption, match="lies along several axes or groups"):
        spa.plan(grouped(), scores={"mask:q:1": [1, 1, 1, 1, 0, 1]})


REFUSED = {
    "no group or value 'w9:0'": {"w9:0": np.ones(3)},
    "near it are": {"w11:1": np.ones(10)},
    "holds 9 numbers, but has 10 channels": {"w1:1": np.arange(9.0)},
    "holds NaN": {"w1:1": np.full(10, np.nan)},
    "holds infinity": {"scale:w1:1": np.full(10, np.inf)},
    "must have one axis": {"w1:1": np.ones((2, 5))},
    "holds <U1, but scores": {"w1:1": np.array(["a"] * 10)},
    "is a mask, but holds other numbers": {"mask:w1:1": np.arange(10)},
    "masks all 10 channels of w1:1": {"w1:1": np.zeros(10)},
    "of which another array has spoken": {"w1:1": np.arange(10.0), "b1:0": np.arange(10.0)},
    "which must stay": {"mask:w2:1": np.array([1, 1, 1, 1, 0])},
    "reaches the output 'y'": {"scale:w2:1": np.full(5, 2.0)},
    "holds no arrays": {},
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_fit_is_refused(says: str) -> None:
    with pytest.raises(spa.BadOption) as caught:
        spa.prune(mlp(), 0.5, scores=REFUSED[says])
    assert says in str(caught.value)
    assert str(caught.value).endswith(".")


def test_scales_that_can_not_be_folded_are_refused() -> None:
    with pytest.raises(spa.BadOption, match="sums over it without stored weights"):
        spa.prune(attention(), scores={"gate:wq:1": np.array([1.5, 0, 1])})
    normed = net("float[n,6] x -> float[n,5] y", "h = MatMul(x, w1) m = LayerNormalization(h, s, b) y = MatMul(m, w2)", w1=(6, 10), s=(10,),
                 b=(10,), w2=(10, 5))  # fmt: skip
    with pytest.raises(spa.BadOption, match="takes a statistic over it"):
        spa.prune(normed, 0.5, scores={"scale:w1:1": np.full(10, 2.0)})


def test_the_command(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", **{"gate:w1:1": np.array([0, 1, 2, 3, 0.5] * 2)})
    small = tmp_path / "small.onnx"
    result = run("prune", tmp_path / "m.onnx", "-o", small, "--scores", tmp_path / "s.npz", "--no-bench")
    assert result.exit_code == 0, result.stderr
    same(onnx.load(small), multiplied(mlp(), "r", np.array([0, 1, 2, 3, 0.5] * 2)), (6,))
    result = run("plan", tmp_path / "m.onnx", "-o", tmp_path / "p.json", "--scores", tmp_path / "s.npz")
    assert result.exit_code == 0, result.stderr
    assert spa.load_plan(tmp_path / "p.json").groups == spa.load_plan(tmp_path / "small.plan.json").groups


def test_what_the_command_refuses(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    (tmp_path / "bad.npz").write_bytes(b"no arrays")
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "s.npz", **{"w1:1": np.arange(10) > 3})
    np.savez(tmp_path / "o.npz", **{"w1:1": np.array([{}] * 10)})

    def no(file: str, *more: str, says: str) -> None:
        refused(tmp_path, "prune", tmp_path / "m.onnx", "-o", tmp_path / "t.onnx", "--scores", tmp_path / file, *more, says=says)

    no("none.npz", says="none.npz can't be read as .npz")
    no("bad.npz", says="bad.npz can't be read as .npz")
    no("o.npz", says="o.npz can't be read as .npz")
    no("one.npy", says="is no .npz file")
    no("s.npz", "--target", "macs=0.5", says="--target needs scores")
    no("s.npz", "--ratio", "0.5", "--steps", "2", says="prune in one step")


def test_a_sweep_takes_scores(tmp_path: Path) -> None:
    scores = {"w1:0": np.array([3.0, 2, 1, 0, 7, 6, 5, 4])}
    feeds = [{"x": drawn((4, 3, 4, 4), 1)} for _ in range(2)]
    how: dict[str, Any] = {"ratio": [0.25, 0.5], "multiple_of": 1, "repair": "none", "calibration": feeds}
    found = spa.sweep(chain(), tmp_path / "s", scores=scores, **how)
    kept = [spa.load_plan(tmp_path / "s" / p.plan).groups["w1:0"]["kept"] for p in found.points]
    assert sorted(kept, key=len) == [[4, 5, 6, 7], [0, 1, 4, 5, 6, 7]]
    with pytest.raises(spa.BadOption, match="other settings"):
        spa.sweep(chain(), tmp_path / "s", scores={"w1:0": np.arange(8.0)}, **how)
    with pytest.raises(spa.BadOption, match="'gate:w1:0' is no score"):
        spa.sweep(chain(), tmp_path / "t", scores={"gate:w1:0": np.arange(8.0)}, **how)
