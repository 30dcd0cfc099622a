"""Pruning between trainings: `python -m tools.schedule MODEL --way lottery --data train.npz --target macs=0.5 -o FOLDER`.

lottery   train, prune, put what is left back to its first weights, train again, in so many rounds (Frankle & Carbin 2019, arXiv
          1803.03635): a plan of the trained network cuts the one before training
cubic     train an epoch, cut a bit, train an epoch, …: at time t of 0 … 1 the share that is gone is 1 − (1 − t)³ of what goes in the end
          (Zhu & Gupta 2017, arXiv 1710.01878)

MODEL holds the weights to begin with. Every model and plan stays in FOLDER under the name of its round; given again, it goes on there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import spa
from spa.budgets.targets import read_targets


@dataclass(frozen=True)
class Work:
    """How steps are carried out, all of whose results are files in a folder.

    train: (name, model, epochs, rate as a share of the first, what the seed is moved by) -> the trained model. cut: (name, model, share of
    its cost) -> the pruned one, whose plan lies beside it under `plan_of(name)`.
    """

    folder: Path
    train: Callable[[str, Path, int, float, int], Path]
    cut: Callable[[str, Path, float], Path]

    def plan_of(self, name: str) -> Path:
        """Where the plan of a cut lies."""
        return self.folder / f"{name}.plan.json"


def lottery(work: Work, fresh: Path, *, share: float, rounds: int, epochs: int) -> Path:
    """The last ticket, trained: `share` of the cost is left. Each round trains anew from the first weights of what is left."""
    start, trained = fresh, work.train("fresh.trained", fresh, epochs, 1.0, 0)
    for number in range(1, rounds + 1):
        name = f"ticket{number}"
        work.cut(name, trained, share ** (1 / rounds))
        rewound = work.folder / f"{name}.rewound.onnx"
        if not rewound.is_file():
            spa.apply(start, work.plan_of(name), other_weights=True).save(rewound)
        start, trained = rewound, work.train(f"{name}.trained", rewound, epochs, 1.0, 0)
    return trained


def gradual(work: Work, fresh: Path, *, share: float, epochs: int) -> Path:
    """A cut after each epoch but the last, on a cubic schedule; the rate falls along a half cosine over all epochs."""
    model, left = fresh, 1.0
    for number in range(1, epochs + 1):
        model = work.train(f"cubic{number}", model, 1, 0.5 * (1 + math.cos(math.pi * (number - 1) / epochs)), number)
        if number < epochs:
            asked = left_at(number / (epochs - 1), share)
            model, left = work.cut(f"cubic{number}.cut", model, asked / left), asked
    return model


def left_at(t: float, share: float) -> float:
    """The share that is left at time t of 0 … 1, `share` at the end."""
    return 1 - (1 - share) * (1 - (1 - t) ** 3)


def work_in(folder: Path, given: argparse.Namespace, kind: str) -> Work:
    """The steps as the command line asks for them. kind: of the cost that is cut."""

    def train(name: str, model: Path, epochs: int, rate: float, seed: int) -> Path:
        path = folder / f"{name}.onnx"
        if not path.is_file():
            training = spa.Training(epochs=epochs, rate=given.rate * rate, decay=given.decay, seed=given.seed + seed, batch=given.batch,
                                    optimizer=given.optimizer, augment=given.augment, precision=given.precision)  # fmt: skip
            found = spa.finetune(model, given.data, evaluate=given.evaluate, training=training, checkpoint=folder / f"{name}.pt",
                                 tell=lambda e: print(f"{name}, epoch {e.number} of {epochs}: {e.value:.2f}", flush=True))  # fmt: skip
            found.save(path)
        return path

    def cut(name: str, model: Path, share: float) -> Path:
        path = folder / f"{name}.onnx"
        if not path.is_file():
            budget = spa.Budget((f"{kind}={share:.6f}",), given.allocation)
            result = spa.prune(model, target=budget, criterion=given.criterion, calibration=given.data, seed=given.seed)
            result.save(path, plan=folder / f"{name}.plan.json")
            print(f"{name}: {result.after.macs / result.before.macs:.1%} of the MACs", flush=True)
        return path

    return Work(folder, train, cut)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.schedule", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--way", choices=["lottery", "cubic"], default="lottery")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="to train on, with an entry `labels`")
    parser.add_argument("--evaluate", metavar="SOURCE", help="to choose the best epoch by; a quarter of --data by default")
    parser.add_argument("--target", default="macs=0.5", metavar="COST=SHARE")
    parser.add_argument("--rounds", type=int, default=2, help="of the lottery")
    parser.add_argument("--epochs", type=int, default=10, help="of each training; of all, with the cubic schedule")
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--allocation", default="global")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--decay", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--augment", default="none")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args()
    try:
        (target,) = read_targets([given.target])
        if not target.relative:
            parser.error(f"--target {given.target} is no share: give one such as macs=0.5")
        given.output.mkdir(parents=True, exist_ok=True)
        work = work_in(given.output, given, target.kind)
        if given.way == "lottery":
            made = lottery(work, given.model, share=target.value, rounds=given.rounds, epochs=given.epochs)
        else:
            made = gradual(work, given.model, share=target.value, epochs=given.epochs)
    except spa.SpaError as error:
        raise SystemExit(f"tools.schedule: {error}") from None
    print(f"wrote {made}")


if __name__ == "__main__":
    main()
