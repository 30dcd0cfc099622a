"""Timing: models raced against each other in one process, rounds interleaved, so that what disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from spa.check import session
from spa.feeds import Feeds
from spa.store import Model


@dataclass(frozen=True)
class Lap:
    """Seconds of one run of a model: median and quartiles over all rounds; ratio: median of this over the first, round by round."""

    name: str
    median: float
    low: float
    high: float
    ratio: float


@dataclass(frozen=True)
class Race:
    """Laps of all models, and what they ran on."""

    laps: tuple[Lap, ...]
    rounds: int
    threads: int
    provider: str
    version: str


def race(models: Mapping[str, Model], feeds: Feeds | Sequence[Feeds], *, rounds: int = 20, seconds: float = 10.0, threads: int = 0) -> Race:
    """Times one run of each model by turns, on ONNX Runtime's CPU provider.

    Stops after `rounds` rounds or about `seconds`, whichever is first, but not before 3 rounds. `feeds` is one for all or one each.
    """
    sessions = {name: session(model, threads=threads) for name, model in models.items()}
    each = list(feeds) if isinstance(feeds, Sequence) else [feeds] * len(models)
    given = []
    for opened, feed in zip(sessions.values(), each, strict=True):
        wanted = {i.name for i in opened.get_inputs()}
        given.append({k: v for k, v in feed.items() if k in wanted})
        opened.run(None, given[-1])  # warm up
    times = np.zeros((0, len(sessions)))
    start = time.perf_counter()
    while len(times) < rounds and (len(times) < 3 or time.perf_counter() - start < seconds):
        lap = []
        for opened, feed in zip(sessions.values(), given, strict=True):
            before = time.perf_counter()
            opened.run(None, feed)
            lap.append(time.perf_counter() - before)
        times = np.vstack([times, lap])
    ratios = times / times[:, :1]
    laps = tuple(
        Lap(
            name,
            float(np.median(times[:, i])),
            float(np.quantile(times[:, i], 0.25)),
            float(np.quantile(times[:, i], 0.75)),
            float(np.median(ratios[:, i])),
        )
        for i, name in enumerate(sessions)
    )
    return Race(laps, len(times), threads, "CPUExecutionProvider", ort.__version__)
