"""The pass that gives linear maps a place for a bias."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


def insert_biases(graph: gs.Graph, biases: Mapping[str, tuple[int | None, NDArray[np.generic]]]) -> int:
    """Adds a bias to nodes, which are named by their first output: as input number `slot`, or with an Add behind the node.

    before -> after: Conv(x, w) -> Conv(x, w, b); y = MatMul(x, w) -> y = Add(MatMul(x, w), b), where y keeps its name.
    The node must have no bias there yet. Returns the number of biases added.
    """
    taken = set(graph.tensors())
    nodes: list[gs.Node] = []
    added = 0
    for node in list(graph.nodes):
        nodes.append(node)
        name = node.outputs[0].name if node.outputs else ""
        if name not in biases:
            continue
        slot, values = biases[name]
        added += 1
        constant = gs.Constant(_fresh(f"{name}/bias", taken), np.asarray(values, order="C"))
        if slot is None:
            out = node.outputs[0]
            inner = gs.Variable(_fresh(f"{name}/unbiased", taken), dtype=out.dtype, shape=out.shape)
            node.outputs[0] = inner
            nodes.append(gs.Node("Add", _fresh(f"{node.name or name}/Add", taken), {}, [inner, constant], [out]))
            continue
        while len(node.inputs) <= slot:
            node.inputs.append(gs.Variable.empty())
        node.inputs[slot] = constant
    graph.nodes[:] = nodes
    return added


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
