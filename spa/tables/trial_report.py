"""A trial on an engine, for people and for JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from spa.tables.report import LIMIT, Name, amount, check_data, count_of, shorten, table
from spa.timing.trial import Trial

FIGURES = {"context_bytes": "context binary", "ort_bytes": "model in ORT format"}


def trial_data(trial: Trial) -> dict[str, Any]:
    """Exact numbers. Times are not among them; `time_means_nothing` says why, where they would not be the device's."""
    placed = trial.placement
    return {
        "engine": trial.name, "version": trial.version, "element_type": trial.element_type,
        "placement": {"nodes": dict(placed.nodes), "fell_back": dict(placed.fell_back), "proven": placed.proven},
        "figures": dict(trial.figures), "time_means_nothing": trial.timed, "proof": check_data(trial.check),
    }  # fmt: skip


def trial_shown(trial: Trial, against: str, *, limit: int | None = LIMIT) -> RenderableType:
    """Where it ran and what came out. against: what it was compared with, as a phrase."""
    lines: list[RenderableType] = [Text(f"Ran on {trial.name}: {trial.version}", style="bold cyan"), *_placement(trial, limit)]
    lines += [Text(f"  {FIGURES.get(k, k.replace('_', ' '))}: {amount(v, 'B' if k.endswith('_bytes') else '')}")
              for k, v in trial.figures.items()]  # fmt: skip
    if trial.timed:
        lines.append(Text(f"  its time is not reported: {trial.timed}", style="dim"))
    if len(trial.check.differences) > 1:
        rows = [(Name(d.output), _by(d.absolute), _by(d.relative)) for d in trial.check.differences]
        lines += [Text(""), table("Differences", ("output", ">absolute", ">of its scale"), rows, limit=limit)]
    return Lines(*lines, _verdict(trial, against))


def _placement(trial: Trial, limit: int | None) -> list[RenderableType]:
    placed = trial.placement
    counts = ", ".join(f"{count_of(n, 'node')} on {name}" for name, n in placed.nodes.items())
    if not placed.proven:
        return [Text("  the runtime does not say where its nodes run", style="yellow")]
    if trial.stayed:
        return [Text(f"  all of it ran there: {counts}" if counts else "  all of it ran there", style="green")]
    rows = [(Name(node), why) for node, why in placed.fell_back.items()]
    title = f"Fell back: {count_of(len(rows), 'node')} ({counts})"
    return [Text(""), table(title, ("node", "because"), rows, limit=limit)]


def _verdict(trial: Trial, against: str) -> Text:
    check = trial.check
    if not check.differences:
        return Text("Proof: the model has no outputs to compare\n", style="yellow")
    worst = max(check.differences, key=lambda d: d.relative)
    allowed = f"{check.tolerance:.0e} is allowed for {trial.element_type}"
    if check.passed:
        return Text(f"Proof: it gives what {against}; outputs differ by at most {_by(worst.relative)} of their scale, {allowed}\n",
                    style="green")  # fmt: skip
    name = shorten(worst.output, 40)
    says = f"output {name} by {_by(worst.relative)} of its scale, where {allowed} (--tolerance {worst.relative * 1.1:.1e} would pass)"
    return Text(f"Proof: it DIFFERS from what {against}: {says}\n", style="bold red")


def _by(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"
