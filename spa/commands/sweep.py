"""`spa sweep` and `spa sensitivity`: the trade-off, before choosing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from spa.budgets.budget import TIME_LIMIT
from spa.budgets.sensitivity import RATIOS
from spa.budgets.sensitivity import sensitivity as shrink_each
from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import analysis_of, evidence_of
from spa.commands.progress import progress
from spa.commands.terminal import Terminal
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.plans.protect import read_protect
from spa.proof.check import TOLERANCE
from spa.repairs.repair_options import RepairOptions
from spa.repairs.solve import DAMPING
from spa.sweeps import parallel
from spa.sweeps.points import COSTS, Setting, Sweep, grid
from spa.sweeps.sweep import SECONDS
from spa.sweeps.sweep import sweep as prune_all
from spa.tables import sensitivity_report, sweep_report
from spa.tables.report import printable

Shares = Annotated[list[str] | None, typer.Option(
    "--ratio", "-r", metavar="R,R,…", help="Shares of the channels that go.", show_default=False)]
Targets = Annotated[list[str] | None, typer.Option(
    "--target", metavar="COST=LIMIT,…", help="macs=0.3,0.5,0.7, size=8MB,6MB, latency=0.6x, …; repeatable.", show_default=False)]
Criteria = Annotated[list[str] | None, typer.Option(
    "--criterion", metavar="NAME,…", help="What makes a channel worth keeping, one or several; l2 by default.", show_default=False)]
Repairs = Annotated[list[str] | None, typer.Option(
    "--repair", metavar="METHOD,…", help="none, bias, affine, obspa, fold; by default obspa where --calibration is given.",
    show_default=False)]
Scopes = Annotated[list[str] | None, typer.Option(
    "--scope", metavar="SCOPE,…", help="Of ratios: local (default), global, isomorphic, cost, log.", show_default=False)]
Allocations = Annotated[list[str] | None, typer.Option(
    "--allocation", metavar="WAY,…", help="Of targets: auto (default), uniform, global, sensitivity, solver.", show_default=False)]
DropLayers = Annotated[list[str] | None, typer.Option(
    "--drop-layers", metavar="N,SHARE,…", help="Layers that go first: how many, or which share of them; 0: none.", show_default=False)]
Layers = Annotated[list[str] | None, typer.Option(
    "--layers", metavar="METHOD,…", help="How layers are chosen, one or several, as for spa prune; finercut by default.",
    show_default=False)]
LayerKinds = Annotated[list[str] | None, typer.Option(
    "--layer-kind", metavar="KIND,…", help="Which layers: any (default), attention, mlp, branch, block.", show_default=False)]
Jobs = Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Workers side by side; 0: one for each core.")]
Backend = Annotated[str, typer.Option("--backend", metavar="NAME", help="loky: processes on this machine; ray: a Ray cluster.")]


@app.command()
def sweep(
    model: given.ModelFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where all is kept; given again, it goes on there.",
                                         show_default=False)],
    ratio: Shares = None, target: Targets = None, criterion: Criteria = None, repair: Repairs = None, scope: Scopes = None,
    allocation: Allocations = None, drop_layers: DropLayers = None, layers: Layers = None, layer_kind: LayerKinds = None,
    calibration: given.Source = None, evaluate: given.Evaluate = None, metric: given.Metric = None,
    output_name: given.OutputName = None, preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None,
    samples: given.Samples = 256, batch: given.Batch = 32, length: given.Length = None, labels: given.Labels = None,
    bench: Annotated[bool, typer.Option("--bench", help="Also time each point against the model as it is, on --provider.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", help="Time for each of these races, about.")] = SECONDS,
    provider: given.Provider = "cpu", threads: given.Threads = 1, memory: given.Memory = None,
    against: Annotated[str | None, typer.Option("--against", metavar="COST", help="Cost that the front goes by: macs, params, size, "
                                                "memory, latency; by default what was asked for.", show_default=False)] = None,
    jobs: Jobs = 1, backend: Backend = "loky",
    retry: Annotated[bool, typer.Option("--retry", help="Try points again that failed before.")] = False,
    multiple_of: given.MultipleOf = "auto", keep_at_least: given.KeepAtLeast = 1, include: given.Include = None,
    exclude: given.Exclude = None, units: given.Units = None, protect: given.ProtectFile = None, ratios: given.Ratios = None,
    protect_outputs: given.Protect = True, no_stat: given.NoStat = False, keep_state: given.KeepState = False,
    inputs: given.Inputs = None, seed: given.Seed = 0, no_check: given.NoCheck = False, tolerance: given.Tolerance = TOLERANCE,
    aggregate: given.Aggregate = None, normalize: given.Normalize = "mean", swaps: given.Swaps = 0, loss: given.Loss = "auto",
    scores: given.Scores = None,
    damping: given.Damping = DAMPING, repair_inputs: given.RepairInputs = "pruned", repair_target: given.RepairTarget = "dense",
    no_norms: given.NoNorms = False, time_limit: given.TimeLimit = TIME_LIMIT, as_json: given.Json = False,
    verbose: given.Verbose = False,
) -> int:
    """Prune in many ways, and show what each costs and what it is worth: the Pareto front, with a plan for each point."""
    term = Terminal(as_json, verbose)
    if against is not None and against not in COSTS:
        raise BadOption(f"--against is {against!r}; the choice is: {', '.join(COSTS)}.")
    if against == "latency" and not bench:
        raise BadOption("--against latency needs times: give --bench too.")
    reading.check_tolerance(tolerance)
    wanted: dict[str, Any] = {
        "ratio": numbers_of("--ratio", ratio), "target": targets_of(target), "criterion": listed(criterion) or ("l2",),
        "repair": listed(repair) or ("none" if calibration is None else "obspa",), "scope": listed(scope) or ("local",),
        "allocation": listed(allocation) or ("auto",), "drop_layers": numbers_of("--drop-layers", drop_layers),
        "layers": listed(layers) or ("finercut",), "layer_kind": listed(layer_kind) or ("any",),
    }  # fmt: skip
    settings = grid(*wanted.values())
    if scope and all(s.ratio is None for s in settings):
        raise BadOption("--scope spreads ratios: give some with --ratio; targets are spread by --allocation.")
    if allocation and all(s.target is None for s in settings):
        raise BadOption("--allocation spreads targets: give some with --target; ratios are spread by --scope.")
    if (layers or layer_kind) and not any(s.drop_layers for s in settings):
        raise BadOption("--layers and --layer-kind say how layers are chosen: say how many go with --drop-layers.")
    parallel.check_jobs(jobs, backend)
    _apart(output, calibration, evaluate)
    mending = RepairOptions("none", repair_inputs, repair_target, damping, not no_norms)
    analysis = analysis_of(term, model, inputs, protect_outputs, not no_stat, keep_state)
    data = _data(term, analysis, calibration, evaluate, preprocess, tokenizer, samples, batch, length, labels, seed)
    with progress(term) as tell:
        found = prune_all(
            analysis, output, **wanted, multiple_of=reading.multiple_of(multiple_of), keep_at_least=keep_at_least,
            include=tuple(include or ()), exclude=tuple(exclude or ()), units=reading.units(units),
            protect=() if protect is None else read_protect(protect), ratios=reading.read_ratios(ratios), seed=seed, check=not no_check,
            tolerance=tolerance, calibration=data[0], evaluate=data[1], metric=metric, output=output_name, aggregate=aggregate,
            normalize=normalize, swaps=swaps, loss=loss, scores=scores, repair_options=mending, provider=provider, threads=threads,
            time_limit=time_limit, bench=bench, seconds=seconds, jobs=jobs, backend=backend, retry=retry, tell=tell, stage=term.stage,
        )  # fmt: skip
    cost = against or _cost(found, settings, bench)
    with term.stage("writing"):
        files, missing = sweep_report.write_sweep(found, cost=cost, title=model.name)
    if missing:
        term.log(f"spa: {missing}", always=True)
    wrote = Text(f"wrote {', '.join(printable(str(f)) for f in files)}; spa apply takes the plans in {printable(str(output / 'plans'))}")
    term.show({**sweep_report.sweep_data(found), "against": cost, "files": [str(f) for f in files]},
              *sweep_report.tables(found, cost), wrote)  # fmt: skip
    return 0


@app.command()
def sensitivity(
    model: given.ModelFile,
    output: Annotated[list[Path] | None, typer.Option("--output", "-o", metavar="FILE", help="Also write .csv, .json or .png; repeatable.",
                                                      show_default=False)] = None,
    ratio: Shares = None, criterion: given.Criterion = "l2",
    repair: Annotated[str, typer.Option("--repair", metavar="METHOD", help="none, bias, affine, obspa or fold.")] = "none",
    calibration: given.Source = None,
    evaluate: given.Evaluate = None, metric: given.Metric = None, output_name: given.OutputName = None,
    preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None, samples: given.Samples = 256, batch: given.Batch = 32,
    length: given.Length = None, labels: given.Labels = None, provider: given.Provider = "cpu", jobs: Jobs = 1,
    backend: Backend = "loky", memory: given.Memory = None,
    multiple_of: given.MultipleOf = "auto", keep_at_least: given.KeepAtLeast = 1, include: given.Include = None,
    exclude: given.Exclude = None, units: given.Units = None, protect_outputs: given.Protect = True,
    no_stat: given.NoStat = False,
    keep_state: given.KeepState = False, inputs: given.Inputs = None, seed: given.Seed = 0, aggregate: given.Aggregate = None,
    normalize: given.Normalize = "mean", loss: given.Loss = "auto",
    damping: given.Damping = DAMPING, repair_inputs: given.RepairInputs = "pruned", repair_target: given.RepairTarget = "dense",
    no_norms: given.NoNorms = False, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Shrink each group alone, and show what the quality loses and the cost saves."""
    term = Terminal(as_json, verbose)
    files = [sensitivity_report.check_file(f) for f in output or ()]
    named = {"--output": files[0]} if len(files) == 1 else {f"--output {f}": f for f in files}
    reading.check_outputs(named, [model, *reading.data_files(named, calibration, preprocess, tokenizer, evaluate)])
    mending = RepairOptions("none", repair_inputs, repair_target, damping, not no_norms)
    shares = numbers_of("--ratio", ratio) or RATIOS
    grid(shares, (), (criterion,), (repair,), ("local",), ("auto",))
    parallel.check_jobs(jobs, backend)
    analysis = analysis_of(term, model, inputs, protect_outputs, not no_stat, keep_state)
    data = _data(term, analysis, calibration, evaluate, preprocess, tokenizer, samples, batch, length, labels, seed)
    with progress(term) as tell:
        found = shrink_each(
            analysis, ratio=shares, criterion=criterion, repair=repair, multiple_of=reading.multiple_of(multiple_of),
            keep_at_least=keep_at_least, include=tuple(include or ()), exclude=tuple(exclude or ()), units=reading.units(units), seed=seed,
            calibration=data[0], evaluate=data[1], metric=metric, output=output_name, aggregate=aggregate, normalize=normalize, loss=loss,
            repair_options=mending, provider=provider, jobs=jobs, backend=backend, tell=tell, stage=term.stage,
        )  # fmt: skip
    if files:
        with term.stage("writing"):
            sensitivity_report.write_sensitivity(found, *files)
    wrote = [Text(f"wrote {', '.join(printable(str(f)) for f in files)}")] if files else []
    term.show({**sensitivity_report.sensitivity_data(found), "files": [str(f) for f in files]},
              *sensitivity_report.tables(found), *wrote)  # fmt: skip
    return 0


# ---------------------------------------------------------------------- lists


def listed(texts: Sequence[str] | None) -> tuple[str, ...]:
    """What an option that may be given more than once, or a list with commas, holds; each once."""
    return tuple(dict.fromkeys(part.strip() for text in texts or () for part in text.split(",") if part.strip()))


def numbers_of(option: str, texts: Sequence[str] | None) -> tuple[float, ...]:
    """Ratios, or numbers of layers. Raises BadOption for what is no number."""
    try:
        return tuple(float(t) for t in listed(texts))
    except ValueError as error:
        raise BadOption(f"{option} {','.join(texts or ())} is no list of numbers such as 0.25,0.5.") from error


def targets_of(texts: Sequence[str] | None) -> tuple[str, ...]:
    """Targets, one each: macs=0.3,0.5 are macs=0.3 and macs=0.5."""
    found = []
    for text in texts or ():
        kind = ""
        for part in listed([text]):
            kind = part.partition("=")[0] if "=" in part else kind
            found.append(part if "=" in part or not kind else f"{kind}={part}")
    return tuple(dict.fromkeys(found))


def _cost(found: Sweep, settings: Sequence[Setting], bench: bool) -> str:
    """The cost that the front goes by where nobody says: latency if it was measured, that of the targets, or MACs."""
    kinds = {(s.target or "macs").partition("=")[0] for s in settings}
    asked = "latency" if bench else kinds.pop() if len(kinds) == 1 else "macs"
    return asked if asked in found.dense else "macs"


def _apart(output: Path, *sources: str | None) -> None:
    """Refuses a folder inside one that data are read from: the next run would take its pictures for data."""
    for source in sources:
        if source is not None and os.path.isdir(source):
            inside = Path(os.path.realpath(output))
            data = Path(os.path.realpath(source))
            if data == inside or data in inside.parents:
                raise BadOption(f"--output {output} lies in the data that are read ({source}): give a folder elsewhere.")


def _data(
    term: Terminal, analysis: Any, calibration: str | None, evaluate: str | None, preprocess: str | None, tokenizer: str | None,
    samples: int, batch: int, length: int | None, labels: str | None, seed: int,
) -> tuple[Evidence | None, Evidence | None]:  # fmt: skip
    """The data to fit on and to judge on, read in the same way."""
    how = (preprocess, tokenizer, samples, batch, length, labels, seed)
    if calibration is None and evaluate is not None:
        return None, evidence_of(term, analysis, evaluate, *how)
    fit = evidence_of(term, analysis, calibration, *how)
    return fit, None if evaluate is None else evidence_of(term, analysis, evaluate, *how)
