"""Normalising: function-preserving passes that make graphs of all exporters look alike to tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from passes import drop_dead_nodes, drop_false_shapes, fold_constants, gather_shuffles, merge_copies, unshare_constants
from spa.graph.shapes import Facts, infer, with_new_constants
from spa.graph.trace import constant_values
from spa.graph.view import dtype_is_float
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
    """Folds shape arithmetic that depends on no free size, forgets declared shapes that are false, and gives readers of small shared
    constants their own copies.
    """
    graph = copy_graph(model.graph)
    facts = infer(graph, inputs)
    drop_false_shapes(graph, facts.shapes)
    copies = unshare_constants(graph, SHARED)
    folded = fold_constants(graph, facts.computed)
    shuffles = gather_shuffles(graph, facts.shapes)
    if shuffles:
        drop_dead_nodes(graph)
    if folded or copies or shuffles:
        facts = with_new_constants(facts, graph)
    return Normal(with_graph(model, graph), facts, copies)


def untied(model: Model) -> Model:
    """The model in which vectors that several nodes read are copies of their own; the same model if there are none.

    Exporters merge tensors that are equal: in a network that was not trained yet all norms share one scale, one mean and one variance,
    which training would have to keep the same. Matrices stay tied, as embeddings and their logits are, unless they hold one number only.
    """
    graph = copy_graph(model.graph)
    copies = unshare_constants(graph, SHARED)
    stored = constant_values(graph)
    tied = {c for c in copies if not dtype_is_float(stored[c].dtype) or (len(stored[c].shape) > 1 and np.ptp(stored[c].values) > 0)}
    merge_copies(graph, copies, tied)
    return with_graph(model, graph) if len(tied) < len(copies) else model
