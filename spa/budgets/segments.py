"""Segments: a graph cut into pieces that a runtime would run as one, so that each can be timed by itself.

A segment is a node that multiplies (it has MACs in the table of signatures) with what follows it until the next: activations, norms and
additions that runtimes fuse into it. Boundaries are named by values, so that a pruned graph is cut at the same places as the dense one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from spa.graph.count import macs_terms
from spa.graph.groups import Groups
from spa.graph.trace import NodeTrace, outer_values
from spa.proof.feeds import Feeds
from spa.statistics.stepper import tapped
from spa.storage.store import Model

WRITTEN_OUT = 64  # elements; constants up to that size are shapes and settings, whose values matter for time


@dataclass(frozen=True)
class Segment:
    """nodes: of the tracing, in order. inputs, outputs: values that cross its boundary, constants left out."""

    nodes: tuple[NodeTrace, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def find_segments(groups: Groups) -> list[Segment]:
    """The segments of a traced graph, in graph order; every node that is no constant is in one."""
    traced = groups.traced
    owner: dict[str, int] = {}  # value -> number of the segment that makes it
    members: list[list[NodeTrace]] = [[]]
    for node in traced.nodes:
        reads = [t.name for t in node.node.inputs if t.name] + list(outer_values(node.node))
        if all(n in traced.constants for n in reads) and reads:
            number = 0
        elif macs_terms(node):
            number = len(members)
            members.append([])
        else:
            number = max((owner.get(n, 0) for n in reads), default=0)
        members[number].append(node)
        owner.update({t.name: number for t in node.node.outputs if t.name})
    return _bounded(groups, [m for m in members if m])


def _bounded(groups: Groups, members: Sequence[Sequence[NodeTrace]]) -> list[Segment]:
    traced = groups.traced
    readers: dict[str, set[int]] = {t.name: {-1} for t in traced.graph.outputs}
    for number, nodes in enumerate(members):
        for node in nodes:
            for name in [t.name for t in node.node.inputs if t.name] + list(outer_values(node.node)):
                readers.setdefault(name, set()).add(number)
    found = []
    for number, nodes in enumerate(members):
        made = {t.name for n in nodes for t in n.node.outputs if t.name}
        reads = dict.fromkeys(n for x in nodes for n in [t.name for t in x.node.inputs if t.name] + list(outer_values(x.node)))
        inputs = tuple(n for n in reads if n not in made and n not in traced.constants)
        values = dict.fromkeys(t.name for x in nodes for t in x.node.outputs if t.name)
        outputs = tuple(n for n in values if readers.get(n, set()) - {number})
        if outputs:
            found.append(Segment(tuple(nodes), inputs, outputs))
    return found


def piece(model: Model, segment: Segment, types: Mapping[str, int]) -> Model:
    """A segment of a model, dense or pruned, as a model of its own."""
    return tapped(model, model.graph, segment.inputs, segment.outputs, types)


def digest(part: Model, feeds: Feeds) -> str:
    """What a segment's time depends on: operators, attributes, shapes and types; names and weights left out."""
    names: dict[str, int] = {t.name: i for i, t in enumerate(part.graph.inputs)}
    told: list[object] = [[(feeds[t.name].shape, str(feeds[t.name].dtype)) for t in part.graph.inputs]]
    for node in part.graph.nodes:
        inputs: list[object] = []
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                size = int(np.prod(tensor.shape or ()))
                value = np.asarray(tensor.values).tolist() if size <= WRITTEN_OUT and np.dtype(tensor.dtype).kind in "iub" else None
                inputs.append((tuple(tensor.shape or ()), str(tensor.dtype), value))
            else:
                inputs.append(names.setdefault(tensor.name, len(names)) if tensor.name else None)
        attributes = sorted((k, repr(v)) for k, v in node.attrs.items() if not isinstance(v, gs.Graph))
        told.append((node.op, node.domain, attributes, inputs, [names.setdefault(t.name, len(names)) for t in node.outputs if t.name]))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:24]
