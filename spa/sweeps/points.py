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
from spa.layers.depth import ANY, Depth
from spa.plans.choose import SCOPES, Options
from spa.repairs.repair_options import METHODS
from spa.sweeps.pareto import pareto

COSTS: Mapping[str, str] = {
    "macs": "MACs", "params": "parameters", "size": "file size", "memory": "peak activations", "latency": "latency",
}  # fmt: skip
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # where nothing is asked for


@dataclass(frozen=True)
class Setting:
    """What a point was asked for: a ratio with its scope, or a target with its allocation; a criterion and a repair.

    drop_layers, layers, layer_kind: how many layers go first, or which share of them, by which method, of which kind. Where layers alone
    go there is neither ratio nor target, and criterion and repair are "".
    """

    criterion: str
    repair: str
    ratio: float | None = None
    scope: str | None = None
    target: str | None = None
    allocation: str | None = None
    drop_layers: float = 0
    layers: str = ""
    layer_kind: str = ""

    @property
    def depth(self) -> Depth | None:
        """The layers that go first, as `spa.prune` is told."""
        return Depth(self.drop_layers, self.layers, self.layer_kind) if self.drop_layers else None

    @property
    def asked(self) -> str:
        """Layers, ratio and target, as the command line has them."""
        gone = [f"layers={self.drop_layers:g}"] if self.drop_layers else []
        return " ".join([*gone, *([f"ratio={self.ratio:g}"] if self.ratio is not None else [self.target] if self.target else [])])

    @property
    def way(self) -> str:
        """How layers were chosen, and how the rest was spread over groups."""
        kind = "" if self.layer_kind == ANY else self.layer_kind
        return " ".join(part for part in (self.layers, kind, self.scope or self.allocation or "") if part)

    @property
    def learned(self) -> tuple[str, str]:
        """Names of the files of its criterion's scores, and of its losses: both are of the model without the layers that go first."""
        gone = f"_layers-{self.drop_layers:g}_{self.layers}_{self.layer_kind}" if self.drop_layers else ""
        return f"{self.criterion}{gone}", f"{self.criterion}_{self.repair}{gone}"

    @property
    def series(self) -> tuple[str, str, str]:
        """What it has in common with the points along one line of a plot."""
        way = f"{self.drop_layers:g} layers by {self.way}" if self.drop_layers and self.criterion else self.way
        return self.criterion, way, self.repair

    @property
    def name(self) -> str:
        """The name of its files."""
        asked, way = self.asked.replace("=", "-").replace(" ", "-"), self.way.replace(" ", "-")
        plain = "_".join(part for part in (asked, way, self.criterion, self.repair) if part)
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
    allocation: Sequence[str], drop_layers: Sequence[float] = (), layers: Sequence[str] = (), layer_kind: Sequence[str] = (),
) -> tuple[Setting, ...]:  # fmt: skip
    """All combinations, each once. Raises BadOption for what is not there; ratios by default where nothing is asked for.

    drop_layers: 0 for none; where some go, a ratio of 0 leaves the channels alone, as does asking for neither ratio nor target.
    """
    depths = _depths(drop_layers, layers, layer_kind)
    shares = tuple(ratio) or (() if target else (0.0,) if any(depths) else RATIOS)
    for name in criterion:
        criteria.get(name)
    for option, values, choice in (("--repair", repair, METHODS), ("--scope", scope, SCOPES), ("--allocation", allocation, WAYS)):
        for value in values:
            if value not in choice:
                raise BadOption(f"{option} is {value!r}; the choice is: {', '.join(choice)}.")
    for share in shares:
        if share or not any(depths):
            Options(share)
    for text in target:
        read_targets((text,))
    found: dict[str, Setting] = {}
    for name, mending, depth in itertools.product(criterion, repair, depths):
        made = [Setting(name, mending, ratio=float(r), scope=s, **depth) for s, r in itertools.product(scope, shares) if r]
        made += [Setting(name, mending, target=t, allocation=a, **depth) for a, t in itertools.product(allocation, target)]
        made += [Setting("", "", **depth)] if depth and 0 in shares else []
        found |= {s.name: s for s in made}
    return tuple(found.values())


def _depths(drop_layers: Sequence[float], layers: Sequence[str], layer_kind: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """What settings say of layers, in all combinations; nothing where none go."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for drop, method, kind in itertools.product(drop_layers or (0,), layers or ("finercut",), layer_kind or (ANY,)):
        if drop:
            Depth(drop, method, kind)
        found[(drop, method, kind) if drop else ()] = {"drop_layers": float(drop), "layers": method, "layer_kind": kind} if drop else {}
    return tuple(found.values())


def point_data(point: Point) -> dict[str, Any]:
    """A point as plain data, as its file holds it."""
    return asdict(point)


def point_of(data: Mapping[str, Any]) -> Point:
    """The reverse. Raises KeyError, TypeError or ValueError for what is no point."""
    timing = data["timing"]
    kept = {k: data[k] for k in ("costs", "shares", "plan", "untimed", "failed")}
    return Point(Setting(**data["setting"]), quality=float(data["quality"]), timing=None if timing is None else Timing(**timing), **kept)
