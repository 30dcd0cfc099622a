"""`spa ablate`: what the network loses without each head, MLP or layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import analysis_of, evidence_of
from spa.commands.terminal import Terminal
from spa.layers.ablate import ablate as measure_units
from spa.tables.depth_report import ablation
from spa.tables.report import printable


@app.command()
def ablate(
    model: given.ModelFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CSV", help="Where to write the scores.", show_default=False)],
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="Data, as --calibration takes them.", show_default=False)],
    unit: Annotated[str, typer.Option("--unit", metavar="KIND", help="heads, layers, attention or mlp.")] = "heads",
    mode: Annotated[str, typer.Option("--mode", metavar="MODE", help="zero, mean, or swap: as on another sample.")] = "zero",
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="kl, agreement, cosine, perplexity, accuracy, …")] = "kl",
    protect_out: Annotated[Path | None, typer.Option("--protect-out", metavar="FILE", help="Also write the heads that are missed most as a "
                                                     "list for --protect.", show_default=False)] = None,
    keep_top: Annotated[float, typer.Option("--keep-top", metavar="SHARE", help="Share of the heads in that list.")] = 0.2,
    output_name: given.OutputName = None, preprocess: given.Preprocess = None, tokenizer: given.Tokenizer = None,
    samples: given.Samples = 64, batch: given.Batch = 8, length: given.Length = None, labels: given.Labels = None,
    inputs: given.Inputs = None, threads: given.Threads = 0, seed: given.Seed = 0, as_json: given.Json = False,
    verbose: given.Verbose = False,
) -> int:
    """Measure what the network loses without each head, MLP or layer; nothing is removed."""
    term = Terminal(as_json, verbose)
    outputs = {"--output": output} | ({} if protect_out is None else {"--protect-out": protect_out})
    reading.check_outputs(outputs, [model, *reading.data_files(outputs, data, preprocess, tokenizer)])
    analysis = analysis_of(term, model, inputs, True, True, False, outputs=outputs)
    evidence = evidence_of(term, analysis, data, preprocess, tokenizer, samples, batch, length, labels, seed)
    assert evidence is not None
    found = measure_units(analysis, evidence, unit=unit, mode=mode, metric=metric, output=output_name, threads=threads, stage=term.stage)
    found.save(output, protect_out, keep_top)
    scores = [vars(s) for s in found.scores]
    told = {"model": str(model), "output": str(output), "metric": found.metric, "mode": mode, "dense": found.dense, "scores": scores}
    term.show(told, ablation(found), Text(f"wrote {printable(' and '.join(map(str, outputs.values())))}"))
    return 0
