"""The masked model against numpy: a removed channel is no term of any sum, and statistics run over the kept ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from spa.proof.check import run
from spa.storage.store import to_bytes, with_graph


def masked_output(model: onnx.ModelProto, site: tuple[str, int], removed: list[int], x: np.ndarray) -> np.ndarray:
    """y of the masked model; `removed` are positions of an axis of which every position is a coordinate."""
    analysis = spa.analyze(model)
    groups = analysis.groups
    gone = np.zeros(groups.total + 1, bool)
    gone[groups.labels[site][removed]] = True
    graph = spa.masked(analysis.normal.model.graph, groups, gone[1:])
    return np.asarray(run(with_graph(analysis.normal.model, graph), {"x": x})["y"])


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def pointwise(x: np.ndarray, w: np.ndarray, b: Any = 0) -> np.ndarray:
    return np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]) + np.reshape(b, (1, -1, 1, 1))


REMOVED = [1, 2, 6]
KEEP = np.array([0, 3, 4, 5, 7])


def test_sums_leave_out_what_is_gone() -> None:
    """After BatchNormalization and Sigmoid a zeroed channel is no longer zero: it is masked where it is summed."""
    body = "a = Conv(x, w1, b1) n = BatchNormalization(a, s, b, m, v) z = Sigmoid(n) y = Conv(z, w2, b2)"
    model = net("float[2,3,4,4] x -> float[2,5,4,4] y", body, w1=(8, 3, 1, 1), b1=(8,), s=(8,), b=(8,), m=(8,),
                v=np.linspace(0.5, 2, 8, dtype=np.float32), w2=(5, 8, 1, 1), b2=(5,))
    w, x = weights(model), draw(2, 3, 4, 4)
    a = pointwise(x, w["w1"], w["b1"])
    s, b, m, v = (w[k].reshape(1, -1, 1, 1) for k in "sbmv")
    z = 1 / (1 + np.exp(-((a - m) / np.sqrt(v + 1e-5) * s + b)))
    expected = pointwise(z[:, KEEP], w["w2"][:, KEEP], w["b2"])
    assert np.allclose(masked_output(model, ("w1", 0), REMOVED, x), expected, atol=1e-5)
    assert not np.allclose(masked_output(model, ("w1", 0), [0], x), expected, atol=1e-3)


def test_layer_normalization() -> None:
    body = "a = MatMul(x, w1) n = LayerNormalization<axis=-1, epsilon=1e-5>(a, s, b) y = MatMul(n, w2)"
    model = net("float[2,6,4] x -> float[2,6,5] y", body, w1=(4, 8), s=(8,), b=(8,), w2=(8, 5))
    expected, x = by_hand_layer_norm(model)
    assert np.allclose(masked_output(model, ("w1", 1), REMOVED, x), expected, atol=1e-5)


def by_hand_layer_norm(model: onnx.ModelProto) -> tuple[np.ndarray, np.ndarray]:
    w, x = weights(model), draw(2, 6, 4)
    a = (x @ w["w1"])[..., KEEP]
    n = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
    return (n * w["s"][KEEP] + w["b"][KEEP]) @ w["w2"][KEEP], x


def test_decomposed_layer_normalization() -> None:
    body = """a = MatMul(x, w1) m = ReduceMean<axes=[-1]>(a) d = Sub(a, m) q = Pow(d, two) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps)
      r = Sqrt(e) n = Div(d, r) g = Mul(n, s) h = Add(g, b) y = MatMul(h, w2)"""
    model = net("float[2,6,4] x -> float[2,6,5] y", body, w1=(4, 8), s=(8,), b=(8,), w2=(8, 5), two=np.float32(2), eps=np.float32(1e-5))
    expected, x = by_hand_layer_norm(model)
    assert np.allclose(masked_output(model, ("w1", 1), REMOVED, x), expected, atol=1e-5)


def test_group_normalization() -> None:
    """Two groups of four channels of which each loses the same two."""
    body = "a = Conv(x, w1) n = GroupNormalization<num_groups=2>(a, s, b) y = Conv(n, w2)"
    model = net("float[2,3,4,4] x -> float[2,5,4,4] y", body, opset=21, ir=10, w1=(8, 3, 1, 1), s=(8,), b=(8,), w2=(5, 8, 1, 1))
    analysis = spa.analyze(model)
    inner = next(g for g in analysis.groups.free() if g.size == 4)
    gone = np.zeros(analysis.groups.total, bool)
    gone[[inner.start + 1, inner.start + 3]] = True
    graph = spa.masked(analysis.normal.model.graph, analysis.groups, gone)
    x, w = draw(2, 3, 4, 4), weights(model)
    found = run(with_graph(analysis.normal.model, graph), {"x": x})["y"]
    keep = np.array([0, 2, 4, 6])
    a = pointwise(x, w["w1"])[:, keep].reshape(2, 2, -1)
    n = ((a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)).reshape(2, 4, 4, 4)
    n = n * w["s"][keep].reshape(1, -1, 1, 1) + w["b"][keep].reshape(1, -1, 1, 1)
    assert np.allclose(found, pointwise(n, w["w2"][:, keep]), atol=1e-5)


def test_softmax_over_channels() -> None:
    model = net("float[2,4] x -> float[2,5] y", "a = MatMul(x, w1) p = Softmax(a) y = MatMul(p, w2)", w1=(4, 8), w2=(8, 5))
    w, x = weights(model), draw(2, 4)
    e = np.exp((x @ w["w1"])[:, KEEP])
    expected = e / e.sum(1, keepdims=True) @ w["w2"][KEEP]
    assert np.allclose(masked_output(model, ("w1", 1), REMOVED, x), expected, atol=1e-5)


def test_a_sum_and_a_maximum_over_channels() -> None:
    """ReduceSum loses terms, ReduceMax runs over what is kept."""
    body = "a = MatMul(x, w1) s = ReduceSum(a, last) m = ReduceMax<axes=[-1]>(a) y = Add(s, m)"
    model = net("float[2,4] x -> float[2,1] y", body, w1=(4, 8), last=ints(-1))
    w, x = weights(model), draw(2, 4)
    a = (x @ w["w1"])[:, KEEP]
    expected = a.sum(1, keepdims=True) + a.max(1, keepdims=True)
    assert np.allclose(masked_output(model, ("w1", 1), REMOVED, x), expected, atol=1e-5)


def test_recurrent_units() -> None:
    body = "o, h, c = LSTM<hidden_size=8>(x, w, r, b) s = Squeeze(o, one) y = MatMul(s, w2)"
    model = net("float[6,2,4] x -> float[6,2,5] y", body, w=(1, 32, 4), r=(1, 32, 8), b=(1, 64), one=ints(1), w2=(8, 5))
    w, x = weights(model), draw(6, 2, 4)
    W, R, B = w["w"][0].reshape(4, 8, 4)[:, KEEP], w["r"][0].reshape(4, 8, 8)[:, KEEP][..., KEEP], w["b"][0].reshape(8, 8)[:, KEEP]
    h, c, out = np.zeros((2, 5)), np.zeros((2, 5)), []
    for step in x:
        i, o, f, g = (step @ W[k].T + h @ R[k].T + B[k] + B[4 + k] for k in range(4))
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
        out.append(h @ w["w2"][KEEP])
    found = masked_output(model, ("w2", 0), REMOVED, x)
    assert np.allclose(found, np.stack(out), atol=1e-5)


@pytest.mark.parametrize("removed", [[], REMOVED])
def test_the_graph_is_not_changed(removed: list[int]) -> None:
    model = net("float[2,4] x -> float[2,5] y", "a = MatMul(x, w1) p = Softmax(a) y = MatMul(p, w2)", w1=(4, 8), w2=(8, 5))
    analysis = spa.analyze(model)
    before = to_bytes(analysis.normal.model)
    gone = np.zeros(analysis.groups.total, bool)
    gone[analysis.groups.by_name["w1:1"].start + np.array(removed, int)] = True
    graph = spa.masked(analysis.normal.model.graph, analysis.groups, gone)
    assert to_bytes(analysis.normal.model) == before
    assert (to_bytes(with_graph(analysis.normal.model, graph)) == before) == (not removed)
