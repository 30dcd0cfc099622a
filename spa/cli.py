"""The command line: each command is a piece of the straight line of `spa.api`, with tables or JSON at its end.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 compared and differed, or nothing to prune; 2 can't.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import networkx as nx
import numpy
import onnx
import onnxruntime
import typer
from rich.text import Text

import spa
from spa import api, criteria, report
from spa import cli_options as given
from spa.bench import Race, race
from spa.calibration import calibration as open_calibration
from spa.check import TOLERANCE
from spa.choose import Options, matches
from spa.cli_options import Guarded, Terminal
from spa.count import count
from spa.errors import BadOption, UnsupportedModel
from spa.evidence import MOMENTS, SYNTHETIC, Evidence, gather
from spa.explain import Cause, dependency_graph, dot_text, explain, frozen_causes, near, path, printable_graph, sites_of
from spa.feeds import Feeds, one_sample
from spa.files import replace_all
from spa.groups import Group, Groups
from spa.normalize import normalize
from spa.plan import check_belongs, load_plan, mask_of
from spa.repair import DAMPING
from spa.store import Model, load
from spa.trace import trace

app = typer.Typer(
    name="spa", cls=Guarded, add_completion=False, no_args_is_help=True, rich_markup_mode="rich",
    help="Structured pruning of ONNX graphs: a file and a budget in; a smaller, proven, faster file out.",
)


def main() -> None:
    """The entry point `spa`."""
    app(prog_name="spa")


# ---------------------------------------------------------------------- inspect


@app.command()
def inspect(
    model: given.ModelFile,
    group: Annotated[str | None, typer.Option("--group", metavar="NAME", help="Show one group (or a glob) with its sites.")] = None,
    explain_: Annotated[list[str] | None, typer.Option(
        "--explain", metavar="VALUE[:AXIS]", help="Why it can or can't shrink; given twice: why the two are coupled.")] = None,
    inputs: given.Inputs = None,
    protect_outputs: given.Protect = True,
    no_stat: given.NoStat = False,
    graphml: Annotated[Path | None, typer.Option("--graphml", metavar="FILE", help="Write the dependency graph as GraphML.")] = None,
    dot: Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="Write the dependency graph as DOT, for Graphviz.")] = None,
    as_json: given.Json = False,
    verbose: given.Verbose = False,
) -> int:
    """Show the groups of a model, what one channel of each costs, what is frozen, and why."""
    term = Terminal(as_json, verbose)
    given.check_outputs({"--graphml": graphml, "--dot": dot}, [model])
    if len(explain_ or ()) > 2:
        raise BadOption("--explain takes one value, or two to say why they are coupled.")
    analysis = _analysis(term, model, inputs, protect_outputs, not no_stat)
    groups = analysis.groups
    _export(groups, graphml, dot)
    if explain_:
        _explain(term, groups, explain_)
    elif group is not None:
        chosen = _named(groups, group)
        term.show({"groups": [report.group_data(g) for g in chosen]}, *(report.group_details(g) for g in chosen))
    else:
        totals, causes = count(groups), frozen_causes(groups)
        data = {"model": str(model), "sha256": analysis.given.sha256, "totals": report.counts_data(totals),
                "groups": [report.group_data(g) for g in groups.groups], "frozen": [report.cause_data(c) for c in causes]}
        term.show(data, report.totals(totals), report.groups_table(groups.free()), report.frozen(causes, totals))
    return 0


def _explain(term: Terminal, groups: Groups, texts: Sequence[str]) -> None:
    if len(texts) == 1:
        found = [explain(groups, site) for site in sites_of(groups, texts[0])]
        term.show({"explanations": [report.explanation_data(e) for e in found]}, *map(report.explanation, found))
        return
    pairs = [(one, other) for one in sites_of(groups, texts[0]) for other in sites_of(groups, texts[1])]
    ways = [(one, other, path(groups, one, other)) for one, other in pairs]
    ways = [w for w in ways if w[2] is not None] or ways[:1]
    data = [{"one": list(a), "other": list(b), "coupled": p is not None, "path": report.path_data(p)} for a, b, p in ways]
    term.show({"couplings": data}, *(report.way(p, a, b) for a, b, p in ways))


def _named(groups: Groups, name: str) -> list[Group]:
    chosen = [g for g in groups.groups if g.name == name] or [g for g in groups.groups if matches([name], [g.name])]
    if not chosen:
        raise BadOption(f"--group: there is no group {name!r}{near(name, groups.by_name)}; `spa inspect` lists them.")
    return chosen


def _export(groups: Groups, graphml: Path | None, dot: Path | None) -> None:
    if graphml is None and dot is None:
        return
    graph = dependency_graph(groups)
    writes = []
    if graphml is not None:
        writes.append((graphml, ["\n".join(nx.generate_graphml(printable_graph(graph))).encode()]))
    if dot is not None:
        writes.append((dot, [dot_text(graph).encode()]))
    replace_all(writes)


# ---------------------------------------------------------------------- plan, apply, prune


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
    reads = given.data_files({"--output": output}, calibration, preprocess, tokenizer)
    given.check_outputs({"--output": output}, [model, ratios, *reads])
    options = _options(ratio, scope, criterion, multiple_of, keep_at_least, include, exclude, ratios, normalize)
    analysis = _analysis(term, model, inputs, protect_outputs, not no_stat, outputs={"--output": output})
    evidence = _evidence(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
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
    model: given.ModelFile, plan_file: given.PlanFile, output: given.Out, other_weights: given.OtherWeights = False,
    no_check: given.NoCheck = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0, feeds: given.FeedsFile = None,
    calibration: given.Source = None, preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None,
    samples: given.Samples = 256, batch: given.Batch = 32, length: given.Length = None, labels: given.Labels = None,
    repair: given.Repair = None, damping: given.Damping = DAMPING, repair_inputs: given.RepairInputs = "pruned",
    repair_target: given.RepairTarget = "dense", no_norms: given.NoNorms = False, repaired_out: given.RepairedOut = None,
    as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Remove what a plan says, prove that nothing else changed, and write the pruned model."""
    term = Terminal(as_json, verbose)
    mending = given.repair_options(repair, calibration, damping, repair_inputs, repair_target, no_norms, repaired_out)
    written = _written(output, None, repaired_out)
    given.check_outputs(written, [model, plan_file, feeds, *given.data_files(written, calibration, preprocess, tokenizer)])
    given.check_tolerance(tolerance)
    decided = load_plan(plan_file)
    opened = _opened(term, model, written)
    analysis = api.analyzed_for(opened, decided, other_weights=other_weights, stage=term.stage)
    evidence = _evidence(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
    result = api.apply(analysis, decided, check=not no_check, seed=seed, tolerance=tolerance, feeds=given.read_feeds(feeds, opened),
                       repair=mending, calibration=evidence, stage=term.stage)
    with term.stage("writing"):
        result.save(output)
        _save_repaired(result, repaired_out)
    sizes = opened.nbytes, load(output).nbytes
    data = {"model": str(model), "plan": str(plan_file), "output": str(output), **_result(result, sizes, None)}
    term.show(data, *_tables(result, sizes, None), Text(f"wrote {report.printable(str(output))}"))
    return 0


@app.command()
def prune(
    model: given.ModelFile, output: given.Out, ratio: given.Ratio = 0.5,
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
    repaired_out: given.RepairedOut = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Plan, remove, repair, prove, time, and write the pruned model and its plan."""
    term = Terminal(as_json, verbose)
    mending = given.repair_options(repair, calibration, damping, repair_inputs, repair_target, no_norms, repaired_out)
    written = _written(output, given.plan_name(output) if plan_out is None else plan_out, repaired_out)
    given.check_outputs(written, [model, ratios, feeds, *given.data_files(written, calibration, preprocess, tokenizer)])
    given.check_tolerance(tolerance)
    options = _options(ratio, scope, criterion, multiple_of, keep_at_least, include, exclude, ratios, normalize)
    opened = _opened(term, model, written)
    fed = given.read_feeds(feeds, opened)
    shapes = {**given.shapes_of(fed), **given.read_shapes(inputs or (), opened)}
    analysis = api.analyze(opened, inputs=shapes, protect_outputs=protect_outputs, stat=not no_stat, stage=term.stage)
    evidence = _evidence(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
    decided = _decided(term, analysis, options, criterion, seed, evidence, aggregate, swaps, loss, damping)
    result = api.apply(analysis, decided, check=not no_check, seed=seed, feeds=fed, tolerance=tolerance, repair=mending,
                       calibration=evidence, stage=term.stage)
    timing = None if no_bench else _timing(term, result, fed, seed, threads)
    with term.stage("writing"):
        result.save(output, plan=written["--plan-out"])
        _save_repaired(result, repaired_out)
    sizes = opened.nbytes, load(output).nbytes
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
    return Options(ratio, scope, given.multiple_of(multiple_of), keep_at_least, tuple(include or ()), tuple(exclude or ()),
                   given.read_ratios(ratios), normalize)


def _written(output: Path, plan_out: Path | None, repaired: Path | None) -> dict[str, Path]:
    """Files that will be written, by option."""
    found = {"--output": output}
    if plan_out is not None:
        found["--plan-out"] = plan_out
    if repaired is not None:
        found |= {"--repaired-out": repaired, "the plan of --repaired-out": given.plan_name(repaired)}
    return found


def _save_repaired(result: api.Result, path: Path | None) -> None:
    if path is not None:
        result.save_repaired(path, plan=given.plan_name(path))


def _evidence(
    term: Terminal, analysis: api.Analysis, source: str | None, preprocess: str | None, tokenizer: str | None, samples: int, batch: int,
    length: int | None, labels: str | None, seed: int,
) -> Evidence | None:
    """The calibration data, read; None where none are asked for."""
    if source is None:
        for option, value in {"--preprocess": preprocess, "--tokenizer": tokenizer, "--length": length, "--labels": labels}.items():
            if value is not None:
                raise BadOption(f"{option} says how calibration data are read: give some with --calibration.")
        return None
    if source in (SYNTHETIC, MOMENTS):
        with term.stage("making calibration data"):
            made = gather(analysis.normal.model, analysis.groups, source, samples=samples, seed=seed)
        term.log(f"spa: calibration on {made.name}")
        return made
    opened = open_calibration(source, analysis.groups.traced, samples=samples, batch=batch, preprocess=preprocess, tokenizer=tokenizer,
                              length=length, seed=seed, labels=labels)
    found = api.evidence_for(analysis, opened, seed=seed, stage=term.stage)
    term.log(f"spa: calibration on {opened.name}")
    return found


def _opened(term: Terminal, model: Path, outputs: dict[str, Path | None] | dict[str, Path]) -> Model:
    with term.stage("reading"):
        opened = load(model)
    given.check_outputs(dict(outputs), opened.origin.files)  # its external files too
    return opened


def _analysis(
    term: Terminal, model: Path, inputs: list[str] | None, protect_outputs: bool, stat: bool, outputs: dict[str, Path] | None = None
) -> api.Analysis:
    opened = _opened(term, model, outputs or {})
    shapes = given.read_shapes(inputs or (), opened)
    return api.analyze(opened, inputs=shapes, protect_outputs=protect_outputs, stat=stat, stage=term.stage)


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


# ---------------------------------------------------------------------- check, bench, version


@app.command()
def check(
    original: Annotated[Path, typer.Argument(metavar="A", help="The model as it was.", show_default=False)],
    small: Annotated[Path, typer.Argument(metavar="B", help="The pruned model.", show_default=False)],
    plan_file: Annotated[Path, typer.Option("--plan", metavar="PLAN", help="The plan that leads from A to B.", show_default=False)],
    other_weights: given.OtherWeights = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0,
    feeds: given.FeedsFile = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Prove again that B is A without what the plan removes."""
    term = Terminal(as_json, verbose)
    given.check_tolerance(tolerance)
    decided = load_plan(plan_file)
    opened, pruned = _opened(term, original, {}), _opened(term, small, {})
    check_belongs(decided, opened, other_weights=other_weights)
    given.check_interfaces(opened, pruned)
    settings = decided.trace
    analysis = api.analyze(opened, inputs=settings.get("inputs"), protect_outputs=bool(settings.get("protect_outputs", True)),
                           stat=bool(settings.get("stat", True)), stage=term.stage)
    groups = analysis.groups
    proof = api.prove(analysis.normal.model, groups, mask_of(decided, groups), pruned, feeds=given.read_feeds(feeds, opened), seed=seed,
                      tolerance=tolerance, stage=term.stage)
    with term.stage("comparing weights"):
        kept = given.kept_weights(opened, pruned, decided)
    data = {"proof": report.check_data(proof), "weights": {"exact": len(kept.exact), "differing": list(kept.differing),
                                                           "unknown": list(kept.unknown)}}
    term.show(data, report.proof(proof), report.weights(len(kept.exact), kept.differing, kept.unknown))
    return 0 if proof.passed else 1


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Models; all are compared with the first.", show_default=False)],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each model, at most.")] = 20,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Time for all of them, about.")] = 10.0,
    threads: given.Threads = 0, seed: given.Seed = 0, inputs: given.Inputs = None, feeds: given.FeedsFile = None,
    as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Race models against each other on ONNX Runtime, by turns in one process."""
    term = Terminal(as_json, verbose)
    opened = {report.unique(str(m), [str(x) for x in models[:i]]): _opened(term, m, {}) for i, m in enumerate(models)}
    fed = [_drawn(term, m, inputs or (), feeds, seed) for m in opened.values()]
    try:
        with term.stage("timing"):
            timing = race(opened, fed, rounds=rounds, seconds=seconds, threads=threads)
    except spa.SpaError:
        raise
    except Exception as error:  # onnxruntime raises classes of its own for each status
        raise UnsupportedModel(f"ONNX Runtime does not run the model: {str(error).splitlines()[0]}") from error
    term.show(report.race_data(timing) or {}, report.laps(timing))
    return 0


def _drawn(term: Terminal, model: Model, inputs: Sequence[str], feeds: Path | None, seed: int) -> Feeds:
    found = given.read_feeds(feeds, model)
    if found is not None:
        return found
    with term.stage("finding shapes"):
        normal = normalize(model, given.read_shapes(inputs, model))
        return api.runnable(normal.model, trace(normal.model.graph, normal.facts), seed=seed)


@app.command()
def version(as_json: given.Json = False, verbose: given.Verbose = False) -> int:
    """Versions of spa and of what it stands on, and ONNX Runtime's execution providers."""
    parts = {"spa": spa.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__,
             "python": sys.version.split()[0]}
    providers = list(onnxruntime.get_available_providers())
    lines = [f"{name} {number}" for name, number in parts.items()] + [f"providers {', '.join(providers)}"]
    Terminal(as_json, verbose).show({**parts, "providers": providers}, *map(Text, lines))
    return 0


__all__ = ["app", "main"]
