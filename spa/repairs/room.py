"""Room for constants: a graph in which every layer that loses channels has a place for what they gave in the mean.

The places are new values, so the graph is traced again; its groups keep their names, and the removal is carried over to them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from passes import insert_biases
from spa.graph.groups import Group, Groups, Kept, find_groups
from spa.graph.linear import find_layers
from spa.graph.offsets import Missing, Offsets
from spa.graph.shapes import Facts, with_new_constants
from spa.graph.trace import trace
from spa.plans.rewrite import copy_graph
from spa.storage.store import Model, with_graph


def with_room(model: Model, groups: Groups, gone: NDArray[np.bool_]) -> tuple[Model, Groups, NDArray[np.bool_]]:
    """The model with a place for a constant in every layer that will need one, traced again if any were added."""
    offsets, kept = Offsets(groups), Kept(groups, gone)
    missing: dict[str, tuple[int | None, NDArray[Any]]] = {}
    kinds = groups.traced.facts.types
    for layer in find_layers(groups):
        found = offsets.of(layer) if layer.removed(kept).any() else None
        if isinstance(found, Missing):
            out = layer.node.outputs[0].name
            missing[out] = found.slot, np.zeros(found.shape, helper.tensor_dtype_to_np_dtype(kinds.get(out) or 1))
    if not missing:
        return model, groups, gone
    graph = copy_graph(model.graph)
    insert_biases(graph, missing)
    facts = with_new_constants(groups.traced.facts, graph)
    for node in graph.nodes:  # an Add takes over the name of the output before it
        for tensor in node.outputs:
            if tensor.name not in facts.shapes:
                after = node.outputs[0].outputs[0].outputs[0].name
                shapes, types = {**facts.shapes, tensor.name: facts.shapes[after]}, {**facts.types, tensor.name: facts.types[after]}
                dynamic = {**facts.dynamic, tensor.name: facts.dynamic.get(after, ())}
                facts = replace(facts, shapes=shapes, types=types, dynamic=dynamic)
    again = _traced_again(graph, facts, groups)
    return with_graph(model, graph), again, carried(groups, gone, again)


def _traced_again(graph: gs.Graph, facts: Facts, groups: Groups) -> Groups:
    protect = any("--no-protect-outputs" in r.cause for r in groups.traced.reasons)
    stat = not any("--no-stat" in r.cause for r in groups.traced.reasons)
    return find_groups(trace(graph, facts, protect_outputs=protect, stat=stat, keep_state=not groups.traced.states))


def carried(groups: Groups, gone: NDArray[np.bool_], again: Groups) -> NDArray[np.bool_]:
    """The same removal in groups that were traced again: they are told by the sites that both have."""
    places: dict[tuple[str, int], list[Group]] = {}
    for g in again.groups:
        for site in g.sites:
            places.setdefault(site, []).append(g)
    found = np.zeros(again.total, bool)
    for group in groups.groups:
        here = gone[group.coordinates]
        if not here.any():
            continue
        match = next(g for s in group.sites for g in places.get(s, ()) if g.size == group.size and g.name == group.name)
        found[match.coordinates] = here
    return found
