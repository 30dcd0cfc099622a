"""One command from a model of any framework to a smaller ONNX file: convert, compare, prune, repair, prove, time.

    python tools/convert_and_prune.py MODEL -o out/ --target macs=0.5 [--from auto] [--input x:1x3x224x224] [--calibration photos/] …

    out/model.onnx, conversion.json     the converted model, and how well it agrees with the framework
    out/small.onnx, small.plan.json     the pruned one and its plan, which `spa apply` takes
    out/report.html, .md, .json         what was asked, what came out, the proof, the times

It is `spa convert` followed by `spa prune`, and takes the options of both that matter most; for the others prune out/model.onnx again. The
folder appears when all is done; exit codes are those of `spa`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

import spa
from spa import api, criteria
from spa.budgets.budget import TIME_LIMIT
from spa.commands import convert as converting
from spa.commands import options as given
from spa.commands import reading, reported
from spa.commands.common import evidence_of
from spa.commands.terminal import Terminal, complain, verdict
from spa.errors import BadFile, BadOption
from spa.plans.companions import CONFIG, find_companions
from spa.proof.check import TOLERANCE
from spa.proof.feeds import one_sample
from spa.repairs.repair import DAMPING
from spa.reporting import report_data
from spa.tables import report
from spa.timing.bench import Race

MODEL, SMALL, CONVERSION = "model.onnx", "small.onnx", "conversion.json"
REPORTS = ("report.html", "report.md", "report.json")
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Made:
    """What came out, with what is shown of it."""

    result: spa.Result
    timing: Race | None
    sizes: tuple[int, int]


@app.command(help="Convert a model of any framework to ONNX and prune it: convert, compare, prune, repair, prove, time.")
def convert_and_prune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `spa convert` takes.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new folder, or an empty one.", show_default=False)],
    framework: Annotated[str, typer.Option("--from", metavar="NAME", help="The framework; auto looks at what lies in the file.")] = "auto",
    inputs: Annotated[list[str] | None, typer.Option(
        "--input", metavar="NAME:1x3x224x224", help="Shape of an input, where the model does not tell it; repeatable.")] = None,
    dynamic: Annotated[str | None, typer.Option("--dynamic", metavar="WHICH", help="Sizes that stay free: batch, none or keep.")] = None,
    entry: Annotated[str, typer.Option("--entry", metavar="NAME", help="What makes the network of a checkpoint, or a signature.")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Open files whose loading runs code that lies in them.")] = False,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Language models: the cache as inputs and outputs.")] = True,
    ratio: given.Ratio = None, target: given.Target = None, max_drop: given.MaxDrop = None, metric: given.Metric = None,
    time_limit: given.TimeLimit = TIME_LIMIT, criterion: given.Criterion = "l2", multiple_of: given.MultipleOf = "auto",
    include: given.Include = None, exclude: given.Exclude = None, units: given.Units = None, calibration: given.Source = None,
    preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None, samples: given.Samples = 256, batch: given.Batch = 32,
    length: given.Length = None, labels: given.Labels = None, repair: given.Repair = None, provider: given.Provider = "cpu",
    threads: given.Threads = 0, no_bench: given.NoBench = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0,
    as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:  # fmt: skip
    """Nothing is computed before all options are checked, and the folder gets its name last."""
    term = Terminal(as_json, verbose)
    check_folder(output)
    reading.check_tolerance(tolerance)
    criteria.get(criterion)
    mending = reading.repair_options(repair, calibration, DAMPING, "pruned", "dense", False, None)
    budget = spa.Budget(tuple(target or ()), max_drop=max_drop, metric=metric, provider=provider, threads=threads, time_limit=time_limit,
                        repair=mending)  # fmt: skip
    api.check_limits(budget, ratio, None)
    wishes = {"criterion": criterion, "scope": None, "multiple_of": reading.multiple_of(multiple_of), "include": tuple(include or ()),
              "exclude": tuple(exclude or ()), "units": reading.units(units)}  # fmt: skip
    shapes, types = converting.read_sizes(inputs or ())
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / "made"
        folder.mkdir()
        found = spa.convert(model, framework=framework, inputs=shapes, dtypes=types, dynamic=dynamic, entry=entry, trust=trust, cache=cache,
                            tolerance=tolerance, seed=seed, stage=term.stage)  # fmt: skip
        found.save(folder / MODEL)
        analysis = spa.analyze(folder / MODEL, stage=term.stage)
        evidence = evidence_of(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, labels, seed)
        result = api.carried_out(analysis, wishes, ratio=ratio, budget=budget, evidence=evidence, seed=seed, tolerance=tolerance,
                                 stage=term.stage)  # fmt: skip
        timing = None if no_bench else timed(term, result, threads, provider, seed)
        with term.stage("writing"):
            made = written(folder, result, timing, companions_of=model)
            conversion = converting.data_of(found, model, folder / MODEL) | {"output": str(output / MODEL)}
            (folder / CONVERSION).write_text(json.dumps(report.plain(conversion), indent=2, ensure_ascii=False) + "\n", "utf-8")
            for name in REPORTS:
                reported.write(folder / name, context, result, timing, made.sizes)
            names = sorted(p.name for p in folder.iterdir())
            moved(folder, output)
    data = {"conversion": conversion, **report_data(result, timing=timing, sizes=made.sizes), "folder": str(output), "files": names}
    listed = Text(report.printable(f"wrote {output}{os.sep}: {', '.join(names)}"))
    term.show(data, *converting.shown(found), *tables(made, evidence is not None, mending.method), listed)
    return 0


def check_folder(output: Path) -> None:
    """Refuses what would lose something, before anything is computed."""
    if output.exists() and not output.is_dir():
        raise BadOption(f"--output {output} is a file; give the name of a folder.")
    if output.is_dir() and any(output.iterdir()):
        raise BadOption(f"--output {output} is not empty: give a new folder.")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise BadFile(f"--output {output} can't be written: there is no folder {folder}; create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadFile(f"--output {output} can't be written: the folder {folder} may not be changed.")


def written(folder: Path, result: spa.Result, timing: Race | None, *, companions_of: str) -> Made:
    """Writes the pruned model, its plan, and what lies beside a language model."""
    beside = find_companions(folder / MODEL, folder / SMALL, companions_of) if Path(companions_of, CONFIG).is_file() else None
    files = result.companions(beside, folder / MODEL, folder / SMALL).files
    result.save(folder / SMALL, plan=reading.plan_name(folder / SMALL), beside=files)
    return Made(result, timing, (spa.load(folder / MODEL).nbytes, spa.load(folder / SMALL).nbytes))


def moved(folder: Path, output: Path) -> None:
    """Gives the finished folder its name; an empty one that has it makes room."""
    if output.is_dir():
        output.rmdir()
    folder.replace(output)


def timed(term: Terminal, result: spa.Result, threads: int, provider: str, seed: int) -> Race | None:
    """Latency before and after; None, with a word on stderr, where it can't be measured."""
    analysis = result.analysis
    try:
        with term.stage("timing"):
            traced = analysis.groups.traced
            fed = one_sample(traced, api.runnable(analysis.normal.model, traced, seed=seed))
            return spa.race({"before": analysis.given, "after": result.model}, fed, threads=threads, engine=provider)
    except Exception as error:  # onnxruntime raises classes of its own; the pruning is done and proven without the times
        term.log(f"spa: latency was not measured: {report.printable(str(error).splitlines()[0])}", always=True)
        return None


def tables(made: Made, data: bool, method: str) -> list[Any]:
    """What a person wants to know at once; the rest is in the report."""
    result = made.result
    shown = [report.comparison(result.before, result.after, sizes=made.sizes, race=made.timing)]
    if result.repaired is not None:
        shown.append(report.repair(result.repaired))
    elif method == "none":
        why = "as was asked" if data else "as there are no data; give some with --calibration"
        shown.append(Text(f"Repair: none, {why}\n", style="yellow"))
    return [*shown, report.proof(result.check)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(words, prog_name="convert_and_prune.py", standalone_mode=False)
    except BaseException as error:
        code, sentence = verdict(error)
        complain(error, code, sentence, words)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
