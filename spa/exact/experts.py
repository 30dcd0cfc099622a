"""Equal split of an MLP: E smaller ones with a part of the hidden neurons each, whose results sum to the original's.

    W₂ f(W₁ x + b₁) + b₂ = b₂ + Σ_e W₂[:, e] f(W₁[e] x + b₁[e])

A hidden width is a group of the kind *neuron* (`spa.graph.kinds`): layers without a window make it and sum it. Nothing between may look at
more than one of its channels. (Union of Experts, arXiv 2503.02495)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from passes import Branch, Patch
from spa.exact.flow import Flow, Obstacle
from spa.graph.groups import Group, Groups
from spa.graph.trace import NodeTrace
from spa.plans.rewrite import CannotRestate, plan_removal
from spa.signatures import MAP, SUM
from spa.signatures.table import dims_of, kind_of


@dataclass(frozen=True)
class Mlp:
    """A hidden width: its group, the nodes that its channels go through, and those of them that sum it, with their bias's input."""

    group: Group
    nodes: tuple[NodeTrace, ...]
    exits: Mapping[str, int | None]


def find_mlps(flow: Flow) -> tuple[list[Mlp], dict[str, str]]:
    """All hidden widths of MLPs, and why groups that are made and summed by layers, but are no such, can't be split."""
    groups = flow.groups
    of = np.concatenate([[-1], groups.of_coordinate()])
    widths = [g for g in groups.free() if g.kind == "neuron"]
    touched: dict[int, list[tuple[NodeTrace, str]]] = {g.index: [] for g in widths}
    for node in flow.traced.nodes:
        for name, axis in node.dims.items():
            for g in np.unique(of[groups.dim_labels(axis)]):
                if int(g) in touched:
                    touched[int(g)].append((node, name))
    found, left = [], {}
    for group in widths:
        try:
            mlp = _mlp(flow, group, touched[group.index])
        except Obstacle as error:
            left[group.name] = str(error)
            continue
        if mlp is not None:
            found.append(mlp)
    return found, left


def _mlp(flow: Flow, group: Group, places: list[tuple[NodeTrace, str]]) -> Mlp | None:
    """The MLP whose hidden width a group is; None if it is another kind of width. Raises Obstacle for one that can't be split."""
    exits: dict[str, int | None] = {}
    entrances = 0
    for node, name in places:
        out = node.node.outputs[0].name
        layer, signature = flow.layers.get(out), node.signature
        assert signature is not None
        if layer is not None and layer.window is not None:
            return None
        summed = kind_of(signature, name) is SUM
        if summed and layer is None:
            return None
        if layer is not None:
            data = any(name in dims_of(t) for t in layer.data_terms or ())
            exits |= {out: layer.linear.bias} if summed and data else {}
            entrances += not data
    if not exits or not entrances:
        return None
    for node, name in places:
        signature = node.signature
        assert signature is not None
        kind = kind_of(signature, name)
        if kind is not MAP and kind is not SUM:
            raise Obstacle(node.node, "a statistic runs over its hidden channels")
        for tensor, terms in zip(node.node.outputs, signature.outputs, strict=False):
            mine = {n for other, n in places if other is node}
            if node.node.outputs[0].name not in exits and tensor.name and not any(n in mine for t in terms or () for n in dims_of(t)):
                raise Obstacle(node.node, "a result of its hidden channels has another shape")
    once = {id(n.node): n for n, _ in places}
    return Mlp(group, tuple(once.values()), exits)


def branch_of(groups: Groups, mlp: Mlp, experts: int) -> Branch:
    """What the pass is told to split an MLP into equal parts. Raises Obstacle where the parts would not be equal."""
    group = mlp.group
    if group.size % experts:
        raise Obstacle(None, f"its {group.size} hidden channels do not make {experts} equal parts")
    width = group.size // experts
    removals = []
    for e in range(experts):
        gone = np.zeros(groups.total, bool)
        gone[group.coordinates] = True
        gone[group.start + e * width : group.start + (e + 1) * width] = False
        try:
            removal = plan_removal(groups, gone)
        except CannotRestate as error:
            raise Obstacle(None, str(error)) from error
        if any(isinstance(v, Patch) for v in removal.inputs.values()):
            raise Obstacle(None, "a shape that depends on its width is computed at run time")
        removals.append(removal)
    return Branch(tuple(n.node.outputs[0].name for n in mlp.nodes), mlp.exits, tuple(removals))
