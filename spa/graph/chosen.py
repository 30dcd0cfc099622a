"""Positions that a network chooses itself: where it finds them (the k largest of a router's scores), and what it picks at them.

    scores (m, e) --TopK--> values (m, k), positions (m, k) --Reshape, Unsqueeze, …--> Gather(weights (e, i, j), positions)

Where positions only ever pick, nobody sees their numbers: what is removed from the axis that they were found on goes from all axes that
they pick from, and those that are left are counted anew by the network itself. A mixture of experts is exported so. Anything else
that reads them (arithmetic, a comparison, an output of the graph) keeps all of these axes whole, with that as the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from spa.graph.atoms import Atoms
from spa.signatures.holding import grows_by, held_by
from spa.signatures.table import Signature, dims_of

if TYPE_CHECKING:
    from spa.graph.trace import Axis


@dataclass(frozen=True)
class Pick:
    """A node, by its first output, that picks along an axis at chosen positions; `value` and `number` say whose axis that is."""

    node: str
    axis: Axis
    value: str
    number: int


@dataclass(frozen=True)
class Choice:
    """Positions that a node finds along `axis`, number `number` of `value`, and gives as `positions` (…, k).

    picks: where they are used. read: what else reads them.
    """

    node: gs.Node
    name: str
    value: str
    number: int
    positions: str
    axis: Axis
    picks: list[Pick] = field(default_factory=list)
    read: list[str] = field(default_factory=list)

    @property
    def followed(self) -> bool:
        """Whether every use of the positions is known."""
        return not self.read


class Choices:
    """The choices of a graph, followed node by node in its order."""

    def __init__(self) -> None:
        self.found: list[Choice] = []
        self._of: dict[str, Choice] = {}  # value that holds positions -> choice
        self._slots: list[Axis] = []

    def picked(self, node: gs.Node, made: Signature, name: str, axis: Axis, value: str, number: int) -> bool:
        """Notes that a node picks along a dim, which is axis `number` of a value; False where it looks up others than chosen positions."""
        index = made.picked.get(name)
        choice = self._of.get(node.inputs[index].name) if index is not None and index < len(node.inputs) else None
        if choice is not None:
            choice.picks.append(Pick(node.outputs[0].name, axis, value, number))
        return choice is not None

    def counted(self, axis: Axis) -> Axis:
        """Takes note of an axis of what was chosen: it stays, but only from the end on, so that sums over it are known by it."""
        self._slots.append(axis)
        return axis

    def begin(self, node: gs.Node, name: str, made: Signature, dims: Mapping[str, Axis]) -> None:
        """Notes the positions that a node gives."""
        for output, dim in made.gives.items():
            if output < len(node.outputs) and node.outputs[output].name and dim in dims:
                number = next(i for i, term in enumerate(made.inputs[0] or ()) if dim in dims_of(term))
                choice = Choice(node, name, node.inputs[0].name, number, node.outputs[output].name, dims[dim])
                self.found.append(choice)
                self._of[choice.positions] = choice

    def follow(self, node: gs.Node, made: Signature | None, name: str, outer: Iterable[str]) -> None:
        """Hands positions on to what holds them unchanged, and notes what else a node does with them."""
        for number, tensor in enumerate(node.inputs):
            choice = self._of.get(tensor.name)
            if choice is None:
                continue
            pairs = set(held_by(node.domain, node.op)) - set(grows_by(node.domain, node.op)) if made is not None else ()
            held = any(i == number for i, _ in pairs)
            self._of.update((t.name, choice) for t in node.outputs if held)
            if not held and (made is None or number not in made.picked.values()):
                choice.read.append(f"{node.op} {name}")
        for value in outer:
            if value in self._of:
                self._of[value].read.append(f"the body of {node.op} {name}")

    def settle(self, outputs: Iterable[gs.Tensor], atoms: Atoms, reason: Callable[[str, str, str, int, str], int]) -> None:
        """Axes that positions were found on and that they pick from become one, or all stay if not every use is known.

        outputs: of the graph, which show what numbers positions have. reason: gives the number of a new `Reason`.
        """
        for tensor in outputs:
            if tensor.name in self._of:
                self._of[tensor.name].read.append(f"output {tensor.name}")
        for axis in self._slots:
            if axis.labels is not None:
                atoms.freeze(axis.labels, axis.why)
        for choice in self.found:
            every = [choice.axis, *(p.axis for p in choice.picks)]
            free = [a.labels for a in every if a.labels is not None]
            whole = next((a.why for a in every if a.labels is None), 0)
            if choice.read:
                where = choice.name, choice.node.op, choice.value, choice.number
                whole = reason(*where, f"has its positions read by {choice.read[0]}")
            for labels in free:
                if whole:
                    atoms.freeze(labels, whole)
                else:
                    atoms.unify(free[0], labels)
