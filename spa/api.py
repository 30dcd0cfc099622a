"""The straight line, for Python: load, analyse, choose, rewrite, prove."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spa import criteria
from spa.budgets.budget import Budget, budget_of, check_limits, with_data
from spa.budgets.planner import Planner
from spa.budgets.steps import Stages, prune_in_steps
from spa.criteria.brought import read_brought, resolved
from spa.criteria.refine import refined
from spa.criteria.score import Known, score
from spa.criteria.views import Data
from spa.data.evidence import Evidence
from spa.engines import find as find_engine
from spa.errors import BadOption, CheckFailed, NothingToPrune
from spa.exact import NO_RANKS, Ranks
from spa.exact.ranks import joined
from spa.exact.rewriting import prove_bases, with_bases
from spa.exact.scales import with_scales
from spa.graph.analysis import Analysis, Source, analyze, analyzed_for, evidence_for, moved, opened
from spa.graph.count import count
from spa.graph.groups import why_nothing
from spa.graph.state import feeds_for
from spa.layers.depth import BALANCE, Depth, without_layers
from spa.layers.depth_budget import balanced, budget_left
from spa.layers.replace_me import refitted
from spa.plans.choose import Options, choose, find_space
from spa.plans.cutting import cut
from spa.plans.edits import Edit
from spa.plans.plan import Plan, load_plan, make_plan, mask_of
from spa.plans.protect import parsed
from spa.plans.result import Result
from spa.proof import check as checking
from spa.proof.feeds import Feeds
from spa.proof.prove import both, check_shapes, failure, inputs_for, prove, prove_edits, runnable
from spa.repairs.repair import RepairOptions
from spa.repairs.solve import DAMPING
from spa.stages import Stage, collector_paused, quiet
from spa.vocabularies.vocabulary import ids_of


@collector_paused()
def plan(
    model: Source | Analysis,
    ratio: float | None = None,
    *,
    criterion: str = "l2",
    scope: str | None = None,
    multiple_of: int | str = "auto",
    keep_at_least: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    units: Sequence[str] = (),
    protect: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
    keep_state: bool = False,
    inputs: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    calibration: Any = None,
    aggregate: str | None = None,
    normalize: str = "mean",
    swaps: int = 0,
    loss: str = "auto",
    damping: float = DAMPING,
    target: str | Sequence[str] | Budget = (),
    known: Known | None = None,
    ranks: Ranks = NO_RANKS,
    scores: Any = None,
    stage: Stage = quiet,
) -> Plan:
    """Decides what goes.

    ratio: share of the channels of each group that goes, between 0 and 1; 0.5 if there is no target either. criterion: a name of the
    registry. scope: local, global, isomorphic, cost or log. multiple_of: widths are rounded to it; "auto" is what the provider likes.
    include, exclude: globs or /regexes/ on the names of groups, nodes and values, or "kind:head". units: kinds of groups that may shrink
    (`spa.graph.kinds.KINDS`), all if empty. protect: what stays, "pattern" or "pattern: coordinates" (`spa.plans.protect`). ratios: pattern
    -> ratio of its own. stat: whether axes that a normalisation runs over may shrink. keep_state: whether a cache that is carried from call
    to call stays as it is (`spa.graph.state`). calibration: data for criteria that look at any: a `Calibration`, an
    `Evidence` or what `spa.calibration` takes. aggregate, normalize: how scores of a group's layers are put together, and made comparable
    between groups. swaps: rounds of exchanging removed for kept channels while the error after repair falls. loss: for gradients.
    damping: ridge of the errors that are estimated, over the mean variance of a layer's inputs. target: in place of a ratio, what the
    result may cost ("macs=0.5", "size=8MB", …) or a `Budget` with all that goes with it. known: scores and losses of an earlier plan of
    the same model, criterion and data, which are not worked out again. ranks: how much of the heads' singular bases stays; nothing else
    goes then unless there is a ratio or a target too. scores: an .npz file or a mapping of scores, masks and scales of channels
    (`spa.criteria.brought`); the same goes for masks.
    Raises SpaError; NothingToPrune if nothing would go.
    """
    budget = budget_of(target)
    check_limits(budget, ratio, scope)
    asked = 0.5 if ratio is None else ratio
    ranks.check_alone(budget.asks or budget.judges, swaps)
    options = Options(asked, scope or "local", multiple_of, keep_at_least, tuple(include), tuple(exclude), dict(ratios or {}), normalize,
                      tuple(units), tuple(protect))  # fmt: skip
    needs = criteria.get(criterion).needs
    analysis = model if isinstance(model, Analysis) else analyze(
        model, inputs=inputs, protect_outputs=protect_outputs, stat=stat, keep_state=keep_state, stage=stage)  # fmt: skip
    analysis, by_rank = with_bases(analysis, ranks, stage=stage)
    brought = read_brought(scores)
    said = None if brought is None else resolved(brought, analysis.groups, target=budget.asks)
    analysis = analysis if said is None else with_scales(analysis, said.scales, stage=stage)
    analysis.given.origin.prepare()  # plans name their model by its hash, which takes as long as reading the file
    groups = analysis.groups
    decided = joined([by_rank, None if said is None else said.masks], groups.total)
    record: dict[str, Any] = ranks.record | ({} if brought is None else {"scores": brought.name})
    if decided is not None:
        if ratio is None:
            if not decided.gone.any():
                raise NothingToPrune(why_nothing(groups, decided.notes))
            return make_plan(analysis.given, groups, decided.gone, copies=analysis.normal.copies, options={"ratio": None, **record},
                             trace=analysis.settings, notes=decided.notes)  # fmt: skip
        options = replace(options, exclude=(*options.exclude, *decided.patterns))
    wants = needs or swaps or budget.asks or budget.judges or any(g.kind == "expert" for g in groups.free())
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage) if wants else None
    budget, evidence = with_data(analysis, budget, evidence, seed=seed, stage=stage)
    if evidence is None and swaps:
        raise BadOption("--swaps compares errors on data: give some with --calibration (none draws noise).")
    if evidence is not None and not evidence.batches and (needs or swaps):
        way_out = "use --calibration synthetic or none"
        raise BadOption(f"Criterion {criterion!r} and --swaps look at inputs, and the norms' moments are none: {way_out}.")
    data = None if evidence is None else Data(evidence.model, evidence.batches, loss, evidence.labels, damping)
    with stage("scoring"):
        by_criterion = partial(score, analysis.normal.model.graph, groups, criterion, seed=seed, data=data, aggregate=aggregate,
                               relative=normalize == "energy")  # fmt: skip
        scored = known.scores if known is not None else by_criterion() if said is None else said.fill(groups, by_criterion)
    block = find_engine(budget.provider).block()
    if budget.asks:
        space = find_space(groups, options, block=block, held=scored.held)
        made = Planner(analysis, space, scored, budget, evidence, normalize=normalize, seed=seed, known=known, stage=stage).decide()
        gone, found = made.gone, space.notes
        record = {**record, "budget": dict(made.record)}
    else:
        with stage("choosing"):
            choice = choose(groups, scored, options, block=block)
        gone, found = choice.gone, choice.notes
    if decided is not None:
        gone, found = gone | decided.gone, {**found, **decided.notes}
    if not gone.any():
        raise NothingToPrune(why_nothing(groups, found))
    notes = {**scored.notes, **found}
    if swaps and data is not None:
        with stage("exchanging"):
            held = find_space(groups, options, block=block, held=scored.held).held
            gone = refined(analysis.normal.model.graph, groups, gone, data, rounds=swaps, seed=seed, held=held)
    chosen = {
        "ratio": None if budget.asks else asked,
        "criterion": criterion,
        "scope": options.scope,
        "multiple_of": multiple_of,
        "block": block,
        "keep_at_least": keep_at_least,
        "include": list(include), "exclude": list(exclude), "units": list(units), "protect": list(protect),
        "ratios": dict(ratios or {}),
        "seed": seed,
    }  # fmt: skip
    if evidence is not None:
        chosen |= {"calibration": evidence.name, "samples": evidence.samples, "swaps": swaps, "loss": loss, "damping": damping}
    if evidence is not None or aggregate is not None or normalize != "mean":
        chosen |= {"aggregate": aggregate, "normalize": normalize}
    chosen |= record
    return make_plan(analysis.given, groups, gone, copies=analysis.normal.copies, options=chosen, trace=analysis.settings, notes=notes)


def layers_alone(analysis: Analysis, seed: int) -> Plan:
    """A plan that does the edits and removes no channels."""
    nothing = np.zeros(analysis.groups.total, bool)
    return make_plan(analysis.given, analysis.groups, nothing, copies=analysis.normal.copies, options={"seed": seed},
                     trace=analysis.settings, notes={})  # fmt: skip


def planned(
    analysis: Analysis, wishes: Mapping[str, Any], *, ratio: float | None, budget: Budget, evidence: Evidence | None, depth: Depth | None,
    seed: int = 0, stage: Stage = quiet,
) -> tuple[Analysis, Plan]:  # fmt: skip
    """Decides what goes of what was read already, layers first, and gives the model without these layers too. wishes: as `carried_out`."""
    if depth is not None and depth.drop == BALANCE:
        depth = balanced(analysis, depth, budget)
    if depth is None:
        return analysis, plan(analysis, ratio, calibration=evidence, target=budget, seed=seed, stage=stage, **wishes)
    small, data, dropped = without_layers(analysis, depth, evidence, seed=seed, stage=stage)
    left = budget_left(small, budget)
    if left is None or (ratio is None and not left.asks and not wishes.get("ranks", NO_RANKS).any):
        made = layers_alone(small, seed)
    else:
        left = replace(left, evaluate=moved(left.evaluate, small))
        made = plan(small, ratio, calibration=data, target=left, seed=seed, stage=stage, **wishes)
    return small, replace(made, options={**made.options, "depth": dropped.record})


@collector_paused()
def apply(
    model: Source | Analysis,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    *,
    other_weights: bool = False,
    check: bool = True,
    seed: int = 0,
    feeds: Feeds | None = None,
    tolerance: float = checking.TOLERANCE,
    repair: str | RepairOptions = "none",
    calibration: Any = None,
    stage: Stage = quiet,
) -> Result:
    """Removes what a plan says, and proves that nothing else changed.

    other_weights: accept a model of the same graph. check: run the proof. feeds: its inputs, drawn if None. repair: "none", "bias",
    "affine", "obspa" or `RepairOptions`, with the data in `calibration`: kept weights take over what the removed ones did.
    Raises BadPlan for a plan of another model, CheckFailed if removing and masking differ.
    """
    decided = load_plan(plan if isinstance(plan, Plan | Mapping) else Path(plan))
    analysis = model if isinstance(model, Analysis) else analyzed_for(model, decided, other_weights=other_weights, stage=stage)
    analysis, calibration = refitted(analysis, calibration, seed=seed, stage=stage)
    gone = mask_of(decided, analysis.groups)
    before, after = count(analysis.dense.groups), count(analysis.groups, gone)
    made = cut(analysis, gone, repair=repair, calibration=calibration, seed=seed, stage=stage)
    analysis, gone, small = made.analysis, made.gone, made.model
    groups = analysis.groups
    proof, ids = None, ids_of(groups, gone)
    if check:
        given = feeds
        if analysis.edits and feeds is None:  # the model as given may have inputs that the edited one lacks
            drawn = inputs_for(analysis.dense.normal.model, analysis.dense.groups.traced, seed=seed)
            given = drawn if ids is None else ids.drawn(drawn)
        proof = prove(analysis.normal.model, groups, gone, small, feeds=given, seed=seed, tolerance=tolerance, stage=stage)
        if analysis.edits and given is not None:
            types = analysis.dense.groups.traced.facts.types
            edits = prove_edits(analysis.given, analysis.edits, analysis.edited, types, given, tolerance=tolerance, stage=stage)
            proof = both(proof, edits)
        if not proof.passed:
            raise CheckFailed(failure(proof))
    else:
        check_shapes(groups, gone, small)
    return Result(small, decided, analysis, before, after, proof, made.repaired, ids)


@collector_paused()
def prune(
    model: Source,
    ratio: float | None = None,
    *,
    criterion: str = "l2",
    scope: str | None = None,
    multiple_of: int | str = "auto",
    keep_at_least: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    units: Sequence[str] = (),
    protect: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
    keep_state: bool = False,
    inputs: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    check: bool = True,
    feeds: Feeds | None = None,
    tolerance: float = checking.TOLERANCE,
    calibration: Any = None,
    repair: str | RepairOptions = "none",
    aggregate: str | None = None,
    normalize: str = "mean",
    swaps: int = 0,
    loss: str = "auto",
    target: str | Sequence[str] | Budget = (),
    steps: int = 1,
    edits: Sequence[Edit | Mapping[str, Any]] = (),
    drop_layers: Depth | None = None,
    scores: Any = None,
    qk_rank: float | None = None,
    vo_rank: float | None = None,
    stage: Stage = quiet,
) -> Result:
    """Plans and applies; see `plan` and `apply` for the options. steps: of the way there, channels scored anew after each.

    edits: changes of the graph that come first, see `spa.plans.edits`. drop_layers: layers that go before channels, see `spa.layers.depth`;
    alone if there is neither a ratio nor a target. qk_rank, vo_rank: directions of each head's singular bases that stay, a number or a
    share (`spa.exact.Ranks`); nothing else goes if there is no ratio.

    >>> result = spa.prune("model.onnx", target="macs=0.5")
    >>> result.save("small.onnx", plan="small.plan.json")
    """
    analysis = analyze(model, inputs=inputs, protect_outputs=protect_outputs, stat=stat, keep_state=keep_state, edits=edits, stage=stage)
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage)
    wishes = {
        "criterion": criterion, "scope": scope, "multiple_of": multiple_of, "keep_at_least": keep_at_least, "include": include,
        "exclude": exclude, "units": units, "protect": protect, "ratios": ratios, "aggregate": aggregate, "normalize": normalize,
        "swaps": swaps, "loss": loss, "scores": read_brought(scores),
        "damping": repair.damping if isinstance(repair, RepairOptions) else DAMPING, "ranks": Ranks(qk_rank, vo_rank),
    }  # fmt: skip
    return carried_out(analysis, wishes, ratio=ratio, budget=replace(budget_of(target), repair=repair), evidence=evidence, steps=steps,
                       check=check, seed=seed, feeds=feeds, tolerance=tolerance, depth=drop_layers, stage=stage)  # fmt: skip


def carried_out(
    analysis: Analysis, wishes: Mapping[str, Any], *, ratio: float | None, budget: Budget, evidence: Evidence | None, steps: int = 1,
    check: bool = True, seed: int = 0, feeds: Feeds | None = None, tolerance: float = checking.TOLERANCE,
    depth: Depth | None = None, stage: Stage = quiet,
) -> Result:  # fmt: skip
    """Plans and applies on what was read already. wishes: options of `plan` that stay the same in all steps. depth: layers go first."""
    if steps < 1:
        raise BadOption(f"--steps is {steps}, but must be 1 or more.")
    ranks: Ranks = wishes.get("ranks", NO_RANKS)
    ranks.check_alone(budget.asks or budget.judges or steps > 1)
    if depth is not None and depth.drop == BALANCE:
        depth = balanced(analysis, depth, budget)
    if depth is not None:
        small, data, dropped = without_layers(analysis, depth, evidence, seed=seed, stage=stage)
        how: dict[str, Any] = {"check": check, "seed": seed, "feeds": feeds, "tolerance": tolerance, "stage": stage}
        left = budget_left(small, budget)
        if left is None or (ratio is None and not left.asks and not ranks.any):
            result = apply(small, layers_alone(small, seed), **how)
        else:
            left = replace(left, evaluate=moved(left.evaluate, small))
            result = carried_out(small, wishes, ratio=ratio, budget=left, evidence=data, steps=steps, **how)
        return replace(result, plan=replace(result.plan, options={**result.plan.options, "depth": dropped.record}))
    budget, evidence = with_data(analysis, budget, evidence, seed=seed, stage=stage)
    before, (analysis, _) = analysis, with_bases(analysis, ranks, stage=stage)
    if check:
        prove_bases(before, analysis, ranks, feeds=feeds, seed=seed, tolerance=tolerance, stage=stage)
    if wishes.get("scores") is not None:
        if steps > 1:
            raise BadOption("--scores are of the model as it is, and move with each step: prune in one step.")
        analysis = with_scales(analysis, resolved(wishes["scores"], analysis.groups).scales, stage=stage)
        evidence = moved(evidence, analysis)

    def decide(current: Analysis, data: Evidence | None, limits: Budget, share: float | None, own: Mapping[str, float]) -> Plan:
        options = {**wishes, "ratios": {**(wishes.get("ratios") or {}), **own}}
        return plan(current, share, calibration=data, target=limits, seed=seed, stage=stage, **options)

    def carry_out(current: Analysis, decided: Plan, data: Evidence | None) -> Result:
        fed = None if feeds is None else feeds_for(current.given.narrowed, feeds)
        return apply(current, decided, check=check, seed=seed, feeds=fed, tolerance=tolerance, repair=budget.repair, calibration=data,
                     stage=stage)  # fmt: skip

    if steps == 1:
        return carry_out(analysis, decide(analysis, evidence, budget, ratio, {}), evidence)
    check_limits(budget, ratio, wishes["scope"])
    if any(line.ranges for line in parsed(wishes.get("protect") or ())):
        raise BadOption("--protect counts coordinates of the model as it is, which move with each step: prune in one step, or name groups.")
    local = wishes["scope"] in (None, "local")
    return prune_in_steps(analysis, Stages(decide, carry_out), steps, ratio=ratio, local=local, budget=budget, evidence=evidence)


__all__ = [
    "Analysis", "Budget", "Result", "analyze", "analyzed_for", "apply", "budget_of", "carried_out", "check_limits", "evidence_for",
    "opened", "plan", "planned", "prove", "prune", "runnable", "with_data",
]  # fmt: skip
