"""Groups: atoms that occur in the same places form one coupled-channel group, a solved dim with all its sites.

After tracing, two atoms are of the same group if they occur equally often on the same axes of the same values. That tells
the parts of a concatenation apart, and heads from head dims, without looking at names or operators. The atoms of a group are
its *coordinates*; they are what is scored and removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from spa.graph.atoms import Labels
from spa.graph.count import Costs, node_costs
from spa.graph.kinds import kinds_of
from spa.graph.trace import Axis, Reason, Traced

Site = tuple[str, int]  # (value, axis)


@dataclass(frozen=True)
class Group:
    """One coupled-channel group.

    name: the first stored tensor's axis that it occurs on, "weight:0"; with "#2" where an axis has several groups.
    start, size: its coordinates are the numbers start … start + size - 1 among all coordinates of the graph.
    sites: (value, axis) that it occurs on, in graph order. frozen: why nothing may be removed, None if it may.
    parameters, macs: what one coordinate costs now (on average, if all others stay). kind: what a coordinate is, one of
    `spa.graph.kinds.KINDS`.
    """

    index: int
    name: str
    start: int
    size: int
    sites: tuple[Site, ...]
    frozen: Reason | None
    parameters: float
    macs: float
    kind: str = "other"

    @property
    def coordinates(self) -> slice:
        """Its range in a mask over all coordinates."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Groups:
    """All groups of a graph, and every axis in terms of coordinates.

    labels: (value, axis) -> (length, k) coordinates + 1, 0 = none. A position stays if all its coordinates stay.
    total: number of coordinates. families: graph of groups that share an axis as factors of a product.
    """

    traced: Traced
    groups: tuple[Group, ...]
    labels: Mapping[Site, Labels]
    total: int
    families: nx.Graph[int]
    number: NDArray[np.int64]  # atom -> coordinate + 1

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Groups by name."""
        return {g.name: g for g in self.groups}

    def free(self) -> list[Group]:
        """Groups that may shrink."""
        return [g for g in self.groups if g.frozen is None]

    def of_coordinate(self) -> NDArray[np.int64]:
        """(total,) index of the group of each coordinate."""
        return np.repeat(np.arange(len(self.groups)), [g.size for g in self.groups])

    def keep(self, site: Site, removed: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """(length,) positions of an axis that stay; None if all do. `removed` is a mask over all coordinates."""
        return Kept(self, removed).site(site)

    def dim_keep(self, axis: Axis, removed: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """The same for a dim of a node."""
        return Kept(self, removed).dim(axis)

    def dim_labels(self, axis: Axis) -> Labels:
        """Labels of a node's dim in coordinates + 1, as `labels` has them for sites."""
        key = id(axis.labels)  # alive as long as the tracing
        if key not in self._dims:
            none = np.zeros((axis.length, 0), np.int64)
            self._dims[key] = none if axis.labels is None else self.number[self.traced.atoms.resolve(axis.labels, frozen=True)]
        return self._dims[key]

    @cached_property
    def _dims(self) -> dict[int, Labels]:
        return {}


class Kept:
    """What a removal leaves of every axis; for many questions about one removal, which must not change meanwhile."""

    def __init__(self, groups: Groups, removed: NDArray[np.bool_]) -> None:
        self._groups = groups
        self._gone = np.concatenate([[False], removed])
        self._known: dict[int, tuple[Labels, NDArray[np.bool_] | None]] = {}

    def site(self, site: Site) -> NDArray[np.bool_] | None:
        """(length,) positions of a value's axis that stay; None if all do."""
        return self._of(self._groups.labels.get(site))

    def dim(self, axis: Axis) -> NDArray[np.bool_] | None:
        """(length,) positions of a node's dim that stay; None if all do."""
        return None if axis.labels is None else self._of(self._groups.dim_labels(axis))

    def shape(self, value: str) -> tuple[int, ...] | None:
        """What is left of a value's shape."""
        shape = self._groups.traced.facts.shapes.get(value)
        if shape is None:
            return None
        keeps = [self.site((value, i)) for i in range(len(shape))]
        return tuple(n if k is None else int(np.count_nonzero(k)) for n, k in zip(shape, keeps, strict=True))

    def _of(self, labels: Labels | None) -> NDArray[np.bool_] | None:
        if labels is None or not labels.shape[1]:
            return None
        if id(labels) not in self._known:
            gone = np.asarray(self._gone[labels].any(axis=1))
            self._known[id(labels)] = labels, (np.logical_not(gone) if gone.any() else None)
        return self._known[id(labels)][1]


def find_groups(traced: Traced) -> Groups:
    """Solves the tracing: groups in graph order, with costs, reasons and names. Linear in positions; no loop over them."""
    sites, resolved = _resolved(traced)
    order, group_of = _partition(traced, sites, resolved)
    number = np.zeros(len(traced.atoms), np.int64)
    number[order] = np.arange(1, len(order) + 1)
    starts = np.flatnonzero(np.diff(group_of, prepend=-1))
    sizes = np.diff([*starts, len(group_of)])
    renumbered: dict[int, Labels] = {id(r): number[r] for r in resolved}  # many sites share one array
    labels = {site: renumbered[id(r)] for site, r in zip(sites, resolved, strict=True)}
    on, families = _places(np.concatenate([[-1], group_of]), len(sizes), sites, labels)
    costs = node_costs(traced, number, len(order))
    held = traced.atoms.causes(order[:, None])[:, 0] if len(order) else np.zeros(0, np.int64)
    weights = set(traced.weights)
    groups = tuple(_group(traced, i, starts[i], sizes[i], on, held, costs, weights) for i in range(len(sizes)))
    found = Groups(traced, _named(traced, groups), labels, len(order), families, number)
    kinds = kinds_of(found)
    return replace(found, groups=tuple(replace(g, kind=kind) for g, kind in zip(found.groups, kinds, strict=True)))


def _resolved(traced: Traced) -> tuple[list[Site], list[Labels]]:
    sites, resolved = [], []
    seen: dict[int, Labels] = {}
    for value, axes in traced.axes.items():
        for i, axis in enumerate(axes or ()):
            if axis.labels is None:
                continue
            key = id(axis.labels)
            if key not in seen:
                seen[key] = traced.atoms.resolve(axis.labels, frozen=True)
            if seen[key].shape[1]:
                sites.append((value, i))
                resolved.append(seen[key])
    return sites, resolved


def _partition(traced: Traced, sites: list[Site], resolved: list[Labels]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Atoms in order of group and first occurrence, and the group of each."""
    total = len(traced.atoms)
    finger = np.zeros(total, np.uint64)  # sum over occurrences of a number drawn for the site
    first = np.full(total, np.iinfo(np.int64).max)
    draws = np.random.default_rng(0).integers(1, 2**63, len(sites), dtype=np.uint64)
    place = 0
    for draw, rows in zip(draws, resolved, strict=True):
        atoms, index, counts = np.unique(rows, return_index=True, return_counts=True)
        finger[atoms] += draw * counts.astype(np.uint64)
        first[atoms] = np.minimum(first[atoms], place + index)
        place += rows.size
    finger[0] = 0
    atoms = np.flatnonzero(finger)
    if not len(atoms):
        return atoms, atoms
    frozen = traced.atoms.causes(atoms[:, None])[:, 0]
    beside = _beside(finger, resolved)[atoms]
    _, inverse = np.unique(np.stack([finger[atoms], frozen.astype(np.uint64), beside]), axis=1, return_inverse=True)
    inverse = inverse.ravel()
    earliest = np.full(inverse.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, inverse, first[atoms])
    rank = np.argsort(np.argsort(earliest))[inverse]
    order = np.lexsort((first[atoms], rank))
    return atoms[order], rank[order]


def _beside(finger: NDArray[np.uint64], resolved: list[Labels]) -> NDArray[np.uint64]:
    """For each atom a number drawn for the atoms of its own fingerprint that share a row with it.

    Factors of equal size (32 groups of 32 channels) occur equally often everywhere; what tells them apart is that an atom
    stands beside all atoms of the other factors, and beside none of its own.
    """
    found = np.zeros(len(finger), np.uint64)
    draws = np.random.default_rng(1).integers(1, 2**63, len(finger), dtype=np.uint64)
    seen: set[int] = set()
    for rows in resolved:
        if rows.shape[1] < 2 or id(rows) in seen:
            continue
        seen.add(id(rows))
        for i in range(rows.shape[1]):
            for j in range(i):
                one, two = rows[:, i], rows[:, j]
                alike = (one > 0) & (two > 0) & (finger[one] == finger[two])
                if alike.any():
                    pairs = np.unique(np.stack([one[alike], two[alike]]), axis=1)
                    np.add.at(found, pairs[0], draws[pairs[1]])
                    np.add.at(found, pairs[1], draws[pairs[0]])
    return found


def _places(of: NDArray[np.int64], count: int, sites: list[Site], labels: Mapping[Site, Labels]) -> tuple[list[list[Site]], nx.Graph[int]]:
    """Sites of each group, and which groups occur in one row of an axis."""
    on: list[list[Site]] = [[] for _ in range(count)]
    families: nx.Graph[int] = nx.Graph()
    families.add_nodes_from(range(count))
    known: dict[int, NDArray[np.int64]] = {}
    for site in sites:
        rows = labels[site]
        if id(rows) not in known:
            there = np.zeros(count + 1, bool)
            there[of[rows]] = True
            known[id(rows)] = np.flatnonzero(there[:-1])
            families.add_edges_from(_together(of[rows], count))
        for g in known[id(rows)]:
            on[g].append(site)
    return on, families


def _together(groups: NDArray[np.int64], count: int) -> list[tuple[int, int]]:
    """Pairs of groups that occur in one row."""
    pairs: list[tuple[int, int]] = []
    for i in range(groups.shape[1]):
        for j in range(i):
            one, two = groups[:, i], groups[:, j]
            both = (one >= 0) & (two >= 0) & (one != two)
            codes = np.unique(one[both] * count + two[both])
            pairs += [divmod(int(c), count) for c in codes]
    return pairs


def _group(
    traced: Traced, index: int, start: int, size: int, on: list[list[Site]], held: NDArray[np.int64], costs: Costs, weights: set[str]
) -> Group:
    rows = slice(start, start + size)
    why = int(held[start]) if size else 0
    reason = traced.reasons[why] if why else None
    if reason is None and not any(v in weights for v, _ in on[index]):
        reason = Reason("", "", on[index][0][0], on[index][0][1], "has no weights that would get smaller")
    if reason is None and size == 1:
        reason = Reason("", "", on[index][0][0], on[index][0][1], "has one coordinate left, which must stay")
    return Group(
        index,
        "",
        int(start),
        int(size),
        tuple(on[index]),
        reason,
        float(costs.parameters[rows].mean()),
        float(costs.macs[rows].mean()),
    )


def _named(traced: Traced, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    constants = traced.constants
    used: dict[str, int] = {}
    named = []
    for group in groups:
        site = next((s for s in group.sites if s[0] in constants), group.sites[0])
        name = f"{site[0]}:{site[1]}"
        used[name] = used.get(name, 0) + 1
        name = name if used[name] == 1 else f"{name}#{used[name]}"
        named.append(replace(group, name=name))
    return tuple(named)


def why_nothing(groups: Groups, notes: Mapping[str, str]) -> str:
    """One sentence on why nothing was removed."""
    free = groups.free()
    if free:
        some = next(iter(notes.items()), None)
        return "Nothing to prune: " + (f"{some[0]} {some[1]}." if some else "the options leave no channel to remove.")
    frozen = sorted((g for g in groups.groups if g.frozen), key=lambda g: -g.parameters * g.size)
    if not frozen:
        return "Nothing to prune: the model has no weights."
    return f"Nothing to prune: all {len(frozen)} groups are frozen, the most costly one because {frozen[0].frozen}."
