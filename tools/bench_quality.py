"""How good are pruned networks without any training? `python -m tools.bench_quality TASK ... -o docs/quality.csv`

For each task of models/tasks.py, each criterion, repair, source of calibration data and ratio: prune, repair, evaluate on held-out data.
Rows are appended to a CSV file as they are measured, and what is in it already is not measured again; at the end the table (Markdown)
and a plot a task (metric against MACs, one line a method) are written beside it. `--torch-pruning` adds Torch-Pruning's own L2 and
Taylor on the same networks and evaluation.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import spa
from models.tasks import TASKS, Task
from spa import api
from spa.data.evidence import Evidence, gather
from spa.errors import SpaError
from spa.proof.check import session
from spa.repairs.repair import RepairOptions

UNITS = {  # what is pruned where a task does not prune everything: --include patterns
    "minilm": {"heads": (32, 12), "neurons": (1536, 10)},
    "smollm2": {"neurons": (1536, 8)},
    "vit": {"neurons": (256, 12)},
}


@dataclass(frozen=True)
class Row:
    """One measurement. macs, parameters: dense over pruned. score: of the pruned network, dense: of the original."""

    task: str
    units: str
    scope: str
    criterion: str
    repair: str
    data: str
    samples: int
    ratio: float
    macs: float
    parameters: float
    score: float
    dense: float
    plan_seconds: float
    repair_seconds: float
    note: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same measurement."""
        return self.task, self.units, self.scope, self.criterion, self.repair, self.data, self.samples, self.ratio


class Bench:
    """The measurements, and the file that they are in."""

    def __init__(self, path: Path, threads: int, limit: int | None, seed: int) -> None:
        self.path, self.threads, self.limit, self.seed = path, threads, limit, seed
        self.rows = list(read(path)) if path.is_file() else []

    def measure(self, name: str, units: str, scopes: list[str], criteria: list[str], repairs: list[str], data: list[str], samples: int,
                ratios: list[float]) -> None:  # fmt: skip
        """Everything that is asked for and not there yet."""
        task = TASKS[name]
        done = {r.key for r in self.rows}
        wanted = [
            (scope, c, r, d, x)
            for scope, c, d, x, r in itertools.product(scopes, criteria, data, ratios, repairs)
            if (name, units, scope, c, r, d, samples, x) not in done
        ]
        if not wanted:
            return
        analysis = api.analyze(task.model())
        opened = session(analysis.given, threads=self.threads)
        dense = task.evaluate(opened, opened, limit=self.limit)
        print(f"{name}: dense {dense:.3f} {task.metric}", flush=True)
        include = patterns(analysis, name, units)
        evidence = {d: self._evidence(task, analysis, d, samples) for d in data}
        plans: dict[tuple[Any, ...], tuple[spa.Plan, float]] = {}
        for scope, criterion, repair, source, ratio in wanted:
            began = time.perf_counter()
            try:
                key = scope, criterion, source, ratio
                if key not in plans:
                    normalize = "energy" if scope == "global" and criterion.startswith("obs") else "mean"
                    made = api.plan(analysis, ratio, criterion=criterion, scope=scope, calibration=evidence[source], include=include,
                                    seed=self.seed, normalize=normalize)  # fmt: skip
                    plans[key] = made, time.perf_counter() - began
                plan, planned = plans[key]
                began = time.perf_counter()
                result = api.apply(analysis, plan, check=False, repair=RepairOptions(repair), calibration=evidence[source])
                repaired = time.perf_counter() - began
                score = task.evaluate(session(result.model, threads=self.threads), opened, limit=self.limit)
                before, after, note = result.before, result.after, ""
                row = Row(name, units, scope, criterion, repair, source, samples, ratio, before.macs / after.macs,
                          before.parameters / after.parameters, score, dense, planned, repaired, note)  # fmt: skip
            except SpaError as error:
                row = Row(name, units, scope, criterion, repair, source, samples, ratio, 0, 0, float("nan"), dense, 0, 0, str(error))
            self.add(row)

    def add(self, row: Row) -> None:
        """Keeps a row, in the file too."""
        self.rows.append(row)
        fresh = not self.path.is_file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as opened:
            writer = csv.writer(opened)
            if fresh:
                writer.writerow([f.name for f in fields(Row)])
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in (getattr(row, f.name) for f in fields(Row))])
        print(f"{row.task} {row.units} {row.scope} {row.criterion} {row.repair} {row.data} {row.ratio}: {row.score:.3f} "
              f"(MACs / {row.macs:.2f}, {row.plan_seconds:.0f} + {row.repair_seconds:.0f} s) {row.note}", flush=True)  # fmt: skip

    def _evidence(self, task: Task, analysis: api.Analysis, source: str, samples: int) -> Evidence:
        model, groups = analysis.normal.model, analysis.groups
        if source in ("none", "synthetic"):
            return gather(model, groups, source, samples=samples, seed=self.seed)
        batches = task.calibration(samples) if source == "own" else task.other(samples)
        labelled = any("labels" in b for b in batches)
        return Evidence(source, batches, model, False, "labels" if labelled else None)

    def torch_pruning(self, name: str, ratios: list[float]) -> None:
        """Torch-Pruning on the CIFAR-10 networks: its group L2 norm and its Taylor criterion, nothing trained afterwards."""
        from tools.torch_pruning_quality import pruned

        task = TASKS[name]
        done = {r.key for r in self.rows}
        for criterion, ratio in itertools.product(("torch-pruning-l2", "torch-pruning-taylor"), ratios):
            if (name, "all", "local", criterion, "none", "own", 256, ratio) in done:
                continue
            began = time.perf_counter()
            opened, macs, parameters = pruned(name, criterion.removeprefix("torch-pruning-"), ratio, task.calibration(256), self.threads)
            seconds = time.perf_counter() - began
            dense = session(spa.load(task.model()), threads=self.threads)
            score, whole = task.evaluate(opened, dense, limit=self.limit), task.evaluate(dense, dense, limit=self.limit)
            self.add(Row(name, "all", "local", criterion, "none", "own", 256, ratio, macs, parameters, score, whole, seconds, 0, ""))


def patterns(analysis: api.Analysis, name: str, units: str) -> tuple[str, ...]:
    """Names of the groups of a kind; () for all. Kinds are told by how many channels a group has and where it occurs."""
    if units == "all":
        return ()
    wanted = [UNITS[name][u] for u in units.split("+")]
    found = tuple(g.name for g in analysis.groups.free() if (g.size, len(g.sites)) in wanted)
    if not found:
        raise SystemExit(f"{name} has no groups of the kind {units}: {sorted({(g.size, len(g.sites)) for g in analysis.groups.free()})}")
    return found


def read(path: Path) -> Iterator[Row]:
    """Rows of a file."""
    with path.open(newline="") as opened:
        for found in csv.DictReader(opened):
            values = {f.name: (float(found[f.name]) if f.type == "float" else int(found[f.name]) if f.type == "int" else found[f.name])
                      for f in fields(Row)}  # fmt: skip
            yield Row(**values)


def markdown(rows: list[Row]) -> str:
    """The table, a section a task; the best of each ratio and source of data is bold."""
    lines = []
    for task, found in itertools.groupby(sorted(rows, key=lambda r: (r.task, r.units)), key=lambda r: (r.task, r.units)):
        every = list(found)
        kind = TASKS[task[0]]
        lines += [f"## {task[0]} ({task[1]}): {kind.metric}, dense {every[0].dense:.2f}", ""]
        lines += ["| data | ratio | scope | criterion | repair | MACs ÷ | parameters ÷ | score | drop |", f"|{'---|' * 9}"]
        for _, same in itertools.groupby(sorted(every, key=lambda r: (r.data, r.ratio)), key=lambda r: (r.data, r.ratio)):
            block = sorted(same, key=lambda r: -r.score if kind.higher_is_better else r.score)
            good = [r for r in block if r.score == r.score]
            for row in block:
                mark = "**" if good and row is good[0] else ""
                score = f"{mark}{row.score:.2f}{mark}" if row.score == row.score else row.note
                what = f"| {row.data} ({row.samples}) | {row.ratio:g} | {row.scope} | {row.criterion} | {row.repair}"
                lines.append(f"{what} | {row.macs:.2f} | {row.parameters:.2f} | {score} | {row.dense - row.score:.2f} |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[Row], folder: Path, stem: str) -> list[Path]:
    """Metric against the share of MACs that is left; a panel for each source of data, a line for each criterion and repair."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for (task, units), found in itertools.groupby(sorted(rows, key=lambda r: (r.task, r.units)), key=lambda r: (r.task, r.units)):
        every = [r for r in found if r.score == r.score]
        sources = sorted({r.data for r in every})
        figure, axes = plt.subplots(1, len(sources), figsize=(6.5 * len(sources), 5), squeeze=False, sharey=True)
        for panel, source in zip(axes[0], sources, strict=True):
            lines: dict[tuple[str, str, str], list[Row]] = {}
            for row in every:
                if row.data == source:
                    lines.setdefault((row.criterion, row.repair, row.scope), []).append(row)
            sign = -1 if TASKS[task].higher_is_better else 1
            ranked = sorted(lines.items(), key=lambda item: (-len(item[1]), sign * float(np.mean([r.score for r in item[1]]))))
            for number, (label, points) in enumerate(ranked[:10]):
                points = sorted(points, key=lambda r: r.macs)
                name = ", ".join(p for p in label if p != "local")
                panel.plot([1 / r.macs for r in points], [r.score for r in points], ["o-", "s--"][number % 2], label=name, markersize=4)
            panel.axhline(every[0].dense, color="gray", linewidth=0.8)
            panel.set(xlabel="share of MACs left", title=f"{task} ({units}), calibration: {source}")
            panel.legend(fontsize=7)
        axes[0][0].set_ylabel(TASKS[task].metric)
        if not TASKS[task].higher_is_better:
            axes[0][0].set_yscale("log")
        path = folder / f"{stem}-{task}-{units.replace('+', '-')}.png"
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; none: write table and plots of what is there")
    parser.add_argument("--criterion", default="l2,obspa-greedy")
    parser.add_argument("--repair", default="none,bias,affine,obspa")
    parser.add_argument("--data", default="own,other,none", help="own, other (out of distribution), none (noise), synthetic")
    parser.add_argument("--scope", default="local")
    parser.add_argument("--ratio", default="0.3,0.5")
    parser.add_argument("--units", default="all", help="all, or kinds of groups such as heads+neurons")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--limit", type=int, help="evaluate on fewer samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch-pruning", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/quality.csv"))
    given = parser.parse_args()
    bench = Bench(given.output, given.threads, given.limit, given.seed)
    print(f"spa {spa.__version__}, onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, numpy {np.__version__}, "
          f"{platform.machine()}, {given.threads} threads, seed {given.seed}")  # fmt: skip
    for name in given.tasks:
        bench.measure(name, given.units, given.scope.split(","), given.criterion.split(","), given.repair.split(","),
                      given.data.split(","), given.samples, [float(r) for r in given.ratio.split(",")])  # fmt: skip
        if given.torch_pruning:
            bench.torch_pruning(name, [float(r) for r in given.ratio.split(",")])
    if bench.rows:
        given.output.with_suffix(".md").write_text(markdown(bench.rows))
        plot(bench.rows, given.output.parent, given.output.stem)


if __name__ == "__main__":
    main()
