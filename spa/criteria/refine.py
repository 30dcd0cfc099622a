"""Local search over which channels go: exchanges that lower the error after repair (OSSCAR, arXiv 2403.12983)."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.criteria import select
from spa.criteria.views import Data, GroupViews
from spa.graph.groups import Groups


def refined(
    graph: gs.Graph, groups: Groups, gone: NDArray[np.bool_], data: Data, *, rounds: int, seed: int = 0,
    held: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """The removal with channels exchanged inside each group; as many go as before, and the joint error is never higher.

    held: (total,) coordinates that stay.
    """
    found = gone.copy()
    views = GroupViews(graph, groups, "sum", seed, data)
    chosen = [g for g in groups.free() if gone[g.coordinates].any() and not gone[g.coordinates].all()]
    for chunk in views.chunks(chosen):
        for index, layers in views.systems(chunk, False).items():
            group = groups.groups[index]
            systems = [s for layer in layers for s in layer.systems]
            stay = None if held is None else held[group.coordinates]
            found[group.coordinates] = select.swap(systems, gone[group.coordinates], damping=data.damping, rounds=rounds, held=stay)
    return found
