"""The pass that removes channels: cuts constants, and restates sizes in attributes and shape inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.weights import Weight

DELETE = object()
"""Value of an attribute that is to go."""


@dataclass(frozen=True)
class Patch:
    """Elements of a shape input that is computed at run time: `values[i]` at position `indices[i]`."""

    indices: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class Removal:
    """What to remove, in names and numbers. Nodes are named by their first output.

    cuts: stored value -> axis -> positions that stay, ascending. shapes: value -> axis -> new size.
    attributes: node -> attribute -> new value or DELETE. inputs: (node, input number) -> new constant, or a Patch.
    """

    cuts: Mapping[str, Mapping[int, NDArray[np.int64]]] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: Mapping[tuple[str, int], NDArray[np.int64] | Patch] = field(default_factory=dict)


def remove_channels(graph: gs.Graph, removal: Removal) -> int:
    """Removes channels as told. Constants keep their names; large ones are cut when they are read, not now.

    before -> after: Conv(w (64, 3, 3, 3)) -> Conv(w (48, 3, 3, 3)); Reshape(x, [0, -1, 12, 64]) -> Reshape(x, [0, -1, 8, 64]).
    Returns the number of constants, attributes and inputs that changed.
    """
    changed = 0
    cut: set[int] = set()
    for node in graph.nodes:
        held = node.attrs.get("value") if node.op == "Constant" else None
        if isinstance(held, gs.Constant) and node.outputs[0].name in removal.cuts and id(held) not in cut:
            cut_constant(held, removal.cuts[node.outputs[0].name])
            cut.add(id(held))
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name in removal.cuts and id(tensor) not in cut:
                cut_constant(tensor, removal.cuts[tensor.name])
                cut.add(id(tensor))
    changed += len(cut)
    changed += _restate(graph, removal)
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Variable) and name in removal.shapes and tensor.shape is not None:
            shape = list(tensor.shape)
            for axis, size in removal.shapes[name].items():
                if axis < len(shape) and isinstance(shape[axis], int):
                    shape[axis] = size
            tensor.shape = shape
    return changed


def cut_constant(tensor: gs.Constant, axes: Mapping[int, NDArray[np.int64]]) -> None:
    """Keeps the listed positions of each axis of a stored tensor, which is read later if it can be."""
    values = tensor._values
    if isinstance(values, Weight):
        for axis, keep in axes.items():
            values = values.take(keep, axis)
    else:
        values = tensor.values
        for axis, keep in axes.items():
            values = np.take(values, keep, axis=axis)
    tensor._values = values


def _restate(graph: gs.Graph, removal: Removal) -> int:
    by_output = {n.outputs[0].name: n for n in graph.nodes if n.outputs}
    for name, attributes in removal.attributes.items():
        for key, value in attributes.items():
            if value is DELETE:
                by_output[name].attrs.pop(key, None)
            else:
                by_output[name].attrs[key] = value
    extra: dict[int, list[gs.Node]] = {}
    opset = next((int(d.version) for d in graph.import_domains or () if d.domain in ("", "ai.onnx")), int(graph.opset))
    taken = set(graph.tensors())
    for (name, index), value in removal.inputs.items():
        node = by_output[name]
        stem = f"{name}/{node.op}.{index}"
        while stem in taken:
            stem += "_"
        taken.add(stem)
        if isinstance(value, Patch):
            before, new = _patched(node.inputs[index], value, stem, opset)
            extra.setdefault(id(node), []).append(before)
        else:
            new = gs.Constant(stem, np.asarray(value, order="C"))
        while len(node.inputs) <= index:
            node.inputs.append(gs.Variable.empty())
        node.inputs[index] = new
    if extra:
        graph.nodes[:] = [n for node in list(graph.nodes) for n in (*extra.get(id(node), ()), node)]
    return len(removal.inputs) + sum(map(len, removal.attributes.values()))


def _patched(tensor: gs.Tensor, patch: Patch, name: str, opset: int) -> tuple[gs.Node, gs.Variable]:
    """ScatterElements over a computed shape: the elements that restate a size become constants."""
    out = gs.Variable(name, dtype=np.int64, shape=None)
    indices = gs.Constant(f"{name}.at", np.array(patch.indices, np.int64))
    values = gs.Constant(f"{name}.sizes", np.array(patch.values, np.int64))
    node = gs.Node("ScatterElements" if opset >= 11 else "Scatter", name, {"axis": 0}, [tensor, indices, values], [out])
    return node, out
