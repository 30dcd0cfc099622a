"""Weights as they act: what multiplies a layer's outputs right behind it, each by its own number, belongs to the layer's weights.

    g_c (W_c x + b_c) + h_c   is   (g_c W_c) x + (g_c b_c + h_c)

A BatchNormalization behind a convolution is such g and h, and so are the Sub, Mul and Add that some exporters make of it, and the scale
of a layer. Others multiply g into W. A criterion that looked at W alone would tell those files of one network apart, and would call a
channel large whose norm makes it small.

A number that is the same for all channels says nothing of them (a head's 1 / √d stands behind q, k or both): it is passed by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.graph.alone import evaluated, opsets_of
from spa.graph.groups import Groups
from spa.graph.linear import Layer, find_layers
from spa.graph.trace import NodeTrace
from spa.graph.view import dtype_is_float
from spa.signatures.arithmetic import MOVES

Array = NDArray[np.float64]
LARGEST = 1 << 16  # elements of what may multiply: one a channel


@dataclass(frozen=True)
class Gain:
    """What a stored tensor is multiplied by. axis: of the tensor. factors: (length of the axis,)."""

    axis: int
    factors: Array

    def along(self, rank: int) -> Array:
        """The factors in a shape that is spread over the tensor."""
        return self.factors.reshape([-1 if a == self.axis else 1 for a in range(rank)])


def gains(groups: Groups) -> dict[str, Gain]:
    """Stored weight -> its gain, for weights that one layer alone reads and behind which something multiplies. Linear in nodes."""
    chains = _Chains(groups)
    layers = list(find_layers(groups))
    readers = Counter(layer.place.name for layer in layers)
    found: dict[str, Gain] = {}
    for layer in layers:
        if readers[layer.place.name] > 1 or chains.times_read(layer) != 1:
            continue
        factors = chains.factors(layer)
        axis = None if factors is None else _stored_axis(layer, groups)
        if factors is not None and axis is not None:
            found[layer.place.name] = Gain(axis, factors)
    return found


def _channel_axes(layer: Layer) -> tuple[int, int] | None:
    """Axis of the weight and axis of the result that are the layer's outputs, if there is one such pair."""
    weight, result = layer.weight_terms or (), layer.signature.outputs[0] or ()
    pairs = [(i, j) for i, w in enumerate(weight) for j, y in enumerate(result) if w == y]
    return pairs[0] if len(pairs) == 1 else None


def _stored_axis(layer: Layer, groups: Groups) -> int | None:
    """The axis of the stored tensor that holds the outputs in their order."""
    axes = _channel_axes(layer)
    if axes is None or layer.place.index is None:
        return None if axes is None else axes[0]
    shape = tuple(groups.traced.constants[layer.place.name].shape)
    first = np.moveaxis(layer.place.index, axes[0], 0).reshape(layer.place.index.shape[axes[0]], -1)
    places = np.unravel_index(first, shape)
    for axis, along in enumerate(places):
        if len(along) == shape[axis] and (along == np.arange(shape[axis])[:, None]).all():
            return axis
    return None


class _Chains:
    """Follows what a layer gives through operators that multiply it and add to it."""

    def __init__(self, groups: Groups) -> None:
        self.traced = groups.traced
        self.opsets = opsets_of(self.traced.graph)
        self.makers = {t.name: n for n in self.traced.nodes for t in n.node.outputs}
        self.readers: dict[str, list[NodeTrace]] = {}
        for node in self.traced.nodes:
            for tensor in node.node.inputs:
                self.readers.setdefault(tensor.name, []).append(node)
        self.outputs = {t.name for t in self.traced.graph.outputs}
        self.known: dict[str, NDArray[Any] | None] = {}

    def times_read(self, layer: Layer) -> int:
        """How many nodes read the stored tensor of a layer's weight."""
        return len(self.readers.get(layer.place.name, ()))

    def factors(self, layer: Layer) -> Array | None:
        """(outputs,) what is multiplied behind a layer; None if nothing is.

        Everything that multiplies or adds is run on 0 and on 1 in each channel: the difference is the factor.
        """
        axes, value = _channel_axes(layer), layer.node.outputs[0].name
        shape = self.traced.facts.shapes.get(value)
        if axes is None or shape is None or self.traced.facts.types.get(value) != self.traced.facts.types.get(layer.node.inputs[0].name):
            return None
        dtype = np.float32
        ends = [np.full([n if a == axes[1] else 1 for a, n in enumerate(shape)], x, dtype) for x in (0, 1)]
        count, multiplied = shape[axes[1]], False
        while value not in self.outputs and len(self.readers.get(value, ())) == 1:
            node = self.readers[value][0]
            onward = self._through(node, value, ends, count)
            if onward is None:
                break
            ends, value = onward, node.node.outputs[0].name
            multiplied = True
        factors = np.asarray(ends[1], np.float64).reshape(-1) - np.asarray(ends[0], np.float64).reshape(-1)
        return factors if multiplied and np.isfinite(factors).all() and np.ptp(factors) > 0 else None

    def _through(self, node: NodeTrace, value: str, ends: list[NDArray[Any]], count: int) -> list[NDArray[Any]] | None:
        """What a node makes of both ends; None where it does something else with them, or treats all channels alike."""
        names = [t.name for t in node.node.inputs]
        if node.signature is None or node.node.domain:
            return None
        others = {n: self._constant(n) for n in names if n and n != value}
        if any(v is None for v in others.values()) or names.count(value) != 1:
            return None
        if names.index(value) in node.signature.straight:
            if not any(v is not None and v.size == count for v in others.values()):
                return None
        elif node.node.op not in MOVES or len(names) > 1:
            return None
        made = [evaluated(node.node, {value: end, **{n: v for n, v in others.items() if v is not None}}, self.opsets) for end in ends]
        return [m for m in made if m is not None] if all(m is not None and m.size == count for m in made) else None

    def _constant(self, name: str) -> NDArray[Any] | None:
        """A value that depends on stored tensors alone and holds no more than one number a channel, computed if it has to be."""
        if name in self.known:
            return self.known[name]
        self.known[name] = None
        held = self.traced.constants.get(name)
        if held is not None and int(np.prod(held.shape)) <= LARGEST:
            stored = np.asarray(held.values)
            self.known[name] = stored.astype(np.float32) if dtype_is_float(stored.dtype) else stored
        elif name in self.makers and all(self._constant(t.name) is not None for t in self.makers[name].node.inputs if t.name):
            node = self.makers[name].node
            feeds = {t.name: self.known[t.name] for t in node.inputs if t.name}
            self.known[name] = evaluated(node, {n: v for n, v in feeds.items() if v is not None}, self.opsets) if feeds else None
        return self.known[name]


def acting(name: str, array: NDArray[Any], known: Mapping[str, Gain]) -> NDArray[Any]:
    """A stored tensor times its gain."""
    gain = known.get(name)
    return array if gain is None else np.asarray(array * gain.along(array.ndim), np.result_type(array.dtype, np.float32))
