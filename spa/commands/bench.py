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
from spa import report
from spa.bench import race
from spa.commands import options as given
from spa.commands.app import app
from spa.commands.common import drawn_inputs, opened_model
from spa.commands.terminal import Terminal
from spa.errors import UnsupportedModel


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
    opened = {report.unique(str(m), [str(x) for x in models[:i]]): opened_model(term, m, {}) for i, m in enumerate(models)}
    fed = [drawn_inputs(term, m, inputs or (), feeds, seed) for m in opened.values()]
    try:
        with term.stage("timing"):
            timing = race(opened, fed, rounds=rounds, seconds=seconds, threads=threads)
    except spa.SpaError:
        raise
    except Exception as error:  # onnxruntime raises classes of its own for each status
        raise UnsupportedModel(f"ONNX Runtime does not run the model: {str(error).splitlines()[0]}") from error
    term.show(report.race_data(timing) or {}, report.laps(timing))
    return 0


@app.command()
def version(as_json: given.Json = False, verbose: given.Verbose = False) -> int:
    """Versions of spa and of what it stands on, and ONNX Runtime's execution providers."""
    parts = {"spa": spa.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__,
             "python": sys.version.split()[0]}
    providers = list(onnxruntime.get_available_providers())
    lines = [f"{name} {number}" for name, number in parts.items()] + [f"providers {', '.join(providers)}"]
    Terminal(as_json, verbose).show({**parts, "providers": providers}, *map(Text, lines))
    return 0



