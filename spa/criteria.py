"""Criteria: plain functions that score the coordinates of a group, high = keep. A registry; a user can add to it.

@spa.criterion("largest")
def largest(view): return view.powers(8) ** (1 / 8)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption

Scores = NDArray[np.float64]


class GroupView(Protocol):
    """What a criterion sees of a group."""

    size: int
    rng: np.random.Generator

    def powers(self, p: float) -> Scores:
        """(size,) sum of |w|^p over all weights of each coordinate, in every tensor of the group (DepGraph's group sum)."""


Criterion: TypeAlias = Callable[[GroupView], Scores]
_REGISTRY: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Enters a criterion into the registry under a name for `--criterion`."""

    def enter(function: Criterion) -> Criterion:
        _REGISTRY[name] = function
        return function

    return enter


def get(name: str) -> Criterion:
    """The criterion of a name. Raises BadOption if there is none."""
    if name not in _REGISTRY:
        raise BadOption(f"There is no criterion {name!r}; the choice is: {', '.join(names())}.")
    return _REGISTRY[name]


def names() -> list[str]:
    """Names of all criteria, sorted."""
    return sorted(_REGISTRY)


@criterion("l1")
def l1(view: GroupView) -> Scores:
    """Sum of |w| over the coordinate's weights (Li et al. 2017, arXiv 1608.08710, taken over the whole group)."""
    return view.powers(1)


@criterion("l2")
def l2(view: GroupView) -> Scores:
    """Euclidean norm of the coordinate's weights over the whole group (Fang et al. 2023, arXiv 2301.12900, eq. 4)."""
    return np.sqrt(view.powers(2))


@criterion("random")
def random(view: GroupView) -> Scores:
    """Uniform in [0, 1), from the seed and the group's place alone."""
    return view.rng.random(view.size)
