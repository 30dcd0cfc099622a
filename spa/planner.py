"""From a budget to a removal: the problem is put together from groups, scores and costs, decided by `spa.allocate`, and judged.

* target: limits of costs, which allocation meets on the safe side.
* max_drop: a limit of what may be lost by a metric; the largest removal within it is searched by bisection.
* both: the target must be met within the drop, or it is refused with what is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.allocate import WAYS, Allocation
from spa.analysis import Analysis, evidence_for
from spa.budget import EXACT, Target, amount, read_targets
from spa.choose import Space, lowest
from spa.cutting import cut
from spa.engines import find
from spa.errors import BadOption
from spa.evidence import Evidence
from spa.feeds import Feeds, one_sample
from spa.latency import LatencyModel, latency_model, paired_seconds, with_latency
from spa.metrics import METRICS, find_metric
from spa.problems import decide, score_losses, static_costs
from spa.prove import runnable
from spa.quality import Judge, automatic, first, judge, measured_losses, split
from spa.repair import RepairOptions
from spa.score import Known, Scores, score
from spa.stages import Stage, quiet
from spa.store import Model
from spa.views import Data

Array = NDArray[np.float64]

TRIES = 8  # prunings that the search for --max-drop makes
MEASURED = 128  # samples that losses of groups are measured on, and fitted on for that
ESTIMATE = "obspa-greedy"  # its scores are errors that are left after repair
CORRECTIONS = 8  # plans that are timed until one meets a latency
CLOSE = 0.05  # of a latency target: how far below counts as reached
TIME_LIMIT = 300.0  # seconds for measuring losses


@dataclass(frozen=True)
class Budget:
    """What a pruned model may cost and lose.

    target: such as "macs=0.5", "params=2M", "size=8MB", "memory=64MB", "latency=20ms", "latency=0.6x"; several are all met.
    allocation: how widths are found: auto, uniform, global, sensitivity or solver. max_drop: of the metric, in its own unit (points of
    accuracy). metric: a name of `spa.metrics.METRICS` or module:function. evaluate: data to judge on, as calibration takes them; by default
    a quarter of the calibration data is held out. output: the name of the output that is looked at, by default the first. provider,
    threads: what latency means. time_limit: seconds for measuring losses. repair: what pruned models get before they are judged. held: the
    data to judge on as they were read, see `with_data`.
    """

    target: tuple[str, ...] = ()
    allocation: str = "auto"
    max_drop: float | None = None
    metric: str | None = None
    evaluate: Any = field(default=None, repr=False)
    output: str | None = None
    provider: str = "cpu"
    threads: int = 0
    time_limit: float = TIME_LIMIT
    repair: RepairOptions | str = "none"
    held: Evidence | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        read_targets(self.target)
        if self.allocation not in WAYS:
            raise BadOption(f"--allocation is {self.allocation!r}; the choice is: {', '.join(WAYS)}.")
        if self.max_drop is not None and not 0 <= self.max_drop < np.inf:
            raise BadOption(f"--max-drop is {self.max_drop}, but must be 0 or more: 1.0 allows one point of accuracy.")
        if self.metric is not None:
            find_metric(self.metric)
        if not self.time_limit >= 0:
            raise BadOption(f"--time-limit is {self.time_limit}, but must be 0 or more seconds.")

    @property
    def asks(self) -> bool:
        """Whether there is any limit."""
        return bool(self.target) or self.max_drop is not None

    @property
    def measures(self) -> bool:
        """Whether losses of groups are measured where there are data."""
        return self.asks and self.time_limit > 0 and self.allocation in ("auto", "sensitivity", "solver")

    @property
    def judges(self) -> bool:
        """Whether pruned models are evaluated."""
        return self.max_drop is not None or self.metric is not None or self.evaluate is not None


@dataclass(frozen=True)
class Decision:
    """What goes, and what is known of it. quality: metric -> (dense, pruned); record: all of it for the plan, as plain data."""

    gone: NDArray[np.bool_]
    allocation: Allocation
    quality: Mapping[str, tuple[float, float]]
    record: Mapping[str, Any]


class Planner:
    """Finds the removal that a budget asks for, on one model with its scores."""

    def __init__(
        self, analysis: Analysis, space: Space, scores: Scores, budget: Budget, evidence: Evidence | None, *, normalize: str = "mean",
        seed: int = 0, known: Known | None = None, stage: Stage = quiet,
    ) -> None:  # fmt: skip
        """`evidence` is what repairs are fitted on; `budget.evaluate` what is judged on, read already (see `with_data`).

        `known`: what another planner of the same model, scores and data found out.
        """
        self.analysis, self.space, self.scores, self.budget = analysis, space, scores, budget
        self.seed, self.stage = seed, stage
        self.groups = analysis.groups
        self.fit, self.held = evidence, budget.held
        self.costs = static_costs(self.groups, analysis.given.nbytes)
        self.targets = read_targets(budget.target)
        self._scored = score_losses(space, scores, normalize)
        self._estimated: Sequence[Array] | None = None
        self.engine = find(budget.provider, "provider")
        self._table: LatencyModel | None = None
        self.timing: tuple[float, float] | None = None  # predicted and measured seconds of what was found
        self._judge: Judge | None = None
        self._losses = None if known is None else known.losses
        self.measured = 0 if known is None else known.measured

    def decide(self) -> Decision:
        """The removal. Raises BadOption for what is impossible."""
        if self.budget.max_drop is None:
            found = self._met(self.targets)
            return self._decision(found, self._quality(found) if self.budget.judges else None)
        if self.targets:
            found = self._met(self.targets)
            value = self._quality(found)
            if self._drop(value) <= self.budget.max_drop:
                return self._decision(found, value)
            best, value = self._within_drop(found.costs["macs"] / found.dense["macs"])
            raise BadOption(f"--target {' '.join(self.budget.target)} loses {self._lost(self._quality(found))}, more than --max-drop "
                            f"{self.budget.max_drop:g}; within it, macs={best.costs['macs'] / best.dense['macs']:.3g} was found, "
                            f"which loses {self._lost(value)}. Give one of the two limits up.")  # fmt: skip
        return self._decision(*self._within_drop(0.0))

    # ------------------------------------------------------------------ allocation

    def _met(self, targets: Sequence[Target]) -> Allocation:
        """An allocation that meets the targets; latency as measured on what comes out, not as predicted."""
        if not any(t.kind == "latency" for t in targets):
            return self._allocated(targets)
        table = self._latency()
        wanted = next(t for t in targets if t.kind == "latency")
        limit = asked = wanted.limit(table.dense)
        best: tuple[Allocation, float] | None = None
        taken, fits, fails = np.inf, 0.0, np.inf  # what was asked of the table: the most that held, the least that did not
        for _ in range(CORRECTIONS):
            found = self._allocated([Target("latency", asked, False) if t is wanted else t for t in targets])
            taken = self._taken(found, table.dense if wanted.relative else None)
            if taken <= limit * (1 + EXACT):
                fits = max(fits, asked)
                best = (found, taken) if best is None or taken > best[1] else best
                if taken >= limit * (1 - CLOSE):
                    break
            else:
                fails = min(fails, asked)
            asked *= 0.99 * limit / taken
            if not fits < asked < fails:
                asked = (fits + fails) / 2 if fails < np.inf else (fits + limit * fits / taken) / 2
        if best is None:
            raise BadOption(f"--target latency: {amount('latency', limit)} was not reached: the nearest took {amount('latency', taken)} on "
                            f"{self.engine.name}. Ask for more, or let more shrink (--multiple-of 1).")  # fmt: skip
        self.timing = best[0].costs["latency"], best[1]
        return replace(best[0], limits={**best[0].limits, "latency": limit})

    def _taken(self, found: Allocation, dense: float | None) -> float:
        """Measured seconds of an allocation; of a share only the ratio to the dense model counts, times its `dense` seconds."""
        model = cut(self.analysis, lowest(self.groups, self.scores, found.widths)).model
        with self.stage("timing"):
            whole, small = paired_seconds(self.engine, self.analysis.given, model, self._feeds(), threads=self.budget.threads)
        return small if dense is None else small * dense / whole

    def _latency(self) -> LatencyModel:
        if self._table is None:
            self._table = latency_model(self.analysis, self.space, self.scores, self.engine, threads=self.budget.threads, seed=self.seed,
                                        stage=self.stage)  # fmt: skip
        return self._table

    def _feeds(self) -> Feeds:
        traced = self.groups.traced
        return one_sample(traced, runnable(self.analysis.normal.model, traced, seed=self.seed))

    def _allocated(self, targets: Sequence[Target]) -> Allocation:
        way = self.budget.allocation
        if way == "auto":  # scores of weights say which channels of a group to remove, but weigh groups badly
            way = "solver" if self.fit is not None and self.fit.batches else "uniform"
        losses = self._scored if way in ("uniform", "global") else self.losses()
        costs = with_latency(self.costs, self._latency()) if any(t.kind == "latency" for t in targets) else self.costs
        with self.stage("choosing widths"):
            return decide(self.groups, self.space, costs, targets, way=way, losses=losses)

    def losses(self) -> Sequence[Array]:
        """Loss on each rung: measured where there are data and time, else estimated, else the sum of the scores that go."""
        if self._losses is None:
            if self.held is None or self.held.noise or not self.budget.measures:
                self._losses = self.estimates()
            else:
                self._losses, self.measured = self._measure()
        return self._losses

    def estimates(self) -> Sequence[Array]:
        """What the layers behind each group lose of their outputs' energy after repair, added up as channels go; scores without data."""
        if self._estimated is None:
            if self.fit is None or not self.fit.batches:
                self._estimated = self._scored
            else:
                with self.stage("estimating losses"):
                    data = Data(self.fit.model, self.fit.batches, labels=self.fit.labels)
                    found = score(self.analysis.normal.model.graph, self.groups, ESTIMATE, seed=self.seed, data=data,
                                  only=self.space.chosen, relative=True)  # fmt: skip
                self._estimated = score_losses(self.space, found, "none")
        return self._estimated

    def _measure(self) -> tuple[Sequence[Array], int]:
        assert self.held is not None
        name = self.budget.metric or ""
        chosen = METRICS["kl" if name in ("accuracy", "top5", "agreement", "kl", "perplexity") else "error"]
        judged = judge(self.analysis.normal.model, chosen, first(self.held, MEASURED), output=self.budget.output)
        fit = None if self.fit is None else first(self.fit, MEASURED)
        ladders = [self.space.ladder(g) for g in self.space.chosen]

        def loss(position: int, width: int) -> float:
            gone = lowest(self.groups, self.scores, {self.space.chosen[position].index: width})
            return judged.drop(cut(self.analysis, gone, repair=self.budget.repair, calibration=fit, seed=self.seed).model)

        guesses = self.estimates()
        with self.stage("measuring losses"):
            return measured_losses(ladders, loss, guesses=guesses, seconds=self.budget.time_limit)

    # ------------------------------------------------------------------ quality

    def judge(self) -> Judge:
        """What evaluates pruned models by the metric that was asked for. Raises BadOption where there are no data for it."""
        if self._judge is None:
            with self.stage("evaluating"):
                self._judge = _judge(self.analysis, self.budget, self.held)
        return self._judge

    def _quality(self, found: Allocation) -> float:
        judged = self.judge()
        model = self._cut(lowest(self.groups, self.scores, found.widths))
        with self.stage("evaluating"):
            return judged(model)

    def _drop(self, value: float) -> float:
        judged = self.judge()
        return judged.metric.drop(judged.value, value)

    def _lost(self, value: float) -> str:
        metric = self.judge().metric
        return f"{self._drop(value):.4g} {metric.unit or metric.name}".strip()

    def _within_drop(self, least: float) -> tuple[Allocation, float]:
        """The cheapest allocation that loses no more than allowed, by bisection on the share of MACs."""
        limit = self.budget.max_drop
        assert limit is not None
        low, high = max(least, self._least()), 1.0
        best: tuple[Allocation, float] | None = None
        tried = []
        for _ in range(TRIES):
            middle = (low + high) / 2
            found = self._allocated((Target("macs", middle, True),))
            value = self._quality(found)
            tried.append(self._drop(value))
            if tried[-1] <= limit:
                best, high = (found, value), min(middle, found.costs["macs"] / found.dense["macs"])
            else:
                low = middle
        if best is None:
            raise BadOption(f"--max-drop {limit:g} by {self.judge().metric.name} allows nothing: the smallest removal that was tried loses "
                            f"{min(tried):.4g}. Allow more, or repair more (--repair obspa with --calibration).")  # fmt: skip
        return best

    def _least(self) -> float:
        """The share of MACs that is left at the smallest widths."""
        dense = np.array([g.size for g in self.groups.groups], np.float64)
        small = dense.copy()
        for group in self.space.chosen:
            small[group.index] = self.space.ladder(group)[0]
        macs = self.costs(np.stack([small, dense]))["macs"]
        return float(macs[0] / max(macs[1], 1.0))

    def _cut(self, gone: NDArray[np.bool_]) -> Model:
        return cut(self.analysis, gone, repair=self.budget.repair, calibration=self.fit, seed=self.seed).model

    def _source(self, way: str) -> str:
        """Where the losses came from, for people."""
        if way == "uniform":
            return "not looked at"
        if way == "global" or self._losses is self._scored:
            return "from scores"
        return f"measured at {self.measured} widths" if self.measured else "estimated from errors of layers after repair"

    def _decision(self, found: Allocation, value: float | None) -> Decision:
        quality = {} if value is None else {self.judge().metric.name: (self.judge().value, value)}
        record: dict[str, Any] = {
            "target": list(self.budget.target), "max_drop": self.budget.max_drop, "allocation": found.way,
            "losses": self._source(found.way),
            "costs": {k: [found.dense[k], found.costs[k], found.limits.get(k)] for k in found.costs},
            "quality": {k: list(v) for k, v in quality.items()},
        }  # fmt: skip
        if self.timing is not None:
            table = self._latency()
            record["costs"]["latency"][0] = table.dense  # as measured
            record["latency"] = {
                "provider": self.engine.name, "version": table.version, "threads": table.threads, "clock": table.clock,
                "dense": table.dense, "predicted": self.timing[0], "measured": self.timing[1], "table_error": table.error,
                "segments_measured": table.measured, "segments_known": table.known,
            }  # fmt: skip
        if quality:
            record["evaluated"] = self.held.samples if self.held is not None else None
        return Decision(lowest(self.groups, self.scores, found.widths), found, quality, record)


def with_data(
    analysis: Analysis, budget: Budget, evidence: Evidence | None, *, seed: int = 0, stage: Stage = quiet
) -> tuple[Budget, Evidence | None]:
    """The budget with data to judge on, and the data that are left to fit on: a quarter is held out where no others are given."""
    if budget.held is not None:
        return budget, evidence
    if budget.evaluate is not None:
        found = evidence_for(analysis, budget.evaluate, seed=seed, stage=stage)
        return replace(budget, held=None if found is None else _labelled(found)), evidence
    if evidence is None or not evidence.batches or evidence.noise or not (budget.judges or budget.measures):
        return replace(budget, held=evidence if budget.judges else None), evidence
    fit, held = split(evidence)
    return replace(budget, held=_labelled(held)), fit


def _labelled(evidence: Evidence) -> Evidence:
    """The same, without the name of labels that are not there."""
    there = bool(evidence.batches) and evidence.labels in evidence.batches[0]
    return evidence if there or evidence.labels is None else replace(evidence, labels=None)


def quality_of(analysis: Analysis, budget: Budget, model: Model) -> dict[str, Any]:
    """What a plan records of a pruned model's quality; empty where nothing is asked."""
    if not budget.judges:
        return {}
    held = budget.held
    judged = _judge(analysis, budget, held)
    return {"quality": {judged.metric.name: [judged.value, judged(model)]}, "evaluated": None if held is None else held.samples}


def _judge(analysis: Analysis, budget: Budget, held: Evidence | None) -> Judge:
    """What evaluates pruned models by the metric that was asked for. Raises BadOption where there are no data for it."""
    metric = find_metric(budget.metric) if budget.metric else automatic(None, None if held is None else held.labels)
    if metric.whole is None:
        if held is None:
            raise BadOption(f"--max-drop and --metric {metric.name} compare outputs on data: give some with --calibration or --evaluate.")
        if held.noise:
            raise BadOption(f"--metric {metric.name} says nothing on made-up data ({held.name}): give real ones with --evaluate.")
    return judge(analysis.normal.model, metric, held or Evidence("nothing", (), analysis.normal.model, False), output=budget.output)
