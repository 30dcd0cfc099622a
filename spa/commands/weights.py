"""`spa weights`: a framework's weights, cut by a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import opened_model
from spa.commands.terminal import Terminal
from spa.frameworks.trees import apply_to_arrays
from spa.frameworks.weight_files import check_suffix, read_weights, write_weights
from spa.graph.analysis import analyzed_for
from spa.plans.plan import load_plan
from spa.storage.store import load
from spa.tables import report


@app.command()
def weights(
    model: given.ModelFile, plan_file: given.PlanFile,
    arrays: Annotated[Path, typer.Argument(
        metavar="WEIGHTS", help="The weights that MODEL was exported with, by the framework's names: .npz or .safetensors.",
        show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write them: .npz or .safetensors.",
                                         show_default=False)],
    pruned: Annotated[Path | None, typer.Option(
        "--pruned", metavar="SMALL", help="The pruned model, where it was repaired or trained: its weights are taken over.",
        show_default=False)] = None,
    as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:  # fmt: skip
    """Cut a framework's own weights as a plan says, under the framework's names."""
    term = Terminal(as_json, verbose)
    check_suffix(output)
    reading.check_outputs({"--output": output}, [model, plan_file, arrays, pruned])
    decided, held = load_plan(plan_file), read_weights(arrays)
    opened = opened_model(term, model, {"--output": output})
    analysis = analyzed_for(opened, decided, stage=term.stage)
    with term.stage("cutting"):
        small = apply_to_arrays(held, decided, analysis, pruned=None if pruned is None else load(pruned))
    write_weights(output, small)
    changed = {name: (held[name].shape, array.shape) for name, array in small.items() if held[name].shape != array.shape}
    numbers = sum(a.size for a in held.values()), sum(a.size for a in small.values())
    data = {"output": str(output), "arrays": len(small), "smaller": {n: [list(a), list(b)] for n, (a, b) in changed.items()},
            "elements": {"before": numbers[0], "after": numbers[1]}}  # fmt: skip
    term.show(data, Text(f"{len(changed)} of {len(small)} arrays are smaller: {numbers[0]:,} -> {numbers[1]:,} elements"),
              Text(f"wrote {report.printable(str(output))}"))  # fmt: skip
    return 0
