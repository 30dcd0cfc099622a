"""Saliencies against closed forms: a linear network with softmax, in numpy; and against differences."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import onnx
import pytest
from test_trace import ints, net

from spa.errors import BadOption, UnsupportedModel
from spa.statistics.gradients import activation_saliency, weight_saliency
from spa.storage import store

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")

RNG = np.random.default_rng(3)
X = RNG.standard_normal((4, 5))
Y = np.array([0, 2, 1, 2])
W = RNG.standard_normal((5, 3)).astype(np.float32)
B = RNG.standard_normal(3).astype(np.float32)


def linear() -> Any:
    return store.load(net("float[n,5] x -> float[n,3] y", "y = Gemm(x, w, b)", w=W, b=B)).graph


def batches(size: int = 2, labels: bool = True) -> list[dict[str, np.ndarray]]:
    parts = [{"x": X[i : i + size].astype(np.float32), "labels": Y[i : i + size]} for i in range(0, 4, size)]
    return parts if labels else [{"x": p["x"]} for p in parts]


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def per_sample(target: np.ndarray = Y, temperature: float = 1.0) -> np.ndarray:
    """(n, 5, 3) gradients of cross-entropy by W: x (p - t)."""
    p = softmax((X @ W + B) / temperature)
    return X[:, :, None] * (p - np.eye(3)[target])[:, None, :] / temperature


def hessian_times(g: np.ndarray, gb: np.ndarray, temperature: float) -> np.ndarray:
    """(5, 3) H (g, gb) by W, in closed form: the logits move by X g + gb, their gradient by the softmax's Jacobian."""
    p = softmax((X @ W + B) / temperature)
    moved = (X @ g + gb) / temperature
    change = p * (moved - (p * moved).sum(-1, keepdims=True))
    return X.T @ change / temperature / len(X)


@pytest.mark.parametrize("method", ["taylor", "snip"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_first_order(method: str, size: int) -> None:
    found = weight_saliency(linear(), batches(size), method)
    assert found["w"].dtype == np.float32
    assert found["w"] == pytest.approx(W * per_sample().mean(0), abs=1e-6)
    assert found["b"] == pytest.approx(B * (softmax(X @ W + B) - np.eye(3)[Y]).mean(0), abs=1e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_fisher_is_of_single_samples(size: int) -> None:
    found = weight_saliency(linear(), batches(size), "fisher")
    assert found["w"] == pytest.approx(W**2 * (per_sample() ** 2).mean(0), abs=1e-6)
    capped = weight_saliency(linear(), batches(size), "fisher", most=3)
    assert capped["w"] == pytest.approx(W**2 * (per_sample()[:3] ** 2).mean(0), abs=1e-6)


@pytest.mark.parametrize("method, temperature", [("crop", 1.0), ("grasp", 200.0)])
@pytest.mark.parametrize("size", [1, 4])
def test_second_order(method: str, temperature: float, size: int) -> None:
    p = softmax((X @ W + B) / temperature)
    g, gb = per_sample(temperature=temperature).mean(0), (p - np.eye(3)[Y]).mean(0) / temperature
    expected = W * hessian_times(g, gb, temperature)
    found = weight_saliency(linear(), batches(size), method)["w"]
    assert found == pytest.approx(expected, abs=float(1e-4 * np.abs(expected).max()))


def test_without_labels_the_predictions_are_the_labels() -> None:
    predicted = (X @ W + B).argmax(-1)
    for loss in ("auto", "cross-entropy"):
        found = weight_saliency(linear(), batches(labels=False), "taylor", loss=loss)
        assert found["w"] == pytest.approx(W * per_sample(predicted).mean(0), abs=1e-6)


def entropy_gradient() -> np.ndarray:
    """(n, 3) by the logits: -p (log p + entropy)."""
    p = softmax(X @ W + B)
    return -p * (np.log(p) - (p * np.log(p)).sum(-1, keepdims=True))


def test_entropy() -> None:
    found = weight_saliency(linear(), batches(), "taylor", loss="entropy")
    assert found["w"] == pytest.approx(W * (X.T @ entropy_gradient()) / 4, abs=1e-6)


def test_probabilities_are_taken_as_they_are() -> None:
    graph = store.load(net("float[n,5] x -> float[n,3] y", "a = Gemm(x, w, b) y = Softmax(a)", w=W, b=B)).graph
    for method in ("taylor", "grasp"):
        expected = weight_saliency(linear(), batches(), method)["w"]
        assert weight_saliency(graph, batches(), method)["w"] == pytest.approx(expected, abs=float(1e-3 * np.abs(expected).max()))


def test_labels() -> None:
    named = [{"x": b["x"], "classes": b["labels"]} for b in batches()]
    expected = weight_saliency(linear(), batches(), "taylor")["w"]
    assert np.array_equal(weight_saliency(linear(), named, "taylor", labels="classes")["w"], expected)
    soft = [{"x": b["x"], "labels": np.eye(3, dtype=np.float32)[b["labels"]]} for b in batches()]
    assert weight_saliency(linear(), soft, "taylor")["w"] == pytest.approx(expected, abs=1e-6)
    column = [{"x": b["x"], "labels": b["labels"][:, None]} for b in batches()]
    assert np.array_equal(weight_saliency(linear(), column, "taylor")["w"], expected)
    ignored = [{"x": X.astype(np.float32), "labels": np.array([0, -100, -100, 2])}]
    assert weight_saliency(linear(), ignored, "taylor")["w"] == pytest.approx(W * per_sample()[[0, 3]].mean(0), abs=1e-6)


def test_pictures_have_their_classes_in_axis_one() -> None:
    graph = store.load(net("float[n,2,3,4] x -> float[n,5,3,4] y", "y = Conv(x, w)", w=(5, 2, 1, 1))).graph
    x = RNG.standard_normal((2, 2, 3, 4)).astype(np.float32)
    labels = RNG.integers(0, 5, (2, 3, 4))
    w = np.asarray(next(t for t in graph.nodes[0].inputs if t.name == "w").values.reshape(5, 2), np.float64)
    z = np.einsum("oc,nchw->nohw", w, x)
    p = np.moveaxis(softmax(np.moveaxis(z, 1, -1)), -1, 1)
    for given, truth in (({"labels": labels}, labels), ({}, z.argmax(1))):
        t = np.moveaxis(np.eye(5)[truth], -1, 1)
        expected = w * np.einsum("nohw,nchw->oc", p - t, x) / labels.size
        assert weight_saliency(graph, [{"x": x, **given}], "taylor")["w"][:, :, 0, 0] == pytest.approx(expected, abs=1e-6)


def half_square(outputs: Any, feeds: Any) -> Any:
    return (outputs["y"] ** 2).sum() / 2 / len(feeds["x"])


def test_losses_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = W * (X.T @ (X @ W + B)) / 4
    assert weight_saliency(linear(), batches(), "taylor", loss=half_square)["w"] == pytest.approx(expected, abs=1e-5)
    module = types.ModuleType("losses_of_a_test")
    module.half_square = half_square  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "losses_of_a_test", module)
    assert weight_saliency(linear(), batches(), "taylor", loss="losses_of_a_test:half_square")["w"] == pytest.approx(expected, abs=1e-5)


def test_synflow() -> None:
    v = RNG.standard_normal((3, 2)).astype(np.float32)
    graph = store.load(net("float[n,5] x -> float[n,2] y", "a = MatMul(x, w) h = Relu(a) y = MatMul(h, v)", w=W, v=v)).graph
    found = weight_saliency(graph, [{"x": X[:1].astype(np.float32)}], "synflow")
    assert found["w"] == pytest.approx(np.abs(W) * np.abs(v).sum(1), rel=1e-5)
    assert found["v"] == pytest.approx(np.abs(v) * np.abs(W).sum(0)[:, None], rel=1e-5)
    assert found["w"].sum() == pytest.approx(found["v"].sum(), rel=1e-5)  # the flow is conserved


def test_synflow_of_a_deep_network_stays_finite() -> None:
    weights = {f"w{i}": np.full((64, 64), 50, np.float32) for i in range(24)}
    body = "h0 = MatMul(x, w0) " + " ".join(f"h{i} = MatMul(h{i - 1}, w{i})" for i in range(1, 24)) + " y = Identity(h23)"
    graph = store.load(net("float[1,64] x -> float[1,64] y", body, **weights)).graph
    found = weight_saliency(graph, [{"x": np.ones((1, 64), np.float32)}], "synflow")
    assert all(np.isfinite(f).all() and f.max() > 0.9 for f in found.values())


def test_what_the_loss_does_not_see_is_zero() -> None:
    body = "y = Gemm(x, w, b) z = Mul(x, u) i = Constant<value=float[2] {1.0, -inf}>() k = Max(i, u2)"
    model = net("float[n,5] x -> float[n,3] y, float[n,5] z, float[2] k", body, w=W, b=B, u=(5,), u2=(2,))
    found = weight_saliency(store.load(model).graph, batches(), "taylor")
    assert set(found) == {"w", "b", "u", "i", "u2"}
    assert not found["u"].any()
    assert not found["i"].any()
    assert found["w"].any()


def test_ids_and_tied_weights() -> None:
    body = "e = Gather(t, ids) p = Transpose(t) y = MatMul(e, p)"
    graph = store.load(net("int64[n,3] ids -> float[n,3,7] y", body, t=(7, 4))).graph
    found = weight_saliency(graph, [{"ids": ints(1, 2, 3).reshape(1, 3)}], "taylor")["t"]
    t = np.asarray(next(c for c in graph.nodes[0].inputs if c.name == "t").values, np.float64)

    def loss(table: np.ndarray) -> float:
        p = softmax(table[[1, 2, 3]] @ table.T)
        return float(-np.log(p[np.arange(3), (t[[1, 2, 3]] @ t.T).argmax(-1)]).mean())

    for place in [(1, 0), (5, 2)]:
        step = np.zeros_like(t)
        step[place] = 1e-5
        assert found[place] == pytest.approx(t[place] * (loss(t + step) - loss(t - step)) / 2e-5, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_activations(size: int) -> None:
    """Entropy by default; a sample's own loss, whatever the size of the batch."""
    model = net("float[n,5] x -> float[n,3] y", "a = Mul(x, u) y = Gemm(a, w, b)", w=W, b=B, u=np.ones(5, np.float32))
    found = activation_saliency(store.load(model).graph, batches(size), [("a", 1), ("a", -1), ("y", 1), ("x", 1)])
    d = entropy_gradient()
    for key in (("a", 1), ("a", -1), ("x", 1)):
        assert found[key] == pytest.approx(np.abs(X * (d @ W.T)).mean(0), abs=1e-6)
    assert found["y", 1] == pytest.approx(np.abs((X @ W + B) * d).mean(0), abs=1e-6)
    assert found["y", 1].dtype == np.float64


def test_activations_sum_over_the_other_axes_first() -> None:
    """Windows belong to their sample, and signs cancel within it."""
    model = net(
        "float[n,2,5] x -> float[n,2,3] y", "f = Reshape(x, s) g = MatMul(f, w) y = Reshape(g, r)", w=W, s=ints(-1, 5), r=ints(-1, 2, 3)
    )
    x = X.reshape(2, 2, 5)
    feeds = [{"x": x.astype(np.float32), "labels": RNG.integers(0, 3, (2, 2))}]
    found = activation_saliency(store.load(model).graph, feeds, [("g", 1), ("x", 2), ("x", 1)], loss="cross-entropy")
    z = x @ W
    d = (softmax(z) - np.eye(3)[feeds[0]["labels"]]) / 2  # the loss of a sample is the mean over its two places
    assert found["g", 1] == pytest.approx(np.abs((z * d).sum(1)).mean(0), abs=1e-6)
    assert found["x", 2] == pytest.approx(np.abs((x * (d @ W.T)).sum(1)).mean(0), abs=1e-6)
    assert found["x", 1] == pytest.approx(np.abs((x * (d @ W.T)).sum(2)).mean(0), abs=1e-6)


def test_what_is_refused() -> None:
    with pytest.raises(BadOption, match="no saliency 'nothing'; the choice is: crop, fisher"):
        weight_saliency(linear(), batches(), "nothing")
    with pytest.raises(BadOption, match="no batches"):
        weight_saliency(linear(), [], "taylor")
    with pytest.raises(BadOption, match="no entry 'classes'"):
        weight_saliency(linear(), batches(), "taylor", labels="classes")
    with pytest.raises(BadOption, match="can't be imported"):
        weight_saliency(linear(), batches(), "taylor", loss="hinge")
    with pytest.raises(BadOption, match="does not give a scalar"):
        weight_saliency(linear(), batches(), "taylor", loss=lambda outputs, feeds: outputs["y"])
    with pytest.raises(BadOption, match="3 classes"):
        weight_saliency(linear(), [{"x": X.astype(np.float32), "labels": np.array([0, 1, 2, 3])}], "taylor")
    with pytest.raises(BadOption, match="do not fit"):
        weight_saliency(linear(), [{"x": X.astype(np.float32), "labels": np.array([0, 1])}], "taylor")
    with pytest.raises(BadOption, match="no axis 2"):
        activation_saliency(linear(), batches(), [("y", 2)])
    whole = store.load(net("float[n,5] x -> int64[n,1] y", "a = Mul(x, w) y = ArgMax<axis=1>(a)", w=(5,))).graph
    with pytest.raises(UnsupportedModel, match="no output of floats"):
        weight_saliency(whole, batches(), "taylor")
    with pytest.raises(BadOption, match="fails .KeyError: 'z'"):
        weight_saliency(whole, batches(), "taylor", loss=lambda outputs, feeds: outputs["z"])
    both = store.load(net("float[n,5] x -> float[n,5] a, int64[n,1] y", "a = Mul(x, w) y = ArgMax<axis=1>(a)", w=(5,))).graph
    with pytest.raises(BadOption, match="whole numbers"):
        activation_saliency(both, batches(), [("y", 0)], loss=lambda outputs, feeds: outputs["a"].sum())
    rounded = store.load(net("float[n,5] x -> float[n,5] y", "a = Mul(x, w) b = Cast<to=7>(a) y = Cast<to=1>(b)", w=(5,))).graph
    with pytest.raises(UnsupportedModel, match="does not depend on anything that has a gradient"):
        weight_saliency(rounded, batches(), "taylor")
    root = onnx.helper.make_tensor("w", 1, [5], [0.0] * 5)
    model = net("float[n,5] x -> float[n,5] y", "a = Mul(x, w) b = Abs(a) y = Sqrt(b)")
    model.graph.initializer.append(root)
    with pytest.raises(UnsupportedModel, match="'w' holds NaN or infinity"):
        weight_saliency(store.load(model).graph, batches(), "taylor")


def test_saliencies_that_are_all_zero_are_refused() -> None:
    certain = store.load(net("float[n,5] x -> float[n,3] y", "y = Gemm(x, w, b)", w=W * 1e6, b=B)).graph
    with pytest.raises(UnsupportedModel, match="of 2 of 2 tensors are zero, since the loss is flat"):
        weight_saliency(certain, batches(labels=False), "taylor")
    body = "a = MatMul(x, w) h = Clip(a, zero, six) y = MatMul(h, v)"
    weights = {"w": W * 1000, "v": np.ones((3, 2), np.float32), "zero": np.float32(0), "six": np.float32(6)}
    with pytest.raises(UnsupportedModel, match="of 1 of 2 tensors are zero, since SynFlow's positive weights"):
        weight_saliency(store.load(net("float[n,5] x -> float[n,2] y", body, **weights)).graph, batches(), "synflow")


def test_activations_whose_first_axis_is_not_of_samples() -> None:
    body = "a = Mul(x, u) t = Transpose(a) b = Transpose(t) y = Gemm(b, w, c)"
    model = net("float[n,5] x -> float[n,3] y", body, w=W, c=B, u=np.ones(5, np.float32))
    found = activation_saliency(store.load(model).graph, batches(2)[:1], [("t", 0), ("t", 1)])
    terms = (X * (entropy_gradient() @ W.T))[:2]  # (n, 5)
    assert found["t", 1] == pytest.approx(np.abs(terms).mean(1), abs=1e-6)  # each of the five counts as a sample
    assert found["t", 0] == pytest.approx(np.abs(terms.sum(0)), abs=1e-6)  # the batch is one sample
