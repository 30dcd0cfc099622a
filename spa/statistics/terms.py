"""What each expert of a mixture adds to a sum, token by token, read off the graph wherever the mixture is written.

    all compute      y = Σ_e g_e f_e(x): a sum along the experts' own axis, of data; the term of e is what the sum would be of e alone
    chosen compute   weights are picked at positions that the network chose (`spa.graph.chosen`): a sum along the axis of what was chosen,
                     and the positions say which expert a term is of
    one operator     holds all of it (`Signature.mixture`): f_e is the operator's own result with a router that asks for e alone. g is the
                     softmax of the router's scores, or the chosen ones' share of it, whichever adds up to the operator's result: kernels
                     differ in that (ONNX Runtime 1.32 scales always in QMoE, and as it is told in MoE). Where neither does, as with a
                     sparse mixer, nothing is said of its experts.

Terms are streamed batch by batch; what is kept are three numbers an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spa.errors import UnsupportedModel
from spa.graph.chosen import Choice
from spa.graph.groups import Group, Groups
from spa.graph.trace import NodeTrace, node_name
from spa.layers.gates import channel_axis
from spa.proof.check import session
from spa.proof.feeds import Feeds
from spa.proof.widen import widen
from spa.signatures.holding import held_by
from spa.signatures.table import SUM, Dim, Mixture, One, dims_of, kind_of
from spa.statistics.observe import stream
from spa.statistics.stepper import tapped
from spa.storage.store import Model

Array = NDArray[Any]
ALONE = -1e4  # a router's score beside 0 whose softmax is 0 in float16 too
CLOSE = 1e-3  # of its largest element: how near Σ g f must be to an operator's own result
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Terms:
    """Of each expert, (size,): tokens routed to it, Σ over these of ‖g f(x)‖₂, and the largest |f(x)| of any element."""

    count: NDArray[np.float64]
    norm: NDArray[np.float64]
    extreme: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean norm over the tokens routed to each expert; 0 for those that none was routed to."""
        return np.asarray(self.norm / np.maximum(self.count, 1))


Observed = tuple[dict[int, Terms], dict[int, str]]
"""Terms of groups of experts, by index, and why those of others can't be seen."""


class Source(Protocol):
    """A place of the graph where a group's terms are seen."""

    @property
    def values(self) -> tuple[str, ...]:
        """What it must be shown of each batch."""

    def add(self, values: Mapping[str, Array], terms: Terms) -> None:
        """Takes in a batch. Raises UnsupportedModel where the values are not what the graph says."""


def observed(model: Model, groups: Groups, experts: Sequence[Group], batches: Sequence[Feeds]) -> Observed:
    """Terms of each group of experts that can be seen, by its index; and why those of the others can't."""
    sources: dict[int, list[Source]] = {g.index: list(_sources(model, groups, g)) for g in experts}
    unseen = {i: "its experts' outputs can't be told apart in the graph" for i, found in sources.items() if not found}
    terms = {g.index: Terms(*(np.zeros(g.size) for _ in range(3))) for g in experts if sources[g.index]}

    waiting: dict[int, list[tuple[int, Source]]] = {}  # batch -> sources that were not shown all of it yet: large models run in pieces
    held: dict[int, dict[str, Array]] = {}

    def add(number: int, values: Mapping[str, Array]) -> None:
        here = held.setdefault(number, {})
        here.update({n: v for n, v in values.items() if n in wanted})
        rest = []
        for index, source in waiting.setdefault(number, [(i, s) for i, found in sources.items() for s in found]):
            if not set(source.values) <= here.keys():
                rest.append((index, source))
                continue
            try:
                source.add(here, terms[index])
            except UnsupportedModel as error:
                unseen[index] = str(error)
        waiting[number] = rest
        held[number] = {n: v for n, v in here.items() if any(n in s.values for _, s in rest)}

    wanted = {v: None for found in sources.values() for source in found for v in source.values}
    if wanted:
        stream(model, groups.traced.facts.types, batches, list(wanted), add)
    return {i: t for i, t in terms.items() if i not in unseen}, unseen


def _sources(model: Model, groups: Groups, group: Group) -> Iterator[Source]:
    nodes = _Nodes(groups, group)
    choice = next((c for c in groups.traced.choices if c.picks and nodes.is_group(c.axis)), None)
    slots = None if choice is None else groups.labels.get((choice.positions, choice.number))
    for node in groups.traced.nodes:
        made = node.signature
        if made is None:
            continue
        for name, axis in node.dims.items():
            if made.mixture is not None and name == made.mixture.experts and nodes.is_group(axis):
                yield Inside(node, made.mixture, model, groups)
            if kind_of(made, name) is not SUM:
                continue
            if nodes.is_group(axis):
                found = Summed.of(nodes, node, name, None)
            elif choice is not None and slots is not None and np.array_equal(groups.dim_labels(axis), slots):
                found = Summed.of(nodes, node, name, choice)
            else:
                found = None
            if found is not None:
                yield found


class _Nodes:
    """A group's place among the nodes."""

    def __init__(self, groups: Groups, group: Group) -> None:
        self.groups, self.group, self.traced = groups, group, groups.traced
        self.maker = {t.name: n for n in groups.traced.nodes for t in n.node.outputs if t.name}
        self.stored = set(groups.traced.constants)

    def is_group(self, axis: Any) -> bool:
        """Whether the positions of an axis are the group's coordinates, in their order."""
        labels = self.groups.dim_labels(axis) if axis.labels is not None else np.zeros((0, 0), np.int64)
        return labels.shape == (self.group.size, 1) and bool((labels[:, 0] == np.arange(self.group.size) + self.group.start + 1).all())

    def parts(self, choice: Choice | None) -> set[str]:
        """Values that hold the weights of one expert, or of each token's."""
        if choice is None:
            return set()
        found = {p.node for p in choice.picks if p.value in self.stored}
        for node in self.traced.nodes:
            moved = {i for i, _ in held_by(node.node.domain, node.node.op)}
            if any(i in moved and t.name in found for i, t in enumerate(node.node.inputs)):
                found.update(t.name for t in node.node.outputs)
        return found

    def last_maps(self, values: Sequence[str], choice: Choice | None) -> list[str]:
        """What the experts' last maps give, that these values are computed of."""
        parts, found, seen, rest = self.parts(choice), [], set(), list(values)
        while rest:
            value = rest.pop()
            node = self.maker.get(value)
            if node is None or value in seen:
                continue
            seen.add(value)
            made = node.signature
            if made is None or not made.macs:
                rest += [t.name for t in node.node.inputs if t.name]
            elif self._is_part(node, parts):
                found.append(value)
        return found

    def _is_part(self, node: NodeTrace, parts: set[str]) -> bool:
        made = node.signature
        assert made is not None
        for linear in made.linear:
            sides = [{n for t in made.inputs[i] or () for n in dims_of(t)} for i in (linear.data, linear.weight) if i < len(made.inputs)]
            if node.node.inputs[linear.weight].name in parts or any(self.is_group(node.dims[n]) for n in set.intersection(*sides)):
                return True
        return False


@dataclass(frozen=True)
class Summed:
    """A sum of data along the experts' axis, or along that of what was chosen. spelled: the terms, as an Einsum over `operands`."""

    name: str
    operands: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # axes of size one that are left out of `spelled`
    spelled: str
    maps: tuple[tuple[str, int], ...]  # what the experts' last maps give, and the axis of experts there
    positions: str = ""
    number: int = 0

    @property
    def values(self) -> tuple[str, ...]:
        """See `Source`."""
        return (*self.operands, *(v for v, _ in self.maps), *([self.positions] if self.positions else []))

    @classmethod
    def of(cls, nodes: _Nodes, node: NodeTrace, name: str, choice: Choice | None) -> Summed | None:
        """The sum along a dim of a node; None where weights are summed, or axes are more than a dim each."""
        made = node.signature
        assert made is not None
        given = [(t.name, o) for t, o in zip(node.node.inputs, made.inputs, strict=False) if o is not None]
        out = made.outputs[0] or ()
        single = all(isinstance(t, Dim | One) for _, o in given for t in o) and all(isinstance(t, Dim | One) for t in out)
        if not single or any(v in nodes.stored for v, _ in given):
            return None
        result = node.node.outputs[0].name
        names = list(dict.fromkeys(n for _, o in given for t in o for n in dims_of(t)))
        kept = [n for t in out for n in dims_of(t)]
        last = list(dims_of(out[channel_axis(nodes.traced, result)])) if out else []
        if set(names) - {name} != set(kept) or not last or len(names) > len(LETTERS):
            return None
        letter = dict(zip(names, LETTERS, strict=False))
        order = [*(n for n in kept if n != last[0]), name, last[0]]
        left = ",".join("".join(letter[n] for t in o for n in dims_of(t)) for _, o in given)
        ones = tuple(tuple(i for i, t in enumerate(o) if isinstance(t, One)) for _, o in given)
        values = tuple(v for v, _ in given)
        maps = [(v, _axis_of(nodes, v)) for v in nodes.last_maps(values, choice)]
        return cls(node_name(node.node), values, ones, f"{left}->{''.join(letter[n] for n in order)}",
                   tuple((v, -1 if a is None else a) for v, a in maps if a is not None or choice is not None),
                   "" if choice is None else choice.positions, 0 if choice is None else choice.number)  # fmt: skip

    def add(self, values: Mapping[str, Array], terms: Terms) -> None:
        """See `Source`."""
        size = len(terms.count)
        given = [np.squeeze(values[v], ones) for v, ones in zip(self.operands, self.shapes, strict=True)]
        found = np.einsum(self.spelled, *given)
        norms = np.sqrt(np.einsum("...i,...i->...", found, found, dtype=np.float64))
        norms = norms.reshape(-1, norms.shape[-1])  # (tokens, experts or chosen ones)
        if not self.positions:
            experts = np.broadcast_to(np.arange(size), norms.shape)
        else:
            experts = np.moveaxis(values[self.positions], self.number, -1).reshape(-1, norms.shape[1])
            if experts.shape != norms.shape:
                raise UnsupportedModel(f"the sum at {self.name} is of {norms.shape[0]} tokens, but {experts.shape[0]} were routed")
        terms.count += np.bincount(experts.ravel(), weights=(norms > 0).ravel(), minlength=size)
        terms.norm += np.bincount(experts.ravel(), weights=norms.ravel(), minlength=size)
        for value, axis in self.maps:
            result = np.abs(values[value])
            rows = experts.ravel() if axis < 0 else np.arange(size)
            result = (result if axis < 0 else np.moveaxis(result, axis, 0)).reshape(len(rows), -1).max(axis=1)
            np.maximum.at(terms.extreme, rows, result)


def _axis_of(nodes: _Nodes, value: str) -> int | None:
    axes = nodes.traced.axes.get(value) or ()
    return next((i for i, axis in enumerate(axes) if nodes.is_group(axis)), None)


@dataclass
class Inside:
    """An operator that holds a mixture, run again for each expert on the tokens that its router sends there."""

    node: NodeTrace
    mixture: Mixture
    model: Model
    groups: Groups
    name: str = ""
    values: tuple[str, ...] = ()
    _run: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        inputs = self.node.node.inputs
        self.name = node_name(self.node.node)
        self.values = (inputs[self.mixture.data].name, inputs[self.mixture.router].name, self.node.node.outputs[0].name)

    def add(self, values: Mapping[str, Array], terms: Terms) -> None:
        """See `Source`."""
        if self.mixture.unknown:
            raise UnsupportedModel(f"{self.name} {self.mixture.unknown}")
        data, scores, result = (values[v] for v in self.values)
        x, y = data.reshape(-1, data.shape[-1]), result.reshape(-1, result.shape[-1])
        shares = self.shares(scores)
        routed = [np.flatnonzero(column) for column in shares.T]
        found = [self._alone(e, x[rows], len(routed)) if len(rows) else x[:0] for e, rows in enumerate(routed)]
        gates = next((g for g in (shares, shares / shares.sum(axis=1, keepdims=True)) if _adds_up(g, routed, found, y)), None)
        if gates is None:
            raise UnsupportedModel(f"the kernel behind {self.name} weighs its experts by a rule that is not known")
        for expert, rows in enumerate(routed):
            if len(rows):
                terms.count[expert] += len(rows)
                terms.norm[expert] += float(gates[rows, expert] @ np.linalg.norm(found[expert], axis=1))
                terms.extreme[expert] = max(terms.extreme[expert], float(np.abs(found[expert]).max()))

    def shares(self, scores: Array) -> NDArray[np.float64]:
        """(tokens, experts) the k largest of the softmax of a router's scores, zero for all others."""
        flat = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
        shares = np.exp(flat - flat.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        chosen = np.argsort(-flat, axis=1, kind="stable")[:, : self.mixture.count]
        found = np.zeros_like(shares)
        np.put_along_axis(found, chosen, np.take_along_axis(shares, chosen, 1), 1)
        return np.asarray(found)

    def _alone(self, expert: int, x: Array, experts: int) -> NDArray[np.float64]:
        """What one expert gives of rows."""
        if self._run is None:
            wide, _ = widen(self.model, {})
            types = {n: 1 if t in (10, 16) else t for n, t in self.groups.traced.facts.types.items()}
            part = tapped(wide, wide.graph, self.values[:2], self.values[2:], types)
            for node in part.graph.nodes:
                node.attrs.update(self.mixture.alone)
            self._run = session(replace(part, graph=part.graph))
        router = np.full((len(x), experts), ALONE, np.float32)
        router[:, expert] = 0
        return np.asarray(self._run.run(None, dict(zip(self.values[:2], (x, router), strict=True)))[0], np.float64)


def _adds_up(gates: NDArray[np.float64], routed: Sequence[NDArray[np.int64]], found: Sequence[Array], result: Array) -> bool:
    """Whether Σ g f over the experts that tokens are routed to is what the operator gave of them."""
    total = np.zeros(result.shape)
    for expert, rows in enumerate(routed):
        total[rows] += gates[rows, expert][:, None] * found[expert]
    return bool(np.abs(total - result).max(initial=0) <= CLOSE * max(float(np.abs(result).max(initial=0)), 1e-30))
