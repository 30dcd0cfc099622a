"""Repair: what removed channels told the layers that read them is taken over by the channels that stay, in closed form.

    dense graph, plan, calibration --repair--> the dense graph with other weights --rewrite--> the pruned graph

Only weights that lose columns, their constants, and the statistics of norms behind them change; the deletion itself is that of the
plan. The repaired dense graph is a model of its own: another tool, or `spa apply --other-weights`, can cut it.

Every layer is fitted in graph order (`spa.repairs.solve`). Its inputs are those of the network as pruned and repaired up to there, its
target what the dense layer gave on the same data (`inputs="pruned"`, `target="dense"`; Kwon et al. 2022, OSSCAR's `fullseq`), so that a
layer also makes good what its predecessors could not. `inputs="dense"` fits each layer alone, in one stream over the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spa.graph.groups import Groups
from spa.proof.feeds import Feeds
from spa.repairs.fold import fold
from spa.repairs.mending import Work
from spa.repairs.repair_options import METHODS, LayerRepair, Repaired, RepairOptions
from spa.repairs.solve import DAMPING
from spa.storage.store import Model


def repair(
    model: Model, groups: Groups, gone: NDArray[np.bool_], batches: Sequence[Feeds], options: RepairOptions | None = None, *, seed: int = 0
) -> Repaired:
    """Repairs the normalised model for the removal of `gone`. Mutates nothing.

    Raises BadOption for data that a layer cannot be fitted on, UnsupportedModel where the runtime fails.
    """
    chosen = options or RepairOptions()
    if chosen.method == "fold":
        return _folded(model, groups, gone, batches, chosen, seed)
    work = Work(model, groups, gone, chosen, seed)
    if not batches and chosen.method != "none":
        work.fit_closed()
    elif chosen.method != "none":
        if chosen.inputs == "dense":
            work.fit_dense(batches)
        if chosen.inputs == "pruned" or work.norms:
            work.walk(batches)
    return work.result()


def _folded(
    model: Model, groups: Groups, gone: NDArray[np.bool_], batches: Sequence[Feeds], options: RepairOptions, seed: int
) -> Repaired:
    """Merges instead of dropping; with data, the norms are measured again, else corrected from the weights alone."""
    measure = bool(batches) and options.norms
    found = fold(model, groups, gone, variance=not measure)
    if not measure:
        return Repaired(found.model, groups, gone, (), found.skipped, found.variances, found.changed)
    work = Work(model, groups, gone, options, seed)
    work.start = found.model
    work.walk(batches)
    done = work.result()
    return replace(done, skipped=found.skipped, changed=done.changed | found.changed)


__all__ = ["DAMPING", "METHODS", "LayerRepair", "RepairOptions", "Repaired", "repair"]
