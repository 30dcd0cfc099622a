"""Binding: a number for every size that a model's inputs leave free.

Axes of the same name get the same size, and a name that is a sum ("past + length") that of its parts. Where a model carries a state
(`spa.graph.state`), the mask is as long as the past and the new tokens together, whatever its axis is called: which input brings the new
ones is seen from how much the state grows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import onnx_graphsurgeon as gs

from spa.graph.state import Pair, state_pairs
from spa.graph.view import Shape, dtype_is_float

Place = tuple[str, int]  # (input, axis)
Key: TypeAlias = str | Place  # the name of a free size, or its place where it has none

_SUM = re.compile(r"\s*\w+(\s*\+\s*\w+)+\s*")
_PROBE = 17  # the first of the sizes that tell the axes of a probe apart


@dataclass(frozen=True)
class Binding:
    """Numbers for the free sizes of a graph's inputs; calling it gives the shape of every input whose rank is known.

    given: shapes that are not to be taken from the graph. totals: sizes that are the sum of those at two places.
    """

    graph: gs.Graph
    given: Mapping[str, Sequence[Any]]
    totals: Mapping[Key, tuple[Place, Place]] = field(default_factory=dict)

    def __call__(self, batch: int, space: int, length: int) -> dict[str, Shape]:
        """Sizes of axis 0, of pictures' sides, and of all other free axes."""
        feeds = self._bound(batch, space, length, {})
        sums = {total: feeds[a[0]][a[1]] + feeds[b[0]][b[1]] for total, (a, b) in self.totals.items()}
        return self._bound(batch, space, length, sums) if sums else feeds

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Inputs and outputs that may be a state."""
        return state_pairs(self.graph)

    @property
    def has_state(self) -> bool:
        """Whether there is a state, and a size beside it that may be the sum of others."""
        return bool(self.pairs) and len(self._lengths) > 1

    def probe(self) -> dict[str, Shape]:
        """Shapes in which every free length is another."""
        return self._bound(2, _PROBE - 1, _PROBE - 1, {key: _PROBE + 2 * i for i, key in enumerate(self._lengths)})

    def with_totals(self, shapes: Mapping[str, Shape | None], *, floats: bool) -> Binding:
        """The binding in which masks cover the past and what is new.

        shapes: of all values under `probe`. floats: take inputs of floats for masks too, not only those of whole numbers and booleans.
        """
        masks = [key for key in self._lengths if floats or key not in self._floats]
        for name, output in self.pairs:
            before, after = shapes.get(name) or (), shapes.get(output) or ()
            grown = [(a, n - m) for a, (m, n) in enumerate(zip(before, after, strict=False)) if n > m]
            for key, place in self._lengths.items():
                if len(before) == len(after) and len(grown) == 1 and (shapes[place[0]] or ())[place[1]] == grown[0][1]:
                    past = (name, grown[0][0])
                    return replace(self, totals={total: (past, place) for total in masks if total != key})
        return self

    @cached_property
    def _lengths(self) -> dict[Key, Place]:
        """Free sizes behind axis 0 that no state has, with the first place of each."""
        found: dict[Key, Place] = {}
        other = set()
        carried = {name for name, _ in self.pairs}
        for tensor, axis, key in self._free():
            if tensor.name in carried:
                other.add(key)
            elif axis:
                found.setdefault(key, (tensor.name, axis))
        return {key: place for key, place in found.items() if key not in other}

    @cached_property
    def _floats(self) -> set[Key]:
        return {key for tensor, _, key in self._free() if dtype_is_float(tensor.dtype)}

    def _free(self) -> Iterator[tuple[gs.Tensor, int, Key]]:
        for tensor in self.graph.inputs:
            for axis, size in enumerate(self.given.get(tensor.name, tensor.shape) or ()):
                if not isinstance(size, int) or size <= 0:
                    yield tensor, axis, size if isinstance(size, str) and size else (tensor.name, axis)

    def _bound(self, batch: int, space: int, length: int, known: Mapping[Key, int]) -> dict[str, Shape]:
        sizes = dict(known)
        carried = {name for name, _ in self.pairs}
        free = list(self._free())
        for tensor, axis, key in free:
            if not (isinstance(key, str) and _SUM.fullmatch(key)):
                rank = len(self.given.get(tensor.name, tensor.shape))
                picture = rank >= 4 and dtype_is_float(tensor.dtype) and tensor.name not in carried
                sizes.setdefault(key, batch if axis == 0 else space if picture else length)
        for _, _, key in free:
            if key not in sizes:
                sizes[key] = self._sum(str(key), sizes) or length
        keys = {(tensor.name, axis): sizes[key] for tensor, axis, key in free}
        shapes = {t.name: self.given.get(t.name, t.shape) for t in self.graph.inputs}
        return {n: tuple(keys.get((n, a), s) for a, s in enumerate(shape)) for n, shape in shapes.items() if shape is not None}

    @staticmethod
    def _sum(text: str, sizes: Mapping[Key, int]) -> int:
        """The value of a sum of names and numbers, 0 if a name is not known."""
        parts = [int(p) if p.isdigit() else sizes.get(p, 0) for p in re.split(r"\s*\+\s*", text.strip())]
        return sum(parts) if all(parts) else 0
