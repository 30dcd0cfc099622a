"""The pass that removes: constants are cut, sizes restated, computed shapes patched; nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from test_constants import graph_of, ops, outputs
from test_trace import ints, net

from passes import DELETE, Patch, Removal, Weight, remove_channels

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)


def two_layers() -> gs.Graph:
    return graph_of(net("float[2,4] x -> float[2,3] y", "h = Gemm<transB=1>(x, w1, b1) r = Relu(h) y = Gemm<transB=1>(r, w2)",
                        w1=(6, 4), b1=(6,), w2=(3, 6)))


def test_constants_are_cut_and_keep_their_names() -> None:
    graph = two_layers()
    before = {n: t.values.copy() for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    keep = ints(0, 3, 5)
    assert remove_channels(graph, Removal({"w1": {0: keep}, "b1": {0: keep}, "w2": {1: keep}}, {"h": {1: 3}})) == 3
    after = {n: t.values for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    assert after.keys() == before.keys()
    assert np.array_equal(after["w1"], before["w1"][keep])
    assert np.array_equal(after["b1"], before["b1"][keep])
    assert np.array_equal(after["w2"], before["w2"][:, keep])
    expected = np.maximum(X @ after["w1"].T + after["b1"], 0) @ after["w2"].T
    assert np.allclose(outputs(graph, x=X)[0], expected, atol=1e-6)


def test_nothing_to_remove_changes_nothing() -> None:
    graph = two_layers()
    before = gs.export_onnx(graph).SerializeToString()
    assert remove_channels(graph, Removal()) == 0
    assert gs.export_onnx(graph).SerializeToString() == before


def test_a_constant_with_two_readers_is_cut_once() -> None:
    graph = graph_of(net("float[2,6] x -> float[2,6] y", "a = Add(x, b) y = Mul(a, b)", b=(6,)))
    assert remove_channels(graph, Removal({"b": {0: ints(1, 2)}})) == 1
    assert graph.nodes[0].inputs[1].shape == (2,)


def test_two_axes_of_one_constant() -> None:
    graph = two_layers()
    w1 = graph.nodes[0].inputs[1].values.copy()
    assert remove_channels(graph, Removal({"w1": {0: ints(0, 2), 1: ints(1, 3)}})) == 1
    assert np.array_equal(graph.nodes[0].inputs[1].values, w1[[0, 2]][:, [1, 3]])


def test_weights_are_cut_without_being_read() -> None:
    graph = two_layers()
    held = graph.nodes[0].inputs[1]
    array = held.values.copy()

    class Unreadable:
        def view(self) -> memoryview:
            raise AssertionError("read too early")

        def release(self, start: int, stop: int) -> None:
            raise AssertionError

    held._values = Weight(Unreadable(), (6, 4), 1)
    remove_channels(graph, Removal({"w1": {0: ints(1, 4)}}))
    assert held._values.shape == (2, 4)
    held._values = Weight.of_array(array)
    remove_channels(graph, Removal({"w1": {0: ints(1, 4)}}))
    assert np.array_equal(held._values.load(), array[[1, 4]])


def test_constants_in_nodes() -> None:
    graph = graph_of(net("float[2,3] x -> float[2,3] y", "k = Constant<value = float[3] {1.0, 2.0, 3.0}>() y = Add(x, k)"))
    assert remove_channels(graph, Removal({"k": {0: ints(0, 2)}})) == 1
    assert graph.nodes[0].attrs["value"].values.tolist() == [1.0, 3.0]


def test_attributes_are_set_and_deleted() -> None:
    graph = graph_of(net("float[1,4,3,3] x -> float[1,4,3,3] y", "y = Conv<group=4, kernel_shape=[1,1]>(x, w)", w=(4, 1, 1, 1)))
    assert remove_channels(graph, Removal(attributes={"y": {"group": 2, "kernel_shape": DELETE}})) == 2
    assert graph.nodes[0].attrs["group"] == 2
    assert "kernel_shape" not in graph.nodes[0].attrs
    again = Removal(attributes={"y": {"kernel_shape": DELETE}})
    remove_channels(graph, again)
    assert "kernel_shape" not in graph.nodes[0].attrs


def test_inputs_are_replaced_beside_the_old_constant() -> None:
    graph = graph_of(net("float[2,12] x -> float[2,3,4] y, float[2,3,4] z", "y = Reshape(x, s) z = Reshape(x, s)", s=ints(2, 3, 4)))
    assert remove_channels(graph, Removal(inputs={("y", 1): ints(2, 2, 6)})) == 1
    assert graph.nodes[0].inputs[1].values.tolist() == [2, 2, 6]
    assert graph.nodes[0].inputs[1].name == "y/Reshape.1"
    assert graph.nodes[1].inputs[1].values.tolist() == [2, 3, 4]


def test_inputs_that_are_not_there_yet() -> None:
    graph = graph_of(net("float[2,12] x -> float[2,6] y, float[2,6] z", "y, z = Split<axis=1>(x)"))
    assert remove_channels(graph, Removal(inputs={("y", 1): ints(4, 8)})) == 1
    assert [t.name for t in graph.nodes[0].inputs] == ["x", "y/Split.1"]
    y, z = outputs(graph, x=np.ones((2, 12), np.float32))
    assert y.shape == (2, 4)
    assert z.shape == (2, 8)


def test_computed_shapes_are_patched() -> None:
    body = "s = Shape(x) b = Slice(s, zero, one) t = Concat<axis=0>(b, rest) y = Reshape(x, t)"
    graph = graph_of(net("float[n,12] x -> float[n,k,m] y", body, zero=ints(0), one=ints(1), rest=ints(3, 4)))
    assert remove_channels(graph, Removal(inputs={("y", 1): Patch((1, 2), (2, 6))})) == 1
    assert ops(graph) == ["Shape", "Slice", "Concat", "ScatterElements", "Reshape"]
    assert outputs(graph, x=np.ones((5, 12), np.float32))[0].shape == (5, 2, 6)


def test_declared_shapes_follow() -> None:
    graph = two_layers()
    graph.nodes[0].outputs[0].shape = ["n", 6]
    graph.nodes[1].outputs[0].shape = None
    remove_channels(graph, Removal(shapes={"h": {0: 1, 1: 4}, "r": {1: 4}, "y": {1: 2}}))
    assert graph.nodes[0].outputs[0].shape == ["n", 4]
    assert graph.nodes[1].outputs[0].shape is None
    assert list(graph.outputs[0].shape) == [2, 2]


def test_names_are_not_taken_twice() -> None:
    model = net("float[2,12] x -> float[2,3,4] y", "y = Reshape(x, s)", s=ints(2, 3, 4))
    model.graph.initializer.append(numpy_helper.from_array(ints(2, 3, 4), "y/Reshape.1"))
    model.graph.node[0].input[1] = "y/Reshape.1"
    graph = graph_of(model)
    remove_channels(graph, Removal(inputs={("y", 1): ints(2, 4, 3)}))
    assert graph.nodes[0].inputs[1].name == "y/Reshape.1_"
