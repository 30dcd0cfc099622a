"""Criteria of weights alone: no data are needed."""

from __future__ import annotations

import numpy as np

from spa.criteria.registry import GroupView, Scores, criterion

PAIRS = 1 << 22  # elements of a distance matrix that are made at a time


@criterion("l1")
def l1(view: GroupView) -> Scores:
    """Sum of |w| over the coordinate's weights (Li et al. 2017, arXiv 1608.08710, taken over the whole group)."""
    return view.powers(1)


@criterion("l2")
def l2(view: GroupView) -> Scores:
    """Euclidean norm of the coordinate's weights over the whole group (Fang et al. 2023, arXiv 2301.12900, eq. 4)."""
    return np.sqrt(view.powers(2))


@criterion("random", aggregate=None)
def random(view: GroupView) -> Scores:
    """Uniform in [0, 1), from the seed and the group's place alone."""
    return view.rng.random(view.size)


@criterion("lamp")
def lamp(view: GroupView) -> Scores:
    """s_c = ‖w_c‖² / Σ ‖w_j‖² over the channels j that are no smaller (Lee et al. 2021, arXiv 2010.07611, eq. 2, for channels).

    The largest gets 1, whatever the scale of the layer, so that one threshold does for all layers (`--scope global`).
    """
    squares = view.powers(2)
    order = np.argsort(squares, kind="stable")
    tail = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty(view.size)
    scores[order] = squares[order] / np.where(tail > 0, tail, 1)
    return scores


@criterion("position")
def position(view: GroupView) -> Scores:
    """The earlier, the more: for networks whose channels are in order, such as a turned residual stream (`spa.rotated`)."""
    return np.arange(view.size, 0, -1, dtype=np.float64)


@criterion("fpgm")
def fpgm(view: GroupView) -> Scores:
    """Σ_k ‖w_c - w_k‖₂ over the other channels of a tensor (He et al. 2019, arXiv 1811.00250): near the middle = replaceable."""
    return view.combine(_distances(np.asarray(s.rows, np.float64)) for s in view.slices() if s.matrix)


def _distances(rows: np.ndarray) -> Scores:
    squares = np.einsum("ij,ij->i", rows, rows)
    total = np.zeros(len(rows))
    step = max(1, PAIRS // max(len(rows), 1))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        total[block] = np.sqrt(np.maximum(squares[block, None] + squares - 2 * rows[block] @ rows.T, 0)).sum(axis=1)
    return total


@criterion("bn-scale")
def bn_scale(view: GroupView) -> Scores:
    """|γ| of the norms that the channels go through (Liu et al. 2017, arXiv 1708.06519); l2 in groups without one."""
    found = [np.abs(np.asarray(s.rows, np.float64)).sum(axis=1) for s in view.slices() if s.norm]
    return view.combine(found) if found else np.sqrt(view.powers(2))
