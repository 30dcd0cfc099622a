"""Shapes, types and small constants: static and dynamic graphs, and which shape arithmetic depends on free sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from test_trace import ints, net

import spa
from spa.errors import BadModel, BadOption
from spa.graph.shapes import Facts, infer, with_new_constants
from spa.graph.view import constant_of, dtype_is_float, opset_of, stored, type_of, view


def facts_of(model: onnx.ModelProto, **inputs: Any) -> Facts:
    return infer(spa.load(model).graph, inputs)


def test_a_static_graph() -> None:
    model = net("float[2,3,8,8] x -> float[2,5] y", "a = Conv<strides=[2,2]>(x, w1) f = Flatten(a) y = Gemm<transB=1>(f, w2)",
                w1=(4, 3, 1, 1), w2=(5, 64))
    facts = facts_of(model)
    assert facts.shapes == {"x": (2, 3, 8, 8), "w1": (4, 3, 1, 1), "a": (2, 4, 4, 4), "f": (2, 64), "w2": (5, 64), "y": (2, 5)}
    assert set(facts.types.values()) == {TensorProto.FLOAT}
    assert not any(any(flags) for flags in facts.dynamic.values())
    assert facts.feeds == {"x": (2, 3, 8, 8)}
    assert facts.unknown == {}
    assert facts.computed == {}
    assert set(facts.values) == {"w1", "w2"}


def test_free_sizes_are_bound_and_remembered() -> None:
    model = net("float[n,3,h,w] x -> float[n,4,h,w] y", "y = Conv(x, w1)", w1=(4, 3, 1, 1))
    facts = facts_of(model)
    assert facts.feeds["x"] == (2, 3, 224, 224)
    assert facts.shapes["y"] == (2, 4, 224, 224)
    assert facts.dynamic["y"] == (True, False, True, True)
    assert facts.dynamic["w1"] == (False,) * 4


def test_axes_of_one_name_get_one_size() -> None:
    facts = facts_of(net("float[b,t] x, float[t,b] z -> float[b,b] y", "y = MatMul(x, z)"))
    assert facts.feeds["x"] == facts.feeds["z"][::-1]
    assert facts.shapes["y"] == (2, 2)


def test_a_size_that_fits_all_windows_is_found() -> None:
    """Tokens of a fixed table: only one of the sizes that are tried gives 64 patches."""
    body = "a = Conv<strides=[16,16]>(x, w) t = Reshape(a, s) y = Add(t, p)"
    facts = facts_of(net("float[n,3,h,w1] x -> float[n,6,64] y", body, w=(6, 3, 16, 16), s=ints(0, 6, -1), p=(1, 6, 64)))
    assert facts.unknown == {}
    assert facts.feeds["x"] == (2, 3, 128, 128)


CHAIN = """
 s = Shape(x) b = Gather(s, i0) c = Gather(s, i1)
 bu = Unsqueeze(b, zero) cu = Unsqueeze(c, zero) half = Div(cu, two)
 t = Concat<axis=0>(bu, two, half) y = Reshape(x, t)"""


def chain(batch: str) -> onnx.ModelProto:
    return net(f"float[{batch},6] x -> float[{batch},2,3] y", CHAIN, i0=np.array(0), i1=np.array(1), zero=ints(0), two=ints(2))


def test_chains_are_folded_where_nothing_is_free() -> None:
    facts = facts_of(chain("4"))
    assert {n: v.tolist() for n, v in facts.computed.items()} == {
        "s": [4, 6], "b": 4, "c": 6, "bu": [4], "cu": [6], "half": [3], "t": [4, 2, 3]}
    assert facts.shapes["y"] == (4, 2, 3)
    normal = spa.normalize(spa.load(chain("4")))
    assert [n.op for n in normal.model.graph.nodes] == ["Reshape"]


def test_elements_depend_one_by_one() -> None:
    """Of [n, 2, 6 / 2] only the first depends on n; the list as a whole stays computed, its parts are folded."""
    facts = facts_of(chain("n"))
    assert {n: v.tolist() for n, v in facts.computed.items()} == {"c": 6, "cu": [6], "half": [3]}
    assert facts.values["t"].tolist() == [2, 2, 3]
    assert facts.shapes["y"] == (2, 2, 3)
    assert facts.dynamic["y"] == (True, False, False)
    normal = spa.normalize(spa.load(chain("n")))
    assert [n.op for n in normal.model.graph.nodes] == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]


@pytest.mark.parametrize(
    "body, folded",
    [
        ("s = Shape(x) p = Slice(s, one, two) y = Identity(p)", {"p"}),
        ("s = Shape<start=1>(x) y = Identity(s)", {"s"}),
        ("s = Shape<end=1>(x) y = Identity(s)", set()),
        ("s = Shape(x) p = Slice(s, zero, one) y = Identity(p)", set()),
        ("s = Shape(x) r = ReduceProd<keepdims=0>(s) q = Mul(r, zero) y = Unsqueeze(q, zero)", set()),
        ("s = Shape(x) p, q = Split<axis=0>(s, halves) r = Add(q, one) y = Identity(r)", {"q", "r"}),
        ("s = Shape(x) i = Gather(s, zero) p = Gather(both, i) y = Identity(p)", set()),
        ("s = Size(x) y = Unsqueeze(s, zero)", set()),
    ],
)
def test_what_depends_on_a_free_size(body: str, folded: set[str]) -> None:
    model = net("float[n,6] x -> int64[k] y", body, zero=ints(0), one=ints(1), two=ints(2), halves=ints(1, 1), both=ints(4, 5, 6, 7))
    assert set(facts_of(model).computed) - {"y"} == folded


def test_inputs_can_be_fixed() -> None:
    facts = facts_of(chain("n"), x=[5, 6])
    assert facts.feeds == {"x": (5, 6)}
    assert facts.computed["t"].tolist() == [5, 2, 3]
    assert facts.dynamic["y"] == (False,) * 3


def test_inputs_that_can_not_be_fixed() -> None:
    with pytest.raises(BadOption, match="--input names 'q', which is not an input of the model; its inputs are: x"):
        facts_of(chain("n"), q=[5, 6])
    with pytest.raises(BadOption, match="--input x has 3 sizes, but the model declares 2 axes"):
        facts_of(chain("n"), x=[1, 5, 6])


def test_an_input_of_unknown_rank() -> None:
    model = chain("n")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(BadModel, match="The shape of input 'x' is not in the model: give it with --input x"):
        facts_of(model)
    assert facts_of(model, x=[3, 6]).shapes["y"] == (3, 2, 3)


def test_nodes_without_a_shape_are_named() -> None:
    facts = facts_of(net("float[2,4] x -> float[2,n] y", "k = my.Strange(x) i = NonZero(x) z = Cast<to=1>(i) y = MatMul(x, z)"))
    assert facts.shapes["k"] is None
    assert facts.unknown["k"] == "the shape of its output is not known"
    assert set(facts.unknown) >= {"k", "i"}
    assert facts.shapes["x"] == (2, 4)


def test_nodes_that_contradict_themselves_are_named() -> None:
    facts = facts_of(net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w) y = Relu(h)", w=(3, 5)))
    assert "h" in facts.unknown


def test_declared_shapes_help_unknown_operators() -> None:
    model = net("float[2,4] x -> float[2,4] y", "k = my.Strange(x) y = Relu(k)")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("k", TensorProto.FLOAT, [2, 4]))
    assert facts_of(model).shapes["k"] == (2, 4)


def test_a_signature_gives_the_shape_that_onnx_does_not_know() -> None:
    spa.signature("Mix", domain="my", pattern="n c, c k -> n (c|k)")
    assert facts_of(net("float[2,4] x -> float[2,n] y", "y = my.Mix(x, w)", w=(4, 3))).shapes["y"] == (2, 7)


def test_large_constants_and_draws_are_no_arithmetic() -> None:
    model = net("float[2,4] x -> float[2,4] y", "r = RandomUniform<shape=[2,4]>() z = Identity(w) y = Sum(x, r, z)", w=(2, 4))
    facts = facts_of(model)
    assert facts.computed == {}
    big = net("float[2,5000] x -> float[2,5000] y", "y = Add(x, w)", w=(5000,))
    assert facts_of(big).values == {}


def test_new_constants_join_the_facts() -> None:
    loaded = spa.load(net("float[2,6] x -> float[2,6] y", "a = Add(x, b) y = Mul(a, b)", b=(6,)))
    facts = infer(loaded.graph)
    normal = spa.normalize(loaded)
    assert normal.copies == {"b/copy1": "b"}
    assert with_new_constants(facts, normal.model.graph).shapes["b/copy1"] == (6,)
    assert normal.facts.types["b/copy1"] == TensorProto.FLOAT
    assert "b/copy1" not in facts.shapes
    assert np.array_equal(normal.facts.values["b/copy1"], facts.values["b"])


def test_views_of_nodes() -> None:
    model = net("float[2,6] x -> float[2,2] y",
                'k = Constant<value = int64[2] {3, 1}>() z = Gather<axis=1>(x, k) y = Clip(z, "", w)', w=np.float32(3))
    graph = spa.load(model).graph
    facts = infer(graph)
    constant, gather, clip = graph.nodes
    seen = view(graph, gather, facts.shapes, facts.values, {"k"})
    assert (seen.op, seen.domain, seen.opset, seen.inputs, seen.outputs) == ("Gather", "", 17, ((2, 6), (2,)), ((2, 2),))
    assert seen.present == (True, True)
    assert seen.value(0) is None
    assert seen.value(1).tolist() == [3, 1]  # type: ignore[union-attr]
    assert seen.value(9) is None
    assert seen.positions(1).tolist() == [3, 1]  # type: ignore[union-attr]
    assert seen.positions(0) is None
    assert (seen.constant(0), seen.constant(1)) == (False, True)
    assert view(graph, clip, facts.shapes, facts.values, set()).present == (True, False, True)
    assert constant_of(constant) is not None
    assert constant_of(gather) is None
    assert [stored(t) for t in gather.inputs] == [False, True]
    assert opset_of(graph, "") == 17
    assert opset_of(graph, "my") == 1


def test_types() -> None:
    assert dtype_is_float(np.float16)
    assert dtype_is_float(TensorProto.BFLOAT16)
    assert not dtype_is_float(np.int64)
    assert type_of(np.float32) == TensorProto.FLOAT
    assert type_of(None) == 0
    assert type_of("nonsense") == 0
