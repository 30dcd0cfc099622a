"""Cutting: the removal carried out, after a repair if one is asked for. What is proven, evaluated and written comes from here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.data.evidence import Evidence, transplanted
from spa.errors import BadOption, SpaError
from spa.graph.analysis import Analysis, evidence_for
from spa.graph.normalize import Normal
from spa.plans.rewrite import CannotRestate, narrowed_inputs, rewrite
from spa.repairs.repair import Repaired, RepairOptions
from spa.repairs.repair import repair as _mend
from spa.stages import Stage, quiet
from spa.storage.store import Model, with_graph
from spa.vocabularies.vocabulary import ids_of, with_map


@dataclass(frozen=True)
class Cut:
    """A smaller model. analysis, gone: what it was cut from, with repaired weights if there was a repair, and the mask of what went."""

    model: Model
    analysis: Analysis
    gone: NDArray[np.bool_]
    repaired: Repaired | None


def cut(
    analysis: Analysis, gone: NDArray[np.bool_], *, repair: str | RepairOptions = "none", calibration: Any = None, seed: int = 0,
    stage: Stage = quiet,
) -> Cut:  # fmt: skip
    """Repairs and removes, without any proof. Raises SpaError, with the groups to leave out, if a node can't be resized."""
    analysis, gone, repaired = _repaired(analysis, gone, repair, calibration, seed, stage)
    groups = analysis.groups
    with stage("rewriting"):
        try:
            graph = rewrite(analysis.normal.model.graph, groups, gone, analysis.normal.copies)
        except CannotRestate as error:
            names = ", ".join(groups.groups[i].name for i in error.groups if gone[groups.groups[i].coordinates].any())
            raise SpaError(f"Node {error.node} can't be resized ({error.cause}): leave its groups out with --exclude: {names}.") from error
    with_map(graph, ids_of(groups, gone))
    small = replace(with_graph(analysis.normal.model, graph), narrowed=narrowed_inputs(groups, gone))
    return Cut(small, analysis, gone, repaired)


def _repaired(
    analysis: Analysis, gone: NDArray[np.bool_], how: str | RepairOptions, calibration: Any, seed: int, stage: Stage
) -> tuple[Analysis, NDArray[np.bool_], Repaired | None]:
    """The analysis with repaired weights, and the removal in its groups; as they were if no repair is wanted."""
    options = how if isinstance(how, RepairOptions) else RepairOptions(how)
    if options.method == "none":
        return analysis, gone, None
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage)
    if evidence is None and options.method == "fold":
        evidence = Evidence("nothing", (), analysis.normal.model, True)
    if evidence is None:
        raise BadOption(f"--repair {options.method} fits layers to data: give some with --calibration (none draws noise).")
    with stage("repairing"):
        found = _mend(evidence.model, analysis.groups, gone, evidence.batches, options, seed=seed)
        found = replace(found, model=transplanted(found.model, evidence.model, analysis.normal.model, analysis.groups))
    copies = {c: o for c, o in analysis.normal.copies.items() if not {c, o} & found.changed}
    normal = Normal(found.model, found.groups.traced.facts, copies)
    return replace(analysis, normal=normal, groups=found.groups), found.gone, found
