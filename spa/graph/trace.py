"""Tracing: one walk over the nodes that finds, for every axis of every value, the atoms it is made of.

For each node the table's signature is read; dims of the same name are unified, FIXED ones frozen, and the outputs' axes are
put together from the dims. Nothing is ever guessed: no rule, an unknown shape or a contradiction freezes what the node
touches, with a reason that names node, axis and cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest

import numpy as np
import onnx_graphsurgeon as gs

from spa.graph.atoms import Atoms, Labels, merge, stack
from spa.graph.chosen import Choice, Choices
from spa.graph.promise import Vocabulary
from spa.graph.shapes import Facts
from spa.graph.state import Pair, State, matched, state_pairs
from spa.graph.view import FLOATS, constant_of, dtype_holds_weights, stored, view
from spa.signatures import FIXED, STAT, Refusal, Signature, rule_of
from spa.signatures.arithmetic import READS_SHAPE
from spa.signatures.sizes import dim_sizes, term_size
from spa.signatures.table import Dim, One, Operand, Pick, Product, Sum, Term, cause_of, dims_of, kind_of, read

INPUT = "is an input of the graph"
MOST = 1 << 28  # positions of an axis; a size beyond that is a damaged attribute


@dataclass(frozen=True)
class Reason:
    """Why atoms stay: the node (empty for the graph's own inputs and outputs), the axis where it began, and the cause."""

    node: str
    op: str
    value: str
    axis: int | None
    cause: str

    def __str__(self) -> str:
        where = f"axis {self.axis} of {self.value}" if self.axis is not None else self.value
        by = f" at {self.op} {self.node}" if self.op else ""
        return f"{where} {self.cause}{by}"


@dataclass(frozen=True)
class Axis:
    """An axis of a value or a dim of a node: labels (length, k), or None with the reason's number where it stays whole."""

    length: int
    labels: Labels | None
    why: int = 0


@dataclass(frozen=True)
class NodeTrace:
    """A node with its signature and its dims; signature None if the node only freezes."""

    node: gs.Node
    signature: Signature | None
    dims: Mapping[str, Axis] = field(default_factory=dict)
    refusal: str = ""


@dataclass(frozen=True)
class Traced:
    """Every axis of every value in atoms. vocabulary: what was promised, and `ids`, the axis of all ids. choices: followed positions."""

    graph: gs.Graph
    facts: Facts
    atoms: Atoms
    axes: Mapping[str, tuple[Axis, ...] | None]
    nodes: tuple[NodeTrace, ...]
    reasons: tuple[Reason, ...]
    states: tuple[State, ...] = ()
    vocabulary: Vocabulary | None = None
    ids: Axis | None = None
    choices: tuple[Choice, ...] = ()

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Parameters: float or quantised values that the file holds or creates from nothing (ConstantOfShape), in graph order."""
        found = [n for n, tensor in self.constants.items() if dtype_holds_weights(tensor.dtype)]
        for node in self.nodes:
            if node.signature is not None and node.node.inputs and all(o is None for o in node.signature.inputs):
                given = all(t.name in self.constants for t in node.node.inputs if t.name)
                found += [t.name for t in node.node.outputs if given and self.facts.types.get(t.name) in FLOATS]
        return tuple(found)

    @cached_property
    def constants(self) -> Mapping[str, gs.Constant]:
        """Stored tensors by the name of the value."""
        return constant_values(self.graph)


def node_name(node: gs.Node) -> str:
    """A node's name, or its first output where it has none."""
    return str(node.name or (node.outputs[0].name if node.outputs else node.op))


def trace(
    graph: gs.Graph, facts: Facts, *, protect_outputs: bool = True, stat: bool = True, keep_state: bool = False,
    vocabulary: Vocabulary | None = None,
) -> Traced:  # fmt: skip
    """Traces a graph.

    protect_outputs: axes of graph outputs stay whole. stat: axes that a normalisation runs over may shrink. keep_state: inputs and
    outputs that carry a state from call to call (`spa.graph.state`) stay whole like all others. vocabulary: a promise that lets tables of
    ids and axes of logits shrink. Mutates nothing; time is linear in nodes and in positions.
    """
    return _Tracer(graph, facts, stat, vocabulary).run(protect_outputs, () if keep_state else state_pairs(graph))


class _Tracer:
    def __init__(self, graph: gs.Graph, facts: Facts, stat: bool, vocabulary: Vocabulary | None) -> None:
        self.graph, self.facts, self.stat, self.vocabulary = graph, facts, stat, vocabulary
        self.choices = Choices()
        self.of_ids: list[Axis] = []  # all one: an id goes everywhere or nowhere
        self.atoms = Atoms()
        self.axes: dict[str, tuple[Axis, ...] | None] = {}
        self.reasons = [
            Reason("", "", "", None, ""),
            Reason("", "", "a position", None, "stands for several that do not go together"),
            Reason("", "", "an axis", None, "could not be told apart into factors"),
        ]
        self.one = self._reason("", "", "a value", None, "has size one there")
        self.constants: set[str] = set()
        self.nodes: list[NodeTrace] = []

    def run(self, protect_outputs: bool, pairs: Sequence[Pair]) -> Traced:
        carried = {name for name, _ in pairs}
        for tensor in self.graph.inputs:
            self._fixed_value(tensor.name, "", "", INPUT)
            if tensor.name in carried:
                self._open_value(tensor)
        for node in self.graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.name not in self.axes:
                    self._fresh_value(tensor.name)
            if node.op == "Constant" and not node.domain:
                self._fresh_value(node.outputs[0].name)
                self.nodes.append(NodeTrace(node, None))
            else:
                self.nodes.append(self._visit(node))
                self.choices.follow(node, self.nodes[-1].signature, node_name(node), outer_values(node))
        self.choices.settle(self.graph.outputs, self.atoms, self._reason)
        for tensor in self.graph.outputs:
            if tensor.inputs and tensor.inputs[0].op in READS_SHAPE:
                self._freeze_value(tensor.inputs[0].inputs[0].name, "", "", "has its size as an output of the graph")
        states = self._states(pairs)
        free = {s.output for s in states}
        for tensor in self.graph.outputs:
            if tensor.name not in free:
                self._output(tensor.name, protect_outputs)
        every = [axis.labels for axis in self.of_ids if axis.labels is not None]
        for labels in every[1:]:
            self.atoms.unify(every[0], labels)
        ids = self.of_ids[0] if self.of_ids else None
        return Traced(
            self.graph, self.facts, self.atoms, self.axes, tuple(self.nodes), tuple(self.reasons), states, self.vocabulary, ids,
            tuple(c for c in self.choices.found if c.followed),
        )  # fmt: skip

    def _output(self, name: str, protected: bool) -> None:
        """An output's axes stay, but for one of the ids whose columns are to go."""
        free = self.facts.dynamic.get(name, ())
        for i, axis in enumerate(self.axes.get(name) or ()):
            columns = self.vocabulary is not None and self.vocabulary.sides != "input" and axis.length == self.vocabulary.size
            if columns and axis.labels is not None and not (i < len(free) and free[i]):
                self.of_ids.append(axis)
            elif protected:
                self._freeze(axis, "", "", name, i, "is an output of the graph (--no-protect-outputs lets it shrink)")

    # ------------------------------------------------------------------ states

    def _open_value(self, tensor: gs.Tensor) -> None:
        """Axes of an input that may be a state: those of a declared size may turn out to be dims of the network."""
        axes = self.axes[tensor.name] or ()
        sizes = [n if isinstance(n, int) else 0 for n in tensor.shape or ()]
        self.axes[tensor.name] = tuple(
            Axis(a.length, self.atoms.fresh(a.length)) if 1 < a.length == n else a for a, n in zip(axes, sizes, strict=True)
        )

    def _states(self, pairs: Sequence[Pair]) -> tuple[State, ...]:
        """The pairs whose axes turned out to be the same dims, all but one. Everything else of them stays whole."""
        found, whole = matched(pairs, self.axes, self.atoms)
        for name, i, grows in whole:
            self._freeze((self.axes[name] or ())[i], "", "", name, i, "is where a state grows" if grows else INPUT)
        return found

    # ------------------------------------------------------------------ values

    def _reason(self, node: str, op: str, value: str, axis: int | None, cause: str) -> int:
        self.reasons.append(Reason(node, op, value, axis, cause))
        return len(self.reasons) - 1

    def _fresh_value(self, name: str) -> None:
        shape = self.facts.shapes.get(name)
        self.constants.add(name)
        if shape is None:
            self.axes[name] = None
        else:
            self.axes[name] = tuple(Axis(n, self.atoms.fresh(n)) if n > 1 else Axis(n, None, self.one) for n in shape)

    def _fixed_value(self, name: str, node: str, op: str, cause: str) -> None:
        shape = self.facts.shapes.get(name)
        if shape is None:
            self.axes[name] = None
        else:
            self.axes[name] = tuple(Axis(n, None, self._reason(node, op, name, i, cause)) for i, n in enumerate(shape))

    def _freeze_value(self, name: str, node: str, op: str, cause: str) -> None:
        for i, axis in enumerate(self.axes.get(name) or ()):
            self._freeze(axis, node, op, name, i, cause)

    def _freeze(self, axis: Axis, node: str, op: str, value: str, index: int | None, cause: str) -> None:
        if axis.labels is not None:
            self.atoms.freeze(axis.labels, self._reason(node, op, value, index, cause))

    # ------------------------------------------------------------------ nodes

    def _visit(self, node: gs.Node) -> NodeTrace:
        for name in outer_values(node):
            self._freeze_value(name, node_name(node), node.op, "is used inside the node's body")
        rule = rule_of(node.domain or "", node.op)
        if rule is None:
            return self._refuse(node, f"goes through an operator without a signature ({node.domain or 'ai.onnx'})")
        seen = view(self.graph, node, self.facts.shapes, self.facts.values, self.constants)
        made = read(rule, seen)
        if isinstance(made, Refusal):
            return self._refuse(node, f"stays because {made.cause},")
        if any(o is not None and t.name and self.axes.get(t.name) is None for t, o in zip(node.inputs, made.inputs, strict=False)):
            return self._refuse(node, "stays because the shape of an operand is unknown,")
        sizes = dim_sizes(made, seen.inputs, seen.outputs)
        if sizes is None:
            return self._refuse(node, f"stays because the shapes do not fit the signature {made}")
        dims = self._solve(node, made, sizes)
        self._outputs(node, made, dims, sizes)
        self.choices.begin(node, node_name(node), made, dims)
        if any(stored(t) for t in node.inputs if t.name) and all(stored(t) or t.name in self.constants for t in node.inputs):
            self.constants.update(t.name for t in node.outputs)
        return NodeTrace(node, made, dims)

    def _refuse(self, node: gs.Node, cause: str) -> NodeTrace:
        for tensor in node.inputs:
            self._freeze_value(tensor.name, node_name(node), node.op, cause)
        for tensor in node.outputs:
            self._fixed_value(tensor.name, node_name(node), node.op, cause)
        return NodeTrace(node, None, {}, cause)

    def _solve(self, node: gs.Node, made: Signature, sizes: Mapping[str, int]) -> dict[str, Axis]:
        found: dict[str, list[tuple[Axis, str, int]]] = {}
        for tensor, operand in zip_longest(node.inputs, made.inputs[: len(node.inputs)]):
            axes = self.axes.get(tensor.name) if tensor.name else None
            if operand is None:
                self._freeze_value(tensor.name, node_name(node), node.op, made.setting_cause)
                continue
            for i, (term, axis) in enumerate(zip(operand, axes or (), strict=False)):
                self._take_apart(term, axis, sizes, found, tensor.name, i)
        for left, right in made.equations:
            given = {n: found[n][0][0] for n in dims_of(right)}
            axis = self._put_together(node, made, right, given, sizes, node.outputs[0].name, 0)
            self._take_apart(left, axis, sizes, found, node.outputs[0].name, 0)
        return {name: self._join(node, made, name, parts) for name, parts in found.items()}

    def _take_apart(
        self, term: Term, axis: Axis, sizes: Mapping[str, int], found: dict[str, list[tuple[Axis, str, int]]], value: str, i: int
    ) -> None:
        if isinstance(term, Dim):
            found.setdefault(term.name, []).append((axis, value, i))
        elif isinstance(term, Product | Sum):
            lengths = [term_size(p, sizes) or 0 for p in term.parts]
            if axis.labels is None:
                parts: list[Labels | None] = [None] * len(lengths)
            elif isinstance(term, Product):
                parts = list(self.atoms.split(axis.labels, lengths))
            else:
                parts = list(np.split(axis.labels, np.cumsum(lengths)[:-1]))
            for part, labels, length in zip(term.parts, parts, lengths, strict=True):
                self._take_apart(part, Axis(length, labels, axis.why or self.one), sizes, found, value, i)

    def _join(self, node: gs.Node, made: Signature, name: str, parts: list[tuple[Axis, str, int]]) -> Axis:
        chosen = self.choices.picked(node, made, name, *parts[0])
        free = [(a, v, i) for a, v, i in parts if a.labels is not None]
        held = next((a for a, _, _ in parts if a.labels is None), None)
        if not free:
            return parts[0][0]
        kind = kind_of(made, name)
        first = free[0][0]
        assert first.labels is not None
        if held is not None:
            for axis, _, _ in free:
                assert axis.labels is not None
                self.atoms.freeze(axis.labels, held.why or self.one)
        if self._looked_up(node, made, name, first):
            self.of_ids.append(first)
        elif (kind is FIXED and not chosen) or (kind is STAT and not self.stat):
            cause = cause_of(made, name) if kind is FIXED else "is what a normalisation runs over (--no-stat)"
            for axis, v, i in free:
                self._freeze(axis, node_name(node), node.op, v, i, cause)
        for axis, _, _ in free[1:]:
            assert axis.labels is not None
            self.atoms.unify(first.labels, axis.labels)
        return first

    def _looked_up(self, node: gs.Node, made: Signature, name: str, axis: Axis) -> bool:
        """Whether a dim is rows of a table that only ids of the vocabulary look up."""
        given = self.vocabulary
        if given is None or given.sides == "output" or name not in made.picked:
            return False
        return node.outputs[0].name in given.lookups and axis.length == given.size

    def _outputs(self, node: gs.Node, made: Signature, dims: dict[str, Axis], sizes: Mapping[str, int]) -> None:
        for k, tensor in enumerate(node.outputs):
            if not tensor.name:
                continue
            operand: Operand = made.outputs[k] if k < len(made.outputs) else None
            shape = self.facts.shapes.get(tensor.name)
            if operand is None or shape is None or len(shape) != len(operand):
                self._hold(node, tensor.name, "comes from an output without a signature")
                continue
            axes = []
            for i, term in enumerate(operand):
                axis = self._put_together(node, made, term, dims, sizes, tensor.name, i)
                axes.append(axis)
            self.axes[tensor.name] = tuple(axes)
            if any(axis.length != length for axis, length in zip(axes, shape, strict=True)):
                self._hold(node, tensor.name, "has a size that its signature does not give")

    def _hold(self, node: gs.Node, output: str, cause: str) -> None:
        """Nothing may be removed from a node of which one output can't be followed: that output would shrink unseen."""
        self._fixed_value(output, node_name(node), node.op, cause)
        for tensor in node.inputs:
            self._freeze_value(tensor.name, node_name(node), node.op, f"stays because {output} {cause},")

    def _put_together(
        self, node: gs.Node, made: Signature, term: Term, dims: dict[str, Axis], sizes: Mapping[str, int], value: str, i: int
    ) -> Axis:
        if isinstance(term, One):
            return Axis(1, None, self.one)
        if isinstance(term, Dim):
            if term.name not in dims:
                dims[term.name] = self._new_dim(node, made, term.name, sizes, value, i)
            return dims[term.name]
        if isinstance(term, Pick):
            part = self._put_together(node, made, term.part, dims, sizes, value, i)
            labels = None if part.labels is None else part.labels[np.asarray(term.index, np.int64)]
            return Axis(len(term.index), labels, part.why)
        parts = [self._put_together(node, made, p, dims, sizes, value, i) for p in term.parts]
        length = math.prod(p.length for p in parts) if isinstance(term, Product) else sum(p.length for p in parts)
        if length > MOST:
            return Axis(length, None, self._reason(node_name(node), node.op, value, i, "has more positions than any network"))
        if all(p.labels is None for p in parts):
            return Axis(length, None, max(parts, key=lambda p: p.length).why)
        known = [p.labels if p.labels is not None else self._held(p) for p in parts]
        return Axis(length, merge(known) if isinstance(term, Product) else stack(known))

    def _held(self, axis: Axis) -> Labels:
        """Labels of positions that stay."""
        return np.zeros((axis.length, 0), np.int64)

    def _new_dim(self, node: gs.Node, made: Signature, name: str, sizes: Mapping[str, int], value: str, i: int) -> Axis:
        """A dim that only outputs have: what an operator spreads, pads or creates."""
        axes = self.facts.shapes.get(value) or ()
        length = sizes.get(name, axes[i] if i < len(axes) else 0)
        dynamic = self.facts.dynamic.get(value, ())
        if kind_of(made, name) is FIXED and made.gives and 1 < length <= MOST:
            reason = self._reason(node_name(node), node.op, value, i, cause_of(made, name))
            return self.choices.counted(Axis(length, self.atoms.fresh(length), reason))
        if kind_of(made, name) is FIXED or not 1 < length <= MOST or (i < len(dynamic) and dynamic[i]):
            return Axis(length, None, self._reason(node_name(node), node.op, value, i, cause_of(made, name)))
        return Axis(length, self.atoms.fresh(length))


def outer_values(node: gs.Node) -> Iterable[str]:
    """Names that the bodies of a node use; those of the outer graph among them stay whole."""
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            for tensor in attribute.outputs:
                yield tensor.name
            for inner in attribute.nodes:
                yield from (t.name for t in inner.inputs if t.name)
                yield from outer_values(inner)


def constant_values(graph: gs.Graph) -> dict[str, gs.Constant]:
    """All tensors stored in a graph by the name of the value: initializers and Constant nodes."""
    found: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        held = constant_of(node)
        if held is not None and not node.domain:
            found[node.outputs[0].name] = held
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                found[tensor.name] = tensor
    return found
