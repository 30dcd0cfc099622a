"""What every stage begins with: a model read, normalised, traced and grouped; and the data that go with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from onnx import ModelProto

from spa.data.evidence import Evidence, adapted, gather
from spa.graph.count import count
from spa.graph.groups import Groups, find_groups
from spa.graph.normalize import Normal, normalize, untied
from spa.graph.trace import trace
from spa.plans.edits import Edit, edited, read_edits
from spa.plans.plan import Plan, check_belongs, graph_sha256
from spa.stages import Stage, collector_paused, quiet
from spa.storage.store import Model, load
from spa.vocabularies.vocabulary import promised, told

Source: TypeAlias = str | os.PathLike[str] | bytes | ModelProto | Model


@dataclass(frozen=True)
class Analysis:
    """A model with its groups. `given` is the model as it came, `edited` after the edits of `settings`, `normal` what was traced.

    edits: with the arrays that were fitted to data. left_out: a sentence for each edit that needs data which were not at hand.
    """

    given: Model
    edited: Model
    normal: Normal
    groups: Groups
    settings: Mapping[str, Any]
    edits: tuple[Edit, ...] = ()
    left_out: tuple[str, ...] = ()

    @cached_property
    def dense(self) -> Analysis:
        """The analysis of the model as given, before any edit: what savings are counted and timed against."""
        return self if not self.edits else analyze(self.given, **{**self.settings, "edits": ()})

    @property
    def nbytes(self) -> int:
        """Bytes of the files that the model came in, less the weights that the edits took away."""
        return self.given.nbytes - (count(self.dense.groups).weight_bytes - count(self.groups).weight_bytes if self.edits else 0)

    @property
    def options(self) -> dict[str, Any]:
        """Options of `analyze` for a model that was made of this one, in which the edits are done."""
        there = {t.name for t in self.edited.graph.inputs}
        return {**self.settings, "edits": (), "inputs": {k: v for k, v in self.settings["inputs"].items() if k in there}}


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
    keep_state: bool = False,
    edits: Sequence[Edit | Mapping[str, Any]] = (),
    vocabulary: Mapping[str, Any] | None = None,
    stage: Stage = quiet,
) -> Analysis:
    """Loads, edits, normalises, traces and groups.

    inputs: fixes the shape of inputs of the model as given. edits: changes that come first, see `spa.plans.edits`. vocabulary: lets ids go,
    as `spa.vocabularies.vocabulary.promised` takes it. stage: is told what goes on; for the rest see `trace`.
    Raises SpaError; BadPlan for edits that do not fit the model, BadOption where no ids look anything up.
    """
    with stage("reading"):
        given = opened(model)
    changes = read_edits(edits)
    changed = edited(given, changes)
    gone = {t.name for t in given.graph.inputs} - {t.name for t in changed.model.graph.inputs}
    with stage("finding shapes"):
        normal = normalize(changed.model, {k: v for k, v in (inputs or {}).items() if k not in gone})
    with stage("tracing"):
        how: dict[str, Any] = {"protect_outputs": protect_outputs, "stat": stat, "keep_state": keep_state}
        traced = trace(normal.model.graph, normal.facts, **how)
        if vocabulary is not None:
            traced = trace(normal.model.graph, normal.facts, **how, vocabulary=promised(traced, vocabulary))
        groups = find_groups(traced)
    shapes = {k: list(v) for k, v in (inputs or {}).items()}
    settings: dict[str, Any] = {**how, "inputs": shapes}
    if changes:
        settings["edits"] = [e.record for e in changes]
    if traced.vocabulary is not None:
        settings["vocabulary"] = told(traced.vocabulary)
    return Analysis(given, changed.model, normal, groups, settings, changes, changed.left_out)


def evidence_for(analysis: Analysis, calibration: Any, *, seed: int = 0, stage: Stage = quiet) -> Evidence | None:
    """Calibration data as they are used: a `Calibration` or its source is read, an `Evidence` taken as it is; None stays None."""
    if calibration is None or isinstance(calibration, Evidence):
        return calibration
    with stage("reading calibration data"):
        return gather(analysis.normal.model, analysis.groups, calibration, seed=seed)


def moved(evidence: Any, analysis: Analysis) -> Any:
    """Data as they are used on another model: what noise is run through is adapted to it anew. What is no `Evidence` stays."""
    if not isinstance(evidence, Evidence):
        return evidence
    model = analysis.normal.model
    if evidence.noise and evidence.batches:
        fed = [{k: v for k, v in b.items() if k != evidence.labels} for b in evidence.batches]
        model = adapted(model, analysis.groups, fed)
    return replace(evidence, model=model)


def analyzed_for(
    model: Source, plan: Plan, *, other_weights: bool = False, inputs: Mapping[str, Sequence[int]] | None = None, stage: Stage = quiet
) -> Analysis:
    """Analyses a model as it was when the plan was made, edits first. Raises BadPlan for a plan of another model.

    inputs: shapes other than those that the plan was made with.
    """
    given = opened(model)
    if plan.graph_sha256 != graph_sha256(given.graph):  # a plan of what was trained since, where no vectors are shared any more
        apart = untied(given)
        given = apart if plan.graph_sha256 == graph_sha256(apart.graph) else given
    check_belongs(plan, given, other_weights=other_weights)
    how = plan.trace
    flags = {k: bool(how.get(k, True)) for k in ("protect_outputs", "stat", "keep_state")}  # before there were states they were kept
    return analyze(given, inputs=inputs or how.get("inputs"), edits=how.get("edits", ()), vocabulary=how.get("vocabulary"),
                   stage=stage, **flags)  # fmt: skip
