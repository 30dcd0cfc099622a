"""A sweep as tables for people, as plain data, and as files. Nothing is computed here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from spa.errors import BadOption
from spa.storage.files import Pieces, write_files
from spa.sweeps.points import COSTS, Point, Sweep
from spa.tables.report import LIMIT, amount, count_of, duration, plain, printable, table


def figure(kind: str, value: float) -> str:
    """A cost with its unit."""
    return duration(value) if kind == "latency" else amount(value, "B" if kind in ("size", "memory") else "")


def worth(value: float) -> str:
    """A figure of quality."""
    return f"{value:.4g}"


def heading(found: Sweep) -> str:
    """The metric, and which way is better."""
    return f"{found.metric} {'↑' if found.higher_is_better else '↓'}"


def tables(found: Sweep, cost: str, *, limit: int | None = LIMIT) -> list[RenderableType]:
    """The front, what it beats, and what could not be made."""
    front = found.front(cost)
    best = {p.name for p in front}
    rest = sorted((p for p in found.made if p.name not in best), key=lambda p: p.costs.get(cost, float("inf")))
    kinds = found.kinds
    head = ("", "asked", "by", "criterion", "repair", *(f">{COSTS[k]}" for k in kinds), f">{heading(found)}")
    dense = ("", "as it is", "", "", "", *(figure(k, found.dense[k]) for k in kinds), worth(found.quality))
    shown: list[RenderableType] = [
        table(f"Pareto front of {COSTS[cost]} and {printable(found.metric)}: {count_of(len(front), 'point')} of {len(found.made)}", head,
              [dense, *(_row(p, kinds, "●") for p in front)], limit=None)]  # fmt: skip
    if rest:
        shown.append(table(f"Beaten: {count_of(len(rest), 'point')}", head, [_row(p, kinds, "") for p in rest], limit=limit))
    if found.failed:
        failed = [(p.setting.asked, p.setting.way, p.setting.criterion, p.setting.repair, p.failed) for p in found.failed]
        shown.append(table(f"Failed: {count_of(len(failed), 'point')} (--retry tries again)",
                           ("asked", "by", "criterion", "repair", "because"), failed, limit=limit))  # fmt: skip
    untimed = [p for p in found.made if p.untimed]
    if untimed:
        shown.append(Text(f"{count_of(len(untimed), 'point')} could not be timed: {printable(untimed[0].untimed)}\n", style="yellow"))
    return shown


def _row(point: Point, kinds: Sequence[str], mark: str) -> tuple[str, ...]:
    setting = point.setting
    left = (f"{100 * point.shares[k]:.1f} %" if k in point.shares else "–" for k in kinds)
    return mark, setting.asked, setting.way, setting.criterion, setting.repair, *left, worth(point.quality)


# ---------------------------------------------------------------------- exact


def sweep_data(found: Sweep) -> dict[str, Any]:
    """The sweep with exact numbers. `front`: by cost, names of the points on the front, the cheapest first."""
    return {
        "folder": found.folder, "model": found.model,
        "metric": {"name": found.metric, "higher_is_better": found.higher_is_better},
        "dense": {"costs": dict(found.dense), "quality": found.quality},
        "front": {k: [p.name for p in found.front(k)] for k in found.kinds},
        "points": [point_row(p) for p in found.points],
    }  # fmt: skip


def point_row(point: Point) -> dict[str, Any]:
    """A point with exact numbers."""
    return {
        "name": point.name, **asdict(point.setting), "plan": point.plan or None, "costs": dict(point.costs), "shares": dict(point.shares),
        "quality": None if point.failed else point.quality, "timing": None if point.timing is None else asdict(point.timing),
        "untimed": point.untimed or None, "failed": point.failed or None,
    }  # fmt: skip


def csv_text(found: Sweep, cost: str) -> str:
    """One line a point, after one of the model as it is. front: whether it is on the front of `cost` and quality."""
    best = {p.name for p in found.front(cost)}
    kinds = found.kinds
    head = ["name", "asked", "by", "criterion", "repair", "front", *kinds, *(f"{k}_left" for k in kinds), found.metric, "plan", "failed"]
    lines: list[list[Any]] = [
        ["as it is", "", "", "", "", "", *(found.dense[k] for k in kinds), *(1 for _ in kinds), found.quality, "", ""]]
    for point in found.points:
        setting = point.setting
        lines.append([
            point.name, setting.asked, setting.way, setting.criterion, setting.repair, int(point.name in best),
            *(point.costs.get(k, "") for k in kinds), *(point.shares.get(k, "") for k in kinds),
            "" if point.failed else point.quality, point.plan, point.failed,
        ])  # fmt: skip
    return csv_of([head, *lines])


def csv_of(lines: Sequence[Sequence[Any]]) -> str:
    """Lines as CSV, numbers exact."""
    held = io.StringIO()
    csv.writer(held, lineterminator="\n").writerows([[repr(x) if isinstance(x, float) else x for x in line] for line in lines])
    return held.getvalue()


def json_text(data: Mapping[str, Any]) -> str:
    """Plain data as a file holds them."""
    return json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n"


def write_sweep(found: Sweep, *, cost: str = "macs", title: str = "") -> tuple[list[Path], str]:
    """Writes the tables and plots of a sweep into its folder: points.csv, points.json, and with the extra `plot` plot.png and plot.html.

    cost: which one the table and the PNG go by; the HTML lets its reader choose. Returns the files, and why some were left out. Raises
    BadFile if one can't be written.
    """
    from spa.tables.sweep_plot import as_html, as_png  # looks for optional packages

    folder = Path(found.folder)
    writes: list[tuple[Path, Pieces]] = [(folder / "points.csv", [csv_text(found, cost).encode()]),
                                         (folder / "points.json", [json_text(sweep_data(found)).encode()])]  # fmt: skip
    missing = ""
    for name, draw in (("plot.png", as_png), ("plot.html", as_html)):
        try:
            writes.append((folder / name, [draw(found, cost, title=title)]))
        except BadOption as error:
            missing = str(error)
    write_files(writes)
    return [path for path, _ in writes], missing

