"""Timing: models raced against each other, rounds interleaved, so that what disturbs one disturbs all.

All models are loaded and warm before the first round. A round runs each of them once, in an order that is drawn anew. With one thread on
an engine where that thread does all the work, its CPU time is what is compared (other programs on the machine do not count in it), else
the time on the wall. The first model also runs against itself, loaded twice: if that shows a difference, it is the machine's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.engines.table import Engine, Placement, Settings, find
from spa.errors import BadOption
from spa.proof.feeds import Feeds
from spa.stages import collector_paused
from spa.storage.store import Model
from spa.timing.racers import Racer
from spa.timing.ratios import LEAST, Ratio, paired, verdict

FEWEST = 3  # rounds, however long they take
WARM_UPS = 5  # runs of each model after the first
WARM_SHARE = 0.2  # of the seconds, which warming up may take
TWICE = 1 << 30  # bytes; of a larger model no second copy is loaded, it runs twice a round instead


@dataclass(frozen=True)
class Lap:
    """Seconds of one run of a model.

    median, low, high: median and quartiles of the figure that is compared (see `Race.primary`). ratio: median of this over the first
    model, round by round; ratio_low, ratio_high: its 95 % interval; verdict: what that says ("" for the first model). cpu, wall: medians;
    cpu is None where it was not measured. load, first: seconds of loading and of the first run. memory: bytes by which the process grew
    meanwhile, None where not known. placement: where the nodes ran.
    """

    name: str
    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    verdict: str = ""
    cpu: float | None = None
    wall: float = math.nan
    wall_ratio: float = math.nan
    load: float = math.nan
    first: float = math.nan
    memory: int | None = None
    placement: Placement | None = None


@dataclass(frozen=True)
class Race:
    """Laps of all models, and what they ran on.

    provider: the engine's name, kind: whether it is a provider of ONNX Runtime or a runtime, version: its own. primary: "cpu" or "wall",
    the time that is compared. itself: the first model against itself, None where that was not tried. threads: 0 for the engine's choice.
    """

    laps: tuple[Lap, ...]
    rounds: int
    threads: int
    provider: str
    version: str
    kind: str = "provider"
    primary: str = "wall"
    itself: Ratio | None = None
    seed: int = 0

    @property
    def noisy(self) -> bool:
        """Whether the first model differs from itself, which says that the machine is too noisy for differences of that size."""
        return self.itself is not None and self.rounds >= LEAST and self.itself.offset > 0


def check_timed(engine: Engine) -> None:
    """Raises BadOption, with the reason, if the times of an engine must not be reported."""
    if engine.timed:
        raise BadOption(f"Models can't be timed with {engine.name}: {engine.timed.rstrip('.')}.")


@collector_paused()
def race(
    models: Mapping[str, Model],
    feeds: Feeds | Sequence[Feeds],
    *,
    rounds: int = 50,
    seconds: float = 10.0,
    threads: int = 1,
    seed: int = 0,
    engine: Engine | str = "cpu",
    options: Mapping[str, str] | None = None,
    self_check: bool = True,
) -> Race:
    """Times one run of each model by turns.

    Parameters
    ----------
    models
        By name; all are compared with the first.
    feeds
        Inputs: one for all, or one each.
    rounds, seconds
        Stops after so many rounds or about so many seconds of them, whichever is first, but not before 3 rounds.
    threads
        1 compares CPU time where the engine allows it; 0 is the engine's own choice, and like more than 1 compares wall time.
    seed
        Of the order in each round, and of the intervals.
    engine, options
        What runs the models, an engine or its name in `spa.engines`, and its own options.
    self_check
        Whether the first model also runs against itself.

    Raises
    ------
    BadOption
        If the engine is not there, or its times mean something else than its users would think.
    UnsupportedModel
        If it does not load or run one of the models.
    """
    chosen = find(engine) if isinstance(engine, str) else engine
    check_timed(chosen)
    if not models:
        raise BadOption("There is no model to time: give one or more.")
    each = list(feeds) if isinstance(feeds, Sequence) else [feeds] * len(models)
    settings = Settings(threads, options or {})
    entries = [(name, model, fed) for (name, model), fed in zip(models.items(), each, strict=True)]
    with ExitStack() as stack:

        def ready(name: str, model: Model, fed: Feeds) -> Racer:
            racer = Racer(name, model, fed, chosen, settings)
            stack.callback(racer.close)
            return racer

        # The twin comes first: it also bears what the first model of a process always pays for, so that load times can be compared.
        twin = ready(*entries[0]) if self_check and entries[0][1].nbytes < TWICE else None
        racers = [ready(*entry) for entry in entries]
        running = [*racers, *([twin or racers[0]] if self_check else [])]
        times = _times(running, rounds, seconds, seed)
    cpu_counts = chosen.thread_time and threads == 1 and bool((times[:, :, 1] > 0).all())
    compared = times[:, :, 1] if cpu_counts else times[:, :, 0]
    itself = paired(compared[:, -1], compared[:, 0], seed=seed) if self_check else None
    laps = tuple(_lap(racer, times[:, i], times[:, 0], cpu_counts, itself, seed, i == 0) for i, racer in enumerate(racers))
    return Race(laps, len(times), threads, chosen.name, chosen.version(), chosen.kind, "cpu" if cpu_counts else "wall", itself, seed)


def _times(racers: Sequence[Racer], rounds: int, seconds: float, seed: int) -> NDArray[np.float64]:
    """(rounds, racers, 2) seconds of wall and CPU, after warming up."""
    start = time.perf_counter()
    for _ in range(WARM_UPS):
        if time.perf_counter() - start >= WARM_SHARE * seconds:
            break
        for racer in racers:
            racer.lap()
    rng = np.random.default_rng(seed)
    times: list[NDArray[np.float64]] = []
    start = time.perf_counter()
    while len(times) < rounds and (len(times) < FEWEST or time.perf_counter() - start < seconds):
        lap = np.zeros((len(racers), 2))
        for i in rng.permutation(len(racers)):
            lap[i] = racers[i].lap()
        times.append(lap)
    return np.stack(times)


def _lap(
    racer: Racer, own: NDArray[np.float64], first: NDArray[np.float64], cpu_counts: bool, itself: Ratio | None, seed: int, is_first: bool
) -> Lap:
    """The figures of one model; own, first: (rounds, 2) seconds of wall and CPU."""
    which = int(cpu_counts)
    ratio = Ratio(1.0, 1.0, 1.0) if is_first else paired(own[:, which], first[:, which], seed=seed)
    low, median, high = (float(q) for q in np.quantile(own[:, which], (0.25, 0.5, 0.75)))
    says = "" if is_first else verdict(ratio, len(own), offset=itself.offset if itself else 0.0)
    return Lap(
        racer.name, median, low, high, ratio.middle, ratio.low, ratio.high, says,
        cpu=float(np.median(own[:, 1])) if cpu_counts else None,
        wall=float(np.median(own[:, 0])),
        wall_ratio=paired(own[:, 0], first[:, 0], seed=seed).middle,
        load=racer.load, first=racer.first, memory=racer.memory, placement=racer.placement,
    )
