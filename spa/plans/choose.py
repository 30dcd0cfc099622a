"""Choosing: how many coordinates each group keeps, and which. Scores in, a mask over all coordinates out."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from spa.criteria.score import Scores
from spa.errors import BadOption
from spa.graph.groups import Group, Groups
from spa.graph.kinds import KINDS
from spa.graph.trace import node_name
from spa.plans.protect import parsed, protected
from spa.plans.spread import log_shares, threshold_by_parameters
from spa.plans.widths import Widths

SCOPES = ("local", "global", "isomorphic", "cost", "log")
NORMALIZATIONS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "none": lambda scores: scores,
    "sum": lambda scores: scores / (scores.sum() or 1.0),
    "mean": lambda scores: scores / (scores.mean() or 1.0),
    "max": lambda scores: scores / (scores.max() or 1.0),
    "standardize": lambda scores: (scores - scores.mean()) / (scores.std() or 1.0),
    "energy": lambda scores: scores,  # scores come as errors over the energy of outputs
}
MANY = 14  # groups of a family of which every choice is tried
MISS = 0.05  # a factor of a product that gets this much closer to the ratio is preferred to one with more coordinates


@dataclass(frozen=True)
class Options:
    """What to remove. `ratios` gives groups (globs or /regexes/ on names) a ratio of their own.

    units: kinds of groups that may shrink (`spa.graph.kinds.KINDS`), all if empty. protect: lines that name what stays
    (`spa.plans.protect`).

    normalize: how scores of different groups are made comparable where groups compete (scope global or isomorphic).
    """

    ratio: float = 0.5
    scope: str = "local"
    multiple_of: int | str = "auto"
    keep_at_least: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    normalize: str = "mean"
    units: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, ratio in {"--ratio": self.ratio, **{f"the ratio of {k!r}": v for k, v in self.ratios.items()}}.items():
            low = ratio >= 0 if name != "--ratio" else ratio > 0
            if not (isinstance(ratio, int | float) and low and ratio < 1):
                raise BadOption(f"{name} is {ratio}, but must lie between 0 and 1, both excluded: 0.5 removes half of the channels.")
        if self.scope not in SCOPES:
            raise BadOption(f"--scope is {self.scope!r}; the choice is: {', '.join(SCOPES)}.")
        if self.normalize not in NORMALIZATIONS:
            raise BadOption(f"--normalize is {self.normalize!r}; the choice is: {', '.join(NORMALIZATIONS)}.")
        if self.multiple_of != "auto" and (not isinstance(self.multiple_of, int) or self.multiple_of < 1):
            raise BadOption(f"--multiple-of is {self.multiple_of!r}, but must be 'auto' or a whole number from 1 on.")
        if self.keep_at_least < 1:
            raise BadOption(f"--keep-at-least is {self.keep_at_least}, but every group keeps at least one channel.")
        parsed(self.protect)


@dataclass(frozen=True)
class Choice:
    """What goes: a mask over all coordinates. notes: group -> why it keeps more than was asked for."""

    gone: NDArray[np.bool_]
    notes: Mapping[str, str]


def choose(groups: Groups, scores: Scores, options: Options, *, block: int = 16) -> Choice:
    """Removes the lowest scores. `block` is what `multiple_of="auto"` stands for on the provider.

    local: the same ratio in every group. global: one threshold on scores that were normalised in their group.
    isomorphic: one threshold among groups of the same structure (Fang et al. 2024, arXiv 2407.04616). cost: as global, but the ratio is of
    the groups' parameters, not of their number of coordinates. log: as local, but more of late layers (`spa.plans.spread`).
    """
    space = find_space(groups, options, block=block, held=scores.held)
    scores = replace(scores, held=space.held)
    quota = _quota(groups, space.chosen, scores, space.wanted, options)
    notes = dict(space.notes)
    kept: dict[int, int] = {}
    for group in space.chosen:
        kept[group.index] = space.kept(group, group.size - quota[group.index])
        if kept[group.index] >= group.size:
            if 0 < quota[group.index] < 1:
                notes[group.name] = f"stays whole: the ratio asks for less than one of its {group.size} channels"
            elif quota[group.index]:
                notes[group.name] = f"stays whole: {group.size} channels have no smaller width that is a multiple of {space.step(group)}"
    return Choice(lowest(groups, scores, kept), notes)


def lowest(groups: Groups, scores: Scores, kept: Mapping[int, int]) -> NDArray[np.bool_]:
    """Mask of the coordinates with the lowest scores, so that each group (by index) keeps as many as asked for; held ones go last."""
    gone = np.zeros(groups.total, bool)
    for index, keep in kept.items():
        group = groups.groups[index]
        gone[group.start + order_of(group, scores)[: group.size - keep]] = True
    return gone


def order_of(group: Group, scores: Scores) -> NDArray[np.int64]:
    """(size,) a group's coordinates in the order in which they go."""
    found = scores.values[group.coordinates]
    held = np.zeros(group.size, bool) if scores.held is None else scores.held[group.coordinates]
    return np.lexsort((found, held))


@dataclass(frozen=True)
class Space:
    """What may shrink, and to which widths. wanted: group -> share that its options ask to remove. notes: group -> why it stays whole.

    held: (total,) coordinates that are protected.
    """

    chosen: tuple[Group, ...]
    wanted: Mapping[int, float]
    notes: Mapping[str, str]
    widths: Widths
    held: NDArray[np.bool_] = field(repr=False)

    def kept(self, group: Group, target: float) -> int:
        """Width nearest to `target` that the rounding allows; the group's own size where there is none below it."""
        return self.widths.kept(group, target)

    def step(self, group: Group) -> int:
        """The finest rounding that applies to a group."""
        return self.widths.step(group)

    def ladder(self, group: Group, rungs: int = 32) -> NDArray[np.int64]:
        """Widths that the rounding allows, ascending; the last is the group's own size."""
        targets = np.linspace(0, group.size, min(rungs, group.size) + 1)
        return np.unique([*(self.widths.kept(group, float(t)) for t in targets), group.size])


def find_space(groups: Groups, options: Options, *, block: int = 16, held: NDArray[np.bool_] | None = None) -> Space:
    """The groups that the options let shrink, one factor of each product. Raises BadOption for patterns that match nothing.

    held: coordinates that stay beside those that are protected (`Scores.held`).
    """
    notes: dict[str, str] = {}
    candidates = _selected(groups, options)
    readers = readers_of(groups) if options.ratios or options.protect else {}
    also = held
    held = protected(groups, options.protect, lambda pattern: _matching(groups, pattern, readers))
    held = held if also is None else held | also
    for group in candidates:
        if held[group.coordinates].all():
            notes[group.name] = "stays whole: all of it is protected"
    candidates = [g for g in candidates if g.name not in notes]
    wanted = {g.index: _own_ratio(g, options, readers) for g in candidates}
    widths = Widths(groups, options.multiple_of, options.keep_at_least, block, held)
    return Space(tuple(_one_factor_each(groups, candidates, wanted, widths, notes)), wanted, notes, widths, held)


def _matching(groups: Groups, pattern: str, readers: Mapping[str, list[str]]) -> list[Group]:
    """Groups that a pattern means."""
    _check_pattern(pattern)
    return [g for g in groups.groups if matches([pattern], names_of(g, readers))]


def matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether any name fits any pattern: a glob, or a regular expression between slashes."""
    listed = list(names)
    for pattern in patterns:
        if len(pattern) > 2 and pattern[0] == pattern[-1] == "/":
            if any(re.search(pattern[1:-1], n) for n in listed):
                return True
        elif any(fnmatch.fnmatchcase(n, pattern) for n in listed):
            return True
    return False


def names_of(group: Group, readers: Mapping[str, list[str]]) -> set[str]:
    """Names that a pattern may mean a group by: its own, its kind's, its values', and the nodes that touch its constants."""
    values = {v for v, _ in group.sites}
    return {group.name, f"kind:{group.kind}", *values, *(n for v in values for n in readers.get(v, ()))}


def readers_of(groups: Groups) -> dict[str, list[str]]:
    """Nodes by the constants that they read."""
    constants = groups.traced.constants
    found: dict[str, list[str]] = {}
    for node in groups.traced.nodes:
        for tensor in node.node.inputs:
            if tensor.name in constants:
                found.setdefault(tensor.name, []).append(node_name(node.node))
    return found


def _check_pattern(pattern: str) -> None:
    if len(pattern) > 2 and pattern[0] == pattern[-1] == "/":
        try:
            re.compile(pattern[1:-1])
        except re.error as error:
            raise BadOption(f"{pattern!r} is no regular expression: {error}.") from error


def _selected(groups: Groups, options: Options) -> list[Group]:
    readers = readers_of(groups)
    names = {g.index: names_of(g, readers) for g in groups.groups}
    for option, patterns in (("--include", options.include), ("--exclude", options.exclude), ("the ratios file", options.ratios)):
        for pattern in patterns:
            _check_pattern(pattern)
            if not any(matches([pattern], n) for n in names.values()):
                raise BadOption(f"{option}: {pattern!r} matches no group, node or value; `spa inspect` lists the groups.")
    _check_units(groups, options.units)
    return [
        g
        for g in groups.free()
        if (not options.include or matches(options.include, names[g.index])) and not matches(options.exclude, names[g.index])
        and (not options.units or g.kind in options.units)
    ]


def _check_units(groups: Groups, units: Iterable[str]) -> None:
    """Raises BadOption for kinds that no group that may shrink is of."""
    there = {g.kind for g in groups.free()}
    for unit in units:
        if unit not in there:
            frozen = ", but all of that kind are frozen" if any(g.kind == unit for g in groups.groups) else ""
            listed = ", ".join(kind for kind in KINDS if kind in there) or "none"
            raise BadOption(f"--units: {unit!r} is no kind of group that may shrink here{frozen}; the model has: {listed}.")


def _own_ratio(group: Group, options: Options, readers: Mapping[str, list[str]]) -> float:
    if not options.ratios:
        return options.ratio
    names = names_of(group, readers)
    return next((r for p, r in options.ratios.items() if matches([p], names)), options.ratio)


def _one_factor_each(
    groups: Groups, candidates: Sequence[Group], wanted: Mapping[int, float], widths: Widths, notes: dict[str, str]
) -> list[Group]:
    """Of the factors of a product only one shrinks, so that the product shrinks by the ratio and not by its square.

    Of all ways to choose one factor a product, the one that saves most MACs on the way to the ratio (input and output channels
    of a group convolution rather than whole groups); then the one with more coordinates (head width rather than heads).
    """
    by_index = {g.index: g for g in candidates}
    shared = groups.families.subgraph(by_index)
    chosen = [g for g in candidates if not shared.degree(g.index)]
    for family in nx.connected_components(shared):
        if len(family) == 1:
            continue
        taken = _best_factors(shared.subgraph(family), by_index, wanted, widths)
        chosen += [by_index[i] for i in taken]
        for i in sorted(family - taken):
            rival = min(n for n in shared.neighbors(i) if n in taken)
            notes[by_index[i].name] = f"stays whole: it multiplies {by_index[rival].name}, which shrinks instead (--include chooses)"
    return sorted(chosen, key=lambda g: g.index)


def _best_factors(family: nx.Graph[int], by_index: Mapping[int, Group], wanted: Mapping[int, float], widths: Widths) -> set[int]:
    """Groups of a family of which no two multiply each other, none can be added, and that together save most."""

    def value(index: int) -> tuple[float, int]:
        group = by_index[index]
        lost = group.size * wanted[index]
        kept = widths.kept(group, group.size - lost)
        missed = abs(group.size - lost - kept) > MISS * group.size
        saved = 0.0 if missed else group.macs * min(group.size - kept, lost) + group.parameters * 1e-9
        return (saved if 0 < saved < math.inf else 0.0), group.size

    values = {i: value(i) for i in family}
    if len(family) > MANY:  # exact would take for ever
        taken: set[int] = set()
        for i in sorted(family, key=lambda i: (values[i][0] <= 0, -values[i][1], i)):
            if not any(n in taken for n in family.neighbors(i)):
                taken.add(i)
        return taken
    ways = [set(way) for way in nx.find_cliques(nx.complement(family))]
    worth = [(sum(values[i][0] for i in way), sum(values[i][1] for i in way)) for way in ways]
    most = max(w for w, _ in worth)
    return max(
        (way for way, (w, _) in zip(ways, worth, strict=True) if w >= most * (1 - 1e-6)),
        key=lambda way: (sum(values[i][1] for i in way), sorted(-i for i in way)),
    )


def _quota(groups: Groups, chosen: Sequence[Group], scores: Scores, wanted: Mapping[int, float], options: Options) -> dict[int, float]:
    """Coordinates that each group should lose."""
    quota = {g.index: g.size * wanted[g.index] for g in chosen}
    if options.scope == "local":
        return quota
    if options.scope == "log":
        return quota | _with_depth(chosen, wanted, options.ratio)
    pools: dict[object, list[Group]] = {}
    for group in chosen:
        own = wanted[group.index] != options.ratio
        key = group.index if own else structure(groups, group) if options.scope == "isomorphic" else "all"
        pools.setdefault(key, []).append(group)
    for pool in pools.values():
        parts = []
        for group in pool:
            found = NORMALIZATIONS[options.normalize](scores.values[group.coordinates])
            parts.append(found if scores.held is None else np.where(scores.held[group.coordinates], np.inf, found))
        every = np.sort(np.concatenate(parts))
        count = min(int(wanted[pool[0].index] * len(every) + 1e-6), int(np.isfinite(every).sum()))
        threshold = every[count - 1] if count else -np.inf
        if options.scope == "cost":
            threshold = threshold_by_parameters(pool, parts, wanted[pool[0].index])
        for group, found in zip(pool, parts, strict=True):
            quota[group.index] = float(np.count_nonzero(found <= threshold))
    return quota


def _with_depth(chosen: Sequence[Group], wanted: Mapping[int, float], ratio: float) -> dict[int, float]:
    """Coordinates that groups lose whose share grows with depth among the groups of their kind; those with a ratio of their own keep it."""
    found: dict[int, float] = {}
    for kind in dict.fromkeys(g.kind for g in chosen):
        layers = [g for g in chosen if g.kind == kind and wanted[g.index] == ratio]
        found |= {g.index: g.size * share for g, share in zip(layers, log_shares(len(layers), ratio), strict=True)}
    return found


def structure(groups: Groups, group: Group) -> tuple[object, ...]:
    """What makes two groups isomorphic: size, and the operators and axes that it goes through (as a multiset)."""
    if not hasattr(groups, "_readers_by_value"):
        found: dict[str, list[str]] = {}
        for node in groups.traced.nodes:
            for tensor in node.node.inputs:
                found.setdefault(tensor.name, []).append(node.node.op)
        object.__setattr__(groups, "_readers_by_value", found)
    readers: dict[str, list[str]] = groups._readers_by_value  # type: ignore[attr-defined]
    constants = groups.traced.constants
    marks = sorted((op, a, groups.traced.facts.shapes[v]) for v, a in group.sites if v in constants for op in readers.get(v, ()))
    return group.size, tuple(marks)
