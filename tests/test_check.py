"""The proof: how results are compared, and that a pruned model that is wrong is caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import net

import spa
from spa.api import prove
from spa.errors import CheckFailed, UnsupportedModel
from spa.plans.plan import mask_of
from spa.proof.check import Check, Difference, compare, difference, run, session

NAN, INF = np.nan, np.inf


def f(*values: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(values, dtype)


@pytest.mark.parametrize(
    "one, two, absolute, relative",
    [
        (f(1, 2), f(1, 2), 0, 0),
        (f(1, 4), f(1, 3), 1, 0.25),
        (f(-4, 0), f(-4, 2), 2, 0.5),
        (f(0, 0), f(0, 0), 0, 0),
        (f(0, 0), f(0, 1), 1, INF),
        (f(NAN, 2), f(NAN, 1), 1, 0.5),
        (f(NAN, 2), f(2, NAN), INF, INF),
        (f(NAN, 2), f(2, 2), INF, INF),
        (f(2, 2), f(NAN, 2), INF, INF),
        (f(INF, 2), f(INF, 2), 0, 0),
        (f(INF, 2), f(-INF, 2), INF, INF),
        (f(INF, 2), f(NAN, 2), INF, INF),
        (f(NAN), f(NAN), 0, 0),
        (f(1, 2), f(1, 2, 3), INF, INF),
        (f(1, 2), f(1, 2).reshape(2, 1), INF, INF),
        (f(), f(), 0, 0),
        (np.float32(3), np.float32(3), 0, 0),
        (f(1, 2, dtype=np.float16), f(1, 1, dtype=np.float16), 1, 0.5),
        (f(1, 2, dtype=np.int64), f(1, 4, dtype=np.int64), 2, 1),
        (np.array([True, False]), np.array([True, True]), 1, 1),
        (np.array(["a", "b"], object), np.array(["a", "b"], object), 0, 0),
        (np.array(["a", "b"], object), np.array(["a", "c"], object), INF, INF),
        ([f(1), f(2)], [f(1), f(2)], 0, 0),
        ([f(1), f(2)], [f(1)], INF, INF),
        ({"a": 1.0}, {"a": 1.0}, 0, 0),
        ({"a": 1.0}, {"a": 2.0}, INF, INF),
    ],
)
def test_differences(one: Any, two: Any, absolute: float, relative: float) -> None:
    found = difference("y", one, two)
    assert (found.output, found.absolute, found.relative) == ("y", absolute, relative)


def test_the_scale_is_that_of_the_output() -> None:
    one = np.linspace(-1000, 1000, 7, dtype=np.float32)
    assert difference("y", one, one + 0.1).relative == pytest.approx(1e-4, rel=1e-3)


def test_the_worst_output_decides() -> None:
    check = Check((Difference("a", 1, 1e-6), Difference("b", 1, 2e-4)), 1e-4)
    assert check.worst == 2e-4
    assert not check.passed
    assert Check(check.differences, 1e-3).passed
    assert not Check((Difference("a", INF, INF),), 1e9).passed
    assert Check((), 1e-4).passed


def model() -> onnx.ModelProto:
    return net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)", w1=(4, 8), w2=(8, 5))


def tampered(made: onnx.ModelProto, name: str, position: int, change: float) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    for tensor in copy.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            array.flat[position] += change
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    return copy


def proof_of(small: onnx.ModelProto) -> Check:
    analysis = spa.analyze(model())
    plan = spa.plan(analysis, 0.5, multiple_of=1)
    return prove(analysis.normal.model, analysis.groups, mask_of(plan, analysis.groups), spa.load(small))


@pytest.mark.parametrize("name, position", [("w1", 0), ("w1", 15), ("w2", 0), ("w2", 19)])
def test_one_wrong_weight_is_caught(name: str, position: int) -> None:
    small = spa.prune(model(), 0.5, multiple_of=1).to_proto()
    assert proof_of(small).passed
    wrong = proof_of(tampered(small, name, position, 0.1))
    assert not wrong.passed
    assert 1e-4 < wrong.worst < np.inf


def test_the_wrong_channels_are_caught() -> None:
    small = spa.prune(model(), 0.5, multiple_of=1, criterion="random").to_proto()
    assert not proof_of(small).passed


def test_prune_writes_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import spa.plans.cutting

    right = spa.plans.cutting.rewrite

    def wrong(*args: Any) -> Any:
        graph = right(*args)
        tensor = graph.nodes[0].inputs[1]
        tensor.values = tensor.values * 1.01
        return graph

    monkeypatch.setattr(spa.plans.cutting, "rewrite", wrong)
    with pytest.raises(CheckFailed, match=r"output 'y' by .* of its scale, where 1e-04 is allowed; nothing was written"):
        spa.prune(model(), 0.5, multiple_of=1)
    assert spa.prune(model(), 0.5, multiple_of=1, tolerance=0.1).check.worst > 1e-3  # type: ignore[union-attr]


def test_a_proof_that_sees_nothing_fails() -> None:
    made = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) l = MatMul(h, w2) q = Sub(l, l) y = Div(q, q)", w1=(4, 8), w2=(8, 5))
    with pytest.raises(CheckFailed, match="NaN or infinity alone, so nothing can be proven"):
        spa.prune(made, 0.5, multiple_of=1)
    assert spa.prune(made, 0.5, multiple_of=1, check=False).check is None


def test_one_output_that_tells_is_enough() -> None:
    body = "h = MatMul(x, w1) y = MatMul(h, w2) q = Sub(y, y) z = Div(q, q)"
    made = net("float[2,4] x -> float[2,5] y, float[2,5] z", body, w1=(4, 8), w2=(8, 5))
    assert spa.prune(made, 0.5, multiple_of=1).check.passed  # type: ignore[union-attr]


def test_outputs_that_are_missing_or_cut() -> None:
    loaded = spa.load(model())
    other = spa.load(net("float[2,4] x -> float[2,8] z", "z = MatMul(x, w1)", w1=(4, 8)))
    x = {"x": np.ones((2, 4), np.float32)}
    assert compare(loaded, other, x).worst == np.inf
    assert compare(loaded, loaded, x).worst == 0
    narrow = spa.load(tampered(model(), "w2", 0, 0))
    assert compare(loaded, narrow, x, kept={"y": {1: np.array([0, 1])}}).worst == np.inf


def test_outputs_that_shrink_are_compared_where_they_are_kept() -> None:
    result = spa.prune(model(), 0.5, multiple_of=1, protect_outputs=False)
    assert [d.dim_value for d in result.to_proto().graph.output[0].type.tensor_type.shape.dim] == [2, 2]
    assert result.check is not None
    assert result.check.passed


def test_models_that_do_not_load_or_run() -> None:
    with pytest.raises(UnsupportedModel, match="ONNX Runtime does not load the model"):
        session(spa.load(net("float[2,4] x -> float[2,4] y", "y = my.Strange(x)")))
    with pytest.raises(UnsupportedModel, match="ONNX Runtime does not run the model"):
        run(spa.load(model()), {"x": np.ones((2, 3), np.float32)})
    found = run(spa.load(model()), {"x": np.ones((2, 4), np.float32), "unknown": np.ones(1)}, optimize=False)
    assert found["y"].shape == (2, 5)
