"""What criteria see: groups with their stored tensors, and the layers that read them with what data say of these.

Each stored tensor is read once and leaves nothing behind but sums; statistics of data are gathered for many layers in one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import Weight
from spa import criteria
from spa.criteria import Slice, select
from spa.criteria.layer_view import LayerView, columns_of, spread
from spa.graph.groups import Group, Groups
from spa.graph.linear import Layer, find_layers
from spa.graph.view import dtype_holds_weights
from spa.proof.feeds import Feeds
from spa.repairs import solve
from spa.statistics.acting import Gain, acting, gains
from spa.statistics.observe import MEMORY, Part, Vectors, draw_rows, observe, parts_of, stream
from spa.statistics.rows import rows
from spa.statistics.sums import Sums
from spa.statistics.terms import Observed, Terms, observed
from spa.storage.store import Model
from spa.timing.share import room

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Data:
    """What criteria that look at data are given: the normalised model and batches for it, the loss for gradients, the ridge for errors."""

    model: Model
    batches: Sequence[Feeds]
    loss: str = "auto"
    labels: str | None = None
    damping: float = solve.DAMPING


class GroupViews:
    """Makes the views of groups, and gathers what they share."""

    def __init__(self, graph: gs.Graph, groups: Groups, aggregate: str, seed: int, data: Data | None) -> None:
        self.graph, self.groups, self.aggregate, self.seed, self.data = graph, groups, aggregate, seed, data
        self.damping = solve.DAMPING if data is None else data.damping
        self.sums = Sums(graph, groups)
        self._saliency: dict[str, Mapping[str, NDArray[np.floating]]] = {}

    def of(self, group: Group, layers: Sequence[LayerView] = ()) -> View:
        """The view of a group."""
        return View(group.size, np.random.default_rng([self.seed, group.index]), self.seed, self.damping, group, self, list(layers))

    def combine(self, found: Iterable[Array], size: int) -> Array:
        """One score of several."""
        stacked = [np.asarray(f, np.float64) for f in found]
        return criteria.AGGREGATES[self.aggregate](np.stack(stacked)) if stacked else np.zeros(size)

    # ------------------------------------------------------------------ layers

    @cached_property
    def layers(self) -> list[Layer]:
        """All linear maps with stored weights."""
        return list(find_layers(self.groups))

    @cached_property
    def gains(self) -> Mapping[str, Gain]:
        """What stored weights are multiplied by."""
        return gains(self.groups)

    @cached_property
    def readers(self) -> dict[int, list[Layer]]:
        """Group -> layers that sum over its channels."""
        of = np.concatenate([[-1], self.groups.of_coordinate()])
        found: dict[int, list[Layer]] = {}
        for layer in self.layers:
            labels = [self.groups.labels[layer.data, a] for a in layer.positions if (layer.data, a) in self.groups.labels]
            for g in sorted({int(g) for rows_ in labels for g in np.unique(of[rows_]) if g >= 0}):
                found.setdefault(g, []).append(layer)
        return found

    def _weight(self, layer: Layer) -> Array:
        held = self.groups.traced.constants[layer.place.name]
        values = held._values.load() if isinstance(held._values, Weight) else held.values
        scaled = acting(layer.place.name, np.asarray(values), self.gains)
        return np.asarray(layer.weight.canonical(layer.place.read(scaled, layer.weight_shape)), np.float64)

    def _view(self, layer: Layer, group: Group) -> LayerView:
        of = layer.coordinates(self.groups, group.start, group.start + group.size)
        whole = (of >= 0).all(axis=1) & (of == of[:, :1]).all(axis=1)
        of[whole] = -1  # a part that goes as a whole takes its outputs along: nothing is lost in it (depthwise convolutions)
        return LayerView(group.size, self._weight(layer), of, layer, self.damping)

    def layer_views(self, chosen: Sequence[Group], needs: str, relative: bool) -> Iterator[tuple[int, LayerView]]:
        """(group, layer) pairs with what the criterion needs, in an order that memory allows."""
        if needs == "covariances":
            for layer, moments in self._observed(chosen):
                for group in self._groups_of(layer, chosen):
                    yield group.index, self._with_systems(self._view(layer, group), moments, relative)
            return
        wanted = {id(x): x for g in chosen for x in self.readers.get(g.index, ())}
        vectors = self._vectors(list(wanted.values())) if needs in ("vectors", "projections") else {}
        projections = self._projections(chosen) if needs == "projections" else {}
        usage = self._usage(chosen) if needs == "usage" else {}
        for group in chosen:
            for layer in self.readers.get(group.index, ()):
                view = self._view(layer, group)
                axis = self._axis(layer, group)
                if needs == "usage":
                    view = replace(view, usage=usage[group.index, id(layer)])
                elif needs:
                    view = replace(view, vectors=spread(vectors[layer.data, axis], layer.positions[axis]))
                if needs == "projections":
                    single = projections.get((group.index, id(layer)))
                    view = replace(view, projections=view.per_channel(view.vectors.magnitude) if single is None else single)
                yield group.index, view

    def _axis(self, layer: Layer, group: Group) -> int:
        """The data's axis that holds the group."""
        for axis in layer.positions:
            labels = self.groups.labels.get((layer.data, axis))
            if labels is not None and ((labels > group.start) & (labels <= group.start + group.size)).any():
                return axis
        raise AssertionError("a layer was asked about a group that it does not read")

    def _groups_of(self, layer: Layer, chosen: Sequence[Group]) -> Iterator[Group]:
        for group in chosen:
            if any(x is layer for x in self.readers.get(group.index, ())):
                yield group

    def _observed(self, chosen: Sequence[Group]) -> Iterator[tuple[Layer, list[tuple[Part, solve.Moments]]]]:
        assert self.data is not None
        wanted = {id(x): x for g in chosen for x in self.readers.get(g.index, ())}
        ordered = [x for x in self.layers if id(x) in wanted]
        yield from observe(self.data.model, self.groups, ordered, self.data.batches, count=len(self.data.batches), seed=self.seed)

    def _with_systems(self, view: LayerView, moments: Sequence[tuple[Part, solve.Moments]], relative: bool) -> LayerView:
        systems = []
        energy = 0.0
        for part, found in moments:
            weight = view.weight[part.part][:, part.columns]
            energy += float(((weight @ found.covariance) * weight).sum())
            systems.append(select.Layer(weight, found.covariance, view.of[part.part][part.columns]))
        if relative:
            systems = [replace(s, scale=1 / energy if energy > 0 else 0.0) for s in systems]
        return replace(view, systems=tuple(systems))

    def chunks(self, chosen: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups whose layers' matrices fit into memory together; at least one."""
        chunk: list[Group] = []
        used = 0
        for group in chosen:
            keys = {x.key: x for x in self.readers.get(group.index, ())}
            size = sum(8 * len(p.columns) ** 2 for x in keys.values() for p in parts_of(x))
            if chunk and used + size > room(MEMORY):
                yield chunk
                chunk, used = [], 0
            chunk.append(group)
            used += size
        if chunk:
            yield chunk

    def systems(self, chunk: Sequence[Group], relative: bool) -> dict[int, list[LayerView]]:
        """Group -> its layers with their systems."""
        found: dict[int, list[LayerView]] = {}
        for layer, moments in self._observed(chunk):
            for group in self._groups_of(layer, chunk):
                found.setdefault(group.index, []).append(self._with_systems(self._view(layer, group), moments, relative))
        return found

    def _vectors(self, layers: Sequence[Layer]) -> dict[tuple[str, int], Vectors]:
        assert self.data is not None
        places = sorted({(x.data, a) for x in layers for a in x.positions})
        found = {place: Vectors() for place in places}

        def add(number: int, values: Mapping[str, NDArray[Any]]) -> None:
            samples = next((len(v) for v in self.data.batches[number].values() if np.ndim(v)), 1)  # type: ignore[union-attr]
            for (value, axis), vectors in found.items():
                if value in values:
                    vectors.add(values[value], axis, samples)

        stream(self.data.model, self.groups.traced.facts.types, self.data.batches, [v for v, _ in places], add)
        return found

    def _projections(self, chosen: Sequence[Group]) -> dict[tuple[int, int], Array]:
        """(group, layer) -> (size,) mean over rows of ‖x_c W_c‖₁, for channels of several columns."""
        assert self.data is not None
        pairs = []
        for group in chosen:
            for layer in self.readers.get(group.index, ()):
                view = self._view(layer, group)
                if (np.bincount(view.of[0][view.of[0] >= 0], minlength=group.size) > 1).any():
                    pairs.append((group, layer, view))
        totals = {(g.index, id(x)): np.zeros(g.size) for g, x, _ in pairs}
        counts = dict.fromkeys(totals, 0.0)

        def add(number: int, values: Mapping[str, NDArray[Any]]) -> None:
            for group, layer, view in pairs:
                if layer.data not in values:
                    continue
                data = values[layer.data]
                found = rows(layer, data, draw_rows(layer, data.shape, number, 1 / len(self.data.batches), self.seed))  # type: ignore[union-attr]
                key = group.index, id(layer)
                counts[key] += found.shape[1]
                for part in range(layer.parts):
                    weight = view.weight[part].astype(found.dtype)
                    for channel in range(group.size):
                        at = np.flatnonzero(view.of[part] == channel)
                        totals[key][channel] += float(np.abs(found[part][:, at] @ weight[:, at].T).sum(dtype=np.float64))

        if pairs:
            stream(self.data.model, self.groups.traced.facts.types, self.data.batches, [x.data for _, x, _ in pairs], add)
        return {key: total / max(counts[key], 1) for key, total in totals.items()}

    def _usage(self, chosen: Sequence[Group]) -> dict[tuple[int, int], Array]:
        """(group, layer) -> (size,) share of the rows in which ‖x_c W_c‖₂ is the largest."""
        assert self.data is not None
        pairs = [(group, layer, self._view(layer, group)) for group in chosen for layer in self.readers.get(group.index, ())]
        totals = {(g.index, id(x)): np.zeros(g.size) for g, x, _ in pairs}

        def add(number: int, values: Mapping[str, NDArray[Any]]) -> None:
            for group, layer, view in pairs:
                if layer.data not in values:
                    continue
                data = values[layer.data]
                found = rows(layer, data, draw_rows(layer, data.shape, number, 1 / len(self.data.batches), self.seed))  # type: ignore[union-attr]
                for part in range(layer.parts):
                    norms = np.zeros((found.shape[1], group.size))
                    for channel, at in columns_of(view.of[part], group.size):
                        gram = view.weight[part][:, at].T @ view.weight[part][:, at]
                        x = found[part][:, at].astype(np.float64)
                        norms[:, channel] = np.einsum("ri,ij,rj->r", x, gram, x)
                    totals[group.index, id(layer)] += np.bincount(norms.argmax(axis=1), minlength=group.size)

        stream(self.data.model, self.groups.traced.facts.types, self.data.batches, [x.data for _, x, _ in pairs], add)
        return {key: total / max(total.sum(), 1) for key, total in totals.items()}

    # ------------------------------------------------------------------ experts

    @cached_property
    def experts(self) -> Observed:
        """What the experts of all groups that may shrink add, and why nothing is known of some."""
        there = [g for g in self.groups.free() if g.kind == "expert"]
        return observed(self.data.model, self.groups, there, self.data.batches) if there and self.data is not None else ({}, {})

    def unseen(self, name: str, needs: str) -> str:
        """Why a criterion that needs this says nothing of a group."""
        why = self.experts[1].get(self.groups.by_name[name].index, "it holds no experts")
        return why if needs == "terms" else "no layer sums over it"

    # ------------------------------------------------------------------ gradients

    def saliency(self, method: str) -> Mapping[str, NDArray[np.floating]]:
        """Element-wise saliency of every stored tensor."""
        from spa.statistics.gradients import weight_saliency  # torch is an extra

        if method not in self._saliency:
            assert self.data is not None
            data = self.data
            layers = self.layers if method == "loraprune" else ()
            self._saliency[method] = weight_saliency(self.graph, data.batches, method, loss=data.loss, labels=data.labels, layers=layers)
        return self._saliency[method]

    @cached_property
    def activations(self) -> Mapping[tuple[str, int], Array]:
        """Saliency of the data of all layers that read a free group."""
        from spa.statistics.gradients import activation_saliency

        assert self.data is not None
        places = sorted({(x.data, self._axis(x, g)) for g in self.groups.free() for x in self.readers.get(g.index, ())})
        return activation_saliency(self.graph, self.data.batches, places, loss="entropy")


@dataclass
class View:
    """See `spa.criteria.GroupView`."""

    size: int
    rng: np.random.Generator
    seed: int
    damping: float
    group: Group
    views: GroupViews = field(repr=False)
    _layers: list[LayerView] = field(repr=False)

    def powers(self, p: float) -> Array:
        """See `spa.criteria.GroupView`."""
        matrices, vectors = self.views.sums.of(p)
        if self.views.aggregate == "sum":
            found = matrices[self.group.coordinates]
            return found if found.any() else vectors[self.group.coordinates]
        places = self.views.sums.places
        there = [(places[p, v, a], self.views.groups.labels[v, a]) for v, a in self.group.sites if (p, v, a) in places]
        wanted = any(matrix for (matrix, _), _ in there)
        return self.combine(self._channels(sums, labels) for (matrix, sums), labels in there if matrix == wanted)

    def _channels(self, sums: Array, labels: NDArray[np.int64]) -> Array:
        """(size,) sums over the positions of an axis that go with each coordinate."""
        found = np.zeros(self.views.groups.total + 1)
        for column in labels.T:
            np.add.at(found, column, sums)
        return found[1:][self.group.coordinates]

    def slices(self) -> Iterator[Slice]:
        """See `spa.criteria.GroupView`."""
        groups = self.views.groups
        constants = groups.traced.constants
        norms = {n.node.inputs[1].name for n in groups.traced.nodes if n.signature is not None and n.signature.moments is not None}
        for value, axis in self.group.sites:
            if value not in constants or not dtype_holds_weights(constants[value].dtype):
                continue
            tensor = constants[value]
            shape = tuple(tensor.shape)
            held = tensor._values.load() if isinstance(tensor._values, Weight) else tensor.values
            flat = np.moveaxis(acting(value, np.asarray(held), self.views.gains), axis, 0).reshape(shape[axis], -1).astype(np.float32)
            matrix = int(np.prod(shape)) > shape[axis]
            yield Slice(value, axis, matrix, value in norms, _rows_of(flat, groups.labels[value, axis], self.group))

    def layers(self) -> Sequence[LayerView]:
        """See `spa.criteria.GroupView`."""
        return self._layers or [self.views._view(x, self.group) for x in self.views.readers.get(self.group.index, ())]

    def saliency(self, method: str, *, signed: bool = False) -> list[Array]:
        """See `spa.criteria.GroupView`."""
        groups, every = self.views.groups, self.views.saliency(method)
        matrices: list[Array] = []
        vectors: list[Array] = []
        for value, axis in self.group.sites:
            array = every.get(value)
            if array is None:
                continue
            sums = (array if signed else np.abs(array)).sum(axis=tuple(a for a in range(array.ndim) if a != axis), dtype=np.float64)
            (matrices if array.size > array.shape[axis] else vectors).append(self._channels(sums, groups.labels[value, axis]))
        return matrices or vectors

    def activation_saliency(self) -> list[Array]:
        """See `spa.criteria.GroupView`."""
        found = []
        for layer in self.views.readers.get(self.group.index, ()):
            axis = self.views._axis(layer, self.group)
            found.append(self._channels(self.views.activations[layer.data, axis], self.views.groups.labels[layer.data, axis]))
        return found

    def terms(self) -> Terms | None:
        """See `spa.criteria.GroupView`."""
        return self.views.experts[0].get(self.group.index)

    def combine(self, rows: Iterable[Array]) -> Array:
        """See `spa.criteria.GroupView`."""
        return self.views.combine(rows, self.size)


def _rows_of(flat: NDArray[np.floating], labels: NDArray[np.int64], group: Group) -> NDArray[np.floating]:
    """(size, n) the rows of `flat` that go with each coordinate, side by side."""
    inside = (labels > group.start) & (labels <= group.start + group.size)
    position, column = np.nonzero(inside)
    channel = labels[position, column] - 1 - group.start
    order = np.lexsort((position, channel))
    position, channel = position[order], channel[order]
    counts = np.bincount(channel, minlength=group.size)
    place = np.arange(len(channel)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros((group.size, int(counts.max(initial=0)), flat.shape[1]), flat.dtype)
    found[channel, place] = flat[position]
    return found.reshape(group.size, -1)
