"""The straight line, for Python: load, analyse, choose, rewrite, prove."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from spa import check as checking
from spa import criteria
from spa.align import block_of
from spa.check import Check
from spa.choose import Options, choose
from spa.count import Counts, count
from spa.errors import BadOption, CheckFailed, NothingToPrune, SpaError
from spa.evidence import Evidence, gather, transplanted
from spa.feeds import Feeds
from spa.groups import Groups, find_groups
from spa.normalize import Normal, normalize
from spa.plan import Plan, check_belongs, load_plan, make_plan, mask_of
from spa.prove import check_shapes, failure, prove, runnable
from spa.refine import refined
from spa.repair import Repaired, RepairOptions, repair
from spa.rewrite import CannotRestate, rewrite
from spa.score import score
from spa.solve import DAMPING
from spa.stages import Stage, collector_paused, quiet
from spa.store import Model, load, save, to_proto, with_graph
from spa.trace import trace
from spa.views import Data

Source: TypeAlias = str | os.PathLike[str] | bytes | ModelProto | Model


@dataclass(frozen=True)
class Analysis:
    """A model with its groups. `given` is the model as it came, `normal` what was traced."""

    given: Model
    normal: Normal
    groups: Groups
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A pruned model: the plan, the counts before and after, and the proof (None if it was not asked for).

    repaired: what repair did, None without one; it holds the repaired weights before the deletion.
    """

    model: Model
    plan: Plan
    analysis: Analysis
    before: Counts
    after: Counts
    check: Check | None
    repaired: Repaired | None = None

    def save(self, path: str | os.PathLike[str], *, plan: str | os.PathLike[str] | None = None) -> None:
        """Writes the model, and the plan if a path is given; whole or not at all."""
        save(self.model, path, beside=[] if plan is None else [(Path(plan), [self.plan.to_json().encode()])])

    def save_repaired(self, path: str | os.PathLike[str], *, plan: str | os.PathLike[str] | None = None) -> None:
        """Writes the model with repaired weights but nothing removed yet, and a plan that removes the same from it.

        Raises BadOption if nothing was repaired.
        """
        if self.repaired is None:
            raise BadOption("Nothing was repaired, so there is no repaired model to write: ask for a repair with --repair obspa.")
        save(self.analysis.normal.model, path)
        if plan is not None:
            again = analyze(path, **{**self.analysis.settings, "inputs": self.analysis.settings.get("inputs") or None})
            gone = mask_of(self.plan, again.groups)
            options, notes, copies = self.plan.options, self.plan.notes, again.normal.copies
            make_plan(again.given, again.groups, gone, copies=copies, options=options, trace=again.settings, notes=notes).save(Path(plan))

    def to_proto(self) -> ModelProto:
        """The pruned model as a ModelProto."""
        return to_proto(self.model)


def opened(model: Source) -> Model:
    """A Model, loaded if it is not one yet."""
    return model if isinstance(model, Model) else load(model)


@collector_paused()
def analyze(
    model: Source,
    *,
    inputs: Mapping[str, Sequence[int]] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
    stage: Stage = quiet,
) -> Analysis:
    """Loads, normalises, traces and groups. `inputs` fixes the shape of inputs, `stage` is told what goes on."""
    with stage("reading"):
        given = opened(model)
    with stage("finding shapes"):
        normal = normalize(given, inputs)
    with stage("tracing"):
        traced = trace(normal.model.graph, normal.facts, protect_outputs=protect_outputs, stat=stat)
        groups = find_groups(traced)
    settings = {"protect_outputs": protect_outputs, "stat": stat, "inputs": {k: list(v) for k, v in (inputs or {}).items()}}
    return Analysis(given, normal, groups, settings)


@collector_paused()
def plan(
    model: Source | Analysis,
    ratio: float = 0.5,
    *,
    criterion: str = "l2",
    scope: str = "local",
    multiple_of: int | str = "auto",
    keep_at_least: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
    inputs: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    calibration: Any = None,
    aggregate: str | None = None,
    normalize: str = "mean",
    swaps: int = 0,
    loss: str = "auto",
    damping: float = DAMPING,
    stage: Stage = quiet,
) -> Plan:
    """Decides what goes.

    ratio: share of the channels of each group that goes, between 0 and 1. criterion: a name of the registry. scope: local,
    global or isomorphic. multiple_of: widths are rounded to it; "auto" is what ONNX Runtime's CPU kernels like.
    include, exclude: globs or /regexes/ on the names of groups, nodes and values. ratios: pattern -> ratio of its own.
    stat: whether axes that a normalisation runs over may shrink. calibration: data for criteria that look at any: a `Calibration`, an
    `Evidence` or what `spa.calibration` takes. aggregate, normalize: how scores of a group's layers are put together, and made comparable
    between groups. swaps: rounds of exchanging removed for kept channels while the error after repair falls. loss: for gradients.
    damping: ridge of the errors that are estimated, over the mean variance of a layer's inputs.
    Raises SpaError; NothingToPrune if nothing would go.
    """
    options = Options(ratio, scope, multiple_of, keep_at_least, tuple(include), tuple(exclude), dict(ratios or {}), normalize)
    needs = criteria.get(criterion).needs
    analysis = (
        model if isinstance(model, Analysis) else analyze(model, inputs=inputs, protect_outputs=protect_outputs, stat=stat, stage=stage)
    )
    groups = analysis.groups
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage) if needs or swaps else None
    if evidence is None and swaps:
        raise BadOption("--swaps compares errors on data: give some with --calibration (none draws noise).")
    if evidence is not None and not evidence.batches:
        way_out = "use --calibration synthetic or none"
        raise BadOption(f"Criterion {criterion!r} and --swaps look at inputs, and the norms' moments are none: {way_out}.")
    data = None if evidence is None else Data(evidence.model, evidence.batches, loss, evidence.labels, damping)
    relative = normalize == "energy"
    with stage("scoring"):
        scores = score(analysis.normal.model.graph, groups, criterion, seed=seed, data=data, aggregate=aggregate, relative=relative)
    block = block_of("cpu")
    with stage("choosing"):
        choice = choose(groups, scores, options, block=block)
    if not choice.gone.any():
        raise NothingToPrune(why_nothing(groups, choice.notes))
    notes = {**dict.fromkeys(scores.instead, f"was scored by l2: no layer sums over it, so {criterion} says nothing of it"), **choice.notes}
    gone = choice.gone
    if swaps and data is not None:
        with stage("exchanging"):
            gone = refined(analysis.normal.model.graph, groups, gone, data, rounds=swaps, seed=seed)
    chosen = {
        "ratio": ratio,
        "criterion": criterion,
        "scope": scope,
        "multiple_of": multiple_of,
        "block": block,
        "keep_at_least": keep_at_least,
        "include": list(include),
        "exclude": list(exclude),
        "ratios": dict(ratios or {}),
        "seed": seed,
    }
    if evidence is not None:
        chosen |= {"calibration": evidence.name, "samples": evidence.samples, "swaps": swaps, "loss": loss, "damping": damping}
    if evidence is not None or aggregate is not None or normalize != "mean":
        chosen |= {"aggregate": aggregate, "normalize": normalize}
    return make_plan(analysis.given, groups, gone, copies=analysis.normal.copies, options=chosen, trace=analysis.settings, notes=notes)


def evidence_for(analysis: Analysis, calibration: Any, *, seed: int = 0, stage: Stage = quiet) -> Evidence | None:
    """Calibration data as they are used: a `Calibration` or its source is read, an `Evidence` taken as it is; None stays None."""
    if calibration is None or isinstance(calibration, Evidence):
        return calibration
    with stage("reading calibration data"):
        return gather(analysis.normal.model, analysis.groups, calibration, seed=seed)


def why_nothing(groups: Groups, notes: Mapping[str, str]) -> str:
    """One sentence on why nothing was removed."""
    free = groups.free()
    if free:
        some = next(iter(notes.items()), None)
        return "Nothing to prune: " + (f"{some[0]} {some[1]}." if some else "the options leave no channel to remove.")
    frozen = sorted((g for g in groups.groups if g.frozen), key=lambda g: -g.parameters * g.size)
    if not frozen:
        return "Nothing to prune: the model has no weights."
    return f"Nothing to prune: all {len(frozen)} groups are frozen, the most costly one because {frozen[0].frozen}."


def analyzed_for(model: Source, plan: Plan, *, other_weights: bool = False, stage: Stage = quiet) -> Analysis:
    """Analyses a model as it was when the plan was made. Raises BadPlan for a plan of another model."""
    given = opened(model)
    check_belongs(plan, given, other_weights=other_weights)
    stat, protect = bool(plan.trace.get("stat", True)), bool(plan.trace.get("protect_outputs", True))
    return analyze(given, inputs=plan.trace.get("inputs"), protect_outputs=protect, stat=stat, stage=stage)


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
    gone = mask_of(decided, analysis.groups)
    before, after = count(analysis.groups), count(analysis.groups, gone)
    analysis, gone, repaired = _repaired(analysis, gone, repair, calibration, seed, stage)
    groups = analysis.groups
    with stage("rewriting"):
        try:
            graph = rewrite(analysis.normal.model.graph, groups, gone, analysis.normal.copies)
        except CannotRestate as error:
            names = ", ".join(groups.groups[i].name for i in error.groups if gone[groups.groups[i].coordinates].any())
            raise SpaError(f"Node {error.node} can't be resized ({error.cause}): leave its groups out with --exclude: {names}.") from error
        small = with_graph(analysis.normal.model, graph)
    proof = None
    if check:
        proof = prove(analysis.normal.model, groups, gone, small, feeds=feeds, seed=seed, tolerance=tolerance, stage=stage)
        if not proof.passed:
            raise CheckFailed(failure(proof))
    else:
        check_shapes(groups, gone, small)
    return Result(small, decided, analysis, before, after, proof, repaired)


def _repaired(
    analysis: Analysis, gone: NDArray[np.bool_], how: str | RepairOptions, calibration: Any, seed: int, stage: Stage
) -> tuple[Analysis, NDArray[np.bool_], Repaired | None]:
    """The analysis with repaired weights, and the removal in its groups; as they were if no repair is wanted."""
    options = how if isinstance(how, RepairOptions) else RepairOptions(how)
    if options.method == "none":
        return analysis, gone, None
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage)
    if evidence is None and options.method == "fold":
        evidence = Evidence("nothing", (), analysis.normal.model, True)
    if evidence is None:
        raise BadOption(f"--repair {options.method} fits layers to data: give some with --calibration (none draws noise).")
    with stage("repairing"):
        found = repair(evidence.model, analysis.groups, gone, evidence.batches, options, seed=seed)
        found = replace(found, model=transplanted(found.model, evidence.model, analysis.normal.model, analysis.groups))
    copies = {c: o for c, o in analysis.normal.copies.items() if not {c, o} & found.changed}
    normal = Normal(found.model, found.groups.traced.facts, copies)
    return replace(analysis, normal=normal, groups=found.groups), found.gone, found


@collector_paused()
def prune(
    model: Source,
    ratio: float = 0.5,
    *,
    criterion: str = "l2",
    scope: str = "local",
    multiple_of: int | str = "auto",
    keep_at_least: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
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
    stage: Stage = quiet,
) -> Result:
    """Plans and applies; see `plan` and `apply` for the options.

    >>> result = spa.prune("model.onnx", ratio=0.5)
    >>> result.save("small.onnx", plan="small.plan.json")
    """
    analysis = analyze(model, inputs=inputs, protect_outputs=protect_outputs, stat=stat, stage=stage)
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage)
    decided = plan(
        analysis,
        ratio,
        criterion=criterion,
        scope=scope,
        multiple_of=multiple_of,
        keep_at_least=keep_at_least,
        include=include,
        exclude=exclude,
        ratios=ratios,
        seed=seed,
        calibration=evidence,
        aggregate=aggregate,
        normalize=normalize,
        swaps=swaps,
        loss=loss,
        damping=repair.damping if isinstance(repair, RepairOptions) else DAMPING,
        stage=stage,
    )
    return apply(
        analysis, decided, check=check, seed=seed, feeds=feeds, tolerance=tolerance, repair=repair, calibration=evidence, stage=stage
    )


__all__ = ["Analysis", "Result", "analyze", "apply", "evidence_for", "plan", "prove", "prune", "runnable"]
