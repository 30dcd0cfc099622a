"""Sweeps: many prunings of one model, each a point of what it costs and what it is worth, so that the trade can be seen before choosing.

    scores of each criterion  ->  losses, where allocations weigh them  ->  points  ->  their latencies, one after the other

Workers compute, this process alone writes: each result into a file of its own as soon as it is there, so that a sweep that was killed goes
on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime

from spa.budgets.budget import TIME_LIMIT, Budget
from spa.criteria.brought import read_brought
from spa.criteria.score import Known
from spa.engines import find
from spa.errors import BadFile, BadOption
from spa.graph.analysis import Analysis, Source, analyzed_for
from spa.layers.depth import Depth, Dropped
from spa.plans.choose import Options
from spa.plans.cutting import cut
from spa.plans.plan import load_plan, mask_of
from spa.proof.check import TOLERANCE
from spa.proof.feeds import one_sample
from spa.proof.prove import runnable
from spa.repairs.repair_options import RepairOptions
from spa.stages import Stage, quiet
from spa.sweeps import experiment, parallel, sweep_tasks
from spa.sweeps.experiment import Lab
from spa.sweeps.points import Point, Setting, Sweep, Timing, grid
from spa.sweeps.sweep_folder import Folder
from spa.sweeps.sweep_tasks import Failure, sentence_of
from spa.timing.bench import check_timed, race

SECONDS = 3.0  # of the race of a point
Kind = TypeVar("Kind", str, float)


@dataclass(frozen=True)
class Progress:
    """How far a sweep is: steps done of how many, and what the last one was."""

    done: int
    total: int
    what: str


Tell = Callable[[Progress], None]


def sweep(
    model: Source | Analysis,
    folder: str | os.PathLike[str],
    *,
    ratio: float | Sequence[float] = (),
    target: str | Sequence[str] = (),
    criterion: str | Sequence[str] = "l2",
    repair: str | Sequence[str] | None = None,
    scope: str | Sequence[str] = "local",
    allocation: str | Sequence[str] = "auto",
    drop_layers: float | Sequence[float] = (),
    layers: str | Sequence[str] = "finercut",
    layer_kind: str | Sequence[str] = "any",
    multiple_of: int | str = "auto",
    keep_at_least: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    units: Sequence[str] = (),
    protect: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
    keep_state: bool = False,
    inputs: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    check: bool = True,
    tolerance: float = TOLERANCE,
    calibration: Any = None,
    evaluate: Any = None,
    metric: str | None = None,
    output: str | None = None,
    aggregate: str | None = None,
    normalize: str = "mean",
    swaps: int = 0,
    loss: str = "auto",
    scores: Any = None,
    repair_options: RepairOptions | None = None,
    provider: str = "cpu",
    threads: int = 1,
    time_limit: float = TIME_LIMIT,
    bench: bool = False,
    seconds: float = SECONDS,
    jobs: int = 1,
    backend: str = "loky",
    retry: bool = False,
    tell: Tell = lambda _: None,
    stage: Stage = quiet,
) -> Sweep:
    """Prunes a model in all combinations of what is given, and keeps each result in a folder: new, empty, or of the same sweep, of which
    nothing is done again.

    ratio, target: what points are asked for, shares of channels that go and limits such as "macs=0.5"; ratios from 0.1 to 0.7 if there is
    neither. criterion, repair, scope, allocation: one or several; scope goes with ratios, allocation with targets; by default a repair if
    there are calibration data. drop_layers, layers, layer_kind: how many layers go before channels, or which share of them (0: none), by
    which methods, of which kinds (`spa.layers.depth`); alone where a ratio is 0 or nothing else is asked for. calibration, evaluate,
    metric, output: data to fit on and to judge on (a quarter of the former is held out where there are no others), the metric, and the
    output that it looks at. repair_options: how repairs go, but for their method. bench, seconds: whether points are timed against the
    model as it is, on `provider` with `threads`, and for how long each. jobs, backend: workers side by side, processes here ("loky") or
    on a Ray cluster ("ray"); 0: one for each core. retry: try points again that failed. tell: is called after each step. scores: of the
    user's own, in place of the criteria's. The rest is as in `spa.plan` and `spa.apply`.

    Raises BadOption for what is not there or does not go together, for a folder of another model or other settings, and where no point
    could be made at all; BadFile if the folder can't be written. What was finished stays.

    >>> found = spa.sweep("model.onnx", "sweep", criterion=["l2", "obspa-greedy"], calibration=batches)
    >>> [(p.plan, p.shares["macs"], p.quality) for p in found.front("macs")]
    """
    mending = repair_options or RepairOptions()
    methods = _several(repair) if repair is not None else ("none" if calibration is None else "obspa",)
    settings = grid(_several(ratio), _several(target), _several(criterion), methods, _several(scope), _several(allocation),
                    _several(drop_layers), _several(layers), _several(layer_kind))  # fmt: skip
    brought = read_brought(scores)
    wishes = {
        "multiple_of": multiple_of, "keep_at_least": keep_at_least, "include": tuple(include), "exclude": tuple(exclude),
        "units": tuple(units), "protect": tuple(protect), "ratios": dict(ratios or {}), "aggregate": aggregate, "normalize": normalize,
        "swaps": swaps, "loss": loss, "scores": None if brought is None else brought.only_scores(),
    }  # fmt: skip
    _check(settings, wishes, calibration is not None, provider, bench, seconds, time_limit, jobs, backend)
    lab = experiment.prepare(
        model, calibration=calibration, evaluate=evaluate, wishes=wishes, mending=mending, metric=metric, output=output, provider=provider,
        threads=threads, time_limit=time_limit, seed=seed, check=check, tolerance=tolerance, inputs=inputs, protect_outputs=protect_outputs,
        stat=stat, keep_state=keep_state, travels=backend == "ray", used=_several(criterion), stage=stage,
    )  # fmt: skip
    place = Folder(Path(folder), _identity(lab))
    try:
        return _Run(lab, place, settings, jobs, backend, tell, stage).run(retry, bench, seconds)
    finally:
        place.close()
        experiment.forget()


def _several(value: Kind | Sequence[Kind]) -> tuple[Kind, ...]:
    """One or several, as several."""
    return (value,) if isinstance(value, str | float | int) else tuple(value)


def _identity(lab: Lab) -> dict[str, Any]:
    """What a folder's results depend on, but for the points' own settings."""
    from spa import __version__  # not there yet while spa itself is imported

    return {"spa": __version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__, **lab.experiment.settings}


def _check(
    settings: Sequence[Setting], wishes: Mapping[str, Any], data: bool, provider: str, bench: bool, seconds: float, time_limit: float,
    jobs: int, backend: str,
) -> None:  # fmt: skip
    """Raises BadOption for what can be told before anything is read."""
    Options(multiple_of=wishes["multiple_of"], keep_at_least=wishes["keep_at_least"], ratios=wishes["ratios"],
            normalize=wishes["normalize"])  # fmt: skip
    Budget(provider=provider, time_limit=time_limit)
    for setting in settings:
        if setting.repair not in ("", "none", "fold") and not data:
            raise BadOption(f"--repair {setting.repair} fits layers to data: give some with --calibration (none draws noise).")
    engine = find(provider, "provider")
    if not seconds > 0:
        raise BadOption(f"--seconds is {seconds}, but must be more than 0.")
    parallel.check_jobs(jobs, backend)
    clocked = any((s.target or "").startswith("latency") for s in settings)
    if bench or clocked:
        check_timed(engine)
    if clocked and (jobs != 1 or backend != "loky"):
        raise BadOption("--target latency is measured while points are made, and side by side they would disturb each other: leave out "
                        "--jobs and --backend.")  # fmt: skip


class _Run:
    """One run of a sweep: what is left to do, and its progress."""

    def __init__(
        self, lab: Lab, folder: Folder, settings: Sequence[Setting], jobs: int, backend: str, tell: Tell, stage: Stage
    ) -> None:
        self.lab, self.folder, self.settings = lab, folder, settings
        self.jobs, self.backend, self.tell, self.stage = jobs, backend, tell, stage
        self.dropped: dict[Depth, Dropped | Failure] = {}
        self.done = self.total = 0

    def run(self, retry: bool, bench: bool, seconds: float) -> Sweep:
        """Does what is left, and gives all that is there."""
        self.folder.open()
        left = [s for s in self.settings if not self.folder.has(s) or (retry and self.folder.read(s).failed)]
        if not self.folder.dense:
            with self.stage("evaluating the model as it is"):
                judged = self.lab.judge
            self.folder.begin({"costs": self.lab.dense, "quality": judged.value, "metric": judged.metric.name,
                               "higher_is_better": judged.metric.higher_is_better, "samples": judged.samples})  # fmt: skip
        scored = {s.learned[0]: s for s in left if s.criterion}
        weighed = {s.learned[1]: s for s in left if sweep_tasks.weighs(s, self.lab)}
        due = [s for s in self.settings if s in left or _untimed(self.folder.read(s), retry)] if bench else []
        self.total = len(scored) + len(weighed) + len(left) + len(due)
        self.tell(Progress(0, self.total, ""))
        self._choose({d for s in left if (d := s.depth) is not None})
        known: dict[str, Known | Failure] = dict(self._scores(scored))
        known |= dict(self._losses(weighed, known))
        self._points(left, known)
        self._timings(due, seconds)
        found = self._collected()
        if not found.made:
            raise BadOption(f"None of the {len(found.points)} points could be made; of the first: {found.points[0].failed} The folder "
                            "keeps the reasons; --retry tries again.")  # fmt: skip
        return found

    def _step(self, what: str) -> None:
        self.done += 1
        self.tell(Progress(self.done, self.total, what))

    def _all(self, function: Callable[..., Any], tasks: Sequence[parallel.Task]) -> Iterator[tuple[int, Any]]:
        return parallel.run(function, self.lab.experiment, tasks, jobs=self.jobs, backend=self.backend)

    def _choose(self, depths: Collection[Depth]) -> None:
        """Which layers go."""
        if depths:
            with self.stage("choosing layers"):
                self.dropped = sweep_tasks.layers(self.lab, depths)

    def _gone(self, setting: Setting) -> Dropped | Failure | None:
        """The layers that go first at a point."""
        return None if setting.depth is None else self.dropped[setting.depth]

    def _scores(self, wanted: Mapping[str, Setting]) -> Iterator[tuple[str, Known | Failure]]:
        """Scores of criteria by name: from the folder, or made."""
        tasks = []
        for name, setting in sorted(wanted.items()):
            gone = self._gone(setting)
            there = gone if isinstance(gone, Failure) else self.folder.known(name)
            if there is None:
                tasks.append((name, setting.criterion, gone))
            else:
                self._step(f"scores by {name}")
                yield name, there
        for number, found in self._all(sweep_tasks.scores, [t[1:] for t in tasks]):
            name = tasks[number][0]
            made = found if isinstance(found, Failure) else Known(found)
            if isinstance(made, Known):
                self.folder.keep(name, made)
            self._step(f"scores by {name}")
            yield name, made

    def _losses(
        self, wanted: Mapping[str, Setting], known: Mapping[str, Known | Failure]
    ) -> Iterator[tuple[str, Known | Failure]]:
        """Losses for criteria and repairs by name: from the folder, or made."""
        tasks = []
        for name, setting in sorted(wanted.items()):
            scores, there = known[setting.learned[0]], self.folder.known(name)
            if isinstance(scores, Failure) or there is not None:
                self._step(f"losses by {name}")
                yield name, scores if there is None else there
            else:
                tasks.append((name, setting.repair, scores.scores, self._gone(setting)))
        for number, found in self._all(sweep_tasks.losses, [t[1:] for t in tasks]):
            if isinstance(found, Known):
                self.folder.keep(tasks[number][0], found)
            self._step(f"losses by {tasks[number][0]}")
            yield tasks[number][0], found

    def _points(self, settings: Sequence[Setting], known: Mapping[str, Known | Failure]) -> None:
        ready = []
        for setting in settings:
            gone = self._gone(setting)
            found = known[setting.learned[sweep_tasks.weighs(setting, self.lab)]] if setting.criterion else None
            failed = next((f for f in (gone, found) if isinstance(f, Failure)), None)
            if failed is not None:
                self._finish(Point(setting, failed=failed.sentence), "")
            else:
                ready.append((setting, found, gone))
        for _, (point, plan) in self._all(sweep_tasks.point, ready):
            self._finish(point, plan)

    def _finish(self, point: Point, plan: str) -> None:
        self.folder.write(replace(point, plan=self.folder.plan_name(point.setting)) if plan else point, plan)
        self._step(point.name)

    def _timings(self, settings: Sequence[Setting], seconds: float) -> None:
        """Times points, one after the other, with nothing else running."""
        analysis = self.lab.analysis
        traced = analysis.groups.traced
        feeds = None
        for setting in settings:
            point = self.folder.read(setting)
            if not point.failed:
                try:
                    feeds = feeds or one_sample(traced, runnable(analysis.normal.model, traced, seed=self.lab.experiment.seed))
                    plan = load_plan(self.folder.path / point.plan)
                    own = analyzed_for(analysis.given, plan) if setting.drop_layers else analysis
                    small = cut(own, mask_of(plan, own.groups)).model  # repaired weights take as long as others
                    made = race({"before": analysis.given, "after": small}, feeds, seconds=seconds, threads=self.lab.experiment.threads,
                                seed=self.lab.experiment.seed, engine=self.lab.experiment.provider, rounds=1000)  # fmt: skip
                    before, after = made.laps
                    timing = Timing(after.median, before.median, after.ratio, after.ratio_low, after.ratio_high, after.verdict,
                                    made.primary, made.rounds)  # fmt: skip
                    self.folder.write(replace(point, timing=timing, untimed=""))
                except Exception as error:  # engines raise classes of their own; the point itself is done
                    if isinstance(error, BadFile):
                        raise
                    self.folder.write(replace(point, untimed=sentence_of(error)))
            self._step(f"latency of {point.name}")

    def _collected(self) -> Sweep:
        """All points of the folder, those that were asked for first; latencies are shares of one figure of the model as it is."""
        asked = {s.name for s in self.settings}
        points = [self.folder.read(s) for s in self.settings] + [p for p in self.folder.points() if p.name not in asked]
        dense = self.folder.dense
        costs = dict(dense["costs"])
        timed = [p.timing for p in points if p.timing is not None]
        if timed:
            costs["latency"] = float(np.median([t.dense for t in timed]))
        model = self.lab.analysis.given.path
        return Sweep(str(self.folder.path), "" if model is None else str(model), dense["metric"], bool(dense["higher_is_better"]),
                     float(dense["quality"]), costs, tuple(_with_latency(points, costs)))  # fmt: skip


def _untimed(point: Point, retry: bool) -> bool:
    """Whether a finished point is still to be timed."""
    return not point.failed and point.timing is None and (retry or not point.untimed)


def _with_latency(points: Iterable[Point], dense: Mapping[str, float]) -> Iterator[Point]:
    for point in points:
        if point.timing is None:
            yield point
        else:
            share = point.timing.share
            yield replace(point, costs={**point.costs, "latency": share * dense["latency"]}, shares={**point.shares, "latency": share})
