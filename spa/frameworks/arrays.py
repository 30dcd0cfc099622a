"""A framework's arrays among the tensors of a file: which one each is, how its axes lie there, what a plan leaves of it.

Exporters rename, transpose, reshape and reorder weights, give equal ones one name, and multiply normalisations into the layer before.
So arrays are found by what they hold; names decide only between tensors that hold the same:

    layout    the file's tensor is the array with its axes in another order (a Linear's weight, a Keras kernel)
    index     it holds the same elements in another arrangement (gates of an LSTM in another order), or among others
    scale     each row of the array was multiplied by a number of its own (a BatchNormalization folded into a Conv)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Removed = Mapping[str, Mapping[str, Sequence[int]]]  # as in a plan: tensor -> axis -> positions
MOST_AXES = 5  # of which all orders are tried
MOST_PARTS = 64  # vectors that stand in one tensor
PROPORTIONAL = 1e-4  # of a row's norm, that a folded scale may be off


@dataclass(frozen=True)
class Found:
    """An array in the file. tensor: its name there, whole: its shape there.

    axes: axis of the tensor for each axis of the array, -1 for axes of size one; None where `index` (of the array's shape, into the
    flattened tensor) says where each element is. scale: by which the array was multiplied along its axis `rows`, None if it was not.
    """

    tensor: str
    whole: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    index: NDArray[np.int64] | None = None
    scale: NDArray[np.float64] | None = None
    rows: int = 0

    def keeps(self, shape: Sequence[int], removed: Removed) -> list[NDArray[np.int64]] | None:
        """Positions of each axis of the array that stay; None if what stays is no such block."""
        gone = {int(a): np.asarray(p, np.int64) for a, p in removed.get(self.tensor, {}).items()}
        if self.axes is not None:
            return [np.delete(np.arange(n), gone.get(a, [])) if a >= 0 else np.arange(n) for n, a in zip(shape, self.axes, strict=True)]
        stays = np.ones(self.whole, bool)
        for axis, positions in gone.items():
            stays[(slice(None),) * axis + (positions,)] = False
        assert self.index is not None
        here = stays.reshape(-1)[self.index]
        keeps = [np.flatnonzero(here.any(axis=tuple(b for b in range(here.ndim) if b != a))) for a in range(here.ndim)]
        return keeps if int(here.sum()) == int(np.prod([len(k) for k in keeps])) else None

    def values(self, small: Array, shape: Sequence[int], keeps: Sequence[NDArray[np.int64]], removed: Removed) -> Array:
        """The array that stays, from the pruned file's tensor; rows still multiplied by `scale`."""
        if self.axes is not None:
            order = [a for a in self.axes if a >= 0]
            rest = [a for a in range(small.ndim) if a not in order]
            return np.transpose(small, order + rest).reshape([len(k) for k in keeps])
        wide = np.zeros(self.whole, small.dtype)
        gone = {int(a): p for a, p in removed.get(self.tensor, {}).items()}
        wide[np.ix_(*(np.delete(np.arange(n), gone.get(a, [])) for a, n in enumerate(self.whole)))] = small
        assert self.index is not None
        return np.asarray(wide.reshape(-1)[self.index][np.ix_(*keeps)])


def locate(arrays: Mapping[str, Array], tensors: Mapping[str, Array]) -> dict[str, Found]:
    """Where each array is in a file. arrays: by the framework's names. tensors: the file's, by theirs. What is not there is left out."""
    by_content: dict[tuple[int, bytes], list[str]] = {}
    for name, tensor in tensors.items():
        by_content.setdefault(_content(tensor), []).append(name)
    found: dict[str, Found] = {}
    for name, array in arrays.items():
        same = by_content.get(_content(array), ())
        best = max(same, key=lambda t: (_likeness(name, t), tensors[t].shape == array.shape), default=None)
        if best is not None and (len(same) == 1 or _likeness(name, best) or array.ndim > 1):
            found[name] = _placed(best, array, tensors[best])
    for name, array in arrays.items():
        if name not in found and array.ndim == 1:
            found |= _part(name, array, tensors)
    taken = {f.tensor for f in found.values()}
    rows = {n: t for n, t in tensors.items() if n not in taken and t.ndim > 1 and t.dtype.kind == "f"}
    for name, array in arrays.items():
        if name not in found and array.ndim > 1 and array.dtype.kind == "f":
            found |= _scaled(name, array, rows)
    return found


def _content(array: Array) -> tuple[int, bytes]:
    """Equal for arrays that hold the same elements in any order."""
    flat = np.sort(np.ascontiguousarray(array).reshape(-1).astype(np.float32 if array.dtype.kind == "f" else array.dtype))
    return flat.size, hashlib.sha256((flat + 0).tobytes()).digest()  # -0.0 + 0 is 0.0


def _likeness(name: str, tensor: str) -> int:
    """Trailing parts of two names that are the same: blocks.0.attn.weight and inner.blocks.0.attn.weight share four."""
    one, two = (n.replace("/", ".").split(".") for n in (name, tensor))
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(two), strict=False)))


def _placed(tensor: str, array: Array, there: Array) -> Found:
    axes = layout(array, there)
    if axes is not None:
        return Found(tensor, there.shape, axes)
    index = np.empty(array.size, np.int64)
    index[np.argsort(array, axis=None, kind="stable")] = np.argsort(there, axis=None, kind="stable")
    return Found(tensor, there.shape, None, index.reshape(array.shape))


def layout(array: Array, there: Array) -> tuple[int, ...] | None:
    """Axis of `there` for each axis of `array` if one is the other with axes exchanged, or of size one added; None if it is not."""
    mine = [a for a, n in enumerate(array.shape) if n > 1]
    others = [a for a, n in enumerate(there.shape) if n > 1]
    if len(mine) != len(others) or len(mine) > MOST_AXES:
        return None
    narrow = array.squeeze()
    for order in _orders(len(mine)):
        moved = [others[i] for i in order]
        if [there.shape[a] for a in moved] == list(narrow.shape) and np.array_equal(there.squeeze().transpose(order), narrow):
            axes = [-1] * array.ndim
            for a, b in zip(mine, moved, strict=True):
                axes[a] = b
            return tuple(axes)
    return None


def _orders(rank: int) -> Iterable[tuple[int, ...]]:
    """All orders of axes, the one as they are first."""
    return itertools.permutations(range(rank))


def _part(name: str, array: Array, tensors: Mapping[str, Array]) -> dict[str, Found]:
    """The tensor that holds all elements of a vector among others, if each is there once: biases that stand in one row."""
    wanted = np.unique(array)
    if len(wanted) < max(array.size, 2):
        return {}
    for tensor, there in tensors.items():
        if not array.size < there.size <= MOST_PARTS * array.size or there.dtype.kind != array.dtype.kind:
            continue
        flat = there.reshape(-1).astype(array.dtype)
        order = np.argsort(flat, kind="stable")
        first, last = np.searchsorted(flat[order], array), np.searchsorted(flat[order], array, side="right")
        if (last == first + 1).all():
            return {name: Found(tensor, there.shape, None, order[first])}
    return {}


def _scaled(name: str, array: Array, tensors: Mapping[str, Array]) -> dict[str, Found]:
    """The tensor that is the array with axes exchanged, each position of one axis times a number of its own."""
    mine = np.asarray(array, np.float64)
    for tensor, there in tensors.items():
        if sorted(there.shape) != sorted(array.shape) or there.ndim > MOST_AXES:
            continue
        other = np.asarray(there, np.float64)
        for order in _orders(there.ndim):
            moved = other.transpose(order)
            for rows in range(array.ndim) if moved.shape == array.shape else ():
                scale = _factors(np.moveaxis(mine, rows, 0), np.moveaxis(moved, rows, 0))
                if scale is not None:
                    return {name: Found(tensor, there.shape, tuple(order), scale=scale, rows=rows)}
    return {}


def _factors(mine: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(rows,) what each row of one is multiplied by to give the other; None if it does not."""
    one, two = (a.reshape(len(a), -1) for a in (mine, other))
    scale = (one * two).sum(axis=1) / np.maximum((one**2).sum(axis=1), 1e-300)
    off = np.abs(two - scale[:, None] * one).max(axis=1)
    return scale if (off <= PROPORTIONAL * np.maximum(np.abs(two).max(axis=1), 1e-30)).all() else None
