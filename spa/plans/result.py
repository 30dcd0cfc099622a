"""What comes of pruning, and how it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from spa.errors import BadOption
from spa.graph.analysis import Analysis, analyze
from spa.graph.count import Counts
from spa.plans.companions import Companions, Remap, Written, rewritten
from spa.plans.plan import Plan, make_plan, mask_of
from spa.proof.check import Check
from spa.repairs.repair import Repaired
from spa.storage.files import Pieces
from spa.storage.store import Model, save, to_proto
from spa.vocabularies.vocabulary import Ids, map_name


@dataclass(frozen=True)
class Result:
    """A pruned model: the plan, the counts before and after, and the proof (None if it was not asked for).

    repaired: what repair did, None without one; it holds the repaired weights before the deletion. ids: what is left of the vocabulary,
    None if nothing of it went.
    """

    model: Model
    plan: Plan
    analysis: Analysis
    before: Counts
    after: Counts
    check: Check | None
    repaired: Repaired | None = None
    ids: Ids | None = None

    def save(
        self, path: str | os.PathLike[str], *, plan: str | os.PathLike[str] | None = None, beside: Sequence[tuple[Path, Pieces]] = ()
    ) -> None:
        """Writes the model, and the plan if a path is given, and the map of ids if any went; whole or not at all."""
        files: list[tuple[Path, Pieces]] = [] if plan is None else [(Path(plan), [self.plan.to_json().encode()])]
        if self.ids is not None:
            files.append((map_name(Path(path)), [(json.dumps(self.ids.data(), separators=(",", ":")) + "\n").encode()]))
        save(self.model, path, beside=[*files, *beside])

    def companions(
        self, found: Companions | None, model: Path, output: Path, *, remap: Remap | None = None
    ) -> Written:
        """The files beside a language model as they belong beside the pruned one (`spa.plans.companions`), for `save`'s `beside`.

        model, output: the model's own file, and where this one goes. remap: gives a configuration its new ids, where ids went.
        Raises UnsupportedModel where a runtime could not use them.
        """
        return rewritten(found, self.analysis, self.gone, model, output, remap=remap)

    @property
    def gone(self) -> NDArray[np.bool_]:
        """The mask of what went, over all coordinates of the analysis."""
        fits = self.repaired is not None and len(self.repaired.gone) == self.analysis.groups.total
        return self.repaired.gone if fits and self.repaired is not None else mask_of(self.plan, self.analysis.groups)

    def save_repaired(self, path: str | os.PathLike[str], *, plan: str | os.PathLike[str] | None = None) -> None:
        """Writes the model with repaired weights but nothing removed yet, and a plan that removes the same from it.

        Raises BadOption if nothing was repaired.
        """
        if self.repaired is None:
            raise BadOption("Nothing was repaired, so there is no repaired model to write: ask for a repair with --repair obspa.")
        save(self.analysis.normal.model, path)
        if plan is not None:
            again = analyze(path, **self.analysis.options)
            gone = mask_of(self.plan, again.groups)
            options, notes, copies = self.plan.options, self.plan.notes, again.normal.copies
            make_plan(again.given, again.groups, gone, copies=copies, options=options, trace=again.settings, notes=notes).save(Path(plan))

    def to_proto(self) -> ModelProto:
        """The pruned model as a ModelProto."""
        return to_proto(self.model)
