"""`spa rewrite`: the same function with less in it, or in another basis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import evidence_of, opened_model
from spa.commands.terminal import Terminal
from spa.errors import BadOption
from spa.exact.rewriting import rewritten
from spa.exact.rotation import Rotated, rotated
from spa.graph.analysis import analyze
from spa.proof.check import TOLERANCE
from spa.storage.store import load, save
from spa.tables import report
from spa.tables.rewrite_report import proof_shown, steps_data, steps_shown


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
    rotate: Annotated[bool, typer.Option(
        "--rotate", help="Turn the residual stream onto the principal directions of --calibration.")] = False,
    calibration: given.Source = None, preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None,
    samples: given.Samples = 256, batch: given.Batch = 32, length: given.Length = None,
    inputs: given.Inputs = None, no_check: given.NoCheck = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0,
    feeds: given.FeedsFile = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Rewrite attention and MLPs exactly: the same outputs, proven, with less in the graph or ready to be cut."""
    term = Terminal(as_json, verbose)
    read = reading.data_files({"--output": output}, calibration, preprocess, tokenizer)
    reading.check_outputs({"--output": output}, [model, feeds, *read])
    reading.check_tolerance(tolerance)
    if rotate != (calibration is not None):
        raise BadOption("--rotate and --calibration go together: the principal directions of the residual stream are those of data.")
    if rotate and (drop_key_bias or fold_value_bias or singular_basis or all_ or split_mlp is not None):
        raise BadOption("--rotate goes alone: do the other rewrites first, and rotate their result.")
    opened = opened_model(term, model, {"--output": output})
    fed = reading.read_feeds(feeds, opened)
    shapes = {**reading.shapes_of(fed), **reading.read_shapes(inputs or (), opened)}
    analysis = analyze(opened, inputs=shapes, stage=term.stage)
    if rotate:
        evidence = evidence_of(term, analysis, calibration, preprocess, tokenizer, samples, batch, length, None, seed)
        turned = rotated(analysis, evidence, check=not no_check, feeds=fed, tolerance=tolerance, seed=seed, stage=term.stage)
        return _turned(term, model, output, turned)
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


def _turned(term: Terminal, model: Path, output: Path, turned: Rotated) -> int:
    """Writes a turned model, and says how its stream is cut."""
    with term.stage("writing"):
        save(turned.model, output)
    width = len(turned.energies)
    left = {share: float(turned.energies[: round(width * share)].sum()) for share in (0.9, 0.8, 0.7)}
    data = {"model": str(model), "output": str(output), "group": turned.group, "width": width,
            "energies": turned.energies.tolist(), "proof": None if turned.check is None else report.check_data(turned.check)}  # fmt: skip
    held = ", ".join(f"{energy:.1%} on the first {share:.0%}" for share, energy in left.items())
    name = report.printable(turned.group)
    term.show(data, Text(f"Turned: {name}, {width} positions; energy: {held}\n"), proof_shown(turned.check),
              Text(f"wrote {report.printable(str(output))}; cut it with spa prune --criterion position --include '{name}'"))  # fmt: skip
    return 0
