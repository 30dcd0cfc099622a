"""The pass that masks: Where before what sums, Gather around what takes a statistic."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from test_constants import graph_of, ops, outputs
from test_trace import net

from passes import Compress, Mask, insert_masks

X = np.random.default_rng(2).standard_normal((2, 4)).astype(np.float32)
KEEP = np.array([True, False, True, True])
TYPES = {"x": TensorProto.FLOAT, "w": TensorProto.FLOAT, "y": TensorProto.FLOAT}


def product(opset: int = 17):
    return graph_of(net("float[2,4] x -> float[2,3] y", "y = MatMul(x, w)", opset=opset, w=(4, 3)))


@pytest.mark.parametrize("opset, op", [(17, "Where"), (9, "Where"), (8, "Mul")])
def test_masked_positions_count_as_zero(opset: int, op: str) -> None:
    graph = product(opset)
    w = graph.nodes[0].inputs[1].values
    assert insert_masks(graph, {"y": [Mask(0, KEEP[None]), Mask(1, KEEP[:, None])]}, {}, TYPES) == 1
    assert ops(graph) == [op, op, "MatMul"]
    assert np.allclose(outputs(graph, x=X)[0], X[:, KEEP] @ w[KEEP], atol=1e-6)


def test_a_masked_position_may_hold_nan() -> None:
    graph = product()
    w = graph.nodes[0].inputs[1].values
    insert_masks(graph, {"y": [Mask(0, KEEP[None])]}, {}, TYPES)
    x = X.copy()
    x[:, 1] = np.nan
    assert np.allclose(outputs(graph, x=x)[0], X[:, KEEP] @ w[KEEP], atol=1e-6)


def test_statistics_run_over_kept_positions() -> None:
    graph = graph_of(net("float[2,4] x -> float[2,4] y", "y = Softmax(x)"))
    kept = np.flatnonzero(KEEP)
    places = np.maximum(np.cumsum(KEEP) - 1, 0)
    assert insert_masks(graph, {}, {"y": Compress({0: {1: kept}}, {0: {1: places}})}, TYPES) == 1
    assert ops(graph) == ["Gather", "Softmax", "Gather"]
    found = outputs(graph, x=X)[0]
    e = np.exp(X[:, KEEP])
    assert found.shape == (2, 4)
    assert np.allclose(found[:, KEEP], e / e.sum(1, keepdims=True), atol=1e-6)


def test_a_reduction_has_nothing_to_spread() -> None:
    graph = graph_of(net("float[2,4] x -> float[2,1] y", "y = ReduceMean<axes=[1]>(x)"))
    insert_masks(graph, {}, {"y": Compress({0: {1: np.flatnonzero(KEEP)}}, {})}, TYPES)
    assert ops(graph) == ["Gather", "ReduceMean"]
    assert np.allclose(outputs(graph, x=X)[0], X[:, KEEP].mean(1, keepdims=True), atol=1e-6)


def test_masking_and_compressing_one_node() -> None:
    """GroupNormalization-like: a sum over one axis of what a statistic leaves."""
    graph = graph_of(net("float[2,4] x -> float[2,1] y", "y = ReduceMean<axes=[1]>(x)"))
    row = np.array([[True], [False]])
    insert_masks(graph, {"y": [Mask(0, row)]}, {"y": Compress({0: {1: np.flatnonzero(KEEP)}}, {})}, TYPES)
    assert ops(graph) == ["Gather", "Where", "ReduceMean"]
    assert np.allclose(outputs(graph, x=X)[0], X[:, KEEP].mean(1, keepdims=True) * row, atol=1e-6)


def test_equal_masks_are_made_once() -> None:
    graph = graph_of(net("float[2,4] x -> float[2,3] y, float[2,3] z", "y = MatMul(x, w) z = MatMul(x, w)", w=(4, 3)))
    masks = {n: [Mask(0, KEEP[None])] for n in ("y", "z")}
    assert insert_masks(graph, masks, {}, TYPES) == 2
    assert ops(graph) == ["Where", "MatMul", "MatMul"]


def test_nothing_to_mask_changes_nothing() -> None:
    graph = product()
    assert insert_masks(graph, {}, {}, TYPES) == 0
    assert insert_masks(graph, {"other": [Mask(0, KEEP[None])]}, {}, TYPES) == 0
    assert ops(graph) == ["MatMul"]


def test_half_precision() -> None:
    model = net("float16[2,4] x -> float16[2,3] y", "y = MatMul(x, w)", w=np.ones((4, 3), np.float16))
    graph = graph_of(model)
    insert_masks(graph, {"y": [Mask(0, KEEP[None])]}, {}, dict.fromkeys("xwy", TensorProto.FLOAT16))
    assert np.allclose(outputs(graph, x=X.astype(np.float16))[0], X[:, KEEP].sum(1, keepdims=True), atol=1e-2)
