"""Rewriting: what is deleted, what is restated, and that the rest is as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_groups import attention
from test_trace import ints, net

import spa
from spa.errors import SpaError
from spa.storage.store import to_bytes


def pruned(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    """Half of every group, proven, and valid by onnx's own checker."""
    result = spa.prune(model, **{"ratio": 0.5, "multiple_of": 1, **options})
    assert result.check is not None
    assert result.check.worst < 1e-5
    small = result.to_proto()
    onnx.checker.check_model(small, full_check=True)
    return small


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


def constant(model: onnx.ModelProto, op: str, index: int) -> list[int]:
    """Input `index` of the first node of an operator, as numbers."""
    node = next(n for n in model.graph.node if n.op_type == op)
    held = {t.name: t for t in model.graph.initializer}
    return numpy_helper.to_array(held[node.input[index]]).ravel().tolist()


def attribute(model: onnx.ModelProto, op: str, name: str) -> Any:
    node = next(n for n in model.graph.node if n.op_type == op)
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}.get(name)


def test_initializers() -> None:
    model = net("float[2,4] x -> float[2,5] y", "h = Gemm<transB=1>(x, w1, b1) y = Gemm<transB=1>(h, w2)", w1=(8, 4), b1=(8,), w2=(5, 8))
    assert sizes(pruned(model)) == {"w1": (4, 4), "b1": (4,), "w2": (5, 4)}


def test_weights_in_constant_nodes() -> None:
    model = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", w2=(8, 5))
    w1 = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32), "held")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w1"], value=w1))
    small = pruned(model)
    assert list(small.graph.node[0].attribute[0].t.dims) == [4, 4]
    assert [n.op_type for n in small.graph.node] == ["Constant", "MatMul", "MatMul"]


def test_identity_of_an_initializer() -> None:
    body = "i = Identity(b) a = Conv(x, w1, b) c = Conv(a, w2, i) y = Conv(c, w3)"
    model = net("float[2,3,4,4] x -> float[2,5,4,4] y", body, w1=(8, 3, 1, 1), b=(8,), w2=(8, 8, 1, 1), w3=(5, 8, 1, 1))
    assert sizes(pruned(model))["w2"] == (4, 4, 1, 1)


@pytest.mark.parametrize("first, second", [((0, 0, 4, 6), (0, 0, 24)), ((0, -1, 4, 6), (0, -1, 24)), ((2, 7, 4, -1), (2, 7, -1)),
                                           ((2, 7, -1, 6), (2, 7, 24)), ((-1, 7, 4, 6), (-1, 7, 24))])
def test_reshapes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Elements of -1 and 0 stay; those that restate a width are restated."""
    model = attention()
    for tensor in model.graph.initializer:
        if tensor.name in "sf":
            tensor.CopyFrom(numpy_helper.from_array(ints(*(first if tensor.name == "s" else second)), tensor.name))
    small = pruned(model, include=["/^w[qkv]:1/"])
    assert sizes(small)["wq"] == (16, 12)
    found = constant(small, "Reshape", 1)
    assert found == [3 if n == 6 else n for n in first]
    last = [n for n in small.graph.node if n.op_type == "Reshape"][-1]
    held = {t.name: t for t in small.graph.initializer}
    assert numpy_helper.to_array(held[last.input[1]]).tolist() == [12 if n == 24 else n for n in second]


def test_computed_shapes_are_patched() -> None:
    body = """s = Shape(x) n = Slice(s, i0, i1) t = Slice(s, i1, i2)
      h = MatMul(x, w1) q = Concat<axis=0>(n, t, heads) r = Reshape(h, q) u = Transpose<perm=[0,2,1,3]>(r)
      v = Transpose<perm=[0,2,1,3]>(u) p = Concat<axis=0>(n, t, width) z = Reshape(v, p) y = MatMul(z, w2)"""
    model = net("float[n,t,16] x -> float[n,t,16] y", body, w1=(16, 24), w2=(24, 16), i0=ints(0), i1=ints(1), i2=ints(2),
                heads=ints(4, 6), width=ints(24))
    small = pruned(model)
    assert sizes(small)["w1"] == (16, 12)
    assert [n.op_type for n in small.graph.node].count("ScatterElements") == 2
    session = spa.proof.check.session(spa.load(small))
    assert session.run(None, {"x": np.ones((3, 5, 16), np.float32)})[0].shape == (3, 5, 16)


def test_batch_times_heads() -> None:
    """Reshape to (batch · heads, t, d) with a free batch: the first element is left to be inferred."""
    body = """s = Shape(x) n = Slice(s, i0, i1) h = MatMul(x, w1) r = Reshape(h, a) u = Transpose<perm=[0,2,1,3]>(r)
      nh = Mul(n, four) q = Concat<axis=0>(nh, rest) b = Reshape(u, q) c = Relu(b)
      p = Concat<axis=0>(n, back) v = Reshape(c, p) w = Transpose<perm=[0,2,1,3]>(v) z = Reshape(w, f) y = MatMul(z, w2)"""
    model = net("float[n,7,16] x -> float[n,7,16] y", body, w1=(16, 24), w2=(24, 16), i0=ints(0), i1=ints(1), four=ints(4),
                a=ints(0, 7, 4, 6), rest=ints(7, 6), back=ints(4, 7, 6), f=ints(0, 0, 24))
    analysis = spa.analyze(model)
    heads = next(g.name for g in analysis.groups.free() if g.size == 4)
    small = pruned(model, include=[heads])
    assert sizes(small)["w1"] == (16, 12)
    session = spa.proof.check.session(spa.load(small))
    assert session.run(None, {"x": np.ones((3, 7, 16), np.float32)})[0].shape == (3, 7, 16)


def test_two_free_sizes_of_which_one_changes() -> None:
    """(batch · heads, time, …) with an element of -1 elsewhere can't be restated: one sentence says what to exclude."""
    body = """s = Shape(x) n = Slice(s, i0, i1) h = MatMul(x, w1) r = Reshape(h, a) u = Transpose<perm=[0,2,1,3]>(r)
      nh = Mul(n, four) q = Concat<axis=0>(nh, rest) b = Reshape(u, q) c = Relu(b)
      p = Concat<axis=0>(n, back) v = Reshape(c, p) w = Transpose<perm=[0,2,1,3]>(v) z = Reshape(w, f) y = MatMul(z, w2)"""
    model = net("float[n,t,16] x -> float[n,t,16] y", body, w1=(16, 24), w2=(24, 16), i0=ints(0), i1=ints(1), four=ints(4),
                a=ints(0, 0, 4, 6), rest=ints(-1, 6), back=ints(4, -1, 6), f=ints(0, 0, 24))
    heads = next(g.name for g in spa.analyze(model).groups.free() if g.size == 4)
    with pytest.raises(SpaError, match=f"can't be resized .*: leave its groups out with --exclude: {heads}"):
        pruned(model, include=[heads])


SPLIT = "a = MatMul(x, w1) b, c = Split<axis=1{more}>(a{input}) d = MatMul(b, w2) e = MatMul(c, w3) y = Add(d, e)"


@pytest.mark.parametrize(
    "opset, more, given", [(17, "", ", s"), (11, ", split=[6,6]", ""), (17, "", ""), (18, ", num_outputs=2", "")]
)
def test_splits_with_uneven_parts(opset: int, more: str, given: str) -> None:
    """Only the first part shrinks, so even splits need their sizes spelled out."""
    weights: dict[str, Any] = {"w1": (4, 12), "w2": (6, 5), "w3": (6, 5)}
    if given:
        weights["s"] = ints(6, 6)
    model = net("float[2,4] x -> float[2,5] y", SPLIT.format(more=more, input=given), opset=opset, **weights)
    names = {g.name: g for g in spa.analyze(model).groups.free()}
    first = next(n for n, g in names.items() if ("w2", 0) in g.sites)
    small = pruned(model, include=[first])
    assert sizes(small)["w1"] == (4, 9)
    assert sizes(small)["w2"] == (3, 5)
    found = attribute(small, "Split", "split") if opset == 11 else constant(small, "Split", 1)
    assert list(found) == [3, 6]
    assert attribute(small, "Split", "num_outputs") is None


@pytest.mark.parametrize("starts, ends", [((2,), (8,)), ((-10,), (-4,)), ((2,), (-4,))])
def test_slices(starts: tuple[int, ...], ends: tuple[int, ...]) -> None:
    body = "a = MatMul(x, w1) b = Slice(a, s, e, one) c = MatMul(b, w2) d = MatMul(a, w3) y = Add(c, d)"
    model = net("float[2,4] x -> float[2,5] y", body, w1=(4, 12), s=ints(*starts), e=ints(*ends), one=ints(1), w2=(6, 5), w3=(12, 5))
    for criterion in ("l2", "random"):
        small = pruned(model, criterion=criterion)
        assert sizes(small)["w1"][1] == sizes(small)["w3"][0] < 12


def test_gathers_are_renumbered() -> None:
    body = "a = MatMul(x, w1) b = Gather<axis=1>(a, i) y = MatMul(b, w2)"
    index = ints(7, 0, 3, 3, 5, 1, 2, 6, 4)
    model = net("float[2,4] x -> float[2,5] y", body, w1=(4, 8), i=index, w2=(9, 5))
    plan = spa.plan(model, 0.5, multiple_of=1)
    small = pruned(model)
    kept = [p for p in range(8) if p not in plan.removed["w1"]["1"]]
    assert constant(small, "Gather", 1) == [kept.index(i) for i in index if i in kept]
    assert sizes(small)["w2"][0] == len(constant(small, "Gather", 1))


def test_squeeze_without_axes() -> None:
    """Squeeze without axes takes every axis of size one: a width that becomes 1 must not go too."""
    body = "a = Conv(x, w1) p = GlobalAveragePool(a) s = Squeeze(p) y = MatMul(s, w2)"
    model = net("float[2,3,4,4] x -> float[2,5] y", body, w1=(8, 3, 1, 1), w2=(8, 5))
    small = pruned(model, ratio=7 / 8)
    assert sizes(small) == {**sizes(small), "w1": (1, 3, 1, 1), "w2": (1, 5)}


def test_group_attributes() -> None:
    body = "a = Conv(x, w1) b = Conv<group=8>(a, w2) c = Conv<group=4>(b, w3) y = Conv(c, w4)"
    model = net("float[2,3,4,4] x -> float[2,5,4,4] y", body, w1=(8, 3, 1, 1), w2=(8, 1, 1, 1), w3=(8, 2, 1, 1), w4=(5, 8, 1, 1))
    groups = next(g.name for g in spa.analyze(model).groups.free() if g.size == 4)
    small = pruned(model, include=[groups])
    assert [helper.get_attribute_value(n.attribute[0]) for n in small.graph.node[1:3]] == [4, 2]
    assert sizes(small) == {"w1": (4, 3, 1, 1), "w2": (4, 1, 1, 1), "w3": (4, 2, 1, 1), "w4": (5, 4, 1, 1)}


def test_hidden_size() -> None:
    body = "o, h, c = LSTM<hidden_size=8>(x, w, r, b) s = Squeeze(o, one) y = MatMul(s, w2)"
    model = net("float[6,2,4] x -> float[6,2,5] y", body, w=(1, 32, 4), r=(1, 32, 8), b=(1, 64), one=ints(1), w2=(8, 5))
    small = pruned(model)
    assert attribute(small, "LSTM", "hidden_size") == 4
    assert sizes(small) == {**sizes(small), "w": (1, 16, 4), "r": (1, 16, 4), "b": (1, 32), "w2": (4, 5)}


def test_names_survive() -> None:
    body = "[first] h = MatMul(x, w1) [second] r = Relu(h) [third] y = MatMul(r, w2)"
    model = net("float[n,4] x -> float[n,5] y", body, w1=(4, 8), w2=(8, 5))
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 8]))
    small = pruned(model)
    assert [(n.name, list(n.input), list(n.output)) for n in small.graph.node] == [
        (n.name, list(n.input), list(n.output)) for n in model.graph.node]
    assert [t.name for t in small.graph.initializer] == ["w1", "w2"]
    assert list(small.graph.input) == list(model.graph.input)
    assert list(small.graph.output) == list(model.graph.output)
    info = {v.name: v.type.tensor_type.shape.dim for v in small.graph.value_info}
    assert [(d.dim_param, d.dim_value) for d in info["h"]] == [("n", 0), ("", 4)]


def test_kept_elements_are_those_of_the_original() -> None:
    model = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", w1=(4, 8), w2=(8, 5))
    plan = spa.plan(model, 0.5, multiple_of=1)
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, pruned(model)))
    assert np.array_equal(after["w1"], np.delete(before["w1"], plan.removed["w1"]["1"], 1))
    assert np.array_equal(after["w2"], np.delete(before["w2"], plan.removed["w2"]["0"], 0))


def test_the_given_graph_is_not_changed() -> None:
    given = spa.load(attention())
    analysis = spa.analyze(given)
    normal = to_bytes(analysis.normal.model)
    plan = spa.plan(analysis, 0.5, multiple_of=1)
    one, two = (spa.apply(analysis, plan) for _ in range(2))
    assert to_bytes(one.model) == to_bytes(two.model)
    assert to_bytes(given) == to_bytes(spa.load(attention()))
    assert to_bytes(analysis.normal.model) == normal
