"""Folding: channels that resemble each other are merged, so the one that says the least of its own goes first.

With x_c all weights that go with channel c (rows of its producers and columns of its readers side by side, each stored tensor over its
Frobenius norm: `distances`), Ward's method merges at each step the two clusters A, B whose union costs least in Σ ‖x − mean‖²,

    Δ(A, B) = |A| |B| / (|A| + |B|) ‖mean A − mean B‖².

All is done on squared distances: 2Δ begins as ‖x_i − x_j‖² and follows the formula of Lance and Williams, and the member of C nearest to
its mean is the one with the least Σ_{j in C} ‖x_i − x_j‖².

    Model Folding, Wang et al., ICLR 2025, arXiv 2502.10216 (there k-means); Ward 1963; Lance & Williams 1967
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spa.criteria.registry import GroupView, Scores, Slice, criterion

COLUMNS = 1 << 22  # elements of a tensor that are made float64 at a time


@criterion("fold", aggregate=None)
def fold(view: GroupView) -> Scores:
    """The step at which the channel's cluster is merged into another: the k lowest gone, the rest stand for k merges of Ward's method."""
    return ward(distances(view.slices(), view.size))


def distances(slices: Iterable[Slice], size: int) -> Scores:
    """(size, size) squared distances of channels by their weights, each tensor over its Frobenius norm; NaN where weights are none.

    A tensor of one number a channel (bias, norm) weighs as one of the numbers of the widest matrix: the four of a norm would outweigh
    the two convolutions around it.
    """
    matrices, vectors = np.zeros((size, size)), np.zeros((size, size))
    numbers = 0  # of a channel in the widest matrix
    for one in slices:
        whole = float(np.linalg.norm(one.rows.astype(np.float64, copy=False)))
        if whole == 0:
            continue
        if one.matrix:
            numbers = max(numbers, one.rows.shape[1])
        gram = matrices if one.matrix else vectors
        step = max(1, COLUMNS // max(size, 1))
        for start in range(0, one.rows.shape[1], step):
            block = one.rows[:, start : start + step].astype(np.float64) / whole
            gram += block @ block.T
    matrices += vectors / max(numbers, 1)
    squares = np.diagonal(matrices)
    found = squares[:, None] + squares - 2 * matrices
    found[found <= 1e-14 * (squares[:, None] + squares)] = 0.0  # duplicates, but for rounding
    np.fill_diagonal(found, 0.0)
    return np.asarray(found)


def ward(squared: Scores) -> Scores:
    """(n,) the step, from 1, at which each representative disappears; the last one gets n. O(n²) memory.

    Of two clusters that merge, the representative that is nearer to the mean of both stays; of equals, the first.
    Each cluster remembers its nearest one. A merge brings no cluster nearer to a third than the nearer of its halves was (Ward's
    method is reducible), so that only clusters whose nearest one was merged look again.
    """
    n = len(squared)
    steps = np.full(n, float(n))
    if not np.isfinite(squared).all():
        return np.full(n, np.nan)
    cost = np.array(squared, np.float64)  # 2Δ between clusters, each at the place of its representative
    np.fill_diagonal(cost, np.inf)
    spread = np.array(squared, np.float64)  # (member, cluster): Σ of squared distances to the cluster's members
    count = np.ones(n)
    nearest = cost.argmin(axis=1) if n > 1 else np.zeros(n, np.int64)
    least = cost[np.arange(n), nearest]
    for step in range(1, n):
        i = int(least.argmin())
        j = int(nearest[i])
        i, j = min(i, j), max(i, j)
        total = spread[:, i] + spread[:, j]
        keep, lose = (i, j) if total[i] <= total[j] else (j, i)
        steps[lose] = step
        both, others = count[i] + count[j], count > 0
        others[[i, j]] = False
        k = np.flatnonzero(others)
        new = np.full(n, np.inf)
        new[k] = ((count[i] + count[k]) * cost[i, k] + (count[j] + count[k]) * cost[j, k] - count[k] * cost[i, j]) / (both + count[k])
        spread[:, keep] = total
        count[keep], count[lose] = both, 0
        cost[lose], cost[:, lose] = np.inf, np.inf
        cost[keep], cost[:, keep] = new, new
        least[lose] = np.inf
        stale = k[(nearest[k] == i) | (nearest[k] == j)]
        again = np.append(stale, keep)
        nearest[again] = cost[again].argmin(axis=1)
        least[again] = cost[again, nearest[again]]
    return steps
