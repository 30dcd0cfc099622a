"""How a ratio is spread over groups: thresholds that count costs, and shares that grow with depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spa.graph.groups import Group

Array = NDArray[np.float64]

FIRST = 0.5  # of the ratio: what the first layer loses
MOST = 0.95  # that the last layer loses


def threshold_by_parameters(pool: Sequence[Group], scores: Sequence[Array], share: float) -> float:
    """The score up to which coordinates hold a share of the parameters, a coordinate counted with those of its group's coordinates.

    FLAP (An et al. 2024, arXiv 2312.11983): scores standardised in each group are sorted together, and a head counts as the hundreds of
    neurons that it costs. scores: (size,) of each group; infinite ones stay.
    """
    every = np.concatenate(scores)
    costs = np.concatenate([np.full(g.size, max(g.parameters, 1e-9)) for g in pool])
    order = np.argsort(every, kind="stable")
    within = np.flatnonzero((np.cumsum(costs[order]) <= share * costs.sum() * (1 + 1e-9)) & np.isfinite(every[order]))
    return float(every[order[within[-1]]]) if len(within) else -np.inf


def log_shares(count: int, ratio: float) -> Array:
    """(count,) shares of layers, first to last, whose mean is the ratio (SlimGPT, Ling et al. 2024, arXiv 2412.18110, log-increasing).

    r_i = r_0 + (r_{n−1} − r_0) log(i + 1) / log n, here with r_0 half of the ratio, or more where r_{n−1} would go above 0.95: what is
    removed early is fed through all that follows.
    """
    if count < 2 or ratio >= MOST:
        return np.full(count, ratio)
    rise = np.log(np.arange(1, count + 1)) / np.log(count)
    mean = float(rise.mean())
    last = min(FIRST * ratio + (1 - FIRST) * ratio / mean, MOST)
    first = (ratio - last * mean) / (1 - mean)
    return np.asarray(first + (last - first) * rise)
