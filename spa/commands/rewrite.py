"""`spa rewrite`: the same function with less in it, or in another basis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from spa import report
from spa.analysis import analyze
from spa.check import TOLERANCE
from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import opened_model
from spa.commands.terminal import Terminal
from spa.exact.rewriting import rewritten
from spa.rewrite_report import proof_shown, steps_data, steps_shown
from spa.store import load


@app.command()
def rewrite(
    model: given.ModelFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the rewritten model.", show_default=False)],
    drop_key_bias: Annotated[bool, typer.Option("--drop-key-bias", help="Drop biases of keys that the softmax cancels.")] = False,
    fold_value_bias: Annotated[bool, typer.Option("--fold-value-bias", help="Fold biases of values into those of the outputs.")] = False,
    singular_basis: Annotated[bool, typer.Option(
        "--singular-basis", help="Put each head's queries and keys, values and outputs, into their singular basis.")] = False,
    split_mlp: Annotated[int | None, typer.Option(
        "--split-mlp", metavar="E", help="Split each MLP into E equal parts that are summed.", show_default=False)] = None,
    all_: Annotated[bool, typer.Option("--all", help="All of these but --split-mlp, which needs its number.")] = False,
    inputs: given.Inputs = None, no_check: given.NoCheck = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0,
    feeds: given.FeedsFile = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Rewrite attention and MLPs exactly: the same outputs, proven, with less in the graph or ready to be cut."""
    term = Terminal(as_json, verbose)
    reading.check_outputs({"--output": output}, [model, feeds])
    reading.check_tolerance(tolerance)
    opened = opened_model(term, model, {"--output": output})
    fed = reading.read_feeds(feeds, opened)
    shapes = {**reading.shapes_of(fed), **reading.read_shapes(inputs or (), opened)}
    analysis = analyze(opened, inputs=shapes, stage=term.stage)
    result = rewritten(
        analysis, drop_key_bias=drop_key_bias or all_, fold_value_bias=fold_value_bias or all_, singular_basis=singular_basis or all_,
        split_mlp=split_mlp, check=not no_check, seed=seed, feeds=fed, tolerance=tolerance, stage=term.stage,
    )  # fmt: skip
    with term.stage("writing"):
        result.save(output)
    proven = None if result.check is None else report.check_data(result.check)
    data = {"model": str(model), "output": str(output), "steps": steps_data(result.steps), "proof": proven,
            "bytes": {"before": opened.nbytes, "after": load(output).nbytes}}  # fmt: skip
    term.show(data, *steps_shown(result.steps), proof_shown(result.check), Text(f"wrote {report.printable(str(output))}"))
    return 0
