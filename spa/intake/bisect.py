"""Where a conversion goes wrong: the framework's intermediate results, looked for among the values of the ONNX graph.

A value that equals a result of the framework is right, and so is all that it was computed from, whatever has been fused or split there. The
nodes that take right values alone and give one that is not are where results part; what the framework ran next names the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

from spa.errors import UnsupportedModel
from spa.graph.normalize import Normal
from spa.intake.remote import Named
from spa.proof.check import run_session, session
from spa.proof.feeds import Feeds
from spa.statistics.stepper import reads, tapped

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Place:
    """layer: as the framework names it, or "". node: the first of ONNX not known to be right. agree: how many layers are right."""

    layer: str
    node: str
    agree: int


def first_difference(normal: Normal, feeds: Feeds, layers: Named, output: str, tolerance: float) -> Place | None:
    """The first node that gives a wrong value, of those that `output` depends on; None if it can't be told."""
    graph = normal.model.graph
    flow: nx.DiGraph[str] = nx.DiGraph()
    for node in graph.nodes:
        flow.add_edges_from((name, t.name) for name in reads(node) for t in node.outputs if t.name)
    if output not in flow:
        return None
    concerned = {*nx.ancestors(flow, output), output}
    made = [t.name for node in graph.nodes for t in node.outputs if t.name in concerned]
    inputs = [t.name for t in graph.inputs]
    try:
        values = run_session(session(tapped(normal.model, graph, inputs, made, normal.facts.types), optimize=False), feeds)
    except UnsupportedModel:
        return None
    matched = _matched({n: v for n, v in values.items() if n != output}, layers, tolerance)
    right = {t.name for t in graph.inputs}.union(matched, *(nx.ancestors(flow, name) for name in matched))
    varying = {t.name for t in graph.inputs}.union(*(nx.descendants(flow, n) for n in inputs if n in flow))
    for node in graph.nodes:
        wrong = [t.name for t in node.outputs if t.name in concerned and t.name not in right and t.name in varying]
        given = [n for n in reads(node) if n in varying]
        if wrong and all(n in right for n in given):
            before = [matched[n][-1] for n in {*given}.union(*(nx.ancestors(flow, g) for g in given if g in flow)) if n in matched]
            agree = {k for equal in matched.values() for k in equal}
            unmatched = [name for k, (name, _) in enumerate(layers) if k > max(before, default=-1) and k not in agree]
            return Place(str(unmatched[0]) if unmatched else "", f"{node.name or wrong[0]}, {node.op}", len(agree))
    return None


def _matched(values: dict[str, Array], layers: Named, tolerance: float) -> dict[str, list[int]]:
    """Value -> the layers that have given it. What is the same everywhere tells nothing."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for k, (_, array) in enumerate(layers):
        if array.size > 1 and array.dtype.kind == "f" and float(np.ptp(array)) > 0:
            by_shape.setdefault(tuple(sorted(array.shape)), []).append(k)
    floats = {name: value for name, value in values.items() if value.dtype.kind == "f"}
    alike = {name: by_shape.get(tuple(sorted(v.shape)), []) for name, v in floats.items()}
    equal = {name: [k for k in alike[name] if _equal(layers[k][1], v, tolerance)] for name, v in floats.items()}
    return {name: numbers for name, numbers in equal.items() if numbers}


def _equal(expected: Array, found: Array, tolerance: float) -> bool:
    """Whether two arrays are the same, maybe with their axes in another order (channels first or last)."""
    allowed = tolerance * float(np.abs(expected).max())
    if expected.shape == found.shape:
        return bool(np.abs(expected - found).max() <= allowed)
    return bool(np.abs(np.sort(expected, axis=None) - np.sort(found, axis=None)).max() <= allowed)
