"""Linear maps: the places of a graph where channels are summed with stored weights, which is where removal can be repaired.

A `Layer` is one such place in canonical form. Whatever the operator, its weight is an array (parts, outputs, columns), its data are rows
(parts, rows, columns), and what it computes of them is rows @ weight.T + bias: `parts` are dims that data, weight and result
share (groups of a convolution, experts), `columns` the summed dims with the kernel's positions, `outputs` what only the weight has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.graph.groups import Groups, Kept
from spa.graph.moved import Place, place_of
from spa.graph.trace import NodeTrace, node_name
from spa.signatures import FIXED, SUM
from spa.signatures.sizes import term_size
from spa.signatures.table import Dim, Linear, One, Operand, Product, Signature, Sum, Term, Window, dims_of, kind_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Axes of an operand taken apart into dims and put into canonical order.

    split: sizes after every axis is split into its dims. order: permutation of those. shape: (parts, …, last).
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def canonical(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """The array as canonical matrices."""
        return array.reshape(self.split).transpose(self.order).reshape(self.shape)

    def back(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """The inverse, still split into dims."""
        split = tuple(self.split[i] for i in self.order)
        return array.reshape(split).transpose(np.argsort(self.order))


@dataclass(frozen=True)
class Layer:
    """One linear map with stored weights.

    node: the node. data: name of its data operand. place: where the weight's elements are stored. parts, outputs, columns: sizes.
    positions: axis of data -> (parts, columns) the position of each column on it. channels: (parts, columns) equal numbers for columns
    that only go together: positions of a kernel, pixels of a flattened map. data_terms, weight_terms: their axes (see `plain`). sizes: of
    the dims.
    """

    node: gs.Node
    name: str
    linear: Linear
    signature: Signature
    data: str
    weight: Layout
    weight_shape: tuple[int, ...]
    place: Place
    parts: int
    outputs: int
    columns: int
    positions: Mapping[int, NDArray[np.int64]]
    channels: NDArray[np.int64]
    data_terms: Operand
    weight_terms: Operand
    sizes: Mapping[str, int]

    @property
    def window(self) -> Window | None:
        """How a kernel slides over the data."""
        return self.linear.window

    @property
    def key(self) -> tuple[object, ...]:
        """Layers of the same key read the same rows."""
        spelled = " ".join(map(str, self.data_terms or ()))
        summed = tuple(sorted(n for t in self.data_terms or () for n in dims_of(t) if self._is_column(n)))
        return self.data, spelled, summed, self.window, self.parts, self.columns

    def _is_column(self, name: str) -> bool:
        return kind_of(self.signature, name) is SUM

    def removed(self, kept: Kept) -> NDArray[np.bool_]:
        """(parts, columns) which columns are gone from under outputs that stay: a part that goes as a whole, as of a depthwise
        convolution, takes its outputs along and loses nothing.
        """
        gone = self._gone(kept)
        return np.asarray(gone & ~gone.all(axis=1, keepdims=True)) if self.parts > 1 else gone

    def parts_gone(self, kept: Kept) -> NDArray[np.bool_]:
        """(parts,) which parts go as a whole; data that have lost channels come without them."""
        return np.asarray(self._gone(kept).all(axis=1) & (self.parts > 1))

    def _gone(self, kept: Kept) -> NDArray[np.bool_]:
        gone = np.zeros((self.parts, self.columns), bool)
        for axis, positions in self.positions.items():
            keep = kept.site((self.data, axis))
            if keep is not None:
                gone |= ~keep[positions]
        return gone

    def coordinates(self, groups: Groups, start: int, stop: int) -> NDArray[np.int64]:
        """(parts, columns) the coordinate among start … stop - 1, counted from start, that each column goes with; -1 for none."""
        found = np.full((self.parts, self.columns), -1, np.int64)
        for axis, positions in self.positions.items():
            labels = groups.labels.get((self.data, axis))
            if labels is None:
                continue
            inside = (labels > start) & (labels <= stop)
            one = np.where(inside.any(axis=1), (labels * inside).max(axis=1, initial=0) - 1 - start, -1)
            found = np.where(one[positions] >= 0, one[positions], found)
        return found

    def rows(self, data: NDArray[np.generic]) -> NDArray[np.generic]:
        """A matrix product's data (no window) as canonical rows (parts, rows, columns)."""
        return data_layout(self, data.shape).canonical(data)


def find_layers(groups: Groups) -> Iterator[Layer]:
    """All linear maps whose weights are stored, in graph order; those whose weights are computed are passed over."""
    traced = groups.traced
    makers = {t.name: n.node for n in traced.nodes for t in n.node.outputs}
    known: dict[str, Place | None] = {}
    for node in traced.nodes:
        if node.signature is None:
            continue
        for linear in node.signature.linear:
            found = _layer(groups, node, linear, makers, known)
            if found is not None:
                yield found
                break


def _layer(groups: Groups, node: NodeTrace, linear: Linear, makers: Mapping[str, gs.Node], known: dict[str, Place | None]) -> Layer | None:
    signature = node.signature
    inputs = node.node.inputs
    assert signature is not None
    if max(linear.data, linear.weight) >= len(inputs):
        return None
    data, weight = inputs[linear.data].name, inputs[linear.weight].name
    x, w = signature.inputs[linear.data], signature.inputs[linear.weight]
    constants = groups.traced.constants
    if x is None or w is None or data in constants or groups.traced.facts.shapes.get(data) is None:
        return None
    if weight not in known:
        known[weight] = place_of(groups.traced, weight, makers)
    place = known[weight]
    if place is None or place_of(groups.traced, data, makers) is not None:
        return None
    sizes = {n: a.length for n, a in node.dims.items()}
    w = plain(w, x, sizes)
    sides = _Sides(signature, x, w, signature.outputs[0] or (), linear.window)
    columns, shared, outputs = sides.columns, sides.shared, sides.outputs
    if not columns or any(n not in sizes for n in (*columns, *shared, *outputs)):
        return None
    layout = layout_of(w, sizes, (shared, outputs, (*columns, *sides.kernel)))
    if layout is None or not any(n in columns for t in x for n in dims_of(t)):
        return None
    parts, count = math.prod(sizes[n] for n in shared), math.prod(sizes[n] for n in columns)
    taps = math.prod(linear.window.kernel) if linear.window else 1
    positions = {}
    for axis, term in enumerate(x):
        names = list(dims_of(term))
        if any(n in columns or n in shared for n in names):
            grid = np.arange(math.prod(sizes[n] for n in names)).reshape([sizes[n] for n in names])
            mine = [n for n in (*shared, *columns) if n in names]
            if set(mine) != set(names):
                return None
            grid = grid.transpose([names.index(n) for n in mine]).reshape([sizes[n] if n in names else 1 for n in (*shared, *columns)])
            whole = np.broadcast_to(grid, [sizes[n] for n in (*shared, *columns)]).reshape(parts, count)
            positions[axis] = np.repeat(whole, taps, axis=1)
    channels = np.zeros((parts, count * taps), np.int64)
    for axis, places in positions.items():
        together = _together(groups.labels.get((data, axis)), (groups.traced.facts.shapes[data] or ())[axis])
        channels = channels * (int(together.max()) + 1) + together[places]
    shape = groups.traced.facts.shapes[weight] or ()
    return Layer(
        node.node, node_name(node.node), linear, signature, data, layout, shape, place, parts,
        math.prod(sizes[n] for n in outputs), count * taps, positions, channels, x, w, sizes,
    )  # fmt: skip


def result_layout(layer: Layer) -> Layout | None:
    """Layout of what a layer gives: (parts, rows, outputs), the outputs in the order of the weight's."""
    terms = layer.signature.outputs[0] or ()
    sides = _Sides(layer.signature, layer.data_terms or (), layer.signature.inputs[layer.linear.weight] or (), terms, layer.window)
    rows = [n for t in terms for n in dims_of(t) if n not in sides.shared and n not in sides.outputs]
    if any(n not in layer.sizes for t in terms for n in dims_of(t)):
        return None
    return layout_of(terms, layer.sizes, (sides.shared, rows, sides.outputs))


def _together(labels: NDArray[np.int64] | None, length: int) -> NDArray[np.int64]:
    """(length,) equal numbers for the positions of an axis that hang on the same coordinates; one each where nothing may go."""
    if labels is None or not labels.shape[1]:
        return np.arange(length)
    alone = ~labels.any(axis=1)
    rows = np.sort(labels, axis=1)
    rows[alone, -1] = -1 - np.flatnonzero(alone)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


class _Sides:
    """Which dims of a linear map are summed, shared by all three sides, of the weight alone, and of the kernel."""

    def __init__(self, signature: Signature, x: Sequence[Term], w: Sequence[Term], y: Sequence[Term], window: Window | None) -> None:
        of = [[n for t in side for n in dims_of(t)] for side in (x, w, y)]
        self.columns = tuple(n for n in of[1] if kind_of(signature, n) is SUM and n in of[0])
        self.kernel = tuple(n for n in of[1] if n.startswith("k.") and kind_of(signature, n) is FIXED) if window else ()
        self.shared = tuple(n for n in of[1] if n in of[0] and n not in self.columns)
        self.outputs = tuple(n for n in of[1] if n not in (*self.columns, *self.kernel, *self.shared))


def plain(terms: Sequence[Term], data: Sequence[Term], sizes: dict[str, int]) -> tuple[Term, ...]:
    """Terms in which every sum of outputs, (q|k|v), is one dim, whose size is entered into `sizes`: a linear map tells no blocks apart."""
    named = {n for t in data for n in dims_of(t)}
    found: list[Term] = []
    for term in terms:
        size = term_size(term, sizes) if isinstance(term, Sum) and named.isdisjoint(dims_of(term)) else None
        if size is None:
            found.append(term)
        else:
            found.append(Dim(str(term)))
            sizes[str(term)] = size
    return tuple(found)


def layout_of(terms: Sequence[Term], sizes: Mapping[str, int], order: tuple[Sequence[str], ...]) -> Layout | None:
    """The layout of an operand; None where a term is neither dim nor product of dims, or a dim has no place in the order."""
    names: list[str] = []
    split: list[int] = []
    for term in terms:
        if isinstance(term, One):
            names.append("")
            split.append(1)
            continue
        if not isinstance(term, Dim | Product) or any(not isinstance(p, Dim) for p in (term.parts if isinstance(term, Product) else ())):
            return None
        for name in dims_of(term):
            names.append(name)
            split.append(sizes[name])
    wanted = [n for group in order for n in group]
    if any(n and n not in wanted for n in names) or len(set(names) - {""}) != len([n for n in names if n]):
        return None
    ones = [i for i, n in enumerate(names) if not n]
    there = [names.index(n) for n in wanted if n in names]
    shape = tuple(math.prod(split[names.index(n)] for n in group if n in names) for group in order)
    return Layout(tuple(split), (*ones, *there), shape)


def data_layout(layer: Layer, shape: Sequence[int]) -> Layout:
    """Layout of data of a given shape, which may be another batch than that of tracing, or have lost channels."""
    terms = layer.data_terms or ()
    sizes: dict[str, int] = {}
    for term, size in zip(terms, shape, strict=True):
        names = list(dims_of(term))
        if len(names) == 1:
            sizes[names[0]] = size
        elif names:
            known = [n for n in names if kind_of(layer.signature, n) is not SUM]
            rest = [n for n in names if n not in known]
            for n in known:
                sizes[n] = layer.sizes[n]
            left = size // max(math.prod(layer.sizes[n] for n in known), 1)
            for n in rest[1:]:
                sizes[n] = layer.sizes[n]
                left //= layer.sizes[n]
            if rest:
                sizes[rest[0]] = left
    sides = _Sides(layer.signature, terms, layer.weight_terms or (), layer.signature.outputs[0] or (), layer.window)
    every = [n for t in terms for n in dims_of(t)]
    others = [n for n in every if n not in sides.columns and n not in sides.shared]
    found = layout_of(terms, sizes, (sides.shared, others, sides.columns))
    assert found is not None
    return found
