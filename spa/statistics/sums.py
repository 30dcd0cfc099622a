"""Sums of powers of weights along their axes, which criteria on magnitudes are made of: every stored tensor is read once, in blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import Weight
from spa.errors import BadModel
from spa.graph.groups import Groups
from spa.graph.trace import constant_values
from spa.graph.view import dtype_holds_weights
from spa.statistics.acting import Gain, gains

BLOCK = 1 << 19  # elements that are summed up at a time: what is made of them stays in the processor's cache


class Sums:
    """Sums of powers by coordinate over all weights, made when first asked for."""

    def __init__(self, graph: gs.Graph, groups: Groups) -> None:
        self.graph, self.groups = graph, groups
        self.made: dict[float, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self.places: dict[tuple[float, str, int], tuple[bool, NDArray[np.float64]]] = {}  # (p, tensor, axis) -> matrix?, sums

    def of(self, p: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(total,) sums over matrices, and over vectors (one number a channel: biases, norms' scales)."""
        if p not in self.made:
            matrices, vectors = np.zeros(self.groups.total + 1), np.zeros(self.groups.total + 1)
            free = np.zeros(self.groups.total + 1, bool)
            for group in self.groups.free():
                free[group.start + 1 : group.start + 1 + group.size] = True
            known = gains(self.groups)
            for name, tensor in constant_values(self.graph).items():
                if dtype_holds_weights(tensor.dtype):
                    self._add(name, tensor, p, free, matrices, vectors, known.get(name))
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
        gain: Gain | None,
    ) -> None:
        shape = tuple(tensor.shape)
        axes = [a for a in range(len(shape)) if (name, a) in self.groups.labels and free[self.groups.labels[name, a]].any()]
        if not axes:
            return
        for axis, sums in _powers(tensor, axes, p, gain).items():
            if not np.isfinite(sums).all():
                raise BadModel(f"Tensor {name!r} holds NaN or infinity, so its channels can't be scored: repair the model first.")
            matrix = int(np.prod(shape)) > shape[axis]
            self.places[p, name, axis] = matrix, sums
            into = matrices if matrix else vectors
            labels = self.groups.labels[name, axis]
            for column in labels.T:
                np.add.at(into, column, sums)


def _powers(tensor: gs.Constant, axes: Sequence[int], p: float, gain: Gain | None) -> dict[int, NDArray[np.float64]]:
    """(length of axis,) sum of |g w|^p over all other axes, for each of `axes`; the tensor is read once, in blocks of rows."""
    weight = tensor._values if isinstance(tensor._values, Weight) else Weight.of_array(tensor.values)
    sums = {axis: np.zeros(tensor.shape[axis]) for axis in axes}
    step = max(1, BLOCK // max(math.prod(tensor.shape[1:]), 1))
    for start, found in zip(itertools.count(0, step), weight.rows(step), strict=False):
        if gain is not None:
            factors = gain.along(found.ndim).astype(np.float32)
            found = _magnitudes(found) * (factors if gain.axis else factors[start : start + step])
        block = _raised(found, p)
        for axis in axes:
            part = _along(block, axis)
            if axis:
                sums[axis] += part
            else:
                sums[0][start : start + step] = part
    return sums


def _magnitudes(block: NDArray[Any]) -> NDArray[np.floating]:
    """The block up to signs, in float32 or float64.

    Half precision by its bits, several times faster than numpy's conversion: exponent and fraction are moved to where float32 has
    them, and the product with 2^112 corrects the exponent's bias, subnormal numbers included.
    """
    if block.dtype in (np.float32, np.float64):
        return block
    if block.dtype != np.float16:
        return np.asarray(block.astype(np.float32))
    half = np.ascontiguousarray(block).view(np.uint16) & np.uint16(0x7FFF)
    bits = half.astype(np.uint32)
    bits <<= 13
    found = bits.view(np.float32)
    found *= np.float32(2.0**112)
    if half.size and half.max() >= 0x7C00:  # the exponent that float16 keeps for infinity and NaN
        found[half >= 0x7C00] = np.inf
    return found


def _raised(block: NDArray[Any], p: float) -> NDArray[np.floating]:
    """|w|^p, in float32 or float64."""
    found = _magnitudes(block)
    if p == 2:
        return np.asarray(np.multiply(found, found, out=None if found is block else found))
    return np.asarray(np.abs(found) if p == 1 else np.abs(found) ** p)


def _along(block: NDArray[np.floating], axis: int) -> NDArray[np.float64]:
    """(length of axis,) sums over all other axes."""
    cube = block.reshape(math.prod(block.shape[:axis]), block.shape[axis], -1)
    if cube.shape[2] == 1:  # numpy adds up rows, and what lies side by side, several times faster than anything in between
        return np.asarray(cube[:, :, 0].sum(axis=0), np.float64)
    return np.asarray(cube[0].sum(axis=1) if len(cube) == 1 else np.einsum("aib->i", cube), np.float64)
