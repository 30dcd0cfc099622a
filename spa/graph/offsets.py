"""Where the constant part of a linear map is stored, or could be: its own bias, the norm or the addition behind it, or a new one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spa.graph.groups import Groups
from spa.graph.linear import Layer, Layout, layout_of, plain
from spa.graph.moved import Place, place_of
from spa.graph.trace import NodeTrace
from spa.signatures import SUM
from spa.signatures.arithmetic import ADDS
from spa.signatures.table import Dim, One, Product, Term, dims_of, kind_of


@dataclass(frozen=True)
class Offset:
    """A stored constant that is added to a layer's output, times `gain`.

    place: where its elements are stored. layout: its axes, with dims that the layer lacks first. shape: of the stored value.
    """

    place: Place
    layout: Layout
    shape: tuple[int, ...]
    gain: float

    def add(self, stored: NDArray[np.float64], change: NDArray[np.float64]) -> None:
        """Adds (parts, outputs) to the layer's output, by changing the stored constant in place."""
        matrix = self.layout.canonical(self.place.read(stored, self.shape)).astype(np.float64)
        matrix[0] += (change * self.gain).reshape(matrix[0].shape)
        split = self.layout.back(matrix)
        self.place.write(stored, np.asarray(split).reshape(self.shape))


@dataclass(frozen=True)
class Missing:
    """A layer without a place for a constant; `slot` is the operand where its operator takes one. shape: of the zeros to add."""

    slot: int | None
    shape: tuple[int, ...]


class Offsets:
    """Finds the offsets of layers; for many questions about one graph."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.traced = groups, groups.traced
        self.makers = {t.name: n.node for n in self.traced.nodes for t in n.node.outputs}
        self.readers: dict[str, list[NodeTrace]] = {}
        for node in self.traced.nodes:
            for tensor in node.node.inputs:
                if tensor.name:
                    self.readers.setdefault(tensor.name, []).append(node)
        self.outputs = {t.name for t in self.traced.graph.outputs}

    def of(self, layer: Layer) -> Offset | Missing:
        """The layer's offset."""
        slot = layer.linear.bias
        terms = layer.signature.outputs[0] or ()
        if slot is not None:
            inputs = layer.node.inputs
            if slot >= len(inputs) or not inputs[slot].name:
                behind = self._behind(layer, terms)
                return behind if behind is not None else Missing(slot, self._fresh_shape(layer, slot, terms))
            spelled = layer.linear.spread or layer.signature.inputs[slot]
            found = self._offset(layer, inputs[slot].name, spelled, layer.linear.gain)
            if found is not None:
                return found
        return self._behind(layer, terms) or Missing(None, self._added_shape(layer, terms))

    def _behind(self, layer: Layer, terms: Iterable[Term]) -> Offset | None:
        """The mean of a norm, or the constant of an addition, that alone reads the layer's output."""
        out = layer.node.outputs[0].name
        readers = self.readers.get(out, [])
        if len(readers) != 1 or out in self.outputs or layer.linear.spread is not None or layer.node.attrs.get("activation"):
            return None
        reader = readers[0]
        spelled = tuple(terms)
        scale = float(layer.node.attrs.get("alpha", 1.0))
        if reader.signature is not None and reader.signature.moments is not None:
            mean = reader.node.inputs[reader.signature.moments[0]].name
            channels = (reader.signature.inputs[reader.signature.moments[0]] or (None,))[0]
            axes = tuple(t for t, c in zip(spelled, reader.signature.inputs[0] or (), strict=True) if c == channels)
            return self._offset(layer, mean, axes, -scale)
        if reader.node.op in ADDS and not reader.node.domain:
            other = next((t.name for t in reader.node.inputs if t.name != out), "")
            shape = self.traced.facts.shapes.get(other)
            if shape is None or len(shape) > len(spelled):
                return None
            behind = spelled[len(spelled) - len(shape) :]
            return self._offset(layer, other, tuple(One() if n == 1 else t for n, t in zip(shape, behind, strict=True)), scale)
        return None

    def _is_output(self, layer: Layer, name: str) -> bool:
        weight, data = layer.weight_terms or (), layer.data_terms or ()
        summed = kind_of(layer.signature, name) is SUM and any(name in dims_of(t) for t in data)
        return any(name in dims_of(t) for t in weight) and not summed

    def _offset(self, layer: Layer, value: str, terms: Iterable[Term] | None, gain: float) -> Offset | None:
        shape = self.traced.facts.shapes.get(value)
        if terms is None or shape is None or len(self.readers.get(value, [])) != 1:
            return None
        place = place_of(self.traced, value, self.makers)
        if place is None or len(self.readers.get(place.name, [])) != 1:
            return None
        sizes = dict(layer.sizes)
        terms = plain(tuple(terms), layer.data_terms or (), sizes)
        weight = [n for t in layer.weight_terms or () for n in dims_of(t)]
        counts = {sizes[n]: n for n in weight if n.startswith("_")}  # of a signature's text, "3 h d": each operand's are dims of their own
        spelled = tuple(_renamed(t, {n: counts[sizes[n]] for n in dims_of(t) if n.startswith("_") and sizes[n] in counts}) for t in terms)
        named = [n for t in spelled for n in dims_of(t)]
        extra = [n for n in named if n not in weight]
        known = {n: sizes[n] for n in named if n in sizes}
        for term, size in zip(spelled, shape, strict=True):
            lost = [n for n in (dims_of(term) if isinstance(term, Product) else ()) if n not in known]
            if len(lost) == 1:
                known[lost[0]] = size // math.prod(known[n] for n in dims_of(term) if n != lost[0])
        if any(n not in known for n in named):
            return None
        data = [n for t in layer.data_terms or () for n in dims_of(t)]
        if any(n in data for n in extra) or (extra and layer.linear.spread is None):
            return None  # it differs from row to row
        mine = [n for n in weight if self._is_output(layer, n) and not n.startswith("k.")]
        if any(n not in named for n in mine):
            return None
        shared = [n for n in mine if n in data]
        layout = layout_of(spelled, known, (extra, shared, [n for n in mine if n not in shared]))
        return None if layout is None or math.prod(layout.split) != math.prod(shape) else Offset(place, layout, shape, gain)

    def _fresh_shape(self, layer: Layer, slot: int, terms: Iterable[Term]) -> tuple[int, ...]:
        if layer.linear.spread is not None:  # every dim that the layer lacks has two positions: for the input, for the state
            return tuple(math.prod(layer.sizes.get(n, 2) for n in dims_of(t)) for t in layer.linear.spread)
        there = {n for t in terms for n in dims_of(t)}
        weight = {n for t in layer.weight_terms or () for n in dims_of(t)}
        if layer.window is not None or any(self._is_output(layer, n) and n not in there for n in weight):
            return (layer.parts * layer.outputs,)
        return self._added_shape(layer, terms)

    def _added_shape(self, layer: Layer, terms: Iterable[Term]) -> tuple[int, ...]:
        shape: list[int] = []
        for term in terms:
            names = list(dims_of(term))
            mine = bool(names) and any(self._is_output(layer, n) for n in names)
            if mine or shape:
                shape.append(math.prod(layer.sizes[n] for n in names) if mine else 1)
        return tuple(shape)


def _renamed(term: Term, names: Mapping[str, str]) -> Term:
    if isinstance(term, Product):
        return replace(term, parts=tuple(_renamed(p, names) for p in term.parts))
    return replace(term, name=names[term.name]) if isinstance(term, Dim) and term.name in names else term
