"""Scores against plain numpy, over the whole group."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from test_trace import groups_of, ints, net

import spa
from spa import criteria
from spa.criteria import registry
from spa.errors import BadModel, BadOption
from spa.statistics.sums import _magnitudes


def model() -> onnx.ModelProto:
    body = "a = Conv(x, w1, b1) n = BatchNormalization(a, s, b, m, v) r = Relu(n) f = Flatten(r) y = Gemm<transB=1>(f, w2)"
    return net("float[2,3,4,4] x -> float[2,5] y", body, w1=(8, 3, 1, 1), b1=(8,), s=(8,), b=(8,), m=(8,), v=np.ones(8, np.float32),
               w2=(5, 128))


def weights_of(made: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in made.graph.initializer}


def scores_of(made: onnx.ModelProto, criterion: str, name: str, seed: int = 0) -> np.ndarray:
    analysis = spa.analyze(made)
    scores = spa.score(analysis.normal.model.graph, analysis.groups, criterion, seed=seed)
    return scores.values[analysis.groups.by_name[name].coordinates]


def by_hand(made: onnx.ModelProto, p: float) -> np.ndarray:
    """Sum of |w|^p over all matrices of the group, times what a norm multiplies; vectors (biases, norms) count only where there is no
    matrix.
    """
    w = weights_of(made)
    gain = w["s"] / np.sqrt(w["v"] + 1e-5)
    return (np.abs(w["w1"] * gain[:, None, None, None]) ** p).sum((1, 2, 3)) + (np.abs(w["w2"].reshape(5, 8, 16)) ** p).sum((0, 2))


def test_l1_and_l2_over_the_whole_group() -> None:
    assert np.allclose(scores_of(model(), "l1", "w1:0"), by_hand(model(), 1), rtol=1e-6)
    assert np.allclose(scores_of(model(), "l2", "w1:0"), np.sqrt(by_hand(model(), 2)), rtol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 30])
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int, criterion: str) -> None:
    whole = scores_of(model(), criterion, "w1:0")
    monkeypatch.setattr(sys.modules["spa.statistics.sums"], "BLOCK", block)
    assert np.allclose(scores_of(model(), criterion, "w1:0"), whole, rtol=1e-6)


def test_random_depends_on_the_seed_and_the_group_alone() -> None:
    one, again, other = (scores_of(model(), "random", "w1:0", seed) for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert ((one >= 0) & (one < 1)).all()
    index = groups_of(model()).by_name["w1:0"].index
    assert np.array_equal(one, np.random.default_rng([0, index]).random(8))


def test_factors_of_a_product() -> None:
    """A head is scored by all its columns, a position in the heads by that column of every head."""
    body = "a = MatMul(x, w1) b = Reshape(a, s) c = Transpose<perm=[0,2,1,3]>(b) d = Transpose<perm=[0,2,1,3]>(c)"
    body += " e = Reshape(d, f) y = MatMul(e, w2)"
    made = net("float[2,7,5] x -> float[2,7,5] y", body, w1=(5, 12), w2=(12, 5), s=ints(0, 0, 3, 4), f=ints(0, 0, 12))
    w = weights_of(made)
    w1, w2 = w["w1"].reshape(5, 3, 4), w["w2"].reshape(3, 4, 5)
    sizes = {g.size: g.name for g in groups_of(made).free()}
    assert np.allclose(scores_of(made, "l1", sizes[3]), np.abs(w1).sum((0, 2)) + np.abs(w2).sum((1, 2)), rtol=1e-6)
    assert np.allclose(scores_of(made, "l1", sizes[4]), np.abs(w1).sum((0, 1)) + np.abs(w2).sum((0, 2)), rtol=1e-6)


def test_vectors_count_where_there_is_nothing_else() -> None:
    body = "a = Mul(x, s) h = MatMul(c, w) y = Add(h, a)"
    made = net("float[2,1] x, float[2,3] c -> float[2,6] y", body, s=(6,), w=(3, 6))
    analysis = spa.analyze(made, protect_outputs=False)
    group = next(g for g in analysis.groups.free() if ("s", 0) in g.sites)
    found = spa.score(analysis.normal.model.graph, analysis.groups, "l1").values[group.coordinates]
    assert np.allclose(found, np.abs(weights_of(made)["w"]).sum(0), rtol=1e-6)
    alone = spa.analyze(net("float[2,1] x -> float[2,6] y", "y = Mul(x, s)", s=(6,)), protect_outputs=False)
    found = spa.score(alone.normal.model.graph, alone.groups, "l1").values
    assert np.allclose(found[alone.groups.by_name["s:0"].coordinates], np.abs(weights_of(made)["s"]), rtol=1e-6)


@pytest.mark.parametrize("kind, tolerance", [(TensorProto.FLOAT16, 1e-2), (TensorProto.BFLOAT16, 1e-2), (TensorProto.DOUBLE, 1e-9)])
def test_other_floats(kind: int, tolerance: float) -> None:
    name = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "double"}[kind]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    w = {n: (np.random.default_rng(i).standard_normal(s)).astype(dtype) for i, (n, s) in enumerate({"w1": (4, 8), "w2": (8, 5)}.items())}
    made = net(f"{name}[2,4] x -> {name}[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", **w)
    expected = np.sqrt((w["w1"].astype(np.float64) ** 2).sum(0) + (w["w2"].astype(np.float64) ** 2).sum(1))
    assert np.allclose(scores_of(made, "l2", "w1:1"), expected, rtol=tolerance)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(bad: float) -> None:
    w = np.ones((4, 8), np.float32)
    w[1, 3] = bad
    made = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", w1=w, w2=(8, 5))
    with pytest.raises(BadModel, match="Tensor 'w1' holds NaN or infinity"):
        scores_of(made, "l2", "w1:1")
    assert scores_of(made, "random", "w1:1").shape == (8,)


def test_frozen_groups_are_not_scored() -> None:
    analysis = spa.analyze(model())
    values = spa.score(analysis.normal.model.graph, analysis.groups).values
    for group in analysis.groups.groups:
        assert np.isnan(values[group.coordinates]).all() == (group.frozen is not None)


def test_only_the_groups_that_are_asked_for() -> None:
    analysis = spa.analyze(net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) k = MatMul(h, w2) y = MatMul(k, w3)",
                               w1=(4, 8), w2=(8, 6), w3=(6, 5)))
    group = analysis.groups.by_name["w2:1"]
    values = spa.score(analysis.normal.model.graph, analysis.groups, only=[group]).values
    assert np.isfinite(values[group.coordinates]).all()
    assert np.isfinite(values).sum() == 6


def test_a_criterion_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @spa.criterion("largest")
    def largest(view: criteria.GroupView) -> np.ndarray:
        return view.powers(8) ** (1 / 8)

    assert "largest" in criteria.names()
    assert np.allclose(scores_of(model(), "largest", "w1:0"), by_hand(model(), 8) ** (1 / 8), rtol=1e-5)

    @spa.criterion("short")
    def short(view: criteria.GroupView) -> np.ndarray:
        return view.powers(1)[:-1]

    with pytest.raises(BadModel, match=r"'short' gave \(7,\) scores for 8 coordinates of w1:0"):
        scores_of(model(), "short", "w1:0")


def test_a_criterion_that_is_not_there() -> None:
    with pytest.raises(BadOption, match="There is no criterion 'best'; the choice is: .*l1, l2, .*random"):
        scores_of(model(), "best", "w1:0")


def test_half_precision_by_its_bits() -> None:
    """Every float16 there is: the same magnitude as numpy gives, infinity where it is not finite."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    expected = np.abs(every.astype(np.float32))
    expected[~np.isfinite(expected)] = np.inf
    np.testing.assert_array_equal(_magnitudes(every), expected)
