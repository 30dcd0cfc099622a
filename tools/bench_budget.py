"""What is a budget's way of spreading worth? `python -m tools.bench_budget TASK ... -o docs/budgets.csv`

For each task of models/tasks.py and each latency (a share of the dense model's), three plans of the same measured latency on the CPU
provider:

    latency-aware   what --target latency does: the best, on held-out data, of the solver under the latency itself and other ways
    MACs-aware      the solver under MACs, the share of which is searched until the latency is the same
    uniform         the same share of every group, searched in the same way

All use the same criterion, calibration data, losses and repair, and are evaluated on the same held-out data. And for each task, targets of
MACs, parameters and file size, with what came out. Rows are appended as they are measured; `--threads 1` compares CPU time.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import onnx
import onnxruntime
import scipy

import spa
from models.tasks import TASKS, Task
from spa import api
from spa.budgets.budget import Budget, with_data
from spa.budgets.latency import machine, paired_seconds
from spa.budgets.planner import Planner
from spa.budgets.targets import Target
from spa.criteria.score import Known, score
from spa.criteria.views import Data
from spa.data.evidence import Evidence
from spa.engines import find
from spa.errors import SpaError
from spa.plans.choose import Options, find_space, lowest
from spa.plans.cutting import cut
from spa.proof.check import session
from spa.proof.feeds import one_sample

TRIES = 7  # of the search for an equal latency
CLOSE = 0.015  # of the latency that is asked for


@dataclass(frozen=True)
class Row:
    """One plan. asked, reached: the target and what came out, as shares of the dense model. predicted: latency by the table, 0 if none."""

    task: str
    way: str
    target: str
    asked: float
    reached: float
    predicted: float
    macs: float
    parameters: float
    latency: float
    score: float
    dense: float
    seconds: float
    note: str


class Bench:
    """One task with its scores and losses, which all plans share."""

    def __init__(
        self, name: str, criterion: str, samples: int, limit: int | None, multiple_of: int | str, time_limit: float, seed: int
    ) -> None:
        self.name, self.limit, self.seed, self.time_limit = name, limit, seed, time_limit
        self.task: Task = TASKS[name]
        self.analysis = api.analyze(self.task.model())
        batches = self.task.calibration(samples)
        labels = "labels" if any("labels" in b for b in batches) else None
        self.budget, fit = with_data(self.analysis, Budget(("latency=0.5x",), "solver", time_limit=time_limit, threads=1, repair="obspa"),
                                     Evidence("own", batches, self.analysis.normal.model, False, labels))  # fmt: skip
        assert fit is not None
        self.fit = fit
        groups = self.analysis.groups
        data = Data(fit.model, fit.batches, labels=labels)
        self.scores = score(self.analysis.normal.model.graph, groups, criterion, data=data, seed=seed)
        self.engine = find("cpu", "provider")
        self.space = find_space(groups, Options(0.5, multiple_of=multiple_of), block=self.engine.block())
        self.feeds = one_sample(groups.traced, api.runnable(self.analysis.normal.model, groups.traced))
        self.opened = session(self.analysis.given, threads=1)
        self.dense = self.task.evaluate(self.opened, self.opened, limit=limit)
        self.known: Known | None = None
        planner = self.planner("latency=0.5x", "solver")
        self.known = Known(self.scores, planner.losses(), planner.measured)

    def planner(self, target: str, way: str) -> Planner:
        """A planner of one target that knows the losses."""
        budget = Budget((target,), way, time_limit=self.time_limit, threads=1, repair="obspa", probe=self.budget.probe)
        return Planner(self.analysis, self.space, self.scores, budget, self.fit, known=self.known, seed=self.seed)

    def row(self, way: str, target: str, asked: float, planner: Planner, began: float) -> Row:
        """Decides, cuts, repairs, times and evaluates."""
        decision = planner.decide()
        made = cut(self.analysis, decision.gone, repair="obspa", calibration=self.fit, seed=self.seed)
        dense, small = paired_seconds(self.engine, self.analysis.given, made.model, self.feeds, threads=1)
        found = decision.allocation
        kind = target.partition("=")[0]
        reached = small / dense if kind == "latency" else found.costs[kind] / found.dense[kind]
        timed = decision.record.get("latency", {})
        return Row(self.name, way, target, asked, reached, timed.get("predicted", 0.0) / timed.get("dense", 1.0),
                   found.costs["macs"] / found.dense["macs"], found.costs["params"] / found.dense["params"], small / dense,
                   self.task.evaluate(session(made.model, threads=1), self.opened, limit=self.limit), self.dense,
                   time.perf_counter() - began, f"{found.way}")  # fmt: skip

    def latency_of(self, planner: Planner, share: float) -> float:
        """Measured latency, as a share, of a plan for so many MACs."""
        found = planner._allocated((Target("macs", share, True),))
        model = cut(self.analysis, lowest(self.analysis.groups, self.scores, found.widths)).model
        dense, small = paired_seconds(self.engine, self.analysis.given, model, self.feeds, threads=1)
        return small / dense

    def equal(self, way: str, asked: float) -> float:
        """The share of MACs at which a way comes to the latency that is asked for, from below."""
        planner = self.planner("macs=0.5", way)
        low, high, best = 0.02, 1.0, 0.02
        for _ in range(TRIES):
            middle = (low + high) / 2
            try:
                found = self.latency_of(planner, middle)
            except SpaError:  # less than the smallest widths
                low = middle
                continue
            if found <= asked:
                low = best = middle
                if found >= asked * (1 - CLOSE):
                    break
            else:
                high = middle
        return best

    def rows(self, latencies: Sequence[float], shares: Sequence[float]) -> Iterator[Row]:
        """Everything that is measured of a task."""
        for asked in latencies:
            began = time.perf_counter()
            first = self.row("latency-aware", f"latency={asked}x", asked, self.planner(f"latency={asked}x", "auto"), began)
            yield first
            for way, spread in (("MACs-aware", "solver"), ("uniform", "uniform")):
                began = time.perf_counter()
                share = self.equal(spread, max(first.latency, asked))
                yield self.row(way, f"macs={share:.4f}x", share, self.planner(f"macs={share:.4f}x", spread), began)
        for kind in ("macs", "params", "size"):
            for asked in shares:
                began = time.perf_counter()
                yield self.row("solver", f"{kind}={asked}x", asked, self.planner(f"{kind}={asked}x", "solver"), began)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    columns = ("task", "way", "asked", "reached", "latency (predicted)", "latency", "MACs", "parameters", "score (dense)", "drop")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * 10}"]
    for r in rows:
        predicted = f"{r.predicted:.3f}" if r.predicted else ""
        lines.append(f"| {r.task} | {r.way} | {r.target} | {r.reached:.3f} | {predicted} | {r.latency:.3f} | {r.macs:.3f} | "
                     f"{r.parameters:.3f} | {r.score:.2f} ({r.dense:.2f}) | {abs(r.dense - r.score):.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[Row]:
    """Rows of a file."""
    with path.open(newline="") as opened:
        return [Row(**{f.name: float(r[f.name]) if f.type == "float" else r[f.name] for f in fields(Row)}) for r in csv.DictReader(opened)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """All rows, anew."""
    with path.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow([f.name for f in fields(Row)])
        for row in rows:
            values = (getattr(row, f.name) for f in fields(Row))
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_budget", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--latency", default="0.7,0.5")
    parser.add_argument("--share", default="0.7,0.5")
    parser.add_argument("--criterion", default="obspa-greedy")
    parser.add_argument("--multiple-of", default="auto")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--limit", type=int, help="evaluate on fewer samples")
    parser.add_argument("--time-limit", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/budgets.csv"))
    given = parser.parse_args()
    about = (f"spa {spa.__version__}, onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, scipy {scipy.__version__}, "
             f"CPU provider, 1 thread, {machine()}, seed {given.seed}, {given.criterion}, {given.samples} samples, "
             f"Python {platform.python_version()}")  # fmt: skip
    print(about)
    rows = read(given.output) if given.output.is_file() else []
    for name in given.tasks:
        width = given.multiple_of if given.multiple_of == "auto" else int(given.multiple_of)
        bench = Bench(name, given.criterion, given.samples, given.limit, width, given.time_limit, given.seed)
        for row in bench.rows([float(x) for x in given.latency.split(",") if x], [float(x) for x in given.share.split(",") if x]):
            rows.append(row)
            print(row, flush=True)
            write(given.output, rows)
    given.output.with_suffix(".md").write_text(f"# Budgets\n\n{about}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
