"""`spa plan`, `spa apply` and `spa prune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

import spa
from spa import api, criteria, report
from spa.bench import Race, race
from spa.check import TOLERANCE
from spa.choose import Options
from spa.commands import options as given
from spa.commands import reading, reported
from spa.commands.app import app
from spa.commands.common import analysis_of, evidence_of, opened_model
from spa.commands.terminal import Terminal
from spa.count import count
from spa.evidence import Evidence
from spa.explain import Cause, frozen_causes
from spa.feeds import Feeds, one_sample
from spa.plan import load_plan, mask_of
from spa.repair import DAMPING
from spa.store import load


@app.command()
def plan(
    model: given.ModelFile, output: given.PlanOut, ratio: given.Ratio = 0.5, scope: given.Scope = "local",
    criterion: given.Criterion = "l2", multiple_of: given.MultipleOf = "auto", keep_at_least: given.KeepAtLeast = 1,
    include: given.Include = None, exclude: given.Exclude = None, ratios: given.Ratios = None, protect_outputs: given.Protect = True,
    no_stat: given.NoStat = False, seed: given.Seed = 0, inputs: given.Inputs = None, calibration: given.Source = None,
    preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None, samples: given.Samples = 256, batch: given.Batch = 32,
    length: given.Length = None, labels: given.Labels = None, aggregate: given.Aggregate = None, normalize: given.Normalize = "mean",
    swaps: given.Swaps = 0, loss: given.Loss = "auto", damping: given.Damping = DAMPING, as_json: given.Json = False,
    verbose: given.Verbose = False,
) -> int:
    """Decide what goes, and write it down without touching the model."""
    term = Terminal(as_json, verbose)
    reads = reading.data_files({"--output": output}, calibration, preprocess, tokenizer)
    reading.check_outputs({"--output": output}, [model, ratios, *reads])
    options = _options(ratio, scope, criterion, multiple_of, keep_at_least, include, exclude, ratios, normalize)
    analysis = analysis_of(term, model, inputs, protect_outputs, not no_stat, outputs={"--output": output})
    evidence = evidence_of(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
    decided = _decided(term, analysis, options, criterion, seed, evidence, aggregate, swaps, loss, damping)
    decided.save(output)
    groups = analysis.groups
    before, after = count(groups), count(groups, mask_of(decided, groups))
    causes = frozen_causes(groups)
    data = {"model": str(model), "plan": str(output), **_outcome(decided, before, after, causes)}
    term.show(data, report.comparison(before, after), report.pruned(decided, groups.by_name), report.frozen(causes, before),
              *_notes(decided), Text(f"wrote {report.printable(str(output))}"))
    return 0


@app.command()
def apply(
    context: typer.Context, model: given.ModelFile, plan_file: given.PlanFile, output: given.Out, other_weights: given.OtherWeights = False,
    no_check: given.NoCheck = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0, feeds: given.FeedsFile = None,
    calibration: given.Source = None, preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None,
    samples: given.Samples = 256, batch: given.Batch = 32, length: given.Length = None, labels: given.Labels = None,
    repair: given.Repair = None, damping: given.Damping = DAMPING, repair_inputs: given.RepairInputs = "pruned",
    repair_target: given.RepairTarget = "dense", no_norms: given.NoNorms = False, repaired_out: given.RepairedOut = None,
    report_file: given.Report = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Remove what a plan says, prove that nothing else changed, and write the pruned model."""
    term = Terminal(as_json, verbose)
    mending = reading.repair_options(repair, calibration, damping, repair_inputs, repair_target, no_norms, repaired_out)
    written = _written(output, None, repaired_out) | reported.target(report_file)
    reading.check_outputs(written, [model, plan_file, feeds, *reading.data_files(written, calibration, preprocess, tokenizer)])
    reading.check_tolerance(tolerance)
    decided = load_plan(plan_file)
    opened = opened_model(term, model, written)
    analysis = api.analyzed_for(opened, decided, other_weights=other_weights, stage=term.stage)
    evidence = evidence_of(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
    result = api.apply(analysis, decided, check=not no_check, seed=seed, tolerance=tolerance, feeds=reading.read_feeds(feeds, opened),
                       repair=mending, calibration=evidence, stage=term.stage)
    with term.stage("writing"):
        result.save(output)
        _save_repaired(result, repaired_out)
    sizes = opened.nbytes, load(output).nbytes
    reported.write(report_file, context, result, None, sizes)
    data = {"model": str(model), "plan": str(plan_file), "output": str(output), **_result(result, sizes, None)}
    term.show(data, *_tables(result, sizes, None), Text(f"wrote {report.printable(str(output))}"))
    return 0


@app.command()
def prune(
    context: typer.Context, model: given.ModelFile, output: given.Out, ratio: given.Ratio = 0.5,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", metavar="PLAN", help="Where to write the plan; by default OUT's name "
                                                  "with .plan.json.", show_default=False)] = None,
    scope: given.Scope = "local", criterion: given.Criterion = "l2", multiple_of: given.MultipleOf = "auto",
    keep_at_least: given.KeepAtLeast = 1, include: given.Include = None, exclude: given.Exclude = None, ratios: given.Ratios = None,
    protect_outputs: given.Protect = True, no_stat: given.NoStat = False, seed: given.Seed = 0, no_check: given.NoCheck = False,
    tolerance: given.Tolerance = TOLERANCE, inputs: given.Inputs = None, feeds: given.FeedsFile = None, no_bench: given.NoBench = False,
    threads: given.Threads = 0, calibration: given.Source = None, preprocess: given.Preprocess = None,
    tokenizer: given.Tokenizer = None, samples: given.Samples = 256, batch: given.Batch = 32, length: given.Length = None,
    labels: given.Labels = None, aggregate: given.Aggregate = None, normalize: given.Normalize = "mean", swaps: given.Swaps = 0,
    loss: given.Loss = "auto", repair: given.Repair = None, damping: given.Damping = DAMPING,
    repair_inputs: given.RepairInputs = "pruned", repair_target: given.RepairTarget = "dense", no_norms: given.NoNorms = False,
    repaired_out: given.RepairedOut = None,
    report_file: given.Report = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Plan, remove, repair, prove, time, and write the pruned model and its plan."""
    term = Terminal(as_json, verbose)
    mending = reading.repair_options(repair, calibration, damping, repair_inputs, repair_target, no_norms, repaired_out)
    written = _written(output, reading.plan_name(output) if plan_out is None else plan_out, repaired_out) | reported.target(report_file)
    reading.check_outputs(written, [model, ratios, feeds, *reading.data_files(written, calibration, preprocess, tokenizer)])
    reading.check_tolerance(tolerance)
    options = _options(ratio, scope, criterion, multiple_of, keep_at_least, include, exclude, ratios, normalize)
    opened = opened_model(term, model, written)
    fed = reading.read_feeds(feeds, opened)
    shapes = {**reading.shapes_of(fed), **reading.read_shapes(inputs or (), opened)}
    analysis = api.analyze(opened, inputs=shapes, protect_outputs=protect_outputs, stat=not no_stat, stage=term.stage)
    evidence = evidence_of(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
    decided = _decided(term, analysis, options, criterion, seed, evidence, aggregate, swaps, loss, damping)
    result = api.apply(analysis, decided, check=not no_check, seed=seed, feeds=fed, tolerance=tolerance, repair=mending,
                       calibration=evidence, stage=term.stage)
    timing = None if no_bench else _timing(term, result, fed, seed, threads)
    with term.stage("writing"):
        result.save(output, plan=written["--plan-out"])
        _save_repaired(result, repaired_out)
    sizes = opened.nbytes, load(output).nbytes
    reported.write(report_file, context, result, timing, sizes)
    data = {"model": str(model), "plan": str(written["--plan-out"]), "output": str(output), **_result(result, sizes, timing)}
    names = " and ".join(report.printable(str(p)) for p in written.values())
    term.show(data, *_tables(result, sizes, timing), Text(f"wrote {names}"))
    return 0


def _options(
    ratio: float, scope: str, criterion: str, multiple_of: str, keep_at_least: int, include: list[str] | None,
    exclude: list[str] | None, ratios: Path | None, normalize: str,
) -> Options:
    """The options, checked before anything is read."""
    criteria.get(criterion)
    return Options(ratio, scope, reading.multiple_of(multiple_of), keep_at_least, tuple(include or ()), tuple(exclude or ()),
                   reading.read_ratios(ratios), normalize)


def _written(output: Path, plan_out: Path | None, repaired: Path | None) -> dict[str, Path]:
    """Files that will be written, by option."""
    found = {"--output": output}
    if plan_out is not None:
        found["--plan-out"] = plan_out
    if repaired is not None:
        found |= {"--repaired-out": repaired, "the plan of --repaired-out": reading.plan_name(repaired)}
    return found


def _save_repaired(result: api.Result, path: Path | None) -> None:
    if path is not None:
        result.save_repaired(path, plan=reading.plan_name(path))


def _decided(
    term: Terminal, analysis: api.Analysis, options: Options, criterion: str, seed: int, evidence: Evidence | None, aggregate: str | None,
    swaps: int, loss: str, damping: float,
) -> spa.Plan:
    return api.plan(
        analysis, options.ratio, criterion=criterion, scope=options.scope, multiple_of=options.multiple_of,
        keep_at_least=options.keep_at_least, include=options.include, exclude=options.exclude, ratios=options.ratios, seed=seed,
        calibration=evidence, aggregate=aggregate, normalize=options.normalize, swaps=swaps, loss=loss, damping=damping,
        stage=term.stage,
    )


def _timing(term: Terminal, result: api.Result, feeds: Feeds | None, seed: int, threads: int) -> Race | None:
    """Latency before and after; None, with a word on stderr, where the original does not run."""
    analysis = result.analysis
    try:
        with term.stage("timing"):
            traced = analysis.groups.traced
            drawn = one_sample(traced, api.runnable(analysis.normal.model, traced, seed=seed)) if feeds is None else feeds
            return race({"before": analysis.given, "after": result.model}, drawn, threads=threads)
    except Exception as error:  # onnxruntime raises classes of its own; the pruning is done and proven without the times
        term.log(f"spa: latency was not measured: {report.printable(str(error).splitlines()[0])}", always=True)
        return None


def _notes(decided: spa.Plan) -> list[Any]:
    return [report.notes(decided.notes)] if decided.notes else []


def _tables(result: api.Result, sizes: tuple[int, int], timing: Race | None) -> list[Any]:
    groups = result.analysis.groups
    return [
        report.comparison(result.before, result.after, sizes=sizes, race=timing), report.pruned(result.plan, groups.by_name),
        report.frozen(frozen_causes(groups), result.before), *_notes(result.plan), *_repair(result), report.proof(result.check),
    ]


def _repair(result: api.Result) -> list[Any]:
    return [] if result.repaired is None else [report.repair(result.repaired)]


def _outcome(decided: spa.Plan, before: spa.Counts, after: spa.Counts, causes: Sequence[Cause]) -> dict[str, Any]:
    pruned = [{"name": n, "from": e["size"], "to": len(e["kept"])} for n, e in decided.groups.items()]
    return {"before": report.counts_data(before), "after": report.counts_data(after), "groups": pruned,
            "frozen": [report.cause_data(c) for c in causes], "notes": dict(decided.notes)}


def _result(result: api.Result, sizes: tuple[int, int], timing: Race | None) -> dict[str, Any]:
    data = _outcome(result.plan, result.before, result.after, frozen_causes(result.analysis.groups))
    data["before"]["file_bytes"], data["after"]["file_bytes"] = sizes
    repaired = None if result.repaired is None else report.repair_data(result.repaired)
    return {**data, "repair": repaired, "proof": report.check_data(result.check), "latency": report.race_data(timing)}
