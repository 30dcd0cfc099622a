"""The pass that takes fused operators apart: a sum, and what runs over it. It keeps the function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_graphsurgeon as gs


def part_sums(graph: gs.Graph, nodes: Mapping[str, Mapping[str, Any]]) -> int:
    """Takes nodes apart, which are named by their first output.

    nodes: name -> op, domain, attributes of what runs over the sum; terms: input numbers, the first plus the sum of the others; rest:
    inputs that it takes besides; sum: number of the output that holds the sum, if the node has it.

    before -> after: y, _, _, s = SkipLayerNormalization(x, v, g, b, c) -> u = Add(v, c), s = Add(x, u), y = LayerNormalization(s, g, b).
    Returns the number of nodes taken apart; those that are apart count as done. Raises KeyError for nodes that are not there.
    """
    made = {node.outputs[0].name: node for node in graph.nodes if node.outputs}
    places: dict[int, list[gs.Node]] = {}
    for name, how in nodes.items():
        node = made[name]
        if (node.op, node.domain or "") == (how["op"], how["domain"]):
            continue
        places[id(node)] = _parts(node, how)
    graph.nodes[:] = [n for node in list(graph.nodes) for n in places.get(id(node), (node,))]
    return len(places)


def _parts(node: gs.Node, how: Mapping[str, Any]) -> list[gs.Node]:
    inputs, outputs = list(node.inputs), list(node.outputs)
    final = outputs[0]
    first, *others = [inputs[i] for i in how["terms"]]
    parts: list[gs.Node] = []
    branch = others[0]
    for term in others[1:]:
        out = gs.Variable(f"{final.name}/branch", dtype=branch.dtype, shape=branch.shape)
        parts.append(gs.Node("Add", out.name, {}, [branch, term], [out]))
        branch = out
    there = how["sum"] < len(outputs) and outputs[how["sum"]].name
    total = outputs[how["sum"]] if there else gs.Variable(f"{final.name}/sum", dtype=final.dtype, shape=final.shape)
    besides = [inputs[i] for i in how["rest"] if i < len(inputs)]
    kept = [t for i, t in enumerate(outputs) if i != how["sum"]]
    while kept and not kept[-1].name:
        kept.pop()
    node.inputs.clear()
    node.outputs.clear()
    parts.append(gs.Node("Add", total.name, {}, [first, branch], [total]))
    parts.append(gs.Node(how["op"], node.name, dict(how["attributes"]), [total, *besides], kept, domain=how["domain"] or None))
    return parts
