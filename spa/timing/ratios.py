"""What may be said about times: medians of paired ratios, with bootstrap intervals.

One round runs every model once, so what disturbs a round disturbs all in it and cancels in the ratio of two of its times. For the times
a_1 … a_n of the first model and b_1 … b_n of another, the ratio is the median of b_i / a_i; its 95 % interval is that of the medians of
2,000 draws of n rounds with replacement (percentile bootstrap, Efron 1979).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
LEAST = 6  # rounds: of fewer, all lie on one side of the true median by chance more than once in 20 times
_ELEMENTS = 1 << 21  # drawn at once, which bounds memory

FASTER, SLOWER, SAME, FEW = "faster", "slower", "no difference found", "too few rounds to tell"


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios, and the ends of its 95 % interval."""

    middle: float
    low: float
    high: float

    @property
    def offset(self) -> float:
        """How far from 1 the interval reaches, if it does not contain 1; else 0."""
        return 0.0 if self.low <= 1 <= self.high else max(abs(self.low - 1), abs(self.high - 1))


def paired(times: NDArray[np.float64], first: NDArray[np.float64], *, seed: int = 0) -> Ratio:
    """Median of times / first, round by round, with its interval; both (rounds,). NaN where a clock gave no positive time."""
    if not (times > 0).all() or not (first > 0).all():
        return Ratio(math.nan, math.nan, math.nan)
    ratios = times / first
    rng = np.random.default_rng(seed)
    n = len(ratios)
    step = max(_ELEMENTS // n, 1)
    medians = np.concatenate([
        np.median(ratios[rng.integers(0, n, (min(step, DRAWS - start), n))], axis=1) for start in range(0, DRAWS, step)
    ])
    tail = (1 - LEVEL) / 2
    return Ratio(float(np.median(ratios)), float(np.quantile(medians, tail)), float(np.quantile(medians, 1 - tail)))


def verdict(ratio: Ratio, rounds: int, *, offset: float = 0.0) -> str:
    """What the interval says: faster, slower, or that no difference was found.

    offset: how far from 1 the first model came against itself where it should have come to 1; what lies closer is no difference.
    """
    if rounds < LEAST:
        return FEW
    if ratio.high < 1 - offset:
        return FASTER
    if ratio.low > 1 + offset:
        return SLOWER
    return SAME
