"""What every stage begins with: a model read, normalised, traced and grouped; and the data that go with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onnx import ModelProto

from spa.evidence import Evidence, gather
from spa.groups import Groups, find_groups
from spa.normalize import Normal, normalize
from spa.plan import Plan, check_belongs
from spa.stages import Stage, collector_paused, quiet
from spa.store import Model, load
from spa.trace import trace

Source: TypeAlias = str | os.PathLike[str] | bytes | ModelProto | Model


@dataclass(frozen=True)
class Analysis:
    """A model with its groups. `given` is the model as it came, `normal` what was traced."""

    given: Model
    normal: Normal
    groups: Groups
    settings: Mapping[str, Any]


def opened(model: Source) -> Model:
    """A Model, loaded if it is not one yet."""
    return model if isinstance(model, Model) else load(model)


@collector_paused()
def analyze(
    model: Source,
    *,
    inputs: Mapping[str, Sequence[int]] | None = None,
    protect_outputs: bool = True,
    stat: bool = True,
    stage: Stage = quiet,
) -> Analysis:
    """Loads, normalises, traces and groups. `inputs` fixes the shape of inputs, `stage` is told what goes on."""
    with stage("reading"):
        given = opened(model)
    with stage("finding shapes"):
        normal = normalize(given, inputs)
    with stage("tracing"):
        traced = trace(normal.model.graph, normal.facts, protect_outputs=protect_outputs, stat=stat)
        groups = find_groups(traced)
    settings = {"protect_outputs": protect_outputs, "stat": stat, "inputs": {k: list(v) for k, v in (inputs or {}).items()}}
    return Analysis(given, normal, groups, settings)


def evidence_for(analysis: Analysis, calibration: Any, *, seed: int = 0, stage: Stage = quiet) -> Evidence | None:
    """Calibration data as they are used: a `Calibration` or its source is read, an `Evidence` taken as it is; None stays None."""
    if calibration is None or isinstance(calibration, Evidence):
        return calibration
    with stage("reading calibration data"):
        return gather(analysis.normal.model, analysis.groups, calibration, seed=seed)


def analyzed_for(model: Source, plan: Plan, *, other_weights: bool = False, stage: Stage = quiet) -> Analysis:
    """Analyses a model as it was when the plan was made. Raises BadPlan for a plan of another model."""
    given = opened(model)
    check_belongs(plan, given, other_weights=other_weights)
    stat, protect = bool(plan.trace.get("stat", True)), bool(plan.trace.get("protect_outputs", True))
    return analyze(given, inputs=plan.trace.get("inputs"), protect_outputs=protect, stat=stat, stage=stage)
