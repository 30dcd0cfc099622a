"""States: pairs of a graph input and a graph output by which a model carries something from one call to the next (a key-value cache).

    past (batch, heads, past, width)  --Concat, or written by Scatter or a fused attention-->  present (batch, heads, past + new, width)

The output is the input with more positions on one axis, or with some written over: that is read off the flow of its elements and the
dims that both share, never off their names. The caller hands the output back in the next call, so that both shrink together: the axes of
a state other than the one that grows may shrink as those of any inner value.

    state_pairs(graph)  pairs to try, by the flow of elements alone; before tracing
    Traced.states       the states, as tracing found their axes to be the same dims: use these
    feeds_for           inputs as a pruned model takes them, from those of the model that it was cut from
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.graph.atoms import Atoms
from spa.signatures.holding import EVERY, grows_by, held_by

if TYPE_CHECKING:
    from spa.graph.trace import Axis

Keeps = Mapping[str, Mapping[int, NDArray[np.int64]]]  # value -> axis -> positions that are left
Pair = tuple[str, str]


@dataclass(frozen=True)
class State:
    """A graph input and the graph output that takes its place in the next call; both have the same axes.

    grows: the axis along which positions are added; None if the state has a fixed length and is written over.
    axes: those that are the same dims on both sides and have sizes of their own (heads, their width). They shrink together, where
    nothing else freezes them.
    """

    input: str
    output: str
    grows: int | None
    axes: tuple[int, ...]


def state_pairs(graph: gs.Graph) -> tuple[Pair, ...]:
    """Inputs and outputs of one rank where elements of the input come out as they are, with others added or written over on the way.

    In the order of the outputs; an input or output may occur in several. Linear in the nodes that only move elements.
    """
    ranks = {t.name: len(t.shape) for t in graph.inputs if t.shape}
    found: list[Pair] = []
    for output in graph.outputs:
        sources = _sources(output)
        found += [(t.name, output.name) for t in graph.inputs if t.name in sources and _rank(output, ranks[t.name]) == ranks[t.name]]
    return tuple(found)


def matched(
    pairs: Sequence[Pair], axes: Mapping[str, Sequence[Axis] | None], atoms: Atoms
) -> tuple[tuple[State, ...], list[tuple[str, int, bool]]]:
    """The states among pairs, by the axes that tracing found, and what else stays whole: (value, axis, whether a state grows there).

    Each input and each output is of one state at most.
    """
    found: dict[str, State] = {}
    taken: set[str] = set()
    for name, output in pairs:
        state = None if name in found or output in taken else _state((name, output), axes[name] or (), axes.get(output) or (), atoms)
        if state is not None:
            found[name] = state
            taken.add(output)
    whole = []
    for name in dict(pairs):
        shared = found[name].axes if name in found else ()
        whole += [(name, i, name in found) for i in range(len(axes[name] or ())) if i not in shared]
        if name in found:
            whole += [(found[name].output, i, True) for i in range(len(axes[found[name].output] or ())) if i not in shared]
    return tuple(found.values()), whole


def _state(pair: Pair, before: Sequence[Axis], after: Sequence[Axis], atoms: Atoms) -> State | None:
    """The state that a pair is, by its axes after tracing: all the same dims but one at most; None where it is none."""
    if len(before) != len(after):
        return None

    def stays(axis: Axis) -> bool:
        return axis.labels is None or not atoms.resolve(axis.labels).any()

    both = list(zip(before, after, strict=True))
    shared = tuple(i for i, (x, y) in enumerate(both) if _same(x, y, atoms))
    other = [i for i, (x, y) in enumerate(both) if x.length != y.length]
    loose = [i for i, (x, y) in enumerate(both) if i not in shared and not (stays(x) and stays(y))]
    grows = {*other, *loose}
    return State(*pair, next(iter(grows), None), shared) if shared and len(grows) <= 1 else None


def _same(one: Axis, two: Axis, atoms: Atoms) -> bool:
    if one.labels is None or two.labels is None:
        return False
    if np.array_equal(atoms.resolve(one.labels, frozen=True), atoms.resolve(two.labels, frozen=True)):
        return True
    free, other = atoms.resolve(one.labels), atoms.resolve(two.labels)  # a factor that stays whole need not be one atom
    return bool(free.shape[1]) and np.array_equal(free, other)


def _rank(tensor: gs.Tensor, otherwise: int) -> int:
    return otherwise if tensor.shape is None else len(tensor.shape)


def _sources(output: gs.Tensor) -> set[str]:
    """Values without a producer whose elements an output holds, and that something was added to or written into on the way."""
    found: set[str] = set()
    waiting: list[tuple[gs.Tensor, bool]] = [(output, False)]
    seen: set[tuple[str, bool]] = set()
    while waiting:
        tensor, grown = waiting.pop()
        if (tensor.name, grown) in seen or isinstance(tensor, gs.Constant):
            continue
        seen.add((tensor.name, grown))
        if not tensor.inputs:
            found |= {tensor.name} if grown else set()
            continue
        node = tensor.inputs[0]
        number = next(i for i, t in enumerate(node.outputs) if t is tensor)
        growing = grows_by(node.domain, node.op)
        for pair in held_by(node.domain, node.op):
            if pair[1] == number:
                inputs = node.inputs if pair[0] == EVERY else node.inputs[pair[0] : pair[0] + 1]
                waiting += [(t, grown or pair in growing) for t in inputs if t.name]
    return found


def feeds_for(narrowed: Keeps, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Inputs of the model that a smaller one was cut from, as the smaller one takes them: the positions that are left.

    narrowed: of the smaller `Model`. Inputs that have the smaller one's sizes already stay as they are.
    """
    cut = dict(feeds)
    for name, axes in narrowed.items():
        for axis, positions in axes.items():
            if name in cut and cut[name].shape[axis] != len(positions):
                cut[name] = np.take(cut[name], positions, axis=axis)
    return cut


def composed(first: Keeps, second: Keeps) -> Keeps:
    """What two cuts, one after the other, leave of each input."""
    found = {name: dict(axes) for name, axes in first.items()}
    for name, axes in second.items():
        for axis, positions in axes.items():
            before = found.setdefault(name, {}).get(axis)
            found[name][axis] = positions if before is None else before[positions]
    return found
