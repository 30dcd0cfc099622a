"""Normalising: function-preserving passes that make graphs of all exporters look alike to tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from passes import drop_dead_nodes, fold_constants, gather_shuffles, unshare_constants
from spa.graph.shapes import Facts, infer, with_new_constants
from spa.plans.rewrite import copy_graph
from spa.storage.store import Model, with_graph

SHARED = 65536  # elements; smaller constants that are shared were merged by an exporter, larger ones are tied on purpose


@dataclass(frozen=True)
class Normal:
    """A model ready for tracing, with what is known of its shapes. copies: {constant made by unsharing: its original}."""

    model: Model
    facts: Facts
    copies: Mapping[str, str]


def normalize(model: Model, inputs: Mapping[str, Sequence[int]] | None = None) -> Normal:
    """Folds shape arithmetic that depends on no free size and gives readers of small shared constants their own copies."""
    graph = copy_graph(model.graph)
    facts = infer(graph, inputs)
    copies = unshare_constants(graph, SHARED)
    folded = fold_constants(graph, facts.computed)
    shuffles = gather_shuffles(graph, facts.shapes)
    if shuffles:
        drop_dead_nodes(graph)
    if folded or copies or shuffles:
        facts = with_new_constants(facts, graph)
    return Normal(with_graph(model, graph), facts, copies)
