"""Experts of a mixture: by what they add, token by token; and those that nothing can do without."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spa.criteria.registry import GroupView, Scores, criterion
from spa.graph.groups import Groups
from spa.statistics.terms import Observed

EARLY = 0.75  # of the mixtures, in the order of the graph, super experts are in
PERCENTILE = 99.5  # of all experts' largest activations, and
SHARE = 0.1  # of the largest one: a super expert's are above both


@criterion("reap", needs="terms", aggregate=None)
def reap(view: GroupView) -> Scores | None:
    """S_e = 1/|X_e| Σ_{x in X_e} g_e(x) ‖f_e(x)‖₂, X_e the tokens routed to expert e (REAP, Lasby et al. 2025, arXiv 2510.13999).

    g is the weight by which the expert's output f enters the sum, so that a term's own norm is g ‖f‖. An expert that no token was routed
    to has score 0. Groups of anything else are scored by l2, and a note says so.
    """
    terms = view.terms()
    return None if terms is None else terms.mean


def super_experts(groups: Groups, found: Observed) -> tuple[NDArray[np.bool_] | None, dict[str, str]]:
    """(total,) experts that must stay, and a note for each group that has any (Super Experts, Su et al. 2025, arXiv 2507.23279).

    With m_{l,e} = max |f_e(x)| over the tokens routed to expert e of mixture l (what its down-projection gives), e is one if

        m_{l,e} > P99.5 of all m,    m_{l,e} > max m / 10,    l < 0.75 · mixtures.

    Removing three of them breaks models of thousands. None where no expert was seen.
    """
    terms, _ = found
    if not terms:
        return None, {}
    every = np.concatenate([t.extreme for t in terms.values()])
    limit = max(float(np.percentile(every, PERCENTILE)), float(every.max()) * SHARE)
    mixtures = [g.index for g in groups.groups if g.kind == "expert"]
    held = np.zeros(groups.total, bool)
    notes = {}
    for index, found_here in terms.items():
        group = groups.groups[index]
        extreme = (found_here.extreme > limit) & (mixtures.index(index) < EARLY * len(mixtures))
        held[group.coordinates] = extreme
        if extreme.any():
            listed = ", ".join(map(str, np.flatnonzero(extreme)))
            notes[group.name] = f"keeps what looks like super experts, by the extreme outputs that they give: {listed}"
    return held, notes
