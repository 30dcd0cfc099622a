"""Normalising: function-preserving passes that make graphs of all exporters look alike to tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from passes import drop_dead_nodes, drop_false_shapes, fold_constants, gather_shuffles, merge_copies, unshare_constants
from spa.graph.shapes import Facts, infer, with_new_constants
from spa.graph.trace import constant_values
from spa.graph.view import dtype_is_float
from spa.plans.rewrite import copy_graph
from spa.signatures.arithmetic import REINTERPRETS
from spa.signatures.elementwise import ADDITIONS
from spa.storage.store import Model, with_graph

SHARED = 65536  # elements; smaller constants that are shared were merged by an exporter, larger ones are tied on purpose
SPREAD = 0.1  # of a model's elements: what copies of a larger one may add to it, if all that reads it is sums


@dataclass(frozen=True)
class Normal:
    """A model ready for tracing, with what is known of its shapes. copies: {constant made by unsharing: its original}."""

    model: Model
    facts: Facts
    copies: Mapping[str, str]


def normalize(model: Model, inputs: Mapping[str, Sequence[int]] | None = None) -> Normal:
    """Folds shape arithmetic that depends on no free size, forgets declared shapes that are false, and gives readers of shared constants
    their own copies (`unshared`).
    """
    graph = copy_graph(model.graph)
    facts = infer(graph, inputs)
    drop_false_shapes(graph, facts.shapes)
    copies = unshared(graph)
    folded = fold_constants(graph, facts.computed)
    shuffles = gather_shuffles(graph, facts.shapes)
    if shuffles:
        drop_dead_nodes(graph)
    if folded or copies or shuffles:
        facts = with_new_constants(facts, graph)
    return Normal(with_graph(model, graph), facts, copies)


def unshared(graph: gs.Graph) -> dict[str, str]:
    """Gives readers of shared constants their own copies, in place: of small ones, and of offsets. Returns {copy: original}.

    An offset is what is only added to something, such as a table of relative positions: no weight that is tied on purpose, so that it
    counts as merged by an exporter as long as its copies are little beside the model.
    """
    stored = {t.name: t for t in graph.tensors().values() if isinstance(t, gs.Constant)}
    sizes = {name: int(np.prod(t.shape)) for name, t in stored.items()}
    most = SPREAD * sum(sizes.values())
    large = (n for n, size in sizes.items() if size > SHARED and size * (len(stored[n].outputs) - 1) <= most)
    return unshare_constants(graph, SHARED, {n for n in large if all(map(_adds, stored[n].outputs))})


def _adds(node: gs.Node) -> bool:
    """Whether a node only adds what it reads, or hands it on to such nodes."""
    if node.op in REINTERPRETS and not node.domain:
        return all(_adds(reader) for tensor in node.outputs for reader in tensor.outputs)
    return node.op in ADDITIONS and not node.domain


def untied(model: Model) -> Model:
    """The model in which vectors that several nodes read are copies of their own; the same model if there are none.

    Exporters merge tensors that are equal: in a network that was not trained yet all norms share one scale, one mean and one variance,
    which training would have to keep the same. Matrices stay tied, as embeddings and their logits are, unless they hold one number only.
    """
    graph = copy_graph(model.graph)
    copies = unshared(graph)
    stored = constant_values(graph)
    tied = {c for c in copies if not dtype_is_float(stored[c].dtype) or (len(stored[c].shape) > 1 and np.ptp(stored[c].values) > 0)}
    merge_copies(graph, copies, tied)
    return with_graph(model, graph) if len(tied) < len(copies) else model
