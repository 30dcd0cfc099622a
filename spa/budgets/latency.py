"""Latency as a function of widths: a table of segments' times, measured on the engine itself, and the sum of what it says.

    widths of a few pruned variants  ->  segments  ->  seconds each, kept on disk  ->  a fit per kind of segment  ->  seconds of any widths

Each variant is really pruned and cut into segments (`spa.budgets.segments`), each segment is loaded on the engine and timed once for all
models that have the same. Between the measured widths a segment's time is a sum with positive weights of what it computes and moves: a
constant, MACs, MACs of the widths rounded up to the engine's block, elements of activations and of weights. Timed alone, segments cost more
or less than inside the model, which may keep its own layout between them; so the sum is scaled to the variants' own latencies.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from spa.budgets.allocate import Costs
from spa.budgets.costs import Lengths, Products, Term
from spa.budgets.segments import Segment, digest, find_segments, piece
from spa.criteria.score import Scores
from spa.engines.table import Engine, Settings
from spa.errors import BadOption
from spa.graph.analysis import Analysis
from spa.graph.count import macs_terms
from spa.graph.groups import Groups
from spa.graph.state import feeds_for
from spa.plans.choose import Space, lowest, structure
from spa.plans.cutting import cut
from spa.proof.check import run
from spa.proof.feeds import Feeds, one_sample
from spa.proof.prove import runnable
from spa.stages import Stage, quiet
from spa.statistics.stepper import tapped
from spa.storage.files import write_files
from spa.storage.store import Model

Array = NDArray[np.float64]

VERSION = 1
VARIANTS = 8  # pruned models whose segments are timed, the dense one not counted
LEAST_RUNS, MOST_RUNS, ENOUGH = 5, 40, 0.03  # runs of a segment, and seconds after which no more are made
WHOLE = 20  # runs of a whole model at a time


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of one run, for many candidate widths at once.

    engine, threads: where it was measured. clock: "cpu" or "wall". dense: measured seconds of the dense model. error: median over the
    measured variants of |predicted / measured - 1|. scale: of what segments take alone (their constant parts, and the rest) to what they
    take in the model. measured: segments timed for this model, known: found on disk.
    """

    engine: str
    version: str
    threads: int
    clock: str
    dense: float
    error: float
    scale: tuple[float, float]
    measured: int
    known: int
    _features: _Features = field(repr=False)
    _weights: Sequence[Array] = field(repr=False)

    def seconds(self, widths: Array) -> Array:
        """(candidates,) for (candidates, groups) widths."""
        return np.asarray(_sums(self._features.of(widths), self._weights) @ np.array(self.scale))


class _Features:
    """What segments compute and move, as functions of widths: (candidates, segments, 5)."""

    def __init__(self, groups: Groups, segments: Sequence[Segment], block: int) -> None:
        self.block = block
        self.lengths = lengths = Lengths(groups)
        one = lengths.constant(1)
        constants = groups.traced.constants
        self._parts: list[tuple[Products, NDArray[np.int64]]] = []
        macs, moved, stored = [], [], []
        for number, segment in enumerate(segments):
            macs += [(number, Term(f, lengths.dims(n, d))) for n in segment.nodes for f, d in macs_terms(n)]
            values = [t.name for n in segment.nodes for t in n.node.outputs if t.name] + list(segment.inputs)
            moved += [(number, Term(1, lengths.value(v))) for v in values if v not in constants]
            weights = {t.name for n in segment.nodes for t in n.node.inputs if t.name in constants}
            stored += [(number, Term(1, lengths.value(v))) for v in sorted(weights)]
        for kind in (macs, moved, stored):
            self._parts.append((Products([t for _, t in kind], one), np.array([n for n, _ in kind], np.int64)))
        self.count = len(segments)
        size = lengths.sizes
        self.units = [max(float(self._of(p, lengths.evaluate(size[None]), o).max()), 1.0) for p, o in self._parts]

    def _of(self, products: Products, lengths: Array, owner: NDArray[np.int64]) -> Array:
        found = np.zeros((len(lengths), self.count))
        np.add.at(found.T, owner, products.evaluate(lengths).T)
        return found

    def of(self, widths: Array) -> Array:
        """(candidates, segments, 5): 1, MACs, MACs of padded widths, elements of activations and of weights; in units of their own."""
        widths = np.asarray(widths, np.float64)
        plain = self.lengths.evaluate(widths)
        padded = self.lengths.evaluate(np.minimum(np.ceil(widths / self.block) * self.block, np.maximum(self.lengths.sizes, widths)))
        macs, moved, stored = (self._of(p, plain, o) / u for (p, o), u in zip(self._parts, self.units, strict=True))
        rounded = self._of(self._parts[0][0], padded, self._parts[0][1]) / self.units[0]
        return np.stack([np.ones_like(macs), macs, rounded, moved, stored], axis=2)


class Clock:
    """Seconds of one call: CPU time of this thread where that is all the work, else time on the wall."""

    def __init__(self, engine: Engine, threads: int) -> None:
        self.name = "cpu" if engine.thread_time and threads == 1 and not engine.apart else "wall"
        self._now: Callable[[], int] = time.thread_time_ns if self.name == "cpu" else time.perf_counter_ns

    def time(self, call: Callable[[], None], least: int = LEAST_RUNS, most: int = MOST_RUNS, enough: float = ENOUGH) -> float:
        """Lower quartile over some runs, two warm-ups left out."""
        call()
        call()
        times: list[int] = []
        began = time.perf_counter()
        while len(times) < most and (len(times) < least or time.perf_counter() - began < enough):
            before = self._now()
            call()
            times.append(self._now() - before)
        return float(np.quantile(times, 0.25)) * 1e-9


class Times:
    """Segments' times on disk: one file for an engine, its version, threads and this machine. A file of another version is begun anew."""

    def __init__(self, engine: Engine, threads: int, clock: str, folder: Path | None = None) -> None:
        self.header = {"format": "spa-latency", "version": VERSION, "engine": engine.name, "engine_version": engine.version(),
                       "threads": threads, "clock": clock, "machine": machine()}  # fmt: skip
        name = f"{engine.name}-{threads}-{clock}.json"
        self.path = (folder or cache_folder()) / name
        self.seconds: dict[str, float] = self._read()
        self.known = self.made = 0

    def _read(self) -> dict[str, float]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if {k: found.get(k) for k in self.header} != self.header:
                return {}
            return {str(k): float(v) for k, v in found["seconds"].items() if float(v) > 0}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The time under a key, measured if it is not known."""
        if key in self.seconds:
            self.known += 1
        else:
            self.seconds[key] = measure()
            self.made += 1
        return self.seconds[key]

    def save(self) -> None:
        """Writes the file, whole or not at all; a disk that is full or read-only costs only the next run's time."""
        if not self.made:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_files([(self.path, [json.dumps({**self.header, "seconds": self.seconds}, indent=0).encode()])])
        except Exception:  # a cache is never worth failing for
            return


def cache_folder() -> Path:
    """Where times are kept: SPA_CACHE, else the user's cache folder."""
    own = os.environ.get("SPA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spa" / "latency"


def machine() -> str:
    """The processor's name: times of one machine say nothing of another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    except OSError:
        name = ""
    return f"{platform.system()} {platform.machine()} {name or platform.processor()} {os.cpu_count()}"


def latency_model(
    analysis: Analysis, space: Space, scores: Scores, engine: Engine, *, threads: int = 0, seed: int = 0, variants: int = VARIANTS,
    folder: Path | None = None, stage: Stage = quiet,
) -> LatencyModel:  # fmt: skip
    """Measures the table for a model. Raises BadOption for engines whose times mean nothing, UnsupportedModel if one does not run it."""
    if engine.timed:
        raise BadOption(engine.timed)
    groups = analysis.groups
    clock = Clock(engine, threads)
    times = Times(engine, threads, clock.name, folder)
    segments = find_segments(groups)
    features = _Features(groups, segments, engine.block())
    traced = groups.traced
    feeds = one_sample(traced, runnable(analysis.normal.model, traced, seed=seed))
    settings = Settings(threads)
    rows, whole, kinds = [], [], [""] * len(segments)
    chosen = _variants(groups, space, variants, seed)
    with stage("timing segments"):
        for kept in chosen:
            model = cut(analysis, lowest(groups, scores, kept)).model if kept else analysis.normal.model
            parts = _Parts(model, segments, traced.facts.types, feeds)
            seconds = np.zeros(len(segments))
            for i in range(len(segments)):
                part, inputs = parts.part(i)
                key = digest(part, inputs)
                kinds[i] = kinds[i] or key  # segments that are the same in the dense model are of one kind
                seconds[i] = times.get(key, partial(_timed, engine, part, inputs, settings, clock))
            rows.append(seconds)
            whole.append(_timed(engine, model, feeds, settings, clock, WHOLE))
    times.save()
    widths = np.stack([_widths(groups, kept) for kept in chosen])
    weights = _fit(features.of(widths), np.array(rows), kinds)
    measured = np.array(whole)
    sums = _sums(features.of(widths), weights)
    scale, _ = optimize.nnls(sums / measured[:, None], np.ones(len(measured)))
    error = float(np.median(np.abs(sums @ scale / measured - 1)))
    return LatencyModel(engine.name, engine.version(), threads, clock.name, whole[0], error, (float(scale[0]), float(scale[1])),
                        times.made, times.known, features, weights)  # fmt: skip


def paired_seconds(engine: Engine, dense: Model, small: Model, feeds: Feeds, *, threads: int = 0) -> tuple[float, float]:
    """Seconds of one run of both models, loaded at once and run by turns."""
    clock, settings = Clock(engine, threads), Settings(threads)
    opened = [engine.load(m, settings) for m in (dense, small)]
    try:
        calls = [o.bound(feeds_for(m.narrowed, feeds)) for o, m in zip(opened, (dense, small), strict=True)]
        rounds = np.array([[clock.time(c, 2, 4, ENOUGH / 4) for c in calls] for _ in range(WHOLE // 2)])
        return float(np.quantile(rounds[:, 0], 0.25)), float(np.quantile(rounds[:, 1], 0.25))
    finally:
        for each in opened:
            each.close()


class _Parts:
    """The segments of a model, with inputs as they are when the whole model runs."""

    def __init__(self, model: Model, segments: Sequence[Segment], types: Mapping[str, int], feeds: Feeds) -> None:
        self.model, self.segments, self.types = model, segments, types
        given = [t.name for t in model.graph.inputs]
        wanted = sorted({n for s in segments for n in s.inputs} - set(given))
        feeds = feeds_for(model.narrowed, feeds)
        self.values = {**feeds, **(run(tapped(model, model.graph, given, wanted, types), feeds) if wanted else {})}

    def part(self, number: int) -> tuple[Model, Feeds]:
        """A segment and its inputs."""
        segment = self.segments[number]
        return piece(self.model, segment, self.types), {n: np.asarray(self.values[n]) for n in segment.inputs}


def _timed(engine: Engine, model: Model, feeds: Feeds, settings: Settings, clock: Clock, least: int = LEAST_RUNS) -> float:
    opened = engine.load(model, settings)
    try:
        return clock.time(opened.bound(feeds_for(model.narrowed, feeds)), least, max(least, MOST_RUNS))
    finally:
        opened.close()


def _variants(groups: Groups, space: Space, count: int, seed: int) -> list[dict[int, int]]:
    """Widths by group of the dense model and of variants that spread over all ladders; groups of one size and shape go alike."""
    rng = np.random.default_rng(seed)
    kinds = {g.index: structure(groups, g) for g in space.chosen}
    order = {kind: rng.permutation(count) for kind in dict.fromkeys(kinds.values())}
    found: list[dict[int, int]] = [{}]
    for number in range(count):
        kept = {}
        for group in space.chosen:
            ladder = space.ladder(group)
            position = (order[kinds[group.index]][number] + 0.5) / count
            kept[group.index] = int(ladder[min(int(position * len(ladder)), len(ladder) - 1)])
        found.append(kept)
    return found


def _widths(groups: Groups, kept: Mapping[int, int]) -> Array:
    return np.array([kept.get(g.index, g.size) for g in groups.groups], np.float64)


def _fit(features: Array, seconds: Array, kinds: Sequence[str]) -> list[Array]:
    """Weights of each segment: positive least squares of relative errors, over all segments of one kind."""
    found: dict[str, Array] = {}
    for kind in dict.fromkeys(kinds):
        columns = [i for i, k in enumerate(kinds) if k == kind]
        x = np.concatenate([features[:, i] for i in columns])
        y = np.concatenate([seconds[:, i] for i in columns])
        found[kind], _ = optimize.nnls(x / y[:, None], np.ones(len(y)))
    return [found[k] for k in kinds]


def _sums(features: Array, weights: Sequence[Array]) -> Array:
    """(candidates, 2) seconds of all segments alone: the constant parts, and the rest."""
    constant = sum(features[:, i, 0] * w[0] for i, w in enumerate(weights))
    rest = sum(features[:, i, 1:] @ w[1:] for i, w in enumerate(weights))
    return np.stack([np.asarray(constant), np.asarray(rest)], axis=1)


def with_latency(costs: Costs, model: LatencyModel) -> Costs:
    """Costs with seconds beside them."""

    def both(widths: Array) -> Mapping[str, Array]:
        return {**costs(widths), "latency": model.seconds(widths)}

    return both
