"""Passes that put factors on values: gates that are inputs of the graph, and zeros in the place of branches that `drop_branches` drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Gate:
    """Value v becomes g·v, or g·v + (1 − g)·o: g and o are new inputs of the graph.

    name, shape: of g, which is spread over v. other: name of o, which has v's shape or is spread over it; "" for none. dtype: of v.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    other: str = ""
    other_shape: tuple[Any, ...] = ()


def insert_gates(graph: gs.Graph, gates: Mapping[str, Sequence[Gate]]) -> int:
    """Gates values, each one by its gates in turn; every reader of the value, and an output of the graph, gets the gated one.

    before -> after: s = Add(x, v) -> s = Add(x, Mul(v, g)), g an input. Returns the number of gates; those that are there count as done.
    """
    there = {t.name for t in graph.inputs}
    made = {t.name: (node, i) for node in graph.nodes for i, t in enumerate(node.outputs) if t.name}
    behind: dict[int, list[gs.Node]] = {}
    inserted = 0
    for value, wanted in gates.items():
        node, index = made[value]
        for gate in wanted:
            if gate.name in there:
                continue
            final = node.outputs[index]
            inner = gs.Variable(f"{final.name}/open{inserted}", dtype=final.dtype, shape=final.shape)
            node.outputs[index] = inner
            behind.setdefault(id(node), [])[:0] = _gated(graph, gate, inner, final)
            inserted += 1
    graph.nodes[:] = [n for node in list(graph.nodes) for n in (node, *behind.get(id(node), ()))]
    return inserted


def _gated(graph: gs.Graph, gate: Gate, inner: gs.Variable, final: gs.Variable) -> list[gs.Node]:
    factor = gs.Variable(gate.name, dtype=gate.dtype, shape=list(gate.shape))
    graph.inputs.append(factor)
    if not gate.other:
        return [gs.Node("Mul", gate.name, {}, [inner, factor], [final])]
    other = gs.Variable(gate.other, dtype=gate.dtype, shape=list(gate.other_shape))
    graph.inputs.append(other)
    names = [f"{gate.name}/{part}" for part in ("difference", "kept")]
    difference, kept = (gs.Variable(name, dtype=gate.dtype) for name in names)
    return [
        gs.Node("Sub", names[0], {}, [inner, other], [difference]),
        gs.Node("Mul", names[1], {}, [difference, factor], [kept]),
        gs.Node("Add", gate.name, {}, [kept, other], [final]),
    ]


def zero_branches(graph: gs.Graph, replace: Mapping[str, str], inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> int:
    """What `drop_branches` drops counts as zero, and stays in the graph: the other way to the same outputs, for proofs.

    before -> after: s = Add(x, F(x)) -> s = Add(x, Mul(F(x), 0)), for {s: x}. inputs, outputs: not looked at. Returns the number of
    branches that became zero. Raises KeyError where a value is not in the graph.
    """
    made = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
    before: dict[int, list[gs.Node]] = {}
    count = 0
    for value, by in replace.items():
        node = made[value]
        for i, tensor in enumerate(node.inputs):
            if tensor.name == by or _end(replace, tensor.name) == _end(replace, by):
                continue
            out = gs.Variable(f"{tensor.name}/zero{count}", dtype=tensor.dtype, shape=tensor.shape)
            zero = gs.Constant(f"{out.name}/factor", np.zeros((), np.dtype(tensor.dtype or np.float32)))
            before.setdefault(id(node), []).append(gs.Node("Mul", out.name, {}, [tensor, zero], [out]))
            node.inputs[i] = out
            count += 1
    graph.nodes[:] = [n for node in list(graph.nodes) for n in (*before.get(id(node), ()), node)]
    return count


@dataclass(frozen=True)
class Scale:
    """Input number `place` of a node, a value of so many axes, is multiplied by factors along some of them. dtype: of the value."""

    place: int
    rank: int
    dtype: Any
    axes: Mapping[int, Sequence[float]]


def scale_inputs(graph: gs.Graph, scales: Mapping[str, Scale]) -> int:
    """Puts factors on inputs of nodes, which are named by their first output.

    before -> after: y = MatMul(x, w) -> y = MatMul(Mul(x, s), w). Returns the number of inputs scaled; not idempotent. Raises KeyError
    where a node is not in the graph.
    """
    made = {node.outputs[0].name: node for node in graph.nodes if node.outputs}
    before: dict[int, gs.Node] = {}
    for name, scale in scales.items():
        node = made[name]
        factor = np.ones([1] * scale.rank)
        for axis, along in scale.axes.items():
            factor = factor * np.asarray(along).reshape([-1 if a == axis else 1 for a in range(scale.rank)])
        tensor = node.inputs[scale.place]
        out = gs.Variable(f"{name}/scaled{scale.place}", dtype=tensor.dtype, shape=tensor.shape)
        by = gs.Constant(f"{out.name}/factor", factor.astype(np.dtype(scale.dtype)))
        before[id(node)] = gs.Node("Mul", out.name, {}, [tensor, by], [out])
        node.inputs[scale.place] = out
    graph.nodes[:] = [n for node in list(graph.nodes) for n in (before.get(id(node)), node) if n is not None]
    return len(scales)


def _end(replace: Mapping[str, str], value: str) -> str:
    seen = set()
    while value in replace and value not in seen:
        seen.add(value)
        value = replace[value]
    return value
