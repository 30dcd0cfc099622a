"""The passes that a turned residual stream needs: norms as sums of squares, and what was folded taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.constants import drop_dead_nodes
from passes.weights import Weight


@dataclass(frozen=True)
class Turn:
    """What to change. Nodes are named by their first output; a width is the number of positions that a mean runs over.

    factors: stored value -> axis -> matrix (new, old) that it is multiplied by along this axis. skipped: node -> the input that is
    its result from now on. means: mean over the last axis -> width. norms: norm over the last axis -> (width, epsilon). turned: (node,
    input) -> matrix (old, new) that the input is multiplied by, where a stored value can't take it up.
    """

    factors: Mapping[str, Mapping[int, NDArray[np.floating]]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    means: Mapping[str, int] = field(default_factory=dict)
    norms: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    turned: Mapping[tuple[str, int], NDArray[np.floating]] = field(default_factory=dict)


def turn_stream(graph: gs.Graph, turn: Turn) -> int:
    """Multiplies stored values, and makes nodes fit.

    before -> after: Gather(table, ids) -> Gather(table Q, ids); y = ReduceMean(x²) -> y = ReduceSum(x²) · 1/width, which stays what it is
    when positions that are zero go; y = LayerNormalization(x, γ, β) -> y = x / √(ReduceSum(x²) · 1/width + ε); Mul(γ, x) -> x.
    Not idempotent: a factor counts every time. Returns the number of changes.
    """
    surgeon = _Surgeon(graph)
    changed = sum(_multiply(tensor, turn.factors[name]) for name, tensor in _constants(graph).items() if name in turn.factors)
    for node in list(graph.nodes):
        name = node.outputs[0].name if node.outputs else ""
        for where in [k for n, k in turn.turned if n == name]:
            surgeon.multiplied(node, where, turn.turned[name, where])
        if name in turn.means:
            surgeon.mean(node, turn.means[name])
        elif name in turn.norms:
            surgeon.norm(node, *turn.norms[name])
        elif name not in turn.skipped:
            surgeon.nodes.append(node)
        else:
            surgeon.skip(node, turn.skipped[name])
        changed += name in turn.means or name in turn.norms or name in turn.skipped
    graph.nodes[:] = surgeon.nodes
    drop_dead_nodes(graph)
    return changed + len(turn.turned)


def _constants(graph: gs.Graph) -> dict[str, gs.Constant]:
    found = {t.name: t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    for node in graph.nodes:
        held = node.attrs.get("value") if node.op == "Constant" else None
        if isinstance(held, gs.Constant):
            found[node.outputs[0].name] = held
    return found


def _multiply(tensor: gs.Constant, axes: Mapping[int, NDArray[np.floating]]) -> int:
    values = tensor._values
    array = np.asarray(values.load() if isinstance(values, Weight) else tensor.values)
    for axis, matrix in axes.items():
        turned = np.tensordot(np.moveaxis(array, axis, -1).astype(np.float64), matrix.T, axes=1)
        array = np.ascontiguousarray(np.moveaxis(turned, -1, axis)).astype(array.dtype)
    tensor._values = array
    return 1


class _Surgeon:
    """Nodes in order, with new ones among them."""

    def __init__(self, graph: gs.Graph) -> None:
        self.nodes: list[gs.Node] = []
        self.taken = set(graph.tensors())
        self.opset = next((int(d.version) for d in graph.import_domains or () if d.domain in ("", "ai.onnx")), int(graph.opset))

    def name(self, stem: str) -> str:
        """A name that is free."""
        while stem in self.taken:
            stem += "_"
        self.taken.add(stem)
        return stem

    def add(self, op: str, stem: str, inputs: list[gs.Tensor], out: gs.Variable | None = None, **attrs: Any) -> gs.Variable:
        """A node behind those there are; its output gets a name of its own unless one is given."""
        result = out or gs.Variable(self.name(stem), dtype=np.float32)
        self.nodes.append(gs.Node(op, self.name(f"{stem}/{op}"), attrs, inputs, [result]))
        return result

    def number(self, stem: str, value: float) -> gs.Constant:
        """One number as an operand."""
        return gs.Constant(self.name(stem), np.array(value, np.float32))

    def total(self, stem: str, x: gs.Tensor, keepdims: int) -> gs.Variable:
        """Sum over the last axis."""
        if self.opset >= 13:
            axes = gs.Constant(self.name(f"{stem}/axes"), np.array([-1], np.int64))
            return self.add("ReduceSum", f"{stem}/total", [x, axes], keepdims=keepdims)
        return self.add("ReduceSum", f"{stem}/total", [x], axes=[-1], keepdims=keepdims)

    def mean(self, node: gs.Node, width: int) -> None:
        """A mean as a sum over a fixed width."""
        out = node.outputs[0]
        x = node.inputs[0]
        total = self.total(out.name, x, int(node.attrs.get("keepdims", 1)))
        node.outputs.clear()
        self.add("Mul", out.name, [total, self.number(f"{out.name}/share", 1 / width)], out)

    def norm(self, node: gs.Node, width: int, epsilon: float) -> None:
        """A norm in single steps, without scale and bias."""
        x, out = node.inputs[0], node.outputs[0]
        stem = out.name
        node.outputs.clear()
        total = self.total(stem, self.add("Mul", f"{stem}/square", [x, x]), 1)
        mean = self.add("Mul", f"{stem}/mean", [total, self.number(f"{stem}/share", 1 / width)])
        root = self.add("Sqrt", f"{stem}/root", [self.add("Add", f"{stem}/sum", [mean, self.number(f"{stem}/epsilon", epsilon)])])
        self.add("Div", stem, [x, root], out)

    def multiplied(self, node: gs.Node, where: int, matrix: NDArray[np.floating]) -> None:
        """An input times a matrix."""
        x = node.inputs[where]
        held = gs.Constant(self.name(f"{x.name}/turn"), np.ascontiguousarray(matrix, np.float32))
        node.inputs[where] = self.add("MatMul", f"{x.name}/turned", [x, held])

    def skip(self, node: gs.Node, where: int) -> None:
        """Readers of a node read its input."""
        source = node.inputs[where]
        for reader in list(node.outputs[0].outputs):
            for i, tensor in enumerate(reader.inputs):
                if tensor is node.outputs[0]:
                    reader.inputs[i] = source
        node.inputs.clear()
        node.outputs.clear()
