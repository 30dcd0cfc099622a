"""`spa finetune`: trains a model file, from labels or from the model before pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from spa import api
from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import evidence_of, opened_model
from spa.commands.terminal import Terminal
from spa.errors import BadOption
from spa.learning.finetune import Epoch, Finetuned
from spa.learning.finetune import finetune as train
from spa.learning.training import Training


@app.command()
def finetune(
    model: given.ModelFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the trained model.", show_default=False)],
    data: Annotated[str | None, typer.Option(
        "--data", metavar="SOURCE", help="What to train on, as --calibration of `spa prune` takes it.", show_default=False)] = None,
    teacher: Annotated[Path | None, typer.Option(
        "--teacher", metavar="FILE", help="The model before pruning, whose outputs are the aim.", show_default=False)] = None,
    evaluate: given.Evaluate = None,
    metric: given.Metric = None,
    preprocess: given.Preprocess = None,
    tokenizer: given.Tokenizer = None,
    labels: given.Labels = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Most samples to train on.")] = 1_000_000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples in a step.")] = 64,
    length: given.Length = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 10,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate at its highest.")] = 1e-3,
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="NAME", help="adamw, or sgd with Nesterov's momentum.")] = "adamw",
    momentum: Annotated[float, typer.Option("--momentum", help="Of sgd.")] = 0.9,
    decay: Annotated[float, typer.Option("--decay", help="Weight decay.")] = 1e-4,
    clip: Annotated[float, typer.Option("--clip", help="Largest norm of a step's gradient.")] = 1.0,
    norms: Annotated[str, typer.Option(
        "--norms", metavar="HOW", help="BatchNormalization goes by the batch, as in a first training, or by what is stored; "
        "auto: batch from 16 samples in a step on.")] = "auto",
    temperature: Annotated[float, typer.Option("--temperature", help="Of the softmaxes of --loss kl.")] = 2.0,
    teaching: Annotated[float, typer.Option("--teaching", help="Weight of the teacher's loss beside that of labels.")] = 0.5,
    loss: Annotated[str, typer.Option("--loss", metavar="NAME", help="auto, cross-entropy, kl or mse.")] = "auto",
    augment: Annotated[str, typer.Option("--augment", metavar="HOW", help="none, or images: mirrored and moved.")] = "none",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(
        "--precision", metavar="NAME", help="float32, or bfloat16 (mixed); auto: mixed where there is a GPU.")] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(
        "--checkpoint", metavar="FILE", help="Written after each epoch; a training that was stopped goes on from it.",
        show_default=False)] = None,
    seed: given.Seed = 0,
    as_json: given.Json = False,
    verbose: given.Verbose = False,
) -> int:
    """Train a model: labels or a teacher in, the best by held-out data out, the weights under their names."""
    term = Terminal(as_json, verbose)
    training = Training(epochs=epochs, rate=rate, optimizer=optimizer, momentum=momentum, decay=decay, clip=clip, batch=batch, norms=norms,
                        precision=precision, temperature=temperature, teaching=teaching, loss=loss, augment=augment, device=device,
                        seed=seed)  # fmt: skip
    if data is None:
        raise BadOption("There are no data to train on: give some with --data.")
    opened = opened_model(term, model, {"--output": output})
    if teacher is not None:
        reading.check_outputs({"--output": output, "--checkpoint": checkpoint}, [model, teacher])
    analysis = api.analyze(opened, stage=term.stage)
    evidence = evidence_of(term, analysis, data, preprocess, tokenizer, samples, batch, length, labels, seed)
    held = evidence_of(term, analysis, evaluate, *((preprocess, tokenizer) if evaluate else (None, None)), samples, batch,
                       length if evaluate else None, labels if evaluate else None, seed)  # fmt: skip
    found = train(opened, evidence, teacher=teacher, evaluate=held, metric=metric, training=training, checkpoint=checkpoint,
                  tell=lambda epoch: term.log(_line(epoch, epochs), always=not as_json), stage=term.stage)  # fmt: skip
    found.save(output)
    if found.stopped:
        term.log(f"spa: {found.stopped}", always=True)
    term.show(_data(found, output), _table(found))
    return 0


def _line(epoch: Epoch, epochs: int) -> str:
    return f"epoch {epoch.number}/{epochs}: {'' if epoch.loss is None else f'loss {epoch.loss:.4g}, '}held out {epoch.value:.6g}"


def _data(found: Finetuned, output: Path) -> dict[str, object]:
    return {
        "output": str(output), "metric": found.metric, "dense": found.dense, "tensors": found.tensors, "stopped": found.stopped or None,
        "best": found.best.number, "history": [{"epoch": e.number, "loss": e.loss, "value": e.value} for e in found.history],
    }  # fmt: skip


def _table(found: Finetuned) -> Table:
    table = Table(title=f"{found.metric} on held-out data; {found.tensors} tensors trained", title_justify="left", box=None)
    for name in ("", "epoch", found.metric):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("reference", "", f"{found.dense:.6g}")
    table.add_row("before", "0", f"{found.history[0].value:.6g}")
    table.add_row("best", str(found.best.number), f"{found.best.value:.6g}")
    return table
