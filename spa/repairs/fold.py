"""Folding: removed channels are merged into the most similar channel that stays, from the weights alone.

    dense graph, removal --fold--> the dense graph with other weights --rewrite--> the pruned graph

Let C be a channel that stays with all that are merged into it, k = |C|, and y = Σ_c U_c f(W_c x) two layers around an operator f that
works on each channel alone. If the W_c are nearly the same, f(W_c x) is nearly the same value, and

    Σ_{c in C} U_c f(W_c x)  ≈  (Σ_{c in C} U_c) f(W̄ x),    W̄ = 1/k Σ_{c in C} W_c,

exactly so for duplicates. So what stays takes the mean wherever the channel is made or passes (rows, biases, norms, constants of a
channel), and the sum where it is summed (columns of the weights that read it). Each tensor of the group takes this along
each of its axes, input and output channels one after the other: the maps are linear and commute. Positions of one channel (pixels behind
Flatten, the dims of a head) are merged one by one. Which axis is which, signatures say: SUM of a linear map with a stored weight takes the
sum, all else the mean. Where a channel is summed in another way (q·k over a head's dims, recurrent layers), or a tensor is read in both
ways (tied embeddings), the group is dropped as it would be without folding, and `skipped` says why.

**Variance.** Norms with stored statistics divide by the deviation that channels had before. With deviations s_c and correlations ρ_cd,

    Var(1/k Σ_c z_c) = 1/k² Σ_c,d s_c s_d ρ_cd  =  s² (1/k + (1 − 1/k) ρ)   for equal s and ρ,

less than the mean variance: merged channels fade layer by layer (the collapse of variance that REPAIR puts right with data). Without
data, ρ_cd is the cosine of W_c and W_d, what it is for white inputs; rows of a depthwise convolution read different channels, so
theirs is times that of the rows that made these. It is put into the norm right behind a linear map; other norms take the mean.

    Model Folding, Wang et al., ICLR 2025, arXiv 2502.10216; REPAIR, Jordan et al., ICLR 2023, arXiv 2211.08403
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.criteria.folding import distances
from spa.criteria.views import GroupViews
from spa.data.evidence import put, stored_norms, values
from spa.graph.groups import Group, Groups, Kept
from spa.graph.linear import Layer, find_layers
from spa.graph.moved import FOLLOWED, Place, place_of
from spa.graph.trace import NodeTrace, node_name
from spa.graph.view import dtype_is_float
from spa.plans.rewrite import copy_graph
from spa.signatures import SUM
from spa.signatures.table import dims_of, kind_of
from spa.storage.store import Model, with_graph

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Folded:
    """The dense-shaped model with merged weights.

    changed: stored tensors that hold other values now. merged: group -> {coordinate that stays: coordinates merged into it}, counted from
    the group's start. skipped: groups that lose channels but could not be folded, with the reason. variances: norms that were corrected.
    """

    model: Model
    changed: frozenset[str]
    merged: Mapping[str, Mapping[int, list[int]]]
    skipped: Mapping[str, str]
    variances: int


def fold(model: Model, groups: Groups, gone: Mask, *, variance: bool = True) -> Folded:
    """Merges each removed coordinate into the nearest one of its group that stays. Mutates nothing.

    Parameters
    ----------
    model, groups
        The normalised model and its groups.
    gone
        (total,) mask over all coordinates: what the deletion afterwards removes.
    variance
        Whether stored variances are corrected for the averaging; the mean of the variances otherwise.
    """
    work = _Fold(model, groups, gone)
    return work.run(variance)


class _Fold:
    def __init__(self, model: Model, groups: Groups, gone: Mask) -> None:
        self.model, self.groups, self.gone = model, groups, gone
        self.kept = Kept(groups, gone)
        self.constants = groups.traced.constants
        self.makers = {t.name: n.node for n in groups.traced.nodes for t in n.node.outputs}
        self.of = np.concatenate([[-1], groups.of_coordinate()])
        self.into = np.arange(groups.total)  # the coordinate that each one is merged into
        self.skipped: dict[str, str] = {}
        self.wanted = {g.index: g for g in groups.groups if gone[g.coordinates].any() and not gone[g.coordinates].all()}
        self._places: dict[str, Place | None] = {}
        self._groups: dict[int, tuple[Any, frozenset[int]]] = {}
        self._grids: dict[tuple[int, int], tuple[Any, Index | None]] = {}

    def run(self, variance: bool) -> Folded:
        summed = self._summed()
        merged = self._assign()
        graph = copy_graph(self.model.graph)
        found = {n: self._merged(n, summed) for n in self.constants if self._floats(n) and self._axes(n)}
        corrected = dict(self._variances()) if variance else {}
        changed = set()
        for name, array in {**found, **corrected}.items():
            before = values(self.model.graph, name)
            dtype = np.dtype(self.constants[name].dtype)
            if not np.array_equal(array.astype(dtype), before.astype(dtype)):
                put(graph, name, array)
                changed.add(name)
        return Folded(with_graph(self.model, graph), frozenset(changed), merged, self.skipped, len(corrected))

    # ------------------------------------------------------------------ what can be folded, and where it is summed

    def _skip(self, index: int, why: str) -> None:
        group = self.wanted.pop(index, None)
        if group is not None:
            self.skipped[group.name] = why

    def _here(self, labels: Index | None) -> frozenset[int]:
        """Groups to be folded that occur in labels."""
        if labels is None or not labels.shape[1]:
            return frozenset()
        if id(labels) not in self._groups:
            self._groups[id(labels)] = labels, frozenset(int(g) for g in np.unique(self.of[labels]))
        return self._groups[id(labels)][1] & self.wanted.keys()

    def _axes(self, name: str) -> list[int]:
        """Axes of a stored tensor that hold groups to be folded."""
        rank = len(self.groups.traced.facts.shapes.get(name) or ())
        return [a for a in range(rank) if self._here(self.groups.labels.get((name, a)))]

    def _floats(self, name: str) -> bool:
        return dtype_is_float(self.constants[name].dtype)

    def _place(self, value: str) -> Place | None:
        if value not in self._places:
            self._places[value] = place_of(self.groups.traced, value, self.makers)
        return self._places[value]

    def _summed(self) -> set[tuple[str, int, int]]:
        """(stored tensor, axis, group) that take the sum. Groups that can't be folded are put aside."""
        ways: dict[tuple[str, int, int], set[bool]] = {}
        for node in self.groups.traced.nodes:
            if node.signature is not None and any(self._here(self.groups.dim_labels(a)) for a in node.dims.values()):
                self._check_sums(node)
                for place, value, axis, name in self._readings(node):
                    for g in self._here(self.groups.dim_labels(node.dims[name])):
                        for stored_axis in self._stored_axes(place, value, axis, g):
                            way = kind_of(node.signature, name) is SUM
                            ways.setdefault((place.name, stored_axis, g), set()).add(way)
        for (name, _, g), found in ways.items():
            if len(found) > 1:
                self._skip(g, f"is both summed over and passed on in {name}")
        indices = self._indices()
        for name in self.constants:
            for axis in [] if name in indices else self._axes(name):
                for g in self._here(self.groups.labels[name, axis]):
                    if not self._floats(name):
                        self._skip(g, f"is in {name}, which holds no floats")
                    elif self._grid(self.groups.labels[name, axis], self.groups.groups[g]) is None:
                        self._skip(g, f"is on axis {axis} of {name} in positions that do not match")
        return {key for key, found in ways.items() if True in found}

    def _indices(self) -> set[str]:
        """Stored positions of channels (shuffles): the deletion renumbers them, and a mean of them means nothing."""
        found = set()
        for node in self.groups.traced.nodes:
            for carry in node.signature.carries if node.signature is not None else ():
                if carry.remap is not None and isinstance(carry.where, int):
                    found.add(node.node.inputs[carry.where].name)
        return found

    def _check_sums(self, node: NodeTrace) -> None:
        """Puts aside groups that a node sums over in another way than with a stored weight."""
        signature = node.signature
        assert signature is not None
        out = {n for o in signature.outputs for t in o or () for n in dims_of(t)}
        for name, axis in node.dims.items():
            here = self._here(self.groups.dim_labels(axis))
            if not here or kind_of(signature, name) is not SUM:
                continue
            good = False
            for linear in signature.linear:
                if max(linear.data, linear.weight) >= len(node.node.inputs):
                    continue
                both = [signature.inputs[i] or () for i in (linear.data, linear.weight)]
                there = all([n for t in side for n in dims_of(t)].count(name) == 1 for side in both)
                data, weight = (self._place(node.node.inputs[i].name) for i in (linear.data, linear.weight))
                good |= there and name not in out and weight is not None and data is None
            if not good:
                for g in here:
                    self._skip(g, f"is summed over at {node_name(node.node)} without a stored weight of its own")

    def _readings(self, node: NodeTrace) -> Iterator[tuple[Place, str, int, str]]:
        """(place, value, axis, dim) of what a node reads of stored tensors, unless it only moves their elements on."""
        assert node.signature is not None
        for i, (tensor, operand) in enumerate(zip(node.node.inputs, node.signature.inputs, strict=False)):
            place = self._place(tensor.name) if operand and tensor.name else None
            if place is None:
                continue
            moves = i == 0 and not node.node.domain and node.node.op in FOLLOWED
            if moves and all(self._place(t.name) for t in node.node.outputs if t.name):
                continue
            for axis, term in enumerate(operand or ()):
                for name in dims_of(term):
                    yield place, tensor.name, axis, name

    def _stored_axes(self, place: Place, value: str, axis: int, group: int) -> list[int]:
        """Axes of the stored tensor that an axis of what is read of it runs along, as far as they hold the group."""
        labels, shapes = self.groups.labels, self.groups.traced.facts.shapes
        if place.index is None:
            run = [axis]
        else:
            line = np.moveaxis(place.index, axis, 0).reshape(place.index.shape[axis], -1)[:, 0]
            run = [a for a, at in enumerate(np.unravel_index(line, shapes[place.name] or ())) if (at != at[0]).any()]
        return [a for a in run if group in self._here(labels.get((place.name, a)))]

    # ------------------------------------------------------------------ which channel goes where

    def _assign(self) -> dict[str, dict[int, list[int]]]:
        views = GroupViews(self.model.graph, self.groups, "sum", 0, None)
        merged: dict[str, dict[int, list[int]]] = {}
        for group in list(self.wanted.values()):
            gone = self.gone[group.coordinates]
            apart = distances(views.of(group).slices(), group.size)
            if not np.isfinite(apart).all():
                self._skip(group.index, "has weights that are NaN or infinite")
                continue
            keep, lost = np.flatnonzero(~gone), np.flatnonzero(gone)
            nearest = keep[apart[np.ix_(lost, keep)].argmin(axis=1)]
            self.into[group.start + lost] = group.start + nearest
            found = merged.setdefault(group.name, {})
            for one, other in zip(nearest.tolist(), lost.tolist(), strict=True):
                found.setdefault(one, []).append(other)
        return merged

    def _grid(self, labels: Index, group: Group) -> Index | None:
        """(size, k) the k positions of each coordinate on an axis, in matching order; None if there is no such order."""
        key = id(labels), group.index
        if key not in self._grids:
            self._grids[key] = labels, _grid(labels, group)
        return self._grids[key][1]

    def _target(self, labels: Index, group: Group) -> Index:
        """(length,) the position that each position of an axis is merged into."""
        target = np.arange(len(labels))
        grid = self._grid(labels, group)
        assert grid is not None
        target[grid] = grid[self.into[group.coordinates] - group.start]
        return target

    def _targets(self, labels: Index) -> Index:
        """The same for all groups of an axis together."""
        target = np.arange(len(labels))
        for g in sorted(self._here(labels)):
            target = self._target(labels, self.groups.groups[g])[target]
        return target

    def _merged(self, name: str, summed: set[tuple[str, int, int]]) -> Array:
        """A stored tensor with the mean or the sum of what is merged in what stays; what goes is left as it was."""
        before = values(self.model.graph, name)
        array = before
        for axis in self._axes(name):
            labels = self.groups.labels[name, axis]
            for g in sorted(self._here(labels)):
                target = self._target(labels, self.groups.groups[g])
                array = _gathered(array, target, axis, mean=(name, axis, g) not in summed)
        stays = np.ones(before.shape, bool)
        for axis in range(before.ndim):
            keep = self.kept.site((name, axis))
            if keep is not None:
                stays &= keep.reshape([-1 if a == axis else 1 for a in range(before.ndim)])
        return np.where(stays, array, before)

    # ------------------------------------------------------------------ variances

    def _variances(self) -> Iterator[tuple[str, Array]]:
        """(stored variance, corrected) of norms right behind linear maps that lose outputs."""
        layers = {layer.node.outputs[0].name: layer for layer in find_layers(self.groups)}
        rows: dict[str, Array] = {}
        for node in stored_norms(self.groups):
            assert node.signature is not None
            assert node.signature.moments is not None
            name = node.node.inputs[node.signature.moments[1]].name
            layer = layers.get(node.node.inputs[0].name)
            if not self._axes(name) or layer is None:
                continue
            unit = self._unit_rows(layer, layers, rows)
            if unit is None:
                continue
            before = values(self.model.graph, name)
            target = self._targets(self.groups.labels[name, 0])
            keep = self.kept.site((name, 0))
            if len(before) == len(unit):
                yield name, np.where(np.ones(len(before), bool) if keep is None else keep, merged_variance(before, unit, target), before)

    def _unit_rows(self, layer: Layer, layers: Mapping[str, Layer], known: dict[str, Array]) -> Array | None:
        """(outputs, n) for each output channel a vector of length one: their products are the correlations for white inputs."""
        out = layer.node.outputs[0].name
        if out in known:
            return known[out]
        y, x = layer.signature.outputs[0] or (), layer.data_terms or ()
        if len(y) < 2 or len(x) < 2:
            return None
        weight = layer.weight.canonical(layer.place.read(values(self.model.graph, layer.place.name), layer.weight_shape))
        unit = _unit(np.asarray(weight, np.float64).reshape(layer.parts * layer.outputs, -1))
        made = list(dims_of(y[1]))
        read = {n for t in (layer.signature.inputs[layer.linear.weight] or ()) for n in dims_of(t)}
        if not set(made) <= read or int(np.prod([layer.sizes[n] for n in made])) != len(unit):
            return None
        if layer.parts > 1 and (layer.positions.get(1) is not None):
            source = self._source(layer, layers)
            behind = None if source is None else self._unit_rows(source, layers, known)
            taps = layer.columns // max(len(np.unique(layer.positions[1][0])), 1)
            if behind is not None and taps == layer.columns:
                before = np.repeat(behind[layer.positions[1][:, 0]], layer.outputs, axis=0)
                unit = np.einsum("ia,ib->iab", unit, before).reshape(len(unit), -1)
        known[out] = unit
        return unit

    def _source(self, layer: Layer, layers: Mapping[str, Layer]) -> Layer | None:
        """The linear map that made a layer's data, if only operators on each channel alone stand between."""
        value = layer.data
        labels = self.groups.labels.get((value, 1))
        while labels is not None and value in self.makers and self._same(value, labels):
            if value in layers:
                return layers[value]
            value = self.makers[value].inputs[0].name if self.makers[value].inputs else ""
        return None

    def _same(self, value: str, labels: Index) -> bool:
        other = self.groups.labels.get((value, 1))
        return other is not None and (other is labels or np.array_equal(other, labels))


def _grid(labels: Index, group: Group) -> Index | None:
    inside = (labels > group.start) & (labels <= group.start + group.size)
    if (inside.sum(axis=1) > 1).any():
        return None
    at = np.flatnonzero(inside.any(axis=1))
    coordinate = (labels[at] * inside[at]).max(axis=1) - 1 - group.start
    others = np.sort(np.where(inside[at], 0, labels[at]), axis=1)
    order = np.lexsort((at, *others.T, coordinate))
    counts = np.bincount(coordinate, minlength=group.size)
    if not len(at) or (counts != counts[0]).any():
        return None
    beside = others[order].reshape(group.size, counts[0], -1)
    return at[order].reshape(group.size, counts[0]) if (beside == beside[:1]).all() else None


def _gathered(array: Array, target: Index, axis: int, *, mean: bool) -> Array:
    """Sums, or means, of the positions of an axis that have the same target; zeros where none has."""
    rows = np.moveaxis(array, axis, 0)
    found = rows.copy()
    lost = np.flatnonzero(target != np.arange(len(target)))
    np.add.at(found, target[lost], rows[lost])
    if mean:
        counts = np.bincount(target, minlength=len(target))
        merged = np.flatnonzero(counts > 1)
        found[merged] /= counts[merged].reshape(-1, *[1] * (rows.ndim - 1))
    return np.moveaxis(found, 0, axis)


def _unit(rows: Array) -> Array:
    """Rows over their lengths; rows of zeros are alike, and like no others."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    still = length == 0
    return np.concatenate([rows / np.where(still, 1, length), still], axis=1)


def merged_variance(variance: Array, unit: Array, target: Index) -> Array:
    """(n,) variance of the mean of the channels that have the same target, 1/k² Σ_c,d s_c s_d ρ_cd; the old one where it stands alone.

    variance: (n,) of single channels. unit: (n, m) vectors of length one whose products are the correlations. target: (n,).
    """
    counts = np.bincount(target, minlength=len(target))
    scaled = np.sqrt(np.maximum(variance, 0))[:, None] * unit
    total = np.zeros_like(scaled)
    np.add.at(total, target, scaled)
    merged = counts > 1
    found = np.array(variance, np.float64)
    found[merged] = (total[merged] ** 2).sum(axis=1) / counts[merged] ** 2
    return found


__all__ = ["Folded", "fold", "merged_variance"]
