"""Passes on constants that keep the function."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


def fold_constants(graph: gs.Graph, values: Mapping[str, NDArray[Any]]) -> int:
    """Replaces computed values by constants.

    before -> after: Shape(x) -> Gather(·, 1) -> s becomes the constant s. The nodes that computed it go if nothing else
    needs them. Graph outputs are left alone. Returns the number of values replaced.
    """
    outputs = {t.name for t in graph.outputs}
    changed = 0
    for node in list(graph.nodes):
        for tensor in list(node.outputs):
            if tensor.name in values and tensor.name not in outputs and isinstance(tensor, gs.Variable) and tensor.outputs:
                tensor.inputs.clear()
                tensor.to_constant(np.asarray(values[tensor.name], order="C"))
                changed += 1
    if changed:
        drop_dead_nodes(graph)
    return changed


def drop_dead_nodes(graph: gs.Graph, names: Set[str] | None = None) -> int:
    """Removes nodes whose outputs nobody reads, again and again; with `names`, only nodes of these first outputs.

    before -> after: a Cast that no node and no output reads -> nothing. Returns the number of nodes removed.
    """
    outputs = {t.name for t in graph.outputs}
    inner = _inner_names(graph)
    kept, removed = [], 0
    for node in reversed(list(graph.nodes)):
        read = any(t.name in outputs or t.name in inner or t.outputs for t in node.outputs if t.name)
        if read or (names is not None and not {t.name for t in node.outputs} & names):
            kept.append(node)
            continue
        node.inputs.clear()
        node.outputs.clear()
        removed += 1
    if removed:
        graph.nodes[:] = kept[::-1]
    return removed


def _inner_names(graph: gs.Graph) -> set[str]:
    """Names that bodies of If, Loop and Scan read."""
    names: set[str] = set()
    for node in graph.nodes:
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                names |= _inner_names(attribute) | {t.name for t in attribute.outputs}
                for inner in attribute.nodes:
                    names |= {t.name for t in inner.inputs}
    return names


def unshare_constants(graph: gs.Graph, most: int, larger: Set[str] = frozenset()) -> dict[str, str]:
    """Gives every further reader of a shared constant a copy of its own.

    before -> after: bias b read by two layers -> b and b/copy1. Exporters merge equal tensors, so that layers that have
    nothing to do with each other seem to be tied. Constants of more than `most` elements are left alone, but for those in
    `larger`: they are tied on purpose, and copying them would make the file larger. Returns {copy: original}.
    """
    inner = _inner_names(graph)
    taken = set(graph.tensors())
    copies: dict[str, str] = {}
    seen: set[str] = set()
    stand_in = _constant_nodes(graph, most, larger)
    for node in graph.nodes:
        for i, tensor in enumerate(node.inputs):
            source = stand_in.get(tensor.name, tensor)
            if not isinstance(source, gs.Constant) or tensor.name in inner or not _fits(source, most, larger):
                continue
            if tensor.name not in seen:
                seen.add(tensor.name)
                continue
            copy = gs.Constant(_fresh_name(tensor.name, taken), source._values, source.data_location)
            copies[copy.name] = tensor.name
            node.inputs[i] = copy
    return copies


def _fits(constant: gs.Constant, most: int, larger: Set[str]) -> bool:
    return int(np.prod(constant.shape)) <= most or constant.name in larger


def _constant_nodes(graph: gs.Graph, most: int, larger: Set[str]) -> dict[str, gs.Constant]:
    """Values of Constant nodes, and of Identity of a constant, by output name."""
    found: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        if node.op == "Constant" and isinstance(node.attrs.get("value"), gs.Constant) and node.outputs:
            found[node.outputs[0].name] = node.attrs["value"]
        elif node.op == "Identity" and not node.domain and node.inputs and node.outputs:
            source = node.inputs[0]
            held = source if isinstance(source, gs.Constant) else found.get(source.name)
            if held is not None and _fits(held, most, larger):
                found[node.outputs[0].name] = held
    return found


def _fresh_name(name: str, taken: set[str]) -> str:
    number = 1
    while f"{name}/copy{number}" in taken:
        number += 1
    taken.add(f"{name}/copy{number}")
    return f"{name}/copy{number}"


def merge_copies(graph: gs.Graph, copies: Mapping[str, str], same: Set[str]) -> int:
    """Undoes `unshare_constants` for the copies in `same`, which were changed exactly as their originals.

    before -> after: b and b/copy1 -> b read twice. Returns the number of copies that went.
    """
    tensors = graph.tensors()
    merged = 0
    for node in graph.nodes:
        for i, tensor in enumerate(node.inputs):
            if tensor.name in same and copies[tensor.name] in tensors:
                node.inputs[i] = tensors[copies[tensor.name]]
                merged += 1
    return merged
