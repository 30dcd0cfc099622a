"""Budgets: what a pruned model may cost and lose, and the data that it is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from spa.budgets.allocate import ADAPTIVE, WAYS
from spa.budgets.metrics import find_metric
from spa.budgets.quality import Judge, TooFew, automatic, judge, split
from spa.budgets.targets import read_targets
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.graph.analysis import Analysis, evidence_for
from spa.repairs.repair import RepairOptions
from spa.stages import Stage, quiet
from spa.storage.store import Model

TIME_LIMIT = 300.0  # seconds for measuring losses


@dataclass(frozen=True)
class Budget:
    """What a pruned model may cost and lose.

    target: such as "macs=0.5", "params=2M", "size=8MB", "memory=64MB", "latency=20ms", "latency=0.6x"; several are all met.
    allocation: how widths are found: auto, uniform, global, sensitivity or solver; adaptive spends max_drop. max_drop: of the metric, in
    its own unit (points of accuracy). metric: a name of `spa.budgets.metrics.METRICS` or module:function. evaluate: data to judge on, as
    calibration takes them; by default
    a quarter of the calibration data is held out. output: the name of the output that is looked at, by default the first. provider,
    threads: what latency means. time_limit: seconds for measuring losses. repair: what pruned models get before they are judged. held,
    probe: the data to judge on and to measure losses on as they were read, see `with_data`.
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
    probe: Evidence | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        read_targets(self.target)
        if self.allocation not in (*WAYS, ADAPTIVE):
            raise BadOption(f"--allocation is {self.allocation!r}; the choice is: {', '.join((*WAYS, ADAPTIVE))}.")
        if self.allocation == ADAPTIVE and (self.target or self.max_drop is None):
            raise BadOption("--allocation adaptive spends what --max-drop allows, group by group: give --max-drop, and no --target.")
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


def with_data(
    analysis: Analysis, budget: Budget, evidence: Evidence | None, *, seed: int = 0, stage: Stage = quiet
) -> tuple[Budget, Evidence | None]:
    """The budget with data to judge on and to measure losses on, and the data that are left to fit on.

    A quarter of the calibration data is held out to judge on where no others are given, and a quarter of what is left to measure losses on:
    nothing that widths or weights were chosen by is judged on.
    """
    if budget.held is None:
        if budget.evaluate is not None:
            found = evidence_for(analysis, budget.evaluate, seed=seed, stage=stage)
            budget = replace(budget, held=None if found is None else _labelled(found))
        elif budget.judges and evidence is not None:
            real = bool(evidence.batches) and not evidence.noise
            evidence, held = split(evidence) if real else (evidence, evidence)
            budget = replace(budget, held=_labelled(held))
    if budget.probe is None and budget.measures and evidence is not None and evidence.batches and not evidence.noise:
        with suppress(TooFew):
            evidence, probe = split(evidence)
            budget = replace(budget, probe=_labelled(probe))
    return budget, evidence


def _labelled(evidence: Evidence) -> Evidence:
    """The same, without the name of labels that are not there."""
    there = bool(evidence.batches) and evidence.labels in evidence.batches[0]
    return evidence if there or evidence.labels is None else replace(evidence, labels=None)


def quality_of(analysis: Analysis, budget: Budget, model: Model) -> dict[str, Any]:
    """What a plan records of a pruned model's quality; empty where nothing is asked."""
    if not budget.judges:
        return {}
    held = budget.held
    judged = judge_of(analysis, budget, held)
    return {"quality": {judged.metric.name: [judged.value, judged(model)]}, "evaluated": None if held is None else held.samples}


def judge_of(analysis: Analysis, budget: Budget, held: Evidence | None) -> Judge:
    """What evaluates pruned models by the metric that was asked for, against the model as given: layers that went before count as lost.

    Raises BadOption where there are no data for it.
    """
    metric = find_metric(budget.metric) if budget.metric else automatic(None, None if held is None else held.labels)
    if metric.whole is None:
        if held is None:
            raise BadOption(f"--max-drop and --metric {metric.name} compare outputs on data: give some with --calibration or --evaluate.")
        if held.noise:
            raise BadOption(f"--metric {metric.name} says nothing on made-up data ({held.name}): give real ones with --evaluate.")
    dense = analysis.given if analysis.edits else analysis.normal.model
    return judge(dense, metric, held or Evidence("nothing", (), analysis.normal.model, False), output=budget.output)


def budget_of(target: str | Sequence[str] | Budget) -> Budget:
    """A budget, whatever form it was given in."""
    return target if isinstance(target, Budget) else Budget((target,) if isinstance(target, str) else tuple(target))


def check_limits(budget: Budget, ratio: float | None, scope: str | None) -> None:
    """Raises BadOption for options that say two things at once."""
    if budget.asks and ratio is not None:
        raise BadOption("--ratio says how many channels go, --target and --max-drop what is left: give one of them.")
    if budget.asks and scope is not None:
        raise BadOption("--scope spreads a ratio; with --target and --max-drop, --allocation says how widths are found.")
