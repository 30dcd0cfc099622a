"""`spa plan`, `spa apply` and `spa prune`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

import spa
from spa import api, criteria
from spa.budgets.budget import TIME_LIMIT, Budget
from spa.commands import options as given
from spa.commands import reading, reported, rotation, vocabulary
from spa.commands.app import app
from spa.commands.common import analysis_of, evidence_of, opened_model
from spa.commands.terminal import Terminal
from spa.criteria.brought import read_brought
from spa.engines import find as find_engine
from spa.errors import BadOption
from spa.exact import Ranks
from spa.graph.count import count
from spa.graph.explain import Cause, frozen_causes
from spa.plans.choose import Options
from spa.plans.companions import Written, find_companions
from spa.plans.plan import load_plan, mask_of
from spa.plans.protect import read_protect
from spa.proof.check import TOLERANCE
from spa.proof.feeds import Feeds, one_sample
from spa.repairs.repair import DAMPING, RepairOptions
from spa.storage.store import load
from spa.tables import report
from spa.tables.budget_report import budget as budget_table
from spa.tables.depth_report import dropped as dropped_layers
from spa.tables.state_report import states, states_data
from spa.timing.bench import Race, race
from spa.vocabularies.vocabulary_prune import carried_out


@app.command()
def plan(
    model: given.ModelFile, output: given.PlanOut, ratio: given.Ratio = None, scope: given.Scope = None,
    criterion: given.Criterion = "l2", multiple_of: given.MultipleOf = "auto", keep_at_least: given.KeepAtLeast = 1,
    include: given.Include = None, exclude: given.Exclude = None, units: given.Units = None, protect: given.ProtectFile = None,
    ratios: given.Ratios = None, protect_outputs: given.Protect = True, no_stat: given.NoStat = False,
    qk_rank: given.QkRank = None, vo_rank: given.VoRank = None,
    keep_state: given.KeepState = False, seed: given.Seed = 0, inputs: given.Inputs = None, calibration: given.Source = None,
    preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None, samples: given.Samples = 256, batch: given.Batch = 32,
    length: given.Length = None, labels: given.Labels = None, aggregate: given.Aggregate = None, normalize: given.Normalize = "mean",
    swaps: given.Swaps = 0, loss: given.Loss = "auto", repair: given.Repair = None, damping: given.Damping = DAMPING,
    scores: given.Scores = None, target: given.Target = None, allocation: given.Allocation = "auto", max_drop: given.MaxDrop = None,
    metric: given.Metric = None,
    evaluate: given.Evaluate = None, output_name: given.OutputName = None, provider: given.Provider = "cpu",
    threads: given.Threads = 0, memory: given.Memory = None,
    time_limit: given.TimeLimit = TIME_LIMIT, drop_layers: given.DropLayers = None, layer_kind: given.LayerKind = "any",
    layers: given.LayerMethod = "finercut", as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Decide what goes, and write it down without touching the model."""
    term = Terminal(as_json, verbose)
    reads = reading.data_files({"--output": output}, calibration, preprocess, tokenizer, evaluate)
    reading.check_outputs({"--output": output}, [model, ratios, protect, scores, *reads])
    mending = reading.repair_options(repair, calibration, damping, "pruned", "dense", False, None)
    wishes = _wishes(ratio, scope, criterion, multiple_of, keep_at_least, include, exclude, units, protect, ratios, normalize, aggregate,
                     swaps, loss, damping) | {"ranks": Ranks(qk_rank, vo_rank), "scores": read_brought(scores)}
    budget = _budget(ratio, scope, target, allocation, max_drop, metric, output_name, provider, threads, time_limit, mending)
    depth = reading.depth(drop_layers, layer_kind, layers)
    analysis = analysis_of(term, model, inputs, protect_outputs, not no_stat, keep_state, outputs={"--output": output})
    evidence = evidence_of(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
    budget = _judged_on(term, analysis, budget, evaluate, preprocess, tokenizer, samples, batch, length, labels, seed)
    analysis, decided = api.planned(analysis, wishes, ratio=ratio, budget=budget, evidence=evidence, depth=depth, seed=seed,
                                    stage=term.stage)  # fmt: skip
    decided.save(output)
    groups = analysis.groups
    before, after = count(analysis.dense.groups), count(groups, mask_of(decided, groups))
    causes = frozen_causes(groups)
    data = {"model": str(model), "plan": str(output), **_outcome(decided, before, after, causes)}
    pruned = [report.pruned(decided, groups.by_name)] if decided.groups else []
    term.show(data, report.comparison(before, after), *_met(decided), *_dropped(decided), *pruned, report.frozen(causes, before),
              *_notes(decided), Text(f"wrote {report.printable(str(output))}"))
    return 0


@app.command()
def apply(
    context: typer.Context, model: given.ModelFile, plan_file: given.PlanFile, output: given.Out, other_weights: given.OtherWeights = False,
    no_check: given.NoCheck = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0, feeds: given.FeedsFile = None,
    memory: given.Memory = None, calibration: given.Source = None, preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None,
    samples: given.Samples = 256, batch: given.Batch = 32, length: given.Length = None, labels: given.Labels = None,
    repair: given.Repair = None, damping: given.Damping = DAMPING, repair_inputs: given.RepairInputs = "pruned",
    repair_target: given.RepairTarget = "dense", no_norms: given.NoNorms = False, repaired_out: given.RepairedOut = None,
    report_file: given.Report = None, companions: given.Companions = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Remove what a plan says, prove that nothing else changed, and write the pruned model."""
    term = Terminal(as_json, verbose)
    mending = reading.repair_options(repair, calibration, damping, repair_inputs, repair_target, no_norms, repaired_out)
    written = _written(output, None, repaired_out) | reported.target(report_file)
    reading.check_outputs(written, [model, plan_file, feeds, *reading.data_files(written, calibration, preprocess, tokenizer)])
    reading.check_tolerance(tolerance)
    found = find_companions(model, output, companions)
    decided = load_plan(plan_file)
    opened = opened_model(term, model, written)
    analysis = api.analyzed_for(opened, decided, other_weights=other_weights, stage=term.stage)
    fits = analysis.dense if analysis.left_out else analysis  # what is fitted anew is fitted to the model as given
    evidence = evidence_of(term, fits, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
    result = api.apply(analysis, decided, check=not no_check, seed=seed, tolerance=tolerance, feeds=reading.read_feeds(feeds, opened),
                       repair=mending, calibration=evidence, stage=term.stage)
    written_beside = vocabulary.companions(result, found, model, output)
    with term.stage("writing"):
        result.save(output, beside=written_beside.files)
        _save_repaired(result, repaired_out)
    sizes = opened.nbytes, load(output).nbytes
    reported.write(report_file, context, result, None, sizes)
    data = {"model": str(model), "plan": str(plan_file), "output": str(output), **_result(result, sizes, None)}
    data["companions"] = _beside_data(written_beside)
    term.show(data, *_tables(result, sizes, None), *_beside(written_beside, [output]))
    return 0


@app.command()
def prune(
    context: typer.Context, model: given.ModelFile, output: given.Out, ratio: given.Ratio = None,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", metavar="PLAN", help="Where to write the plan; by default OUT's name "
                                                  "with .plan.json.", show_default=False)] = None,
    scope: given.Scope = None, criterion: given.Criterion = "l2", multiple_of: given.MultipleOf = "auto",
    keep_at_least: given.KeepAtLeast = 1, include: given.Include = None, exclude: given.Exclude = None, units: given.Units = None,
    protect: given.ProtectFile = None, ratios: given.Ratios = None, protect_outputs: given.Protect = True, no_stat: given.NoStat = False,
    keep_state: given.KeepState = False, seed: given.Seed = 0, no_check: given.NoCheck = False,
    qk_rank: given.QkRank = None, vo_rank: given.VoRank = None,
    tolerance: given.Tolerance = TOLERANCE, inputs: given.Inputs = None, feeds: given.FeedsFile = None, no_bench: given.NoBench = False,
    threads: given.Threads = 0, memory: given.Memory = None, calibration: given.Source = None, preprocess: given.Preprocess = None,
    tokenizer: given.Tokenizer = None, samples: given.Samples = 256, batch: given.Batch = 32, length: given.Length = None,
    labels: given.Labels = None, aggregate: given.Aggregate = None, normalize: given.Normalize = "mean", swaps: given.Swaps = 0,
    loss: given.Loss = "auto", repair: given.Repair = None, damping: given.Damping = DAMPING,
    repair_inputs: given.RepairInputs = "pruned", repair_target: given.RepairTarget = "dense", no_norms: given.NoNorms = False,
    repaired_out: given.RepairedOut = None, report_file: given.Report = None, companions: given.Companions = None,
    target: given.Target = None, allocation: given.Allocation = "auto", max_drop: given.MaxDrop = None, metric: given.Metric = None,
    evaluate: given.Evaluate = None, output_name: given.OutputName = None, provider: given.Provider = "cpu",
    time_limit: given.TimeLimit = TIME_LIMIT, steps: given.Steps = 1, vocab: given.Vocab = None, vocab_side: given.VocabSide = "both",
    vocab_map: given.VocabMap = "file", vocab_input: given.VocabInput = None,
    scores: given.Scores = None, drop_layers: given.DropLayers = None, layer_kind: given.LayerKind = "any",
    layers: given.LayerMethod = "finercut", rotate: given.Rotate = False,
    as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Plan, remove, repair, prove, time, and write the pruned model and its plan."""
    term = Terminal(as_json, verbose)
    rotation.check(rotate, calibration, ratio is not None or bool(target) or max_drop is not None, {
        "--criterion": criterion != "l2", "--include": bool(include), "--units": units is not None, "--repair": repair is not None,
        "--scores": scores is not None, "--qk-rank": qk_rank is not None, "--vo-rank": vo_rank is not None, "--steps": steps > 1,
        "--drop-layers": drop_layers is not None, "--vocab": vocab is not None, "--plan-out": plan_out is not None,
    })  # fmt: skip
    mending = reading.repair_options("none" if rotate else repair, calibration, damping, repair_inputs, repair_target, no_norms,
                                     repaired_out)  # fmt: skip
    plan_file = None if rotate else reading.plan_name(output) if plan_out is None else plan_out
    written = _written(output, plan_file, repaired_out) | reported.target(report_file)
    reads = reading.data_files(written, calibration, preprocess, tokenizer, evaluate)
    reading.check_outputs(written, [model, ratios, protect, scores, feeds, *reads])
    reading.check_tolerance(tolerance)
    found = find_companions(model, output, companions)
    wishes = _wishes(ratio, scope, criterion, multiple_of, keep_at_least, include, exclude, units, protect, ratios, normalize, aggregate,
                     swaps, loss, damping) | {"ranks": Ranks(qk_rank, vo_rank), "scores": read_brought(scores)}
    budget = _budget(ratio, scope, target, allocation, max_drop, metric, output_name, provider, threads, time_limit, mending)
    depth = reading.depth(drop_layers, layer_kind, layers)
    if depth is not None and (ratio is None and not budget.asks) and mending.method != "none" and repair is not None:
        raise BadOption("--repair fits layers that lost channels: ask for some with --ratio or --target, beside --drop-layers.")
    if repaired_out is not None and steps > 1:
        raise BadOption("--repaired-out goes with one step: after more there is no model of the first one's shape that was repaired alone.")
    wish = vocabulary.wish_of(vocab, vocab_side, vocab_map, vocab_input, tokenizer, model)
    vocabulary.check(wish, budget, steps)
    if wish is not None and scores is not None:
        raise BadOption("--vocab and --scores go one after the other: prune by --scores first, then prune the result's vocabulary.")
    written |= vocabulary.targets(wish, output, model)
    opened = opened_model(term, model, written)
    fed = reading.read_feeds(feeds, opened)
    shapes = {**reading.shapes_of(fed), **reading.read_shapes(inputs or (), opened)}
    analysis = api.analyze(opened, inputs=shapes, protect_outputs=protect_outputs, stat=not no_stat,
                           keep_state=keep_state, vocabulary=None if wish is None else wish.promise, stage=term.stage)
    reader = tokenizer if wish is None or calibration is not None else None  # a vocabulary has a use for it without data
    evidence = evidence_of(term, analysis, calibration, preprocess, reader, samples, batch, length, labels, seed)
    budget = _judged_on(term, analysis, budget, evaluate, preprocess, tokenizer, samples, batch, length, labels, seed)
    if rotate:
        analysis, evidence, wishes = rotation.turned(term, analysis, evidence, wishes, check=not no_check, feeds=fed, tolerance=tolerance,
                                                     seed=seed)  # fmt: skip
    how: dict[str, Any] = {"ratio": ratio, "check": not no_check, "seed": seed, "feeds": fed, "tolerance": tolerance, "stage": term.stage}
    if wish is None:
        result = api.carried_out(analysis, wishes, budget=budget, evidence=evidence, steps=steps, depth=depth, **how)
    else:
        result = carried_out(analysis, wish, evidence, wishes, repair=mending, depth=depth, **how)
    written_beside = vocabulary.companions(result, found, model, output)
    timing = None if no_bench else _timing(term, result, opened, fed, seed, threads, provider)
    with term.stage("writing"):
        beside = vocabulary.beside(wish, result, evidence, output, model)
        result.save(output, plan=plan_file, beside=[*beside.files, *written_beside.files])
        _save_repaired(result, repaired_out)
    sizes = opened.nbytes, load(output).nbytes
    reported.write(report_file, context, result, timing, sizes)
    data = {"model": str(model), "plan": None if plan_file is None else str(plan_file), "output": str(output),
            **_result(result, sizes, timing), **beside.data, "companions": _beside_data(written_beside)}
    term.show(data, *_tables(result, sizes, timing), *beside.shown, *rotation.told(rotate), *_beside(written_beside, written.values()))
    return 0


def _wishes(
    ratio: float | None, scope: str | None, criterion: str, multiple_of: str, keep_at_least: int, include: list[str] | None,
    exclude: list[str] | None, units: str | None, protect: Path | None, ratios: Path | None, normalize: str, aggregate: str | None,
    swaps: int, loss: str, damping: float,
) -> dict[str, Any]:
    """What `api.plan` is told, checked before anything is read."""
    criteria.get(criterion)
    width, own = reading.multiple_of(multiple_of), reading.read_ratios(ratios)
    options = Options(0.5 if ratio is None else ratio, scope or "local", width, keep_at_least, tuple(include or ()), tuple(exclude or ()),
                      own, normalize, reading.units(units), () if protect is None else read_protect(protect))
    return {
        "scope": scope, "criterion": criterion, "multiple_of": width, "keep_at_least": keep_at_least,
        "include": options.include, "exclude": options.exclude, "units": options.units, "protect": options.protect, "ratios": own,
        "normalize": normalize, "aggregate": aggregate, "swaps": swaps, "loss": loss, "damping": damping,
    }  # fmt: skip


def _budget(
    ratio: float | None, scope: str | None, target: list[str] | None, allocation: str, max_drop: float | None, metric: str | None,
    output: str | None, provider: str, threads: int, time_limit: float, repair: RepairOptions,
) -> Budget:
    """The budget, checked before anything is read."""
    find_engine(provider, "provider")
    budget = Budget(tuple(target or ()), allocation, max_drop, metric, None, output, provider, threads, time_limit, repair)
    api.check_limits(budget, ratio, scope)
    if allocation != "auto" and not budget.asks:
        raise BadOption("--allocation says how a budget is spread: give one with --target or --max-drop.")
    return budget


def _judged_on(
    term: Terminal, analysis: api.Analysis, budget: Budget, evaluate: str | None, preprocess: str | None, tokenizer: str | None,
    samples: int, batch: int, length: int | None, labels: str | None, seed: int,
) -> Budget:
    """The budget with the data of --evaluate, read in the same way as the calibration data."""
    if evaluate is None:
        return budget
    return replace(budget, evaluate=evidence_of(term, analysis, evaluate, preprocess, tokenizer, samples, batch, length, labels, seed))


def _written(output: Path, plan_out: Path | None, repaired: Path | None) -> dict[str, Path]:
    """Files that will be written, by option."""
    found = {"--output": output}
    if plan_out is not None:
        found["--plan-out"] = plan_out
    if repaired is not None:
        found |= {"--repaired-out": repaired, "the plan of --repaired-out": reading.plan_name(repaired)}
    return found


def _beside(beside: Written, files: Iterable[Path]) -> list[Any]:
    """What was written, and what there is to know of the files beside the model."""
    names = [report.printable(str(p)) for p in (*files, *(p for p, _ in beside.files))]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return [*(Text(f"note: {report.printable(note)}") for note in beside.notes), Text(f"wrote {listed}")]


def _beside_data(beside: Written) -> dict[str, Any]:
    return {"files": [str(p) for p, _ in beside.files], "notes": list(beside.notes)}


def _save_repaired(result: api.Result, path: Path | None) -> None:
    if path is not None:
        result.save_repaired(path, plan=reading.plan_name(path))


def _timing(
    term: Terminal, result: api.Result, given: spa.Model, feeds: Feeds | None, seed: int, threads: int, provider: str
) -> Race | None:
    """Latency before and after; None, with a word on stderr, where the original does not run."""
    analysis = result.analysis
    try:
        with term.stage("timing"):
            dense = analysis.dense  # which may have inputs that the pruned model lacks
            traced = dense.groups.traced
            drawn = one_sample(traced, api.runnable(dense.normal.model, traced, seed=seed)) if feeds is None else feeds
            drawn = drawn if result.ids is None else result.ids.for_both(drawn)
            return race({"before": given, "after": result.model}, drawn, threads=threads, engine=provider)
    except Exception as error:  # onnxruntime raises classes of its own; the pruning is done and proven without the times
        term.log(f"spa: latency was not measured: {report.printable(str(error).splitlines()[0])}", always=True)
        return None


def _met(decided: spa.Plan) -> list[Any]:
    return [budget_table(decided.options["budget"])] if "budget" in decided.options else []


def _notes(decided: spa.Plan) -> list[Any]:
    return [report.notes(decided.notes)] if decided.notes else []


def _dropped(decided: spa.Plan) -> list[Any]:
    return [dropped_layers(decided.options["depth"])] if "depth" in decided.options else []


def _left_out(analysis: spa.Analysis) -> list[Any]:
    return [Text(f"{sentence}\n", style="yellow") for sentence in analysis.left_out]


def _tables(result: api.Result, sizes: tuple[int, int], timing: Race | None) -> list[Any]:
    groups = result.analysis.groups
    pruned = [report.pruned(result.plan, groups.by_name)] if result.plan.groups else []
    return [
        report.comparison(result.before, result.after, sizes=sizes, race=timing), *_met(result.plan), *_dropped(result.plan),
        *_left_out(result.analysis), *pruned, *states(states_data(groups, result.gone)),
        report.frozen(frozen_causes(groups), result.before), *_notes(result.plan), *_repair(result), report.proof(result.check),
    ]


def _repair(result: api.Result) -> list[Any]:
    return [] if result.repaired is None else [report.repair(result.repaired)]


def _outcome(decided: spa.Plan, before: spa.Counts, after: spa.Counts, causes: Sequence[Cause]) -> dict[str, Any]:
    pruned = [{"name": n, "from": e["size"], "to": len(e["kept"])} for n, e in decided.groups.items()]
    return {"before": report.counts_data(before), "after": report.counts_data(after), "groups": pruned,
            "frozen": [report.cause_data(c) for c in causes], "notes": dict(decided.notes),
            "budget": decided.options.get("budget"), "depth": decided.options.get("depth")}


def _result(result: api.Result, sizes: tuple[int, int], timing: Race | None) -> dict[str, Any]:
    data = _outcome(result.plan, result.before, result.after, frozen_causes(result.analysis.groups))
    data["before"]["file_bytes"], data["after"]["file_bytes"] = sizes
    repaired = None if result.repaired is None else report.repair_data(result.repaired)
    return {**data, "repair": repaired, "proof": report.check_data(result.check),
            "states": states_data(result.analysis.groups, result.gone), "latency": report.race_data(timing)}
