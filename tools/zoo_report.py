"""Prunes a whole zoo and writes one row a graph.

    python -m tools.zoo_report FOLDER-OR-FILE ... [--ratio 0.5 --ratio 0.25] [--criterion l2] [--multiple-of 1]
        [--simplify onnxslim] [-o report.csv]

`.onnx.xz` files are graphs without weights (models.weightless), `.onnx` files are taken as they are. A row says what is kept
of the MACs and parameters, which share of the channels is frozen and the most costly cause, the largest difference between
removing and masking, and the seconds of analysis, plan and rewrite (without the proof). Exit 1 if any graph failed.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import onnx
import typer
from rich.console import Console
from rich.table import Table

import spa
from tools import simplify


@dataclass(frozen=True)
class Row:
    """One graph at one ratio."""

    graph: str
    simplified: str
    ratio: float
    criterion: str
    macs_kept: float
    parameters_kept: float
    channels_frozen: float
    most_costly_cause: str
    difference: float
    seconds: float
    outcome: str


def paths_of(places: list[Path]) -> Iterator[Path]:
    """All models in files and folders."""
    for place in places:
        if place.is_dir():
            yield from sorted(p for p in place.rglob("*") if p.name.endswith((".onnx", ".onnx.xz")))
        else:
            yield place


def frozen_share(groups: spa.Groups) -> tuple[float, str]:
    """Share of the weighted channels that are frozen, and the cause that holds most parameters."""
    weighted = [g for g in groups.groups if g.parameters > 0 and g.macs > 0]
    frozen = [g for g in weighted if g.frozen is not None]
    cause = max(frozen, key=lambda g: g.parameters * g.size, default=None)
    share = sum(g.size for g in frozen) / max(sum(g.size for g in weighted), 1)
    return share, str(cause.frozen) if cause is not None else ""


def row_of(
    path: Path, model: onnx.ModelProto | Path, name: str, ratio: float, criterion: str, multiple_of: int | str, *, check: bool = True
) -> Row:
    """Prunes one graph; every failure is a row too."""
    start = time.perf_counter()
    empty = (float("nan"),) * 3
    try:
        analysis = spa.analyze(model if isinstance(model, onnx.ModelProto) else str(model))
        plan = spa.plan(analysis, ratio, criterion=criterion, multiple_of=multiple_of)
        quick = spa.apply(analysis, plan, check=False)
        seconds = time.perf_counter() - start
        share, cause = frozen_share(analysis.groups)
        macs, parameters = quick.after.macs / max(quick.before.macs, 1), quick.after.parameters / max(quick.before.parameters, 1)
        difference = float("nan")
        if check:
            proof = spa.apply(analysis, plan).check
            difference = proof.worst if proof is not None else difference
        return Row(path.name, name, ratio, criterion, macs, parameters, share, cause, difference, seconds, "ok")
    except spa.NothingToPrune as error:
        return Row(path.name, name, ratio, criterion, 1.0, 1.0, 1.0, str(error), 0.0, time.perf_counter() - start, "nothing")
    except Exception as error:  # whatever happens to one graph, the others get their row
        return Row(
            path.name, name, ratio, criterion, *empty, "", float("nan"), time.perf_counter() - start, f"{type(error).__name__}: {error}"
        )


def main(
    places: Annotated[list[Path], typer.Argument(help="models or folders of models")],
    ratio: Annotated[list[float], typer.Option(help="repeatable")] = [0.5],  # noqa: B006  typer copies it
    criterion: Annotated[list[str], typer.Option(help="repeatable")] = ["l2"],  # noqa: B006
    multiple_of: Annotated[str, typer.Option(help="a number, or auto")] = "1",
    simplifier: Annotated[list[str], typer.Option("--simplify", help="onnxslim, onnxsim or ort; repeatable; 'none' too")] = ["none"],  # noqa: B006
    check: Annotated[bool, typer.Option(help="run the proof")] = True,
    output: Annotated[Path | None, typer.Option("-o", help="CSV file")] = None,
) -> None:
    """Prunes every model and prints one row each."""
    rows = []
    for path in paths_of(places):
        for way in simplifier:
            for one_ratio in ratio:
                for one in criterion:
                    try:
                        model = simplify.load(path, way)
                    except Exception as error:  # the simplifier's failure is not ours, but is reported
                        rows.append(Row(path.name, way, one_ratio, one, *(float("nan"),) * 3, "", float("nan"), 0.0, f"{way}: {error}"))
                        continue
                    rows.append(
                        row_of(path, model, way, one_ratio, one, multiple_of if multiple_of == "auto" else int(multiple_of), check=check)
                    )
                    print(_line(rows[-1]), file=sys.stderr, flush=True)
    show(rows)
    if output is not None:
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(r) for r in rows)
    if any(r.outcome not in ("ok", "nothing") for r in rows):
        raise typer.Exit(1)


def _line(row: Row) -> str:
    return (
        f"{row.graph:40} {row.simplified:9} r={row.ratio} {row.criterion:7} macs {row.macs_kept:.3f} params {row.parameters_kept:.3f} "
        f"diff {row.difference:.1e} {row.seconds:.2f}s {row.outcome[:150]}"
    )


def show(rows: list[Row]) -> None:
    """Prints the table."""
    table = Table(
        "graph",
        "simplified",
        "ratio",
        "criterion",
        "MACs kept",
        "parameters kept",
        "frozen",
        "difference",
        "seconds",
        "outcome",
        "most costly cause",
    )
    for row in rows:
        table.add_row(
            row.graph,
            row.simplified,
            f"{row.ratio}",
            row.criterion,
            f"{row.macs_kept:.3f}",
            f"{row.parameters_kept:.3f}",
            f"{row.channels_frozen:.2f}",
            f"{row.difference:.1e}",
            f"{row.seconds:.2f}",
            row.outcome,
            row.most_costly_cause,
        )
    Console(width=240).print(table)


if __name__ == "__main__":
    typer.run(main)
