"""Kinds: what a group is (a head, a neuron, a channel, …), from signatures and traced dims, never from names.

What a coordinate is, its dims say. At a contraction of an operand of data with stored weights, the summed dims are *columns*, those of the
weights alone *outputs*, those that both sides and the result share *parts*. At a contraction of two operands of data, whatever
weights made is

    head                 shared by both operands and the result: the contraction runs along it
    key-value, query     of two heads in one axis, the one that both operands' weights have, and the one that only one side's have
    qk                   summed over (query and key); qk and vo at once, as where one weight makes all three: head-width
    vo                   of one operand and the result (value and output)

and at contractions with stored weights, a group that is none of these is

    recurrent            two axes of one stored operand share it: a unit that sees itself one step before
    expert               a part of a stack of weights, or of what the network picks weights from (`spa.graph.chosen`)
    expert-neuron        column and output of such stacks, or of the weights that were picked
    vocabulary           rows of a stored table that are picked by data
    residual             where data of different makers are added up, and a norm runs over it or no window slides along
    channel              column or output of a map with a window
    neuron               output of one map and column of another
    output, position     an axis of a graph output; what no weight makes, and a contraction of data sums over
    other                anything else

Operators that hold a whole attention or a mixture of experts say what their dims are in the table (`Signature.roles`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from spa.signatures.table import STAT, SUM, Linear, Operand, Signature, Term, dims_of, kind_of

if TYPE_CHECKING:
    from spa.graph.groups import Groups
    from spa.graph.trace import Axis, NodeTrace

KINDS = (
    "head", "key-value", "query", "qk", "vo", "head-width", "neuron", "residual", "vocabulary", "expert", "expert-neuron", "channel",
    "recurrent", "output", "position", "other",
)  # fmt: skip

SIDES = frozenset({"column", "output"})
"""Roles of the dims of a product with a stored weight that is no linear map of the table (`Signature.linear`): it can't be repaired."""

Found = Mapping[str, set[int]]  # role -> indices of groups


def kinds_of(groups: Groups) -> tuple[str, ...]:
    """The kind of each group, in their order. Time is linear in nodes and positions."""
    seen = _Roles(groups)
    return tuple(_kind(seen, g.index) for g in groups.groups)


def _kind(seen: _Roles, index: int) -> str:
    """The first kind whose conditions a group meets."""

    def has(role: str) -> bool:
        return index in seen.found[role]

    made = has("output")
    for kind in ("head", "query", "qk", "vo", "head-width"):
        if has(f"is {kind}") or (made and has(kind)):
            return _of_attention(seen, index)
    for kind in ("expert", "expert-neuron"):
        if has(f"is {kind}"):
            return kind
    rules = (
        ("recurrent", has("recurrent")),
        ("expert", has("part")),
        ("vocabulary", has("row")),
        ("residual", has("added") and has("norm") and has("column")),
        ("expert-neuron", made and has("stacked")),
        ("channel", has("window column") or (has("window output") and not has("column"))),
        ("residual", has("added") and made),
        ("neuron", made and has("column")),
        ("position", has("qk") or has("vo")),
        ("output", has("result")),
        ("channel", has("window output")),
    )
    return next((kind for kind, holds in rules if holds), "other")


def _of_attention(seen: _Roles, index: int) -> str:
    """Which part of an attention a group is that weights make and that runs through a contraction of data."""

    def has(role: str) -> bool:
        return index in seen.found[role] or index in seen.found[f"is {role}"]

    if has("query"):
        return "query"
    if has("head"):
        beside = list(seen.groups.families.neighbors(index))
        if any(n in seen.found["is query"] for n in beside):
            return "key-value"
        beside = [n for n in beside if n in seen.found["head"] and seen.makers[n]]
        if any(seen.within(index, n) for n in beside):
            return "query"
        return "key-value" if any(seen.within(n, index) for n in beside) else "head"
    if has("head-width") or (has("qk") and has("vo")):
        return "head-width"
    return "qk" if has("qk") else "vo"


class _Roles:
    """One walk over the nodes: which groups play which role anywhere.

    makers: group -> linear maps that have it as an output -> positions that it has there.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.found: dict[str, set[int]] = defaultdict(set)
        self.makers: dict[int, dict[int, int]] = defaultdict(dict)
        self._of = np.concatenate([[-1], groups.of_coordinate()])
        self._known: dict[int, frozenset[int]] = {}
        self._origins: dict[str, int] = {t.name: 1 << i for i, t in enumerate(groups.traced.graph.inputs)}
        self._bits = len(self._origins)
        self._chosen = {pick.node for choice in groups.traced.choices for pick in choice.picks}
        self._parts: set[str] = set()  # stored weights of which the network picked some
        for number, node in enumerate(groups.traced.nodes):
            if node.signature is not None:
                self._look(number, node, node.signature)
            self._carry(node)
        for tensor in groups.traced.graph.outputs:
            for axis in range(len(groups.traced.axes.get(tensor.name) or ())):
                self._note("result", self._site(tensor.name, axis))

    # ------------------------------------------------------------------ groups of dims

    def _site(self, value: str, axis: int) -> Iterable[int]:
        labels = self.groups.labels.get((value, axis))
        return () if labels is None else self._inside(labels)

    def _inside(self, labels: np.ndarray) -> frozenset[int]:
        key = id(labels)  # alive as long as the groups
        if key not in self._known:
            there = np.zeros(len(self.groups.groups) + 1, bool)
            there[self._of[labels]] = True
            self._known[key] = frozenset(np.flatnonzero(there[:-1]).tolist())
        return self._known[key]

    def _dim(self, node: NodeTrace, name: str) -> frozenset[int]:
        axis = node.dims.get(name)
        return frozenset() if axis is None or axis.labels is None else self._inside(self.groups.dim_labels(axis))

    def _counts(self, axis: Axis, members: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Positions of a dim on which each group occurs."""
        labels = self._of[self.groups.dim_labels(axis)] if members else np.zeros((0, 0), np.int64)
        for g in members:
            yield g, int((labels == g).any(axis=1).sum())

    def within(self, one: int, other: int) -> bool:
        """Whether a group is made wherever it is on fewer of the positions that another is made on."""
        mine, theirs = self.makers[one], self.makers[other]
        return mine != theirs and all(count <= theirs.get(number, 0) for number, count in mine.items())

    def _note(self, role: str, members: Iterable[int]) -> None:
        self.found[role].update(members)

    # ------------------------------------------------------------------ nodes

    def _data(self, node: NodeTrace, number: int) -> int:
        """Where an operand's data come from, as bits; 0 where it is stored."""
        inputs = node.node.inputs
        return self._origins.get(inputs[number].name, 0) if number < len(inputs) and inputs[number].name else 0

    def _carry(self, node: NodeTrace) -> None:
        """Values after a node come from where its operands came from; after a contraction, a table or nothing at all, from the node."""
        bits = 0
        for number in range(len(node.node.inputs)):
            bits |= self._data(node, number)
        picked = self._picks(node) and not self._data(node, 0)
        if picked or (not bits and any(t.name in self._parts for t in node.node.inputs)):
            self._parts.update(t.name for t in node.node.outputs if t.name)
            bits = 0
        if bits and node.signature is not None and node.signature.macs:
            bits = 0
            fresh = True
        else:
            fresh = node.signature is None and bool(bits)
        if fresh:
            bits = 1 << self._bits
            self._bits += 1
        self._origins.update((t.name, bits) for t in node.node.outputs if t.name)

    def _picks(self, node: NodeTrace) -> bool:
        """Whether a node picks at positions that the network chose itself."""
        return bool(node.node.outputs) and node.node.outputs[0].name in self._chosen

    def _look(self, number: int, node: NodeTrace, signature: Signature) -> None:
        for name in node.dims:
            if kind_of(signature, name) is STAT:
                self._note("norm", self._dim(node, name))
        for name, role in signature.roles.items():
            self._note(f"is {role}", self._dim(node, name))
            if role in SIDES:
                self._note(role, self._dim(node, name))
        for i in signature.adds:
            others = [self._data(node, j) for j in signature.adds if j != i]
            mine = self._data(node, i)
            if mine and any(other and other != mine for other in others):
                self._note("added", (g for name in _names(signature.inputs[i]) for g in self._dim(node, name)))
        for name in signature.picked:
            table = next((_names(o) for i, o in enumerate(signature.inputs) if name in _names(o) and not self._data(node, i)), [])
            for other in table:  # a table is a linear map of positions
                row = "part" if self._picks(node) else "row"
                self._note(row if other == name else "output", self._dim(node, other))
        self._contraction(number, node, signature)

    def _contraction(self, number: int, node: NodeTrace, signature: Signature) -> None:
        given = len(signature.inputs)  # a damaged node may lack operands
        maps = [x for x in signature.linear if x.data < given and x.weight < given]
        stored = next((x for x in maps if self._data(node, x.data) and not self._data(node, x.weight)), None)
        if stored is not None:
            self._linear(number, node, signature, stored)
        elif maps and signature.outputs and not signature.roles and maps[0].window is None:
            self._of_data(node, signature, maps[0])
        for i, operand in enumerate(signature.inputs):
            if signature.macs and operand is not None and not self._data(node, i):
                for name in _twice(operand):
                    self._note("recurrent", self._dim(node, name))

    def _linear(self, number: int, node: NodeTrace, signature: Signature, linear: Linear) -> None:
        data, weight = _names(signature.inputs[linear.data]), _names(signature.inputs[linear.weight])
        where = "" if linear.window is None else "window "
        shared = [n for n in weight if n in data and kind_of(signature, n) is not SUM]
        stacked = any(self._dim(node, n) for n in shared) and linear.window is None
        stacked |= node.node.inputs[linear.weight].name in self._parts
        for name in weight:
            members = self._dim(node, name)
            role = "column" if name in data else "output"
            if name in shared:
                self._note("part" if linear.window is None else "window output", members)
                continue
            if stacked:
                self._note("stacked", members)
            self._note(where + role, members)
            if role == "output":
                self._note("output", members)
                for g, count in self._counts(node.dims[name], members):
                    self.makers[g][number] = max(self.makers[g].get(number, 0), count)

    def _of_data(self, node: NodeTrace, signature: Signature, linear: Linear) -> None:
        one, other = _names(signature.inputs[linear.data]), _names(signature.inputs[linear.weight])
        result = _names(signature.outputs[0])
        for name in dict.fromkeys((*one, *other)):
            both = name in one and name in other
            if both:
                self._note("head" if name in result else "qk", self._dim(node, name))
            elif name in result:
                self._note("vo", self._dim(node, name))


def _names(operand: Operand) -> list[str]:
    return [n for term in operand or () for n in dims_of(term)]


def _twice(operand: tuple[Term, ...]) -> Iterator[str]:
    """Dims that occur on more than one axis of an operand."""
    axes = [set(dims_of(t)) for t in operand]
    for i, names in enumerate(axes):
        for later in axes[i + 1 :]:
            yield from names & later
