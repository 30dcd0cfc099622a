"""Sensitivity: what the quality says if one group alone shrinks, all others whole, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spa.budgets.problems import static_costs
from spa.criteria.score import Scores
from spa.engines import find
from spa.errors import BadOption, NothingToPrune
from spa.graph.analysis import Analysis, Source
from spa.graph.groups import Group, Groups
from spa.graph.trace import node_name
from spa.plans.choose import Options, Space, find_space, lowest
from spa.plans.cutting import cut
from spa.repairs.repair_options import RepairOptions
from spa.stages import Stage, quiet
from spa.sweeps import experiment, parallel, sweep_tasks
from spa.sweeps.experiment import Experiment, Lab, opened, repair_of
from spa.sweeps.points import grid
from spa.sweeps.sweep import Progress
from spa.sweeps.sweep_tasks import Failure, sentence_of, shares

RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Layer:
    """A node that stores weights on the group's channels. matrix: whether any is more than one number a channel."""

    node: str
    op: str
    weights: tuple[str, ...]
    matrix: bool


@dataclass(frozen=True)
class Width:
    """The model with one group at one width. ratio: that was asked for. lost: of the quality, in its unit. failed: why nothing is known."""

    ratio: float
    width: int
    costs: Mapping[str, float]
    shares: Mapping[str, float]
    quality: float = float("nan")
    lost: float = float("nan")
    failed: str = ""


@dataclass(frozen=True)
class GroupSensitivity:
    """A group with the layers that it couples. widths: may be fewer than ratios, where the rounding leads to the same one."""

    name: str
    size: int
    layers: tuple[Layer, ...]
    widths: tuple[Width, ...]

    @property
    def worst(self) -> float:
        """The most that any of its widths loses; NaN if nothing is known."""
        known = [w.lost for w in self.widths if not w.failed]
        return max(known, default=float("nan"))


@dataclass(frozen=True)
class Sensitivity:
    """All groups that may shrink, in graph order. dense: costs of the model as it is; quality: its figure by `metric`."""

    model: str
    metric: str
    unit: str
    higher_is_better: bool
    quality: float
    samples: int
    dense: Mapping[str, float]
    ratios: tuple[float, ...]
    groups: tuple[GroupSensitivity, ...]
    notes: Mapping[str, str]


def sensitivity(
    model: Source | Analysis,
    *,
    ratio: float | Sequence[float] = RATIOS,
    criterion: str = "l2",
    repair: str = "none",
    multiple_of: int | str = "auto",
    keep_at_least: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    units: Sequence[str] = (),
    protect_outputs: bool = True,
    stat: bool = True,
    keep_state: bool = False,
    inputs: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    calibration: Any = None,
    evaluate: Any = None,
    metric: str | None = None,
    output: str | None = None,
    aggregate: str | None = None,
    normalize: str = "mean",
    loss: str = "auto",
    repair_options: RepairOptions | None = None,
    provider: str = "cpu",
    jobs: int = 1,
    backend: str = "loky",
    tell: Callable[[Progress], None] = lambda _: None,
    stage: Stage = quiet,
) -> Sensitivity:
    """Shrinks each group alone by each ratio, and judges what is left.

    The options are those of `spa.sweep`. Raises BadOption for what is not there or does not go together, NothingToPrune where no group may
    shrink.

    >>> found = spa.sensitivity("model.onnx", calibration=batches)
    >>> max(found.groups, key=lambda g: g.worst).layers
    """
    asked = (float(ratio),) if isinstance(ratio, float | int) else tuple(float(r) for r in ratio)
    if not asked:
        raise BadOption("--ratio is empty: give shares of the channels, such as 0.25,0.5.")
    grid(asked, (), (criterion,), (repair,), ("local",), ("auto",))
    if repair not in ("none", "fold") and calibration is None:
        raise BadOption(f"--repair {repair} fits layers to data: give some with --calibration (none draws noise).")
    options = Options(asked[0], "local", multiple_of, keep_at_least, tuple(include), tuple(exclude), {}, normalize, tuple(units))
    block = find(provider, "provider").block()
    parallel.check_jobs(jobs, backend)
    wishes = {"aggregate": aggregate, "normalize": normalize, "loss": loss}
    lab = experiment.prepare(
        model, calibration=calibration, evaluate=evaluate, wishes=wishes, mending=repair_options or RepairOptions(), metric=metric,
        output=output, provider=provider, seed=seed, inputs=inputs, protect_outputs=protect_outputs, stat=stat, keep_state=keep_state,
        travels=backend == "ray",
        used=(criterion,), stage=stage,
    )  # fmt: skip
    try:
        space = find_space(lab.analysis.groups, options, block=block)
        return _found(lab, space, asked, criterion, repair, jobs, backend, tell, stage)
    finally:
        experiment.forget()


def _found(
    lab: Lab, space: Space, ratios: tuple[float, ...], criterion: str, repair: str, jobs: int, backend: str,
    tell: Callable[[Progress], None], stage: Stage,
) -> Sensitivity:  # fmt: skip
    with stage("evaluating the model as it is"):
        judged = lab.judge
    with stage("scoring"):
        scored = sweep_tasks.scores(lab.experiment, criterion)
    if isinstance(scored, Failure):
        raise BadOption(scored.sentence)
    planned = [(g, w) for g in space.chosen for w in _widths(lab, space, g, ratios)]
    if not planned:
        why = next((f"{name} {text}" for name, text in space.notes.items()), "no group may become narrower (spa inspect says why)")
        raise NothingToPrune(f"Nothing to prune: {why}.")
    found: dict[tuple[int, int], Width] = {}
    tasks = [(g.index, w.width, repair, scored) for g, w in planned]
    tell(Progress(0, len(tasks), ""))
    for number, result in parallel.run(_one, lab.experiment, tasks, jobs=jobs, backend=backend):
        group, width = planned[number]
        if isinstance(result, Failure):
            found[group.index, width.width] = replace(width, failed=result.sentence)
        else:
            found[group.index, width.width] = replace(width, quality=result, lost=judged.metric.drop(judged.value, result))
        tell(Progress(len(found), len(tasks), group.name))
    if all(w.failed for w in found.values()):
        raise BadOption(f"No group could be judged; of the first: {next(iter(found.values())).failed}")
    groups = tuple(
        GroupSensitivity(g.name, g.size, layers_of(lab.analysis.groups, g), tuple(found[g.index, w.width] for h, w in planned if h is g))
        for g in space.chosen
    )
    notes = {g.name: "no width below its own that the rounding allows (--multiple-of 1)" for g in groups if not g.widths}
    path = lab.analysis.given.path
    return Sensitivity("" if path is None else str(path), judged.metric.name, judged.metric.unit, judged.metric.higher_is_better,
                       judged.value, judged.samples, lab.dense, ratios, groups, {**space.notes, **notes})  # fmt: skip


def _widths(lab: Lab, space: Space, group: Group, ratios: Sequence[float]) -> list[Width]:
    """The widths of a group that the ratios lead to, each once, with what the model then costs."""
    made: dict[int, float] = {}
    for ratio in sorted(ratios):
        kept = space.kept(group, group.size * (1 - ratio))
        if kept < group.size:
            made.setdefault(kept, ratio)
    groups = lab.analysis.groups
    widths = np.repeat([[float(g.size) for g in groups.groups]], max(len(made), 1), axis=0)
    widths[: len(made), group.index] = list(made)
    costs = static_costs(groups, lab.analysis.nbytes)(widths)
    found = []
    for row, (width, ratio) in enumerate(made.items()):
        own = {kind: float(values[row]) for kind, values in costs.items()}
        found.append(Width(ratio, width, own, shares(own, lab.dense)))
    return found


def _one(common: Experiment, index: int, width: int, repair: str, scores: Scores) -> float | Failure:
    """The quality with one group at one width; runs in a worker."""
    try:
        lab = opened(common)
        gone = lowest(lab.analysis.groups, scores, {index: width})
        made = cut(lab.analysis, gone, repair=repair_of(common, repair), calibration=lab.fit, seed=common.seed)
        return lab.judge(made.model)
    except Exception as error:  # runtimes raise classes of their own; the other groups go on
        return Failure(sentence_of(error))


def layers_of(groups: Groups, group: Group) -> tuple[Layer, ...]:
    """Nodes that store weights on a group's axes, in graph order."""
    weights = {value for value, _ in group.sites} & set(groups.traced.weights)
    found = []
    for traced in groups.traced.nodes:
        own = tuple(t.name for t in traced.node.inputs if t.name in weights)
        if own:
            matrix = any(len(groups.traced.facts.shapes[w] or ()) > 1 for w in own)
            found.append(Layer(node_name(traced.node), traced.node.op, own, matrix))
    return tuple(found)
