"""`spa bench` and `spa version`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy
import onnx
import onnxruntime
import typer
from rich.text import Text

import spa
from spa import api
from spa.budgets.layout_proxy import Proxy, proxy
from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import drawn_inputs, opened_model
from spa.commands.terminal import Terminal
from spa.engines import find
from spa.errors import BadOption
from spa.proof.feeds import Feeds
from spa.storage.store import Model
from spa.tables import race_report, report
from spa.timing.bench import check_timed, race
from spa.timing.profiling import profiles


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Models; all are compared with the first.", show_default=False)],
    provider: Annotated[str | None, typer.Option("--provider", metavar="NAME", help="Execution provider of ONNX Runtime; by default cpu.",
                                                 show_default=False)] = None,
    runtime: Annotated[str | None, typer.Option("--runtime", metavar="NAME", help="Another runtime instead.", show_default=False)] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each model, at most.")] = 50,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Time for all of them, about.")] = 10.0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="1 compares CPU time where it is exact; 0: the engine's choice.")] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Also show where the time goes, by operator and node.")] = False,
    seed: given.Seed = 0, inputs: given.Inputs = None, feeds: given.FeedsFile = None, as_json: given.Json = False,
    verbose: given.Verbose = False,
) -> int:
    """Race models against each other by turns, on ONNX Runtime or another runtime."""
    if provider is not None and runtime is not None:
        raise BadOption("--provider and --runtime both say what runs the models: give one of them.")
    engine = find(provider or "cpu", "provider") if runtime is None else find(runtime, "runtime")
    check_timed(engine)
    term = Terminal(as_json, verbose)
    opened = {report.unique(str(m), [str(x) for x in models[:i]]): opened_model(term, m, {}) for i, m in enumerate(models)}
    fed = [drawn_inputs(term, m, inputs or (), feeds, seed) for m in opened.values()]
    with term.stage("timing"):
        timing = race(opened, fed, rounds=rounds, seconds=seconds, threads=threads, seed=seed, engine=engine)
    with term.stage("profiling"):
        found = profiles(opened, fed, seconds=seconds / 2, threads=threads, engine=engine) if profile else ()
    counted = {}
    for lap, model, feed in zip(timing.laps, opened.values(), fed, strict=True):
        with term.stage("counting"):
            proxy = _counted(term, model, feed, engine.block(), "CPUExecutionProvider" in (lap.placement.nodes if lap.placement else {}))
        if proxy is not None:
            counted[lap.name] = proxy
    tables = [race_report.laps(timing, counted), *([race_report.profile_tables(found)] if found else [])]
    term.show(race_report.bench_data(timing, counted, found), *tables)
    return 0


def _counted(term: Terminal, model: Model, feeds: Feeds, block: int, layout: bool) -> Proxy | None:
    """What is counted beside the clock; None, with a word in the log, for a model that can be run and not analysed."""
    try:
        groups = api.analyze(model, inputs=reading.shapes_of(feeds)).groups
        return proxy(model, groups, block, layout=layout)
    except spa.SpaError as error:
        term.log(f"spa: MACs were not counted: {error}")
        return None


@app.command()
def version(as_json: given.Json = False, verbose: given.Verbose = False) -> int:
    """Versions of spa and of what it stands on, and ONNX Runtime's execution providers."""
    parts = {"spa": spa.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__,
             "python": sys.version.split()[0]}
    providers = list(onnxruntime.get_available_providers())
    lines = [f"{name} {number}" for name, number in parts.items()] + [f"providers {', '.join(providers)}"]
    Terminal(as_json, verbose).show({**parts, "providers": providers}, *map(Text, lines))
    return 0
