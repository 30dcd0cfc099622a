"""The tasks of a sweep, as workers run them: scores of a criterion, losses of a criterion and a repair, and points.

Each is told which layers have gone before, if any: all else is of the model without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from spa import api
from spa.budgets.budget import Budget
from spa.budgets.planner import Planner
from spa.criteria.brought import resolved
from spa.criteria.score import Known, Scores, score
from spa.criteria.views import Data
from spa.engines import find
from spa.errors import SpaError
from spa.layers.depth import Depth, Dropped, choose_layers
from spa.layers.depth_budget import budget_left
from spa.plans.choose import Options, find_space
from spa.plans.plan import Plan
from spa.sweeps.experiment import Experiment, Lab, costs_of, opened, repair_of, saved_bytes
from spa.sweeps.points import Point, Setting


@dataclass(frozen=True)
class Failure:
    """Why a task gave nothing, in a sentence."""

    sentence: str


def sentence_of(error: Exception) -> str:
    """What to tell of an error."""
    text = " ".join(str(error).split())
    said = text if isinstance(error, SpaError) else f"{type(error).__name__}: {text[:300]}"
    return said if said.endswith((".", "?", "!")) else f"{said}."


def layers(lab: Lab, depths: Iterable[Depth]) -> dict[Depth, Dropped | Failure]:
    """Which layers go, for each depth. What goes one after the other is searched for once, for the largest number."""
    found: dict[Depth, Dropped | Failure] = {}
    longest: dict[tuple[str, str], Dropped] = {}
    for depth in sorted(depths, key=lambda d: d.drop if isinstance(d.drop, float) and d.drop >= 1 else 0, reverse=True):
        try:
            key = depth.method, depth.kind
            made = choose_layers(lab.analysis, depth, lab.fit, seed=lab.experiment.seed, more=longest.get(key))
            if key not in longest or len(made.order) > len(longest[key].order):
                longest[key] = made
            found[depth] = made
        except Exception as error:  # runtimes raise anything; the other points go on
            found[depth] = Failure(sentence_of(error))
    return found


def scores(experiment: Experiment, criterion: str, dropped: Dropped | None = None) -> Scores | Failure:
    """Scores by a criterion."""
    try:
        lab = opened(experiment).without(dropped)
        wishes = experiment.wishes
        fit, damping = lab.fit, experiment.mending.damping
        data = None if fit is None else Data(fit.model, fit.batches, wishes["loss"], fit.labels, damping)
        groups = lab.analysis.groups
        own = partial(score, lab.analysis.normal.model.graph, groups, criterion, seed=experiment.seed, data=data,
                      aggregate=wishes["aggregate"], relative=wishes["normalize"] == "energy")  # fmt: skip
        return own() if wishes.get("scores") is None else resolved(wishes["scores"], groups).fill(groups, own)
    except Exception as error:  # runtimes, and criteria of others, raise anything; the other points go on
        return Failure(sentence_of(error))


def losses(experiment: Experiment, repair: str, found: Scores, dropped: Dropped | None) -> Known | Failure:
    """Losses of every group at its widths, for allocations that weigh them."""
    try:
        lab = opened(experiment).without(dropped)
        options = Options(multiple_of=experiment.wishes["multiple_of"], keep_at_least=experiment.wishes["keep_at_least"],
                          include=experiment.wishes["include"], exclude=experiment.wishes["exclude"],
                          ratios=experiment.wishes["ratios"], normalize=experiment.wishes["normalize"],
                          units=experiment.wishes["units"], protect=experiment.wishes["protect"])  # fmt: skip
        space = find_space(lab.analysis.groups, options, block=find(experiment.provider, "provider").block(),
                           held=found.held)  # fmt: skip
        # any target will do: which one it is plays no part in the losses
        budget = Budget(("macs=0.5",), "solver", metric=experiment.metric, held=lab.held, output=experiment.output,
                        provider=experiment.provider, threads=experiment.threads, time_limit=experiment.time_limit,
                        repair=repair_of(experiment, repair))  # fmt: skip
        planner = Planner(lab.analysis, space, found, budget, lab.fit, normalize=options.normalize, seed=experiment.seed)
        return Known(found, planner.losses(), planner.measured)
    except Exception as error:  # as above
        return Failure(sentence_of(error))


def point(experiment: Experiment, setting: Setting, known: Known | None, dropped: Dropped | None) -> tuple[Point, str]:
    """A point, and its plan as JSON; or the point with the reason why it failed, and nothing."""
    try:
        return _point(opened(experiment), setting, known, dropped)
    except Exception as error:  # as above
        return Point(setting, failed=sentence_of(error)), ""


def _point(lab: Lab, setting: Setting, known: Known | None, dropped: Dropped | None) -> tuple[Point, str]:
    here = lab.without(dropped)
    decided = _decided(here, setting, known)
    if dropped is not None:
        decided = replace(decided, options={**decided.options, "depth": dropped.record})
    experiment = lab.experiment
    mending = repair_of(experiment, setting.repair if decided.groups else "none")
    result = api.apply(here.analysis, decided, check=experiment.check, tolerance=experiment.tolerance, seed=experiment.seed,
                       repair=mending, calibration=here.fit)  # fmt: skip
    costs = costs_of(result.after, saved_bytes(result.model))
    return Point(setting, costs, shares(costs, lab.dense), lab.judge(result.model)), decided.to_json()


def _decided(lab: Lab, setting: Setting, known: Known | None) -> Plan:
    """The plan of a point. Limits are shares of the model as given, so that layers that have gone count."""
    experiment = lab.experiment
    budget = Budget() if setting.target is None else Budget(
        (setting.target,), setting.allocation or "auto", provider=experiment.provider, threads=experiment.threads, time_limit=0
    )  # fmt: skip
    left = budget_left(lab.analysis, budget) if setting.drop_layers else budget
    if left is None or (setting.ratio is None and setting.target is None):
        return api.layers_alone(lab.analysis, experiment.seed)
    return api.plan(
        lab.analysis, setting.ratio, criterion=setting.criterion, scope=setting.scope, calibration=lab.fit, target=left, known=known,
        seed=experiment.seed, damping=experiment.mending.damping, **experiment.wishes,
    )  # fmt: skip


def shares(costs: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """Costs over those of the model as it is."""
    return {kind: value / dense[kind] if dense.get(kind) else 1.0 for kind, value in costs.items()}


def weighs(setting: Setting, lab: Lab) -> bool:
    """Whether a setting's allocation looks at losses."""
    if setting.target is None or setting.allocation in ("uniform", "global"):
        return False
    return setting.allocation != "auto" or (lab.fit is not None and bool(lab.fit.batches))


