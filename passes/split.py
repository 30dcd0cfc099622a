"""The pass that makes several branches of one, each with a part of the hidden channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.remove import DELETE, Patch, Removal, cut_constant


@dataclass(frozen=True)
class Branch:
    """Nodes between the layers that make some channels and those that sum them, both among them; named by their first output.

    exits: the nodes that sum, and the input number of their bias (None: they have none). parts: what each branch loses.
    """

    nodes: tuple[str, ...]
    exits: Mapping[str, int | None]
    parts: tuple[Removal, ...]


def split_branches(graph: gs.Graph, branches: Sequence[Branch]) -> int:
    """Replaces each branch by several that are summed; the bias of the sum goes with the first.

    before -> after: y = W₂ f(W₁ x + b₁) + b₂ -> y = (W₂' f(W₁' x + b₁') + b₂) + W₂'' f(W₁'' x + b₁''), where W' and W'' are the first
    and the last hidden channels, and y keeps its name. Nodes and constants of part i are called NAME/part{i}. A branch whose nodes are
    not in the graph (it was split before) is left alone. Returns the number of branches that were split.
    """
    by_output = {n.outputs[0].name: n for n in graph.nodes if n.outputs}
    done = 0
    for branch in branches:
        if not all(name in by_output for name in branch.nodes):
            continue
        _split(graph, branch, [by_output[name] for name in branch.nodes])
        done += 1
    return done


def _split(graph: gs.Graph, branch: Branch, nodes: Sequence[gs.Node]) -> None:
    own = {id(n): n for n in nodes}
    inside = {t.name for n in nodes for t in n.outputs}
    behind: dict[int, list[gs.Node]] = {id(n): [] for n in nodes}
    sums: dict[str, list[gs.Tensor]] = {name: [] for name in branch.exits}
    taken = set(graph.tensors())
    for number, removal in enumerate(branch.parts):
        made: dict[str, gs.Tensor] = {}
        for node in nodes:
            name = node.outputs[0].name
            clone = _clone(node, number, removal, made, inside, taken)
            if name in branch.exits:
                sums[name].append(clone.outputs[0])
                slot = branch.exits[name]
                if number and slot is not None:
                    _without(clone, slot)
            behind[id(node)].append(clone)
    for node in nodes:
        name = node.outputs[0].name
        if name in branch.exits:
            behind[id(node)] += _summed(name, node.outputs[0], sums[name], taken)
    for node in nodes:  # an exit's output has become that of the last sum
        node.inputs.clear()
        node.outputs.clear()
    graph.nodes[:] = [n for node in list(graph.nodes) for n in behind.get(id(node), [node]) if id(n) not in own]


def _clone(
    node: gs.Node, number: int, removal: Removal, made: dict[str, gs.Tensor], inside: set[str], taken: set[str]
) -> gs.Node:  # fmt: skip
    """One node of one part; `made` holds the tensors of this part by the names of the original ones."""
    name = node.outputs[0].name
    attributes: dict[str, Any] = dict(node.attrs)
    for key, value in removal.attributes.get(name, {}).items():
        if value is DELETE:
            attributes.pop(key, None)
        else:
            attributes[key] = value
    inputs: list[gs.Tensor] = []
    for i, tensor in enumerate(node.inputs):
        given = removal.inputs.get((name, i))
        if isinstance(given, Patch):
            raise ValueError(f"{name} has a shape that is computed at run time")
        if given is not None:
            inputs.append(gs.Constant(_fresh(f"{name}/{node.op}.{i}/part{number}", taken), np.asarray(given, order="C")))
        elif tensor.name in removal.cuts or tensor.name in inside:
            if tensor.name not in made:
                made[tensor.name] = _part(tensor, number, removal, taken)
            inputs.append(made[tensor.name])
        else:
            inputs.append(tensor)
    for index in sorted(i for n, i in removal.inputs if n == name and i >= len(node.inputs)):
        value = removal.inputs[name, index]
        inputs += [gs.Variable.empty() for _ in range(index - len(inputs))]
        inputs.append(gs.Constant(_fresh(f"{name}/{node.op}.{index}/part{number}", taken), np.asarray(value, order="C")))
    outputs: list[gs.Tensor] = []
    for tensor in node.outputs:
        made[tensor.name] = _part(tensor, number, removal, taken) if tensor.name else tensor
        outputs.append(made[tensor.name])
    return gs.Node(node.op, f"{node.name or name}/part{number}", attributes, inputs, outputs, node.domain)


def _part(tensor: gs.Tensor, number: int, removal: Removal, taken: set[str]) -> gs.Tensor:
    """A tensor of one part: cut if it is stored, under a name of its own."""
    name = _fresh(f"{tensor.name}/part{number}", taken)
    held: Any = tensor
    if isinstance(tensor, gs.Variable) and tensor.inputs and tensor.inputs[0].op == "Constant":
        held = tensor.inputs[0].attrs.get("value")
    if isinstance(held, gs.Constant):
        part = gs.Constant(name, held._values, held.data_location)
        cut_constant(part, removal.cuts.get(tensor.name, {}))
        return part
    shape = None if tensor.shape is None else list(tensor.shape)
    for axis, size in removal.shapes.get(tensor.name, {}).items():
        if shape is not None and axis < len(shape) and isinstance(shape[axis], int):
            shape[axis] = size
    return gs.Variable(name, dtype=tensor.dtype, shape=shape)


def _summed(name: str, out: gs.Tensor, parts: Sequence[gs.Tensor], taken: set[str]) -> list[gs.Node]:
    """Adds that sum the parts, the last one giving `out`."""
    out.inputs.clear()
    adds: list[gs.Node] = []
    total = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        last = i == len(parts) - 1
        result = out if last else gs.Variable(_fresh(f"{name}/sum{i}", taken), dtype=out.dtype, shape=out.shape)
        adds.append(gs.Node("Add", f"{name}/Add{i}", {}, [total, part], [result]))
        total = result
    return adds


def _without(node: gs.Node, slot: int) -> None:
    if slot == len(node.inputs) - 1:
        del node.inputs[slot]
    elif slot < len(node.inputs):
        node.inputs[slot] = gs.Variable.empty()


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
