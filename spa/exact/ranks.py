"""Ranks: queries and keys, values and outputs put into their singular basis, and then cut to its first directions.

    model as given --edit "singular_basis"--> the same function --plan--> the last positions of each head's width removed

The edit is part of the plan (`spa.plans.edits`): it is found and solved anew from the weights of the model that the plan is applied to, so
that the plan holds no weights. Positions are cut in all heads together, since one axis (heads × width) holds them; each head has a
basis of its own, so position j is the j-th direction of every head.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import drop_dead_nodes, fold_constants, merge_copies, replace_constants
from spa.errors import BadOption, NothingToPrune
from spa.exact import attention
from spa.exact.attention import Found
from spa.exact.flow import Flow, Obstacle
from spa.exact.products import Product
from spa.exact.weights import Weights
from spa.graph.groups import Groups, Kept, find_groups
from spa.graph.normalize import unshared
from spa.graph.shapes import infer, with_new_constants
from spa.graph.trace import trace
from spa.plans.edits import KINDS, Edit, Kind
from spa.plans.rewrite import copy_graph

EDIT = "singular_basis"




@dataclass(frozen=True)
class Ranks:
    """How many directions of each head stay: a number, or a share of the width; None for all."""

    qk: int | float | None = None
    vo: int | float | None = None

    def __post_init__(self) -> None:
        for option, rank in (("--qk-rank", self.qk), ("--vo-rank", self.vo)):
            if rank is not None and not (0 < rank < 1 if isinstance(rank, float) and rank != int(rank) else rank >= 1):
                raise BadOption(f"{option} is {rank:g}, but must be a number of 1 or more, or a share between 0 and 1.")

    @property
    def any(self) -> bool:
        """Whether anything is asked for."""
        return self.qk is not None or self.vo is not None

    @property
    def record(self) -> dict[str, Any]:
        """What a plan's options say of them."""
        return {name: rank for name, rank in (("qk_rank", self.qk), ("vo_rank", self.vo)) if rank is not None}

    def check_alone(self, target: bool, swaps: int = 0) -> None:
        """Raises BadOption where something else decides on widths too."""
        if self.any and (target or swaps):
            raise BadOption("--qk-rank and --vo-rank go with --ratio, but not with --target, --max-drop, --swaps or --steps.")

    def edit(self, inputs: Mapping[str, Sequence[int]] | None = None) -> Edit:
        """The edit that goes before the cut."""
        arguments: dict[str, Any] = {"qk": self.qk is not None, "vo": self.vo is not None}
        if inputs:
            arguments["inputs"] = {k: list(v) for k, v in inputs.items()}
        return Edit(EDIT, arguments)


@dataclass(frozen=True)
class Cut:
    """What ranks remove. gone: mask over all coordinates. groups: names of those that are cut. notes: place -> why it was left alone."""

    gone: NDArray[np.bool_]
    groups: tuple[str, ...]
    notes: Mapping[str, str]

    @property
    def patterns(self) -> tuple[str, ...]:
        """Globs that fit these groups and no others."""
        return tuple(glob.escape(name) for name in self.groups)


NO_RANKS = Ranks()


def joined(cuts: Sequence[Cut | None], total: int) -> Cut | None:
    """Several cuts as one, over so many coordinates; None if there are none."""
    found = [c for c in cuts if c is not None]
    gone = np.zeros(total, bool)
    notes: dict[str, str] = {}
    for one in found:
        gone |= one.gone
        notes |= one.notes
    return Cut(gone, tuple(dict.fromkeys(n for c in found for n in c.groups)), notes) if found else None


def turn(graph: gs.Graph, *, qk: bool, vo: bool, inputs: Mapping[str, Sequence[int]] | None = None) -> int:
    """Puts all heads that can be followed to their weights into their singular basis, in place; the function stays.

    before -> after: W_Q, W_K -> T_q W_Q, T_k W_K; W_V, W_O -> T_v W_V, W_O T_oᵀ (`spa.exact.basis`). Biases that cancel or fold, and would
    take up a direction, do so first. Returns the number of heads changed;
    a second time none.
    """
    own = copy_graph(graph)
    facts = infer(own, inputs)
    copies = unshared(own)
    fold_constants(own, facts.computed)
    found = attention.find(Flow(find_groups(trace(own, with_new_constants(facts, own)))))
    weights = Weights(dict(found.flow.traced.constants))
    turned = 0
    for scores in found.scores if qk else ():
        with suppress(Obstacle):  # a bias that cancels should take up no direction
            attention.drop_key_bias(found, scores, weights)
        turned += attention.turn_scores(scores, weights)
    for values in found.values if vo else ():
        with suppress(Obstacle):
            attention.fold_value_bias(found, values, weights)
        turned += attention.turn_values(values, weights)
    unshared(graph)  # gives the same names as above
    replace_constants(graph, weights.changed)
    merge_copies(graph, copies, {c for c, o in copies.items() if c not in weights.changed and o not in weights.changed})
    drop_dead_nodes(graph)
    return turned


KINDS[EDIT] = Kind(turn)


def truncation(groups: Groups, ranks: Ranks) -> Cut:
    """What the ranks remove of a model that is in its singular basis.

    Raises
    ------
    BadOption
        If a rank is larger than every width, or one width serves queries, keys and values but they are to have different ranks.
    NothingToPrune
        If nothing could be cut; the sentence says why.
    """
    found = attention.find(Flow(groups))
    gone = np.zeros(groups.total, bool)
    notes: dict[str, str] = {}
    cuts: list[tuple[Product, NDArray[np.int64], int]] = []
    for kind, rank in (("qk", ranks.qk), ("vo", ranks.vo)):
        if rank is None:
            continue
        notes |= {place: why for (k, place), why in found.left.items() if k == kind}
        widths = [(s.product, s.product.summed) for s in found.scores] if kind == "qk" else [(v.product, v.channels) for v in found.values]
        _check_rank(kind, rank, [_width(p, dims) for p, dims in widths], notes)
        for product, dims in widths:
            try:
                labels, keep = _last(groups, product, dims, rank)
            except Obstacle as error:
                notes[attention.place_of(product)] = str(error)
                continue
            if keep < len(labels):
                gone[np.unique(labels[keep:]) - 1] = True
                cuts.append((product, labels, keep))
    _check_together(groups, gone, found, cuts, ranks)
    if not gone.any():
        why = "; ".join(f"{p} {w}" for p, w in list(notes.items())[:1]) or "the heads are as narrow already"
        raise NothingToPrune(f"Nothing to cut by rank: {why}.")
    of = groups.of_coordinate()
    return Cut(gone, tuple(groups.groups[g].name for g in np.unique(of[gone])), notes)


def _width(product: Product, dims: tuple[str, ...]) -> int:
    return int(np.prod([product.node.dims[n].length for n in dims]))


def _check_rank(kind: str, rank: int | float, widths: list[int], notes: Mapping[str, str]) -> None:
    option = f"--{kind}-rank"
    if not widths:
        why = next((f"{place}: {why}" for place, why in notes.items()), "the model has no such product of computed values")
        raise NothingToPrune(f"{option} finds no heads that it could cut: {why}.")
    if rank > max(widths):
        raise BadOption(f"{option} is {rank:g}, more than the width of any head, which is {max(widths)}: give less, or a share below 1.")


def _last(groups: Groups, product: Product, dims: tuple[str, ...], rank: int | float) -> tuple[NDArray[np.int64], int]:
    """Coordinates + 1 of each position of a width, and how many stay. Raises Obstacle for a width that may not shrink."""
    if len(dims) != 1:
        raise Obstacle(product.node.node, "its width is spread over several axes")
    axis = product.node.dims[dims[0]]
    labels = groups.dim_labels(axis)
    if labels.shape[1] != 1 or not labels.all():
        raise Obstacle(product.node.node, "its width is no dim of its own, or stays whole")
    of = groups.of_coordinate()
    frozen = next((groups.groups[g].frozen for g in np.unique(of[labels[:, 0] - 1]) if groups.groups[g].frozen), None)
    if frozen is not None:
        raise Obstacle(product.node.node, f"its width stays because {frozen}")
    whole = isinstance(rank, int) or rank == int(rank)
    return labels[:, 0], min(int(rank), axis.length) if whole else max(1, round(rank * axis.length))


def _check_together(
    groups: Groups, gone: NDArray[np.bool_], found: Found, cuts: list[tuple[Product, NDArray[np.int64], int]], ranks: Ranks
) -> None:  # fmt: skip
    """Raises BadOption where one width serves several products that were asked to have different ones."""
    kept = Kept(groups, gone)
    asked = {(id(p.node), tuple(labels)): keep for p, labels, keep in cuts}
    every = [(s.product, s.product.summed, "qk") for s in found.scores] + [(v.product, v.channels, "vo") for v in found.values]
    for product, dims, kind in every:
        if len(dims) != 1:
            continue
        axis = product.node.dims[dims[0]]
        left = kept.dim(axis)
        labels = groups.dim_labels(axis)
        wanted = asked.get((id(product.node), tuple(labels[:, 0])), axis.length) if labels.shape[1] == 1 else axis.length
        if left is not None and int(left.sum()) != wanted:
            other = "--vo-rank" if kind == "vo" else "--qk-rank"
            raise BadOption(
                f"Queries, keys and values of {attention.place_of(product)} share one width in this graph, so that it can only be cut for "
                f"all of them: give {other} the same as {'--qk-rank' if kind == 'vo' else '--vo-rank'}."
            )
    if not ranks.any:
        raise BadOption("Which rank? Give --qk-rank, --vo-rank or both.")
