"""The registry, and what a criterion sees.

A criterion of a *group* looks at all of the group at once; one of a *layer* looks at one linear map that sums over the group's
channels, and `aggregate` makes one score of those of all such layers.

@spa.criterion("largest")
def largest(view): return view.powers(8) ** (1 / 8)

@spa.criterion("range", per="layer", needs="vectors", aggregate="mean")
def range_(layer): return layer.per_channel(layer.vectors.magnitude)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption

Scores = NDArray[np.float64]
Rated = TypeVar("Rated", bound=Callable[[Any], "Scores | None"])

AGGREGATES: Mapping[str, Callable[[NDArray[np.float64]], Scores]] = {
    "sum": lambda rows: rows.sum(axis=0),
    "mean": lambda rows: rows.mean(axis=0),
    "median": lambda rows: np.median(rows, axis=0),
    "max": lambda rows: rows.max(axis=0),
    "prod": lambda rows: rows.prod(axis=0),
}
NEEDS = ("", "vectors", "projections", "usage", "covariances", "gradients", "terms")


@dataclass(frozen=True)
class Slice:
    """A stored tensor in rows of channels. rows: (size, n) all elements that go with each channel, zeros where some have fewer.

    matrix: whether the tensor is more than one number a position of this axis. norm: whether it is the scale of a norm.
    """

    value: str
    axis: int
    matrix: bool
    norm: bool
    rows: NDArray[np.floating]


class Vectors(Protocol):
    """Statistics of single channels, (columns,) each: those of the layer's data over all rows."""

    mean: Scores
    square: Scores
    variance: Scores
    magnitude: Scores  # mean of |x|
    zeros: Scores  # share of rows where x is 0 or less
    norm: Scores  # mean over samples of the Euclidean norm over a sample's rows


class Terms(Protocol):
    """What is known of experts, (size,) each: tokens routed to them, and the mean over these of the norm of what they add."""

    count: Scores

    @property
    def mean(self) -> Scores:
        """Mean of ‖g f(x)‖₂ over the tokens routed to the expert; 0 where there are none."""


class LayerView(Protocol):
    """What a criterion sees of one layer that reads the group; arrays by part (groups of a convolution) and column.

    size: channels of the group. weight: (parts, outputs, columns). of: (parts, columns) channel of each column, -1 for others.
    vectors: with needs="vectors". projections: (size,) with needs="projections", the mean over rows of the L1 norm of what a channel
    adds to the output. usage: (size,) with needs="usage", the share of rows to which a channel adds most.
    systems: with needs="covariances", one a part, for `spa.criteria.select`. heads: whether a channel is many columns.
    """

    size: int
    weight: NDArray[np.float64]
    of: NDArray[np.int64]
    vectors: Vectors
    projections: Scores
    usage: Scores
    systems: Sequence[Any]
    damping: float

    def per_channel(self, columns: NDArray[np.float64]) -> Scores:
        """(size,) sums over the columns of each channel; `columns` is (columns,) or (parts, columns)."""


class GroupView(Protocol):
    """What a criterion sees of a group."""

    size: int
    rng: np.random.Generator
    seed: int
    damping: float

    def powers(self, p: float) -> Scores:
        """(size,) sum of |w|^p over all weights of each coordinate, in every tensor of the group (DepGraph's group sum)."""

    def slices(self) -> Iterator[Slice]:
        """The stored float tensors that the group occurs on, one after the other."""

    def layers(self) -> Sequence[LayerView]:
        """Layers that sum over the group's channels; with needs="covariances" they hold their systems."""

    def saliency(self, method: str, *, signed: bool = False) -> list[Scores]:
        """(size,) sums of an element-wise saliency (`spa.statistics.gradients`) for each tensor of the group; of its magnitudes unless
        `signed`.
        """

    def activation_saliency(self) -> list[Scores]:
        """(size,) for each layer that reads the group: `spa.statistics.gradients.activation_saliency` of its data."""

    def terms(self) -> Terms | None:
        """What each expert adds, token by token, if the group is one of experts that can be told apart."""

    def combine(self, rows: Iterable[Scores]) -> Scores:
        """One score of those of several tensors or layers, as `--aggregate` says; zeros if there are none."""


@dataclass(frozen=True)
class Criterion:
    """An entry of the registry. needs: "" or what must be measured on calibration data. aggregate: the default of `--aggregate`; None
    where the group is scored as one. A function of a group may return None: it says nothing of this one, which is then scored by l2.
    """

    name: str
    function: Callable[[Any], Scores | None]
    per: str = "group"
    needs: str = ""
    aggregate: str | None = "sum"


_REGISTRY: dict[str, Criterion] = {}


def criterion(
    name: str, *, per: str = "group", needs: str = "", aggregate: str | None = "sum"
) -> Callable[[Rated], Rated]:
    """Enters a criterion into the registry under a name for `--criterion`.

    per: "group" (called with a `GroupView`) or "layer" (with a `LayerView`, scores then aggregated). needs: "" (weights alone), "vectors",
    "projections", "usage", "covariances", "gradients" or "terms". aggregate: how scores of tensors or layers are joined by default,
    None where they are not.
    Raises BadOption for others.
    """
    if per not in ("group", "layer") or needs not in NEEDS or not (aggregate in AGGREGATES or (aggregate is None and per == "group")):
        choices = f"needs one of {', '.join(map(repr, NEEDS))}, aggregate one of {', '.join(AGGREGATES)}"
        raise BadOption(f"Criterion {name!r}: per is 'group' or 'layer', {choices}.")

    def enter(function: Rated) -> Rated:
        _REGISTRY[name] = Criterion(name, function, per, needs, aggregate)
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
