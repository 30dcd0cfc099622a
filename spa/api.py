"""The straight line, for Python: load, analyse, choose, rewrite, prove."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from spa import check as checking
from spa.align import block_of
from spa.check import Check
from spa.choose import Options, choose
from spa.count import Counts, count
from spa.errors import CheckFailed, NothingToPrune, SpaError, UnsupportedModel
from spa.feeds import Feeds, draw, shapes_to_try
from spa.groups import Groups, Kept, find_groups
from spa.masking import masked
from spa.normalize import Normal, normalize
from spa.plan import Plan, check_belongs, load_plan, make_plan, mask_of
from spa.rewrite import CannotRestate, rewrite
from spa.score import score
from spa.shapes import infer
from spa.store import Model, load, save, to_proto, with_graph
from spa.trace import Traced, trace
from spa.widen import widen

Source: TypeAlias = str | os.PathLike[str] | bytes | ModelProto | Model
Stage: TypeAlias = Callable[[str], Any]


@dataclass(frozen=True)
class Analysis:
    """A model with its groups. `given` is the model as it came, `normal` what was traced."""

    given: Model
    normal: Normal
    groups: Groups
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A pruned model: the plan, the counts before and after, and the proof (None if it was not asked for)."""

    model: Model
    plan: Plan
    analysis: Analysis
    before: Counts
    after: Counts
    check: Check | None

    def save(self, path: str | os.PathLike[str], *, plan: str | os.PathLike[str] | None = None) -> None:
        """Writes the model, and the plan if a path is given; whole or not at all."""
        save(self.model, path, beside=[] if plan is None else [(Path(plan), [self.plan.to_json().encode()])])

    def to_proto(self) -> ModelProto:
        """The pruned model as a ModelProto."""
        return to_proto(self.model)


@contextmanager
def _quiet(_: str) -> Iterator[None]:
    yield


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: graphs are many small objects that all stay, which the collector would visit over and over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def opened(model: Source) -> Model:
    """A Model, loaded if it is not one yet."""
    return model if isinstance(model, Model) else load(model)


@_collector_paused()
def analyze(
    model: Source,
    *,
    inputs: Mapping[str, Sequence[int]] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
    stage: Stage = _quiet,
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


@_collector_paused()
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
    stage: Stage = _quiet,
) -> Plan:
    """Decides what goes.

    ratio: share of the channels of each group that goes, between 0 and 1. criterion: a name of the registry. scope: local,
    global or isomorphic. multiple_of: widths are rounded to it; "auto" is what ONNX Runtime's CPU kernels like.
    include, exclude: globs or /regexes/ on the names of groups, nodes and values. ratios: pattern -> ratio of its own.
    stat: whether axes that a normalisation runs over may shrink. Raises SpaError; NothingToPrune if nothing would go.
    """
    options = Options(ratio, scope, multiple_of, keep_at_least, tuple(include), tuple(exclude), dict(ratios or {}))
    analysis = (
        model if isinstance(model, Analysis) else analyze(model, inputs=inputs, protect_outputs=protect_outputs, stat=stat, stage=stage)
    )
    groups = analysis.groups
    with stage("scoring"):
        scores = score(analysis.normal.model.graph, groups, criterion, seed=seed)
    block = block_of("cpu")
    with stage("choosing"):
        choice = choose(groups, scores, options, block=block)
    if not choice.gone.any():
        raise NothingToPrune(why_nothing(groups, choice.notes))
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
    return make_plan(
        analysis.given, groups, choice.gone, copies=analysis.normal.copies, options=chosen, trace=analysis.settings, notes=choice.notes
    )


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


@_collector_paused()
def apply(
    model: Source | Analysis,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    *,
    other_weights: bool = False,
    check: bool = True,
    seed: int = 0,
    feeds: Feeds | None = None,
    tolerance: float = checking.TOLERANCE,
    stage: Stage = _quiet,
) -> Result:
    """Removes what a plan says, and proves that nothing else changed.

    other_weights: accept a model of the same graph. check: run the proof. feeds: its inputs, drawn if None.
    Raises BadPlan for a plan of another model, CheckFailed if removing and masking differ.
    """
    decided = load_plan(plan if isinstance(plan, Plan | Mapping) else Path(plan))
    if isinstance(model, Analysis):
        analysis = model
    else:
        given = opened(model)
        check_belongs(decided, given, other_weights=other_weights)
        settings = decided.trace
        analysis = analyze(
            given,
            inputs=settings.get("inputs"),
            protect_outputs=bool(settings.get("protect_outputs", True)),
            stat=bool(settings.get("stat", True)),
            stage=stage,
        )
    groups = analysis.groups
    gone = mask_of(decided, groups)
    with stage("rewriting"):
        try:
            graph = rewrite(analysis.normal.model.graph, groups, gone, analysis.normal.copies)
        except CannotRestate as error:
            names = ", ".join(groups.groups[i].name for i in error.groups if gone[groups.groups[i].coordinates].any())
            raise SpaError(f"Node {error.node} can't be resized ({error.cause}): leave its groups out with --exclude: {names}.") from error
        small = with_graph(analysis.normal.model, graph)
    proof = None
    if check:
        proof = prove(analysis, gone, small, feeds=feeds, seed=seed, tolerance=tolerance, stage=stage)
        if not proof.passed:
            raise CheckFailed(_failure(proof))
    else:
        _check_shapes(analysis, gone, small)
    return Result(small, decided, analysis, count(groups), count(groups, gone), proof)


def prove(
    analysis: Analysis,
    gone: NDArray[np.bool_],
    small: Model,
    *,
    feeds: Feeds | None = None,
    seed: int = 0,
    tolerance: float = checking.TOLERANCE,
    stage: Stage = _quiet,
) -> Check:
    """Runs the masked original and the pruned model on the same inputs, in float32, and compares all outputs."""
    groups = analysis.groups
    normal = analysis.normal.model
    with stage("proving"):
        reference = with_graph(normal, masked(normal.graph, groups, gone))
        given = runnable(normal, groups.traced, seed=seed) if feeds is None else feeds
        kept = {
            t.name: {
                a: np.flatnonzero(k)
                for a in range(len(groups.traced.facts.shapes.get(t.name) or ()))
                if (k := groups.keep((t.name, a), gone)) is not None
            }
            for t in normal.graph.outputs
        }
        wide_reference, wide_given = widen(reference, given)
        wide_small, _ = widen(small, given)
        if wide_small is not small:
            _must_load(small, normal)
        return checking.compare(wide_reference, wide_small, wide_given, kept=kept, tolerance=tolerance)


def _must_load(small: Model, original: Model) -> None:
    """The pruned model loads in its own type, unless the runtime lacks kernels for the original too (bfloat16)."""
    try:
        checking.session(small, lean=True)
    except UnsupportedModel:
        try:
            checking.session(original, lean=True)
        except UnsupportedModel:
            return
        raise


def runnable(model: Model, traced: Traced, *, seed: int = 0) -> Feeds:
    """Drawn inputs that the model runs with on ONNX Runtime. Raises UnsupportedModel that asks for `--input` if none are found."""
    try:
        opened = checking.session(model, lean=True)
    except UnsupportedModel:
        opened = checking.session(widen(model, {})[0], lean=True)  # no kernels for this type: the proof runs in float32 anyway
    first: UnsupportedModel | None = None
    wide = {i.name: np.float32 for i in opened.get_inputs() if i.type == "tensor(float)"}
    for shapes in shapes_to_try(traced):
        feeds = draw(traced, seed=seed, shapes=shapes)
        try:
            checking.run_session(opened, {n: v.astype(wide[n]) if n in wide else v for n, v in feeds.items()})
            return feeds
        except UnsupportedModel as error:
            first = first or error
    assert first is not None
    tried = " ".join(f"--input {t.name}:{'x'.join(map(str, traced.facts.shapes.get(t.name) or ()))}" for t in traced.graph.inputs)
    raise UnsupportedModel(f"{first} (with {tried}: give sizes that fit with --input, inputs with --feeds, or --no-check)") from first


def _check_shapes(analysis: Analysis, gone: NDArray[np.bool_], small: Model) -> None:
    """Without the proof: shape inference of the pruned graph must give what is left of every shape. Raises CheckFailed."""
    groups, facts = analysis.groups, analysis.groups.traced.facts
    kept = Kept(groups, gone)
    found = infer(small.graph, facts.feeds)
    for tensor in groups.traced.graph.outputs:
        shape = facts.shapes.get(tensor.name)
        if shape is None:
            continue
        left = kept.shape(tensor.name)
        if found.shapes.get(tensor.name) != left:
            raise CheckFailed(
                f"Output {tensor.name!r} of the pruned graph would have shape {found.shapes.get(tensor.name)} instead of {left}."
            )
    broken = sorted(set(found.unknown) - set(facts.unknown))
    if broken:
        raise CheckFailed(
            f"The pruned graph breaks at {broken[0]!r}: {found.unknown[broken[0]]}. This is a defect of spa, please report it."
        )


def _failure(proof: Check) -> str:
    worst = max(proof.differences, key=lambda d: d.relative)
    return (
        f"Removing and masking differ: output {worst.output!r} by {worst.relative:.1e} of its scale, where {proof.tolerance:.0e} is "
        f"allowed; nothing was written. This is a defect of spa, please report it (--tolerance {worst.relative * 1.1:.1e} would pass)."
    )


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
    stage: Stage = _quiet,
) -> Result:
    """Plans and applies; see `plan` and `apply` for the options.

    >>> result = spa.prune("model.onnx", ratio=0.5)
    >>> result.save("small.onnx", plan="small.plan.json")
    """
    analysis = analyze(model, inputs=inputs, protect_outputs=protect_outputs, stat=stat, stage=stage)
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
        stage=stage,
    )
    return apply(analysis, decided, check=check, seed=seed, feeds=feeds, tolerance=tolerance, stage=stage)


__all__ = ["Analysis", "Result", "analyze", "apply", "plan", "prune", "runnable"]
