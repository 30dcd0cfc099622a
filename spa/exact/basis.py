"""The singular basis of a product A Bᵀ with few columns, without making the product.

    A = Q_a R_a,  B = Q_b R_b,  R_a R_bᵀ = U S Vᵀ          d × d instead of n_a × n_b
    A' = A T_aᵀ = Q_a U S^½,    T_a = S^-½ Vᵀ R_b
    B' = B T_bᵀ = Q_b V S^½,    T_b = S^-½ Uᵀ R_a
    A' B'ᵀ = A Bᵀ,  and the first r columns of both give its best approximation of rank r (Eckart, Young)

Rows of A' and B' are what weights become: both keep half of each singular value. Where rows of A and B are weighted (L_aᵀ A, of data
with second moments L_a L_aᵀ), the best approximation is that for those data, and the identity holds all the same.

    Reducing the Transformer Architecture to a Minimum, 2024; SVD-LLM, arXiv 2403.07378; MoDeGPT, arXiv 2408.09632
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NOTHING = 1e-15  # of the largest singular value, times d: a direction that is nothing but rounding


def singular_basis(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """(d, d) T_a, (d, d) T_b and (d,) the singular values, largest first; rows of T are zero where the product has no direction left.

    a: (n_a, d). b: (n_b, d). Signs are such that the largest element of each row of T_a is positive.
    """
    d = a.shape[1]
    left, right = _triangle(a), _triangle(b)
    u, s, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    there = s > NOTHING * d * s.max(initial=0.0)
    u, s, vt = u[:, there], s[there], vt[there]
    root = 1 / np.sqrt(s)[:, None]
    ta, tb = np.zeros((d, d)), np.zeros((d, d))
    ta[: len(s)], tb[: len(s)] = root * (vt @ right), root * (u.T @ left)
    signs = np.where(np.take_along_axis(ta, np.abs(ta).argmax(axis=1)[:, None], axis=1) < 0, -1.0, 1.0)
    values = np.zeros(d)
    values[: len(s)] = s
    return ta * signs, tb * signs, values


def _triangle(a: Array) -> Array:
    """(min(n, d), d) R of a QR factorisation."""
    return np.asarray(np.linalg.qr(a, mode="r"), np.float64)


def is_singular_basis(a: Array, b: Array, precision: float) -> bool:
    """Whether A and B are in their singular basis already: AᵀA = BᵀB = S, diagonal and sorted, to `precision` of the largest."""
    one, two = a.T @ a, b.T @ b
    s = np.diagonal(one)
    most = precision * max(s.max(initial=0.0), np.diagonal(two).max(initial=0.0))
    plain = max(np.abs(one - np.diag(s)).max(initial=0.0), np.abs(two - np.diag(s)).max(initial=0.0)) <= most
    return bool(plain and (np.diff(s) <= most).all())
