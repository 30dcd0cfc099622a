"""Products of two computed operands whose channels come from layers: queries with keys, probabilities with values.

    scores[t, m, n] = Σ_d left[t, m, d] · right[t, n, d]        `Scores`: both sides made by layers
    result[t, m, d] = Σ_n shares[t, m, n] · values[t, n, d]     `Values`: made by a layer, and read by layers

t are dims that both operands have (batch, heads), m and n such of one of them. A *head* is a set of d channels that one basis can be
chosen for; which channels of a layer make one up is told by following elements (`spa.exact.flow`), so that it does not matter how an
exporter splits, transposes, repeats (grouped queries) or fuses them. Nothing here looks for an architecture, nor for an operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import numpy as np

from spa.exact.flow import Flow, Index, Obstacle, Source
from spa.graph.linear import Layer, Layout, layout_of
from spa.graph.trace import NodeTrace
from spa.graph.view import dtype_is_float
from spa.signatures import MAP, SUM
from spa.signatures.table import Operand, dims_of, kind_of

STEPS = 16  # nodes between a product and what makes shares of its scores, in either direction


@dataclass(frozen=True)
class Product:
    """A node that multiplies two computed operands: input numbers, and their dims by role."""

    node: NodeTrace
    left: int
    right: int
    shared: tuple[str, ...]
    summed: tuple[str, ...]
    free: tuple[tuple[str, ...], tuple[str, ...]]  # of the left, of the right operand

    @property
    def result(self) -> str:
        """Name of what it gives."""
        return str(self.node.node.outputs[0].name)

    @property
    def gain(self) -> float:
        """What the node multiplies the product by."""
        return float(self.node.node.attrs.get("alpha", 1.0))

    def layout(self, terms: Operand, *order: tuple[str, ...]) -> Layout:
        """Layout of an operand or of the result. Raises Obstacle where its axes are not plain dims."""
        found = layout_of(terms or (), {n: a.length for n, a in self.node.dims.items()}, order) if terms is not None else None
        if found is None:
            raise Obstacle(self.node.node, "its axes are not plain dims")
        return found


@dataclass(frozen=True)
class Side:
    """An operand that a layer makes. heads: (heads, d) the layer's channels. of: (shared, free) the head of each of its vectors."""

    source: Source
    heads: Index
    of: Index
    gain: float


@dataclass(frozen=True)
class Scores:
    """Both sides of a product that sums over channels. parts: which heads of either side meet and so share one basis."""

    product: Product
    left: Side
    right: Side
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class Reader:
    """A layer that sums the values' channels. blocks: (n, d) its columns; heads: (n,) the head that each block is of."""

    layer: Layer
    blocks: Index
    heads: Index
    gain: float


@dataclass(frozen=True)
class Values:
    """A product that mixes rows of values: the side that holds them, and who reads the result. shares: input number of the weights."""

    product: Product
    side: Side
    readers: tuple[Reader, ...]
    shares: int
    channels: tuple[str, ...]


def products(flow: Flow) -> Iterator[Product]:
    """All nodes that multiply two computed operands, in graph order."""
    for node in flow.traced.nodes:
        signature = node.signature
        pairs = [] if signature is None else [(x.data, x.weight) for x in signature.linear]
        for left, right in pairs:
            inputs = node.node.inputs
            if left > right or (right, left) not in pairs or right >= len(inputs):
                continue
            if flow.stored(inputs[left].name) or flow.stored(inputs[right].name):
                continue
            assert signature is not None
            names = [[n for t in signature.inputs[i] or () for n in dims_of(t)] for i in (left, right)]
            both = [n for n in names[0] if n in names[1]]
            summed = tuple(n for n in both if kind_of(signature, n) is SUM)
            free = tuple(tuple(n for n in side if n not in both) for side in names)
            if summed:
                yield Product(node, left, right, tuple(n for n in both if n not in summed), summed, (free[0], free[1]))


def _side(flow: Flow, product: Product, at: int, channels: tuple[str, ...], free: tuple[str, ...]) -> Side:
    """The layer behind an operand, and its channels by head. Raises Obstacle."""
    node = product.node
    source = flow.source(node.node.inputs[at].name)
    ends = flow.ends(source.value)
    mine = [e for e in ends if e.node is node and e.input == at]
    if len(mine) != 1:
        raise Obstacle(node.node, "it can't be told which channels it reads")
    layout = product.layout((node.signature.inputs if node.signature else ())[at], product.shared, free, channels)
    index = layout.canonical(np.broadcast_to(mine[0].index, flow.shape(mine[0].value)))
    rows, chosen = source.row[index], source.channel[index]
    if (rows != rows[..., :1]).any():
        raise Obstacle(node.node, "it takes positions together, not channels alone")
    heads, of = np.unique(chosen.reshape(-1, chosen.shape[-1]), axis=0, return_inverse=True)
    used = np.unique(heads)
    if len(used) != heads.size:
        raise Obstacle(node.node, "heads share channels of a layer")
    for end in ends:
        if end is not mine[0] and np.isin(source.channel[end.index], used).any():
            reader = None if end.node is None else end.node.node
            raise Obstacle(reader, f"{source.value} is {'an output of the graph' if reader is None else 'read by another node too'}")
    writable(flow, source.layer)
    if source.offset is not None:
        place = source.offset.place.name
        flow.owned(place, {id(source.layer.node if source.adds is None else source.adds)})
        _floats(flow, place, source.layer)
    return Side(source, np.asarray(heads, np.int64), np.asarray(of, np.int64).reshape(chosen.shape[:-1]), mine[0].gain)


def writable(flow: Flow, layer: Layer) -> None:
    """Raises Obstacle unless a layer's weight is its own, and holds floats."""
    flow.owned(layer.place.name, flow.tenants(layer))
    _floats(flow, layer.place.name, layer)


def _floats(flow: Flow, name: str, layer: Layer) -> None:
    if not dtype_is_float(flow.traced.constants[name].dtype):
        raise Obstacle(layer.node, f"{name} holds no floats")


def scores_of(flow: Flow, product: Product) -> Scores:
    """A product that sums over channels of two layers. Raises Obstacle."""
    left = _side(flow, product, product.left, product.summed, product.free[0])
    right = _side(flow, product, product.right, product.summed, product.free[1])
    if left.source.layer is right.source.layer and np.isin(left.heads, right.heads).any():
        raise Obstacle(product.node.node, "both operands are made of the same channels")
    met: nx.Graph[tuple[str, int]] = nx.Graph()
    for one, other in zip(left.of, right.of, strict=True):
        for a in np.unique(one):
            met.add_edges_from((("left", int(a)), ("right", int(b))) for b in np.unique(other))
    parts = []
    for component in nx.connected_components(met):
        sides = [tuple(sorted(i for s, i in component if s == name)) for name in ("left", "right")]
        parts.append((sides[0], sides[1]))
    return Scores(product, left, right, tuple(sorted(parts)))


def values_of(flow: Flow, product: Product, at: int) -> Values:
    """A product whose operand number `at` holds values that a layer makes, and whose result layers read. Raises Obstacle."""
    free = product.free[1 if at == product.right else 0]
    other = product.free[0 if at == product.right else 1]
    if not free:
        raise Obstacle(product.node.node, "its values have one channel")
    side = _side(flow, product, at, free, product.summed)
    if (side.of != side.of[:, :1]).any():
        raise Obstacle(product.node.node, "it sums over values of several heads")
    signature = product.node.signature
    assert signature is not None
    order = product.layout(signature.outputs[0], product.shared, other, free).canonical(
        np.arange(int(np.prod(flow.shape(product.result)))).reshape(flow.shape(product.result)))  # fmt: skip
    width = order.shape[-1]
    numbers = np.empty(order.size, np.int64)  # of each element: its vector and its place in that
    numbers[order.reshape(-1)] = np.arange(order.size)
    heads = side.of[:, 0]
    readers = tuple(
        _reader(flow, product, None if e.node is None else e.node, e.value, e.index, e.gain, numbers, heads, order.shape[1], width)
        for e in flow.ends(product.result)
    )
    if not readers:
        raise Obstacle(product.node.node, "nothing reads its result")
    return Values(product, side, readers, product.left if at == product.right else product.right, free)


def _reader(
    flow: Flow, product: Product, node: NodeTrace | None, value: str, index: Index, gain: float, numbers: Index, heads: Index, rows: int,
    width: int,
) -> Reader:  # fmt: skip
    layer = None if node is None else flow.layers.get(node.node.outputs[0].name)
    if node is None or layer is None or layer.data != value:
        what = "an output of the graph" if node is None else "read by a node that is no layer"
        raise Obstacle(None if node is None else node.node, f"the result of {product.result} is {what}")
    window = layer.window
    if layer.parts > 1 or (window is not None and (max(window.kernel, default=1) > 1 or any(map(any, window.pads)))):
        raise Obstacle(layer.node, "it sums over more than one position")
    writable(flow, layer)
    found = numbers[layer.rows(index)][0]  # (rows, columns)
    vector, place = np.divmod(found, width)
    of = heads[vector // rows]
    first, label = np.unique(vector[0], return_index=True, return_inverse=True)[1:]
    same = (place == place[:1]).all() and (vector == vector[:, first[label]]).all() and (of == of[:1]).all()
    if not same or (np.bincount(label) != width).any():
        raise Obstacle(layer.node, "it does not read each head as a whole")
    order = np.lexsort((place[0], label)).reshape(-1, width)
    return Reader(layer, np.asarray(order, np.int64), of[0][order[:, 0]], gain)


# -------------------------------------------------------------------------- what makes shares of scores


def feeds_shares(flow: Flow, product: Product) -> bool:
    """Whether a product's result goes to a node whose outputs sum to one, with operators on each element alone between."""
    waiting = [(product.result, 0)]
    seen = {product.result}
    while waiting:
        value, steps = waiting.pop()
        for node, _ in flow.readers.get(value, []):
            signature = node.signature
            if signature is None or steps > STEPS:
                continue
            if signature.cancels:
                return True
            alone = all(kind_of(signature, n) is MAP for n in node.dims)
            new = [(t.name, steps + 1) for t in node.node.outputs if t.name and t.name not in seen] if alone else []
            seen.update(n for n, _ in new)
            waiting += new
    return False


def reads_shares(flow: Flow, product: Product) -> list[int]:
    """The operands that come from a node whose outputs sum to one, with operators on each element alone between."""
    return [at for at in (product.left, product.right) if _from_shares(flow, product.node.node.inputs[at].name)]


def _from_shares(flow: Flow, value: str) -> bool:
    waiting, seen = [(value, 0)], {value}
    while waiting:
        value, steps = waiting.pop()
        node = flow.makers.get(value)
        if node is None or node.signature is None or steps > STEPS:
            continue
        if node.signature.unit:
            return True
        if all(kind_of(node.signature, n) is MAP for n in node.dims):
            new = [(t.name, steps + 1) for t in node.node.inputs if t.name and t.name not in seen]
            seen.update(n for n, _ in new)
            waiting += new
    return False
