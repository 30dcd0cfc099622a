"""Scales of channels, folded into the weights that sum over them.

    y = W · (s ∘ x)  ->  (W ∘ s) · x

Learned gates multiply a channel where it is summed (a head before the output projection, a neuron before the second linear layer). The
fold is an edit (`spa.plans.edits`), so that a plan carries it to another checkpoint; the other way to the same outputs, with a Mul in
front of every such layer, is what `spa prune` proves it against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from passes import Scale, drop_dead_nodes, fold_constants, merge_copies, replace_constants, scale_inputs
from spa.errors import BadOption
from spa.exact.weights import Weights
from spa.graph.analysis import Analysis, analyze
from spa.graph.groups import Groups, find_groups
from spa.graph.linear import Layer, find_layers
from spa.graph.normalize import unshared
from spa.graph.shapes import infer, with_new_constants
from spa.graph.trace import NodeTrace, node_name, trace
from spa.plans.edits import KINDS, Edit, Kind
from spa.plans.rewrite import copy_graph
from spa.signatures import STAT, SUM
from spa.signatures.table import Dim, Product, Sum, Term, dims_of, kind_of
from spa.stages import Stage, quiet

EDIT = "fold_scales"
Array = NDArray[np.float64]
Factors = Mapping[str, Mapping[str, Any]]  # first output of a node -> {"input", "rank", "type": of its data, "axes": {axis: factors}}


def with_scales(analysis: Analysis, scales: Array, *, stage: Stage = quiet) -> Analysis:
    """The analysis of the model with scales (total,) of its coordinates folded in; as it was if all are 1, or it has been done.

    Raises BadOption where a channel with a scale is summed without stored weights, or a statistic runs over it.
    """
    if (scales == 1).all() or any(e.kind == EDIT for e in analysis.edits):
        return analysis
    with stage("folding scales"):
        arguments: dict[str, Any] = {"factors": factors_of(analysis.groups, scales)}
        if analysis.settings["inputs"]:
            arguments["inputs"] = analysis.settings["inputs"]
        return analyze(analysis.given, **{**analysis.settings, "edits": [*analysis.edits, Edit(EDIT, arguments)]})


def factors_of(groups: Groups, scales: Array) -> dict[str, dict[str, Any]]:
    """Factors along the data of every layer that sums over channels with a scale. Raises BadOption where one can't be folded."""
    layers = {layer.node.outputs[0].name: layer for layer in find_layers(groups)}
    scaled = {g.index: g.name for g in groups.groups if (scales[g.coordinates] != 1).any()}
    for group in groups.groups:
        out = next((v for v, _ in group.sites if group.index in scaled and v in {t.name for t in groups.traced.graph.outputs}), None)
        if out is not None:
            raise BadOption(f"--scores scales the group {group.name}, which reaches the output {out!r}: no weights are there to fold into.")
    numbers = np.concatenate([[1.0], scales])
    found: dict[str, dict[str, Any]] = {}
    for node in groups.traced.nodes:
        if node.signature is None:
            continue
        factors = {n: numbers[groups.dim_labels(a)].prod(axis=1) for n, a in node.dims.items() if a.labels is not None}
        factors = {n: f for n, f in factors.items() if (f != 1).any() and kind_of(node.signature, n) in (SUM, STAT)}
        if not factors:
            continue
        layer = layers.get(node.node.outputs[0].name)
        statistic = any(kind_of(node.signature, n) is STAT for n in factors)
        if layer is None or statistic:
            what = "takes a statistic over it" if statistic else "sums over it without stored weights"
            name = _group_of(groups, node, next(iter(factors)), scaled)
            where = f"{node_name(node.node)} ({node.node.op})"
            raise BadOption(f"--scores scales the group {name}, but node {where} {what}: leave its scale out.")
        dtype = helper.tensor_dtype_to_np_dtype(groups.traced.facts.types.get(layer.data) or 1)
        found[node.node.outputs[0].name] = {"input": layer.linear.data, "rank": len(layer.data_terms or ()), "type": dtype.name,
                                            "axes": _axes(node, layer, factors)}  # fmt: skip
    return found


def _group_of(groups: Groups, node: NodeTrace, dim: str, scaled: Mapping[int, str]) -> str:
    labels = groups.dim_labels(node.dims[dim])
    return next(scaled[int(g)] for g in groups.of_coordinate()[labels[labels > 0] - 1] if int(g) in scaled)


def _axes(node: NodeTrace, layer: Layer, factors: Mapping[str, Array]) -> dict[str, list[float]]:
    """Factors along each axis of a layer's data."""

    def along(term: Term) -> Array:
        if isinstance(term, Dim):
            return factors.get(term.name, np.ones(node.dims[term.name].length))
        if isinstance(term, Product):
            whole = np.ones(1)
            for part in term.parts:
                whole = np.outer(whole, along(part)).ravel()
            return whole
        if isinstance(term, Sum):
            return np.concatenate([along(part) for part in term.parts])
        return np.ones(1)

    named = {a: t for a, t in enumerate(layer.data_terms or ()) if any(n in factors for n in dims_of(t))}
    return {str(a): along(t).tolist() for a, t in named.items()}


def fold(graph: gs.Graph, *, factors: Factors, inputs: Mapping[str, Sequence[int]] | None = None) -> int:
    """Multiplies the columns of stored weights, in place.

    before -> after: MatMul(x, W) -> MatMul(x, s ∘ W), for factors s along the axis of x that is summed. Returns the number of layers
    changed. Raises KeyError or ValueError where the factors do not fit the graph.
    """
    own = copy_graph(graph)
    facts = infer(own, inputs)
    copies = unshared(own)
    fold_constants(own, facts.computed)
    groups = find_groups(trace(own, with_new_constants(facts, own)))
    layers = {layer.node.outputs[0].name: layer for layer in find_layers(groups)}
    weights = Weights(dict(groups.traced.constants))
    for name, entry in factors.items():
        if name not in layers:
            raise KeyError(f"no layer with stored weights makes {name}")
        layer = layers[name]
        by = np.ones((layer.parts, layer.columns))
        for axis, along in entry["axes"].items():
            by *= np.asarray(along, np.float64)[layer.positions[int(axis)]]
        whole = weights.matrix(layer).reshape(layer.parts, layer.outputs, layer.columns) * by[:, None, :]
        weights.put_matrix(layer, whole.reshape(-1, layer.columns))
    unshared(graph)  # gives the same names as above
    replace_constants(graph, weights.changed)
    merge_copies(graph, copies, {c for c, o in copies.items() if c not in weights.changed and o not in weights.changed})
    drop_dead_nodes(graph)
    return len(factors)


def insert(graph: gs.Graph, *, factors: Factors, inputs: Mapping[str, Sequence[int]] | None = None) -> int:
    """The other way to the same outputs: a Mul in front of every layer, by the same arguments as `fold`. Returns the number of Muls."""
    return scale_inputs(graph, {name: Scale(e["input"], e["rank"], e["type"], {int(a): x for a, x in e["axes"].items()})
                                for name, e in factors.items()})  # fmt: skip


KINDS[EDIT] = Kind(fold, insert)
