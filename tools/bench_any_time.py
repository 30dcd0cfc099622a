"""When to prune? `python -m tools.bench_any_time -o docs/any_time.csv --work FOLDER`: ResNet-20 on CIFAR-10, at the same MACs.

before    a fresh network, pruned by a criterion at initialisation, then trained
between   a lottery ticket (train, prune, rewind to the first weights, two rounds), and a gradual cubic schedule (a bit after each epoch)
after     the trained network, pruned and repaired, without training and with

Rows are appended to the CSV file as they are measured, and what is in it already is not measured again; models, plans and checkpoints of
trainings lie in FOLDER, so that a run that was killed goes on. `--network resnet56 --reference FILE.onnx` prunes another network, and
`--rows after` measures only rows that begin so. At the end the table (Markdown) is written beside the CSV file.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import spa
from models.cifar import data
from models.extras import need
from models.tasks import TASKS
from tools.schedule import Work, gradual, lottery

HELD = 2000  # training images that choose the best epoch and are never trained on
CALIBRATION = 512
BATCH = 128
SCRATCH = {"optimizer": "sgd", "rate": 0.1, "decay": 5e-4}  # of a training that begins with fresh weights
TUNING = {"optimizer": "sgd", "rate": 0.02, "decay": 5e-4}
INTRO = """# When to prune

`python -m tools.bench_any_time` with {versions}, one thread, CIFAR-10, accuracy on its 10,000 test images; how each of the four times is
done by hand is in [recipes.md](recipes.md). Epochs are few, as the machine had two cores: what begins with fresh weights has seen {epochs}
epochs of 48,000 images here and is far from converged, so that the rows before and between training compare with *fresh, trained*,
the same network unpruned after as many epochs, not with the reference, and differences of a point among them are noise (one seed).
Rows after training begin with the reference. Of the 50,000 training images 2,000 choose the best epoch (the reference was trained on
them). ResNet-56: `--network resnet56 --share 0.47 --epochs 8`, and [the log of its fine-tuning](any_time_resnet56.log), which judges on
those 2,000; its reference had 22 epochs, so that eight more are part of what it gains.

"""
AT_START = ("l2", "snip", "synflow", "crop", "grasp")


@dataclass(frozen=True)
class Row:
    """One measurement. macs, parameters: dense over pruned. before: epochs that were trained before the last cut; after: since then.

    accuracy: of the 10,000 test images, in percent. seconds: of training.
    """

    network: str
    when: str
    method: str
    before: int
    after: int
    macs: float
    parameters: float
    accuracy: float
    seconds: float


class Bench:
    """The measurements, the file that they are in, and the folder of what they are made of."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.path, self.work, self.epochs, self.share = given.output, given.work, given.epochs, given.share
        self.network, self.seed, self.threads = given.network, given.seed, given.threads
        self.reference = Path(given.reference) if given.reference else TASKS[given.network].model()
        self.rows = list(read(self.path)) if self.path.is_file() else []
        self.seconds = 0.0
        self.work.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------ data and networks

    @cached_property
    def images(self) -> dict[str, list[dict[str, Any]]]:
        """Batches to train on, to choose by, to calibrate on, and to test on."""
        images, labels = data.train()
        x, y = data.normalized(np.asarray(images)), labels
        held, truth = data.test()
        return {"train": batches(x[:-HELD], y[:-HELD], BATCH), "held": batches(x[-HELD:], y[-HELD:], 500),
                "calibration": batches(x[:CALIBRATION], y[:CALIBRATION], 64),
                "test": batches(data.normalized(np.asarray(held)), truth, 500)}  # fmt: skip

    @cached_property
    def fresh(self) -> Path:
        """The network before its training."""
        from models.cifar.networks import NETWORKS
        from models.cifar.train import export

        path = self.work / "fresh.onnx"
        if not path.is_file():
            need("torch").manual_seed(self.seed)
            export(NETWORKS[self.network]().eval(), path)
        return path

    def accuracy(self, model: Path) -> float:
        """Share of the test images that a model labels right, in percent."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        opened = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        right = sum(int((opened.run(None, {"image": b["image"]})[0].argmax(1) == b["labels"]).sum()) for b in self.images["test"])
        return 100 * right / sum(len(b["labels"]) for b in self.images["test"])

    def trained(self, name: str, model: Path, epochs: int, how: Mapping[str, Any], teacher: Path | None = None) -> Path:
        """A model after so many epochs, in the folder under a name; the time goes to `seconds`."""
        path, clock = self.work / f"{name}.onnx", self.work / f"{name}.seconds"
        if not path.is_file():
            began = time.perf_counter()
            settings = {"batch": BATCH, "augment": "images", "precision": "bfloat16", "clip": 5.0, "seed": self.seed, **how}
            found = spa.finetune(
                model, self.images["train"], teacher=teacher, evaluate=self.images["held"], metric="accuracy",
                training=spa.Training(epochs=epochs, **settings), checkpoint=self.work / f"{name}.pt",
                tell=lambda e: print(f"  {name} {e.number}/{epochs}: {'' if e.loss is None else f'loss {e.loss:.4f}, '}{e.value:.2f} %",
                                     flush=True),
            )  # fmt: skip
            clock.write_text(f"{time.perf_counter() - began:.0f}")
            found.save(path)
        self.seconds += float(clock.read_text())
        return path

    def from_scratch(self, name: str, model: Path, epochs: int, rate: float, seed: int) -> Path:
        """The same as fresh weights are trained, at a share of the rate."""
        return self.trained(name, model, epochs, {**SCRATCH, "rate": 0.1 * rate, "seed": self.seed + seed})

    def pruned(self, name: str, model: Path, share: float, allocation: str = "auto", **how: Any) -> Path:
        """A model at a share of its own MACs, in the folder under a name, and its plan."""
        path = self.work / f"{name}.onnx"
        if not path.is_file():
            target = spa.Budget((f"macs={share:.6f}",), allocation)
            result = spa.prune(model, target=target, calibration=self.images["calibration"], seed=self.seed, **how)
            result.save(path, plan=self.plan(name))
        return path

    def plan(self, name: str) -> Path:
        """The plan of a model that `pruned` made."""
        return self.work / f"{name}.plan.json"

    # ------------------------------------------------------------------ the four times

    def measure(self, wanted: str) -> None:
        """All rows whose time and method begin with `wanted`, as far as they are not there yet."""
        done = {(r.network, r.when, r.method) for r in self.rows}
        for (when, method), make in self.ways().items():
            if f"{when} {method}".startswith(wanted) and (self.network, when, method) not in done:
                self.seconds = 0.0
                model, before, after = make()
                self.add(when, method, model, before, after)

    def ways(self) -> dict[tuple[str, str], Callable[[], tuple[Path, int, int]]]:
        """(time, method) -> what makes the model, and tells its epochs before and after the last cut."""
        n = self.epochs
        found: dict[tuple[str, str], Callable[[], tuple[Path, int, int]]] = {
            ("dense", "reference"): lambda: (self.reference, self.reference_epochs(), 0),
            ("after", "obspa-greedy, repair"): lambda: (self.after(), self.reference_epochs(), 0),
            ("after", "obspa-greedy, repair, fine-tuned"): lambda: (
                self.trained("after.tuned", self.after(), n, TUNING, self.reference), self.reference_epochs(), n),
            ("after", "obspa-greedy, repair, fine-tuned on labels alone"): lambda: (
                self.trained("after.labels", self.after(), n, TUNING), self.reference_epochs(), n),
            ("dense", "fresh, trained"): lambda: (self.trained("fresh.trained", self.fresh, n, SCRATCH), 0, n),
        }  # fmt: skip
        for criterion in AT_START:
            found["before", criterion] = partial(self.before, criterion)
        work = Work(self.work, self.from_scratch, partial(self.pruned, criterion="l2", allocation="global"))
        found["between", "lottery ticket, 2 rounds"] = lambda: (
            lottery(work, self.fresh, share=self.share, rounds=2, epochs=n), 2 * n, n)  # fmt: skip
        found["between", "cubic schedule"] = lambda: (gradual(work, self.fresh, share=self.share, epochs=n), n - 1, 1)
        return found

    def before(self, criterion: str) -> tuple[Path, int, int]:
        """A fresh network, pruned, then trained."""
        small = self.pruned(criterion, self.fresh, self.share, criterion=criterion, allocation="global")
        return self.trained(f"{criterion}.trained", small, self.epochs, SCRATCH), 0, self.epochs

    def after(self) -> Path:
        """The trained network, pruned and repaired."""
        return self.pruned("after", self.reference, self.share, criterion="obspa-greedy", repair="obspa")

    def reference_epochs(self) -> int:
        """Epochs of the reference network's log."""
        log = Path(__file__).parents[1] / "models" / "cifar" / f"{self.network}.csv"
        log = log if log.is_file() else self.reference.with_suffix(".csv")
        return len(log.read_text().splitlines()) - 1

    # ------------------------------------------------------------------ the file

    def add(self, when: str, method: str, model: Path, before: int, after: int) -> None:
        """Measures a model and keeps the row, in the file too."""
        dense, left = (spa.count(spa.analyze(m).groups) for m in (self.reference, model))
        row = Row(self.network, when, method, before, after, dense.macs / left.macs, dense.parameters / left.parameters,
                  self.accuracy(model), self.seconds)  # fmt: skip
        self.rows.append(row)
        new = not self.path.is_file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            if new:
                writer.writerow([f.name for f in fields(Row)])
            writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in (getattr(row, f.name) for f in fields(Row))])
        print(f"{row.network} {when}, {method}: {row.accuracy:.2f} % at MACs ÷ {row.macs:.2f}, {row.seconds:.0f} s", flush=True)


def batches(images: Any, labels: Any, size: int) -> list[dict[str, Any]]:
    """Feeds of so many samples, with labels."""
    return [{"image": images[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(images), size)]


def read(path: Path) -> Iterator[Row]:
    """Rows of a file."""
    with path.open(newline="") as opened:
        for found in csv.DictReader(opened):
            yield Row(**{f.name: {"int": int, "float": float, "str": str}[str(f.type)](found[f.name]) for f in fields(Row)})


def markdown(rows: list[Row]) -> str:
    """The table."""
    order = ["dense", "before", "between", "after"]
    lines = ["| network | when | method | epochs before the last cut | epochs after it | MACs ÷ | parameters ÷ | accuracy % |",
             "|---|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r.network, order.index(r.when), -r.accuracy)):
        lines.append(f"| {row.network} | {row.when} | {row.method} | {row.before} | {row.after} | {row.macs:.2f} | {row.parameters:.2f} | "
                     f"{row.accuracy:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_any_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--reference", metavar="FILE.onnx", help="the trained network; by default the one in models/cifar")
    parser.add_argument("--epochs", type=int, default=3, help="of each training")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs that is left")
    parser.add_argument("--rows", default="", metavar="BEGIN", help="only rows whose time and method begin so")
    parser.add_argument("--work", type=Path, default=Path("any_time"), metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/any_time.csv"))
    given = parser.parse_args()
    if given.threads:
        need("torch").set_num_threads(given.threads)
    bench = Bench(given)
    bench.measure(given.rows)
    versions = f"spa {spa.__version__}, torch {need('torch').__version__}, onnxruntime {onnxruntime.__version__}"
    text = INTRO.format(versions=versions, epochs=given.epochs) + markdown(bench.rows)
    given.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
