"""What kernels demand of widths, by group: a width that a kernel refuses is never planned, and a plan that has one is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadPlan
from spa.graph.groups import Groups, Kept
from spa.graph.trace import node_name


@dataclass(frozen=True)
class Allowed:
    """Sizes that a group may have: multiples of `multiple`, from `least` on. cause: why."""

    multiple: int = 1
    least: int = 1
    cause: str = ""


ANY = Allowed()


def demands_of(groups: Groups) -> Mapping[int, Allowed]:
    """Index of a group -> its allowed sizes, for the groups that any kernel demands something of.

    Where several groups make up one dim, each of them meets the demand alone: what is left of the dim then does.
    """
    found: dict[int, Allowed] = {}
    of = np.concatenate([[-1], groups.of_coordinate()])
    for node in groups.traced.nodes:
        for demand in node.signature.demands if node.signature is not None else ():
            axis = node.dims.get(demand.dim)
            if axis is None or axis.labels is None:
                continue
            counts = np.bincount(of[groups.dim_labels(axis)].ravel() + 1, minlength=len(groups.groups) + 1)[1:]
            for index in np.flatnonzero(counts):
                repeat = max(int(counts[index]) // groups.groups[index].size, 1)
                before = found.get(int(index), ANY)
                multiple = math.lcm(before.multiple, demand.multiple // math.gcd(demand.multiple, repeat))
                least = max(before.least, math.ceil(demand.least / repeat))
                found[int(index)] = Allowed(multiple, least, demand.cause)
    return found


def check_demands(groups: Groups, gone: NDArray[np.bool_]) -> None:
    """Raises BadPlan where what is left of a dim is no size that its kernel takes."""
    kept = Kept(groups, gone)
    for node in groups.traced.nodes:
        for demand in node.signature.demands if node.signature is not None else ():
            keep = kept.dim(node.dims[demand.dim]) if demand.dim in node.dims else None
            left = demand.multiple if keep is None else int(np.count_nonzero(keep))
            if keep is not None and (left % demand.multiple or left < demand.least):
                wanted = f"a multiple of {demand.multiple}" if left % demand.multiple else f"at least {demand.least}"
                raise BadPlan(
                    f"Node {node_name(node.node)} would be left with {left} of {len(keep)} positions of {demand.dim!r}, where {wanted} is "
                    f"needed: {demand.cause}. Make the plan with `spa plan`, which keeps to that."
                )
