"""Points of a sweep: what sets one apart from the others, and what came of it."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa import criteria
from spa.budgets.allocate import WAYS
from spa.budgets.targets import read_targets
from spa.errors import BadOption
from spa.graph.explain import near
from spa.plans.choose import SCOPES, Options
from spa.repairs.repair_options import METHODS
from spa.sweeps.pareto import pareto

COSTS: Mapping[str, str] = {
    "macs": "MACs", "params": "parameters", "size": "file size", "memory": "peak activations", "latency": "latency",
}  # fmt: skip
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # where nothing is asked for


@dataclass(frozen=True)
class Setting:
    """What a point was asked for: a ratio with its scope, or a target with its allocation; a criterion and a repair."""

    criterion: str
    repair: str
    ratio: float | None = None
    scope: str | None = None
    target: str | None = None
    allocation: str | None = None

    @property
    def asked(self) -> str:
        """The ratio or target, as the command line has it."""
        return f"ratio={self.ratio:g}" if self.ratio is not None else str(self.target)

    @property
    def way(self) -> str:
        """How it was spread over groups."""
        return self.scope or self.allocation or ""

    @property
    def series(self) -> tuple[str, str, str]:
        """What it has in common with the points along one line of a plot."""
        return self.criterion, self.way, self.repair

    @property
    def name(self) -> str:
        """The name of its files."""
        plain = f"{self.asked.replace('=', '-')}_{self.way}_{self.criterion}_{self.repair}"
        safe = re.sub(r"[^A-Za-z0-9_.-]", "-", plain)[:120]
        return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one run, of the point and of the model as it is, in one race. share: of the two, with its 95 % interval."""

    seconds: float
    dense: float
    share: float
    low: float
    high: float
    verdict: str
    clock: str
    rounds: int


@dataclass(frozen=True)
class Point:
    """A pruned model of a sweep.

    costs: by the names of `COSTS`; MACs, parameters, bytes, bytes of activations, and seconds where they were measured. shares: of the
    costs of the model as it is. quality: by the sweep's metric. plan: path of its plan. failed: why there is none of that, "" if there is.
    """

    setting: Setting
    costs: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    quality: float = float("nan")
    plan: str = ""
    timing: Timing | None = None
    untimed: str = ""  # why there is no timing though one was asked for
    failed: str = ""

    @property
    def name(self) -> str:
        """The name of its files."""
        return self.setting.name


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. dense: costs of the model as it is. quality: its own figure by `metric`. points: those asked for come first."""

    folder: str
    model: str
    metric: str
    higher_is_better: bool
    quality: float
    dense: Mapping[str, float]
    points: tuple[Point, ...]

    @property
    def made(self) -> tuple[Point, ...]:
        """Points that there are."""
        return tuple(p for p in self.points if not p.failed)

    @property
    def failed(self) -> tuple[Point, ...]:
        """Points that could not be made."""
        return tuple(p for p in self.points if p.failed)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Costs that are known."""
        return tuple(k for k in COSTS if k in self.dense)

    def front(self, cost: str = "macs") -> tuple[Point, ...]:
        """Points that no other beats in both this cost and the quality, nor the model as it is; the cheapest first.

        Raises BadOption for a cost that was not measured.
        """
        if cost not in self.dense:
            hint = ": time the points with --bench" if cost == "latency" else f"{near(cost, COSTS)}; the choice is: {', '.join(self.kinds)}"
            raise BadOption(f"The sweep knows no cost {cost!r}{hint}.")
        made = self.made
        rows = [(p.costs.get(cost, np.nan), p.quality) for p in made] + [(self.dense[cost], self.quality)]
        table: NDArray[np.float64] = np.array(rows) * [1, -1 if self.higher_is_better else 1]
        best = [p for p, on in zip(made, pareto(table)[:-1], strict=True) if on]
        return tuple(sorted(best, key=lambda p: p.costs[cost]))


def grid(
    ratio: Sequence[float], target: Sequence[str], criterion: Sequence[str], repair: Sequence[str], scope: Sequence[str],
    allocation: Sequence[str],
) -> tuple[Setting, ...]:  # fmt: skip
    """All combinations, each once. Raises BadOption for what is not there; ratios by default where nothing is asked for."""
    shares = tuple(ratio) or (() if target else RATIOS)
    for name in criterion:
        criteria.get(name)
    for option, values, choice in (("--repair", repair, METHODS), ("--scope", scope, SCOPES), ("--allocation", allocation, WAYS)):
        for value in values:
            if value not in choice:
                raise BadOption(f"{option} is {value!r}; the choice is: {', '.join(choice)}.")
    for share in shares:
        Options(share)
    for text in target:
        read_targets((text,))
    found: dict[str, Setting] = {}
    for name, mending in itertools.product(criterion, repair):
        made = [Setting(name, mending, ratio=float(r), scope=s) for s, r in itertools.product(scope, shares)]
        made += [Setting(name, mending, target=t, allocation=a) for a, t in itertools.product(allocation, target)]
        found |= {s.name: s for s in made}
    return tuple(found.values())


def point_data(point: Point) -> dict[str, Any]:
    """A point as plain data, as its file holds it."""
    return asdict(point)


def point_of(data: Mapping[str, Any]) -> Point:
    """The reverse. Raises KeyError, TypeError or ValueError for what is no point."""
    timing = data["timing"]
    kept = {k: data[k] for k in ("costs", "shares", "plan", "untimed", "failed")}
    return Point(Setting(**data["setting"]), quality=float(data["quality"]), timing=None if timing is None else Timing(**timing), **kept)
