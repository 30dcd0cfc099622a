"""What softmax makes of a product: constants along its rows cancel in front of it, and behind it rows sum to one.

softmax(s + c)_n = softmax(s)_n            for c that is the same for all n: the key bias, since q·(k_n + b) = q·k_n + q·b
Σ_n p_n (v_n + b) = Σ_n p_n v_n + b        for p that sum to one: the value bias
"""

from __future__ import annotations

import math

import numpy as np

from spa.exact.flow import Flow, Index, Obstacle
from spa.exact.products import Scores, Side, Values
from spa.graph.linear import layout_of
from spa.graph.trace import NodeTrace
from spa.signatures.arithmetic import MASKS, READS_SHAPE, SHIFTS
from spa.signatures.table import dims_of

MASKED = -1e4  # and less: what masks are filled with; exp of that far below the largest score of a row is zero


def cancelled(flow: Flow, scores: Scores) -> tuple[Side, Side]:
    """The side whose bias cancels, and the other one. Raises Obstacle where it does not cancel."""
    product, shape = scores.product, flow.shape(scores.product.result)
    signature = product.node.signature
    assert signature is not None
    order = product.layout(signature.outputs[0], product.shared, product.free[0], product.free[1]).canonical(
        np.arange(math.prod(shape)).reshape(shape))  # (shared, left, right)  # fmt: skip
    _, left, right = order.shape
    number = np.empty(order.size, np.int64)
    number[order.reshape(-1)] = np.arange(order.size)
    rows = _rows_of_softmax(flow, product.result, number.reshape(shape))
    if all((r // right == r[:, :1] // right).all() for r in rows):
        key, query = scores.right, scores.left
    elif all((r // (left * right) == r[:, :1] // (left * right)).all() and (r % right == r[:, :1] % right).all() for r in rows):
        key, query = scores.left, scores.right
    else:
        raise Obstacle(product.node.node, "the softmax does not run over the rows of one operand")
    if (key.of != key.of[:, :1]).any():
        raise Obstacle(product.node.node, "keys of several heads stand in one row")
    return key, query


def _rows_of_softmax(flow: Flow, value: str, index: Index) -> list[Index]:
    """(rows, positions) what stands in each row that a constant cancels in, at every place the scores come to. Raises Obstacle."""
    found: list[Index] = []
    waiting, seen, beside = [(value, index)], {value}, []
    while waiting:
        value, index = waiting.pop()
        if value in flow.outputs:
            raise Obstacle(None, f"the scores {value} are an output of the graph")
        for node, at in flow.readers.get(value, []):
            if node.node.op in READS_SHAPE and not node.node.domain:
                continue
            if node.signature is not None and node.signature.cancels and at == 0:
                found.append(_along(node, index))
                continue
            for name, onward in _onward(flow, node, at, index):
                waiting.append((name, onward))
                seen.add(name)
            beside += [(node, t.name) for i, t in enumerate(node.node.inputs) if i != at and not flow.passes(node.node, at)]
    for node, other in beside:
        if other in seen:
            raise Obstacle(node.node, "it joins scores with scores")
    if not found:
        raise Obstacle(None, f"no softmax follows {value}")
    return found


def _along(node: NodeTrace, index: Index) -> Index:
    signature = node.signature
    assert signature is not None
    terms = signature.inputs[0] or ()
    sizes = {n: a.length for n, a in node.dims.items()}
    layout = layout_of(terms, sizes, (tuple(n for n in sizes if n not in signature.cancels), signature.cancels))
    if layout is None:
        raise Obstacle(node.node, "its axes are not plain dims")
    return np.asarray(layout.canonical(index), np.int64)


def _onward(flow: Flow, node: NodeTrace, at: int, index: Index) -> list[tuple[str, Index]]:
    """What a node gives where a number added to its input comes out added. Raises Obstacle for one that does something else."""
    plain = node.node
    out = plain.outputs[0].name
    if flow.scale(plain, at) is not None:
        return [(out, np.broadcast_to(index, flow.shape(out)))]
    if flow.passes(plain, at):
        steps = [(t.name, flow.step(plain, index, i)) for i, t in enumerate(plain.outputs) if t.name and flow.used(t.name)]
        if all(i is not None for _, i in steps):
            return [(n, i) for n, i in steps if i is not None]
    if not plain.domain and at in SHIFTS.get(plain.op, ()):
        if at in MASKS.get(plain.op, ()):
            _masks(flow, node, at)
        return [(out, np.broadcast_to(index, flow.shape(out)))]
    raise Obstacle(plain, "between the product and the softmax stands a node that a constant does not pass")


def _masks(flow: Flow, node: NodeTrace, at: int) -> None:
    """Raises Obstacle unless the other operand fills with what counts as minus infinity."""
    fill = flow.traced.facts.values.get(node.node.inputs[MASKS[node.node.op][at]].name)
    if fill is None or not (np.asarray(fill, np.float64) <= MASKED).all():
        raise Obstacle(node.node, "scores are replaced by values that are not known to be minus infinity")


def sums_to_one(flow: Flow, values: Values) -> None:
    """Raises Obstacle unless what weighs the values sums to one over them, whatever the inputs."""
    product, at = values.product, values.shares
    value = product.node.node.inputs[at].name
    maker = flow.makers.get(value)
    while maker is not None and not (maker.signature is not None and maker.signature.unit):
        if not flow.passes(maker.node, 0):
            raise Obstacle(maker.node, "what weighs the values need not sum to one behind it")
        maker = flow.makers.get(maker.node.inputs[0].name)
    if maker is None or maker.signature is None:
        raise Obstacle(product.node.node, "what weighs the values need not sum to one")
    out = maker.node.outputs[0].name
    ends = [e for e in flow.ends(out) if e.node is product.node and e.input == at]
    sizes = {n: a.length for n, a in maker.dims.items()}
    unit = maker.signature.unit
    layout = layout_of(maker.signature.outputs[0] or (), sizes, (tuple(n for n in sizes if n not in unit), unit))
    if len(ends) != 1 or ends[0].gain != 1.0 or layout is None:
        raise Obstacle(product.node.node, "it can't be told which shares it reads")
    order = layout.canonical(np.arange(math.prod(flow.shape(out))).reshape(flow.shape(out)))
    number = np.empty(order.size, np.int64)
    number[order.reshape(-1)] = np.arange(order.size)
    signature = product.node.signature
    assert signature is not None
    rest = tuple(n for t in signature.inputs[at] or () for n in dims_of(t) if n not in product.summed)
    rows = number[product.layout(signature.inputs[at], rest, product.summed).canonical(ends[0].index)]
    width = order.shape[-1]
    if rows.shape[-1] != width or (rows // width != rows[:, :1] // width).any() or (np.sort(rows % width) != np.arange(width)).any():
        raise Obstacle(product.node.node, f"it does not sum over whole rows of {maker.node.op} {out}")

