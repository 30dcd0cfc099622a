"""Which kinds of units each transformer of a folder has, and whether each, pruned alone, equals masking: `python -m tools.unit_table`.

A row is a graph and a kind of unit (`spa.graph.kinds`): groups of it, how many may shrink, and what the proof says of half of them gone.
Writes a Markdown table; exit 1 if any unit that may shrink is not exact, or could not be pruned.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import onnx
import onnxruntime
import typer

import spa
from models import weightless
from spa.errors import NothingToPrune, SpaError
from spa.graph.kinds import KINDS

ATTENTION = frozenset({"head", "key-value", "query", "qk", "vo", "head-width"})  # what makes a graph a transformer
UNITS = tuple(k for k in KINDS if k not in ("output", "position", "other"))
RATIO = 0.5


@dataclass(frozen=True)
class Row:
    """One kind of one graph. gone: coordinates removed of how many; difference: of the outputs' scale, None where nothing was pruned."""

    graph: str
    kind: str
    groups: int
    free: int
    gone: tuple[int, int] | None
    difference: float | None
    outcome: str


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a graph; none of one without attention."""
    analysis = spa.analyze(weightless.load(path) if path.name.endswith(".xz") else str(path))
    found = analysis.groups.groups
    if not any(g.kind in ATTENTION for g in found):
        return
    for kind in (k for k in UNITS if any(g.kind == k for g in found)):
        groups = [g for g in found if g.kind == kind]
        yield _row(analysis, path.name.removesuffix(".xz").removesuffix(".onnx"), kind, groups)


def _row(analysis: spa.Analysis, name: str, kind: str, groups: Sequence[spa.Group]) -> Row:
    free = [g for g in groups if g.frozen is None]
    if not free:
        return Row(name, kind, len(groups), 0, None, None, f"frozen: {groups[0].frozen.cause if groups[0].frozen else ''}".rstrip(","))
    try:
        plan = spa.plan(analysis, RATIO, multiple_of=1, units=[kind])
        result = spa.apply(analysis, plan)
    except NothingToPrune as error:
        return Row(name, kind, len(groups), len(free), None, None, str(error))
    except SpaError as error:
        return Row(name, kind, len(groups), len(free), None, None, f"failed: {error}")
    assert result.check is not None
    removed = sum(e["size"] - len(e["kept"]) for e in plan.groups.values())
    return Row(name, kind, len(groups), len(free), (removed, sum(g.size for g in free)), result.check.worst, "equals masking")


def markdown(rows: Sequence[Row], about: str) -> str:
    """A table of kinds over graphs, then every row."""
    kinds = [k for k in UNITS if any(r.kind == k for r in rows)]
    lines = ["# Units of the zoo's transformers", "", about, "",
             "A number is how many groups of the kind there are; half of each was removed, kind by kind, and the result proved equal to "
             "masking. ✗: it failed. (n): there, but frozen.", ""]  # fmt: skip
    lines += [f"| graph | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for graph in dict.fromkeys(r.graph for r in rows):
        of = {r.kind: r for r in rows if r.graph == graph}
        lines.append(f"| {graph} | {' | '.join(_cell(of.get(k)) for k in kinds)} |")
    done = [r for r in rows if r.difference is not None]
    worst = max(done, key=lambda r: r.difference or 0.0)
    lines += ["", f"{len(done)} prunings equal masking, the largest difference {worst.difference:.1e} ({worst.graph}, {worst.kind}).", ""]
    left = [r for r in rows if r.difference is None]
    lines += ["## What was not pruned, and why", "", "| graph | kind | because |", "|---|---|---|"]
    lines += [f"| {r.graph} | {r.kind} | {r.outcome} |" for r in left]
    return "\n".join([*lines, ""])


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.difference is not None:
        return str(row.free)
    return f"({row.groups})" if row.outcome.startswith(("frozen", "Nothing")) else "✗"


def main(
    folder: Annotated[Path, typer.Argument(help="Graphs, .onnx or .onnx.xz (models.weightless).")] = Path("../shared/zoo"),
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("docs/units.md"),
) -> None:
    """Write the table."""
    rows: list[Row] = []
    for path in sorted(p for p in folder.iterdir() if p.name.endswith((".onnx", ".onnx.xz"))):
        start = time.perf_counter()
        found = list(rows_of(path))
        rows += found
        sys.stderr.write(f"{path.name}: {', '.join(f'{r.kind} {_cell(r)}' for r in found)} ({time.perf_counter() - start:.0f} s)\n")
    about = f"spa {spa.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, random weights, ratio {RATIO}, l2."
    output.write_text(markdown(rows, about), encoding="utf-8")
    if any(r.outcome.startswith("failed") for r in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
