"""Quality: a network evaluated against the dense one on data that were not calibrated on, and each group's loss measured alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from spa.budgets.metrics import METRICS, Metric, measure
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.graph.state import feeds_for
from spa.proof.check import run_session, session
from spa.proof.feeds import Feeds
from spa.storage.store import Model

Array = NDArray[np.float64]

HELD = 0.25  # of the batches, where no data to evaluate on are given
RUNGS = 5  # widths of a group that are measured at most; those between are interpolated


class TooFew(BadOption):
    """There are too few samples to hold any out."""


class Network:
    """A model on ONNX Runtime's CPU provider, as metrics want it."""

    def __init__(self, model: Model, threads: int = 0) -> None:
        self.session, self.narrowed = session(model, threads=threads), model.narrowed

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name."""
        return run_session(self.session, feeds_for(self.narrowed, feeds))


@dataclass(frozen=True)
class Judge:
    """Evaluates pruned models. batches: held-out data. dense: the dense network's outputs on them. value: its own figure."""

    metric: Metric
    batches: Sequence[Feeds]
    labels: str | None
    output: str
    dense: Sequence[Feeds] = field(repr=False)
    value: float
    threads: int = 0

    @property
    def samples(self) -> int:
        """How many samples are evaluated on."""
        return sum(next(iter(b.values())).shape[0] for b in self.batches if b)

    def __call__(self, model: Model) -> float:
        """The metric of a model."""
        return measure(self.metric, Network(model, self.threads), self.dense, self.batches, self.output, self.labels)

    def drop(self, model: Model) -> float:
        """How much worse a model is than the dense one."""
        return self.metric.drop(self.value, self(model))


def judge(model: Model, metric: Metric, evidence: Evidence, *, output: str | None = None, threads: int = 0) -> Judge:
    """A judge for a dense model and data. `output`: which one is looked at, by default the first. Raises BadOption."""
    network = Network(model, threads)
    names = [o.name for o in network.session.get_outputs()]
    if output is not None and output not in names:
        raise BadOption(f"--output-name: the model has no output {output!r}; it has: {', '.join(names)}.")
    chosen = output or names[0]
    if not evidence.batches and metric.whole is None:
        raise BadOption(f"--metric {metric.name} looks at outputs on data: give some with --calibration or --evaluate.")
    batches = list(evidence.batches)
    dense = [{chosen: network.run({n: v for n, v in b.items() if n != evidence.labels})[chosen]} for b in batches]
    value = measure(metric, network, dense, batches, chosen, evidence.labels)
    return Judge(metric, batches, evidence.labels, chosen, dense, value, threads)


def split(evidence: Evidence) -> tuple[Evidence, Evidence]:
    """Data to fit on, and data to evaluate on: the last quarter of the batches, or of the only batch."""
    batches = list(evidence.batches)
    if len(batches) > 1:
        cut = len(batches) - max(1, round(HELD * len(batches)))
        return replace(evidence, batches=batches[:cut]), replace(evidence, batches=batches[cut:])
    rows = {n: len(v) for n, v in batches[0].items() if v.ndim} if batches else {}
    size = min(rows.values(), default=0)
    if size < 4 or len(set(rows.values())) > 1:
        raise TooFew("There are too few calibration data to hold some out for --metric: give more, or others with --evaluate.")
    cut = size - max(1, round(HELD * size))
    return (replace(evidence, batches=[{n: v[:cut] for n, v in batches[0].items()}]),
            replace(evidence, batches=[{n: v[cut:] for n, v in batches[0].items()}]))  # fmt: skip


def first(evidence: Evidence, samples: int) -> Evidence:
    """About so many of the samples: whole batches, or a part of the first."""
    taken: list[Feeds] = []
    count = 0
    for batch in evidence.batches:
        size = max((len(v) for v in batch.values() if v.ndim), default=1)
        if taken and count + size > samples:
            break
        free = len({len(v) for v in batch.values() if v.ndim}) == 1 and len(evidence.batches) > 1
        taken.append({n: v[:samples] for n, v in batch.items()} if not taken and free and size > samples else batch)
        count += size
    return replace(evidence, batches=taken)


def automatic(name: str | None, labels: str | None) -> Metric:
    """The metric that is meant where none is named: accuracy where there are labels, else the distance to the dense outputs."""
    return METRICS[name] if name is not None and name in METRICS else METRICS["accuracy" if labels is not None else "kl"]


def rungs_to_measure(ladder: NDArray[np.int64], most: int = RUNGS) -> NDArray[np.int64]:
    """Which rungs below the top are measured: the lowest, the one below the top, and some spread between them."""
    below = len(ladder) - 1
    return np.unique(np.linspace(0, below - 1, min(most, below)).round().astype(np.int64)) if below else np.zeros(0, np.int64)


def measured_losses(
    ladders: Sequence[NDArray[np.int64]],
    loss: Callable[[int, int], float],
    *,
    guesses: Sequence[Array],
    seconds: float = np.inf,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[Array], int]:
    """Loss on every rung of every group, measured on some of them: `loss(group, width)` with all other groups whole.

    Between measured rungs the loss follows the guess (a loss from scores), scaled to meet what was measured. The rungs are measured coarse
    first, so that when `seconds` are over every group has about as many; those without any keep the guess in the others' proportion.
    Returns the losses and how many were measured.
    """
    plans = [[int(r) for r in _coarse_first(rungs_to_measure(x))] for x in ladders]
    order = [(g, p[step]) for step in range(max(map(len, plans), default=0)) for g, p in enumerate(plans) if step < len(p)]
    found: list[dict[int, float]] = [{} for _ in ladders]
    began = time.perf_counter()
    done = 0
    for g, rung in order:
        if done and time.perf_counter() - began > seconds:
            break
        found[g][rung] = max(loss(g, int(ladders[g][rung])), 0.0)
        done += 1
        tell(done, len(order))
    measured = [v / max(guess[r], 1e-30) for f, guess in zip(found, guesses, strict=True) for r, v in f.items()]
    typical = float(np.median(measured)) if measured else 1.0
    return [_between(guess, f, typical) for guess, f in zip(guesses, found, strict=True)], done


def _coarse_first(rungs: NDArray[np.int64]) -> Iterable[int]:
    """The middle, then the ends, then what lies between."""
    last = len(rungs) - 1

    def turn(i: int) -> tuple[int, int]:
        return (0 if i == last // 2 else 1 if i in (0, last) else 2), i

    return [int(rungs[i]) for i in sorted(range(len(rungs)), key=turn)]


def _between(guess: Array, found: dict[int, float], typical: float) -> Array:
    """The guess, scaled by what was measured over what was guessed, the scale interpolated between rungs; never rising with width."""
    if not found:
        return guess * typical
    known = sorted(found)
    scale = np.interp(np.arange(len(guess)), known, [found[r] / max(guess[r], 1e-30) for r in known])
    losses = guess * scale
    losses[-1] = 0.0
    return np.asarray(np.maximum.accumulate(losses[::-1])[::-1])
