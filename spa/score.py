"""Scoring: criteria over the groups' weights. Each stored tensor is read once and leaves nothing behind but sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import Weight
from spa import criteria
from spa.errors import BadModel
from spa.groups import Group, Groups
from spa.trace import constant_values
from spa.view import dtype_is_float

BLOCK = 4 << 20  # elements that are scored at a time, which bounds memory


@dataclass(frozen=True)
class Scores:
    """(total,) score of each coordinate; NaN for groups that were not scored."""

    criterion: str
    values: NDArray[np.float64]


def score(graph: gs.Graph, groups: Groups, criterion: str = "l2", *, seed: int = 0, only: Iterable[Group] | None = None) -> Scores:
    """Scores the coordinates of the free groups (or of `only`). Raises BadModel for weights that hold NaN."""
    function = criteria.get(criterion)
    chosen = list(groups.free() if only is None else only)
    sums = _Sums(graph, groups)
    values = np.full(groups.total, np.nan)
    for group in chosen:
        view = _View(group.size, np.random.default_rng([seed, group.index]), group, sums)
        found = np.asarray(function(view), np.float64)
        if found.shape != (group.size,):
            raise BadModel(f"Criterion {criterion!r} gave {found.shape} scores for {group.size} coordinates of {group.name}.")
        values[group.coordinates] = found
    return Scores(criterion, values)


class _Sums:
    """Sums of powers by coordinate over all weights, made when first asked for."""

    def __init__(self, graph: gs.Graph, groups: Groups) -> None:
        self.graph, self.groups = graph, groups
        self.made: dict[float, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def of(self, p: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(total,) sums over matrices, and over vectors (one number a channel: biases, norms' scales)."""
        if p not in self.made:
            matrices, vectors = np.zeros(self.groups.total + 1), np.zeros(self.groups.total + 1)
            free = np.zeros(self.groups.total + 1, bool)
            for group in self.groups.free():
                free[group.start + 1 : group.start + 1 + group.size] = True
            for name, tensor in constant_values(self.graph).items():
                if dtype_is_float(tensor.dtype):
                    self._add(name, tensor, p, free, matrices, vectors)
            self.made[p] = matrices[1:], vectors[1:]
        return self.made[p]

    def _add(
        self,
        name: str,
        tensor: gs.Constant,
        p: float,
        free: NDArray[np.bool_],
        matrices: NDArray[np.float64],
        vectors: NDArray[np.float64],
    ) -> None:
        shape = tuple(tensor.shape)
        axes = [a for a in range(len(shape)) if (name, a) in self.groups.labels and free[self.groups.labels[name, a]].any()]
        if not axes:
            return
        for axis, sums in _powers(tensor, axes, p).items():
            if not np.isfinite(sums).all():
                raise BadModel(f"Tensor {name!r} holds NaN or infinity, so its channels can't be scored: repair the model first.")
            into = matrices if int(np.prod(shape)) > shape[axis] else vectors
            labels = self.groups.labels[name, axis]
            for column in labels.T:
                np.add.at(into, column, sums)


def _powers(tensor: gs.Constant, axes: Sequence[int], p: float) -> dict[int, NDArray[np.float64]]:
    """(length of axis,) sum of |w|^p over all other axes, for each of `axes`; the tensor is read once, in blocks of rows."""
    weight = tensor._values if isinstance(tensor._values, Weight) else Weight.of_array(tensor.values)
    sums = {axis: np.zeros(tensor.shape[axis]) for axis in axes}
    step = max(1, BLOCK // max(math.prod(tensor.shape[1:]), 1))
    for start, rows in zip(itertools.count(0, step), weight.rows(step), strict=False):
        block = _magnitudes(rows)
        for axis in axes:
            found = _along(block, axis, p)
            if axis:
                sums[axis] += found
            else:
                sums[0][start : start + step] = found
    return sums


def _magnitudes(block: NDArray[Any]) -> NDArray[np.floating]:
    """The block up to signs, in float32 or float64.

    Half precision by its bits, ten times faster than numpy's conversion: exponent and fraction are moved to where float32 has
    them, and the product with 2^112 corrects the exponent's bias, subnormal numbers included.
    """
    if block.dtype in (np.float32, np.float64):
        return block
    if block.dtype != np.float16:
        return np.asarray(block.astype(np.float32))
    bits = np.ascontiguousarray(block).view(np.uint16).astype(np.uint32)
    bits &= 0x7FFF
    bits <<= 13
    found = bits.view(np.float32)
    found *= np.float32(2.0**112)
    if found.size and found.max() >= 65536:  # the exponent that float16 keeps for infinity and NaN
        found[found >= 65536] = np.inf
    return found


def _along(block: NDArray[np.floating], axis: int, p: float) -> NDArray[np.float64]:
    cube = block.reshape(int(np.prod(block.shape[:axis])), block.shape[axis], -1)
    if p == 2:
        return np.asarray(np.einsum("aib,aib->i", cube, cube), np.float64)
    return np.asarray((np.abs(cube) ** p if p != 1 else np.abs(cube)).sum(axis=(0, 2)), np.float64)


@dataclass
class _View:
    size: int
    rng: np.random.Generator
    group: Group
    sums: _Sums = field(repr=False)

    def powers(self, p: float) -> NDArray[np.float64]:
        """See `spa.criteria.GroupView`."""
        matrices, vectors = self.sums.of(p)
        found = matrices[self.group.coordinates]
        return found if found.any() else vectors[self.group.coordinates]
