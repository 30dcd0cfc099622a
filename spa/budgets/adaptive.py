"""Adaptive MLP Pruning's widths (visresearch/AMP, 2026): group by group, as narrow as a budget of loss allows.

For the groups from the last to the first, the width is searched by bisection, in at most `TRIES` steps: it is accepted if

    L(what was accepted so far, this group at this width) − L(what was accepted so far) ≤ θ

and L is then that of the accepted width. No gradients are needed: any criterion says which channels go first. With θ = N / groups no
more than N is lost in all (there θ is given: 5e-3, or log 1.02).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

TRIES = 6

Widths = Mapping[int, int]  # group -> what it keeps


def adaptive(
    groups: Sequence[tuple[int, NDArray[np.int64]]], loss: Callable[[Widths], float], budget: float
) -> tuple[dict[int, int], float]:
    """Widths of groups, and what they lose in all.

    groups: (index, ladder of widths, ascending, the last its own size), first to last. loss: of widths, all others whole; 0 where all are.
    budget: the most that may be lost in all.
    """
    kept: dict[int, int] = {}
    lost, share = 0.0, budget / max(len(groups), 1)
    for index, ladder in reversed(groups):
        low, high, here = -1, len(ladder) - 1, lost  # rungs: the widest known to lose too much, the narrowest known to do
        for _ in range(TRIES):
            if high - low < 2:
                break
            middle = (low + high) // 2
            found = loss({**kept, index: int(ladder[middle])})
            if found - lost <= share:
                high, here = middle, found
            else:
                low = middle
        if high < len(ladder) - 1:
            kept[index], lost = int(ladder[high]), here
    return kept, lost
