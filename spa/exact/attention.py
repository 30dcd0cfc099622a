"""Exact rewrites of attention, carried out on the weights of one traced graph.

    key bias        softmax(q·(k + b)) = softmax(q·k)                                   b := 0
    value bias      W_O (P (v + b)) = W_O P v + W_O b                                   b := 0, b_O += W_O b
    QK basis        q·k = x̃ᵀ W̃_Qᵀ W̃_K ỹ,      W̃ = [W b]                                 W̃_Q := T_q W̃_Q, W̃_K := T_k W̃_K
    VO basis        W_O P ṽ = W_O P W̃_V ỹ                                               W̃_V := T_v W̃_V, W_O := W_O T_oᵀ

T from `spa.exact.basis`, a head at a time; queries that share keys (grouped, or one for all) share the basis and are stacked.
A head that is in its basis already stays as it is, so that each rewrite is idempotent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spa.exact.basis import is_singular_basis, singular_basis
from spa.exact.flow import Flow, Obstacle, Source
from spa.exact.products import Product, Scores, Side, Values, feeds_shares, products, reads_shares, scores_of, values_of
from spa.exact.softmax import cancelled, sums_to_one
from spa.exact.weights import Weights
from spa.graph.linear import Layer
from spa.graph.offsets import Missing, Offset
from spa.graph.trace import node_name

Array = NDArray[np.float64]
ENOUGH = 64  # spacings of the type: what counts as being in the basis


@dataclass(frozen=True)
class Step:
    """One place of one rewrite. done: how many heads, or channels, changed; 0 with the cause in `why` if it was left alone."""

    rewrite: str
    place: str
    done: int
    why: str = ""


@dataclass(frozen=True)
class Found:
    """What attention-like products a graph has. left: (kind, place) -> why such a product is none of the two kinds."""

    flow: Flow
    scores: tuple[Scores, ...]
    values: tuple[Values, ...]
    left: Mapping[tuple[str, str], str] = field(default_factory=dict)


def find(flow: Flow) -> Found:
    """All products whose heads can be followed to their weights, and why others can't."""
    scores, values = [], []
    left: dict[tuple[str, str], str] = {}
    for product in products(flow):
        place = node_name(product.node.node)
        weighs = reads_shares(flow, product)
        if not weighs:
            try:
                scores.append(scores_of(flow, product))
                continue
            except Obstacle as error:
                if feeds_shares(flow, product):
                    left["qk", place] = str(error)
                    continue
        sides = [at for at in (product.left, product.right) if at not in weighs] or [product.left, product.right]
        for at in sides:
            try:
                values.append(values_of(flow, product, at))
                break
            except Obstacle as error:
                if weighs:
                    left["vo", place] = str(error)
    for node in flow.traced.nodes:
        if node.signature is not None and node.signature.roles:
            why = f"one operator holds the whole attention ({node.node.op} {node_name(node.node)}); export it as single operators"
            left |= {(kind, node_name(node.node)): why for kind in ("qk", "vo")}
    return Found(flow, tuple(scores), tuple(values), left)


def place_of(product: Product) -> str:
    """How a product is called in reports."""
    return node_name(product.node.node)


# -------------------------------------------------------------------------- biases


def drop_key_bias(found: Found, scores: Scores, weights: Weights) -> int:
    """Sets the bias of the keys to zero; returns how many channels had one. Raises Obstacle where it does not cancel."""
    key, _ = cancelled(found.flow, scores)
    bias = weights.bias(key.source)
    if bias is None:
        raise Obstacle(None, "the keys have no bias")
    used = np.unique(key.heads)
    count = int(np.count_nonzero(bias[used]))
    if count:
        bias[used] = 0.0
        weights.put_bias(key.source, bias)
    return count


def check_folds(found: Found, values: Values, weights: Weights) -> NDArray[np.float64]:
    """(channels,) the bias of the values, other channels of the layer zero. Raises Obstacle where it does not fold."""
    sums_to_one(found.flow, values)
    bias = weights.bias(values.side.source)
    used = np.unique(values.side.heads)
    if bias is None or not bias[used].any():
        raise Obstacle(None, "the values have no bias")
    mine = np.zeros_like(bias)
    mine[used] = bias[used] * values.side.gain * values.product.gain
    return mine


def missing_room(found: Found, values: Values) -> list[tuple[Layer, Missing]]:
    """Layers that read the values and have no place for a constant. Raises Obstacle for a bias that can't be changed."""
    rooms = []
    for reader in values.readers:
        offset, _ = found.flow.bias(reader.layer)
        if offset is None:
            room = found.flow.offsets.of(reader.layer)
            if isinstance(room, Offset):
                raise Obstacle(reader.layer.node, "a norm follows that would take up the bias")
            rooms.append((reader.layer, room))
    return rooms


def fold_value_bias(found: Found, values: Values, weights: Weights) -> int:
    """Moves the bias of the values behind the layers that read them; returns how many channels had one. Raises Obstacle."""
    moved = check_folds(found, values, weights)
    offsets = []
    for reader in values.readers:  # all of them are asked before any is changed
        offset, adds = found.flow.bias(reader.layer)
        if offset is None:
            raise Obstacle(reader.layer.node, "there is no place for a bias")
        found.flow.owned(offset.place.name, {id(adds if adds is not None else reader.layer.node)})
        offsets.append(offset)
    for reader, offset in zip(values.readers, offsets, strict=True):
        matrix = weights.matrix(reader.layer)
        change = sum(matrix[:, c] @ moved[values.side.heads[h]] for c, h in zip(reader.blocks, reader.heads, strict=True))
        weights.add_bias(offset, reader.layer, np.asarray(change) * reader.gain)
    bias = weights.bias(values.side.source)
    assert bias is not None
    bias[np.unique(values.side.heads)] = 0.0
    weights.put_bias(values.side.source, bias)
    return int(np.count_nonzero(moved))


# -------------------------------------------------------------------------- bases


class _Rows:
    """A layer's outputs with their bias: [W b], changed head by head."""

    def __init__(self, source: Source, weights: Weights) -> None:
        self.source, self.weights = source, weights
        matrix, bias = weights.matrix(source.layer), weights.bias(source)
        self.rows = matrix if bias is None else np.concatenate([matrix, bias[:, None]], axis=1)

    def head(self, channels: NDArray[np.int64]) -> Array:
        """(columns, d) a head's weights."""
        return np.asarray(self.rows[channels].T)

    def turn(self, channels: NDArray[np.int64], basis: Array) -> None:
        """Puts a head into another basis."""
        self.rows[channels] = basis @ self.rows[channels]

    def put(self) -> None:
        """Holds the new weights."""
        columns = self.source.layer.columns
        self.weights.put_matrix(self.source.layer, self.rows[:, :columns])
        if self.rows.shape[1] > columns:
            self.weights.put_bias(self.source, self.rows[:, columns])


def _precision(weights: Weights, *layers: Layer) -> float:
    return ENOUGH * max(weights.precision(x.place.name) for x in layers)


def turn_scores(scores: Scores, weights: Weights) -> int:
    """Puts queries and keys into their singular basis, heads that meet together; returns how many heads changed."""
    left = _Rows(scores.left.source, weights)
    same = scores.right.source.layer is scores.left.source.layer
    right = left if same else _Rows(scores.right.source, weights)
    precision = _precision(weights, scores.left.source.layer, scores.right.source.layer)
    turned = 0
    for ones, others in scores.parts:
        a = np.concatenate([left.head(scores.left.heads[i]) for i in ones])
        b = np.concatenate([right.head(scores.right.heads[i]) for i in others])
        if is_singular_basis(a, b, precision):
            continue
        ta, tb, _ = singular_basis(a, b)
        for i in ones:
            left.turn(scores.left.heads[i], ta)
        for i in others:
            right.turn(scores.right.heads[i], tb)
        turned += len(others)
    if turned:
        left.put()
        if not same:
            right.put()
    return turned


def turn_values(values: Values, weights: Weights) -> int:
    """Puts values and the columns that read them into their singular basis; returns how many heads changed."""
    side: Side = values.side
    rows = _Rows(side.source, weights)
    matrices = [weights.matrix(r.layer) for r in values.readers]
    precision = _precision(weights, side.source.layer, *(r.layer for r in values.readers))
    turned = 0
    for head, channels in enumerate(side.heads):
        mine = [(m, c) for m, r in zip(matrices, values.readers, strict=True) for c, h in zip(r.blocks, r.heads, strict=True) if h == head]
        if not mine:
            continue
        a, b = np.concatenate([m[:, c] for m, c in mine]), rows.head(channels)
        if is_singular_basis(a, b, precision):
            continue
        ta, tb, _ = singular_basis(a, b)
        for m, c in mine:
            m[:, c] = m[:, c] @ ta.T
        rows.turn(channels, tb)
        turned += 1
    if turned:
        rows.put()
        for m, r in zip(matrices, values.readers, strict=True):
            weights.put_matrix(r.layer, m)
    return turned
