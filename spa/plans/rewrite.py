"""Rewriting: plain deletion of the removed coordinates, and restating of what depends on their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import Patch, Removal, merge_copies, remove_channels
from spa.graph.groups import Groups, Kept
from spa.graph.trace import NodeTrace
from spa.signatures import Carry
from spa.signatures.table import Dim, Pick, Product, Sum, Term

Gone = NDArray[np.bool_]  # mask over all coordinates


class CannotRestate(Exception):
    """A size is computed at run time in a way that cannot be restated; `groups` are the groups that it depends on."""

    def __init__(self, node: str, groups: list[int], cause: str) -> None:
        super().__init__(f"{node}: {cause}")
        self.node, self.groups, self.cause = node, groups, cause


def removed_positions(groups: Groups, gone: Gone) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Positions that go, for every value and axis that loses any: {value: {axis: ascending positions}}."""
    found: dict[str, dict[int, NDArray[np.int64]]] = {}
    kept = Kept(groups, gone)
    for value, axis in groups.labels:
        keep = kept.site((value, axis))
        if keep is not None:
            found.setdefault(value, {})[axis] = np.flatnonzero(~keep)
    return found


def narrowed_inputs(groups: Groups, gone: Gone) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Positions that stay, for every axis of a graph input that loses any (`spa.graph.state`)."""
    positions, shapes = removed_positions(groups, gone), groups.traced.facts.shapes
    return {
        t.name: {a: np.delete(np.arange((shapes[t.name] or ())[a]), p) for a, p in positions[t.name].items()}
        for t in groups.traced.graph.inputs
        if t.name in positions
    }


def rewrite(graph: gs.Graph, groups: Groups, gone: Gone, copies: Mapping[str, str] | None = None) -> gs.Graph:
    """A new graph without the removed coordinates; `graph` itself is not changed (weights are shared, not copied).

    Raises CannotRestate where a size that is computed at run time would have to change.
    """
    removal = plan_removal(groups, gone)
    small = copy_graph(graph)
    remove_channels(small, removal)
    if copies:
        cuts = removal.cuts
        same = {c for c, o in copies.items() if _equal(cuts.get(c), cuts.get(o))}
        merge_copies(small, copies, same)
    return small


def copy_graph(graph: gs.Graph) -> gs.Graph:
    """A copy of nodes, variables and constants that shares the constants' values."""
    copy = graph.copy()
    for node in copy.nodes:
        for key, value in node.attrs.items():
            if isinstance(value, gs.Constant):
                node.attrs[key] = gs.Constant(value.name, value._values, value.data_location)
    return copy


def _equal(one: Mapping[int, NDArray[np.int64]] | None, two: Mapping[int, NDArray[np.int64]] | None) -> bool:
    one, two = one or {}, two or {}
    return one.keys() == two.keys() and all(np.array_equal(one[a], two[a]) for a in one)


def plan_removal(groups: Groups, gone: Gone) -> Removal:
    """What the pass is told: cuts, new sizes, attributes and inputs."""
    traced = groups.traced
    positions, kept = removed_positions(groups, gone), Kept(groups, gone)
    constants = traced.constants
    cuts: dict[str, dict[int, NDArray[np.int64]]] = {}
    shapes: dict[str, dict[int, int]] = {}
    for value, axes in positions.items():
        whole = traced.facts.shapes[value] or ()
        if value in constants:
            cuts[value] = {a: np.delete(np.arange(whole[a]), p) for a, p in axes.items()}
        shapes[value] = {a: whole[a] - len(p) for a, p in axes.items()}
    attributes: dict[str, dict[str, Any]] = {}
    inputs: dict[tuple[str, int], NDArray[np.int64] | Patch] = {}
    for node in traced.nodes:
        if node.signature is None or not node.signature.carries:
            continue
        sizes = _Sizes(node, kept)
        if not sizes.touched:
            continue
        name = node.node.outputs[0].name
        for carry in node.signature.carries:
            for where, value in _restated(groups, node, carry, sizes):
                if isinstance(where, str):
                    attributes.setdefault(name, {})[where] = value
                else:
                    inputs[name, where] = value
    return Removal(cuts, shapes, attributes, inputs)


class _Sizes:
    """Sizes of a node's dims before and after."""

    def __init__(self, node: NodeTrace, kept: Kept) -> None:
        self.keep = {name: kept.dim(axis) for name, axis in node.dims.items()}
        self.axes = node.dims
        self.touched = any(k is not None for k in self.keep.values())

    def of(self, term: Term, *, after: bool) -> int:
        """Number of positions of a term."""
        if isinstance(term, Dim):
            keep = self.keep.get(term.name)
            return int(keep.sum()) if after and keep is not None else self.axes[term.name].length
        if isinstance(term, Product | Sum):
            parts = [self.of(p, after=after) for p in term.parts]
            return int(np.prod(parts)) if isinstance(term, Product) else sum(parts)
        return 1


def _restated(groups: Groups, node: NodeTrace, carry: Carry, sizes: _Sizes) -> Iterator[tuple[str | int, Any]]:
    where = carry.where
    present = isinstance(where, str) or (where < len(node.node.inputs) and node.node.inputs[where].name)
    if carry.value is not None:
        yield where, (np.array(carry.value, np.int64) if isinstance(where, int) else carry.value)
    elif carry.remap is not None:
        yield where, _renumbered(node, carry.remap, sizes)
    elif isinstance(carry.sizes, tuple):
        old = _old_list(groups, node, carry, sizes)
        known = old is not None
        if old is None:
            old = [sizes.of(t, after=False) if isinstance(t, Dim | Product | Sum) else 0 for t in carry.sizes]
        new = _new_list(old, carry, sizes)
        if new == old and present:
            return
        if isinstance(where, int) and present and not _is_constant(groups, node, where):
            yield where, _patch(groups, node, carry, old, new, known)
        else:
            yield where, (np.array(new, np.int64) if isinstance(where, int) else new)
    elif carry.sizes is not None:
        before, after = sizes.of(carry.sizes, after=False), sizes.of(carry.sizes, after=True)
        if before != after:
            yield where, after


def _is_constant(groups: Groups, node: NodeTrace, index: int) -> bool:
    return node.node.inputs[index].name in groups.traced.constants


def _old_list(groups: Groups, node: NodeTrace, carry: Carry, sizes: _Sizes) -> list[int] | None:
    assert isinstance(carry.sizes, tuple)
    if isinstance(carry.where, str):
        old = node.node.attrs.get(carry.where)
    elif carry.where < len(node.node.inputs) and node.node.inputs[carry.where].name:
        old = groups.traced.facts.values.get(node.node.inputs[carry.where].name)
    else:
        old = None
    return None if old is None else [int(v) for v in np.asarray(old).ravel()]


def _new_list(old: list[int], carry: Carry, sizes: _Sizes) -> list[int]:
    """Elements that restate a size that changes; -1, 0 and spread ones stay as they were."""
    assert isinstance(carry.sizes, tuple)
    new = list(old)
    for i, term in enumerate(carry.sizes):
        if not isinstance(term, Dim | Product | Sum) or i >= len(new):
            continue
        before, after = sizes.of(term, after=False), sizes.of(term, after=True)
        if carry.infer and old[i] == -1:
            continue
        copied = carry.infer and old[i] == 0  # copies an input axis, which need not be the one that shrinks
        if (before != after and (old[i] == before or copied)) or old[i] < 0:
            new[i] = after
    return new


def _renumbered(node: NodeTrace, pick: Pick, sizes: _Sizes) -> NDArray[np.int64]:
    """Indices into a dim: those of removed positions go, the others count the kept positions before theirs."""
    assert node.signature is not None
    operand = node.signature.inputs[1] or ()
    index = np.array(pick.index, np.int64).reshape([sizes.of(t, after=False) for t in operand])
    for axis, term in enumerate(operand):
        keep = sizes.keep.get(term.name) if isinstance(term, Dim) else None
        if keep is not None:
            index = np.compress(keep, index, axis=axis)
    keep = sizes.keep.get(pick.part.name)
    return index if keep is None else np.asarray((np.cumsum(keep) - 1)[index], np.int64)


def _patch(groups: Groups, node: NodeTrace, carry: Carry, old: list[int], new: list[int], known: bool) -> Patch:
    """Elements of a computed shape to overwrite; one of unknown size is left to be inferred where the operator can."""
    facts = groups.traced.facts
    out = node.node.outputs[0].name
    dynamic = facts.dynamic.get(out, ())
    indices, values = [], []
    inferred = [i for i, v in enumerate(old) if v == -1] if known else []
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if a == b:
            continue
        free = carry.infer and i < len(dynamic) and dynamic[i]
        if free and inferred:
            raise CannotRestate(out, _groups_of(groups, node), "two sizes of its target shape depend on the inputs")
        if free:
            inferred.append(i)
        indices.append(i)
        values.append(-1 if free else b)
    return Patch(tuple(indices), tuple(values))


def _groups_of(groups: Groups, node: NodeTrace) -> list[int]:
    found: set[int] = set()
    of = np.concatenate([[-1], groups.of_coordinate()])
    for axis in node.dims.values():
        if axis.labels is not None:
            numbers = groups.number[groups.traced.atoms.resolve(axis.labels, frozen=True)]
            found |= {int(g) for g in np.unique(of[numbers]) if g >= 0}
    return sorted(found)
