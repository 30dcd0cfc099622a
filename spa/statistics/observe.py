"""Statistics of the data that linear maps read: streamed from ONNX Runtime, in float32 products added up in float64.

Memory is the matrices of some layers (up to a limit, or one layer's) plus a batch, whatever the size of the data: layers that do not fit
together are observed in further passes. Of maps that slide a kernel, rows are drawn: as many as keep the products about as
costly as running the layer, and enough to determine the matrix.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption, UnsupportedModel
from spa.graph.groups import Groups
from spa.graph.linear import Layer
from spa.proof.check import session
from spa.proof.feeds import Feeds
from spa.proof.pieces import in_pieces, is_large
from spa.proof.widen import widen
from spa.repairs.solve import Moments
from spa.statistics.rows import row_count, rows
from spa.statistics.stepper import tapped
from spa.storage.store import Model
from spa.timing.share import room

Array = NDArray[np.float64]

LARGEST = 6144  # columns of one system; what has more is solved in blocks
MEMORY = 2 << 30  # bytes of matrices that are gathered in one pass
ROWS_A_COLUMN = 20  # at least, where the data have them
OUTLIER = 30.0  # times the energy that nine of ten rows stay below; what has more counts as if it had this


@dataclass(frozen=True)
class Part:
    """One system of a layer: its part (of a grouped convolution, of experts) and the columns that it solves for."""

    part: int
    columns: NDArray[np.int64]


def parts_of(layer: Layer, largest: int = LARGEST) -> list[Part]:
    """The systems of a layer. One a part; above `largest` columns a part is cut into blocks that hold few positions of all channels.

    After a Flatten a channel is many columns, and the other channels at the same place tell most about it: blocks go by place.
    """
    every = np.arange(layer.columns)
    if layer.columns <= largest:
        return [Part(p, every) for p in range(layer.parts)]
    found = []
    for part in range(layer.parts):
        place = _occurrence(layer, part)
        order = np.lexsort((every, place))
        blocks = math.ceil(layer.columns / largest)
        cuts = np.searchsorted(place[order], np.linspace(0, place.max() + 1, blocks + 1)[1:-1])
        chunks = [c for c in np.split(order, cuts) if len(c)]
        if any(len(c) > largest for c in chunks):
            chunks = np.array_split(order, blocks)
        found += [Part(part, np.sort(c)) for c in chunks]
    return found


def _occurrence(layer: Layer, part: int) -> NDArray[np.int64]:
    """(columns,) how many columns of the same channel come before each."""
    channel = layer.channels[part]
    order = np.argsort(channel, kind="stable")
    starts = np.flatnonzero(np.diff(channel[order], prepend=-2))
    number = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    found = np.empty(len(order), np.int64)
    found[order] = number
    return found


def draw_rows(layer: Layer, shape: Sequence[int], batch: int, samples_left: float, seed: int) -> NDArray[np.int64] | None:
    """Rows of one batch that are looked at, ascending; None for all. The same for the same layer, batch and seed."""
    total = row_count(layer, shape)
    wanted = math.ceil(max(ROWS_A_COLUMN * layer.columns * samples_left, total * layer.outputs / layer.columns, 64))
    if wanted >= total:
        return None
    rng = np.random.default_rng([seed, batch, zlib.crc32(layer.name.encode())])
    return np.sort(rng.choice(total, wanted, replace=False))


class Gram:
    """Adds up rows (r, d), and targets (r, m) if there are any, into means and covariances.

    Products are taken in float32 of rows less the first batch's mean, so that little cancels when the mean is taken off. Language models
    have tokens, often the first, whose activations are thousands of times those of all others (attention sinks): in a sum of squares
    they would be all that counts. Such rows weigh less (`OUTLIER`).
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.shift: NDArray[Any] | None = None
        self.other: NDArray[Any] | None = None
        self.sum: Array
        self.square: Array
        self.cross: Array
        self.target_sum: Array
        self.target_square = 0.0

    def add(self, x: NDArray[Any], y: NDArray[Any] | None = None) -> None:
        """Takes in rows."""
        if self.shift is None:
            self.shift = x.mean(axis=0, dtype=np.float64).astype(x.dtype)
            self.sum, self.square = np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
            if y is not None:
                self.other = y.mean(axis=0, dtype=np.float64).astype(y.dtype)
                self.cross, self.target_sum = np.zeros((y.shape[1], x.shape[1])), np.zeros(y.shape[1])
        weights = _weights(x if y is None else y)
        x = x - self.shift
        heavy = x if weights is None else x * weights
        self.count += len(x) if weights is None else float(weights.sum(dtype=np.float64))
        self.sum += heavy.sum(axis=0, dtype=np.float64)
        self.square += heavy.T @ x
        if y is not None:
            assert self.other is not None
            y = y - self.other
            self.cross += y.T @ heavy
            y_heavy = y if weights is None else y * weights
            self.target_sum += y_heavy.sum(axis=0, dtype=np.float64)
            self.target_square += float(np.einsum("ij,ij->", y_heavy, y, dtype=np.float64))

    def moments(self) -> Moments:
        """Mean and covariance of the rows."""
        if self.shift is None or self.count < 2:
            raise BadOption("The calibration data give a layer fewer than two rows: give more samples.")
        mean = self.sum / self.count
        return Moments(self.count, mean + self.shift, self.square / self.count - np.outer(mean, mean))

    def target(self) -> tuple[Array, Array, float]:
        """Covariance (m, d) of targets and rows, mean of the targets, their total variance."""
        assert self.other is not None
        mean, other = self.sum / self.count, self.target_sum / self.count
        variance = self.target_square / self.count - float(other @ other)
        return self.cross / self.count - np.outer(other, mean), other + self.other, max(variance, 0.0)


def _weights(rows_: NDArray[Any]) -> NDArray[Any] | None:
    """(r, 1) weights below one for rows of outlying energy; None if there are none."""
    energy = np.einsum("ij,ij->i", rows_, rows_)
    limit = OUTLIER * float(np.quantile(energy, 0.9)) if len(energy) else 0.0
    if not limit or not energy.max() > limit:
        return None
    return np.asarray(np.minimum(1, limit / np.maximum(energy, limit))[:, None], rows_.dtype)


@dataclass
class Vectors:
    """Per position of an axis of a value: mean, mean square, mean magnitude and share of zeros of its elements; mean norm of its samples.

    norm: the mean over samples of the Euclidean norm over all that a sample has at the position; `samples` counts them.
    """

    count: float = 0.0
    mean: Array = field(default_factory=lambda: np.zeros(0))
    square: Array = field(default_factory=lambda: np.zeros(0))
    magnitude: Array = field(default_factory=lambda: np.zeros(0))
    zeros: Array = field(default_factory=lambda: np.zeros(0))
    norm: Array = field(default_factory=lambda: np.zeros(0))
    samples: float = 0.0

    def add(self, data: NDArray[Any], axis: int, samples: int = 1) -> None:
        """Takes in a batch of so many samples, the outer factor of axis 0; one where they do not divide it, or are what is asked about."""
        cube = data.reshape(math.prod(data.shape[:axis]), data.shape[axis], -1)
        if not self.count:
            self.mean, self.square, self.magnitude, self.zeros, self.norm = (np.zeros(cube.shape[1]) for _ in range(5))
        parts = samples if axis and samples and data.shape[0] % samples == 0 else 1
        squares = np.einsum("naib,naib->ni", *(cube.reshape(parts, -1, *cube.shape[1:]),) * 2, dtype=np.float64)
        self.samples += parts
        self.norm += (np.sqrt(squares).mean(axis=0) - self.norm) * (parts / self.samples)
        old, new = self.count, float(cube.shape[0] * cube.shape[2])
        self.count += new
        for total, found in (
            (self.mean, cube.mean(axis=(0, 2), dtype=np.float64)),
            (self.square, squares.sum(axis=0) / max(new, 1)),
            (self.magnitude, np.abs(cube).mean(axis=(0, 2), dtype=np.float64)),
            (self.zeros, 1 - np.count_nonzero(cube > 0, axis=(0, 2)) / max(new, 1)),
        ):
            total += (found - total) * (new / max(old + new, 1))

    @property
    def variance(self) -> Array:
        """(length,) variance."""
        return np.maximum(self.square - self.mean**2, 0)


Add = Callable[[int, Mapping[str, NDArray[Any]]], None]


def stream(model: Model, types: Mapping[str, int], batches: Iterable[Feeds], values: Sequence[str], add: Add) -> int:
    """Runs a model over batches and hands `values` of each to `add(number, values)`. Returns how many batches there were.

    A model that is too large to run as a whole runs in pieces: `add` is then called for each with the values that it makes, batch by batch.
    Raises UnsupportedModel in the runtime's words.
    """
    if is_large(model):
        held = list(batches)
        for made in in_pieces(model, types, held, list(dict.fromkeys(values))) if held else ():
            for number, found in enumerate(made):
                add(number, found)
        return len(held)
    names = [t.name for t in model.graph.inputs]
    opened = None
    number = 0
    for number, batch in enumerate(batches, start=1):
        if opened is None:
            wide, _ = widen(model, {})
            wanted = list(dict.fromkeys(v for v in values if v not in names))
            part = tapped(wide, wide.graph, names, wanted, types if wide is model else _widened(types))
            opened = session(part) if wanted else None
            inputs = [i.name for i in opened.get_inputs()] if opened is not None else []
        try:
            results = opened.run(wanted, {n: _wide(batch[n]) for n in inputs}) if opened is not None else []
        except Exception as error:  # onnxruntime raises classes of its own for each status
            words = str(error).splitlines()[0]
            raise UnsupportedModel(f"ONNX Runtime does not run the model on the calibration data: {words}") from error
        add(number - 1, {**{n: _wide(batch[n]) for n in values if n in names}, **dict(zip(wanted, results, strict=True))})
    return number


def _wide(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float32) if value.dtype.name in ("float16", "bfloat16") else value


def _widened(types: Mapping[str, int]) -> dict[str, int]:
    return {n: 1 if t in (10, 16) else t for n, t in types.items()}


def passes_of(layers: Sequence[Layer], memory: int | None = None) -> Iterator[list[Layer]]:
    """Layers that are observed in one pass: those that read the same rows together, others as long as their matrices fit."""
    by_key: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        by_key.setdefault(layer.key, []).append(layer)
    chunk: list[Layer] = []
    used, most = 0, room(MEMORY) if memory is None else memory
    for same in by_key.values():
        size = sum(8 * len(p.columns) ** 2 for p in parts_of(same[0]))
        if chunk and used + size > most:
            yield chunk
            chunk, used = [], 0
        chunk += same
        used += size
    if chunk:
        yield chunk


def observe(
    model: Model, groups: Groups, layers: Sequence[Layer], batches: Iterable[Feeds], *, count: int, seed: int = 0, memory: int | None = None
) -> Iterator[tuple[Layer, list[tuple[Part, Moments]]]]:
    """Moments of what each layer reads in the dense model, layer by layer; one pass over the data for each memory-full of matrices.

    `count` is the number of batches. Layers that read the same rows get the same moments.
    """
    types = groups.traced.facts.types
    for chunk in passes_of(layers, memory):
        first: dict[tuple[object, ...], Layer] = {}
        for layer in chunk:
            first.setdefault(layer.key, layer)
        grams = {key: [(p, Gram()) for p in parts_of(layer)] for key, layer in first.items()}

        def add(number: int, values: Mapping[str, NDArray[Any]], first=first, grams=grams) -> None:  # type: ignore[no-untyped-def]
            for key, layer in first.items():
                if layer.data not in values:
                    continue
                data = values[layer.data]
                found = rows(layer, data, draw_rows(layer, data.shape, number, 1 / max(count, 1), seed))
                for part, gram in grams[key]:
                    x = found[part.part]
                    gram.add(x if len(part.columns) == x.shape[1] else x[:, part.columns])

        stream(model, types, batches, [layer.data for layer in first.values()], add)
        found = {key: [(p, g.moments()) for p, g in made] for key, made in grams.items()}
        grams.clear()
        for layer in chunk:
            yield layer, found[layer.key]
