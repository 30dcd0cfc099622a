"""Networks, readers and scores that the tests of criteria share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from repair_cases import drawn, im2col, outputs_of, weights_of
from test_trace import ints, net

import spa
from spa.criteria import registry
from spa.criteria.views import Data

Array = np.ndarray
Feeds = dict[str, np.ndarray]
DAMPING = 0.01


@pytest.fixture(autouse=True)
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are looked at, and criteria of tests leave the registry again."""
    monkeypatch.setattr("spa.statistics.observe.ROWS_A_COLUMN", 1e9)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def norm(name: str, size: int) -> dict[str, Array]:
    rng = np.random.default_rng(size)
    parts = {"s": rng.uniform(0.5, 2, size) * rng.choice([-1, 1], size), "b": rng.standard_normal(size), "m": rng.standard_normal(size) / 4,
             "v": rng.uniform(0.5, 2, size)}
    return {name + k: v.astype(np.float32) for k, v in parts.items()}


def conv() -> onnx.ModelProto:
    body = "a = Conv <pads=[1,1,1,1]> (x, w1) n = BatchNormalization(a, ns, nb, nm, nv) r = Relu(n) y = Conv(r, w2)"
    return net("float[n,3,6,6] x -> float[n,4,4,4] y", body, w1=(8, 3, 3, 3), w2=(4, 8, 3, 3), **norm("n", 8))


def mlp(inner: str = "Relu", scale: tuple[float, float] = (1, 1)) -> onnx.ModelProto:
    body = f"h = MatMul(x, w1) a = Add(h, b1) r = {inner}(a) y = MatMul(r, w2) z = MatMul(r, w3)"
    made = net("float[n,6] x -> float[n,5] y, float[n,4] z", body, w1=(6, 10), b1=(10,), w2=(10, 5), w3=(10, 4))
    for tensor in made.graph.initializer:
        factor = scale[tensor.name in ("w2", "w3")]
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    return made


def attention() -> onnx.ModelProto:
    """Four heads of width three."""
    body = """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) qr = Reshape(q, s) kr = Reshape(k, s) vr = Reshape(v, s)
      qt = Transpose <perm=[0,2,1,3]> (qr) kt = Transpose <perm=[0,2,3,1]> (kr) vt = Transpose <perm=[0,2,1,3]> (vr)
      l = MatMul(qt, kt) p = Softmax <axis=-1> (l) c = MatMul(p, vt) ct = Transpose <perm=[0,2,1,3]> (c) h = Reshape(ct, f)
      y = MatMul(h, wo)"""
    return net("float[n,5,6] x -> float[n,5,6] y", body, wq=(6, 12), wk=(6, 12), wv=(6, 12), wo=(12, 6), s=ints(0, 0, 4, 3),
               f=ints(0, 0, 12))


def grouped() -> onnx.ModelProto:
    body = "a = Conv(x, w1) r = Relu(a) d = Conv <group=2, pads=[1,1,1,1]> (r, w2) q = Relu(d) y = Conv(q, w3)"
    return net("float[n,3,6,6] x -> float[n,4,6,6] y", body, w1=(8, 3, 1, 1), w2=(6, 4, 3, 3), w3=(4, 6, 1, 1))


@dataclass
class Reader:
    """A layer that reads a group. x (parts, rows, columns), w (parts, outputs, columns), of (parts, columns); spread: (places, columns)
    of what the data hold, wherever it is, for statistics of single channels.
    """

    x: Array
    w: Array
    of: Array
    spread: Array

    @property
    def size(self) -> int:
        return int(self.of.max()) + 1

    def sum(self, columns: Array) -> Array:
        found = np.zeros(self.size)
        np.add.at(found, self.of.ravel(), np.broadcast_to(columns, self.of.shape).ravel())
        return found

    def mean(self, columns: Array) -> Array:
        return self.sum(columns) / self.sum(np.ones(self.of.shape))

    def statistic(self, function: Callable[[Array], Array]) -> Array:
        """(parts, columns) a statistic of each column's channel."""
        return function(self.spread).reshape(self.of.shape)


@dataclass
class Case:
    model: onnx.ModelProto
    group: str
    shape: tuple[int, ...]
    values: tuple[str, ...]
    read: Callable[[dict[str, Array], dict[str, Array]], list[Reader]]

    def feeds(self, cuts: Sequence[int] = (12, 12)) -> list[Feeds]:
        x = drawn((sum(cuts), *self.shape), 5)
        ends = np.cumsum(cuts)
        return [{"x": x[e - c : e]} for c, e in zip(cuts, ends, strict=True)]

    def readers(self) -> list[Reader]:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model)
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(v) for v in self.values)
        found = outputs_of(proto, self.feeds())
        data = {v: np.concatenate([o[v] for o in found]).astype(np.float64) for v in self.values}
        return self.read(data, {n: v.astype(np.float64) for n, v in weights_of(self.model).items()})


def dense(x: Array, w: Array, of: Array) -> Reader:
    flat = x.reshape(-1, x.shape[-1])
    return Reader(flat[None], w.T[None], of[None], flat)


def pixels(x: Array) -> Array:
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


CASES = {
    "conv": lambda: Case(conv(), "w1:0", (3, 6, 6), ("r",), lambda d, w: [
        Reader(im2col(d["r"], [3, 3]), w["w2"].reshape(1, 4, 72), np.repeat(np.arange(8), 9)[None], np.repeat(pixels(d["r"]), 9, axis=1))]),
    "mlp": lambda: Case(mlp(), "w1:1", (6,), ("r",), lambda d, w: [
        dense(d["r"], w["w2"], np.arange(10)), dense(d["r"], w["w3"], np.arange(10))]),
    "heads": lambda: Case(attention(), "wq:1#2", (5, 6), ("h",), lambda d, w: [dense(d["h"], w["wo"], np.repeat(np.arange(4), 3))]),
    "head width": lambda: Case(attention(), "wv:1", (5, 6), ("h",), lambda d, w: [dense(d["h"], w["wo"], np.tile(np.arange(3), 4))]),
    "grouped": lambda: Case(grouped(), "w1:0#2", (3, 6, 6), ("r",), lambda d, w: [
        Reader(im2col(d["r"], [3, 3], pads=[1] * 4, groups=2), w["w2"].reshape(2, 3, 36), np.tile(np.repeat(np.arange(4), 9), (2, 1)),
               np.repeat(pixels(d["r"]), 9, axis=1))]),
    "behind grouped": lambda: Case(grouped(), "w2:0", (3, 6, 6), ("q",), lambda d, w: [
        dense(pixels(d["q"]), w["w3"].reshape(4, 6).T, np.tile(np.arange(3), 2))]),
}  # fmt: skip


def scored(case: Case, criterion: str, feeds: list[Feeds] | None = None, **options: Any) -> Array:
    analysis = spa.analyze(case.model)
    data = Data(analysis.normal.model, case.feeds() if feeds is None else feeds, options.pop("loss", "auto"))
    found = spa.score(analysis.normal.model.graph, analysis.groups, criterion, data=data, **options)
    return found.values[analysis.groups.by_name[case.group].coordinates]
