"""Passes on constants: before -> after, the same values on ONNX Runtime, and nothing left to do the second time."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from test_trace import ints, net

from passes import drop_dead_nodes, fold_constants, merge_copies, unshare_constants


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    """As graph-surgeon reads it; values are loaded, because its exporter writes unloaded ones under their old names."""
    graph = gs.import_onnx(model)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = tensor.values
    for node in graph.nodes:
        if node.op == "Constant":
            node.attrs["value"].values = node.attrs["value"].values
    return graph


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def outputs(model: onnx.ModelProto | gs.Graph, **feeds: np.ndarray) -> list[np.ndarray]:
    proto = gs.export_onnx(model) if isinstance(model, gs.Graph) else model
    proto.ir_version = 8
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


X = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
CHAIN = "s = Shape(x) b = Gather(s, zero) c = Unsqueeze(b, zero1) t = Concat<axis=0>(c, rest) y = Reshape(x, t)"


def chain() -> onnx.ModelProto:
    return net("float[2,6] x -> float[2,3,2] y", CHAIN, zero=np.array(0), zero1=ints(0), rest=ints(3, 2))


def test_folding_replaces_a_chain_and_keeps_the_function() -> None:
    graph = graph_of(chain())
    assert fold_constants(graph, {"t": ints(2, 3, 2)}) == 1
    assert ops(graph) == ["Reshape"]
    assert isinstance(graph.nodes[0].inputs[1], gs.Constant)
    assert graph.nodes[0].inputs[1].name == "t"
    assert np.array_equal(outputs(graph, x=X)[0], outputs(chain(), x=X)[0])
    assert fold_constants(graph, {"t": ints(2, 3, 2)}) == 0


def test_folding_counts_values_that_somebody_reads() -> None:
    graph = graph_of(chain())
    assert fold_constants(graph, {"s": ints(2, 6), "b": np.array(2), "nobody": ints(1)}) == 2
    assert ops(graph) == ["Unsqueeze", "Concat", "Reshape"]


def test_folding_leaves_outputs_and_strangers() -> None:
    graph = graph_of(net("float[2,6] x -> int64[2] s, float[2,6] y", "s = Shape(x) y = Reshape(x, s)"))
    assert fold_constants(graph, {"s": ints(2, 6)}) == 0
    assert ops(graph) == ["Shape", "Reshape"]
    assert fold_constants(graph, {}) == 0


def test_dead_nodes_go_with_what_they_needed() -> None:
    graph = graph_of(net("float[2,6] x -> float[2,6] y", "a = Abs(x) b = Cast<to=7>(a) c = Shape(b) y = Relu(x)"))
    assert drop_dead_nodes(graph) == 3
    assert ops(graph) == ["Relu"]
    assert drop_dead_nodes(graph) == 0


def test_only_the_named_dead_nodes() -> None:
    graph = graph_of(net("float[2,6] x -> float[2,6] y", "a = Abs(x) b = Neg(x) y = Relu(x)"))
    assert drop_dead_nodes(graph, {"b"}) == 1
    assert ops(graph) == ["Abs", "Relu"]


IF = """
 a = Abs(x) b = Neg(x)
 y = If (c) <then_branch = t () => (float[2,6] o) { o = Add(a, w) }, else_branch = e () => (float[2,6] q) {
   q = If (c) <then_branch = u () => (float[2,6] v) { v = Identity(b) }, else_branch = r () => (float[2,6] z) { z = Relu(b) }> }>
 d = Add(x, w)"""


def with_if() -> onnx.ModelProto:
    return net("float[2,6] x, bool c -> float[2,6] y, float[2,6] d", IF, w=(6,))


def test_what_bodies_read_is_not_dead() -> None:
    graph = graph_of(with_if())
    assert drop_dead_nodes(graph) == 0
    assert ops(graph) == ["Abs", "Neg", "If", "Add"]


def test_what_bodies_read_is_not_copied() -> None:
    graph = graph_of(net("float[2,6] x, bool c -> float[2,6] y, float[2,6] d", IF + " k = Sub(x, w)", w=(6,)))
    assert unshare_constants(graph, 100) == {}
    deeper = IF.replace("Identity(b)", "Add(b, u)") + " k = Sub(x, u) l = Add(k, u)"
    graph = graph_of(net("float[2,6] x, bool c -> float[2,6] y, float[2,6] d", deeper, w=(6,), u=(6,)))
    assert unshare_constants(graph, 100) == {}


SHARED = "a = Add(x, b) c = Mul(a, b) y = Sub(c, b)"


def shared() -> onnx.ModelProto:
    return net("float[2,6] x -> float[2,6] y", SHARED, b=(6,))


def test_every_further_reader_gets_a_copy() -> None:
    graph = graph_of(shared())
    assert unshare_constants(graph, 6) == {"b/copy1": "b", "b/copy2": "b"}
    assert [[t.name for t in n.inputs] for n in graph.nodes] == [["x", "b"], ["a", "b/copy1"], ["c", "b/copy2"]]
    assert np.array_equal(outputs(graph, x=X)[0], outputs(shared(), x=X)[0])
    assert unshare_constants(graph, 6) == {}


def test_one_node_that_reads_twice() -> None:
    graph = graph_of(net("float[2,6] x -> float[2,6] y", "y = Max(x, b, b)", b=(6,)))
    assert unshare_constants(graph, 6) == {"b/copy1": "b"}


def test_large_constants_stay_tied() -> None:
    graph = graph_of(shared())
    assert unshare_constants(graph, 5) == {}


def test_names_that_are_taken_are_not_taken_again() -> None:
    model = net("float[2,6] x -> float[2,6] y", 'a = Add(x, b) c = Mul(a, b) "b/copy1" = Neg(c) y = Identity("b/copy1")', b=(6,))
    assert unshare_constants(graph_of(model), 6) == {"b/copy2": "b"}


def test_constant_nodes_and_identities_of_constants() -> None:
    body = "k = Constant<value = float[2] {1.0, 2.0}>() i = Identity(b) a = Add(x, k) c = Mul(a, k) d = Add(c, i) y = Sub(d, i)"
    model = net("float[3,2] x -> float[3,2] y", body, b=(2,))
    graph = graph_of(model)
    assert unshare_constants(graph, 10) == {"k/copy1": "k", "i/copy1": "i"}
    x = X.reshape(6, 2)[:3]
    assert np.array_equal(outputs(graph, x=x)[0], outputs(model, x=x)[0])


def test_merging_undoes_copying() -> None:
    graph = graph_of(shared())
    copies = unshare_constants(graph, 6)
    assert merge_copies(graph, copies, set()) == 0
    assert merge_copies(graph, copies, {"b/copy2"}) == 1
    assert [n.inputs[1].name for n in graph.nodes] == ["b", "b/copy1", "b"]
    assert merge_copies(graph, copies, set(copies)) == 1
    assert merge_copies(graph, copies, set(copies)) == 0
    assert [n.inputs[1].name for n in graph.nodes] == ["b", "b", "b"]
    assert graph.nodes[0].inputs[1] is graph.nodes[2].inputs[1]
    assert np.array_equal(outputs(graph, x=X)[0], outputs(shared(), x=X)[0])


@pytest.mark.parametrize("opset", [9, 13, 21])
def test_opsets(opset: int) -> None:
    model = net("float[2,6] x -> float[2,6] y", SHARED, opset=opset, b=(6,))
    graph = graph_of(model)
    unshare_constants(graph, 6)
    assert np.array_equal(outputs(graph, x=X)[0], outputs(model, x=X)[0])
