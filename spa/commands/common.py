"""What several commands begin with: a model read, analysed, and given data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spa import api
from spa.commands import reading
from spa.commands.terminal import Terminal
from spa.data.calibration import calibration as open_calibration
from spa.data.evidence import MOMENTS, SYNTHETIC, Evidence, gather
from spa.errors import BadOption
from spa.graph.normalize import normalize
from spa.graph.trace import trace
from spa.proof.feeds import Feeds
from spa.storage.store import Model, load


def evidence_of(
    term: Terminal, analysis: api.Analysis, source: str | None, preprocess: str | None, tokenizer: str | None, samples: int, batch: int,
    length: int | None, labels: str | None, seed: int,
) -> Evidence | None:
    """The calibration data, read; None where none are asked for."""
    if source is None:
        for option, value in {"--preprocess": preprocess, "--tokenizer": tokenizer, "--length": length, "--labels": labels}.items():
            if value is not None:
                raise BadOption(f"{option} says how calibration data are read: give some with --calibration.")
        return None
    if source in (SYNTHETIC, MOMENTS):
        with term.stage("making calibration data"):
            made = gather(analysis.normal.model, analysis.groups, source, samples=samples, seed=seed)
        term.log(f"spa: calibration on {made.name}")
        return made
    opened = open_calibration(source, analysis.groups.traced, samples=samples, batch=batch, preprocess=preprocess, tokenizer=tokenizer,
                              length=length, seed=seed, labels=labels)
    found = api.evidence_for(analysis, opened, seed=seed, stage=term.stage)
    term.log(f"spa: calibration on {opened.name}")
    return found


def opened_model(term: Terminal, model: Path, outputs: dict[str, Path | None] | dict[str, Path]) -> Model:
    """A model read; none of the files it came from may be written over."""
    with term.stage("reading"):
        opened = load(model)
    reading.check_outputs(dict(outputs), opened.origin.files)  # its external files too
    return opened


def analysis_of(
    term: Terminal, model: Path, inputs: list[str] | None, protect_outputs: bool, stat: bool, keep_state: bool,
    outputs: dict[str, Path] | None = None,
) -> api.Analysis:
    """A model read, normalised, traced and grouped."""
    opened = opened_model(term, model, outputs or {})
    shapes = reading.read_shapes(inputs or (), opened)
    return api.analyze(opened, inputs=shapes, protect_outputs=protect_outputs, stat=stat, keep_state=keep_state, stage=term.stage)


def drawn_inputs(term: Terminal, model: Model, inputs: Sequence[str], feeds: Path | None, seed: int) -> Feeds:
    """Inputs for a model: the user's, or drawn."""
    found = reading.read_feeds(feeds, model)
    if found is not None:
        return found
    with term.stage("finding shapes"):
        normal = normalize(model, reading.read_shapes(inputs, model))
        return api.runnable(normal.model, trace(normal.model.graph, normal.facts), seed=seed)
