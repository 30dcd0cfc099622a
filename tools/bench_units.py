"""Which criterion for heads and neurons? `python -m tools.bench_units` -> docs/units_quality.csv and .md

MiniLM (film reviews, accuracy) and ViT-S focus (agreement of maps), without training: heads and neurons by 25 % and 50 % of each group,
so that all criteria come to the same MACs and parameters, with OBSPA's repair and without; then the widths of Adaptive MLP Pruning under
a drop, against magnitude at the MACs that it came to. Rows are appended as they are measured, and not measured again.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import spa
from models.tasks import TASKS, Task
from spa.data.evidence import Evidence, gather
from spa.errors import SpaError
from spa.proof.check import session

UNITS = ("head", "neuron")
CRITERIA = ("l2", "amp", "wanda", "flap", "2ssp", "entropy-taylor", "obspa", "obspa-greedy")
RATIOS = (0.25, 0.5)
DROPS = {"minilm": ("accuracy", 4.0), "focus": ("error", 0.1)}  # what adaptive widths may lose on held-out calibration data
SEED = 0

@dataclass(frozen=True)
class Row:
    """One pruned network. allocation: uniform (the ratio in every group) or adaptive. macs, parameters: share that is left."""

    task: str
    criterion: str
    allocation: str
    repair: str
    ratio: float
    macs: float
    parameters: float
    score: float
    dense: float
    note: str

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        """What makes it a measurement of its own."""
        return self.task, self.criterion, self.allocation, self.repair, self.ratio

class Bench:
    """One task: the dense network, its data and its figure."""

    def __init__(self, task: Task, samples: int) -> None:
        self.task = task
        self.analysis = spa.analyze(str(task.model()))
        batches = task.calibration(samples)
        self.evidence: Evidence = gather(self.analysis.normal.model, self.analysis.groups, batches, seed=SEED)
        self.dense = session(self.analysis.given, threads=1)
        self.score = task.evaluate(self.dense, self.dense)

    def row(self, criterion: str, repair: str, ratio: float, plan: spa.Plan, allocation: str) -> Row:
        """What a plan gives."""
        result = spa.apply(self.analysis, plan, repair=repair, calibration=self.evidence, seed=SEED)
        score = self.task.evaluate(session(result.model, threads=1), self.dense)
        macs, parameters = result.after.macs / result.before.macs, result.after.parameters / result.before.parameters
        return Row(self.task.name, criterion, allocation, repair, ratio, macs, parameters, score, self.score, "")

    def uniform(self, criterion: str, repair: str, ratio: float) -> Row:
        """The same share of every group of heads and of neurons."""
        plan = spa.plan(self.analysis, ratio, criterion=criterion, units=UNITS, multiple_of=1, calibration=self.evidence, seed=SEED)
        return self.row(criterion, repair, ratio, plan, "uniform")

    def adaptive(self, criterion: str, repair: str) -> Row:
        """Widths that a drop allows, group by group."""
        metric, drop = DROPS[self.task.name]
        budget = spa.Budget((), "adaptive", max_drop=drop, metric=metric, repair=repair)
        plan = spa.plan(self.analysis, target=budget, criterion=criterion, units=UNITS, multiple_of=1, calibration=self.evidence, seed=SEED)
        return self.row(criterion, repair, drop, plan, "adaptive")

    def at(self, criterion: str, repair: str, macs: float) -> Row:
        """The same share of every group, at the MACs of another plan."""
        plan = spa.plan(self.analysis, target=spa.Budget((f"macs={macs:.6f}",), "uniform"), criterion=criterion, units=UNITS, multiple_of=1,
                        calibration=self.evidence, seed=SEED)  # fmt: skip
        return self.row(criterion, repair, round(macs, 3), plan, "uniform at its MACs")

def rows_of(bench: Bench, done: set[tuple[str, str, str, str, float]]) -> Iterator[Row]:
    """All rows of a task that are not there yet; what fails is a row too."""
    name = bench.task.name
    for ratio in RATIOS:
        for criterion in CRITERIA:
            for repair in ("none", "obspa"):
                if (name, criterion, "uniform", repair, ratio) in done:
                    continue
                try:
                    yield bench.uniform(criterion, repair, ratio)
                except SpaError as error:
                    yield Row(name, criterion, "uniform", repair, ratio, *(float("nan"),) * 3, bench.score, str(error))
    for criterion, repair in (("entropy-taylor", "none"), ("obspa", "obspa")):
        if (name, criterion, "adaptive", repair, DROPS[name][1]) in done:
            continue
        try:
            found = bench.adaptive(criterion, repair)
            yield found
            yield bench.at("l2", repair, found.macs)
        except SpaError as error:
            yield Row(name, criterion, "adaptive", repair, DROPS[name][1], *(float("nan"),) * 3, bench.score, str(error))

def markdown(rows: list[Row], samples: int) -> str:
    """A table a task."""
    lines = ["# Heads and neurons: which criterion", "",
             f"spa {spa.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, CPU, "
             f"seed {SEED}, {samples} calibration samples, no training. Every plan was proved equal to masking.", ""]  # fmt: skip
    for name in dict.fromkeys(r.task for r in rows):
        own = [r for r in rows if r.task == name]
        task = TASKS[name]
        better = "higher" if task.higher_is_better else "lower"
        lines += [f"## {name}: {task.metric} ({better} is better), dense {own[0].dense:.4g}", ""]
        lines += ["| ratio | criterion | widths | repair | MACs left | parameters left | score |", "|---|---|---|---|---|---|---|"]
        for r in own:
            score = r.note or f"{r.score:.4g}"
            lines.append(f"| {r.ratio:g} | {r.criterion} | {r.allocation} | {r.repair} | {r.macs:.1%} | {r.parameters:.1%} | {score} |")
        lines.append("")
    return "\n".join(lines)

def read(path: Path) -> list[Row]:
    """What was measured already."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [Row(**{f.name: float(r[f.name]) if f.type == "float" else r[f.name] for f in fields(Row)}) for r in found]  # type: ignore[arg-type]


def main() -> None:
    """Measures what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=["minilm", "focus"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/units_quality.csv"))
    asked = parser.parse_args()
    rows = read(asked.output)
    for name in asked.tasks:
        for row in rows_of(Bench(TASKS[name], asked.samples), {r.key for r in rows}):
            rows.append(row)
            with asked.output.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [f.name for f in fields(Row)])
                writer.writeheader()
                writer.writerows(asdict(r) for r in rows)
            asked.output.with_suffix(".md").write_text(markdown(rows, asked.samples), encoding="utf-8")

if __name__ == "__main__":
    main()
