"""The network as plain data: nodes with what they cost before and after, what was taken from them, and why they stayed.

A node is one of

    pruned    a tensor that it stores, or one of its values, lost positions
    whole     its channels might go, and none did
    frozen    none of the channels of its weights may go
    plain     it has no weights, and nothing that it reads or gives was cut

and `static` if what it gives depends on sizes and stored numbers alone (shape arithmetic, a transposed weight): such nodes are not
drawn, and the tensors behind them count for the node that reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.graph.atoms import Labels
from spa.graph.count import macs_terms
from spa.graph.groups import Group, Groups, Kept
from spa.graph.trace import NodeTrace, node_name, outer_values
from spa.graph.view import dtype_is_float
from spa.signatures.arithmetic import READS_SHAPE

REASONS = 4  # of one node
LEAST = 0.05  # share of the parameters from which on freezing is told of


def network_data(groups: Groups, gone: NDArray[np.bool_], batch: int = 1) -> dict[str, Any]:
    """Inputs, outputs, nodes in the graph's order, and the shapes of all values before and after.

    batch: what MACs are divided by, the samples that the shapes were found with.
    """
    return _Network(groups, gone, batch).data()


class _Network:
    """One walk over the nodes; `behind` maps each static value to the stored float tensors that it is made of."""

    def __init__(self, groups: Groups, gone: NDArray[np.bool_], batch: int) -> None:
        self.traced, self.batch = groups.traced, batch
        self.kept = Kept(groups, gone)
        self.behind: dict[str, tuple[str, ...]] = {
            name: (name,) if dtype_is_float(tensor.dtype) else () for name, tensor in self.traced.constants.items()
        }
        self.on: dict[tuple[str, int], list[Group]] = {}
        for group in channels(groups):
            for site in group.sites:
                self.on.setdefault(site, []).append(group)
        self.began: dict[str, list[str]] = {}
        for group in dict.fromkeys(g for found in self.on.values() for g in found):
            if group.frozen is not None and group.frozen.node:
                self.began.setdefault(group.frozen.node, []).append(group.name)

    def data(self) -> dict[str, Any]:
        nodes = [self._node(n) for n in self.traced.nodes if n.node.op != "Constant" or n.node.domain]
        graph = self.traced.graph
        names = [t.name for t in graph.inputs] + [v for n in nodes for v in n["outputs"]]
        values = {name: self._value(name) for name in dict.fromkeys(names)}
        return {"inputs": [t.name for t in graph.inputs], "outputs": [t.name for t in graph.outputs], "nodes": nodes, "values": values}

    def _value(self, name: str) -> dict[str, Any]:
        """Shapes before and after; `free`: axes that the model leaves open; `channels`: axes that groups with weights lie on."""
        before = self.traced.facts.shapes.get(name)
        after = self.kept.shape(name)
        free = [i for i, open_ in enumerate(self.traced.facts.dynamic.get(name) or ()) if open_]
        channels = [i for i in range(len(before or ())) if (name, i) in self.on]
        return {"before": None if before is None else list(before), "after": None if after is None else list(after), "free": free,
                "channels": channels}

    def _node(self, traced: NodeTrace) -> dict[str, Any]:
        node = traced.node
        read = [t.name for t in node.inputs if t.name] + [v for v in outer_values(node) if v in self.traced.axes]
        given = [t.name for t in node.outputs if t.name]
        static = bool(given) and (node.op in READS_SHAPE or (bool(read) and all(v in self.behind for v in read)))
        stored = tuple(dict.fromkeys(w for v in read for w in self.behind.get(v, ())))
        if static:
            self.behind.update(dict.fromkeys(given, stored))
        inputs = [v for v in dict.fromkeys(read) if v not in self.traced.constants]
        before, after = self._macs(traced)
        name = node_name(node)
        return {
            "name": name, "op": str(node.op), "domain": str(node.domain or ""), "static": static, "inputs": inputs, "outputs": given,
            "weights": [self._weight(w) for w in stored], "parameters_before": self._elements(stored, False),
            "parameters_after": self._elements(stored, True), "macs_before": before, "macs_after": after,
            **self._verdict(traced, name, stored, [*inputs, *given]),
        }

    def _weight(self, name: str) -> dict[str, Any]:
        return {"name": name, "before": list(self.traced.constants[name].shape), "after": list(self._shape_after(name))}

    def _shape_after(self, name: str) -> Iterable[int]:
        shape = self.kept.shape(name)
        return tuple(self.traced.constants[name].shape) if shape is None else shape

    def _elements(self, stored: Iterable[str], after: bool) -> int:
        return sum(math.prod(self._shape_after(w) if after else self.traced.constants[w].shape) for w in stored)

    def _macs(self, traced: NodeTrace) -> tuple[int, int]:
        before = after = 0
        for factor, dims in macs_terms(traced):
            whole = left = factor
            for axis in (traced.dims[d] for d in dims if d in traced.dims):
                keep = self.kept.dim(axis)
                whole *= axis.length
                left *= axis.length if keep is None else int(np.count_nonzero(keep))
            before, after = before + whole, after + left
        return before // self.batch, after // self.batch

    def _verdict(self, traced: NodeTrace, name: str, stored: tuple[str, ...], values: Iterable[str]) -> dict[str, Any]:
        """What became of a node and why. `begins`: groups that stay because of this very node."""
        touched = [*stored, *values]
        lost = any(self.kept.site((v, i)) is not None for v in touched for i in range(len(self.traced.facts.shapes.get(v) or ())))
        groups = dict.fromkeys(
            g for v in touched for i in range(len(self.traced.facts.shapes.get(v) or ())) for g in self.on.get((v, i), ()))
        why = list(dict.fromkeys(str(g.frozen) for g in groups if g.frozen is not None))
        if traced.refusal:
            why = list(dict.fromkeys([traced.refusal.rstrip(","), *why]))
        if lost:
            status = "pruned"
        elif stored and any(g.frozen is None for g in groups):
            status = "whole"
        elif traced.refusal or (groups and stored):
            status = "frozen"
        else:
            status = "plain"
        return {"status": status, "reasons": why[:REASONS], "begins": self.began.get(name, [])}


def channels(groups: Groups) -> list[Group]:
    """Groups of channels: those that are free, and frozen ones with weights that also lie on what a node gives or reads.

    So the extents of kernels, which lie on weights alone, and the sizes of pictures, which lie on values alone, are left out.
    """
    stored = {name for name, tensor in groups.traced.constants.items() if dtype_is_float(tensor.dtype)}
    total = sum(math.prod(groups.traced.constants[n].shape) for n in stored)

    def told(group: Group) -> bool:
        if group.frozen is None:
            return True
        ends = not group.frozen.node  # the graph's own inputs and outputs
        weighs = group.parameters * group.size > LEAST * total
        told_of = ends or (weighs and any(v not in groups.traced.constants for v, _ in group.sites))
        return group.parameters > 0 and group.size > 1 and told_of

    return [g for g in groups.groups if told(g)]


def group_costs(groups: Groups) -> tuple[dict[int, int], dict[int, int]]:
    """Parameters and MACs that lie on each group, by its index: of tensors that it is an axis of, of products that it is a dim of."""
    of = np.concatenate([[-1], groups.of_coordinate()])
    known: dict[int, frozenset[int]] = {}  # by the identity of labels, which live as long as the groups

    def on(rows: Labels | None) -> frozenset[int]:
        if rows is None:
            return frozenset()
        if id(rows) not in known:
            known[id(rows)] = frozenset(int(g) for g in np.unique(of[rows]) if g >= 0)
        return known[id(rows)]

    parameters: dict[int, int] = {}
    macs: dict[int, int] = {}
    for name in groups.traced.weights:
        shape = groups.traced.facts.shapes[name] or ()
        for group in frozenset().union(*(on(groups.labels.get((name, i))) for i in range(len(shape)))):
            parameters[group] = parameters.get(group, 0) + math.prod(shape)
    for node in groups.traced.nodes:
        for factor, dims in macs_terms(node):
            axes = [node.dims[d] for d in dims if d in node.dims]
            size = factor * math.prod(a.length for a in axes)
            for group in frozenset().union(*(on(groups.dim_labels(a)) for a in axes if a.labels is not None)):
                macs[group] = macs.get(group, 0) + size
    return parameters, macs
