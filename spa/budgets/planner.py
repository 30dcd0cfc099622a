"""From a budget to a removal: the problem is put together from groups, scores and costs, decided by `spa.budgets.allocate`, and judged.

* target: limits of costs, which allocation meets on the safe side.
* max_drop: a limit of what may be lost by a metric; the largest removal within it is searched by bisection, or group by group.
* both: the target must be met within the drop, or it is refused with what is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa.budgets.adaptive import adaptive
from spa.budgets.allocate import ADAPTIVE, Allocation, Costs
from spa.budgets.budget import Budget, judge_of
from spa.budgets.latency import LatencyModel, latency_model, paired_seconds, with_latency
from spa.budgets.metrics import METRICS
from spa.budgets.problems import decide, score_losses, static_costs
from spa.budgets.quality import Judge, first, judge, measured_losses
from spa.budgets.targets import EXACT, Target, amount, read_targets
from spa.criteria.score import Known, Scores, score
from spa.criteria.views import Data
from spa.data.evidence import Evidence
from spa.engines import find
from spa.errors import BadOption
from spa.graph.analysis import Analysis
from spa.graph.count import count
from spa.plans.choose import Space, lowest
from spa.plans.cutting import cut
from spa.proof.feeds import Feeds, one_sample
from spa.proof.prove import runnable
from spa.stages import Stage, quiet
from spa.storage.store import Model

Array = NDArray[np.float64]
Way: TypeAlias = tuple[str, str]  # of allocation, and the kind of losses that it goes by

TRIES = 8  # prunings that the search for --max-drop makes
BY_MACS = "solver under MACs"  # a way that auto compares where a latency is asked for: MACs count every layer alike
MEASURED = 128  # samples that losses of groups are measured on, and fitted on for that
ESTIMATE = "obspa-greedy"  # its scores are errors that are left after repair
CORRECTIONS = 8  # plans that are timed until one meets a latency
CLOSE = 0.05  # of a latency target: how far below counts as reached
MEASURED_LOSSES, ESTIMATES = "measured", "estimated from errors of layers after repair"


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
        """`evidence` is what repairs are fitted on; `budget.held` what is judged on, `budget.probe` what losses are measured on (see
        `with_data`).

        `known`: what another planner of the same model, scores and data found out.
        """
        self.analysis, self.space, self.scores, self.budget = analysis, space, replace(scores, held=space.held), budget
        self.seed, self.stage = seed, stage
        self.groups = analysis.groups
        self.fit, self.held, self.probe = evidence, budget.held, budget.probe or budget.held
        self.costs = static_costs(self.groups, analysis.nbytes)
        self.targets = read_targets(budget.target)
        self._scored = score_losses(space, scores, normalize)
        self._estimated: Sequence[Array] | None = None
        self.engine = find(budget.provider, "provider")
        self._table: LatencyModel | None = None
        self.timing: tuple[float, float] | None = None  # predicted and measured seconds of what was found
        self._judge: Judge | None = None
        self._probes: dict[int | None, Judge] = {}  # by how many samples
        self._source = ""  # of the losses that decided, for people
        self.tried: dict[str, float] = {}  # ways that auto compared -> what they lost on the probe
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
        return self._decision(*(self._adaptively() if self.budget.allocation == ADAPTIVE else self._within_drop(0.0)))

    # ------------------------------------------------------------------ allocation

    def _met(self, targets: Sequence[Target]) -> Allocation:
        """An allocation that meets the targets; latency as measured on what comes out, not as predicted."""
        if not any(t.kind == "latency" for t in targets):
            return self._allocated(targets)
        found: dict[Way, tuple[Allocation, float, str]] = {}
        refused: list[BadOption] = []
        for way in self._ways(targets):  # each comes to the same measured latency; at the same prediction one would be let off more lightly
            try:
                found[way] = *self._within_latency(way, targets), self._source
            except BadOption as error:
                refused.append(error)
        if not found:
            raise refused[0]
        best = self._compared({way: a for way, (a, _, _) in found.items()})
        chosen, taken, self._source = found[best]
        self.timing = chosen.costs["latency"], taken
        return chosen

    def _within_latency(self, way: Way, targets: Sequence[Target]) -> tuple[Allocation, float]:
        """The allocation of a way that comes nearest to a latency from below, and its measured seconds."""
        table = self._latency()
        wanted = next(t for t in targets if t.kind == "latency")
        limit = asked = wanted.limit(table.dense)
        best: tuple[Allocation, float] | None = None
        taken, fits, fails = np.inf, 0.0, np.inf  # what was asked of the table: the most that held, the least that did not
        for _ in range(CORRECTIONS):
            found = self._by(*way, [Target("latency", asked, False) if t is wanted else t for t in targets])
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
        return replace(best[0], limits={**best[0].limits, "latency": limit}), best[1]

    def _taken(self, found: Allocation, dense: float | None) -> float:
        """Measured seconds of an allocation; of a share only the ratio to the dense model counts, times its `dense` seconds."""
        model = cut(self.analysis, self._gone(found)).model
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
        """An allocation that meets targets of costs that are known without a run."""
        found: dict[Way, Allocation] = {}
        sources = {}
        for way in self._ways(targets):
            made = self._by(*way, targets)
            if not any(made.widths == other.widths for other in found.values()):
                found[way], sources[way] = made, self._source
        best = self._compared(found)
        self._source = sources[best]
        return found[best]

    def _ways(self, targets: Sequence[Target]) -> list[Way]:
        """The way that was asked for; or those that auto compares, the one that needs least last."""
        if self.budget.allocation != "auto":
            return [(self.budget.allocation, MEASURED_LOSSES)]
        if self.fit is None or not self.fit.batches:  # scores of weights say which channels of a group to remove, but weigh groups badly
            return [("uniform", "")]
        if not self._measures():
            return [("solver", ESTIMATES)]
        by_macs = [(BY_MACS, MEASURED_LOSSES)] if any(t.kind == "latency" for t in targets) else []
        return [("solver", MEASURED_LOSSES), *by_macs, ("solver", ESTIMATES), ("uniform", "")]

    def _compared(self, found: Mapping[Way, Allocation]) -> Way:
        """The way that loses least on the probe: losses measured one group at a time mislead where much goes."""
        if len(found) == 1:
            return next(iter(found))
        with self.stage("comparing allocations"):
            lost = {way: self._loss_on_probe(self._cut(self._gone(a))) for way, a in found.items()}
        self.tried = {" by ".join(filter(None, way)): value for way, value in lost.items()}
        return min(lost, key=lambda way: lost[way])

    def _by(self, way: str, kind: str, targets: Sequence[Target]) -> Allocation:
        losses = self._scored if way in ("uniform", "global") else self.estimates() if kind == ESTIMATES else self.losses()
        self._source = "not looked at" if way == "uniform" else "from scores" if losses is self._scored else self._kind(losses)
        costs = with_latency(self.costs, self._latency()) if any(t.kind == "latency" for t in targets) else self.costs
        with self.stage("choosing widths"):
            for _ in range(TRIES):
                if way == BY_MACS:
                    found = self._through_macs(targets, costs, losses)
                else:
                    found = decide(self.groups, self.space, costs, targets, way=way, losses=losses)
                over = self._over(found)
                if over <= 1:
                    break
                targets = [t if t.kind == "latency" else Target(t.kind, found.limits[t.kind] / over, False) for t in targets]
            return found

    def _over(self, found: Allocation) -> float:
        """The largest of counted costs over limits: where costs depend on which coordinates go, counting has the last word."""
        counted = count(self.groups, self._gone(found))
        exact = {"macs": counted.macs, "params": counted.parameters, "memory": counted.peak_bytes}
        return max((exact[k] / limit for k, limit in found.limits.items() if k in exact), default=0.0)

    def _through_macs(self, targets: Sequence[Target], costs: Costs, losses: Sequence[Array]) -> Allocation:
        """The solver under a share of MACs, the largest that is within the latency by the table; other targets as they are."""
        others = [t for t in targets if t.kind not in ("latency", "macs")]
        limits = {t.kind: t.value for t in targets if t.kind == "latency"}
        dense = float(costs(np.array([[g.size for g in self.groups.groups]], np.float64))["macs"][0])
        low, high = self._least(), min((t.limit(dense) / dense for t in targets if t.kind == "macs"), default=1.0)
        best = decide(self.groups, self.space, costs, targets, way="solver", losses=losses)
        for _ in range(TRIES):
            middle = (low + high) / 2
            found = decide(self.groups, self.space, costs, [*others, Target("macs", middle, True)], way="solver", losses=losses)
            fits = found.costs["latency"] <= limits["latency"]
            low, high = (middle, high) if fits else (low, middle)
            if fits:
                best = replace(found, limits={**{t.kind: found.limits[t.kind] for t in others}, **limits}, way=BY_MACS)
        return best

    def _kind(self, losses: Sequence[Array]) -> str:
        return ESTIMATES if losses is self._estimated else f"{MEASURED_LOSSES} at {self.measured} widths"

    def _measures(self) -> bool:
        return self.probe is not None and not self.probe.noise and self.budget.measures

    def _gone(self, found: Allocation) -> NDArray[np.bool_]:
        return lowest(self.groups, self.scores, found.widths)

    def losses(self) -> Sequence[Array]:
        """Loss on each rung: measured where there are data and time, else estimated, else the sum of the scores that go."""
        if self._losses is None:
            if self._measures():
                self._losses, self.measured = self._measure()
            else:
                self._losses = self.estimates()
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
        fit = None if self.fit is None else first(self.fit, MEASURED)
        ladders = [self.space.ladder(g) for g in self.space.chosen]

        def loss(position: int, width: int) -> float:
            gone = lowest(self.groups, self.scores, {self.space.chosen[position].index: width})
            return self._loss_on_probe(cut(self.analysis, gone, repair=self.budget.repair, calibration=fit, seed=self.seed).model, MEASURED)

        guesses = self.estimates()
        with self.stage("measuring losses"):
            return measured_losses(ladders, loss, guesses=guesses, seconds=self.budget.time_limit)

    def _loss_on_probe(self, model: Model, samples: int | None = None) -> float:
        """Distance to the dense outputs: of probabilities where the metric is about classes, else of the outputs themselves."""
        if samples not in self._probes:
            assert self.probe is not None
            classes = self.budget.metric in ("accuracy", "top5", "agreement", "kl", "perplexity")
            chosen = METRICS["kl" if classes or (self.budget.metric is None and self.probe.labels is not None) else "error"]
            data = self.probe if samples is None else first(self.probe, samples)
            self._probes[samples] = judge(self.analysis.normal.model, chosen, data, output=self.budget.output)
        return self._probes[samples].drop(model)

    # ------------------------------------------------------------------ quality

    def judge(self) -> Judge:
        """What evaluates pruned models by the metric that was asked for. Raises BadOption where there are no data for it."""
        if self._judge is None:
            with self.stage("evaluating"):
                self._judge = judge_of(self.analysis, self.budget, self.held)
        return self._judge

    def _quality(self, found: Allocation) -> float:
        judged = self.judge()
        model = self._cut(self._gone(found))
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

    def _adaptively(self) -> tuple[Allocation, float]:
        """Each group, from the last to the first, as narrow as its share of the drop allows (`spa.budgets.adaptive`)."""
        limit = self.budget.max_drop
        assert limit is not None
        ladders = [(g.index, self.space.ladder(g)) for g in self.space.chosen]
        qualities: dict[tuple[tuple[int, int], ...], float] = {}

        def quality(widths: Mapping[int, int]) -> float:
            key = tuple(sorted(widths.items()))
            if key not in qualities:
                model = self._cut(lowest(self.groups, self.scores, widths))
                with self.stage("evaluating"):
                    qualities[key] = self.judge()(model)
            return qualities[key]

        kept, lost = adaptive(ladders, lambda widths: self._drop(quality(widths)), limit)
        if not kept:
            raise BadOption(f"--max-drop {limit:g} by {self.judge().metric.name} allows nothing: no group may lose a channel for its "
                            f"share of {limit / max(len(ladders), 1):.3g}. Allow more, or repair more (--repair obspa with "
                            "--calibration).")  # fmt: skip
        dense = np.array([g.size for g in self.groups.groups], np.float64)
        small = dense.copy()
        small[list(kept)] = list(kept.values())
        costs = self.costs(np.stack([dense, small]))
        self._source = f"measured at {len(qualities)} prunings"
        whole, left = ({kind: float(values[i]) for kind, values in costs.items()} for i in (0, 1))
        return Allocation({i: kept.get(i, int(x[-1])) for i, x in ladders}, left, whole, {}, ADAPTIVE, lost), quality(kept)

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

    def _decision(self, found: Allocation, value: float | None) -> Decision:
        quality = {} if value is None else {self.judge().metric.name: (self.judge().value, value)}
        record: dict[str, Any] = {
            "target": list(self.budget.target), "max_drop": self.budget.max_drop, "allocation": found.way,
            "losses": self._source, "compared": dict(self.tried),
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
        return Decision(self._gone(found), found, quality, record)
