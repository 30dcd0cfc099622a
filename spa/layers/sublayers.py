"""Sub-layers: branches of residual sums, found by the flow of values and the table's facts, never by names.

    s = x + F(x)             the branch F(x) is a sub-layer: without it, readers of s read x
    s = x + A(n(x)) + M(n(x))  a tree of sums whose inner ones nothing else reads: each branch by itself

At a tree of element-wise sums (`Signature.sums`) of equal shapes, the *trunk* is the operand that all others are computed from; an operand
that only this sum reads, and behind which a map with stored weights is needed for nothing else, is a branch. What a branch is, its nodes
say: *attention* where two operands of data are contracted, a statistic (softmax) runs over the result and data is contracted with that
again, or where one operator holds all of it; *mlp* where all maps with weights act on each position alone; *branch* anything else (windows,
recurrence); *nest* where it holds other sub-layers. A *block* is the shortest repeating run of sub-layers along one trunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa.graph.count import macs_terms
from spa.graph.groups import Groups
from spa.graph.trace import NodeTrace, Traced, node_name, outer_values
from spa.plans.edits import Edit
from spa.proof.feeds import free_batch
from spa.signatures.table import STAT, Signature, kind_of

ATTENTION, MLP, BRANCH, NEST = "attention", "mlp", "branch", "nest"
KINDS = (ATTENTION, MLP, BRANCH, NEST)


@dataclass(frozen=True)
class SubLayer:
    """A branch of a residual sum. Values go by name.

    name: that of the last node with weights in it. trunk: x. branch: F(x). total: the sum that holds it and the trunk. parent: the node
    (by its output) that adds the branch. nodes: indices of the nodes that are needed for nothing else. inputs, outputs: states that go
    with it. parameters, macs: what dropping it saves, macs for one sample where the batch is free. block: number of its block.
    """

    name: str
    kind: str
    trunk: str
    branch: str
    total: str
    parent: str
    nodes: frozenset[int] = field(repr=False)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: int
    macs: int
    block: int = 0


@dataclass(frozen=True)
class SubLayers:
    """The sub-layers of a model in the order of the graph.

    adders: output of an adding node -> its operands, for the edit. stored: values that depend on no input of the graph.
    """

    layers: tuple[SubLayer, ...]
    adders: dict[str, tuple[str, str]] = field(repr=False)
    stored: frozenset[str] = field(repr=False)

    def blocks(self) -> list[tuple[SubLayer, ...]]:
        """Sub-layers by block, first to last."""
        found: dict[int, list[SubLayer]] = {}
        for layer in self.layers:
            found.setdefault(layer.block, []).append(layer)
        return [tuple(found[number]) for number in sorted(found)]

    def edit(self, dropped: Iterable[SubLayer]) -> Edit:
        """The edit that drops these sub-layers."""
        chosen = list(dropped)
        gone = {layer.branch for layer in chosen}
        replace: dict[str, str] = {}
        for total in dict.fromkeys(layer.total for layer in self.layers if layer in chosen):
            self._left(total, gone, replace)
        states: dict[str, Any] = {k: sorted({n for layer in chosen for n in getattr(layer, k)}) for k in ("inputs", "outputs")}
        return Edit("drop_branches", {"replace": replace, **{k: v for k, v in states.items() if v}})

    def _left(self, value: str, gone: set[str], replace: dict[str, str]) -> str | None:
        """What is left of a value of a sum's tree: itself, one of its operands, or nothing."""
        if value in gone:
            return None
        if value not in self.adders:
            return value
        left = [v for v in (self._left(operand, gone, replace) for operand in self.adders[value]) if v is not None]
        if len(left) == 1:
            replace[value] = left[0]
        return None if not left else value if len(left) > 1 else left[0]


def sub_layers(groups: Groups) -> SubLayers:
    """The sub-layers of a traced model. Time is linear in the nodes, times how deep residual sums are nested."""
    return _Finder(groups.traced).run()


class _Finder:
    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.nodes = traced.nodes
        self.maker = {t.name: i for i, n in enumerate(traced.nodes) for t in n.node.outputs if t.name}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(traced.nodes):
            for name in {t.name for t in node.node.inputs if t.name} | set(outer_values(node.node)):
                self.readers.setdefault(name, []).append(i)
        self.inner = {name for n in traced.nodes for name in outer_values(n.node)}
        self.ends = {t.name for t in traced.graph.outputs}
        self.stored = _from_constants(traced)
        self.states = tuple((s.input, s.output) for s in traced.states)
        self.batch = free_batch(traced)

    def run(self) -> SubLayers:
        adders = {t: o for i in range(len(self.nodes)) for t, o in [self._sum(i)] if o is not None}
        held = {o for t in adders for o in adders[t] if o in adders and self._single(o)}
        found: list[SubLayer] = []
        for total in adders:
            if total not in held:
                found += self._branches(total, adders)
        found.sort(key=lambda layer: (self.maker[layer.total], self.maker[layer.branch]))
        return SubLayers(_in_blocks(_nested(found), self.traced), adders, frozenset(self.stored))

    def _sum(self, index: int) -> tuple[str, tuple[str, str] | None]:
        """The sum that a node gives, with its two operands, where these are data of its shape."""
        node, made = self.nodes[index].node, self.nodes[index].signature
        if made is None or made.sums != 0 or len(node.inputs) != 2 or node.outputs[0].name in self.inner:
            return "", None
        operands, shapes = [t.name for t in node.inputs], self.traced.facts.shapes
        whole = shapes.get(node.outputs[0].name)
        if whole is None or operands[0] == operands[1] or any(n in self.stored or shapes.get(n) != whole for n in operands):
            return "", None
        return node.outputs[0].name, (operands[0], operands[1])

    def _single(self, value: str) -> bool:
        return len(self.readers.get(value, ())) == 1 and value not in self.ends and value not in self.inner

    def _leaves(self, total: str, adders: dict[str, tuple[str, str]]) -> list[tuple[str, str]]:
        """(operand, the sum that adds it) of a tree of sums that nothing else reads."""
        found, rest = [], [total]
        while rest:
            parent = rest.pop()
            for operand in adders[parent]:
                if operand in adders and self._single(operand):
                    rest.append(operand)
                else:
                    found.append((operand, parent))
        return found

    def _branches(self, total: str, adders: dict[str, tuple[str, str]]) -> list[SubLayer]:
        leaves = self._leaves(total, adders)
        by_place = sorted({value for value, _ in leaves}, key=lambda v: self.maker.get(v, -1))
        trunk = by_place[0]
        if not all(self._depends(value, trunk) for value in by_place[1:]):
            return []
        found = []
        for value, parent in leaves:
            if value != trunk and self._single(value):
                layer = self._branch(value, parent, trunk, total)
                found += [layer] if layer is not None else []
        return found

    def _depends(self, value: str, on: str) -> bool:
        """Whether a value is computed from another; nothing before the other's maker is looked at."""
        first, seen, rest = self.maker.get(on, -1), set(), [value]
        while rest:
            name = rest.pop()
            if name == on:
                return True
            made = self.maker.get(name, -1)
            if made > first and made not in seen:
                seen.add(made)
                node = self.nodes[made].node
                rest += [t.name for t in node.inputs if t.name and t.name not in self.stored]
                rest += list(outer_values(node))
        return False

    def _branch(self, value: str, parent: str, trunk: str, total: str) -> SubLayer | None:
        nodes, inputs, outputs = self._needed_only_for(value, trunk)
        maps = [i for i in self._last_maps(value, nodes) if self._weights(i)]
        if not maps:
            return None
        counted = set(self.traced.weights)
        own = {t.name for i in nodes for t in self.nodes[i].node.inputs if t.name in counted and set(self.readers[t.name]) <= nodes}
        parameters = sum(int(np.prod(self.traced.facts.shapes[n] or ())) for n in own)
        macs = sum(_macs(self.nodes[i]) for i in nodes) // self.batch
        name = node_name(self.nodes[max(maps)].node)
        return SubLayer(name, self._kind(nodes), trunk, value, total, parent, frozenset(nodes), inputs, outputs, parameters, macs)

    def _needed_only_for(self, value: str, trunk: str) -> tuple[set[int], tuple[str, ...], tuple[str, ...]]:
        """Nodes behind the trunk that only lead to a value, and the states that they alone read and give."""
        within = self._behind(value, trunk)
        given = [(i, o) for i, o in self.states if any(r in within for r in self.readers.get(i, ()))]
        outputs = tuple(o for _, o in given)
        nodes = self._dead(value, within | {self.maker[o] for o in outputs if o in self.maker}, set(outputs))
        inputs = tuple(i for i, _ in given if all(r in nodes for r in self.readers.get(i, ())))
        kept = tuple(o for i, o in given if i in inputs)
        if kept != outputs:
            nodes = self._dead(value, within, set(kept))
        return nodes, inputs, kept

    def _last_maps(self, value: str, nodes: set[int]) -> set[int]:
        """The contractions that a value is made by, with nothing but element-wise work and layout after them."""
        found: set[int] = set()
        seen: set[int] = set()
        rest = [value]
        while rest:
            made = self.maker.get(rest.pop(), -1)
            if made not in nodes or made in seen:
                continue
            seen.add(made)
            signature = self.nodes[made].signature
            if signature is not None and signature.macs:
                found.add(made)
            else:
                rest += [t.name for t in self.nodes[made].node.inputs if t.name]
        return found

    def _behind(self, value: str, trunk: str) -> set[int]:
        first, seen, rest = self.maker.get(trunk, -1), set(), [value]
        while rest:
            made = self.maker.get(rest.pop(), -1)
            if made > first and made not in seen:
                seen.add(made)
                rest += [t.name for t in self.nodes[made].node.inputs if t.name]
        return seen

    def _dead(self, value: str, among: set[int], outputs: set[str]) -> set[int]:
        """Nodes of which every result is read by dead nodes alone, once nobody reads the value."""
        dead: set[int] = set()
        for index in sorted(among, reverse=True):
            results = [t.name for t in self.nodes[index].node.outputs if t.name]
            ends = any(r in self.ends and r not in outputs for r in results)
            if not ends and all(r == value or set(self.readers.get(r, ())) <= dead for r in results):
                dead.add(index)
        return dead

    # ------------------------------------------------------------------ what it is

    def _weights(self, index: int) -> bool:
        """Whether a node is a map with stored weights."""
        node, made = self.nodes[index].node, self.nodes[index].signature
        return made is not None and bool(made.macs) and any(t.name in self.stored for t in node.inputs if t.name)

    def _data(self, index: int, made: Signature) -> int:
        """Operands of data of a contraction."""
        return sum(1 for t, o in zip(self.nodes[index].node.inputs, made.inputs, strict=False) if o and t.name not in self.stored)

    def _kind(self, nodes: set[int]) -> str:
        stage: dict[str, int] = {}  # value -> 1: a product of data; 2: a statistic ran over it
        attends, apart = False, True
        for index in sorted(nodes):
            node, made = self.nodes[index].node, self.nodes[index].signature
            if made is None:
                apart &= not self.nodes[index].refusal
                continue
            reached = max((stage.get(t.name, 0) for t in node.inputs), default=0)
            product = bool(made.macs) and bool(made.linear) and self._data(index, made) > 1
            statistic = any(kind_of(made, name) is STAT for name in self.nodes[index].dims)
            attends |= {"qk", "vo"} <= set(made.roles.values()) or "head-width" in made.roles.values() or (product and reached == 2)
            reached = 1 if product else 2 if reached and statistic else reached
            stage.update((t.name, reached) for t in node.outputs)
            if self._weights(index):
                apart &= bool(made.linear) and all(x.window is None or set(x.window.kernel) <= {1} for x in made.linear)
        return ATTENTION if attends else MLP if apart else BRANCH


def _from_constants(traced: Traced) -> set[str]:
    """Values that are stored, or computed from stored ones alone."""
    found = set(traced.constants)
    for node in traced.nodes:
        names = [t.name for t in node.node.inputs if t.name]
        if names and all(n in found for n in names) and not any(isinstance(v, gs.Graph) for v in node.node.attrs.values()):
            found.update(t.name for t in node.node.outputs if t.name)
    return found


def _macs(node: NodeTrace) -> int:
    return sum(int(factor * np.prod([node.dims[d].length for d in dims if d in node.dims], dtype=np.float64))
               for factor, dims in macs_terms(node))  # fmt: skip


def _size(traced: Traced, value: str) -> int:
    return int(np.prod(traced.facts.shapes.get(value) or ()))


def _nested(found: Sequence[SubLayer]) -> list[SubLayer]:
    return [replace(layer, kind=NEST) if any(other.nodes < layer.nodes for other in found) else layer for layer in found]


def _in_blocks(found: Sequence[SubLayer], traced: Traced) -> tuple[SubLayer, ...]:
    """Numbers the blocks: the shortest run of kinds that repeats along trunks of one size; a nest is a block of its own."""
    made: list[SubLayer] = []
    number = 0
    start = 0
    plain = [layer for layer in found if layer.kind != NEST]
    while start < len(plain):
        size = _size(traced, plain[start].trunk)
        stop = start
        while stop < len(plain) and _size(traced, plain[stop].trunk) == size:
            stop += 1
        kinds = [layer.kind for layer in plain[start:stop]]
        period = next(p for p in range(1, len(kinds) + 1) if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p))
        made += [replace(layer, block=number + i // period) for i, layer in enumerate(plain[start:stop])]
        number += len(kinds) // period
        start = stop
    made += [replace(layer, block=number + i) for i, layer in enumerate(layer for layer in found if layer.kind == NEST)]
    order = {layer.branch: i for i, layer in enumerate(found)}
    return tuple(sorted(made, key=lambda layer: order[layer.branch]))
