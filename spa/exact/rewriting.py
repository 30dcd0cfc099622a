"""Carrying out exact rewrites on a model, and proving that it computes what it did."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from passes import drop_biases, drop_dead_nodes, insert_biases, merge_copies, replace_constants, split_branches
from spa.errors import BadOption, CheckFailed, NothingToPrune
from spa.exact import attention
from spa.exact.attention import Step
from spa.exact.experts import branch_of, find_mlps
from spa.exact.flow import Flow, Obstacle
from spa.exact.flow import Source as Made
from spa.exact.ranks import Cut, Ranks, truncation
from spa.exact.weights import Weights
from spa.graph.analysis import Analysis, Source, analyze
from spa.plans.rewrite import copy_graph
from spa.proof import check as checking
from spa.proof.check import Check
from spa.proof.feeds import Feeds
from spa.proof.prove import runnable
from spa.proof.widen import widen
from spa.stages import Stage, collector_paused, quiet
from spa.storage.store import Model, save, with_graph

KEY_BIAS, VALUE_BIAS, QK_BASIS, VO_BASIS, SPLIT = "key bias", "value bias", "QK basis", "VO basis", "split MLP"


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites are asked for. experts: how many parts an MLP is split into, None for no split."""

    key_bias: bool = False
    value_bias: bool = False
    qk_basis: bool = False
    vo_basis: bool = False
    experts: int | None = None

    def __post_init__(self) -> None:
        if self.experts is not None and self.experts < 2:
            raise BadOption(f"--split-mlp is {self.experts}, but an MLP is split into 2 parts or more.")

    @property
    def any(self) -> bool:
        """Whether anything is asked for."""
        return self.key_bias or self.value_bias or self.qk_basis or self.vo_basis or self.experts is not None


@dataclass(frozen=True)
class Rewritten:
    """A model that computes what it did. steps: what was done where, and what was left alone and why. check: None if not asked for."""

    model: Model
    steps: tuple[Step, ...]
    check: Check | None

    @property
    def done(self) -> tuple[Step, ...]:
        """The steps that changed something."""
        return tuple(s for s in self.steps if s.done)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model, whole or not at all."""
        save(self.model, path)


@collector_paused()
def rewritten(
    model: Source | Analysis,
    *,
    drop_key_bias: bool = False,
    fold_value_bias: bool = False,
    singular_basis: bool = False,
    split_mlp: int | None = None,
    check: bool = True,
    seed: int = 0,
    feeds: Feeds | None = None,
    tolerance: float = checking.TOLERANCE,
    stage: Stage = quiet,
) -> Rewritten:
    """Rewrites a model so that it computes the same, with less in it or in another basis.

    Parameters
    ----------
    model
        A path, bytes, a ModelProto, a Model or its analysis.
    drop_key_bias, fold_value_bias, singular_basis, split_mlp
        Which rewrites: `spa.exact.attention` and `spa.exact.experts` say what they are; `split_mlp` is the number of parts.
    check, seed, feeds, tolerance
        The proof: both models on the same inputs (drawn if None), outputs equal to `tolerance` of their scale. A model of half precision
        is rewritten in float32 too, and that is what is proven: new weights are rounded anew, which is no error of the rewrite.
    stage
        Is told what goes on.

    Raises
    ------
    BadOption
        If no rewrite is asked for, or an MLP is to be split into fewer than two parts.
    NothingToPrune
        If none applies anywhere; the sentence says why.
    CheckFailed
        If the outputs differ.
    """
    wanted = Rewrites(drop_key_bias, fold_value_bias, singular_basis, singular_basis, split_mlp)
    if not wanted.any:
        raise BadOption("Which rewrite? Give --drop-key-bias, --fold-value-bias, --singular-basis, --split-mlp E, or --all.")
    analysis = model if isinstance(model, Analysis) else analyze(model, stage=stage)
    result, steps = carry_out(analysis, wanted, stage=stage)
    if not any(s.done for s in steps):
        raise NothingToPrune(why_nothing(steps))
    proof = None
    if check:
        exact, fed = in_float32(analysis, feeds)
        same = result if exact is analysis else carry_out(exact, wanted, stage=stage)[0]
        proof = prove_same(exact, same, feeds=fed, seed=seed, tolerance=tolerance, stage=stage)
    return Rewritten(result, tuple(steps), proof)


def carry_out(
    analysis: Analysis, wanted: Rewrites, *, stage: Stage = quiet
) -> tuple[Model, list[Step]]:  # fmt: skip
    """The rewritten model and the steps, without a proof."""
    steps: list[Step] = []
    model = analysis.normal.model
    if wanted.key_bias or wanted.value_bias or wanted.qk_basis or wanted.vo_basis:
        with stage("rewriting attention"):
            if wanted.value_bias:
                analysis = _with_room(analysis)
            model, steps = _attention(analysis, wanted)
    if wanted.experts is not None:
        with stage("splitting MLPs"):
            again = analyze(model, **analysis.options) if steps else analysis
            model, split = _split(again, wanted.experts)
            steps += split
    return model, steps


def _with_room(analysis: Analysis) -> Analysis:
    """The analysis of the model with a place for a constant in every layer that a value bias is folded into."""
    found = attention.find(Flow(analysis.groups))
    weights = Weights(dict(analysis.groups.traced.constants))
    kinds = analysis.groups.traced.facts.types
    rooms: dict[str, tuple[int | None, Any]] = {}
    for values in found.values:
        try:
            attention.check_folds(found, values, weights)
            for layer, room in attention.missing_room(found, values):
                out = layer.node.outputs[0].name
                kind = helper.tensor_dtype_to_np_dtype(kinds.get(out) or 1)
                rooms[out] = room.slot, np.zeros(room.shape, kind)
        except Obstacle:
            continue  # said where the fold is tried
    if not rooms:
        return analysis
    graph = copy_graph(analysis.normal.model.graph)
    insert_biases(graph, rooms)
    return analyze(with_graph(analysis.edited, graph), **analysis.options)


def _attention(analysis: Analysis, wanted: Rewrites) -> tuple[Model, list[Step]]:
    found = attention.find(Flow(analysis.groups))
    weights = Weights(dict(analysis.groups.traced.constants))
    steps: list[Step] = []

    def attempt(rewrite: str, place: str, work: Any) -> None:
        try:
            done = work()
            steps.append(Step(rewrite, place, done, "" if done else _ALREADY[rewrite]))
        except Obstacle as error:
            steps.append(Step(rewrite, place, 0, str(error)))

    zeroed: list[Made] = []
    for scores in found.scores:
        place = attention.place_of(scores.product)
        if wanted.key_bias:
            attempt(KEY_BIAS, place, lambda s=scores: attention.drop_key_bias(found, s, weights))
            zeroed += [scores.left.source, scores.right.source]
        if wanted.qk_basis:
            attempt(QK_BASIS, place, lambda s=scores: attention.turn_scores(s, weights))
    for values in found.values:
        place = attention.place_of(values.product)
        if wanted.value_bias:
            attempt(VALUE_BIAS, place, lambda v=values: attention.fold_value_bias(found, v, weights))
            zeroed.append(values.side.source)
        if wanted.vo_basis:
            attempt(VO_BASIS, place, lambda v=values: attention.turn_values(v, weights))
    for (kind, place), why in found.left.items():
        asked = {"qk": [(wanted.key_bias, KEY_BIAS), (wanted.qk_basis, QK_BASIS)],
                 "vo": [(wanted.value_bias, VALUE_BIAS), (wanted.vo_basis, VO_BASIS)]}[kind]  # fmt: skip
        steps += [Step(name, place, 0, why) for on, name in asked if on]
    graph = copy_graph(analysis.normal.model.graph)
    replace_constants(graph, weights.changed)
    drop_biases(graph, _zero_biases(zeroed, weights))
    drop_dead_nodes(graph)
    copies = analysis.normal.copies
    merge_copies(graph, copies, {c for c, o in copies.items() if c not in weights.changed and o not in weights.changed})
    return with_graph(analysis.normal.model, graph), steps


_ALREADY = {KEY_BIAS: "the keys' bias is zero", VALUE_BIAS: "the values' bias is zero", QK_BASIS: "it is in that basis already",
            VO_BASIS: "it is in that basis already"}  # fmt: skip


def _zero_biases(sources: Sequence[Made], weights: Weights) -> dict[str, int | None]:
    """Biases that nothing is left of, as the pass is told."""
    found: dict[str, int | None] = {}
    for source in sources:
        bias = weights.bias(source)
        if bias is not None and not bias.any():
            node: gs.Node = source.layer.node if source.adds is None else source.adds
            found[node.outputs[0].name] = source.layer.linear.bias if source.adds is None else None
    return found


def _split(analysis: Analysis, experts: int) -> tuple[Model, list[Step]]:
    groups = analysis.groups
    mlps, left = find_mlps(Flow(groups))
    steps = [Step(SPLIT, name, 0, why) for name, why in left.items()]
    branches = []
    for mlp in mlps:
        try:
            branches.append(branch_of(groups, mlp, experts))
            steps.append(Step(SPLIT, mlp.group.name, experts))
        except Obstacle as error:
            steps.append(Step(SPLIT, mlp.group.name, 0, str(error)))
    graph = copy_graph(analysis.normal.model.graph)
    split_branches(graph, branches)
    drop_dead_nodes(graph)
    return with_graph(analysis.normal.model, graph), steps


def with_bases(analysis: Analysis, ranks: Ranks, *, stage: Stage = quiet) -> tuple[Analysis, Cut | None]:
    """The analysis of the model in its singular bases, and what the ranks remove of it; as it was, and None, without ranks."""
    if not ranks.any:
        return analysis, None
    edit = ranks.edit(analysis.settings["inputs"])
    if edit.record not in analysis.settings.get("edits", ()):
        with stage("finding singular bases"):
            analysis = analyze(analysis.given, **{**analysis.settings, "edits": [*analysis.edits, edit]})
    return analysis, truncation(analysis.groups, ranks)


def in_float32(analysis: Analysis, feeds: Feeds | None) -> tuple[Analysis, Feeds | None]:
    """The analysis of the same model in float32, and inputs for it; as they are where nothing is of half precision."""
    wide, fed = widen(analysis.edited, feeds or {})
    same = wide is analysis.edited
    return (analysis if same else analyze(wide, **analysis.options)), (None if feeds is None else fed)


def prove_bases(
    before: Analysis, after: Analysis, ranks: Ranks, *, feeds: Feeds | None = None, seed: int = 0, tolerance: float = checking.TOLERANCE,
    stage: Stage = quiet,
) -> Check | None:  # fmt: skip
    """Proves in float32 that a model in its singular bases computes what it did; None without ranks. Raises CheckFailed."""
    if not ranks.any:
        return None
    exact, fed = in_float32(before, feeds)
    turned = after if exact is before else with_bases(exact, ranks, stage=stage)[0]
    return prove_same(exact, turned.normal.model, feeds=fed, seed=seed, tolerance=tolerance, stage=stage)


def why_nothing(steps: Sequence[Step]) -> str:
    """One sentence on why no rewrite applied."""
    if not steps:
        return "Nothing to rewrite: the model has no product of queries with keys, nor an MLP, that can be followed to its weights."
    first = steps[0]
    more = f", and {len(steps) - 1} more" if len(steps) > 1 else ""
    return f"Nothing to rewrite: {first.rewrite} at {first.place} was left alone because {first.why}{more}."


def prove_same(
    analysis: Analysis, result: Model, *, feeds: Feeds | None = None, seed: int = 0, tolerance: float = checking.TOLERANCE,
    stage: Stage = quiet,
) -> Check:  # fmt: skip
    """Runs the model that was analysed and the rewritten one on the same inputs. Raises CheckFailed if they differ."""
    with stage("proving"):
        given = runnable(analysis.normal.model, analysis.groups.traced, seed=seed) if feeds is None else feeds
        proof = checking.compare(analysis.edited, result, given, tolerance=tolerance)
    if not proof.passed:
        worst = max(proof.differences, key=lambda d: d.relative)
        raise CheckFailed(
            f"The rewritten model differs from the original: output {worst.output!r} by {worst.relative:.1e} of its scale, where "
            f"{proof.tolerance:.0e} is allowed; nothing was written (--tolerance {worst.relative * 1.1:.1e} would pass)."
        )
    return proof


__all__ = ["Rewrites", "Rewritten", "carry_out", "prove_bases", "prove_same", "rewritten", "why_nothing", "with_bases"]
