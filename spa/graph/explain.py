"""Explaining: the dependency graph, why an axis stays, and why two axes shrink together.

The graph has a node for each site (an axis of a value) and one for each dim of each operator node. A site is joined with the
dims that its axis is made of in the operator's signature:

    x:1 — #3:k (Conv conv1) — conv1.weight:1        conv1.weight:0 — #3:o (Conv conv1) — y:1

so that dims of one node that have nothing to do with each other do not connect. A shortest path through places of one group
says why two sites are coupled; a shortest path to where a freezing began says why a site stays.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption
from spa.graph.atoms import Labels
from spa.graph.count import macs_terms
from spa.graph.groups import Group, Groups, Site
from spa.graph.trace import Axis, NodeTrace, Reason, node_name
from spa.graph.view import dtype_holds_weights
from spa.proof.feeds import free_batch
from spa.signatures.table import Signature, dims_of

_WHOLE = Reason("", "", "it", None, "stays whole, as nothing says that it may shrink")


@dataclass(frozen=True)
class Step:
    """One step of a path: through dim `dim` of a node, to a site."""

    op: str
    node: str
    dim: str
    site: Site


@dataclass(frozen=True)
class Path:
    """A way through the graph from one site to another, in at least zero steps."""

    start: Site
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "".join([site_name(self.start), *(f" —{s.op} {s.node} (dim {s.dim})→ {site_name(s.site)}" for s in self.steps)])


@dataclass(frozen=True)
class Part:
    """What one group (or none: an axis that was never free) means for an axis.

    reason: why it stays, None if it may shrink. path: from the axis to where the freezing began, where one is known.
    coupled: all other sites of the group.
    """

    group: Group | None
    reason: Reason | None
    path: Path | None
    coupled: tuple[Site, ...]


@dataclass(frozen=True)
class Explanation:
    """An axis: its length, and what each group on it means. `held` counts positions that belong to no group at all."""

    site: Site
    length: int
    parts: tuple[Part, ...]
    held: int = 0


@dataclass(frozen=True)
class Cause:
    """One cause of freezing, over all groups that it holds.

    groups, channels: how many. example, node: where the most costly of them began.
    parameters, macs: of the whole model, those that lie on a frozen channel (each counted once).
    stuck: those of the parameters that lie on no free channel either, so that nothing can remove them.
    """

    cause: str
    op: str
    groups: int
    channels: int
    example: str
    node: str
    parameters: float
    macs: float
    stuck: float


def site_name(site: Site) -> str:
    """A site as the command line takes it."""
    return f"{site[0]}:{site[1]}"


def dependency_graph(groups: Groups) -> nx.Graph[str]:
    """The graph of sites and dims of nodes.

    Returns
    -------
    nx.Graph
        Sites are named "value:axis", dims of nodes "#number:dim". Attributes are strings and numbers: kind ("site" or "node"),
        name, groups (names, one a line), frozen (the reason, or ""), size; of sites also value and axis, of nodes op and dim.
    """
    return _Places(groups).graph


def sites_of(groups: Groups, text: str) -> tuple[Site, ...]:
    """The sites that VALUE:AXIS, VALUE (all its axes) or the name of a group means. Raises BadOption if there is none."""
    axes = groups.traced.axes
    if text in groups.by_name:
        text = re.sub(r"#\d+$", "", text)
    value, _, tail = text.rpartition(":")
    if value not in axes or not re.fullmatch(r"-?\d+", tail):
        value, tail = text, ""
    if value not in axes:
        raise BadOption(f"--explain: there is no value {value!r} in the model{near(value, axes)}.")
    rank = len(axes[value] or ())
    if axes[value] is None:
        raise BadOption(f"--explain: the shape of {value!r} is not known, so nothing is removed from it; try --input.")
    if not tail:
        if not rank:
            raise BadOption(f"--explain: {value!r} is a single number and has no axes.")
        return tuple((value, i) for i in range(rank))
    axis = int(tail) + (rank if int(tail) < 0 else 0)
    if not 0 <= axis < rank:
        raise BadOption(f"--explain: {value!r} has {rank} axes, 0 to {rank - 1}, and no axis {tail}.")
    return ((value, axis),)


def explain(groups: Groups, site: Site) -> Explanation:
    """Why an axis may shrink, and what with, or why it may not. Raises BadOption for an unknown value or axis."""
    value, index = sites_of(groups, site_name(site))[0]
    axis = (groups.traced.axes[value] or ())[index]
    places = _Places(groups)
    rows = groups.labels.get((value, index))
    if rows is None:
        reason = groups.traced.reasons[axis.why] if axis.why else _WHOLE
        if axis.length == 1 and reason.axis is None:
            reason = replace(_WHOLE, cause="has size one")
        return Explanation((value, index), axis.length, (Part(None, reason, places.to_origin((value, index), reason), ()),))
    parts = []
    for group in (groups.groups[i] for i in places.groups_on(rows)):
        way = None if group.frozen is None else places.to_origin((value, index), group.frozen)
        parts.append(Part(group, group.frozen, way, tuple(s for s in group.sites if s != (value, index))))
    return Explanation((value, index), axis.length, tuple(parts), int((~rows.any(axis=1)).sum()))


def path(groups: Groups, one: Site, other: Site) -> Path | None:
    """Why two sites shrink together: the shortest way through sites of one group, a free one if any; None if they are not coupled."""
    places = _Places(groups)
    shared = [g for g in groups.groups if one in g.sites and other in g.sites]
    for some in ([g for g in shared if g.frozen is None], shared):
        found = [p for g in some if (p := places.between(one, other, partial(places.holds, g.index))) is not None]
        if found:
            return min(found, key=lambda p: len(p.steps))
    return None


def frozen_causes(groups: Groups) -> tuple[Cause, ...]:
    """Why channels stay, most costly first: what nothing can remove, then all that lies on frozen channels."""
    kinds: dict[tuple[str, str], list[Group]] = {}
    for group in groups.groups:
        if group.frozen is not None:
            kinds.setdefault((group.frozen.cause.rstrip(","), group.frozen.op), []).append(group)
    number = np.zeros(len(groups.groups), np.int64)  # 0: free
    for i, members in enumerate(kinds.values(), 1):
        number[[g.index for g in members]] = i
    of = np.concatenate([[-1], number[groups.of_coordinate()]])  # coordinate + 1 -> cause
    parameters, macs, stuck = _held_costs(groups, of, len(kinds))
    causes = []
    for i, ((cause, op), members) in enumerate(kinds.items(), 1):
        largest = max(members, key=lambda g: g.parameters * g.size)
        assert largest.frozen is not None
        began = largest.frozen
        example = began.value if began.axis is None else site_name((began.value, began.axis))
        causes.append(Cause(cause, op, len(members), sum(g.size for g in members), example, began.node,
                            float(parameters[i]), float(macs[i]), float(stuck[i])))
    return tuple(sorted(causes, key=lambda c: (-c.stuck, -c.parameters, -c.macs, c.cause, c.op)))


def near(name: str, known: Iterable[str]) -> str:
    """The names nearest to one that does not exist, as the end of a sentence."""
    close = difflib.get_close_matches(name, list(known), 3, 0.5)
    return f"; near it are: {', '.join(close)}" if close else ""


def printable(text: str) -> str:
    """One line without control characters, which names in a model may hold."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable_graph(graph: nx.Graph[str]) -> nx.Graph[str]:
    """The same graph without control characters, which XML can't hold; line breaks between names stay."""
    copy: nx.Graph[str] = nx.Graph()

    def text(value: Any) -> Any:
        return "\n".join(map(printable, value.split("\n"))) if isinstance(value, str) else value

    copy.add_nodes_from((text(n), {k: text(v) for k, v in d.items()}) for n, d in graph.nodes(data=True))
    copy.add_edges_from((text(a), text(b)) for a, b in graph.edges)
    return copy


def dot_text(graph: nx.Graph[str]) -> str:
    """The dependency graph for Graphviz: sites round, dims of nodes square, what is frozen grey."""
    numbers = {name: f"n{i}" for i, name in enumerate(graph)}
    lines = ["graph dependencies {", "  node [fontname=monospace];"]
    for name, data in graph.nodes(data=True):
        label = name if data["kind"] == "site" else f"{data['op']} {data['name']} (dim {data['dim']})"
        shape = "ellipse" if data["kind"] == "site" else "box"
        fill = ', style=filled, fillcolor="lightgrey"' if data["frozen"] else ""
        tip = _quoted(data["groups"] or data["frozen"])
        lines.append(f"  {numbers[name]} [label={_quoted(label)}, shape={shape}{fill}, tooltip={tip}];")
    lines += [f"  {numbers[a]} -- {numbers[b]};" for a, b in graph.edges]
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    escaped = printable(text.replace("\n", ", ")).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _held_costs(groups: Groups, of: NDArray[np.int64], count: int) -> tuple[NDArray[np.float64], ...]:
    """(count + 1,) parameters and MACs on frozen channels by cause, and parameters on no free channel.

    Axes are independent, so an element lies on none of some positions with the product over axes of (1 - their share).
    """
    traced = groups.traced
    parameters, macs, stuck = np.zeros(count + 1), np.zeros(count + 1), np.zeros(count + 1)
    shares: dict[int, tuple[NDArray[np.float64], float, NDArray[np.float64]]] = {}

    def share(rows: Labels) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
        """Shares of positions that lie on each cause, on a free group, on either."""
        if id(rows) not in shares:
            on = of[rows]
            free = (on == 0).any(axis=1)
            held, either = np.zeros(count + 1), np.full(count + 1, free.mean())
            for cause in np.unique(on[on > 0]):
                touched = (on == cause).any(axis=1)
                held[cause], either[cause] = touched.mean(), (touched | free).mean()
            shares[id(rows)] = held, float(free.mean()), either
        return shares[id(rows)]

    for name, tensor in traced.constants.items():
        if dtype_holds_weights(tensor.dtype):
            found = [share(groups.labels[name, a]) for a in range(len(tensor.shape)) if (name, a) in groups.labels]
            size = float(np.prod(tensor.shape))
            none, unfree, neither = _outside(found, count)
            parameters += size * (1 - none)
            stuck += size * (unfree - neither)
    kept: list[Labels] = []  # as `shares` goes by identity
    for node in traced.nodes:
        for factor, dims in macs_terms(node):
            axes = [node.dims[d] for d in dims if d in node.dims]
            rows = [groups.number[traced.atoms.resolve(a.labels, frozen=True)] for a in axes if a.labels is not None]
            kept += rows
            size = float(factor * np.prod([a.length for a in axes], dtype=np.float64))
            macs += size * (1 - _outside([share(r) for r in rows if r.shape[1]], count)[0])
    return parameters, macs / free_batch(traced), stuck  # of one sample, as in the counts


def _outside(
    found: list[tuple[NDArray[np.float64], float, NDArray[np.float64]]], count: int
) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """Shares of elements that lie, on all axes, off each cause; off free groups; off both."""
    off, unfree, neither = np.ones(count + 1), 1.0, np.ones(count + 1)
    for held, free, either in found:
        off, unfree, neither = off * (1 - held), unfree * (1 - free), neither * (1 - either)
    return off, unfree, neither


def _equal(signature: Signature) -> dict[str, list[str]]:
    """Dim that an equation finds -> the dims that it is found from, whose sites it is therefore joined with too."""
    found: dict[str, list[str]] = {}
    for left, right in signature.equations:
        for name in dims_of(left):
            found.setdefault(name, []).extend(dims_of(right))
    return found


class _Places:
    """The dependency graph, with the groups and reasons of each of its nodes as objects."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.graph: nx.Graph[str] = nx.Graph()
        self.on: dict[str, frozenset[int]] = {}
        self.why: dict[str, Reason | None] = {}  # of places that were never free
        self.of = np.concatenate([[-1], groups.of_coordinate()])
        self._known: dict[int, frozenset[int]] = {}
        for value, axes in groups.traced.axes.items():
            for i, axis in enumerate(axes or ()):
                self._enter(site_name((value, i)), axis, self._on(groups.labels.get((value, i))), kind="site", name=value, value=value,
                            axis=i)
        for number, node in enumerate(groups.traced.nodes):
            self._node(number, node)

    def groups_on(self, rows: Labels | None) -> list[int]:
        """Groups that occur in labels, in graph order."""
        return sorted(self._on(rows))

    def holds(self, group: int, name: str) -> bool:
        """Whether a group passes through a place."""
        return group in self.on[name]

    def _on(self, rows: Labels | None) -> frozenset[int]:
        if rows is None:
            return frozenset()
        if id(rows) not in self._known:
            self._known[id(rows)] = frozenset(int(g) for g in np.unique(self.of[rows]) if g >= 0)
        return self._known[id(rows)]

    def _enter(self, key: str, of: Axis | None, on: frozenset[int], **attributes: str | int) -> None:
        reasons = self.groups.traced.reasons
        held = reasons[of.why] if of is not None and of.labels is None and of.why else None
        self.on[key], self.why[key] = on, held
        members = [self.groups.groups[g] for g in sorted(on)]
        causes = [str(g.frozen) for g in members if g.frozen is not None] + ([str(held)] if held else [])
        self.graph.add_node(
            key, **attributes, groups="\n".join(g.name for g in members), frozen="\n".join(dict.fromkeys(causes)),
            size=0 if of is None else of.length,
        )

    def _node(self, number: int, node: NodeTrace) -> None:
        if node.signature is None:
            return
        equal = _equal(node.signature)
        sides = [*zip(node.node.inputs, node.signature.inputs, strict=False), *zip(node.node.outputs, node.signature.outputs, strict=False)]
        for tensor, operand in sides:
            for i, term in enumerate(operand or ()):
                site = site_name((tensor.name, i))
                if not tensor.name or site not in self.on:
                    continue
                for dim in dict.fromkeys(d for name in dims_of(term) for d in (name, *equal.get(name, ()))):
                    key = f"#{number}:{dim}"
                    if key not in self.on:
                        self._enter(key, node.dims.get(dim), self._on_dim(node.dims.get(dim)), kind="node", op=node.node.op,
                                    name=node_name(node.node), dim=dim)
                    self.graph.add_edge(site, key)

    def _on_dim(self, axis: Axis | None) -> frozenset[int]:
        if axis is None or axis.labels is None:
            return frozenset()
        rows = self.groups.number[self.groups.traced.atoms.resolve(axis.labels, frozen=True)]
        return frozenset(int(g) for g in np.unique(self.of[rows]) if g >= 0)

    def to_origin(self, site: Site, reason: Reason) -> Path | None:
        """The way from a site to where the freezing began: through places of the same reason, or else through frozen ones."""
        if reason.axis is None:
            return None
        same = {g.index for g in self.groups.groups if g.frozen == reason}
        held = {g.index for g in self.groups.groups if g.frozen is not None}

        def frozen(name: str) -> bool:
            return bool(self.on[name] & held) or self.why[name] is not None

        origin = (reason.value, reason.axis)
        return self.between(site, origin, lambda name: bool(self.on[name] & same) or self.why[name] == reason) or self.between(
            site, origin, frozen)

    def between(self, one: Site, other: Site, allowed: Callable[[str], bool]) -> Path | None:
        """The shortest way through allowed places; its ends are allowed in any case."""
        ends = {site_name(one), site_name(other)}
        if not all(e in self.graph for e in ends):
            return None
        view = nx.subgraph_view(self.graph, filter_node=lambda name: name in ends or allowed(name))
        try:
            names = nx.shortest_path(view, site_name(one), site_name(other))
        except nx.NetworkXNoPath:
            return None
        return Path(one, tuple(self._steps(names)))

    def _steps(self, names: list[str]) -> Iterator[Step]:
        for dim, site in zip(names[1::2], names[2::2], strict=True):
            passed, reached = self.graph.nodes[dim], self.graph.nodes[site]
            yield Step(passed["op"], passed["name"], passed["dim"], (reached["value"], reached["axis"]))


__all__ = [
    "Cause", "Explanation", "Part", "Path", "Step", "dependency_graph", "dot_text", "explain", "frozen_causes", "near", "path",
    "printable", "printable_graph", "site_name", "sites_of",
]
