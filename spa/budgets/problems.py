"""Problems of allocation, put together from groups, scores, costs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spa.budgets.allocate import Allocation, Costs, Problem, allocate, check_possible
from spa.budgets.costs import CostModel
from spa.budgets.targets import Target, amount
from spa.criteria.score import Scores
from spa.errors import BadOption
from spa.graph.groups import Groups
from spa.plans.choose import NORMALIZATIONS, Space, order_of

Array = NDArray[np.float64]


def score_losses(space: Space, scores: Scores, normalize: str) -> list[Array]:
    """Loss on each rung of each group's ladder: the sum of the scores that go, made comparable between groups."""
    found = []
    for group in space.chosen:
        ordered = NORMALIZATIONS[normalize](scores.values[group.coordinates])[order_of(group, replace(scores, held=space.held))]
        lost = np.concatenate([[0.0], np.cumsum(ordered - min(ordered.min(), 0.0))])
        found.append(lost[group.size - space.ladder(group)])
    return found


def even_losses(space: Space) -> list[Array]:
    """Losses that spread a removal evenly: the square of the share that goes, times the size."""
    return [((1 - space.ladder(g) / g.size) ** 2) * g.size for g in space.chosen]


def decide(groups: Groups, space: Space, costs: Costs, targets: Sequence[Target], *, way: str, losses: Sequence[Array]) -> Allocation:
    """Widths that meet the targets; see `spa.budgets.allocate.allocate` for the ways. Raises BadOption for what is impossible."""
    dense = np.array([g.size for g in groups.groups], np.float64)
    whole = costs(dense[None])
    limits = {t.kind: t.limit(float(whole[t.kind][0])) for t in targets}
    if all(limit >= whole[kind][0] for kind, limit in limits.items()):
        found = ", ".join(f"{kind} {amount(kind, float(whole[kind][0]))}" for kind in limits)
        raise BadOption(f"The model is within the target already ({found}): there is nothing to prune for it.")
    ladders = tuple(space.ladder(g) for g in space.chosen)
    chosen = tuple(g.index for g in space.chosen)
    problem = Problem(dense, chosen, ladders, tuple(even_losses(space) if way == "uniform" else losses), costs, limits)
    check_possible(problem)
    return allocate(problem, way, _evenly(space, ladders))


def _evenly(space: Space, ladders: Sequence[NDArray[np.int64]]) -> Callable[[float], NDArray[np.int64]]:
    """Rungs on which every group loses a share, groups with a ratio of their own in proportion to it."""
    own = [space.wanted[g.index] for g in space.chosen]
    most = max(own, default=1.0) or 1.0

    def even(share: float) -> NDArray[np.int64]:
        kept = [space.kept(g, g.size * (1 - share * w / most)) for g, w in zip(space.chosen, own, strict=True)]
        return np.array([int(np.searchsorted(x, k)) for x, k in zip(ladders, kept, strict=True)], np.int64)

    return even


def static_costs(groups: Groups, file_bytes: int) -> Costs:
    """Costs that are known without a run: macs, params, size, memory. `file_bytes`: of the model as it is."""
    model = CostModel(groups)
    overhead = int(file_bytes - model.costs(model.dense[None])["size"][0])

    def costs(widths: Array) -> Mapping[str, Array]:
        found = dict(model.costs(widths))
        return found | {"size": found["size"] + overhead}

    return costs
