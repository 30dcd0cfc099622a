"""`spa check`: proofs, made again, on any engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_graphsurgeon as gs
import typer

from passes import Weight
from spa import api
from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import drawn_inputs, opened_model
from spa.commands.terminal import Terminal
from spa.engines import Engine, Settings, find
from spa.errors import BadOption
from spa.graph.trace import constant_values
from spa.graph.view import dtype_is_float
from spa.plans.plan import Plan, load_plan, mask_of
from spa.plans.rewrite import narrowed_inputs
from spa.proof.check import TOLERANCE
from spa.proof.prove import reference_of
from spa.storage.store import Model
from spa.tables import report
from spa.tables.trial_report import trial_data, trial_shown
from spa.timing.trial import Trial, expected, try_on


@app.command()
def check(
    original: Annotated[Path, typer.Argument(metavar="A", help="The model as it was.", show_default=False)],
    small: Annotated[Path | None, typer.Argument(metavar="[B]", help="The pruned model.", show_default=False)] = None,
    plan_file: Annotated[Path | None, typer.Option(
        "--plan", metavar="PLAN", help="The plan that leads from A to B.", show_default=False)] = None,
    provider: Annotated[str | None, typer.Option(
        "--provider", metavar="NAME", help="Execution provider to prove it on, against the CPU's in float32.", show_default=False)] = None,
    runtime: Annotated[str | None, typer.Option(
        "--runtime", metavar="NAME", help="Other runtime to prove it on: openvino-native, ncnn, mnn, tract, litert, node, …",
        show_default=False)] = None,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="onnx, or ort: converted to ORT format and run so.")] = "onnx",
    set_options: Annotated[list[str] | None, typer.Option(
        "--set", metavar="NAME=VALUE", help="Option of the provider, such as precision=bf16; repeatable.", show_default=False)] = None,
    allow_fallback: Annotated[bool, typer.Option("--allow-fallback", help="Nodes may run elsewhere; they are listed anyway.")] = False,
    other_weights: given.OtherWeights = False, tolerance: Annotated[float | None, typer.Option(
        "--tolerance", help="What the proof allows, relative to an output's scale; by default 1e-4, or what the provider's type needs.",
        show_default=False)] = None,
    seed: given.Seed = 0, threads: given.Threads = 0, inputs: given.Inputs = None, feeds: given.FeedsFile = None,
    as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Prove again that B is A without what the plan removes, also where it will run; without B, that A runs there as on the CPU."""
    term = Terminal(as_json, verbose)
    if tolerance is not None:
        reading.check_tolerance(tolerance)
    chosen = chosen_engine({"provider": provider, "runtime": runtime}, form)
    settings = Settings(threads, engine_options(set_options or (), form))
    if chosen is None and (set_options or allow_fallback):
        raise BadOption("--set and --allow-fallback are about a provider or runtime: name it with --provider or --runtime.")
    if small is None:
        if plan_file is not None:
            raise BadOption("--plan leads from A to B: give the pruned model too, spa check A B --plan PLAN.")
        if chosen is None:
            raise BadOption("There is nothing to compare the model with: give the pruned model and --plan, or --provider or --runtime.")
        return check_alone(term, original, chosen, settings, inputs or (), feeds, seed, tolerance, allow_fallback)
    if plan_file is None:
        raise BadOption("Which channels B has lost stands in its plan: give it with --plan (spa prune has written it beside B).")
    decided = load_plan(plan_file)
    opened, pruned = opened_model(term, original, {}), opened_model(term, small, {})
    shapes = reading.read_shapes(inputs or (), opened)
    analysis = api.analyzed_for(opened, decided, other_weights=other_weights, inputs=shapes, stage=term.stage)
    check_interfaces(analysis.edited, pruned)
    groups, normal, gone = analysis.groups, analysis.normal.model, mask_of(decided, analysis.groups)
    pruned = replace(pruned, narrowed=narrowed_inputs(groups, gone))
    own = reading.read_feeds(feeds, opened)
    with term.stage("comparing weights"):
        kept = kept_weights(analysis.edited, pruned, decided)
    weights = {"exact": len(kept.exact), "differing": list(kept.differing), "unknown": list(kept.unknown)}
    shown = report.weights(len(kept.exact), kept.differing, kept.unknown)
    if chosen is None:
        allowed = TOLERANCE if tolerance is None else tolerance
        proof = api.prove(normal, groups, gone, pruned, feeds=own, seed=seed, tolerance=allowed, stage=term.stage)
        term.show({"proof": report.check_data(proof), "weights": weights}, report.proof(proof), shown)
        return 0 if proof.passed else 1
    with term.stage("running the masked original"):
        reference = reference_of(normal, groups, gone, feeds=own, seed=seed)
        results = expected(reference.model, reference.feeds)
    trial = try_on(chosen, pruned, reference.given, results, settings=settings, kept=reference.kept, tolerance=tolerance, stage=term.stage)
    term.show({**trial_data(trial), "weights": weights}, trial_shown(trial, "the masked original gives on the CPU provider"), shown)
    return ending(trial, allow_fallback)


def chosen_engine(named: Mapping[str, str | None], form: str) -> Engine | None:
    """The engine that the options name, {kind: name}; None if they name none. Raises BadOption."""
    if form not in ("onnx", "ort"):
        raise BadOption(f"--format is {form!r}, but must be onnx or ort.")
    asked = {kind: name for kind, name in named.items() if name is not None}
    if len(asked) > 1:
        raise BadOption(f"A model runs on one thing at a time: give one of {', '.join(f'--{kind}' for kind in asked)}.")
    if form == "ort" and not asked:
        asked = {"provider": "cpu"}
    if form == "ort" and "provider" not in asked:
        raise BadOption("Models in ORT format run on ONNX Runtime alone: name one of its providers with --provider.")
    return next((find(name, kind) for kind, name in asked.items()), None)


def engine_options(texts: Sequence[str], form: str) -> dict[str, str]:
    """Options of an engine, from NAME=VALUE. Raises BadOption."""
    options = {"format": form} if form != "onnx" else {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise BadOption(f"--set {text!r} is not of the form NAME=VALUE.")
        options[name] = value
    return options


def check_alone(
    term: Terminal, model: Path, engine: Engine, settings: Settings, inputs: Sequence[str], feeds: Path | None, seed: int,
    tolerance: float | None, allow_fallback: bool
) -> int:
    """A model on an engine against itself on the CPU provider."""
    opened = opened_model(term, model, {})
    drawn = drawn_inputs(term, opened, inputs, feeds, seed)
    with term.stage("running on the CPU provider"):
        results = expected(opened, drawn)
    trial = try_on(engine, opened, drawn, results, settings=settings, tolerance=tolerance, stage=term.stage)
    term.show(trial_data(trial), trial_shown(trial, "the CPU provider gives"))
    return ending(trial, allow_fallback)


def ending(trial: Trial, allow_fallback: bool) -> int:
    """The exit code: 1 if results differ, or if nodes ran elsewhere without leave."""
    return 0 if trial.check.passed and (trial.stayed or allow_fallback) else 1


@dataclass(frozen=True)
class KeptWeights:
    """Whether the float tensors of a pruned model hold exactly the kept elements of the original.

    exact, differing, unknown: names of those that do, that do not, and that the original has no tensor for.
    """

    exact: tuple[str, ...]
    differing: tuple[str, ...]
    unknown: tuple[str, ...]


def kept_weights(given: Model, small: Model, plan: Plan) -> KeptWeights:
    """Compares bytes, tensor by tensor and in bounded memory."""
    before, after = constant_values(given.graph), constant_values(small.graph)
    found: dict[str, list[str]] = {"exact": [], "differing": [], "unknown": []}
    for name, tensor in after.items():
        if not dtype_is_float(tensor.dtype):
            continue  # whole numbers restate sizes
        origin = before.get(plan.copies.get(name, name))
        if origin is None:
            found["unknown"].append(name)
            continue
        wanted = _weight(origin)
        removed = plan.removed.get(name, {})
        try:
            for axis, gone in removed.items():
                keep = np.ones(wanted.shape[int(axis)], bool)
                keep[gone] = False
                wanted = wanted.take(np.flatnonzero(keep), int(axis))
        except IndexError:
            found["differing"].append(name)
            continue
        found["exact" if _digest(wanted) == _digest(_weight(tensor)) else "differing"].append(name)
    return KeptWeights(*(tuple(found[k]) for k in ("exact", "differing", "unknown")))


def _weight(constant: gs.Constant) -> Weight:
    values = constant._values
    return values if isinstance(values, Weight) else Weight.of_array(np.asarray(constant.values))


def _digest(weight: Weight) -> tuple[tuple[int, ...], int, bytes]:
    digest = hashlib.sha256()
    for piece in weight.pieces():
        digest.update(piece)
    return tuple(weight.shape), int(weight.data_type), digest.digest()


def check_interfaces(given: Model, small: Model) -> None:
    """Raises BadOption unless both models have the same inputs and outputs by name."""
    for what, one, other in (("input", given.graph.inputs, small.graph.inputs), ("output", given.graph.outputs, small.graph.outputs)):
        names, found = {t.name for t in one}, {t.name for t in other}
        missing = sorted(names ^ found)
        if missing:
            raise BadOption(f"The models have different {what}s ({', '.join(missing[:3])}), so that one can't be the other pruned.")
