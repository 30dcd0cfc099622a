"""Feeds: what is drawn for inputs, and the other sizes that are tried."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from test_trace import groups_of, ints, net

import spa
from spa.api import runnable
from spa.errors import UnsupportedModel
from spa.graph.trace import Traced
from spa.proof.feeds import draw, free_batch, one_sample, shapes_to_try


def traced(model: onnx.ModelProto, **settings: Any) -> Traced:
    return groups_of(model, **settings).traced


def test_floats_are_normal_and_follow_the_seed() -> None:
    found = traced(net("float[n,300] x -> float[n,300] y", "y = Relu(x)"))
    one, again, other = (draw(found, seed=s)["x"] for s in (0, 0, 1))
    assert one.shape == (2, 300)
    assert one.dtype == np.float32
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert abs(float(one.mean())) < 0.2  # type: ignore[arg-type]
    assert 0.8 < float(one.std()) < 1.2  # type: ignore[arg-type]
    assert draw(found, shapes={"x": (5, 7)})["x"].shape == (5, 7)


def test_kinds_of_inputs() -> None:
    body = "y = Relu(x) b1 = Not(b) i1 = Abs(i) s1 = Identity(s)"
    model = net("float16[2,3] x, bool[2] b, int32[4] i, string[2] s -> float16[2,3] y, bool[2] b1, int32[4] i1, string[2] s1", body)
    feeds = draw(traced(model))
    assert feeds["x"].dtype == np.float16
    assert feeds["b"].tolist() == [True, True]
    assert feeds["i"].dtype == np.int32
    assert feeds["i"].tolist() == [1] * 4
    assert feeds["s"].tolist() == ["a", "a"]


@pytest.mark.parametrize(
    "body, top",
    [
        ("y = Gather(t, i)", 6),
        ("c = Cast<to=6>(i) y = Gather(t, c)", 6),
        ("u = Unsqueeze(i, axis) s = Squeeze(u, axis) y = Gather(t, s)", 6),
        ("y = Gather(t, i) z = Gather(small, i)", 3),
    ],
)
def test_ids_stay_inside_their_tables(body: str, top: int) -> None:
    model = net("int64[500] i -> float[a,b] y", body, t=(6, 4), small=(3, 4), axis=ints(0))
    found = draw(traced(model))["i"]
    assert int(found.min()) == 0  # type: ignore[arg-type]
    assert int(found.max()) == top - 1  # type: ignore[arg-type]


def test_ids_that_are_computed_with_are_ones() -> None:
    model = net("int64[50] i -> float[a,b] y", "j = Add(i, one) y = Gather(t, j)", t=(6, 4), one=ints(1))
    assert set(draw(traced(model))["i"].tolist()) == {1}


def test_the_free_batch() -> None:
    relu = "y = Relu(x)"
    assert free_batch(traced(net("float[n,3] x -> float[n,3] y", relu))) == 2
    assert free_batch(traced(net("float[4,3] x -> float[4,3] y", relu))) == 1
    assert free_batch(traced(net("float[n,3] x, float[3] z -> float[n,3] y", "y = Add(x, z)"))) == 1
    assert free_batch(traced(net("float[n,3] x, float[n,3] z -> float[n,3] y", "y = Add(x, z)"))) == 2
    assert free_batch(traced(net("float[n,3] x -> float[n,3] y", relu), inputs={"x": [7, 3]})) == 7


def test_one_sample() -> None:
    found = traced(net("float[n,3] x, float[n,3] z -> float[n,3] y", "y = Add(x, z)"))
    assert {v.shape for v in one_sample(found, draw(found)).values()} == {(1, 3)}
    fixed = traced(net("float[4,3] x -> float[4,3] y", "y = Relu(x)"))
    assert one_sample(fixed, draw(fixed))["x"].shape == (4, 3)


def test_other_shapes() -> None:
    static = traced(net("float[4,3] x -> float[4,3] y", "y = Relu(x)"))
    assert list(shapes_to_try(static)) == [{"x": (4, 3)}]
    found = list(shapes_to_try(traced(net("float[n,t] x, float[t,5] z -> float[n,5] y", "y = MatMul(x, z)"))))
    assert found[0] == {"x": (2, 16), "z": (16, 5)}
    assert all(s["x"][1] == s["z"][0] and s["z"][1] == 5 for s in found)
    assert {"x": (1, 512), "z": (512, 5)} in found
    assert len(found) == 1 + 2 * 5
    many = net("float[a,b,c,d] x -> float[a,b,c,d] y", "y = Relu(x)")
    assert len(list(shapes_to_try(traced(many)))) <= 101


def test_a_window_that_needs_more_than_was_assumed() -> None:
    body = "a = Conv(x, w1) y = Conv(a, w2)"
    model = net("float[n,2,t] x -> float[n,4,u] y", body, w1=(8, 2, 1), w2=(4, 8, 400))
    loaded = spa.load(model)
    feeds = runnable(loaded, traced(model))
    assert feeds["x"].shape[2] >= 400
    result = spa.prune(model, 0.5, multiple_of=1)
    assert result.check is not None
    assert result.check.passed


def test_no_shape_that_runs() -> None:
    model = net("float[n,4] x -> float[n,5] y", "h = MatMul(x, w) r = Reshape(h, s) y = MatMul(r, v)", w=(4, 8), s=ints(5, 8), v=(8, 5))
    with pytest.raises(UnsupportedModel, match="does not run the model: .*--input x:2x4: give sizes that fit with --input"):
        runnable(spa.load(model), traced(model))
    assert runnable(spa.load(model), traced(model, inputs={"x": [5, 4]}))["x"].shape == (5, 4)
