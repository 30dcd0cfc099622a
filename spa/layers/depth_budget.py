"""A budget after layers were dropped: shares are of the model as given, and what the layers have saved counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spa.budgets.budget import Budget
from spa.budgets.problems import static_costs
from spa.budgets.steps import spelled
from spa.budgets.targets import Target, read_targets
from spa.graph.analysis import Analysis


def budget_left(analysis: Analysis, budget: Budget) -> Budget | None:
    """The budget for channels of a model without some layers, in absolute figures; None if the layers alone have met it.

    Latency stays a share: it is always measured against the model as given.
    """
    targets = read_targets(budget.target)
    whole, left = _costs(analysis.dense), _costs(analysis)
    limits = [t if t.kind == "latency" else Target(t.kind, t.limit(whole[t.kind]), False) for t in targets]
    rest = [t for t in limits if t.kind == "latency" or left[t.kind] > t.value]
    if targets and not rest and budget.max_drop is None:
        return None
    return replace(budget, target=tuple(spelled(t) if not t.relative else f"{t.kind}={t.value:.9g}x" for t in rest))


def _costs(analysis: Analysis) -> dict[str, float]:
    sizes = np.array([[g.size for g in analysis.groups.groups]], np.float64)
    return {k: float(v[0]) for k, v in static_costs(analysis.groups, analysis.nbytes)(sizes).items()}
