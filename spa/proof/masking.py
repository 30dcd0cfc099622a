"""The masked model: the original graph with every removed position out of every sum and every statistic.

It is built from the signatures alone, without any of the rewriter's code: positions are masked where they are summed
(SUM), and an operator that takes a statistic (STAT) runs over the kept positions. What it computes is by definition
what the pruned graph must compute.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import Compress, Mask, insert_masks
from spa.graph.groups import Groups, Kept
from spa.graph.trace import Axis, NodeTrace
from spa.signatures import STAT, SUM, Kind, Signature
from spa.signatures.table import Dim, Operand, Product, Sum, Term, dims_of, kind_of

Keep = NDArray[np.bool_]


def masked(graph: gs.Graph, groups: Groups, gone: NDArray[np.bool_]) -> gs.Graph:
    """A new graph in which the coordinates of `gone` no longer count; weights are shared with `graph`."""
    kept = Kept(groups, gone)
    masks: dict[str, list[Mask]] = {}
    compress: dict[str, Compress] = {}
    for node in groups.traced.nodes:
        if node.signature is None:
            continue
        keep = {n: kept.dim(a) for n, a in node.dims.items()}
        if all(k is None for k in keep.values()):
            continue
        name = node.node.outputs[0].name
        found = _masks(node, keep)
        if found:
            masks[name] = found
        narrowed = _compress(node, keep)
        if narrowed is not None:
            compress[name] = narrowed
    copy = graph.copy()
    stored = {n.node.outputs[0].name for n in groups.traced.nodes if n.signature is not None and n.signature.masked is not None}
    insert_masks(copy, masks, compress, groups.traced.facts.types, stored=stored)
    return copy


def _axis_keep(signature: Signature, term: Term, dims: dict[str, Keep | None], axes: dict[str, Axis] | object, kind: Kind) -> Keep | None:
    """Positions of an axis that stay when only its dims of one kind lose coordinates; None if all stay."""
    names = list(dims_of(term))
    if not any(dims.get(n) is not None and kind_of(signature, n) is kind for n in names):
        return None

    def of(part: Term) -> Keep:
        if isinstance(part, Dim):
            length = axes[part.name].length  # type: ignore[index]
            keep = dims.get(part.name)
            return keep if keep is not None and kind_of(signature, part.name) is kind else np.ones(length, bool)
        if isinstance(part, Product):
            whole = np.ones(1, bool)
            for inner in part.parts:
                whole = np.outer(whole, of(inner)).ravel()
            return whole
        if isinstance(part, Sum):
            return np.concatenate([of(p) for p in part.parts])
        return np.ones(1, bool)

    return of(term)


def _masks(node: NodeTrace, dims: dict[str, Keep | None]) -> list[Mask]:
    assert node.signature is not None
    found = []
    only = node.signature.masked
    for i, operand in enumerate(node.signature.inputs):
        for a, term in enumerate(operand or ()):
            keep = _axis_keep(node.signature, term, dims, node.dims, SUM) if only is None or i in only else None
            if keep is not None and operand is not None:
                shape = [1] * len(operand)
                shape[a] = len(keep)
                found.append(Mask(i, keep.reshape(shape)))
    return found


def _compress(node: NodeTrace, dims: dict[str, Keep | None]) -> Compress | None:
    assert node.signature is not None
    signature = node.signature

    def narrow(operands: tuple[Operand, ...]) -> dict[int, dict[int, Keep]]:
        found: dict[int, dict[int, Keep]] = {}
        for i, operand in enumerate(operands):
            for a, term in enumerate(operand or ()):
                keep = _axis_keep(signature, term, dims, node.dims, STAT)
                if keep is not None:
                    found.setdefault(i, {})[a] = keep
        return found

    inputs, outputs = narrow(signature.inputs), narrow(signature.outputs)
    if not inputs:
        return None
    names = [t.name for t in node.node.outputs]
    return Compress(
        {i: {a: np.flatnonzero(k) for a, k in axes.items()} for i, axes in inputs.items()},
        {i: {a: np.maximum(np.cumsum(k) - 1, 0) for a, k in axes.items()} for i, axes in outputs.items() if i < len(names) and names[i]},
        {i: np.flatnonzero(keep) for i, name in signature.gives.items() if i < len(names) and names[i]
         for keep in [dims.get(name)] if keep is not None},
    )  # fmt: skip
