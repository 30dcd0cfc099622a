"""Scoring: a criterion over all groups, on weights alone or with what calibration data say of the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa import criteria
from spa.criteria.experts import super_experts
from spa.criteria.views import Data, GroupViews
from spa.errors import BadModel, BadOption
from spa.graph.groups import Group, Groups

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """(total,) score of each coordinate; NaN for groups that were not scored. instead: groups that the criterion says nothing of, by l2.

    held: (total,) coordinates that stay whatever their scores; None: none. notes: group -> what is to be known of its scores.
    """

    criterion: str
    values: NDArray[np.float64]
    instead: tuple[str, ...] = ()
    held: NDArray[np.bool_] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What plans of a model by one criterion on the same data have in common, for all but the first of them.

    losses: on each rung of each group, None where no plan asked for them yet. measured: at how many widths they were measured.
    """

    scores: Scores
    losses: Sequence[Array] | None = None
    measured: int = 0


def score(
    graph: gs.Graph, groups: Groups, criterion: str = "l2", *, seed: int = 0, only: Iterable[Group] | None = None, data: Data | None = None,
    aggregate: str | None = None, relative: bool = False,
) -> Scores:  # fmt: skip
    """Scores the coordinates of the free groups (or of `only`).

    data: for criteria that need any, and to see which experts must stay (`spa.criteria.experts`). aggregate: how a group's tensors or
    layers are put together, a name of `spa.criteria.AGGREGATES`; by default the criterion's own way. relative: errors of layers count over
    the energy of their outputs, for criteria that need covariances.
    Raises BadModel for weights that hold NaN, BadOption where data are missing.
    """
    entry = criteria.get(criterion)
    if entry.needs and data is None:
        why = "needs gradients on data" if entry.needs == "gradients" else "looks at what channels carry"
        raise BadOption(f"Criterion {criterion!r} {why}: give data with --calibration (none draws noise).")
    if relative and entry.needs != "covariances":
        raise BadOption(f"--normalize energy goes with criteria that estimate errors of outputs (obs, obspa), not with {criterion!r}.")
    if aggregate is not None and entry.aggregate is None:
        raise BadOption(f"--aggregate joins scores of tensors or layers, but {criterion!r} scores a group as one: leave it out.")
    way = aggregate or entry.aggregate or "sum"
    if way not in criteria.AGGREGATES:
        raise BadOption(f"--aggregate is {way!r}; the choice is: {', '.join(criteria.AGGREGATES)}.")
    chosen = list(groups.free() if only is None else only)
    values = np.full(groups.total, np.nan)
    instead = []
    views = GroupViews(graph, groups, way, seed, data)
    plain = GroupViews(graph, groups, "sum", seed, None)
    for group, found in _by_layer(views, entry, chosen, relative) if entry.per == "layer" else _by_group(views, entry, chosen, relative):
        if found is None:
            instead.append(group.name)
            found = np.sqrt(plain.of(group).powers(2))
        found = np.asarray(found, np.float64)
        if found.shape != (group.size,):
            raise BadModel(f"Criterion {criterion!r} gave {found.shape} scores for {group.size} coordinates of {group.name}.")
        if np.isnan(found).any():
            raise BadModel(f"Criterion {criterion!r} gave NaN for group {group.name}: its weights or its data hold NaN or infinity.")
        values[group.coordinates] = found
    held, kept = super_experts(groups, views.experts) if data is not None else (None, {})
    said = {name: f"was scored by l2: {views.unseen(name, entry.needs)}, so {criterion} says nothing of it" for name in instead}
    return Scores(criterion, values, tuple(instead), held, {**kept, **said})


def _by_group(
    views: GroupViews, entry: criteria.Criterion, chosen: Sequence[Group], relative: bool
) -> Iterator[tuple[Group, NDArray[np.float64] | None]]:
    """Scores group by group; where covariances are needed, of as many groups at once as fit into memory."""
    if entry.needs != "covariances":
        for group in chosen:
            yield group, entry.function(views.of(group))
        return
    for chunk in views.chunks(chosen):
        found = views.systems(chunk, relative)
        for group in chunk:
            layers = found.get(group.index, [])
            yield group, entry.function(views.of(group, layers)) if layers else None


def _by_layer(
    views: GroupViews, entry: criteria.Criterion, chosen: Sequence[Group], relative: bool
) -> Iterator[tuple[Group, NDArray[np.float64] | None]]:
    """Scores layer by layer as statistics come in, then group by group from what the layers gave."""
    rows: dict[int, list[NDArray[np.float64]]] = {}
    for index, layer in views.layer_views(chosen, entry.needs, relative):
        rows.setdefault(index, []).append(np.asarray(entry.function(layer), np.float64))
    for group in chosen:
        found = rows.get(group.index)
        yield group, None if not found else views.combine(found, group.size)
