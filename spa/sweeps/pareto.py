"""The Pareto front: what nothing else beats in everything."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto(costs: ArrayLike) -> NDArray[np.bool_]:
    """Which rows are on the front.

    Parameters
    ----------
    costs
        (n, d) figures of n points, the less the better. A figure of which more is better comes negated.

    Returns
    -------
    (n,) True where no other row is as good in everything and better in something. Equal rows are on it together; a row with NaN, of
    which something is not known, neither is on it nor keeps others off.
    """
    found = np.asarray(costs, np.float64)
    known: NDArray[np.bool_] = np.logical_not(np.isnan(found).any(axis=1))
    front = known.copy()
    for i in np.flatnonzero(known):
        better = (found <= found[i]).all(axis=1) & (found < found[i]).any(axis=1)  # comparisons with NaN are False
        front[i] = not better.any()
    return front
