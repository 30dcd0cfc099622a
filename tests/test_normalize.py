"""Normalising keeps the function, leaves the given model alone, and has nothing left to do the second time."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from test_trace import ints, net

import spa
from spa.proof.check import run
from spa.storage.store import to_bytes

SHUFFLE = "a = Conv(x, w1, b) b1 = Reshape(a, s) c = Transpose<perm=[0,2,1,3,4]>(b1) d = Reshape(c, t) y = Conv(d, w2, b)"


def shuffled() -> onnx.ModelProto:
    return net("float[2,6,2,2] x -> float[2,8,2,2] y", SHUFFLE, w1=(8, 6, 1, 1), w2=(8, 8, 1, 1), b=(8,), s=ints(2, 2, 4, 2, 2),
               t=ints(2, 8, 2, 2))


def arithmetic() -> onnx.ModelProto:
    body = "s = Shape(x) b = Gather(s, zero) u = Unsqueeze(b, axis) t = Concat<axis=0>(u, rest) y = Reshape(x, t)"
    return net("float[4,6] x -> float[4,3,2] y", body, zero=np.array(0), axis=ints(0), rest=ints(3, 2))


def tied() -> onnx.ModelProto:
    return net("float[4,6] x -> float[4,6] y", "a = Add(x, b) c = Mul(a, b) y = Relu(c)", b=(6,))


@pytest.mark.parametrize("make", [shuffled, arithmetic, tied])
def test_the_function_stays_and_so_does_the_given_model(make) -> None:
    given = spa.load(make())
    before = to_bytes(given)
    normal = spa.normalize(given)
    assert to_bytes(given) == before
    assert to_bytes(normal.model) != before
    feeds = {"x": np.random.default_rng(0).standard_normal(normal.facts.feeds["x"]).astype(np.float32)}
    for name, value in run(given, feeds).items():
        assert np.array_equal(run(normal.model, feeds)[name], value)
    again = spa.normalize(normal.model)
    assert again.copies == {}
    assert [n.op for n in again.model.graph.nodes] == [n.op for n in normal.model.graph.nodes]
    assert to_bytes(again.model) == to_bytes(normal.model)


def test_all_three_passes() -> None:
    normal = spa.normalize(spa.load(shuffled()))
    assert [n.op for n in normal.model.graph.nodes] == ["Conv", "Gather", "Conv"]
    assert normal.copies == {"b/copy1": "b"}
    assert normal.facts.shapes["b/copy1"] == (8,)
    assert [n.op for n in spa.normalize(spa.load(arithmetic())).model.graph.nodes] == ["Reshape"]


SUM = "a = MatMul(x, u) b = MatMul(a, v) c = Add(b, t) "


@pytest.mark.parametrize(("body", "width", "copies"), [
    ("i = Identity(t) y = Add(c, i)", 100, {"t/copy1": "t"}),  # what is only added, as a table of relative positions is
    ("i = Identity(t) y = Add(c, i)", 8, {}),  # a copy would be more than a tenth of the model
    ("y = Mul(c, t)", 100, {}),  # a scale may be tied on purpose
    ("y = MatMul(c, t)", 100, {}),  # as may a matrix
])  # fmt: skip
def test_large_offsets_are_no_tied_weights(monkeypatch: pytest.MonkeyPatch, body: str, width: int, copies: dict[str, str]) -> None:
    monkeypatch.setattr(sys.modules["spa.graph.normalize"], "SHARED", 10)  # `spa.normalize` is the function
    model = net("float[12,12] x -> float[12,12] y", SUM + body, u=(12, width), v=(width, 12), t=(12, 12))
    assert spa.normalize(spa.load(model)).copies == copies


def test_a_graph_with_nothing_to_do() -> None:
    given = spa.load(net("float[2,4] x -> float[2,5] y", "y = MatMul(x, w)", w=(4, 5)))
    normal = spa.normalize(given)
    assert normal.copies == {}
    assert to_bytes(normal.model) == to_bytes(given)


def test_inputs_are_passed_on() -> None:
    body = "s = Shape(x) y = Reshape(z, s)"
    model = spa.load(net("float[n,6] x, float[k] z -> float[n,6] y", body))
    assert [n.op for n in spa.normalize(model).model.graph.nodes] == ["Shape", "Reshape"]
    fixed = spa.normalize(model, {"x": [4, 6], "z": [24]})
    assert [n.op for n in fixed.model.graph.nodes] == ["Reshape"]
    assert fixed.facts.feeds == {"x": (4, 6), "z": (24,)}


def test_declared_shapes_that_are_false_are_forgotten() -> None:
    """jax2onnx moves transposes and leaves the shapes of what lies between them; ONNX Runtime refuses the masked graph then."""
    proto = net("float[2,3,8,8] x -> float[2,4,8,8] y", "a = Conv(x, w1) b = Relu(a) y = Conv(b, w2)", w1=(6, 3, 1, 1), w2=(4, 6, 1, 1))
    proto.graph.value_info.extend(onnx.helper.make_tensor_value_info(n, 1, s) for n, s in {"a": (2, 8, 8, 6), "b": ("n", 6, 8, 8)}.items())
    shapes = {n: t.shape for n, t in spa.normalize(spa.load(proto)).model.graph.tensors().items()}
    assert shapes["a"] is None
    assert shapes["b"] == ["n", 6, 8, 8]
    assert spa.prune(proto, 0.5, multiple_of=1).check.passed
