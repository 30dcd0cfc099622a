"""Budgets: what a pruned model may cost, as a user writes it (`macs=0.5`, `params=2M`, `size=8MB`, `memory=64MB`, `latency=20ms`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spa.errors import BadOption
from spa.graph.explain import near

_COUNT = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
UNITS: Mapping[str, Mapping[str, float]] = {
    "macs": _COUNT, "params": _COUNT, "size": _BYTES, "memory": _BYTES, "latency": _SECONDS,
}  # fmt: skip
EXAMPLES = {"macs": "macs=0.5 or macs=300M", "params": "params=2M", "size": "size=8MB", "memory": "memory=64MB", "latency": "latency=20ms"}
EXACT = 0.02  # of a target: how near counts as reached


@dataclass(frozen=True)
class Target:
    """One limit. kind: a key of `UNITS`. value: MACs, parameters, bytes or seconds; or, if `relative`, a share of the dense model's."""

    kind: str
    value: float
    relative: bool

    def limit(self, dense: float) -> float:
        """The limit in the kind's own unit."""
        return self.value * dense if self.relative else self.value


def read_targets(texts: Sequence[str]) -> tuple[Target, ...]:
    """Targets as the command line has them. Raises BadOption for what is no target, and for two of one kind."""
    found = tuple(_target(t) for t in texts)
    kinds = [t.kind for t in found]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise BadOption(f"--target gives {kind} two limits ({', '.join(t for t in texts if t.startswith(kind))}): give one.")
    return found


def _target(text: str) -> Target:
    kind, equals, rest = text.partition("=")
    if not equals or kind not in UNITS:
        raise BadOption(f"--target {text!r}: there is no target {kind!r}{near(kind, UNITS)}; for example {', '.join(EXAMPLES.values())}.")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ%]*)\s*", rest)
    if match is None:
        raise BadOption(f"--target {text!r} gives no number, such as {EXAMPLES[kind]}.")
    value, unit = float(match[1]), match[2]
    share = unit in ("x", "%") or (unit == "" and value <= 1)
    if share:
        value /= 100 if unit == "%" else 1
        if not 0 < value < 1:
            raise BadOption(f"--target {text!r}: a share of the model as it is must lie between 0 and 1, both excluded.")
        return Target(kind, value, True)
    scale = UNITS[kind].get(unit)
    if scale is None or not (math.isfinite(value) and value > 0):
        known = ", ".join(u for u in UNITS[kind] if u)
        raise BadOption(f"--target {text!r}: {kind} is given in {known}, or as a share such as {kind}=0.5.")
    return Target(kind, value * scale, False)


def amount(kind: str, value: float) -> str:
    """A cost as people read it: 1.25 G, 8.3 MB, 12.1 ms."""
    if kind == "latency":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
    units = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    unit = max((u for u in units if value >= units[u]), key=lambda u: units[u], default="")
    number = f"{value / units[unit]:.4g}"
    return f"{number} {unit}B" if kind in ("size", "memory") else f"{number} {unit}".strip()
