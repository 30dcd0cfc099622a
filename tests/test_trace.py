"""Tracing: which axes are tied to which, and why what stays has to stay. Home of `net`, the small models of these tests."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import spa


def net(values: str, body: str, opset: int = 17, ir: int = 8, **weights: Any) -> onnx.ModelProto:
    """A model from the onnx text "inputs -> outputs", "nodes"; weights are arrays, or shapes to be drawn from their names."""
    inputs, outputs = values.split(" -> ")
    text = f'<ir_version: {ir}, opset_import: ["" : {opset}, "my" : 1, "com.microsoft" : 1]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for name, weight in weights.items():
        if isinstance(weight, tuple):
            fan = max(int(np.prod(weight[1:])), 1)
            weight = (np.random.default_rng(zlib.crc32(name.encode())).standard_normal(weight) / np.sqrt(fan)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(weight), name))
    return model


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def groups_of(model: onnx.ModelProto, **settings: Any) -> spa.Groups:
    return spa.analyze(model, **settings).groups


def free(model: onnx.ModelProto, **settings: Any) -> dict[str, int]:
    """Free groups: name -> size."""
    return {g.name: g.size for g in groups_of(model, **settings).free()}


def reason(groups: spa.Groups, value: str, axis: int) -> str:
    """Why an axis stays, in the words that a person reads."""
    traced = groups.traced
    found = (traced.axes[value] or ())[axis]
    if found.labels is None:
        return str(traced.reasons[found.why])
    return str(traced.reasons[traced.atoms.a_cause(found.labels)]).strip()


CHAIN = "a = Conv <pads=[1,1,1,1]> (x, w1, b1) r = Relu(a) f = Flatten(r) y = Gemm <transB=1> (f, w2)"


def chain() -> onnx.ModelProto:
    return net("float[2,3,8,8] x -> float[2,5] y", CHAIN, w1=(8, 3, 3, 3), b1=(8,), w2=(5, 512))


def test_inputs_outputs_and_windows_stay() -> None:
    groups = groups_of(chain())
    assert reason(groups, "x", 1) == "axis 1 of x is an input of the graph"
    assert reason(groups, "y", 1) == "axis 1 of y is an output of the graph (--no-protect-outputs lets it shrink)"
    assert reason(groups, "w1", 1) == "axis 1 of x is an input of the graph"
    assert reason(groups, "w1", 2) == "axis 2 of w1 is a kernel's extent at Conv a"
    assert str(groups.by_name["w2:0"].frozen) == reason(groups, "w2", 0) == reason(groups, "y", 1)
    assert reason(groups, "a", 1) == ""


def test_outputs_shrink_where_they_may() -> None:
    assert free(chain()) == {"w1:0": 8}
    assert free(chain(), protect_outputs=False) == {"w1:0": 8, "w2:0": 5}


def test_an_unknown_operator_holds_what_it_touches() -> None:
    model = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) k = my.Strange(h) z = MatMul(h, w2) y = MatMul(z, w3)",
                w1=(4, 8), w2=(8, 6), w3=(6, 5))
    groups = groups_of(model)
    assert free(model) == {"w2:1": 6}
    assert str(groups.by_name["w1:1"].frozen) == "axis 1 of h goes through an operator without a signature (my) at Strange k"


def test_an_unknown_shape_holds() -> None:
    body = "h = MatMul(x, w1) i = NonZero(h) j = Cast<to=1>(i) z = MatMul(x, w3) k = MatMul(z, w4) y = MatMul(w2, j)"
    model = net("float[2,4] x -> float[2,n] y, float[2,3] k", body, w1=(4, 8), w2=(8, 2), w3=(4, 6), w4=(6, 3))
    groups = groups_of(model)
    assert free(model) == {"w3:1": 6}
    assert reason(groups, "w1", 1) == "axis 1 of h stays because its positions or sizes depend on data, at NonZero i"
    assert reason(groups, "w2", 0) == "axis 0 of w2 stays because the shape of an operand is unknown, at MatMul y"


def test_what_a_body_uses_stays() -> None:
    body = """
     h = Gemm <transB=1> (x, w1) p = Gemm <transB=1> (h, w2) q = Gemm <transB=1> (p, w4)
     y = If (c) <then_branch = t () => (float[2,5] o) { o = MatMul(h, w3) }, else_branch = e () => (float[2,5] u) { u = MatMul(q, w3) }>"""
    model = net("float[2,4] x, bool c -> float[2,5] y", body, w1=(8, 4), w2=(6, 8), w3=(8, 5), w4=(8, 6))
    groups = groups_of(model)
    assert free(model) == {"w2:0": 6}
    assert reason(groups, "h", 1) == "axis 1 of h is used inside the node's body at If y"
    assert reason(groups, "q", 1) == "axis 1 of q is used inside the node's body at If y"


def test_statistics_only_where_they_may() -> None:
    model = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) s = Softmax(h) y = MatMul(s, w2)", w1=(4, 8), w2=(8, 5))
    assert free(model) == {"w1:1": 8}
    groups = groups_of(model, stat=False)
    assert groups.free() == []
    assert reason(groups, "w1", 1) == "axis 1 of h is what a normalisation runs over (--no-stat) at Softmax s"


def test_an_operand_that_is_a_setting_stays() -> None:
    body = "h = MatMul(x, w1) e = Shape(h) n = Einsum <equation=\"ab->b\"> (h) i = Cast<to=7>(n) g = Gather(t, i) y = MatMul(g, w2)"
    model = net("float[2,4] x -> float[8,5] y", body, w1=(4, 8), t=(16, 6), w2=(6, 5))
    found = free(model)
    assert "w1:1" not in found
    assert found["t:1"] == 6


@pytest.mark.parametrize(
    "body, held",
    [
        ("h = MatMul(x, w1) y = ArgMax<axis=1, keepdims=0>(h)", "axis 1 of h has its positions read by output y at ArgMax y"),
        ("h = MatMul(x, w1) u = CumSum(h, one) v = ReduceSum<keepdims=0>(u, ax) y = Cast<to=7>(v)",
         "axis 1 of h the order of all positions along it matters at CumSum u"),
    ],
)
def test_fixed_dims_say_why(body: str, held: str) -> None:
    model = net("float[2,4] x -> int64[2] y", body, w1=(4, 8), one=np.array(1), ax=ints(1))
    assert reason(groups_of(model), "h", 1) == held


def test_tracing_mutates_nothing_and_repeats() -> None:
    normal = spa.normalize(spa.load(chain()))
    before = spa.storage.store.to_bytes(normal.model)
    one, two = (spa.find_groups(spa.trace(normal.model.graph, normal.facts)) for _ in range(2))
    assert spa.storage.store.to_bytes(normal.model) == before
    assert one.groups == two.groups


def test_a_custom_operator_with_a_signature_passes() -> None:
    spa.signature("Doubled", domain="my", pattern="*a -> *a")
    model = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) k = my.Doubled(h) y = MatMul(k, w2)", w1=(4, 8), w2=(8, 5))
    assert free(model) == {"w1:1": 8}
    spa.signature("Contradiction", domain="my", pattern="a b -> b a", a=spa.MAP)
    model = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) k = my.Contradiction(h) y = MatMul(k, w2)", w1=(4, 8), w2=(8, 5))
    assert free(model) == {}
