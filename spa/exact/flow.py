"""Where elements go: index maps through operators that only move elements, and where the way ends.

    MatMul -> Add(bias) -> Reshape -> Transpose -> Mul(1/8) -> MatMul      an array of the last value's shape that holds, for
                                                                           each element, its number in the first value; gain 1/8

What only moves elements, scales or adds stands in the table (`spa.signatures.arithmetic`). Index maps are made for the shapes that
tracing assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.graph.groups import Groups
from spa.graph.linear import Layer, find_layers, result_layout
from spa.graph.moved import moved, place_of
from spa.graph.offsets import Offset, Offsets
from spa.graph.trace import NodeTrace, node_name
from spa.signatures.arithmetic import ADDS, PASSES, READS_SHAPE, SCALES, STILL

Index = NDArray[np.int64]


class Obstacle(Exception):
    """Why a rewrite does not apply: the node that stands in the way, and what is the matter with it."""

    def __init__(self, node: gs.Node | None, cause: str) -> None:
        self.node = "" if node is None else f"{node.op} {node_name(node)}"
        super().__init__(f"{cause} ({self.node})" if self.node else cause)


@dataclass(frozen=True)
class End:
    """A place that a value's elements come to: input number `input` of a node (None: an output of the graph).

    index: of that input's shape, which element each one is. gain: what they were multiplied by on the way.
    """

    node: NodeTrace | None
    input: int
    value: str
    index: Index
    gain: float


@dataclass(frozen=True)
class Source:
    """A layer whose outputs go somewhere: `value` is what it gives, its bias included.

    offset: where its bias is stored, None if it has none. adds: the node behind it that adds the bias, if one does.
    channel, row: of each element of the value, its output number of the layer, and the rest of its position.
    """

    layer: Layer
    value: str
    offset: Offset | None
    adds: gs.Node | None
    channel: Index
    row: Index


class Flow:
    """Follows values through a traced graph; for many questions about one."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.traced = groups, groups.traced
        self.nodes = {n.node.outputs[0].name: n for n in self.traced.nodes if n.node.outputs}
        self.makers = {t.name: n for n in self.traced.nodes for t in n.node.outputs if t.name}
        self.readers: dict[str, list[tuple[NodeTrace, int]]] = {}
        for node in self.traced.nodes:
            for i, tensor in enumerate(node.node.inputs):
                if tensor.name:
                    self.readers.setdefault(tensor.name, []).append((node, i))
        self.outputs = {t.name for t in self.traced.graph.outputs}
        self.layers = {layer.node.outputs[0].name: layer for layer in find_layers(groups)}
        self.offsets = Offsets(groups)
        self.graph_makers: Mapping[str, gs.Node] = {name: n.node for name, n in self.makers.items()}
        self._sources: dict[str, Source] = {}
        self._ends: dict[str, list[End]] = {}

    def shape(self, value: str) -> tuple[int, ...]:
        """A value's shape, as tracing assumed it."""
        return self.traced.facts.shapes.get(value) or ()

    def stored(self, value: str) -> bool:
        """Whether a value is stored, or computed of what is."""
        while value not in self.traced.constants and value not in self.traced.facts.values:
            maker = self.makers.get(value)
            if maker is None or not maker.node.inputs or not self.passes(maker.node, 0):
                return False
            value = maker.node.inputs[0].name
        return True

    # ------------------------------------------------------------------ one step

    def scale(self, node: gs.Node, at: int) -> float | None:
        """The constant that a node multiplies its input `at` by; None if it does something else."""
        if node.domain or at not in SCALES.get(node.op, ()) or len(node.inputs) != 2:
            return None
        other = self.traced.facts.values.get(node.inputs[1 - at].name)
        if other is None or other.size != 1 or other.dtype.kind != "f" or not float(other.reshape(-1)[0]):
            return None
        one = float(other.reshape(-1)[0])
        return one if node.op == "Mul" else 1 / one

    def passes(self, node: gs.Node, at: int) -> bool:
        """Whether a node only moves the elements of its input `at`."""
        if node.domain or node.op not in PASSES or at != 0:
            return False
        return node.op in STILL or all(not t.name or t.name in self.traced.facts.values for t in node.inputs[1:])

    def used(self, value: str) -> bool:
        """Whether anything reads a value."""
        return value in self.readers or value in self.outputs

    def step(self, node: gs.Node, index: Index, output: int) -> Index | None:
        """The index map behind a node that only moves elements; None where it can't be told."""
        if node.op in STILL:
            return index if output == 0 else None
        return moved(self.traced, node, index, output)

    # ------------------------------------------------------------------ ways

    def ends(self, value: str) -> list[End]:
        """All places that a value's elements come to, by way of nodes that only move or scale them."""
        if value not in self._ends:
            size = math.prod(self.shape(value))
            self._ends[value] = list(self._follow(value, np.arange(size).reshape(self.shape(value)), 1.0))
        return self._ends[value]

    def _follow(self, value: str, index: Index, gain: float) -> Iterator[End]:
        if value in self.outputs:
            yield End(None, 0, value, index, gain)
        for node, at in self.readers.get(value, []):
            if node.node.op in READS_SHAPE and not node.node.domain:
                continue
            scale = self.scale(node.node, at)
            if scale is not None:
                yield from self._follow(node.node.outputs[0].name, index, gain * scale)
                continue
            onward: list[tuple[str, Index | None]] = [("", None)]
            if self.passes(node.node, at):
                onward = [(t.name, self.step(node.node, index, i)) for i, t in enumerate(node.node.outputs) if t.name]
            if any(i is None and (not name or self.used(name)) for name, i in onward):
                yield End(node, at, value, index, gain)
                continue
            for name, found in onward:
                if found is not None:
                    yield from self._follow(name, found, gain)

    def source(self, value: str) -> Source:
        """The layer that a value's elements come from. Raises Obstacle naming what stands between."""
        seen = value
        while True:
            layer = self._layer_of(seen)
            if layer is not None:
                return self._source(layer)
            node = self.makers.get(seen)
            if node is None:
                raise Obstacle(None, f"{seen} is {'stored' if self.stored(seen) else 'an input of the graph'}, no layer's output")
            at = next((i for i, t in enumerate(node.node.inputs) if t.name and self.scale(node.node, i) is not None), 0)
            if not node.node.inputs or not (self.scale(node.node, at) is not None or self.passes(node.node, at)):
                raise Obstacle(node.node, "a node between does more than move or scale channels, as rotary embeddings and norms do")
            seen = node.node.inputs[at].name

    def _layer_of(self, value: str) -> Layer | None:
        """The layer that gives a value, by itself or with the node that adds its bias."""
        if value in self.layers:
            return self.layers[value]
        node = self.makers.get(value)
        if node is None or node.node.domain or node.node.op not in ADDS:
            return None
        for tensor in node.node.inputs:
            layer = self.layers.get(tensor.name)
            if layer is not None and self._source(layer).value == value:
                return layer
        return None

    def _source(self, layer: Layer) -> Source:
        out = layer.node.outputs[0].name
        if out not in self._sources:
            offset, adds = self.bias(layer)
            value = out if adds is None else adds.outputs[0].name
            if layer.node.attrs.get("activation"):
                raise Obstacle(layer.node, "it applies an activation to what it gives")
            layout = result_layout(layer)
            if layout is None or math.prod(layout.split) != math.prod(self.shape(out)) or self.shape(value) != self.shape(out):
                raise Obstacle(layer.node, "its result's axes are not plain dims")
            order = layout.canonical(np.arange(math.prod(layout.split)).reshape(self.shape(out)))  # (parts, rows, outputs)
            numbers = np.empty((2, order.size), np.int64)
            parts, rows, outputs = order.shape
            numbers[0][order.reshape(-1)] = np.broadcast_to(np.arange(parts * outputs).reshape(parts, 1, outputs), order.shape).reshape(-1)
            numbers[1][order.reshape(-1)] = np.broadcast_to(np.arange(rows).reshape(1, rows, 1), order.shape).reshape(-1)
            self._sources[out] = Source(layer, value, offset, adds, numbers[0], numbers[1])
        return self._sources[out]

    def bias(self, layer: Layer) -> tuple[Offset | None, gs.Node | None]:
        """Where a layer's bias is stored, and the node behind it that adds it. Raises Obstacle for one that is shared or computed."""
        slot, inputs = layer.linear.bias, layer.node.inputs
        own = inputs[slot].name if slot is not None and slot < len(inputs) else ""
        found = self.offsets.of(layer)
        if own:
            place = place_of(self.traced, own, self.graph_makers)
            if not isinstance(found, Offset) or place is None or place.name != found.place.name:
                raise Obstacle(layer.node, "its bias is shared with other nodes, or computed")
            return found, None
        if not isinstance(found, Offset):
            return None, None
        behind = self.readers[layer.node.outputs[0].name][0][0].node
        return (found, behind) if behind.op in ADDS and not behind.domain else (None, None)

    def tenants(self, layer: Layer) -> set[int]:
        """Ids of a layer's node and of others whose weights are other elements of the same stored tensor."""
        mine = layer.place.index
        found = {id(layer.node)}
        for other in self.layers.values():
            theirs = other.place.index if other.place.name == layer.place.name else None
            if mine is not None and theirs is not None and not np.isin(mine, theirs).any():
                found.add(id(other.node))
        return found

    def owned(self, name: str, users: set[int]) -> None:
        """Raises Obstacle if a stored tensor is read, however moved, by another node than those of `users` (ids)."""
        waiting, seen = [name], {name}
        while waiting:
            value = waiting.pop()
            if value in self.outputs:
                raise Obstacle(None, f"{name} is an output of the graph")
            for node, at in self.readers.get(value, []):
                if id(node.node) in users or node.node.op in READS_SHAPE:
                    continue
                if not self.passes(node.node, at):
                    raise Obstacle(node.node, f"{name} is read by another node too")
                new = [t.name for t in node.node.outputs if t.name and t.name not in seen]
                seen.update(new)
                waiting += new

