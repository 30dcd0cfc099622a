"""Layers and networks to repair, data to repair them on, and what is measured on them before and after."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from spa.graph.groups import Kept
from spa.graph.linear import find_layers
from spa.plans.rewrite import rewrite
from spa.repairs.repair import Repaired, RepairOptions, repair
from spa.storage.store import to_proto, with_graph

Feeds = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits on all rows, as the least squares that it is compared with."""
    monkeypatch.setattr("spa.statistics.observe.ROWS_A_COLUMN", 1e9)


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


def gone_where(groups: spa.Groups, wanted: Callable[[spa.graph.groups.Group], bool] = lambda g: True, part: float = 0.4) -> np.ndarray:
    gone = np.zeros(groups.total, bool)
    for group in groups.free():
        if wanted(group):
            gone[group.coordinates] = some(group.size, part)
    return gone


def outputs_of(model: Any, feeds: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
    session = spa.proof.check.session(model if isinstance(model, spa.storage.store.Model) else spa.load(model), threads=1)
    names = [o.name for o in session.get_outputs()]
    return [dict(zip(names, session.run(None, f), strict=True)) for f in feeds]


def small_of(found: Repaired) -> spa.storage.store.Model:
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


def of_the_layer(groups: spa.Groups) -> np.ndarray:
    """A part of the first group whose removal takes columns of the layer of w."""
    layer = next(x for x in find_layers(groups) if x.place.name == "w")
    for group in groups.free():
        gone = np.zeros(groups.total, bool)
        gone[group.coordinates] = some(group.size)
        if layer.removed(Kept(groups, gone)).any():
            return gone
    raise AssertionError("nothing is free")


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
