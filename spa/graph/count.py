"""What a graph costs: parameters, multiply-accumulates, bytes, and the largest set of activations alive at once.

All counts are read off the signatures: a node's MACs are products of its dims' sizes (`Signature.macs`), so the dense graph
and any selection of coordinates are counted by the same lines, without building the smaller graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from spa.graph.trace import NodeTrace, Traced
from spa.proof.feeds import free_batch
from spa.signatures.table import dims_of

if TYPE_CHECKING:
    from spa.graph.groups import Groups, Kept


@dataclass(frozen=True)
class Costs:
    """(total,) parameters and MACs that hang on each coordinate: those of all positions that go with it."""

    parameters: NDArray[np.float64]
    macs: NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Totals of a graph: parameters (elements of float constants), MACs of one run, bytes of the largest set of live activations.

    MACs and activations are those of one sample where all inputs leave the batch size free.
    """

    parameters: int
    macs: int
    peak_bytes: int
    weight_bytes: int


def macs_terms(node: NodeTrace) -> list[tuple[int, list[str]]]:
    """(factor, dims) of each product in a node's MACs, stars spelled out."""
    if node.signature is None:
        return []
    signature = node.signature
    names = {n for operand in (*signature.inputs, *signature.outputs) for t in operand or () for n in dims_of(t)}
    terms = []
    for product in signature.macs:
        factor, dims = 1, []
        for item in product:
            if isinstance(item, int):
                factor *= item
            else:
                dims += [n for n in sorted(names) if n == item or n.split(".")[0] == item]
        terms.append((factor, dims))
    return terms


def node_costs(traced: Traced, number: NDArray[np.int64], total: int) -> Costs:
    """Shares of parameters and MACs (of one sample where the batch is free) by coordinate; `number` maps atoms to coordinates + 1."""
    batch = free_batch(traced)
    parameters, macs = np.zeros(total + 1), np.zeros(total + 1)
    for name in traced.weights:
        size = float(np.prod(traced.facts.shapes[name] or ()))
        for axis in traced.axes.get(name) or ():
            if axis.labels is not None:
                _share(parameters, number[traced.atoms.resolve(axis.labels, frozen=True)], size)
    for node in traced.nodes:
        for factor, dims in macs_terms(node):
            axes = [node.dims[d] for d in dims if d in node.dims]
            size = float(factor * np.prod([a.length for a in axes], dtype=np.float64)) / batch
            for axis in axes:
                if axis.labels is not None:
                    _share(macs, number[traced.atoms.resolve(axis.labels, frozen=True)], size)
    return Costs(parameters[1:], macs[1:])


def _share(costs: NDArray[np.float64], rows: NDArray[np.int64], size: float) -> None:
    np.add.at(costs, rows.ravel(), size / max(len(rows), 1))


def count(groups: Groups, removed: NDArray[np.bool_] | None = None) -> Counts:
    """Counts of the traced graph, or of what is left of it. `removed` is a mask over all coordinates."""
    from spa.graph.groups import Kept  # groups are made of costs, counts of groups

    traced = groups.traced
    kept = Kept(groups, np.zeros(groups.total, bool) if removed is None else removed)
    weight_bytes = 0
    for name, tensor in traced.constants.items():
        weight_bytes += int(math.prod(kept.shape(name) or tensor.shape) * itemsize(traced.facts.types.get(name, 1)))
    parameters = sum(math.prod(kept.shape(name) or ()) for name in traced.weights)
    batch = free_batch(traced)
    return Counts(parameters, _macs(groups, kept) // batch, _peak(groups, kept) // batch, weight_bytes)


def _macs(groups: Groups, kept: Kept) -> int:
    total = 0
    for node in groups.traced.nodes:
        for factor, dims in macs_terms(node):
            product = factor
            for name in dims:
                axis = node.dims.get(name)
                if axis is not None:
                    keep = kept.dim(axis)
                    product *= axis.length if keep is None else int(np.count_nonzero(keep))
            total += product
    return total


@cache
def itemsize(kind: int) -> float:
    """Bytes of an element of an ONNX type."""
    try:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
    except KeyError:
        return 4
    return 0.5 if dtype.name in ("int4", "uint4") else dtype.itemsize


def _peak(groups: Groups, kept: Kept) -> int:
    """Largest total of activations alive at once, nodes run in file order and values freed after their last use."""
    traced = groups.traced
    constants = traced.constants
    last: dict[str, int] = {t.name: len(traced.nodes) for t in traced.graph.outputs}
    for i, node in enumerate(traced.nodes):
        for tensor in node.node.inputs:
            last[tensor.name] = max(last.get(tensor.name, 0), i)
    size: dict[str, float] = {}

    def cost(name: str) -> float:
        shape = kept.shape(name)
        return 0 if shape is None else math.prod(shape) * itemsize(traced.facts.types.get(name, 1))

    live = sum(cost(t.name) for t in traced.graph.inputs)
    size.update({t.name: cost(t.name) for t in traced.graph.inputs})
    peak = live
    for i, node in enumerate(traced.nodes):
        for tensor in node.node.outputs:
            if tensor.name and tensor.name not in constants:
                size[tensor.name] = cost(tensor.name)
                live += size[tensor.name]
        peak = max(peak, live)
        for tensor in (*node.node.inputs, *node.node.outputs):
            if tensor.name in size and last.get(tensor.name, -1) <= i:
                live -= size.pop(tensor.name)
    return int(peak)
