"""Statistics of layers' data, against numpy on the rows themselves; what is drawn, blocked and passed over."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from repair_cases import KINDS, batches, case, outputs_of
from test_trace import ints, net

import spa
from spa.errors import BadOption, UnsupportedModel
from spa.graph.linear import Layer, find_layers
from spa.statistics.observe import ROWS_A_COLUMN, Gram, Vectors, draw_rows, observe, parts_of, passes_of, stream
from spa.statistics.rows import row_count

BODY = "h = MatMul(x, w1) r = Relu(h) a = MatMul(r, w2) b = MatMul(r, w3) c = Concat <axis=-1> (a, b) y = MatMul(c, w4)"


def model() -> onnx.ModelProto:
    return net("float[n,6] x -> float[n,5] y", BODY, w1=(6, 12), w2=(12, 4), w3=(12, 3), w4=(7, 5))


def analysed(given: onnx.ModelProto) -> tuple[spa.storage.store.Model, spa.Groups, list[Layer]]:
    analysis = spa.analyze(given)
    return analysis.normal.model, analysis.groups, list(find_layers(analysis.groups))


def expected(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.asarray(rows, np.float64)
    return rows.mean(axis=0), np.cov(rows, rowvar=False, bias=True)


@pytest.mark.parametrize("name", KINDS)
def test_moments_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("spa.statistics.observe.ROWS_A_COLUMN", 1e9)
    whole, before = case(name)
    data = batches(KINDS[name][0], 3)
    running, groups, layers = analysed(whole)
    layer = next(x for x in layers if x.place.name == "w")
    ((_, found),) = observe(running, groups, [layer], data, count=3)
    r = np.concatenate([KINDS[name][4](o["r"].astype(np.float64)) for o in outputs_of(before, data)], axis=1)
    assert [p.part for p, _ in found] == list(range(len(r)))
    for (part, moments), rows in zip(found, r, strict=True):
        mean, covariance = expected(rows)
        assert moments.count == len(rows)
        np.testing.assert_array_equal(part.columns, np.arange(rows.shape[1]))
        scale = np.diagonal(covariance).mean()
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-5, atol=1e-5 * np.sqrt(scale))
        np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-4, atol=2e-6 * scale)


def test_layers_of_the_same_rows_share_their_moments() -> None:
    running, groups, layers = analysed(model())
    found = {layer.place.name: moments for layer, moments in observe(running, groups, layers, batches((50, 6)), count=4)}
    assert found["w2"] is found["w3"]
    assert found["w2"] is not found["w4"]


@pytest.mark.parametrize("memory", [1, 8 * 13**2, 1 << 30])
def test_memory_changes_the_passes_and_nothing_else(memory: int) -> None:
    running, groups, layers = analysed(model())
    runs: list[int] = []

    class Data(list[Any]):
        def __iter__(self) -> Any:
            runs.append(1)
            return super().__iter__()

    data = Data(batches((50, 6)))
    found = {x.place.name: m for x, m in observe(running, groups, layers, data, count=4, memory=memory)}
    chunks = list(passes_of(layers, memory))
    assert [x.place.name for chunk in chunks for x in chunk] == ["w1", "w2", "w3", "w4"]
    assert len(runs) == len(chunks) == {1: 3, 8 * 13**2: 3, 1 << 30: 1}[memory]
    plain = {x.place.name: m for x, m in observe(running, groups, layers, data, count=4)}
    for name, moments in plain.items():
        for (_, one), (_, other) in zip(moments, found[name], strict=True):
            np.testing.assert_array_equal(one.covariance, other.covariance)


def test_float16_is_observed_in_float32() -> None:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s).astype(np.float16) for n, s in {"w1": (6, 8), "w2": (8, 4)}.items()}
    body = "h = MatMul(x, w1) y = MatMul(h, w2)"
    narrow, wide = (net(f"{kind}[n,6] x -> {kind}[n,4] y", body, **{k: v.astype(t) for k, v in weights.items()})
                    for kind, t in (("float16", np.float16), ("float", np.float32)))
    data = [{"x": b["x"].astype(np.float16)} for b in batches((50, 6))]
    wider = [{"x": b["x"].astype(np.float32)} for b in data]
    results = []
    for given, feeds in ((narrow, data), (wide, wider)):
        running, groups, layers = analysed(given)
        results.append([m.covariance for _, found in observe(running, groups, layers, feeds, count=4) for _, m in found])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------------ gathering

def test_gram() -> None:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((9, 9))
    rows = [(rng.standard_normal((n, 9)) @ mix + 1000).astype(np.float32) for n in (40, 1, 300)]
    targets = [(r[:, :3] @ mix[:3, :2] + 50).astype(np.float32) for r in rows]
    gram = Gram()
    for x, y in zip(rows, targets, strict=True):
        gram.add(x, y)
    x, y = (np.concatenate(v).astype(np.float64) for v in (rows, targets))
    mean, covariance = expected(x)
    moments = gram.moments()
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(moments.covariance, covariance, atol=1e-4 * covariance.max())  # although the mean is 1000
    cross, target, variance = gram.target()
    np.testing.assert_allclose(target, y.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(cross, (y - y.mean(axis=0)).T @ (x - mean) / len(x), atol=1e-4 * np.abs(cross).max())
    assert variance == pytest.approx(y.var(axis=0).sum(), rel=1e-4)


def test_too_few_rows() -> None:
    with pytest.raises(BadOption, match="fewer than two rows: give more samples"):
        Gram().moments()
    gram = Gram()
    gram.add(np.ones((1, 4), np.float32))
    with pytest.raises(BadOption, match="fewer than two rows"):
        gram.moments()


def test_vectors() -> None:
    rng = np.random.default_rng(0)
    data = [np.maximum(rng.standard_normal((n, 4, 3, 5)) + 0.3, 0).astype(np.float32) for n in (2, 7, 1)]
    found = Vectors()
    for batch in data:
        found.add(batch, 1)
    whole = np.moveaxis(np.concatenate(data), 1, 0).reshape(4, -1).astype(np.float64)
    assert found.count == whole.shape[1]
    np.testing.assert_allclose(found.mean, whole.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.square, (whole**2).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.magnitude, np.abs(whole).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.zeros, (whole == 0).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.variance, whole.var(axis=1), rtol=1e-4)


# ------------------------------------------------------------------------------------------------ rows that are drawn

def picture_layer(side: int = 40) -> Layer:
    given = net(f"float[n,3,{side},{side}] x -> float[n,4,{side},{side}] y", "a = Conv(x, w1) y = Conv <pads=[1,1,1,1]> (a, w)",
                w1=(5, 3, 1, 1), w=(4, 5, 3, 3))
    return next(x for x in analysed(given)[2] if x.place.name == "w")


def test_rows_are_drawn_where_there_are_more_than_needed() -> None:
    layer = picture_layer()
    shape = (8, 5, 40, 40)
    total = row_count(layer, shape)
    drawn = draw_rows(layer, shape, 0, 0.25, 0)
    assert drawn is not None
    assert len(drawn) == max(ROWS_A_COLUMN * 45 // 4, -(-total * 4 // 45), 64)
    assert (np.diff(drawn) > 0).all()
    assert drawn[0] >= 0
    assert drawn[-1] < total
    np.testing.assert_array_equal(drawn, draw_rows(layer, shape, 0, 0.25, 0))
    for other in ((layer, shape, 1, 0.25, 0), (layer, shape, 0, 0.25, 1)):
        assert not np.array_equal(drawn, draw_rows(*other))
    assert draw_rows(layer, (1, 5, 5, 5), 0, 1.0, 0) is None
    assert draw_rows(layer, shape, 0, 1000.0, 0) is None


def test_drawn_rows_tell_nearly_the_same() -> None:
    given = net("float[n,3,40,40] x -> float[n,4,40,40] y", "a = Conv(x, w1) r = Relu(a) y = Conv <pads=[1,1,1,1]> (r, w)",
                w1=(5, 3, 1, 1), w=(4, 5, 3, 3))
    running, groups, layers = analysed(given)
    layer = next(x for x in layers if x.place.name == "w")
    data = batches((4, 3, 40, 40), 3)
    ((_, ((_, drawn),)),) = observe(running, groups, [layer], data, count=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spa.statistics.observe.ROWS_A_COLUMN", 1e9)
        ((_, ((_, every),)),) = observe(running, groups, [layer], data, count=3)
    assert drawn.count < every.count / 3
    assert np.abs(drawn.covariance - every.covariance).max() < 0.2 * np.abs(every.covariance).max()


# ------------------------------------------------------------------------------------------------ blocks

@pytest.mark.parametrize("largest", [1, 7, 16, 40, 143])
def test_blocks_hold_every_column_once(largest: int) -> None:
    body = "a = Conv(x, w1) f = Flatten(a) y = Gemm <transB=1> (f, w)"
    given = net("float[2,3,4,6] x -> float[2,5] y", body, w1=(6, 3, 1, 1), w=(5, 144))
    layer = next(x for x in analysed(given)[2] if x.place.name == "w")
    blocks = parts_of(layer, largest)
    np.testing.assert_array_equal(np.sort(np.concatenate([b.columns for b in blocks])), np.arange(144))
    assert all(len(b.columns) <= largest for b in blocks)
    if largest >= 24:
        for block in blocks:
            channels, places = np.unique(block.columns // 24), np.unique(block.columns % 24)
            assert len(channels) == 6
            assert len(block.columns) == 6 * len(places)
    assert len(parts_of(layer)) == 1


def test_blocks_of_each_part() -> None:
    given = net("float[2,8,6,6] x -> float[2,4,6,6] y", "r = Relu(x) y = Conv <group=2, pads=[1,1,1,1]> (r, w)", w=(4, 4, 3, 3))
    (layer,) = analysed(given)[2]
    assert [(p.part, len(p.columns)) for p in parts_of(layer)] == [(0, 36), (1, 36)]
    blocks = parts_of(layer, 12)
    for part in range(2):
        np.testing.assert_array_equal(np.sort(np.concatenate([b.columns for b in blocks if b.part == part])), np.arange(36))


# ------------------------------------------------------------------------------------------------ streaming

def test_stream() -> None:
    running, groups, _ = analysed(model())
    seen: list[tuple[int, dict[str, np.ndarray]]] = []
    data = batches((5, 6), 3)
    count = stream(running, groups.traced.facts.types, data, ["x", "r", "y", "r"], lambda i, v: seen.append((i, dict(v))))
    assert count == 3
    assert [i for i, _ in seen] == [0, 1, 2]
    for (_, values), batch in zip(seen, data, strict=True):
        np.testing.assert_array_equal(values["x"], batch["x"])
        held = {t.name: numpy_helper.to_array(t) for t in model().graph.initializer}
        np.testing.assert_allclose(values["r"], np.maximum(batch["x"] @ held["w1"], 0), rtol=1e-5, atol=1e-5)
        assert values["y"].shape == (5, 5)
    assert stream(running, groups.traced.facts.types, [], ["y"], lambda i, v: None) == 0
    assert stream(running, groups.traced.facts.types, data, ["x"], lambda i, v: None) == 3


def test_the_runtimes_words() -> None:
    running, groups, _ = analysed(model())
    with pytest.raises(UnsupportedModel, match="ONNX Runtime does not run the model on the calibration data: "):
        stream(running, groups.traced.facts.types, [{"x": np.ones((5, 7), np.float32)}], ["y"], lambda i, v: None)


def test_data_of_another_batch_than_that_of_tracing() -> None:
    """Shapes are those of the data, and the last batch may be smaller."""
    given = net("float[n,3,8,8] x -> float[n,5] y", "a = Conv(x, w1) p = GlobalAveragePool(a) f = Reshape(p, s) y = Gemm <transB=1> (f, w)",
                w1=(6, 3, 1, 1), w=(5, 6), s=ints(0, 6))
    running, groups, layers = analysed(given)
    data = [*batches((7, 3, 8, 8), 2), {"x": batches((2, 3, 8, 8), 1)[0]["x"]}]
    found = {x.place.name: m for x, m in observe(running, groups, layers, data, count=3)}
    assert found["w"][0][1].count == 16


def test_a_few_huge_rows_do_not_decide() -> None:
    """Attention sinks: one row in five hundred with a million times the energy; nine of ten rows set the measure."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1024, 6)).astype(np.float32)
    y = x @ rng.standard_normal((6, 4)).astype(np.float32)
    plain, sunk = Gram(), Gram()
    plain.add(x, y)
    x[::512], y[::512] = 1000 * rng.standard_normal(6), 1000 * rng.standard_normal(4)
    sunk.add(x, y)
    assert np.allclose(sunk.moments().covariance, plain.moments().covariance, atol=3)  # not 2000
    assert np.allclose(sunk.target()[1], plain.target()[1], atol=0.5)
    assert sunk.count < 1024
    assert plain.count == 1024
