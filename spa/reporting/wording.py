"""How figures of a report read, for the page and for Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spa.tables.report import amount, count_of, duration


@dataclass(frozen=True)
class Entry:
    """One figure before and after; share: what is left of it, None where there was nothing."""

    name: str
    before: str
    after: str
    share: float | None


@dataclass(frozen=True)
class LapRow:
    """One model's time: median, quartiles, ratio to the first with its interval, and what else was measured as (name, text)."""

    name: str
    median: float
    low: float
    high: float
    ratio: float
    interval: str
    verdict: str
    more: tuple[tuple[str, str], ...]


_COUNTS = (("macs", "MACs", ""), ("parameters", "Parameters", ""), ("file_bytes", "File size", "B"), ("weight_bytes", "Weights", "B"),
           ("peak_activation_bytes", "Peak activations", "B"))
_LAP = {"model", "median_seconds", "low_quartile", "high_quartile", "ratio_to_first", "ratio_interval", "verdict", "placement"}
_CLOCKS = {"cpu": "CPU time", "wall": "time on the wall"}


def entries(data: Mapping[str, Any]) -> list[Entry]:
    """The counts before and after; the weights' bytes where there are no files."""
    found = []
    for key, name, unit in _COUNTS:
        if key not in data["before"] or (key == "weight_bytes" and "file_bytes" in data["before"]):
            continue
        old, new = data["before"][key], data["after"][key]
        found.append(Entry(name, amount(old, unit), amount(new, unit), new / old if old else None))
    return found


def budget_rows(budget: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """What a budget limited: (cost, before, limit, after); the limit is "–" for a cost that was only predicted."""
    def shown(kind: str, value: Any) -> str:
        if value is None:
            return "–"
        return duration(value) if kind == "latency" else amount(value, "B" if kind in ("size", "memory") else "")

    costs = (budget or {}).get("costs", {})
    return [(kind, shown(kind, dense), shown(kind, limit), shown(kind, found)) for kind, (dense, found, limit) in costs.items()
            if limit is not None or kind == "latency"]


def headline(data: Mapping[str, Any]) -> dict[str, str]:
    """The verdict: state (proven, differs, unproven) and a sentence."""
    proof = data["proof"]
    if proof is None:
        return {"state": "unproven", "label": "Not proven", "text": "The proof was not run (--no-check)."}
    worst, allowed = number(proof["largest_difference"]), number(proof["tolerance"])
    if not proof["outputs"]:
        return {"state": "unproven", "label": "Not proven", "text": "The model has no outputs to compare."}
    if not proof["passed"]:
        return {"state": "differs", "label": "Differs", "text": f"An output differs by {worst} of its scale, where {allowed} is allowed."}
    return {"state": "proven", "label": "Proven", "text": f"Removing equals masking: outputs differ by at most {worst} of their scale, "
                                                          f"{allowed} is allowed."}


def number(value: Any) -> str:
    """A number as people write it: 0, 12, 0.931, 2.1e-07; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def unset(value: Any) -> bool:
    """Whether an option says nothing."""
    return value is None or value in ([], {}, "")


def option_text(value: Any) -> str:
    """A value of an option."""
    if unset(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {option_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(option_text(v) for v in value)
    return number(value)


def race_heading(race: Mapping[str, Any]) -> str:
    """What a race ran on."""
    return ", ".join(str(t) for t in (race["provider"], race.get("version")) if t)


def race_text(race: Mapping[str, Any]) -> str:
    """How a race was run, and what its self-check found."""
    clock = _CLOCKS.get(str(race.get("compared")))
    threads = count_of(race["threads"], "thread") if race["threads"] else "default threads"
    text = f"Median of {count_of(race['rounds'], 'round')}, {threads}{', ' + clock if clock else ''}."
    itself = race.get("self_check")
    if not itself:
        return text
    span = interval_text(itself["interval"])
    noisy = " The machine is too noisy for smaller differences." if itself["too_noisy"] else ""
    return f"{text} The first model against itself: {100 * itself['ratio']:.1f} %{f' ({span})' if span else ''}.{noisy}"


def interval_text(interval: Any) -> str:
    """An interval of ratios, "" where it is not known."""
    known = isinstance(interval, list) and len(interval) == 2 and all(isinstance(x, int | float) and math.isfinite(x) for x in interval)
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f} %" if known else ""


def lap_rows(race: Mapping[str, Any]) -> list[LapRow]:
    """The laps of a race, whatever a newer one measures besides; the ratio of the first to itself has no interval."""
    found = []
    for i, lap in enumerate(race["laps"]):
        more = tuple((k.replace("_", " "), measured(k, v)) for k, v in lap.items() if k not in _LAP and v is not None)
        found.append(LapRow(
            str(lap["model"]), float(lap["median_seconds"]), float(lap["low_quartile"]), float(lap["high_quartile"]),
            float(lap["ratio_to_first"]), interval_text(lap.get("ratio_interval")) if i else "", str(lap.get("verdict") or ""), more))
    return found


def elsewhere(race: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Nodes that did not run where they were asked to, as (model, node, why)."""
    return [(str(lap["model"]), str(node), str(why)) for lap in race["laps"]
            for node, why in ((lap.get("placement") or {}).get("fell_back") or {}).items()]


def measured(key: str, value: Any) -> str:
    """A measured figure, its unit told by its name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return duration(value) if "seconds" in key else amount(value, "B") if "bytes" in key else number(value)
    return "–" if value == "nan" else option_text(value)
