"""How to repair, and what a repair gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption
from spa.graph.groups import Groups
from spa.repairs.solve import DAMPING
from spa.storage.store import Model

METHODS = ("none", "bias", "affine", "obspa", "fold")


@dataclass(frozen=True)
class RepairOptions:
    """How to repair.

    method: what may change: nothing, the constant (bias), one scale a channel too (affine), all weights (obspa). "fold" needs no data:
    removed channels are merged into the kept ones that are most like them (`spa.repairs.fold`), and data only serve to measure norms again.
    inputs: "pruned" (as they are after the layers before were pruned and repaired) or "dense". target: "dense" (the dense layer's
    output) or "pruned" (the dense layer's weights on the inputs as they are). damping: λ over the mean variance of a layer's inputs.
    norms: whether stored means and variances behind repaired layers are measured again, as changes of what the dense network
    gives on the same data (so noise does no harm).
    """

    method: str = "obspa"
    inputs: str = "pruned"
    target: str = "dense"
    damping: float = DAMPING
    norms: bool = True

    def __post_init__(self) -> None:
        for name, value, choice in (("--repair", self.method, METHODS), ("--repair-inputs", self.inputs, ("pruned", "dense")),
                                    ("--repair-target", self.target, ("dense", "pruned"))):  # fmt: skip
            if value not in choice:
                raise BadOption(f"{name} is {value!r}; the choice is: {', '.join(choice)}.")
        if not self.damping >= 0:
            raise BadOption(f"--damping is {self.damping}, but must be 0 or more: 0.01 is one percent of the mean variance.")


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer: columns removed of how many, and the mean squared error of its output over the output's variance,
    without and with repair, on the calibration data.
    """

    name: str
    removed: int
    columns: int
    before: float
    after: float


@dataclass(frozen=True)
class Repaired:
    """The dense model with repaired weights, its groups and the plan's mask over them (new biases are places too), and what was done.

    skipped: layers that lose channels and could not be repaired, with the reason. norms: how many norms were measured again.
    changed: stored tensors that hold other values now. thin: layers that were fitted on fewer rows than they have columns.
    """

    model: Model
    groups: Groups
    gone: NDArray[np.bool_]
    layers: tuple[LayerRepair, ...]
    skipped: Mapping[str, str]
    norms: int
    changed: frozenset[str] = frozenset()
    thin: tuple[str, ...] = ()
