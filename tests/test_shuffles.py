"""Layout chains that permute one axis become a Gather; all others stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
from test_constants import graph_of, ops, outputs
from test_trace import free, ints, net

import spa
from passes import drop_dead_nodes, gather_shuffles

SHUFFLE = "a = Relu(x) b = Reshape(a, s) c = Transpose<perm=[0,2,1,3,4]>(b) d = Reshape(c, t) y = Relu(d)"
X = np.random.default_rng(3).standard_normal((2, 6, 2, 2)).astype(np.float32)


def model(body: str, *sizes: int, outs: str = "float[2,6,2,2] y"):
    return net(f"float[2,6,2,2] x -> {outs}", body, s=ints(*sizes), t=ints(2, 6, 2, 2))


def run_pass(made) -> tuple[int, list[str], object]:
    graph = graph_of(made)
    shapes = spa.graph.shapes.infer(spa.load(made).graph).shapes
    return gather_shuffles(graph, shapes), ops(graph), graph


@pytest.mark.parametrize("groups", [2, 3])
def test_a_channel_shuffle_is_a_gather(groups: int) -> None:
    made = model(SHUFFLE, 2, groups, 6 // groups, 2, 2)
    count, _, graph = run_pass(made)
    assert count == 1
    assert drop_dead_nodes(graph) == 2
    assert ops(graph) == ["Relu", "Gather", "Relu"]
    gather = next(n for n in graph.nodes if n.op == "Gather")
    assert gather.attrs == {"axis": 1}
    assert gather.inputs[1].values.tolist() == np.arange(6).reshape(groups, -1).T.ravel().tolist()
    assert np.array_equal(outputs(graph, x=X)[0], outputs(made, x=X)[0])
    assert gather_shuffles(graph, {}) == 0


def test_the_chain_at_the_end_of_the_graph() -> None:
    body = "b = Reshape(x, s) c = Transpose<perm=[0,2,1,3,4]>(b) y = Reshape(c, t)"
    made = model(body, 2, 2, 3, 2, 2)
    count, _, graph = run_pass(made)
    assert count == 1
    assert np.array_equal(outputs(graph, x=X)[0], outputs(made, x=X)[0])


@pytest.mark.parametrize(
    "body, sizes, outs",
    [
        (SHUFFLE.replace("perm=[0,2,1,3,4]", "perm=[0,1,2,4,3]"), (2, 6, 1, 2, 2), "float[2,6,2,2] y"),
        (SHUFFLE.replace("perm=[0,2,1,3,4]", "perm=[1,0,2,3,4]"), (2, 2, 3, 2, 2), "float[2,6,2,2] y"),
        (SHUFFLE, (2, 1, 6, 2, 2), "float[2,6,2,2] y"),
        (SHUFFLE, (2, 2, 3, 2, 2), "float[2,6,2,2] y, float[2,3,2,2,2] c"),
        (SHUFFLE + " z = Abs(b)", (2, 2, 3, 2, 2), "float[2,6,2,2] y, float[2,2,3,2,2] z"),
        ("a = Reshape(x, s) b = Reshape(a, t) y = Relu(b)", (2, 2, 3, 2, 2), "float[2,6,2,2] y"),
    ],
    ids=["two axes", "batch and channels", "no permutation", "inside is an output", "inside is read", "only two nodes"],
)
def test_what_stays(body: str, sizes: tuple[int, ...], outs: str) -> None:
    made = model(body, *sizes, outs=outs)
    count, names, graph = run_pass(made)
    assert count == 0
    assert names == [n.op for n in graph_of(made).nodes]
    assert all(np.array_equal(a, b) for a, b in zip(outputs(graph, x=X), outputs(made, x=X), strict=True))


def test_unknown_shapes_stay() -> None:
    graph = graph_of(model(SHUFFLE, 2, 2, 3, 2, 2))
    assert gather_shuffles(graph, {"a": (2, 6, 2, 2), "d": (2, 6, 2, 2)}) == 0


def test_shuffled_channels_go_one_by_one() -> None:
    body = "a = Conv(x, w1) b = Reshape(a, s) c = Transpose<perm=[0,2,1,3,4]>(b) d = Reshape(c, t) y = Conv(d, w2)"
    made = net("float[2,6,2,2] x -> float[2,5,2,2] y", body, w1=(8, 6, 1, 1), w2=(5, 8, 1, 1), s=ints(2, 2, 4, 2, 2), t=ints(2, 8, 2, 2))
    assert free(made) == {"w1:0": 8}
    result = spa.prune(made, 3 / 8, multiple_of=1)
    assert {t.name: list(t.dims) for t in result.to_proto().graph.initializer}["w1"] == [5, 6, 1, 1]
