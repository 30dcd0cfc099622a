"""Inputs made from what norms remember, on a small network that has seen structured data."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import net

from spa.api import Analysis, analyze
from spa.data.calibration import calibration
from spa.data.evidence import adapted
from spa.data.synthesis import mismatch, synthesize
from spa.errors import BadOption, UnsupportedModel
from spa.proof.check import session
from spa.proof.feeds import Feeds
from spa.storage.store import to_proto

pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")

BODY = """c1 = Conv<pads=[1,1,1,1]>(x, w1) n1 = BatchNormalization(c1, s, o, m1, v1) r1 = Relu(n1)
c2 = Conv<pads=[1,1,1,1]>(r1, w2) n2 = BatchNormalization(c2, s, o, m2, v2) a = Add(n2, r1) r2 = Relu(a)
p = GlobalAveragePool(r2) f = Flatten(p) y = Gemm(f, u, d)"""
SHAPES = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "u": (8, 4), "d": (4,)}


def pictures(samples: int, seed: int) -> np.ndarray:
    """(n, 3, 12, 12) slanted waves in one colour each, mean about 0 and variance about 1."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(12), np.arange(12))
    angle, phase = rng.uniform(0, np.pi, (samples, 1, 1)), rng.uniform(0, 6, (samples, 1, 1))
    waves = np.sin(0.6 * (np.cos(angle) * across + np.sin(angle) * down) + phase)[:, None]
    return (waves * rng.uniform(0.4, 2, (samples, 3, 1, 1)) + 0.3).astype(np.float32)


def fresh(batch: int | str = "n", dtype: str = "float", **weights: Any) -> onnx.ModelProto:
    moments = {n: np.full(8, float(n[0] == "v"), np.float32) for n in ("m1", "v1", "m2", "v2")}
    lines = {"s": np.linspace(0.5, 1.5, 8, dtype=np.float32), "o": np.linspace(-0.5, 0.5, 8, dtype=np.float32)}
    every = {**SHAPES, **moments, **lines, **weights}
    return net(f"{dtype}[{batch},3,12,12] x -> {dtype}[{batch},4] y", BODY, **every)


@cache
def trained() -> Analysis:
    """The network with its norms' statistics as they are on the pictures."""
    analysis = analyze(fresh())
    return analyze(to_proto(adapted(analysis.normal.model, analysis.groups, [{"x": pictures(256, 1)}])))


def made(analysis: Analysis, **settings: Any) -> list[Feeds]:
    return synthesize(analysis.normal.model.graph, analysis.groups, **settings)


def distance(analysis: Analysis, batches: Any) -> float:
    return mismatch(analysis.normal.model.graph, analysis.groups, batches)


def test_statistics_come_close_to_what_the_norms_remember() -> None:
    analysis = trained()
    noise = distance(analysis, calibration(None, analysis.groups.traced, samples=64))
    found = made(analysis, samples=64, steps=100)
    assert [b["x"].shape for b in found] == [(32, 3, 12, 12)] * 2
    assert {b["x"].dtype for b in found} == {np.dtype(np.float32)}
    assert not np.array_equal(found[0]["x"], found[1]["x"])
    assert distance(analysis, found) < 0.02 * noise
    assert np.abs(found[0]["x"].mean((0, 2, 3))).max() < 0.5


def test_same_seed_same_inputs() -> None:
    one, two, other = (made(trained(), samples=8, batch=8, steps=5, seed=seed)[0]["x"] for seed in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_no_steps_are_the_start() -> None:
    start = next(iter(calibration(None, trained().groups.traced, samples=8, batch=8)))["x"]
    assert np.array_equal(made(trained(), samples=8, batch=8, steps=0)[0]["x"], start)


def test_classes_weigh_in() -> None:
    found = made(trained(), samples=40, batch=20, steps=80, classes=3.0)
    scores = np.concatenate([session(trained().given).run(["y"], b)[0] for b in found])
    without = session(trained().given).run(["y"], made(trained(), samples=40, batch=20, steps=80)[0])[0]
    assert len(np.unique(scores.argmax(1))) > len(np.unique(without.argmax(1)))


def test_a_batch_that_the_model_fixes() -> None:
    assert [b["x"].shape[0] for b in made(analyze(fresh(batch=4)), samples=9, steps=1)] == [4, 4]


def test_half_precision_and_other_inputs() -> None:
    model = fresh()
    ids = onnx.helper.make_tensor_value_info("ids", 7, ["n"])
    model.graph.input.append(ids)
    model.graph.node.append(onnx.helper.make_node("Gather", ["table", "ids"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["n", 5]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((7, 5), np.float32), "table"))
    (found,) = made(analyze(model), samples=4, steps=2)
    assert found["ids"].shape == (4,)
    assert found["ids"].dtype == np.int64
    weights = {t.name: numpy_helper.to_array(t).astype(np.float16) for t in fresh().graph.initializer}
    halves = fresh(dtype="float16", **weights)
    (half,) = made(analyze(halves), samples=4, steps=2)
    assert half["x"].dtype == np.float16
    assert np.isfinite(half["x"]).all()


def test_probabilities_are_taken_as_they_are() -> None:
    model = fresh()
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["y"]))
    (one,) = made(analyze(fresh()), samples=4, steps=3, classes=1.0)
    (two,) = made(analyze(model), samples=4, steps=3, classes=1.0)
    assert two["x"] == pytest.approx(one["x"], abs=1e-2)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = analyze(net("float[n,6] x -> float[n,4] y", "h = Gemm(x, w) r = Relu(h) y = Gemm(r, u)", w=(6, 5), u=(5, 4)))
    with pytest.raises(BadOption, match="no norm that stores mean and variance.*calibrate with noise or with data"):
        made(plain)
    with pytest.raises(BadOption, match="nothing to compare with"):
        distance(plain, [])
    norm = {n: np.ones(6, np.float32) for n in "somv"}
    tokens = net("int64[n,5] x -> float[n,5,6] y", "e = Gather(t, x) z = Transpose<perm=[0,2,1]>(e) b = BatchNormalization(z, s, o, m, v) "
                 "y = Transpose<perm=[0,2,1]>(b)", t=(9, 6), **norm)  # fmt: skip
    with pytest.raises(BadOption, match="no input of floats"):
        made(analyze(tokens))
    body = "y = Relu(x) e = Gather(t, i) k = BatchNormalization(e, s, o, m, v)"
    aside = net("float[n,6] x, int64[n] i -> float[n,6] y, float[n,6] k", body, t=(9, 6), **norm)
    with pytest.raises(BadOption, match="lies behind an input"):
        made(analyze(aside), steps=1)
    pixels = net("float[n,3,4,4] x -> float[n,3,4,4] y", "y = BatchNormalization(x, s, o, m, v)", **{n: v[:3] for n, v in norm.items()})
    with pytest.raises(BadOption, match=r"no table .samples, classes."):
        made(analyze(pixels), classes=1.0)
    for wrong in ({"samples": 0}, {"batch": 0}, {"rate": 0.0}, {"classes": -1.0}, {"steps": -1}, {"rate": float("nan")}):
        with pytest.raises(BadOption):
            made(trained(), **wrong)
    foreign = net("float[n,6] x -> float[n,6] y, float[n,6] z", "y = BatchNormalization(x, s, o, m, v) z = my.Strange(x)", **norm)
    with pytest.raises(UnsupportedModel, match=r"without gradients here: calibrate with noise or with data\.$"):
        made(analyze(foreign))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(BadOption, match=r"pip install 'spa-prune\[torch\]', or calibrate with noise"):
        made(trained())


def test_weights_that_are_not_finite() -> None:
    broken = fresh(d=np.full(4, np.inf, np.float32), w1=np.full((8, 3, 3, 3), 3e38, np.float32))
    with pytest.raises(UnsupportedModel, match="are not finite"):
        made(analyze(broken), samples=2, steps=2)
