"""Widths: to how many coordinates a group may shrink, by what kernels demand and like."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from spa.graph.demands import ANY, demands_of
from spa.graph.groups import Group, Groups
from spa.signatures.table import dims_of

SLACK = 1 / 6  # of a group's size: how far rounding to a block may lead away from what was asked for


class Widths:
    """Widths that a group may shrink to. multiple_of: what they are multiples of, "auto" for what a kernel's block of `block` likes.

    keep_at_least: coordinates that every group keeps. held: (total,) coordinates that stay.
    """

    def __init__(self, groups: Groups, multiple_of: int | str, keep_at_least: int, block: int, held: NDArray[np.bool_]) -> None:
        self.groups, self.multiple_of, self.keep_at_least, self.block, self.held = groups, multiple_of, keep_at_least, block, held
        self.repeat, self.dense = _repeats(groups), _dense_inputs(groups)
        self.demands = demands_of(groups)

    def _unit(self, group: Group, block: int) -> int:
        return math.lcm(block // math.gcd(block, self.repeat[group.index]), self.demands.get(group.index, ANY).multiple)

    def step(self, group: Group) -> int:
        """The finest rounding that applies to a group."""
        if self.multiple_of == "auto":
            return self._unit(group, 4 if group.index in self.dense else 1)
        return self._unit(group, int(self.multiple_of))

    def kept(self, group: Group, target: float) -> int:
        """Width nearest to `target`; the group's own size where there is none below it."""
        demand = self.demands.get(group.index, ANY).least
        least = min(max(self.keep_at_least, demand, int(self.held[group.coordinates].sum())), group.size)
        if self.multiple_of != "auto":
            return self._nearest(group, target, self._unit(group, int(self.multiple_of)), least)
        block, floor = self.block, (4 if group.index in self.dense else 1)
        while True:
            keep = self._nearest(group, target, self._unit(group, block), least)
            if block <= floor or abs(keep - target) <= SLACK * group.size:
                return keep
            block //= 2

    def _nearest(self, group: Group, target: float, unit: int, least: int) -> int:
        if unit == 1:
            return max(int(target + 1e-6), least)
        keep = max(int(target / unit + 0.5) * unit, math.ceil(least / unit) * unit, unit)
        return min(keep, group.size)


def _repeats(groups: Groups) -> dict[int, int]:
    """Positions that one coordinate holds on the activation axis where it holds fewest."""
    constants = groups.traced.constants
    of = np.concatenate([[-1], groups.of_coordinate()])
    found: dict[int, int] = {}
    for (value, _), labels in groups.labels.items():
        if value in constants:
            continue
        counts = np.bincount(of[labels].ravel() + 1, minlength=len(groups.groups) + 1)[1:]
        for g in np.flatnonzero(counts):
            repeat = max(int(counts[g]) // groups.groups[g].size, 1)
            found[int(g)] = min(found.get(int(g), repeat), repeat)
    return {g.index: found.get(g.index, 1) for g in groups.groups}


def _dense_inputs(groups: Groups) -> set[int]:
    """Groups that are input channels of a convolution (a node that sums over a dim and has a window), or pass one by one."""
    found: set[int] = set()
    of = np.concatenate([[-1], groups.of_coordinate()])
    for node in groups.traced.nodes:
        signature = node.signature
        if signature is None or not signature.macs or len(signature.inputs) < 2:
            continue
        if not any(n.startswith("k.") for t in signature.inputs[1] or () for n in dims_of(t)):
            continue
        tensor = node.node.inputs[0]
        labels = groups.labels.get((tensor.name, 1))
        if labels is not None:
            found |= {int(g) for g in np.unique(of[labels]) if g >= 0}
    return found
