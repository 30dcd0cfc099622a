"""Repair of whole graphs: against numpy's least squares for each kind of layer, on data not fitted, and in what it leaves alone."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser
from test_trace import ints, net

import spa
from spa.check import run
from spa.errors import BadOption
from spa.evidence import adapted, channel_moments, gather, stored_norms, transplanted, values
from spa.groups import Kept
from spa.linear import find_layers
from spa.observe import parts_of
from spa.offsets import Offset, Offsets
from spa.repair import Repaired, RepairOptions, repair
from spa.rewrite import rewrite
from spa.stepper import tapped
from spa.store import to_bytes, to_proto, with_graph

Feeds = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits on all rows, as the least squares that it is compared with."""
    monkeypatch.setattr("spa.observe.ROWS_A_COLUMN", 1e9)


def drawn(shape: Sequence[int], seed: int) -> np.ndarray:
    """Data that mix three sources over axis 1 (of pictures) or the last, with a mean and a little noise of their own."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    axis = 1 if len(shape) > 3 else len(shape) - 1
    sizes = [n for i, n in enumerate(shape) if i != axis]
    sources = rng.standard_normal((*sizes, 3))
    for i in range(1, sources.ndim - 1):
        sources = sources + np.roll(sources, 1, axis=i)
    x = sources @ fixed.standard_normal((3, shape[axis])) + 0.5 * rng.standard_normal((*sizes, shape[axis]))
    return np.moveaxis(x + fixed.standard_normal(shape[axis]), -1, axis).astype(np.float32)


def batches(shape: Sequence[int], count: int = 4, seed: int = 0) -> list[Feeds]:
    return [{"x": drawn(shape, 100 * seed + i)} for i in range(count)]


def some(size: int, part: float = 0.4, seed: int = 1) -> np.ndarray:
    """(size,) a mask with a part of its positions set, at least one."""
    found = np.arange(size) < max(1, round(part * size))
    np.random.default_rng(seed).shuffle(found)
    return found


def gone_where(groups: spa.Groups, wanted: Callable[[spa.groups.Group], bool] = lambda g: True, part: float = 0.4) -> np.ndarray:
    gone = np.zeros(groups.total, bool)
    for group in groups.free():
        if wanted(group):
            gone[group.coordinates] = some(group.size, part)
    return gone


def outputs_of(model: Any, feeds: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
    session = spa.check.session(model if isinstance(model, spa.store.Model) else spa.load(model), threads=1)
    names = [o.name for o in session.get_outputs()]
    return [dict(zip(names, session.run(None, f), strict=True)) for f in feeds]


def small_of(found: Repaired) -> spa.store.Model:
    return with_graph(found.model, rewrite(found.model.graph, found.groups, found.gone))


def error(found: Repaired, dense: Any, feeds: Sequence[Feeds]) -> float:
    """Mean squared error of the first output of the pruned model."""
    pairs = zip(outputs_of(dense, feeds), outputs_of(small_of(found), feeds), strict=True)
    return float(np.mean([np.mean((a["y"].astype(np.float64) - b["y"]) ** 2) for a, b in pairs]))


def fixed(model: onnx.ModelProto, gone: Callable[[spa.Groups], np.ndarray], data: Sequence[Feeds], **options: Any) -> Repaired:
    analysis = spa.analyze(model)
    return repair(analysis.normal.model, analysis.groups, gone(analysis.groups), data, RepairOptions(**options))


def weights_of(model: Any) -> dict[str, np.ndarray]:
    proto = model if isinstance(model, onnx.ModelProto) else to_proto(model)
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


# ------------------------------------------------------------------------------------------------ each kind of layer

def im2col(x: np.ndarray, kernel: Sequence[int], *, strides: Sequence[int] = (), pads: Sequence[int] = (),
           dilations: Sequence[int] = (), groups: int = 1) -> np.ndarray:
    """(groups, rows, channels · positions), one window after the other."""
    axes = len(kernel)
    strides, dilations, pads = strides or [1] * axes, dilations or [1] * axes, pads or [0] * (2 * axes)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    extents = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    found = []
    for n in range(len(x)):
        for place in itertools.product(*map(range, extents)):
            cut = tuple(slice(p * s, p * s + r, d) for p, s, r, d in zip(place, strides, reach, dilations, strict=True))
            found.append(x[(n, slice(None), *cut)].reshape(groups, -1))
    return np.stack(found, axis=1)


def im2col_transposed(x: np.ndarray, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], extra: Sequence[int],
                      groups: int = 1) -> np.ndarray:
    """Zeros between the data, then windows of the kernel turned round."""
    axes = len(kernel)
    spread = np.zeros((*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True))), x.dtype)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    around = [k - 1 - p for k, p in zip(kernel, pads[:axes], strict=True)]
    around += [k - 1 - p + e for k, p, e in zip(kernel, pads[axes:], extra, strict=True)]
    found = im2col(spread, kernel, pads=around, groups=groups)
    shape = (groups, found.shape[1], -1, *kernel)
    return np.flip(found.reshape(shape), axis=tuple(range(3, 3 + axes))).reshape(found.shape)


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(1, -1, x.shape[-1])


def pixels(groups: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """(n, groups · outputs, *space) -> (groups, rows, outputs)."""
    return lambda y: np.moveaxis(y, 1, -1).reshape(-1, groups, y.shape[1] // groups).transpose(1, 0, 2)


def left(y: np.ndarray) -> np.ndarray:
    return flat(np.swapaxes(y, -1, -2))


POINT = "h = Conv(x, w1) r = Relu(h)"
TOKEN = "h = MatMul(x, w1) r = Relu(h)"
Case = tuple[tuple[int, ...], str, str, dict[str, Any], Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]
KINDS: dict[str, Case] = {  # shape of x, what makes r, the layer, weights, its rows by hand, its output as (parts, rows, outputs)
    "conv": ((4, 3, 8, 9), POINT, "y = Conv <pads=[1,0,1,2], strides=[1,2], dilations=[2,1]> (r, w, b)",
             {"w1": (10, 3, 1, 1), "w": (4, 10, 2, 3), "b": (4,)},
             lambda r: im2col(r, (2, 3), strides=(1, 2), pads=(1, 0, 1, 2), dilations=(2, 1)), pixels()),
    "conv, same upper": ((4, 3, 8, 9), POINT, 'y = Conv <auto_pad="SAME_UPPER", strides=[2,1]> (r, w)',
                         {"w1": (10, 3, 1, 1), "w": (4, 10, 3, 2)}, lambda r: im2col(r, (3, 2), strides=(2, 1), pads=(0, 0, 1, 1)),
                         pixels()),
    "conv, same lower": ((4, 3, 8, 9), POINT, 'y = Conv <auto_pad="SAME_LOWER", strides=[2,1]> (r, w)',
                         {"w1": (10, 3, 1, 1), "w": (4, 10, 3, 2)}, lambda r: im2col(r, (3, 2), strides=(2, 1), pads=(1, 1, 0, 0)),
                         pixels()),
    "conv, valid": ((4, 3, 8, 9), POINT, 'y = Conv <auto_pad="VALID"> (r, w)', {"w1": (10, 3, 1, 1), "w": (4, 10, 2, 2)},
                    lambda r: im2col(r, (2, 2)), pixels()),
    "conv, one space axis": ((8, 3, 1, 20), "v = Squeeze(x, two) h = Conv(v, w1) r = Relu(h)", "y = Conv <pads=[1,1]> (r, w, b)",
                             {"two": ints(2), "w1": (10, 3, 1), "w": (4, 10, 3), "b": (4,)}, lambda r: im2col(r, (3,), pads=(1, 1)),
                             pixels()),
    "conv, three space axes": ((4, 3, 5, 4, 6), POINT, "y = Conv <strides=[1,2,1]> (r, w)",
                               {"w1": (8, 3, 1, 1, 1), "w": (4, 8, 2, 2, 1)}, lambda r: im2col(r, (2, 2, 1), strides=(1, 2, 1)), pixels()),
    "conv, grouped": ((4, 3, 8, 8), POINT, "y = Conv <group=2, pads=[1,1,1,1]> (r, w, b)",
                      {"w1": (12, 3, 1, 1), "w": (6, 6, 3, 3), "b": (6,)}, lambda r: im2col(r, (3, 3), pads=(1, 1, 1, 1), groups=2),
                      pixels(2)),
    "conv transpose": ((4, 3, 6, 5), POINT, "y = ConvTranspose <strides=[2,3], pads=[1,0,0,1], output_padding=[1,2]> (r, w, b)",
                       {"w1": (10, 3, 1, 1), "w": (10, 4, 3, 4), "b": (4,)},
                       lambda r: im2col_transposed(r, (3, 4), (2, 3), (1, 0, 0, 1), (1, 2)), pixels()),
    "conv transpose, grouped": ((4, 3, 6, 5), POINT, "y = ConvTranspose <strides=[2,2], group=2> (r, w)",
                                {"w1": (12, 3, 1, 1), "w": (12, 2, 3, 2)},
                                lambda r: im2col_transposed(r, (3, 2), (2, 2), (0, 0, 0, 0), (0, 0), groups=2), pixels(2)),
    "gemm": ((200, 6), TOKEN, "y = Gemm <alpha=0.5, beta=2.0, transB=1> (r, w, b)", {"w1": (6, 12), "w": (4, 12), "b": (4,)}, flat, flat),
    "gemm, no bias": ((200, 6), TOKEN, "y = Gemm <alpha=0.5, beta=2.0> (r, w)", {"w1": (6, 12), "w": (12, 4)}, flat, flat),
    "gemm, addition behind": ((200, 6), TOKEN, "g = Gemm <alpha=0.5> (r, w) y = Add(g, b)", {"w1": (6, 12), "w": (12, 4), "b": (4,)},
                              flat, flat),
    "gemm, data transposed": ((200, 6), TOKEN + " t = Transpose(r)", "y = Gemm <transA=1> (t, w, b)",
                              {"w1": (6, 12), "w": (12, 4), "b": (4,)}, flat, flat),
    "gemm, weight left": ((200, 6), TOKEN, "y = Gemm <transB=1> (w, r)", {"w1": (6, 12), "w": (4, 12)}, flat, left),
    "matmul": ((8, 25, 6), TOKEN, "y = MatMul(r, w)", {"w1": (6, 12), "w": (12, 4)}, flat, flat),
    "matmul, bias behind": ((8, 25, 6), TOKEN, "m = MatMul(r, w) y = Add(b, m)", {"w1": (6, 12), "w": (12, 4), "b": (4,)}, flat, flat),
    "matmul, weight left": ((8, 25, 6), TOKEN + " t = Transpose <perm=[0,2,1]> (r)", "y = MatMul(w, t)", {"w1": (6, 12), "w": (4, 12)},
                            flat, left),
    "matmul, parts": ((8, 3, 25, 6), "h = MatMul(x, w1) r = Relu(h)", "y = MatMul(r, w)", {"w1": (6, 12), "w": (3, 12, 4)},
                      lambda r: r.transpose(1, 0, 2, 3).reshape(3, -1, 12), lambda y: y.transpose(1, 0, 2, 3).reshape(3, -1, 4)),
    "einsum": ((8, 25, 6), TOKEN, 'y = Einsum <equation="bti,oi->bot"> (r, w)', {"w1": (6, 12), "w": (4, 12)}, flat, left),
    "einsum, heads summed": ((8, 25, 6), 'h = Einsum <equation="bti,ihd->bhtd"> (x, w1) r = Relu(h)',
                             'y = Einsum <equation="bhtd,hdo->bto"> (r, w)', {"w1": (6, 4, 3), "w": (4, 3, 5)},
                             lambda r: r.transpose(0, 2, 1, 3).reshape(1, -1, 12), flat),
    "fused matmul": ((8, 25, 6), TOKEN, "y = com.microsoft.FusedMatMul <transB=1, alpha=2.0> (r, w)", {"w1": (6, 12), "w": (4, 12)},
                     flat, flat),
    "weight transposed": ((8, 25, 6), TOKEN, "t = Transpose(w) y = MatMul(r, t)", {"w1": (6, 12), "w": (4, 12)}, flat, flat),
    "weight reshaped": ((8, 25, 6), TOKEN, "t = Reshape(w, s) y = MatMul(r, t)", {"w1": (6, 12), "w": (12, 2, 2), "s": ints(12, 4)},
                        flat, flat),
    "weight sliced": ((8, 25, 6), TOKEN, "t = Slice(w, one, five, one) y = MatMul(r, t)",
                      {"w1": (6, 12), "w": (12, 7), "one": ints(1), "five": ints(5)}, flat, flat),
    "weight split": ((8, 25, 6), TOKEN, "u, t = Split <axis=1> (w, s) y = MatMul(r, t)",
                     {"w1": (6, 12), "w": (12, 7), "s": ints(3, 4)}, flat, flat),
}


def case(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The model, and the part that makes r."""
    shape, before, after, weights, *_ = KINDS[name]
    dims = ",".join(map(str, shape))
    rank = "a,b,c,d,e"
    held = {k: v for k, v in weights.items() if k in before or k == "w1"}
    whole = net(f"float[{dims}] x -> float[{rank[: 2 * rank_of(name) - 1]}] y", f"{before} {after}", **weights)
    until_r = before.replace(" t = Transpose", " u = Transpose")
    return whole, net(f"float[{dims}] x -> float[{rank[: 2 * rank_of(name, True) - 1]}] r", until_r, **held)


def rank_of(name: str, data: bool = False) -> int:
    shape = KINDS[name][0]
    if name == "conv, one space axis":
        return 3
    return 4 if name == "einsum, heads summed" and data else len(shape)


kinds = list(KINDS)


def of_the_layer(groups: spa.Groups) -> np.ndarray:
    """A part of the first group whose removal takes columns of the layer of w."""
    layer = next(x for x in find_layers(groups) if x.place.name == "w")
    for group in groups.free():
        gone = np.zeros(groups.total, bool)
        gone[group.coordinates] = some(group.size)
        if layer.removed(Kept(groups, gone)).any():
            return gone
    raise AssertionError("nothing is free")


def least_squares(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over rows and outputs of what is left of y (rows, outputs) by x (rows, columns) and a constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(ones, y, rcond=None)[0]
    return float(((y - ones @ solution) ** 2).mean())


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("name", kinds)
def test_least_squares(name: str, inputs: str) -> None:
    """No weights and no constant leave a smaller error in the node's output than the repaired ones do."""
    shape, _, _, _, by_hand, canonical = KINDS[name]
    model, before = case(name)
    data = batches(shape)
    found = fixed(model, of_the_layer, data, inputs=inputs, damping=0)
    layer = next(x for x in find_layers(found.groups) if x.place.name == "w")
    lost = layer.removed(Kept(found.groups, found.gone))
    assert lost.any()
    assert (~lost).any(axis=1).all()
    r = np.concatenate([by_hand(o["r"].astype(np.float64)) for o in outputs_of(before, data)], axis=1)
    y = np.concatenate([canonical(o["y"].astype(np.float64)) for o in outputs_of(model, data)], axis=1)
    now = np.concatenate([canonical(o["y"].astype(np.float64)) for o in outputs_of(small_of(found), data)], axis=1)
    for part in range(len(y)):
        best = least_squares(r[part][:, ~lost[part]], y[part])
        assert ((now[part] - y[part]) ** 2).mean() == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert best > 1e-4 * y[part].var()
    (report,) = found.layers
    assert report.removed == lost.sum()
    total = sum(((now[p] - y[p]) ** 2).mean() for p in range(len(y))) / sum(y[p].var(axis=0).mean() for p in range(len(y)))
    assert report.after == pytest.approx(total, rel=1e-3)
    assert not found.skipped


@pytest.mark.parametrize("name", kinds)
def test_errors_fall_on_data_that_were_not_fitted(name: str) -> None:
    model, _ = case(name)
    shape = KINDS[name][0]
    data, held_out = batches(shape), batches(shape, seed=7)
    none, bias, affine, obspa = (
        error(fixed(model, of_the_layer, data, method=m, damping=1e-4), model, held_out) for m in ("none", "bias", "affine", "obspa")
    )
    assert none > bias > affine > obspa




@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("name", ["conv", "conv, grouped", "matmul, bias behind"])
def test_scales_are_least_squares_too(name: str, inputs: str) -> None:
    """One factor a channel and part, and a constant an output: no others leave less."""
    model, before = case(name)
    shape, _, _, _, by_hand, canonical = KINDS[name]
    data = batches(shape)
    found = fixed(model, of_the_layer, data, method="affine", inputs=inputs, damping=0)
    layer = next(x for x in find_layers(found.groups) if x.place.name == "w")
    lost = layer.removed(Kept(found.groups, found.gone))
    r = np.concatenate([by_hand(o["r"].astype(np.float64)) for o in outputs_of(before, data)], axis=1)
    w = layer.weight.canonical(weights_of(model)["w"]).astype(np.float64)
    left_over = []
    for part in range(layer.parts):
        x = r[part] - r[part].mean(axis=0)
        channels = layer.channels[part]
        terms = [x[:, channels == c] @ w[part][:, channels == c].T for c in np.unique(channels[~lost[part]])]
        matrix, y = np.stack([t.ravel() for t in terms], axis=1), (x @ w[part].T).ravel()
        left_over.append(((y - matrix @ np.linalg.lstsq(matrix, y, rcond=None)[0]) ** 2).mean())
    pairs = zip(outputs_of(model, data), outputs_of(small_of(found), data), strict=True)
    off = np.concatenate([canonical(a["y"].astype(np.float64) - b["y"]) for a, b in pairs], axis=1)
    np.testing.assert_allclose((off**2).mean(axis=(1, 2)), left_over, rtol=1e-5)


def test_least_squares_of_what_is_not_an_output() -> None:
    """The gates of recurrent layers and the packed query, key and value, from the weights: nothing outside shows them."""
    cases = {
        "LSTM": (TOKEN + " o, y = LSTM <hidden_size=3> (r, w, u, b)", {"w": (1, 12, 10), "u": (1, 12, 3), "b": (1, 24)}),
        "LSTM, no bias": (TOKEN + " o, y = LSTM <hidden_size=3> (r, w, u)", {"w": (1, 12, 10), "u": (1, 12, 3)}),
        "LSTM, both ways": (TOKEN + ' o, y = LSTM <hidden_size=3, direction="bidirectional"> (r, w, u, b)',
                            {"w": (2, 12, 10), "u": (2, 12, 3), "b": (2, 24)}),
        "GRU": (TOKEN + " o, y = GRU <hidden_size=3> (r, w, u, b)", {"w": (1, 9, 10), "u": (1, 9, 3), "b": (1, 18)}),
        "RNN": (TOKEN + " o, y = RNN <hidden_size=3> (r, w, u, b)", {"w": (1, 3, 10), "u": (1, 3, 3), "b": (1, 6)}),
        "Attention": (TOKEN + " y = com.microsoft.Attention <num_heads=2> (r, w, b)", {"w": (10, 18), "b": (18,)}),
        "Attention, no bias": (TOKEN + " y = com.microsoft.Attention <num_heads=2> (r, w)", {"w": (10, 18)}),
    }
    data = batches((30, 8, 6))
    before = net("float[30,8,6] x -> float[30,8,10] r", TOKEN, w1=(6, 10))
    r = np.concatenate([o["r"].reshape(-1, 10) for o in outputs_of(before, data)]).astype(np.float64)
    for name, (body, weights) in cases.items():
        model = net("float[30,8,6] x -> float[a,b,c] y", body, w1=(6, 10), **weights)
        for inputs in ("dense", "pruned"):
            found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
            old, shift = linear_part(spa.analyze(model).groups)
            new, moved = linear_part(found.groups, found.model)
            layer = next(x for x in find_layers(found.groups) if x.place.name == "w")
            lost = layer.removed(Kept(found.groups, found.gone))[0]
            y = r @ old.T + shift
            left_over = float(((r[:, ~lost] @ new[:, ~lost].T + moved - y) ** 2).mean())
            assert left_over == pytest.approx(least_squares(r[:, ~lost], y), rel=1e-6), (name, inputs)
            kept = {n: v for n, v in weights_of(found.model).items() if n in ("u", "w1")}
            assert all((v == weights_of(model)[n]).all() for n, v in kept.items())
            small_of(found)
            assert error(found, model, data) < error(fixed(model, of_the_layer, data, method="none"), model, data)


def linear_part(groups: spa.Groups, model: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(outputs, columns) and (outputs,): weight and constant of the layer of w."""
    held = {n: np.asarray(t.values, np.float64) for n, t in groups.traced.constants.items()}
    held |= {} if model is None else {n: v.astype(np.float64) for n, v in weights_of(model).items()}
    layer = next(x for x in find_layers(groups) if x.place.name == "w")
    offset = Offsets(groups).of(layer)
    weight = layer.weight.canonical(layer.place.read(held["w"], layer.weight_shape))[0]
    if not isinstance(offset, Offset):
        return weight, np.zeros(layer.outputs)
    return weight, offset.layout.canonical(offset.place.read(held[offset.place.name], offset.shape))[0].ravel()


# ------------------------------------------------------------------------------------------------ whole networks

def norm(name: str, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(sum(map(ord, name)))
    return {f"{name}s": 1 + 0.2 * rng.standard_normal(width), f"{name}b": 0.2 * rng.standard_normal(width),
            f"{name}m": 0.3 * rng.standard_normal(width), f"{name}v": 1 + rng.random(width)}


def network(name: str) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    if name == "residual":
        body = """a = Conv <pads=[1,1,1,1]> (x, w1) n = BatchNormalization(a, ns, nb, nm, nv) r = Relu(n)
          c = Conv <pads=[1,1,1,1]> (r, w2) o = BatchNormalization(c, os, ob, om, ov) q = Relu(o)
          d = Conv <pads=[1,1,1,1]> (q, w3) p = BatchNormalization(d, ps, pb, pm, pv) z = Add(r, p) t = Relu(z)
          e = GlobalAveragePool(t) f = Flatten(e) y = Gemm <transB=1> (f, w4, b4)"""
        parts = {**norm("n", 12), **norm("o", 10), **norm("p", 12)}
        parts = {k: v.astype(np.float32) for k, v in parts.items()}
        return net("float[n,3,8,8] x -> float[n,5] y", body, w1=(12, 3, 3, 3), w2=(10, 12, 3, 3), w3=(12, 10, 3, 3), w4=(5, 12), b4=(5,),
                   **parts), (40, 3, 8, 8)
    if name == "mlp":
        body = "a = Gemm <transB=1> (x, w1, b1) r = Relu(a) c = MatMul(r, w2) d = Add(c, b2) s = Gelu(d) y = MatMul(s, w3)"
        body = body.replace("Gelu(d)", "Sigmoid(d)")
        return net("float[n,8] x -> float[n,5] y", body, w1=(16, 8), b1=(16,), w2=(16, 14), b2=(14,), w3=(14, 5)), (250, 8)
    if name == "transformer":
        body = """l = LayerNormalization(x, ls, lb)
          q0 = MatMul(l, wq) q1 = Add(q0, bq) q2 = Reshape(q1, s) q = Transpose <perm=[0,2,1,3]> (q2)
          k0 = MatMul(l, wk) k2 = Reshape(k0, s) k = Transpose <perm=[0,2,3,1]> (k2)
          v0 = MatMul(l, wv) v2 = Reshape(v0, s) v = Transpose <perm=[0,2,1,3]> (v2)
          a = MatMul(q, k) m = Softmax(a) o = MatMul(m, v) o1 = Transpose <perm=[0,2,1,3]> (o) o2 = Reshape(o1, f)
          p = MatMul(o2, wo) p1 = Add(p, bo) z = Add(x, p1) g = LayerNormalization(z, gs, gb)
          h = MatMul(g, w1) h1 = Add(h, b1) h2 = Relu(h1) u = MatMul(h2, w2) y = Add(z, u)"""
        ones, zeros = np.ones(12, np.float32), np.zeros(12, np.float32)
        return net("float[n,9,12] x -> float[n,9,12] y", body, wq=(12, 24), bq=(24,), wk=(12, 24), wv=(12, 24), wo=(24, 12), bo=(12,),
                   w1=(12, 20), b1=(20,), w2=(20, 12), ls=ones, lb=zeros, gs=ones, gb=zeros, s=ints(0, 0, 6, 4),
                   f=ints(0, 0, 24)), (30, 9, 12)
    if name == "separable":
        body = """a = Conv(x, w1, b1) r = Relu(a) d = Conv <group=12, pads=[1,1,1,1]> (r, w2) n = BatchNormalization(d, ns, nb, nm, nv)
          q = Relu(n) c = Conv(q, w3) o = Relu(c) e = Conv <group=10, pads=[1,1,1,1]> (o, w4) t = Relu(e) y = Conv(t, w5)"""
        parts = {k: v.astype(np.float32) for k, v in norm("n", 12).items()}
        return net("float[n,3,7,7] x -> float[n,4,7,7] y", body, w1=(12, 3, 1, 1), b1=(12,), w2=(12, 1, 3, 3), w3=(10, 12, 1, 1),
                   w4=(10, 1, 3, 3), w5=(4, 10, 1, 1), **parts), (16, 3, 7, 7)
    if name == "grouped":
        body = "a = Conv(x, w1) r = Relu(a) d = Conv <group=4, pads=[1,1,1,1]> (r, w2, b2) q = Relu(d) y = Conv(q, w3, b3)"
        return net("float[n,3,7,7] x -> float[n,4,7,7] y", body, w1=(16, 3, 1, 1), w2=(16, 4, 3, 3), b2=(16,), w3=(4, 16, 1, 1),
                   b3=(4,)), (16, 3, 7, 7)
    if name == "flatten":
        body = "a = Conv <pads=[1,1,1,1]> (x, w1, b1) r = Relu(a) m = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r) f = Flatten(m)"
        body += " h = Gemm <transB=1> (f, w2, b2) s = Relu(h) y = Gemm <transB=1> (s, w3)"
        return net("float[n,3,6,6] x -> float[n,5] y", body, w1=(8, 3, 3, 3), b1=(8,), w2=(12, 72), b2=(12,), w3=(5, 12)), (200, 3, 6, 6)
    assert name == "decoder"
    body = """a = Conv <strides=[2,2], pads=[1,1,1,1]> (x, w1) r = Relu(a) c = ConvTranspose <strides=[2,2], pads=[1,1,1,1]> (r, w2, b2)
      q = Relu(c) d = ConvTranspose <strides=[2,2]> (q, w3) n = BatchNormalization(d, ns, nb, nm, nv) t = Relu(n) y = Conv(t, w4)"""
    parts = {k: v.astype(np.float32) for k, v in norm("n", 8).items()}
    return net("float[n,3,8,8] x -> float[n,3,16,16] y", body, w1=(12, 3, 3, 3), w2=(12, 10, 4, 4), b2=(10,), w3=(10, 8, 2, 2),
               w4=(3, 8, 1, 1), **parts), (12, 3, 8, 8)


NETWORKS = ("residual", "mlp", "transformer", "separable", "grouped", "flatten", "decoder")


def heads_and_channels(groups: spa.Groups) -> np.ndarray:
    """A third of every group; of the positions inside attention heads none, so that heads go as blocks."""
    return gone_where(groups, lambda g: g.size != 4 or not any(v in ("wq", "wv") for v, _ in g.sites), 0.34)


trials = [
    (n, i)
    for n in NETWORKS for i in ("dense", "pruned")
]  # fmt: skip


@pytest.mark.parametrize("name, inputs", trials)
def test_networks_on_data_that_were_not_fitted(name: str, inputs: str) -> None:
    model, shape = network(name)
    data, held_out = batches(shape), batches(shape, seed=7, count=3)
    none, bias, affine, obspa = (
        error(fixed(model, heads_and_channels, data, method=m, inputs=inputs, damping=1e-3), model, held_out)
        for m in ("none", "bias", "affine", "obspa")
    )
    assert none > bias > obspa
    assert affine > obspa
    if inputs == "pruned":  # else each layer is fitted for inputs that it will not get, and little differences may turn round
        assert bias > affine


def test_fitting_to_what_layers_get_beats_fitting_each_alone() -> None:
    for name in ("residual", "mlp", "transformer", "separable", "flatten", "decoder"):
        model, shape = network(name)
        data, held_out = batches(shape), batches(shape, seed=7, count=3)
        alone, together = (error(fixed(model, heads_and_channels, data, inputs=i), model, held_out) for i in ("dense", "pruned"))
        assert together < alone, name


def test_heads_go_as_blocks() -> None:
    model, shape = network("transformer")
    found = fixed(model, heads_and_channels, batches(shape))
    layer = next(x for x in find_layers(found.groups) if x.place.name == "wo")
    lost = layer.removed(Kept(found.groups, found.gone))[0].reshape(6, 4)
    assert lost.any(axis=1).sum() == lost.all(axis=1).sum() == 2
    assert {r.name.split("/")[0]: r.removed for r in found.layers} == {"p": 8, "u": 7}


# ------------------------------------------------------------------------------------------------ what is left alone

def nothing(groups: spa.Groups) -> np.ndarray:
    return np.zeros(groups.total, bool)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_removing_nothing_changes_nothing(name: str, inputs: str) -> None:
    model, shape = network(name)
    found = fixed(model, nothing, batches(shape, 2), inputs=inputs)
    assert (found.layers, found.changed, found.norms) == ((), frozenset(), 0)
    assert to_bytes(found.model) == to_bytes(spa.analyze(model).normal.model)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "grouped"])
def test_what_may_change_and_what_may_not(name: str, inputs: str) -> None:
    """Weights that lose columns, their constants, norms behind; names, types, shapes and the given model never."""
    model, shape = network(name)
    analysis = spa.analyze(model)
    given = to_bytes(analysis.normal.model)
    gone = heads_and_channels(analysis.groups)
    kept_gone = gone.copy()
    data = batches(shape)
    copies = [{k: v.copy() for k, v in b.items()} for b in data]
    found = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(inputs=inputs))
    assert to_bytes(analysis.normal.model) == given
    assert (gone == kept_gone).all()
    assert all((a["x"] == b["x"]).all() for a, b in zip(data, copies, strict=True))
    old, new = weights_of(analysis.normal.model), weights_of(found.model)
    may = {
        "residual": {"w2", "w3", "w4", "b4", "om", "ov", "pm", "pv"} | {"nm", "nv"},
        "mlp": {"w2", "b2", "w3"},
        "transformer": {"wo", "bo", "w2"},
        "separable": {"w3", "w5", "nm", "nv"},
        "flatten": {"w2", "b2", "w3"},
        "decoder": {"w2", "b2", "w3", "w4", "nm", "nv"},
    }[name]
    changed = {n for n in old if old[n].tobytes() != new[n].tobytes()}
    assert changed <= may
    assert {n for n in may if n.startswith(("w", "b"))} <= changed
    assert changed <= found.changed
    added = {n: v.shape for n, v in new.items() if n not in old}
    assert added == {"mlp": {"y/bias": (5,)}, "transformer": {"u/bias": (12,)}, "separable": {"c/bias": (10,), "y/bias": (4,)},
                     "flatten": {"y/bias": (5,)}, "decoder": {"y/bias": (3,)}}.get(name, {})
    assert all(old[n].shape == new[n].shape and old[n].dtype == new[n].dtype for n in old)
    again = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(inputs=inputs))
    assert to_bytes(again.model) == to_bytes(found.model)
    onnx.checker.check_model(to_proto(found.model), full_check=True)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_half_precision_is_fitted_in_full_and_rounded_once(kind: str, inputs: str) -> None:
    number = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[kind]
    half = onnx.helper.tensor_dtype_to_np_dtype(number)
    rng = np.random.default_rng(0)
    weights = {n: (rng.standard_normal(s) / 3).astype(half) for n, s in {"w1": (6, 12), "w": (12, 4), "b": (4,)}.items()}
    body = f"{TOKEN} m = MatMul(r, w) y = Add(m, b)"
    narrow = net(f"{kind}[200,6] x -> {kind}[200,4] y", body, **weights)
    wide = net("float[200,6] x -> float[200,4] y", body, **{n: v.astype(np.float32) for n, v in weights.items()})
    data = [{"x": b["x"].astype(half)} for b in batches((200, 6))]
    wider = [{"x": b["x"].astype(np.float32)} for b in data]
    found = weights_of(fixed(narrow, of_the_layer, data, inputs=inputs).model)
    expected = weights_of(fixed(wide, of_the_layer, wider, inputs=inputs).model)
    for name in ("w", "b", "w1"):
        assert found[name].dtype == half
        np.testing.assert_array_equal(found[name].view(np.uint16), expected[name].astype(half).view(np.uint16))
    assert (found["w"] != weights["w"]).any()


def test_a_weight_that_is_read_twice_gets_the_joint_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["spa.normalize"], "SHARED", 0)
    body = "h = MatMul(x, w1) r = Relu(h) k = MatMul(x, w2) q = Sigmoid(k) a = MatMul(r, w) b = MatMul(q, w) y = Concat <axis=1> (a, b)"
    model = net("float[200,6] x -> float[200,8] y", body, w1=(6, 12), w2=(6, 12), w=(12, 4))
    data = batches((200, 6))
    values = net("float[200,6] x -> float[200,12] r, float[200,12] q", body.split(" a =")[0], w1=(6, 12), w2=(6, 12))
    for inputs in ("dense", "pruned"):
        found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
        layers = [x for x in find_layers(found.groups) if x.place.name == "w"]
        assert len(layers) == 2
        assert sum(t.name == "w" for t in to_proto(found.model).graph.initializer) == 1
        lost = layers[0].removed(Kept(found.groups, found.gone))[0]
        seen = [np.concatenate([o[n] for o in outputs_of(values, data)]).astype(np.float64) for n in "rq"]
        w = weights_of(model)["w"].astype(np.float64)
        centred = np.concatenate([v - v.mean(axis=0) for v in seen])
        best = np.linalg.lstsq(centred[:, ~lost], centred @ w, rcond=None)[0]
        np.testing.assert_allclose(weights_of(found.model)["w"][~lost], best, atol=1e-5)
        left_over = ((centred @ w - centred[:, ~lost] @ best) ** 2).mean()
        assert error(found, model, data) == pytest.approx(left_over, rel=1e-5)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_bias_that_others_read_stays(monkeypatch: pytest.MonkeyPatch, inputs: str) -> None:
    monkeypatch.setattr(sys.modules["spa.normalize"], "SHARED", 0)
    body = "h = MatMul(x, w1) r = Relu(h) m = MatMul(r, w) a = Add(m, b) n = MatMul(x, w3) e = Add(n, b) y = Concat <axis=1> (a, e)"
    model = net("float[200,6] x -> float[200,8] y", body, w1=(6, 12), w=(12, 4), w3=(6, 4), b=(4,))
    data = batches((200, 6))
    found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
    old, new = weights_of(model), weights_of(found.model)
    assert (new["b"] == old["b"]).all()
    assert set(new) - set(old) == {"m/bias"}
    small = outputs_of(small_of(found), data)
    for dense, pruned in zip(outputs_of(model, data), small, strict=True):
        np.testing.assert_array_equal(dense["y"][:, 4:], pruned["y"][:, 4:])
    assert error(found, model, data) < error(fixed(model, of_the_layer, data, damping=0, method="none"), model, data) / 3


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_channel_that_is_there_twice_goes_at_no_cost(inputs: str) -> None:
    rng = np.random.default_rng(0)
    w1, b1 = rng.standard_normal((8, 3, 1, 1)).astype(np.float32), np.zeros(8, np.float32)
    w1[6] = w1[1]
    body = "a = Conv(x, w1, b1) r = Relu(a) y = Conv <pads=[1,1,1,1]> (r, w2)"
    model = net("float[n,3,7,7] x -> float[n,4,7,7] y", body, w1=w1, b1=b1, w2=(4, 8, 3, 3))

    def sixth(groups: spa.Groups) -> np.ndarray:
        gone = np.zeros(groups.total, bool)
        gone[groups.by_name["w1:0"].start + 6] = True
        return gone

    data, held_out = batches((16, 3, 7, 7)), batches((16, 3, 7, 7), seed=7)
    found = fixed(model, sixth, data, damping=0, inputs=inputs)
    dense = np.concatenate([o["y"] for o in outputs_of(model, held_out)])
    assert error(found, model, held_out) < 1e-9 * dense.var()
    assert error(fixed(model, sixth, data, method="bias"), model, held_out) > 1e-3 * dense.var()
    old, new = weights_of(model)["w2"], weights_of(found.model)["w2"]
    np.testing.assert_allclose(new[:, 1], old[:, 1] + old[:, 6], atol=2e-3)




@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_what_cannot_be_repaired_is_said(inputs: str) -> None:
    body = "h = MatMul(x, w1) r = Relu(h) v = Mul(w, f) a = MatMul(r, v) b = MatMul(r, w3) y = Add(a, b)"
    model = net("float[200,6] x -> float[200,4] y", body, w1=(6, 12), w=(12, 4), f=(1, 4), w3=(12, 4))
    found = fixed(model, lambda g: gone_where(g), batches((200, 6)), inputs=inputs)
    assert [x.name.split("/")[0] for x in found.layers] == ["b"]
    assert (weights_of(found.model)["w"] == weights_of(model)["w"]).all()
    assert dict(found.skipped) == {"a": "its weights are computed from others in a way that can't be inverted"}




@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_parts_of_one_stored_weight(inputs: str) -> None:
    """Query, key and value in one tensor that is split before the products: each is a layer of its own."""
    body = TOKEN + " w2, w3 = Split <axis=1> (w, s) a = MatMul(r, w2) b = MatMul(r, w3) y = Concat <axis=1> (a, b)"
    model = net("float[200,6] x -> float[200,9] y", body, w1=(6, 12), w=(12, 9), s=ints(4, 5))
    data = batches((200, 6))
    found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
    whole = net("float[200,6] x -> float[200,9] y", TOKEN + " y = MatMul(r, w)", w1=(6, 12), w=weights_of(model)["w"])
    same = fixed(whole, of_the_layer, data, damping=0, inputs=inputs)
    assert error(found, model, data) == pytest.approx(error(same, whole, data), rel=1e-5)


def test_new_biases_where_groups_are_factors() -> None:
    body = "a = Conv(x, w1) r = Relu(a) d = Conv <group=4, pads=[1,1,1,1]> (r, w2) q = Relu(d) y = Conv(q, w3)"
    model = net("float[n,3,7,7] x -> float[n,4,7,7] y", body, w1=(16, 3, 1, 1), w2=(16, 4, 3, 3), w3=(4, 16, 1, 1))
    found = fixed(model, lambda g: gone_where(g, part=0.25), batches((16, 3, 7, 7)), inputs="dense")
    assert len(found.layers) == 2


def test_options_are_checked() -> None:
    for wrong, words in (({"method": "best"}, "--repair is 'best'; the choice is: none, bias, affine, obspa"),
                         ({"inputs": "wet"}, "--repair-inputs is 'wet'"), ({"target": "moon"}, "--repair-target is 'moon'"),
                         ({"damping": -1.0}, "--damping is -1.0, but must be 0 or more"), ({"damping": float("nan")}, "--damping is nan")):
        with pytest.raises(BadOption, match=words):
            RepairOptions(**wrong)
    model, _ = network("mlp")
    with pytest.raises(BadOption, match="fewer than two rows"):
        fixed(model, heads_and_channels, [{"x": np.ones((1, 8), np.float32)}], inputs="dense")


# ------------------------------------------------------------------------------------------------ norms, and noise

def moments_before(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Output of each norm -> mean and variance of what it reads in a model."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    read = {n.input[0]: n.output[0] for n in proto.graph.node if n.op_type == "BatchNormalization"}
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in read)
    found = outputs_of(proto, feeds)
    return {out: channel_moments([o[value] for o in found]) for value, out in read.items()}


def stored_moments(groups: spa.Groups, model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for node in stored_norms(groups):
        mean, variance = (values(model.graph, node.node.inputs[i].name) for i in node.signature.moments)
        found[node.node.outputs[0].name] = mean, variance
    return found




def with_own_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        if node.op_type == "Conv" and len(node.input) == 2:
            node.input.append(f"{node.input[1]}_bias")
            width = next(t.dims[0] for t in model.graph.initializer if t.name == node.input[1])
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(width, np.float32), node.input[2]))
    return model


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("method", ["bias", "obspa"])
@pytest.mark.parametrize("biases", [True, False])
def test_norms_see_what_they_saw(method: str, inputs: str, biases: bool) -> None:
    """Where stored moments are those of the data in the dense network, they are those of the data in the pruned one after repair."""
    model, shape = network("residual")
    model = with_own_biases(model) if biases else model
    analysis, data = spa.analyze(model), batches(shape)
    exact = to_proto(adapted(analysis.normal.model, analysis.groups, data))
    analysis = spa.analyze(exact)
    for name, (mean, variance) in moments_before(exact, data).items():
        held = stored_moments(analysis.groups, analysis.normal.model)[name]
        np.testing.assert_allclose(held[0], mean, atol=1e-5)
        np.testing.assert_allclose(held[1], variance, rtol=1e-4)
    gone = gone_where(analysis.groups, part=0.34)
    found = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(method=method, inputs=inputs, norms=True))
    small = to_proto(small_of(found))
    assert found.norms == 3
    seen, held = moments_before(small, data), stored_moments(spa.analyze(small).groups, spa.load(small))
    for name in seen:
        np.testing.assert_allclose(held[name][0], seen[name][0], atol=2e-4)
        np.testing.assert_allclose(held[name][1], seen[name][1], rtol=2e-3)
    if method == "bias" and inputs == "dense":  # without, scales are wrong
        off = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(method=method, inputs=inputs, norms=False))
        assert off.norms == 0
        assert error(found, exact, data) < error(off, exact, data)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_noise_moves_no_norm_that_pruning_did_not(inputs: str) -> None:
    """Statistics of noise are far from the stored ones; only what changed from the dense to the pruned network counts."""
    model, shape = network("residual")
    analysis = spa.analyze(model)
    noise = [{"x": 5 + 3 * np.random.default_rng(i).standard_normal(shape).astype(np.float32)} for i in range(3)]
    middle = next(g for g in analysis.groups.free() if g.name == "w2:0")
    gone = np.zeros(analysis.groups.total, bool)
    gone[middle.coordinates] = some(middle.size)
    found = repair(analysis.normal.model, analysis.groups, gone, noise, RepairOptions(inputs=inputs, norms=True))
    old, new = weights_of(model), weights_of(found.model)
    for name in ("nm", "nv", "ns", "nb", "w1", "w2", "w4", "b4"):
        assert old[name].tobytes() == new[name].tobytes()
    np.testing.assert_allclose(new["om"], old["om"], atol=1e-4)  # loses channels, but those that stay are what they were
    np.testing.assert_allclose(new["ov"], old["ov"], rtol=1e-4)
    assert np.abs(new["pv"] - old["pv"]).max() > 1e-2
    assert np.abs(new["pm"] - old["pm"]).max() < 50 * old["pv"].max()


def test_a_repair_of_the_adapted_model_is_carried_over() -> None:
    model, _ = network("residual")
    analysis = spa.analyze(model)
    evidence = gather(analysis.normal.model, analysis.groups, None)
    assert evidence.noise
    assert evidence.samples == sum(len(b["x"]) for b in evidence.batches) > 0
    own, at = weights_of(analysis.normal.model), weights_of(evidence.model)
    assert {n for n in own if own[n].tobytes() != at[n].tobytes()} == {p + q for p in "nop" for q in "mv"}
    gone = gone_where(analysis.groups, part=0.34)
    found = repair(evidence.model, analysis.groups, gone, evidence.batches, RepairOptions(inputs="dense", norms=True))
    carried = transplanted(found.model, evidence.model, analysis.normal.model, found.groups)
    now, fitted = weights_of(carried), weights_of(found.model)
    for name in now:
        if name[0] not in "nop" or name[1] not in "mv":
            assert now[name].tobytes() == fitted[name].tobytes()
        elif name[1] == "m":
            np.testing.assert_allclose(now[name] - own[name], fitted[name] - at[name], atol=1e-4)
        else:
            np.testing.assert_allclose(now[name] / own[name], fitted[name] / at[name], rtol=1e-4)
    assert transplanted(found.model, analysis.normal.model, analysis.normal.model, found.groups) is found.model
    plain, _ = network("mlp")
    other = spa.analyze(plain)
    assert adapted(other.normal.model, other.groups, []) is other.normal.model


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_the_model_that_is_run_is_the_one_that_is_repaired(inputs: str) -> None:
    """Norms' moments are measured and changed in the adapted model, as if that had been traced."""
    model, _ = network("residual")
    analysis = spa.analyze(model)
    evidence = gather(analysis.normal.model, analysis.groups, None)
    found = fixed_of(evidence.model, analysis.groups, evidence.batches, inputs)
    again = spa.analyze(to_proto(evidence.model))
    expected = fixed_of(again.normal.model, again.groups, evidence.batches, inputs)
    for name, array in weights_of(expected.model).items():
        np.testing.assert_allclose(weights_of(found.model)[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def fixed_of(model: spa.store.Model, groups: spa.Groups, data: Sequence[Feeds], inputs: str) -> Repaired:
    return repair(model, groups, gone_where(groups, part=0.34), data, RepairOptions(inputs=inputs, norms=True))


# ------------------------------------------------------------------------------------------------ large layers

@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_layers_that_are_solved_in_blocks(monkeypatch: pytest.MonkeyPatch, inputs: str) -> None:
    model, shape = network("flatten")
    groups = spa.analyze(model).groups
    wide = next(x for x in find_layers(groups) if x.place.name == "w2")
    for largest in (71, 30, 24, 9, 5):
        blocks = parts_of(wide, largest)
        assert max(len(b.columns) for b in blocks) <= largest
        np.testing.assert_array_equal(np.sort(np.concatenate([b.columns for b in blocks])), np.arange(72))
    for block in parts_of(wide, 24):  # all channels at a few places
        assert len(set(wide.channels[0][block.columns])) == 8
    data, held_out = batches(shape), batches(shape, seed=7)
    whole = error(fixed(model, heads_and_channels, data, inputs=inputs), model, held_out)
    for module in ("spa.observe", "spa.mending"):
        monkeypatch.setattr(f"{module}.parts_of", functools.partial(parts_of, largest=24))
    bias, blocks = (error(fixed(model, heads_and_channels, data, method=m, inputs=inputs), model, held_out) for m in ("bias", "obspa"))
    assert whole < blocks < bias


# ------------------------------------------------------------------------------------------------ through the front door

@pytest.mark.parametrize("name", NETWORKS)
def test_repaired_models_are_proven_and_can_be_cut_again(tmp_path: Path, name: str) -> None:
    model, shape = network(name)
    data = np.concatenate([b["x"] for b in batches(shape, 2)])
    options = RepairOptions(inputs="dense") if name == "grouped" else "obspa"
    plan = spa.plan(model, 0.34, multiple_of=1)
    result = spa.apply(model, plan, repair=options, calibration=data)
    assert result.check is not None
    assert result.check.passed
    assert result.repaired is not None
    assert result.repaired.layers
    assert not result.repaired.skipped
    plain = spa.apply(model, plan)
    held_out = batches(shape, seed=7, count=2)

    def off(small: Any) -> float:
        pairs = zip(outputs_of(model, held_out), outputs_of(small, held_out), strict=True)
        return float(np.mean([((a["y"] - b["y"]) ** 2).mean() for a, b in pairs]))

    assert off(result.model) < off(plain.model)
    result.save_repaired(tmp_path / "repaired.onnx", plan=tmp_path / "plan.json")
    again = spa.apply(tmp_path / "repaired.onnx", tmp_path / "plan.json")
    first, second = outputs_of(result.model, held_out), outputs_of(again.model, held_out)
    assert all((a["y"] == b["y"]).all() for a, b in zip(first, second, strict=True))
    a, b = weights_of(result.model), weights_of(again.model)
    assert {n: v.tobytes() for n, v in a.items()} == {n: v.tobytes() for n, v in b.items()}


def test_a_small_bias_that_is_shared_is_not_merged_again() -> None:
    """Readers of one small tensor get copies to be analysed; a repaired one has to stay apart."""
    body = "h = MatMul(x, w1) r = Relu(h) m = MatMul(r, w) a = Add(m, b) n = MatMul(x, w3) e = Add(n, b) y = Concat <axis=1> (a, e)"
    model = net("float[200,6] x -> float[200,8] y", body, w1=(6, 12), w=(12, 4), w3=(6, 4), b=(4,))
    data = batches((200, 6), 1)
    plan = spa.plan(model, 0.4, multiple_of=1)
    result = spa.apply(model, plan, repair=RepairOptions(damping=0), calibration=[b["x"] for b in data])
    dense, small = (np.concatenate([o["y"] for o in outputs_of(m, data)]) for m in (model, result.model))
    np.testing.assert_array_equal(dense[:, 4:], small[:, 4:])
    np.testing.assert_allclose(dense[:, :4].mean(axis=0), small[:, :4].mean(axis=0), atol=1e-4)


def test_repair_wants_data() -> None:
    model, _ = network("mlp")
    plan = spa.plan(model, 0.34, multiple_of=1)
    with pytest.raises(BadOption, match="--repair obspa fits layers to data"):
        spa.apply(model, plan, repair="obspa")
    plain = spa.apply(model, plan)
    with pytest.raises(BadOption, match="Nothing was repaired"):
        plain.save_repaired("nowhere.onnx")


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_tied_weight_stays_as_it_is(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table is embedding and head: fitting the head would change what tokens mean, so only a constant is fitted, and it says so."""
    monkeypatch.setattr(sys.modules["spa.normalize"], "SHARED", 0)
    rng = np.random.default_rng(5)
    table, w = rng.standard_normal((20, 16)).astype(np.float32), rng.standard_normal((16, 16)).astype(np.float32)
    graph = parser.parse_graph("g (int64[n,4] ids) => (float[n,4,20] y) { e = Gather(table, ids) h = MatMul(e, w) r = Relu(h) "
                               "s = Add(e, r) t = Transpose<perm=[1,0]>(table) y = MatMul(s, t) }")
    graph.initializer.extend([numpy_helper.from_array(table, "table"), numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    analysis = spa.analyze(model)
    group = next(g for g in analysis.groups.free() if ("table", 1) in g.sites)
    gone = np.zeros(analysis.groups.total, bool)
    gone[group.start : group.start + 5] = True
    feeds = [{"ids": rng.integers(0, 20, (32, 4))} for _ in range(4)]
    found = repair(analysis.normal.model, analysis.groups, gone, feeds, RepairOptions("obspa", inputs=inputs))
    constants = found.groups.traced.constants
    assert "table" in constants
    stored = next(t for n in found.model.graph.nodes for t in n.inputs if t.name == "table")
    assert np.array_equal(np.asarray(stored.values), table)
    assert any("reads its weight too" in why for why in found.skipped.values())


def test_recurrent_weights_are_only_cut_and_it_is_said() -> None:
    """Hidden units of an LSTM: the state that its recurrent weight reads is not a value of the graph; the layer behind is repaired."""
    rng = np.random.default_rng(6)
    model = net("float[5,n,6] x -> float[5,1,n,3] y",
                "h, last, cell = LSTM <hidden_size=8> (x, w, r, b) y = MatMul(h, o)", w=(1, 32, 6), r=(1, 32, 8), b=(1, 64), o=(8, 3))
    analysis = spa.analyze(model)
    group = next(g for g in analysis.groups.free() if ("o", 0) in g.sites)
    gone = np.zeros(analysis.groups.total, bool)
    gone[group.start : group.start + 3] = True
    feeds = [{"x": rng.standard_normal((5, 16, 6)).astype(np.float32)} for _ in range(4)]
    found = repair(analysis.normal.model, analysis.groups, gone, feeds, RepairOptions("obspa"))
    assert len(found.layers) == 1
    assert [why for why in found.skipped.values() if "hidden state" in why]


def test_depthwise_convolutions_are_not_called_skipped() -> None:
    model = net("float[n,3,6,6] x -> float[n,4,6,6] y",
                "a = Conv(x, w, b) d = Conv <group=6, pads=[1,1,1,1]> (a, k) y = Conv(d, o)",
                w=(6, 3, 1, 1), b=(6,), k=(6, 1, 3, 3), o=(4, 6, 1, 1))
    analysis = spa.analyze(model)
    gone = np.zeros(analysis.groups.total, bool)
    group = next(g for g in analysis.groups.free() if ("k", 0) in g.sites)
    gone[group.start : group.start + 2] = True
    feeds = [{"x": np.random.default_rng(i).standard_normal((8, 3, 6, 6)).astype(np.float32)} for i in range(3)]
    assert not repair(analysis.normal.model, analysis.groups, gone, feeds, RepairOptions("obspa")).skipped


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("method", ["bias", "fold"])
def test_normalisations_over_pruned_channels_give_what_they_gave(op: str, method: str) -> None:
    """Each kept channel behind the normalisation has its old mean and deviation again (LayerNorm), or root mean square (RMSNorm)."""
    rng = np.random.default_rng(8)
    bias = ", nb" if op == "LayerNormalization" else ""
    more = {"nb": (12,)} if bias else {}
    model = net("float[n,5,9] x -> float[n,5,4] y", f"e = MatMul(x, w1) n = {op} <axis=-1> (e, ns{bias}) y = MatMul(n, w2)",
                opset=23, w1=(9, 12), ns=np.full(12, 1.5, np.float32), w2=(12, 4), **more)
    analysis = spa.analyze(model)
    group = next(g for g in analysis.groups.free() if ("w2", 0) in g.sites)
    gone = np.zeros(analysis.groups.total, bool)
    gone[group.start + 2 : group.start + 7] = True
    mix = rng.standard_normal((9, 9))
    feeds = [{"x": (rng.standard_normal((32, 5, 9)) @ mix + 1).astype(np.float32)} for _ in range(4)]

    def behind(options: RepairOptions) -> np.ndarray:
        found = repair(analysis.normal.model, analysis.groups, gone, feeds, options)
        assert found.norms == (1 if options.norms else 0)
        small = with_graph(found.model, rewrite(found.model.graph, found.groups, found.gone))
        part = tapped(small, small.graph, ["x"], ["n"], found.groups.traced.facts.types)
        return np.concatenate([run(part, f)["n"] for f in feeds]).reshape(-1, 7)

    part = tapped(analysis.normal.model, analysis.normal.model.graph, ["x"], ["n"], analysis.groups.traced.facts.types)
    keep = ~gone[group.coordinates]
    dense = np.concatenate([run(part, f)["n"] for f in feeds]).reshape(-1, 12)[:, keep]
    norm, plain = behind(RepairOptions(method)), behind(RepairOptions(method, norms=False))
    if bias:
        assert np.allclose(norm.mean(0), dense.mean(0), atol=1e-4)
        assert np.allclose(norm.std(0), dense.std(0), rtol=1e-4)
        assert not np.allclose(plain.std(0), dense.std(0), rtol=1e-2)
    else:
        assert np.allclose((norm**2).mean(0), (dense**2).mean(0), rtol=1e-4)
        assert not np.allclose((plain**2).mean(0), (dense**2).mean(0), rtol=1e-2)
