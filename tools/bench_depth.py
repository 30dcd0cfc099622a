"""Which layers of a language model can go: `python -m tools.bench_depth -o docs/depth.csv` (a table as text goes beside it, depth.md).

Each method drops 2, 4, 6 … sub-layers; of what is left: perplexity on text that decided nothing, parameters, MACs, and the time of one
prefill, measured by turns with the dense model's on one thread. No weight is trained. Greedy methods search once for the largest number.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import onnxruntime

import spa
from models.tasks import TASKS, Task
from spa.budgets.latency import paired_seconds
from spa.data.evidence import Evidence
from spa.engines import find
from spa.graph.analysis import Analysis
from spa.layers.depth import Depth, Dropped, choose_layers, without_layers
from spa.proof.check import session

SERIES = (
    ("finercut", "attention"), ("llm-drop", "attention"), ("2ssp", "attention"), ("random", "attention"), ("finercut", "any"),
    ("llm-drop", "any"), ("finercut", "block"), ("shortgpt", "block"), ("replaceme", "block"),
)  # fmt: skip
GREEDY = ("finercut", "2ssp", "tracenas", "llm-drop", "shortgpt", "random")  # what a smaller number drops, a larger one drops first


@dataclass(frozen=True)
class Row:
    """One model that is left."""

    task: str
    method: str
    kind: str
    dropped: int  # sub-layers
    layers: str
    perplexity: float
    dense: float
    parameters: float  # shares of the dense model's
    macs: float
    time: float
    seconds: float  # that choosing took, for the largest number of the series
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_depth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", nargs="?", default="smollm2")
    parser.add_argument("-o", "--output", type=Path, default=Path("depth.csv"))
    parser.add_argument("--series", default=",".join("/".join(s) for s in SERIES), help="method/kind, with commas")
    parser.add_argument("--numbers", default="2,4,6,8", help="sub-layers that go; blocks are half as many")
    parser.add_argument("--samples", type=int, default=4, help="windows of text that methods look at")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--limit", type=int, default=4096, help="tokens that are evaluated")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    series = [tuple(s.split("/")) for s in given.series.split(",")]
    rows = read(given.output)
    for row in measured(TASKS[given.task], series, [int(n) for n in given.numbers.split(",")], given):
        rows = [r for r in rows if (r.task, r.method, r.kind, r.dropped) != (row.task, row.method, row.kind, row.dropped)] + [row]
        write(given.output, rows, given)
        print(row)


def measured(task: Task, series: Sequence[tuple[str, ...]], numbers: Sequence[int], given: argparse.Namespace) -> Iterator[Row]:
    """Rows, one after the other."""
    analysis = spa.analyze(task.model())
    batches = [{k: v[:, : given.length] for k, v in b.items()} for b in task.calibration(given.samples)]
    evidence = Evidence("calibration", batches, analysis.normal.model, False, "labels")
    dense = task.evaluate(session(analysis.normal.model, threads=1), limit=given.limit)
    whole = spa.count(analysis.groups)
    for method, kind in series:
        counts = [n // 2 for n in numbers] if kind == "block" else list(numbers)
        began = time.perf_counter()
        searched = choose_layers(analysis, Depth(max(counts), method, kind), evidence, seed=given.seed) if method in GREEDY else None
        seconds = time.perf_counter() - began
        for count in counts:
            small, dropped, took = carried_out(analysis, method, kind, count, searched, evidence)
            left = spa.count(small.groups)
            perplexity = task.evaluate(session(small.normal.model, threads=1), limit=given.limit)
            feeds = {k: v for k, v in batches[0].items() if k != "labels"}
            was, now = paired_seconds(find("cpu"), analysis.normal.model, small.normal.model, feeds, threads=1)
            names = " ".join(f"{s.kind[0]}{s.block}" for s in dropped.layers)
            yield Row(task.name, method, kind, len(dropped.layers), names, round(perplexity, 3), round(dense, 3),
                      round(left.parameters / whole.parameters, 4), round(left.macs / whole.macs, 4), round(now / was, 4),
                      round(seconds + took, 1), "; ".join(small.left_out))  # fmt: skip


def carried_out(
    analysis: Analysis, method: str, kind: str, count: int, searched: Dropped | None, evidence: Evidence
) -> tuple[Analysis, Dropped, float]:
    """The model without so many candidates: the first of a search, or a search of its own."""
    began = time.perf_counter()
    if searched is None:
        small, _, dropped = without_layers(analysis, Depth(count, method, kind), evidence)
        return small, dropped, time.perf_counter() - began
    chosen = searched.order[:count]
    names = [s.branch for s in searched.layers if s.name in chosen or f"block {s.block}" in chosen]
    small, _, dropped = without_layers(analysis, Depth(names, method, kind), None)
    return small, dropped, 0.0


def read(path: Path) -> list[Row]:
    """Rows of an earlier run, which stay unless they are measured again."""
    if not path.is_file():
        return []
    kinds = {f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{k: kinds[k](v) for k, v in row.items()}) for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Row], given: argparse.Namespace) -> None:
    """The table as CSV, and as Markdown beside it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        f"# Layers dropped\n\n`python -m tools.bench_depth --samples {given.samples} --length {given.length} --limit {given.limit}`, "
        f"onnxruntime {onnxruntime.__version__}, {platform.machine()}, one thread. Perplexity on {given.limit} tokens that decided "
        "nothing, no training; time of one prefill over the dense model's, by turns. a: attention, m: MLP, with the number of the block.\n",
        "| task | method | layers | dropped | perplexity | of dense | parameters | MACs | time | chosen in | which |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {r.task} | {r.method} | {r.kind} | {r.dropped} | {r.perplexity:.2f} | {r.perplexity / r.dense:.2f}× | {r.parameters:.1%} | "
        f"{r.macs:.1%} | {r.time:.2f}× | {r.seconds:.0f} s | {r.layers} |"
        for r in sorted(rows, key=lambda r: (r.task, r.kind, r.dropped, r.perplexity))
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
