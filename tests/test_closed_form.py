"""Moments in closed form, against samples that are run through the very graph."""

from __future__ import annotations

import re
from math import erf, exp, pi, sqrt
from typing import Any

import numpy as np
import onnx
import pytest
from test_trace import ints, net

import spa
from spa.api import analyze
from spa.data.evidence import channel_moments
from spa.graph.linear import find_layers
from spa.proof.check import session
from spa.statistics.closed_form import Channels, bias_moments, closed_form

RNG = np.random.default_rng(5)
C = 6
SCALE = np.array([0.5, -1.5, 1, 2, 0, 0.3], np.float32)
BIAS = np.array([-0.5, 0.7, 0, 0.1, 0.4, 2], np.float32)
MEAN = np.array([3, -2, 0.5, 0, 1, -1], np.float32)
VARIANCE = np.array([4, 0.25, 1, 9, 2, 0.01], np.float32)
NORM = {"s": SCALE, "o": BIAS, "m": MEAN, "v": VARIANCE}
OTHER = {"s2": SCALE[::-1].copy(), "o2": BIAS[::-1].copy(), "m2": MEAN, "v2": VARIANCE}
BOTH = "b = BatchNormalization(x, s, o, m, v) b2 = BatchNormalization(x2, s2, o2, m2, v2) "
SPACE = "float[n,6,4,4]"


def model(body: str, result: str = SPACE, opset: int = 17, **weights: Any) -> onnx.ModelProto:
    return net(f"{SPACE} x, {SPACE} x2 -> {result} y", BOTH + body, opset=opset, **NORM, **OTHER, **weights)


def found(made: onnx.ModelProto) -> dict[str, Channels]:
    return closed_form(analyze(made).groups)


def sampled(made: onnx.ModelProto, samples: int = 8000) -> tuple[np.ndarray, np.ndarray]:
    """Moments of axis 1 of y where each norm's input is Gaussian, as the norm remembers it."""
    shape = (C, 1, 1)
    feeds = {n: (MEAN.reshape(shape) + np.sqrt(VARIANCE).reshape(shape) * RNG.standard_normal((samples, C, 4, 4))).astype(np.float32)
             for n in ("x", "x2")}  # fmt: skip
    return channel_moments([session(spa.load(made)).run(["y"], feeds)[0]])


def test_relu_as_in_the_books() -> None:
    made = found(model("y = Relu(b)"))
    scales = np.abs(SCALE.astype(float)) * np.sqrt(VARIANCE / (VARIANCE + 1e-5))
    for i, (beta, scale) in enumerate(zip(BIAS.astype(float), scales, strict=True)):
        z = beta / scale if scale else np.sign(beta) * 1e3
        phi, whole = exp(-z * z / 2) / sqrt(2 * pi), (1 + erf(z / sqrt(2))) / 2
        mean, square = beta * whole + scale * phi, (beta**2 + scale**2) * whole + beta * scale * phi
        assert made["y"].mean[i] == pytest.approx(mean, abs=2e-4 * max(scale, 0.01))
        assert made["y"].variance[i] == pytest.approx(square - mean**2, abs=2e-4 * max(scale**2, 0.01))
    assert made["x"].mean == pytest.approx(MEAN)
    assert made["x"].variance == pytest.approx(VARIANCE)
    assert made["b"].mean == pytest.approx(BIAS, abs=1e-5)
    assert made["b"].variance == pytest.approx(SCALE**2, rel=2e-3)
    assert set(made) == {"x", "x2", "b", "b2", "y"}
    assert {c.axis for c in made.values()} == {1}


SLOPE = np.linspace(-0.5, 0.5, C).astype(np.float32).reshape(C, 1, 1)
CASES = {
    "relu": "y = Relu(b)",
    "leaky": "y = LeakyRelu<alpha=0.2>(b)",
    "relu6": "y = Clip(b, zero, six)",
    "prelu": "y = PRelu(b, slope)",
    "hardswish": "y = HardSwish(b)",
    "swish": "g = Sigmoid(b) y = Mul(b, g)",
    "hardswish taken apart": "a = Add(b, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(b, d)",
    "gelu taken apart": "d = Div(b, root) e = Erf(d) f = Add(e, one) g = Mul(b, f) y = Mul(g, half)",
    "mish": "p = Softplus(b) t = Tanh(p) y = Mul(b, t)",
    "chosen": "k = Greater(b, one) y = Where(k, b, one)",
    "residual": "a = Add(b, b2) y = Relu(a)",
    "residual behind relu": "r = Relu(b) y = Add(r, b2)",
    "twice": "y = Add(b, b)",
    "in another type": "h = Cast<to=11>(b) r = Relu(h) y = Cast<to=1>(r)",
    "concatenated": "r = Relu(b) y = Concat<axis=1>(r, b2)",
    "split": "k, y = Split<axis=1>(b, sizes)",
    "sliced": "y = Slice(b, start, stop, axes)",
    "picked": "y = Gather<axis=1>(b, order)",
    "shuffled": "p = Reshape(b, five) q = Transpose<perm=[0,2,1,3,4]>(p) y = Reshape(q, four)",
    "gated": "g, h = Split<axis=1>(b, halves) y = Identity(h)",
    "to the end and back": "l = Transpose<perm=[0,2,3,1]>(b) r = Relu(l) a = Mul(r, last) y = Transpose<perm=[0,3,1,2]>(a)",
}
WEIGHTS = {
    "zero": np.float32(0), "six": np.float32(6), "three": np.float32(3), "one": np.float32(1), "half": np.float32(0.5),
    "root": np.float32(sqrt(2)), "slope": SLOPE, "sizes": ints(2, 4), "halves": ints(3, 3), "start": ints(1),
    "stop": ints(5), "axes": ints(1),
    "order": ints(5, 0, 1), "last": SLOPE.reshape(C), "five": ints(0, 2, 3, 4, 4), "four": ints(0, 6, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_samples(name: str) -> None:
    words = re.split(r"[^a-z0-9_]+", CASES[name])
    made = model(CASES[name], result="float[n,c,4,4]", **{n: w for n, w in WEIGHTS.items() if n in words})
    mean, variance = sampled(made)
    y = found(made)["y"]
    assert y.axis == 1
    assert np.abs((y.mean - mean) / (np.sqrt(variance) + 1e-3)).max() < 0.02
    assert y.variance == pytest.approx(variance, rel=0.04, abs=1e-5)


def test_what_a_norm_remembers_is_better_than_what_was_carried_there() -> None:
    known = found(model("r = Relu(b) z = BatchNormalization(r, s2, o2, m2, v2) y = Relu(z)"))
    assert known["r"].mean == pytest.approx(MEAN)
    assert known["r"].variance == pytest.approx(VARIANCE)
    assert known["z"].mean == pytest.approx(OTHER["o2"], abs=1e-5)


def test_gelu_is_a_function_of_the_schema() -> None:
    made = model("y = Gelu(b)", opset=20)
    mean, variance = sampled(made)
    assert found(made)["y"].mean == pytest.approx(mean, abs=0.02)
    assert found(made)["y"].variance == pytest.approx(variance, rel=0.03, abs=1e-5)


@pytest.mark.parametrize("pool", ["GlobalAveragePool(r)", "AveragePool<kernel_shape=[2,2], strides=[2,2]>(r)", "ReduceMean<axes=[2,3]>(r)"])
def test_averages_keep_the_mean(pool: str) -> None:
    made = model(f"r = Relu(b) y = {pool}", result="float[n,6,h,w]")
    mean, variance = sampled(made)
    y = found(made)["y"]
    assert y.mean == pytest.approx(mean, abs=0.01)
    assert (y.variance >= variance * 0.99).all()
    assert y.variance == pytest.approx(found(made)["r"].variance, rel=1e-3)


def test_data_of_layers() -> None:
    body = "r = Relu(b) c = Conv(r, w) n = BatchNormalization(c, s2, o2, m2, v2) p = GlobalAveragePool(n) f = Flatten(p) y = Gemm(f, u)"
    made = net(f"{SPACE} x -> float[n,4] y", "b = BatchNormalization(x, s, o, m, v) " + body, **NORM, **OTHER, w=(6, 6, 3, 3), u=(6, 4))
    groups = analyze(made).groups
    known = closed_form(groups)
    conv, gemm = find_layers(groups)
    mean, variance = bias_moments(groups, conv) or (None, None)
    assert mean == pytest.approx(np.repeat(known["r"].mean, 9)[None])
    assert variance == pytest.approx(np.repeat(known["r"].variance, 9)[None])
    mean, variance = bias_moments(groups, gemm, known) or (None, None)
    assert mean == pytest.approx(np.asarray(OTHER["o2"])[None], abs=1e-4)
    assert variance is not None
    assert variance.shape == (1, 6)


def test_flattened_maps_and_groups() -> None:
    body = "c = Conv<group=3>(r, w) y = Flatten(r) k = MatMul(y, u)"
    made = net(f"{SPACE} x -> float[n,96] y, float[n,6,4,4] c, float[n,2] k", "r = BatchNormalization(x, s, o, m, v) " + body, **NORM,
               w=(6, 2, 1, 1), u=(96, 2))  # fmt: skip
    groups = analyze(made).groups
    assert closed_form(groups)["y"].mean == pytest.approx(np.repeat(BIAS, 16), abs=1e-5)
    for layer in find_layers(groups):
        mean, _ = bias_moments(groups, layer) or (None, None)
        expected = BIAS.reshape(3, 2) if layer.parts == 3 else np.repeat(BIAS, 16)[None]
        assert mean == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "y = MaxPool<kernel_shape=[2,2]>(b)",
        "y = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(b)",
        "y = Mul(b, b2)",
        "y = Add(b, x3)",
        "y = Add(b, field)",
        "y = Concat<axis=2>(b, b2)",
        "y = Concat<axis=1>(b, x3)",
        "y = ReduceMean<axes=[1]>(b)",
        "y = Log(b)",
        "y = Reciprocal(b)",
        "a = Add(b, shift) y = Reciprocal(a)",
        "g, h = Split<axis=1>(b, halves) y = Mul(g, h)",
    ],
)
def test_what_is_unknown_is_left_out(body: str) -> None:
    extra = {"field": RNG.standard_normal((4, 4)).astype(np.float32), "halves": ints(3, 3), "shift": np.float32(0.371)}
    made = net(f"{SPACE} x, {SPACE} x2, {SPACE} x3 -> float[n,c,h,w] y", BOTH + body, **NORM, **OTHER,
               **{n: w for n, w in extra.items() if n in body})  # fmt: skip
    known = found(made)
    assert "y" not in known
    assert {"x", "x2", "b", "b2"} <= set(known)


def test_without_norms_nothing_is_known() -> None:
    made = net("float[n,6] x -> float[n,4] y", "h = Gemm(x, w) r = Relu(h) y = Gemm(r, u)", w=(6, 5), u=(5, 4))
    groups = analyze(made).groups
    assert closed_form(groups) == {}
    assert [bias_moments(groups, layer) for layer in find_layers(groups)] == [None, None]
