"""What a criterion sees of one layer that reads a group, and how columns and channels of it go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spa.criteria import select
from spa.graph.linear import Layer
from spa.repairs import solve
from spa.statistics.observe import Vectors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerView:
    """See `spa.criteria.LayerView`."""

    size: int
    weight: Array
    of: NDArray[np.int64]
    layer: Layer = field(repr=False)
    damping: float = solve.DAMPING
    vectors: Vectors = field(default_factory=Vectors, repr=False)
    projections: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    usage: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    systems: tuple[select.Layer, ...] = ()

    def per_channel(self, columns: Array) -> Array:
        """See `spa.criteria.LayerView`."""
        spread = np.broadcast_to(columns, self.of.shape)
        there = self.of >= 0
        return np.asarray(np.bincount(self.of[there], weights=spread[there], minlength=self.size), np.float64)


def columns_of(of: NDArray[np.int64], size: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Channels that have columns, with these."""
    order = np.argsort(of, kind="stable")
    cuts = np.searchsorted(of[order], np.arange(size + 1))
    for channel in range(size):
        if cuts[channel] < cuts[channel + 1]:
            yield channel, order[cuts[channel] : cuts[channel + 1]]


def spread(vectors: Vectors, positions: NDArray[np.int64]) -> Vectors:
    """Statistics of positions, for each column."""
    mean, square, magnitude, zeros, norm = (
        a[positions] for a in (vectors.mean, vectors.square, vectors.magnitude, vectors.zeros, vectors.norm)
    )
    return Vectors(vectors.count, mean, square, magnitude, zeros, norm, vectors.samples)
