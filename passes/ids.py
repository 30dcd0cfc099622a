"""The pass that numbers ids anew inside a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


def insert_id_maps(graph: gs.Graph, lookups: Mapping[str, int], table: NDArray[np.int64]) -> int:
    """Puts a map in front of nodes that look ids up: {node, by its first output: the input that holds ids}.

    before -> after: Gather(rows, ids) -> Gather(rows, Gather(table, ids)), where table is (old ids,) the new id of each. Nodes that read
    the same ids share the map's result. Nodes whose ids come from a map already are left alone. Returns the number of nodes that changed.
    """
    taken = set(graph.tensors())
    made: dict[str, gs.Variable] = {}
    constant: gs.Constant | None = None
    nodes: list[gs.Node] = []
    changed = 0
    for node in list(graph.nodes):
        where = lookups.get(node.outputs[0].name) if node.outputs else None
        ids = node.inputs[where] if where is not None else None
        if where is None or ids is None or _mapped(ids):
            nodes.append(node)
            continue
        if ids.name not in made:
            constant = constant or gs.Constant(_fresh("vocabulary/new_ids", taken), np.asarray(table, np.int64))
            made[ids.name] = gs.Variable(_fresh(f"{ids.name}/new_ids", taken), dtype=np.int64, shape=ids.shape)
            nodes.append(gs.Node("Gather", _fresh(f"{ids.name}/map", taken), {"axis": 0}, [constant, ids], [made[ids.name]]))
        node.inputs[where] = made[ids.name]
        nodes.append(node)
        changed += 1
    graph.nodes[:] = nodes
    return changed


def _mapped(ids: gs.Tensor) -> bool:
    return bool(ids.inputs) and bool(ids.inputs[0].inputs) and ids.inputs[0].inputs[0].name.startswith("vocabulary/new_ids")


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
