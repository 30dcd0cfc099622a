"""Repairing a linear layer y = W x + b that loses columns of x, in closed form and from the moments of x alone.

With μ and C the mean and the covariance of x, S the kept and P the removed columns, and any W', b' in place of W, b,

    E ‖y − y'‖² = tr((W − W') C (W − W')ᵀ) + ‖(W − W') μ + b − b'‖²      (`residual`)

and each repair minimises this over what it may change:

| repair   | may change            | W'_S                              | error that is left                     |
|----------|-----------------------|-----------------------------------|----------------------------------------|
| `drop`   | nothing               | W_S                               | tr(W_P (C_PP + μ_P μ_Pᵀ) W_Pᵀ)         |
| `bias`   | b                     | W_S                               | tr(W_P C_PP W_Pᵀ)                      |
| `affine` | b, a scale a coordinate | r ∘ W_S                         | between the two around it              |
| `obspa`  | b, W_S                | W_S + W_P B, B = C_PS C_SS⁻¹      | tr(W_P (C_PP − C_PS C_SS⁻¹ C_SP) W_Pᵀ) |
| `refit`  | b, W_S                | Cov(target, x) C_SS⁻¹             | what no linear map can reach           |

The best intercept is always b' = b + (W − W') μ. Removing columns from the inverse of all of C, in a block or one after the other with
down-dates (Optimal Brain Surgeon; OBC, arXiv 2208.11580; ZipLM, 2302.04089), ends at `obspa`, and so does the sweep of SparseGPT
(2301.00774) if the removed columns go first. `obspa` factors C_SS only and does not depend on an order.

Everything is float64; nothing is inverted: C + λI is factored (Cholesky) and solved. λ = damping × mean(diag C).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

DAMPING = 0.01  # of the mean variance: SparseGPT's and the SPA authors' prototype's

_DEAD = 1e-14  # of the mean variance: float32 activations cannot vary less
_LEAF = 64  # below this, triangular systems go to LAPACK; above, they are split and go to matrix products
_LEAST = 1e-13  # damping that is tried first where none was asked for
_MOST = 1e15  # damping that leaves nothing of C; up to there, the caller's wish
_PIVOT = 10 * np.finfo(np.float64).eps  # times d: smallest 1 − R² of a column given those before it that is more than rounding


@dataclass(frozen=True)
class Moments:
    """What a repair needs to know of d columns x over `count` rows."""

    count: float
    mean: Array  # (d,)
    covariance: Array  # (d, d), centred, divided by count (biased)


def dead(covariance: Array) -> Mask:
    """(d,) columns that do not vary: their variance is zero but for rounding."""
    diagonal = np.diagonal(covariance)
    return np.asarray(diagonal <= _DEAD * (diagonal.mean() if diagonal.size else 0.0))


def damped(covariance: Array, damping: float) -> Array:
    """C + λI with λ = damping × mean(diag C); a new array.

    A dead column is taken out of the system: its covariances become 0 and its diagonal the mean of the diagonal (1 where that is 0 too),
    so that it neither gives nor takes anything and nothing singular is left of it (SparseGPT sets H_jj = 1, in the units of H).
    """
    out = np.array(covariance, np.float64)
    if not len(out):
        return out
    mean = float(np.diagonal(out).mean())
    still = dead(out)
    out[still, :] = 0.0
    out[:, still] = 0.0
    out.flat[:: len(out) + 1] += np.where(still, mean if mean > 0 else 1.0, damping * mean)
    return out


def factor(covariance: Array, damping: float) -> tuple[Array, float]:
    """Lower Cholesky factor of `damped(covariance, damping)` and the damping that was used.

    While the factorisation fails, or a pivot is nothing but rounding (1 − R² of a column given the earlier ones below 10 d ε, whatever the
    units of the column), the damping is raised tenfold, from 1e-13 where it was 0.

    Raises
    ------
    BadOption
        The covariance holds NaN or infinities, or is so far from one that no damping helps.
    """
    if not np.isfinite(covariance).all():
        raise BadOption("The calibration statistics hold NaN or infinities; use other calibration data.")
    while damping < _MOST:
        system = damped(covariance, damping)
        try:
            lower: Array = np.linalg.cholesky(system).astype(np.float64, copy=False)
            diagonal = np.diagonal(system)
            if not len(system) or (np.diagonal(lower) ** 2 > len(system) * _PIVOT * diagonal).all():
                return lower, damping
        except np.linalg.LinAlgError:
            pass
        damping = max(10 * damping, _LEAST)
    raise BadOption("The calibration statistics are no covariances; use other calibration data.")


def forward(lower: Array, right: Array) -> Array:
    """L⁻¹ R for a lower triangle L (d, d) and R (d, n), by halves."""
    d = len(lower)
    if d <= _LEAF:
        return np.asarray(np.linalg.solve(lower, right), np.float64)
    h = d // 2
    above = forward(lower[:h, :h], right[:h])
    return np.concatenate([above, forward(lower[h:, h:], right[h:] - lower[h:, :h] @ above)])


def backward(lower: Array, right: Array) -> Array:
    """L⁻ᵀ R for a lower triangle L (d, d) and R (d, n), by halves."""
    d = len(lower)
    if d <= _LEAF:
        return np.asarray(np.linalg.solve(lower.T, right), np.float64)
    h = d // 2
    below = backward(lower[h:, h:], right[h:])
    return np.concatenate([backward(lower[:h, :h], right[:h] - lower[h:, :h].T @ below), below])


def invert(lower: Array) -> Array:
    """L⁻¹ of a lower triangle, by halves; (L Lᵀ)⁻¹ = L⁻ᵀ L⁻¹."""
    out = np.zeros(lower.shape)
    _invert(lower, out)
    return out


def _invert(lower: Array, out: Array) -> None:
    d = len(lower)
    if d <= _LEAF:
        out[:] = np.tril(np.linalg.inv(lower))
        return
    h = d // 2
    _invert(lower[:h, :h], out[:h, :h])
    _invert(lower[h:, h:], out[h:, h:])
    out[h:, :h] = -(out[h:, h:] @ lower[h:, :h]) @ out[:h, :h]


def _spread(kept: Array, removed: Mask) -> Array:
    """(m, d) from the (m, s) kept columns, zeros in the removed ones."""
    out = np.zeros((len(kept), len(removed)))
    out[:, ~removed] = kept
    return out


def _recentred(weight: Array, offset: Array, new: Array, mean: Array) -> tuple[Array, Array]:
    """The new weights with the best intercept for them, b + (W − W') μ."""
    return new, np.asarray(offset, np.float64) + (weight - new) @ mean


def drop(weight: Array, removed: Mask) -> Array:
    """No repair: W with zeros in the removed columns. (m, d), (d,) -> (m, d)."""
    return _spread(weight[:, ~removed], removed) if removed.any() else weight


def bias(weight: Array, offset: Array, moments: Moments, removed: Mask) -> tuple[Array, Array]:
    """The mean of what is lost goes to the intercept: b' = b + W_P μ_P.

    FLAP (An et al. 2023, arXiv 2312.11983) and Variance-Based Pruning do this.
    """
    if not removed.any():
        return weight, offset
    return _recentred(weight, offset, drop(weight, removed), moments.mean)


def affine(weight: Array, offset: Array, moments: Moments, removed: Mask, of: NDArray[np.int64], damping: float) -> tuple[Array, Array]:
    """One scale for each kept coordinate, and the intercept, by least squares.

    With a_c = W_c (x_c − μ_c) the part of y that comes from coordinate c and N_ce = E a_cᵀ a_e, the scales r minimise
    E ‖Σ_all a_c − Σ_kept r_c a_c‖² + λ ‖r − 1‖²: r = 1 + (N_SS + λI)⁻¹ N_SP 1, λ = damping × mean(diag N_SS). N is the sum over
    coordinates of WᵀW ∘ C. Mask tuning of Kwon et al. 2022 (arXiv 2204.09656), there by LSMR on recorded outputs. COMP (2025)
    tunes its masks so too; the metric that it chooses neurons by could not be had (only its abstract was in reach), and nothing here claims
    to be it: the error after this repair and after `obspa`, which has more freedom, is what `--criterion obspa` scores by.

    Parameters
    ----------
    weight, offset
        (m, d) and (m,).
    moments
        Of the d columns.
    removed
        (d,) columns to remove.
    of
        (d,) coordinate of each column; columns of one number share a scale, those of a negative number keep the scale 1.
    damping
        λ as a part of the mean of the diagonal of N_SS.
    """
    if not removed.any():
        return weight, offset
    weight = np.asarray(weight, np.float64)
    scaled = np.flatnonzero(~removed & (of >= 0))
    numbers, part = np.unique(of[scaled], return_inverse=True)
    new = drop(weight, removed)
    if len(numbers):
        order = np.argsort(part, kind="stable")
        columns, starts = scaled[order], np.searchsorted(part[order], np.arange(len(numbers)))
        gram = (weight[:, columns].T @ weight) * moments.covariance[columns]  # (s, d)
        lost = np.add.reduceat(gram[:, removed].sum(axis=1), starts)
        shared = np.add.reduceat(np.add.reduceat(gram[:, columns], starts, axis=0), starts, axis=1)
        lower, _ = factor(shared, damping)
        scale = 1.0 + backward(lower, forward(lower, np.where(dead(shared), 0.0, lost)[:, None]))[:, 0]
        new[:, scaled] *= scale[part]
    return _recentred(weight, offset, new, moments.mean)


def obspa(weight: Array, offset: Array, moments: Moments, removed: Mask, damping: float) -> tuple[Array, Array]:
    """All kept weights and the intercept, by ridge least squares towards the weights as they are.

    B = C_PS (C_SS + λI)⁻¹; W'_S = W_S + W_P B; b' = b + W_P (μ_P − B μ_S); λ = damping × mean(diag C_SS). It minimises
    E ‖y − y'‖² + λ ‖W'_S − W_S‖², so λ → ∞ is `bias`. Optimal Brain Surgeon on blocks of columns (ZipLM, arXiv 2302.04089; OBSPA,
    2403.18955), OSSCAR's refit on a support (2403.12983) and GRAIL's ridge map (2602.23795) are this operator.
    """
    if not removed.any():
        return weight, offset
    weight = np.asarray(weight, np.float64)
    kept = weight[:, ~removed]
    lost = weight[:, removed] @ moments.covariance[np.ix_(removed, ~removed)]  # Cov(W_P x_P, x_S)
    new = kept + _ridge(lost, moments.covariance[np.ix_(~removed, ~removed)], damping)
    return _recentred(weight, offset, _spread(new, removed), moments.mean)


def refit(
    weight: Array,
    offset: Array,
    moments_kept: Moments,
    cross: Array,
    target_mean: Array,
    removed: Mask,
    damping: float,
    *,
    always: bool = False,
) -> tuple[Array, Array]:
    """The kept weights and the intercept that best give a recorded target from the inputs as they are after pruning before this layer.

    W'_S = (Cov(target, x) + λ W_S) (C + λI)⁻¹ = W_S + (Cov(target, x) − W_S C) (C + λI)⁻¹ and b' = E target − W'_S μ: ridge towards W_S.
    Where the inputs are those of the dense network and the target is W x + b, Cov(target, x) − W_S C_SS = W_P C_PS, and this is `obspa`
    with the same damping. OSSCAR (arXiv 2403.12983, `fullseq`) and Kwon et al. 2022 aim at the dense output in this way: it also undoes
    what pruning did upstream.

    Parameters
    ----------
    weight, offset
        (m, d) and (m,) of the dense layer.
    moments_kept
        Moments of the s kept columns, in the order of the columns, in the pruned network.
    cross
        (m, s) covariance of target and kept columns over the same rows, divided by count.
    target_mean
        (m,) mean of the target over the same rows.
    removed
        (d,) columns to remove; d − s of them.
    damping
        λ as a part of the mean of the diagonal of C.
    always
        Refit also where nothing is removed here, to correct what comes from upstream.
    """
    if not (always or removed.any()):
        return weight, offset
    weight = np.asarray(weight, np.float64)
    now = weight[:, ~removed]
    new = now + _ridge(cross - now @ moments_kept.covariance, moments_kept.covariance, damping)
    return _spread(new, removed), target_mean - new @ moments_kept.mean


def _ridge(cross: Array, covariance: Array, damping: float) -> Array:
    """R (C + λI)⁻¹ of (m, s) and (s, s); a dead column gets 0."""
    lower, _ = factor(covariance, damping)
    right = np.where(dead(covariance), 0.0, cross).T
    return np.ascontiguousarray(backward(lower, forward(lower, right)).T)


def residual(weight: Array, offset: Array, new_weight: Array, new_offset: Array, moments: Moments) -> float:
    """Mean over the rows of ‖y − y'‖², exact: tr((W − W') C (W − W')ᵀ) + ‖(W − W') μ + b − b'‖². No damping."""
    change = np.asarray(weight, np.float64) - new_weight
    shift = change @ moments.mean + offset - new_offset
    return float(max(((change @ moments.covariance) * change).sum(), 0.0) + shift @ shift)


def rescale(weight: Array, moments: Moments, cross: Array, of: NDArray[np.int64], damping: float) -> Array:
    """The kept weights times one scale a channel, fitted to a recorded target as `refit` is, with ridge towards one.

    weight: (m, s) kept columns. moments: of their inputs. cross: (m, s) covariance of target and inputs. of: (s,) channel of each column.
    """
    channels, inverse = np.unique(of, return_inverse=True)
    system = (weight.T @ weight) * moments.covariance
    pick = np.zeros((len(inverse), len(channels)))
    pick[np.arange(len(inverse)), inverse] = 1
    matrix = pick.T @ system @ pick
    right = pick.T @ (weight * cross).sum(axis=0)
    lower, _ = factor(matrix, damping)
    wanted = np.where(dead(matrix), 0.0, right - matrix.sum(axis=1))
    scale = 1 + backward(lower, forward(lower, wanted[:, None]))[:, 0]
    return np.asarray(weight * scale[inverse])


def energy(weight: Array, moments: Moments) -> float:
    """Variance of the output W x, summed over outputs."""
    return float(((weight @ moments.covariance) * weight).sum())


def left(weight: Array, offset: Array, moments: Moments, cross: Array, target: Array, variance: float) -> float:
    """Mean of ‖target − W x − b‖² over the rows."""
    shift = target - weight @ moments.mean - offset
    return float(max(variance - 2 * (weight * cross).sum() + ((weight @ moments.covariance) * weight).sum(), 0.0) + shift @ shift)
