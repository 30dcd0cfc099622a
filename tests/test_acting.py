"""A network is scored alike whether its norms are multiplied into the weights, stand apart, or are taken to pieces."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from spa.statistics.acting import gains

CHANNELS = 8
RNG = np.random.default_rng(0)
NORM = {"s": RNG.uniform(-2, 2, CHANNELS), "b": RNG.normal(size=CHANNELS), "m": RNG.normal(size=CHANNELS),
        "v": RNG.uniform(0.5, 2, CHANNELS)}  # fmt: skip
GAIN = NORM["s"] / np.sqrt(NORM["v"] + 1e-5)
W1, W2 = RNG.normal(size=(CHANNELS, 3, 3, 3)), RNG.normal(size=(4, CHANNELS, 1, 1))


def made(body: str, **weights: np.ndarray) -> onnx.ModelProto:
    body += " r = Relu(n) y = Conv(r, w2)"
    given = {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in {"w1": W1, "w2": W2, **weights}.items()}
    return net("float[n,3,6,6] x -> float[n,4,6,6] y", body, **given)


def folded() -> onnx.ModelProto:
    return made("n = Conv<pads=[1,1,1,1]>(x, w1, c)", w1=W1 * GAIN[:, None, None, None], c=NORM["b"] - NORM["m"] * GAIN)


def apart() -> onnx.ModelProto:
    return made("a = Conv<pads=[1,1,1,1]>(x, w1) n = BatchNormalization(a, s, b, m, v)", **NORM)


def behind_a_bias() -> onnx.ModelProto:
    c = np.arange(CHANNELS, dtype=np.float32)
    return made("a = Conv<pads=[1,1,1,1]>(x, w1) d = Add(a, c) n = BatchNormalization(d, s, b, m, v)", c=c[:, None, None],
                **{**NORM, "m": NORM["m"] + c})


def in_pieces() -> onnx.ModelProto:
    """As JAX has it: channels last, the kernel stored so too, and the factor computed from the stored numbers."""
    body = """k = Transpose<perm=[3,2,0,1]>(w1) a = Conv<pads=[1,1,1,1]>(x, k) t = Transpose<perm=[0,2,3,1]>(a) e = Add(v, eps) q = Sqrt(e)
      f = Div(s, q) g = Reshape(f, shape) d = Sub(t, m) u = Mul(d, g) o = Add(u, b) n = Transpose<perm=[0,3,1,2]>(o)"""
    return made(body, **NORM, w1=W1.transpose(2, 3, 1, 0), eps=np.array([1e-5]), shape=ints(1, 1, 1, CHANNELS))


def plan_of(model: onnx.ModelProto, criterion: str) -> list[int]:
    plan = spa.plan(model, 0.5, criterion=criterion, multiple_of=1)
    return next(list(g["kept"]) for g in plan.groups.values())


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "fpgm"])
@pytest.mark.parametrize("make", [apart, behind_a_bias, in_pieces])
def test_the_same_scores_and_plan(make, criterion: str) -> None:
    scores = []
    for model in (folded(), make()):
        analysis = spa.analyze(model)
        found = spa.score(analysis.normal.model.graph, analysis.groups, criterion).values
        scores.append(next(found[g.coordinates] for g in analysis.groups.free() if g.size == CHANNELS))
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
    assert plan_of(folded(), criterion) == plan_of(make(), criterion)
    plain = W1 if make is not in_pieces else W1.transpose(2, 3, 1, 0)
    assert any(np.array_equal(numpy_helper.to_array(t), plain.astype(np.float32)) for t in make().graph.initializer)


def test_criteria_of_data_see_the_same() -> None:
    x = np.random.default_rng(1).normal(size=(16, 3, 6, 6)).astype(np.float32)
    plans = [spa.plan(m, 0.5, criterion="wanda", calibration=[{"x": x}], multiple_of=1) for m in (folded(), apart(), in_pieces())]
    kept = [next(list(g["kept"]) for g in plan.groups.values()) for plan in plans]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("body, weights", [
    ("a = Conv<pads=[1,1,1,1]>(x, w1) n = Mul(a, c)", {"c": np.array(0.125)}),  # the same for all channels
    ("a = Conv<pads=[1,1,1,1]>(x, w1) n = PRelu(a, c)", {"c": NORM["s"][:, None, None]}),  # no straight line
    ("a = Conv<pads=[1,1,1,1]>(x, w1) h = Mul(a, c) n = Add(h, a)", {"c": NORM["s"][:, None, None]}),  # read twice
    ("a = Conv<pads=[1,1,1,1]>(x, w1) h = Div(c, a) n = Relu(h)", {"c": NORM["s"][:, None, None]}),  # divides by it
])  # fmt: skip
def test_what_is_no_gain(body: str, weights: dict[str, np.ndarray]) -> None:
    assert gains(spa.analyze(made(body, **weights)).groups) == {}


def test_the_numbers_of_a_gain() -> None:
    gain = gains(spa.analyze(in_pieces()).groups)["w1"]
    assert gain.axis == 3
    np.testing.assert_allclose(gain.factors, GAIN, rtol=1e-5)
