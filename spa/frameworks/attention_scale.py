"""Code that works out the scale of attention from the width of its heads, 1/√d, gets another one when heads become narrower.

The file keeps the scale that it had, so that the module has to make up for the difference: with d positions of d₀ left, its queries are
multiplied by √(d / d₀), weights and biases alike. Products of queries with keys are found in the graph (`spa.exact.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.exact import attention
from spa.exact.flow import Flow
from spa.exact.products import Side
from spa.frameworks.arrays import Array, Found
from spa.graph.analysis import Analysis
from spa.graph.groups import Kept


@dataclass(frozen=True)
class Narrowed:
    """Heads that lost positions. before, after: their widths. factors: by which the file's tensors would be multiplied, by name."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    factors: Mapping[str, Array]

    def __str__(self) -> str:
        pairs = sorted(set(zip(self.before, self.after, strict=True)))
        return "; ".join(f"heads of {old} positions have {new} now, their scale was {old**-0.5:.7g}" for old, new in pairs)

    def of(self, array: Array, where: Found, keeps: list[NDArray[np.int64]]) -> Array | None:
        """Factors of what is left of one of the module's arrays; None if it stays."""
        factor = self.factors.get(where.tensor)
        if factor is None:
            return None
        whole = where.values(factor, array.shape, [np.arange(n) for n in array.shape], {})
        return np.asarray(whole[np.ix_(*keeps)])


def narrowed_heads(analysis: Analysis, gone: NDArray[np.bool_]) -> Narrowed | None:
    """What a removal makes of the width of heads; None where it leaves them whole."""
    kept = Kept(analysis.groups, gone)
    before: list[int] = []
    after: list[int] = []
    factors: dict[str, Array] = {}
    seen: set[tuple[int, int]] = set()
    for scores in attention.find(Flow(analysis.groups)).scores:
        dims = [scores.product.node.dims[n] for n in scores.product.summed]
        keeps = [kept.dim(a) for a in dims]
        old = math.prod(a.length for a in dims)
        new = math.prod(a.length if k is None else int(np.count_nonzero(k)) for a, k in zip(dims, keeps, strict=True))
        if new == old:
            continue
        before.append(old)
        after.append(new)
        key = id(scores.left.source.layer.node), int(scores.left.heads.min())
        if key not in seen:  # queries that meet several keys
            seen.add(key)
            _multiply(factors, scores.left, (new / old) ** 0.5, analysis)
    originals = {analysis.normal.copies.get(name, name): factor for name, factor in factors.items()}
    return Narrowed(tuple(before), tuple(after), originals) if before else None


def _multiply(factors: dict[str, Array], side: Side, by: float, analysis: Analysis) -> None:
    """Enters a factor for the weights and the bias that make one side of a product."""
    layer, offset = side.source.layer, side.source.offset
    constants = analysis.groups.traced.constants

    def held(name: str) -> Array:
        return factors.setdefault(name, np.ones(tuple(constants[name].shape)))

    along = np.ones(layer.parts * layer.outputs)
    along[np.unique(side.heads)] = by
    stored = held(layer.place.name)
    matrix = np.repeat(along[:, None], layer.columns, axis=1).reshape(layer.parts, layer.outputs, layer.columns)
    own = layer.weight.back(matrix).reshape(layer.weight_shape)
    layer.place.write(stored, layer.place.read(stored, layer.weight_shape) * own)
    if offset is not None:
        offset.add(held(offset.place.name), (along - 1).reshape(layer.parts, layer.outputs) / offset.gain)
