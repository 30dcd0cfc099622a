"""Pruning in steps: a part of the way, repaired, scored anew on what is left, and so on; each step proven against the one before.

Scores are made for the network as it is; after half of the channels went they say little of the other half. Each step removes the same
share of what is left, so that limits fall geometrically.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spa.budgets.budget import Budget, quality_of
from spa.budgets.latency import paired_seconds
from spa.budgets.problems import static_costs
from spa.budgets.targets import Target, read_targets
from spa.data.evidence import Evidence, adapted
from spa.engines import find
from spa.errors import BadOption, NothingToPrune, SpaError
from spa.graph.analysis import Analysis, analyze
from spa.graph.count import count
from spa.graph.state import composed, feeds_for
from spa.plans.plan import make_plan, mask_of
from spa.proof.feeds import one_sample
from spa.proof.prove import runnable

if TYPE_CHECKING:
    from spa.api import Result
    from spa.plans.plan import Plan


@dataclass(frozen=True)
class Stages:
    """The two halves of a step, told what differs from step to step: how to decide, and how to carry out."""

    decide: Callable[[Analysis, Evidence | None, Budget, float | None, Mapping[str, float]], Plan]
    carry_out: Callable[[Analysis, Plan, Evidence | None], Result]


def prune_in_steps(
    analysis: Analysis, stages: Stages, steps: int, *, ratio: float | None, local: bool, budget: Budget, evidence: Evidence | None
) -> Result:
    """The result of so many steps, with one plan that leads from the model as it was to what is left.

    local: whether the ratio is each group's own. Raises BadOption for --max-drop, which is searched over whole prunings; NothingToPrune
    if not even one step removes anything.
    """
    if budget.max_drop is not None:
        raise BadOption("--steps goes with --ratio or --target: --max-drop is searched in one step.")
    shares = _shares(analysis, budget)
    share = 1 - (1 - (0.5 if ratio is None else ratio)) ** (1 / steps)
    kept = {g.name: np.arange(g.size) for g in analysis.groups.groups}
    current, done, options = analysis, [], {}
    result: Result | None = None
    for number in range(1, steps + 1):
        limits = _limits(budget, shares, number, steps)
        asked = replace(budget, metric=None, evaluate=None, held=_on(budget.held, current),
                        probe=_on(budget.probe, current), target=limits)
        data = _on(evidence, current)
        try:
            own = {} if budget.asks or not local else _own_ratios(analysis, current, (1 - share) ** number)
            plan = stages.decide(current, data, asked, None if budget.asks else share, own)
        except NothingToPrune:
            if number == steps and result is None:
                raise
            continue
        except BadOption:
            if number == steps:
                raise
            continue  # a limit that the model is within already, or that no rounding comes near: later steps go further
        result = stages.carry_out(current, plan, data)
        whole = composed(current.given.narrowed, result.model.narrowed)
        result = replace(result, model=replace(result.model, narrowed=whole))
        for name, entry in plan.groups.items():
            if name not in kept or len(kept[name]) != entry["size"]:
                raise SpaError(f"--steps: group {name} is not the same after the first cut: prune in one step.")
            kept[name] = kept[name][entry["kept"]]
        options = dict(plan.options)
        done.append({"macs": result.after.macs, "parameters": result.after.parameters})
        current = analyze(result.model, **analysis.options)
    assert result is not None
    gone = np.ones(analysis.groups.total, bool)
    for group in analysis.groups.groups:
        gone[group.start + kept[group.name]] = False
    options |= {"ratio": None if budget.asks else 0.5 if ratio is None else ratio, "steps": done}
    if "budget" in options:
        options["budget"] = _record(analysis, budget, options["budget"], result)
    plan = make_plan(analysis.given, analysis.groups, gone, copies=analysis.normal.copies, options=options, trace=analysis.settings,
                     notes=result.plan.notes)  # fmt: skip
    before, after = count(analysis.dense.groups), count(analysis.groups, mask_of(plan, analysis.groups))
    return replace(result, plan=plan, analysis=analysis, before=before, after=after, repaired=result.repaired)


def _own_ratios(analysis: Analysis, current: Analysis, left: float) -> dict[str, float]:
    """Ratios that lead every group to a share of its first size, so that roundings of several steps do not add up."""
    first = {g.name: g.size for g in analysis.groups.groups}
    return {f"/^{re.escape(g.name)}$/": max(0.0, 1 - first[g.name] * left / g.size) for g in current.groups.free() if g.name in first}


def _shares(analysis: Analysis, budget: Budget) -> Mapping[str, tuple[float, float]]:
    """Kind -> (dense cost, share of it that is asked for)."""
    targets = read_targets(budget.target)
    dense = np.array([[g.size for g in analysis.groups.groups]], np.float64)
    costs = static_costs(analysis.groups, analysis.nbytes)(dense)
    found = {}
    for target in targets:
        if target.kind == "latency":
            engine = find(budget.provider, "provider")
            traced = analysis.groups.traced
            feeds = one_sample(traced, runnable(analysis.normal.model, traced, seed=0))
            whole = paired_seconds(engine, analysis.given, analysis.given, feeds, threads=budget.threads)[0]
        else:
            whole = float(costs[target.kind][0])
        found[target.kind] = whole, target.limit(whole) / whole
    return found


def _limits(budget: Budget, shares: Mapping[str, tuple[float, float]], number: int, steps: int) -> tuple[str, ...]:
    """Targets of a step, in absolute figures. Before the last, MACs stand for latency, which takes long to measure."""
    found: dict[str, float] = {}
    for kind, (whole, share) in shares.items():
        if number < steps and kind == "latency":
            continue
        found[kind] = whole * share ** (number / steps)
    if not found and shares:
        return (f"macs={shares['latency'][1] ** (1 / steps):.6f}x",) if shares["latency"][1] < 1 else ()
    return tuple(spelled(Target(kind, value, False)) for kind, value in found.items())


def spelled(target: Target) -> str:
    """A target as the command line has it, in the kind's smallest unit."""
    unit = {"size": "B", "memory": "B", "latency": "s"}.get(target.kind, "")
    return f"{target.kind}={target.value:.9g}{unit}"


def _on(evidence: Any, analysis: Analysis) -> Any:
    """Data as they are used on another model: what noise is run through is adapted to it anew."""
    if not isinstance(evidence, Evidence):
        return evidence
    model, batches = analysis.normal.model, evidence.batches
    if model.narrowed:
        batches = [feeds_for(model.narrowed, b) for b in batches]
    if evidence.noise and batches:
        fed = [{k: v for k, v in b.items() if k != evidence.labels} for b in batches]
        model = adapted(model, analysis.groups, fed)
    return replace(evidence, model=model, batches=batches)


def _record(analysis: Analysis, budget: Budget, last: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """The record of the last step, with costs and quality against the model as it was."""
    dense = np.array([[g.size for g in analysis.groups.groups]], np.float64)
    whole = static_costs(analysis.groups, analysis.nbytes)(dense)
    costs = {k: [float(whole[k][0]) if k in whole else v[0], v[1], v[2]] for k, v in last["costs"].items()}
    return {**last, "target": list(budget.target), "costs": costs, **quality_of(analysis, budget, result.model)}

