"""`spa convert`: models of every framework become ONNX, compared with what the framework gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.terminal import Terminal
from spa.errors import BadOption
from spa.intake import Converted, Parity
from spa.intake import convert as converted
from spa.proof.check import TOLERANCE
from spa.storage.store import load
from spa.tables import report

Sizes = dict[str, list[int | str | None]]


@app.command()
def convert(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="A file or folder of any framework, file.py:factory, package.module:factory or timm:NAME.",
        show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the ONNX model.", show_default=False)],
    framework: Annotated[str, typer.Option("--from", metavar="NAME", help="The framework; auto looks at what lies in the file.")] = "auto",
    inputs: Annotated[list[str] | None, typer.Option(
        "--input", metavar="NAME:1x3x224x224", show_default=False,
        help="Shape of an input, where the model does not tell it; a name for a size leaves it free (x:nx3x224x224), and :int64 at the end "
        "is its type; repeatable.")] = None,
    dynamic: Annotated[str | None, typer.Option(
        "--dynamic", metavar="WHICH", show_default=False,
        help="Sizes that stay free: batch (the default), none, or keep: all that are free in the framework.")] = None,
    opset: Annotated[int, typer.Option("--opset", min=0, help="Of ONNX; 0: the converter's choice.")] = 0,
    entry: Annotated[str, typer.Option(
        "--entry", metavar="NAME", help="What makes the network that a checkpoint fits (file.py:factory, timm:NAME), or a signature.",
        show_default=False)] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Open files whose loading runs code that lies in them, such as pickles.")] = False,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Language models: the key-value cache as inputs and outputs.")] = True,
    feeds: given.FeedsFile = None, no_check: given.NoCheck = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0,
    as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:  # fmt: skip
    """Convert a model of any framework to ONNX, compared with the framework's own outputs."""
    term = Terminal(as_json, verbose)
    reading.check_outputs({"--output": output}, [model, feeds])
    reading.check_tolerance(tolerance)
    shapes, types = read_sizes(inputs or ())
    found = converted(
        model, framework=framework, inputs=shapes, dtypes=types, dynamic=dynamic, opset=opset, entry=entry, trust=trust, cache=cache,
        feeds=lambda made: reading.read_feeds(feeds, made), check=not no_check, tolerance=tolerance, seed=seed, stage=term.stage,
    )  # fmt: skip
    with term.stage("writing"):
        found.save(output)
    term.show(data_of(found, model, output), *shown(found), Text(f"wrote {report.printable(str(output))}"))
    return 0


def read_sizes(texts: list[str] | tuple[str, ...]) -> tuple[Sizes, dict[str, str]]:
    """{input: sizes}, and {input: type} where one is given, from NAME:1x3x224x224[:int64]. Without a name inputs are 0, 1, … in order."""
    shapes: Sizes = {}
    types: dict[str, str] = {}
    for text in texts:
        match = re.fullmatch(r"(?:(?P<name>.+?):)?(?P<sizes>(\d+|[A-Za-wyz_]+)(x(\d+|[A-Za-wyz_]+))*|)(?::(?P<type>[a-z]+\d*))?", text)
        if match is None or (not match["sizes"] and not match["name"]):
            raise BadOption(f"--input {text!r} is not of the form name:1x3x224x224.")
        name = match["name"] or str(len(shapes))
        if name in shapes:
            raise BadOption(f"--input gives {name!r} two shapes.")
        shapes[name] = [int(s) if s.isdigit() else s for s in match["sizes"].split("x")] if match["sizes"] else []
        if 0 in shapes[name]:
            raise BadOption(f"--input {text!r} has an axis of size 0, on which nothing can be compared.")
        if match["type"]:
            types[name] = match["type"]
    return shapes, types


def shown(found: Converted) -> list[Any]:
    """What was converted, and how well it agrees."""
    inputs = ", ".join(f"{t.name} {_sizes(t.shape)}" for t in found.model.graph.inputs)
    outputs = ", ".join(f"{t.name} {_sizes(t.shape)}" for t in found.model.graph.outputs)
    lines = [Text(report.printable(f"{found.framework.title} -> ONNX, opset {found.model.graph.opset}: {inputs} -> {outputs}"))]
    return [*lines, *(Text(f"note: {report.printable(note)}", style="yellow") for note in found.notes), agreement(found)]


def agreement(found: Converted) -> Text:
    """The comparison, in a line."""
    if found.parity is None:
        return Text("Comparison: not run (--no-check)\n", style="yellow")
    times = report.count_of(len(found.parity.draws), "input")
    check = found.parity.check
    says = f"outputs differ by at most {check.worst:.1e} of their scale on {times}, {check.tolerance:.0e} is allowed"
    return Text(f"Comparison: the same as {found.framework.title} gives; {says}\n", style="green")


def data_of(found: Converted, model: str, output: Path | None) -> dict[str, Any]:
    """The same with exact numbers."""
    values = {side: {t.name: {"dtype": str(t.dtype), "shape": t.shape} for t in tensors}
              for side, tensors in (("inputs", found.model.graph.inputs), ("outputs", found.model.graph.outputs))}  # fmt: skip
    return {"model": model, "output": None if output is None else str(output), "framework": found.framework.name,
            "opset": found.model.graph.opset, **values, "notes": list(found.notes), "parity": parity_data(found.parity),
            "bytes": None if output is None else load(output).nbytes}  # fmt: skip


def parity_data(found: Parity | None) -> dict[str, Any] | None:
    """The comparison, output by output, and the shapes that it was made with."""
    if found is None:
        return None
    return {**(report.check_data(found.check) or {}), "draws": [{n: list(s) for n, s in shapes.items()} for shapes in found.draws]}


def _sizes(shape: Any) -> str:
    return "x".join(str(s) for s in shape) if shape else "scalar"
