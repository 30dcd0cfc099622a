"""Sensitivity as a table for people, as plain data, and as files. Nothing is computed here."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from spa.budgets.sensitivity import GroupSensitivity, Layer, Sensitivity, Width
from spa.errors import BadOption
from spa.storage.files import write_files
from spa.sweeps.points import COSTS
from spa.tables.report import LIMIT, Name, count_of, notes, percent, printable, shorten, table
from spa.tables.sweep_plot import COLOURS
from spa.tables.sweep_report import csv_of, json_text, worth

SHOWN = 2  # layers that a line of the table names
BARS = 40  # groups in a picture
KINDS = tuple(k for k in COSTS if k != "latency")


def named(layers: tuple[Layer, ...]) -> str:
    """A group's layers in a few words; norms and constants count only where there is nothing else."""
    chief = main_layers(layers)
    first = ", ".join(shorten(layer.node, 20) for layer in chief[:SHOWN])
    return first + (f" and {len(chief) - SHOWN} more" if len(chief) > SHOWN else "")


def main_layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Those with matrices, or all if there are none."""
    return tuple(layer for layer in layers if layer.matrix) or layers


def order(found: Sensitivity) -> list[GroupSensitivity]:
    """Groups that were judged, those that lose most first."""
    return sorted((g for g in found.groups if g.widths), key=lambda g: -g.worst if not math.isnan(g.worst) else math.inf)


def tables(found: Sensitivity, *, limit: int | None = LIMIT) -> list[RenderableType]:
    """What each group alone loses and saves, and why groups stay whole."""
    unit = f" ({found.unit})" if found.unit else ""
    title = f"{printable(found.metric)} lost{unit} when one group alone loses channels; as it is {worth(found.quality)}"
    head = ("group", "couples", ">channels", *(f">-{100 * r:g} %" for r in sorted(found.ratios)), ">MACs saved", ">params saved")
    rows = []
    for group in order(found):
        by_ratio = {w.ratio: w for w in group.widths}
        last = max(group.widths, key=lambda w: w.ratio)
        rows.append((Name(group.name), Name(named(group.layers)), str(group.size), *(_lost(by_ratio.get(r)) for r in sorted(found.ratios)),
                     percent(1 - last.shares["macs"], 1), percent(1 - last.shares["params"], 1)))  # fmt: skip
    shown = [table(title, head, rows, limit=limit)]
    failed = [(Name(g.name), f"{w.width} of {g.size}", w.failed) for g in found.groups for w in g.widths if w.failed]
    if failed:
        shown.append(table(f"Failed: {count_of(len(failed), 'width')}", ("group", "width", "because"), failed, limit=limit))
    if found.notes:
        shown.append(notes(found.notes))
    said = f"  on {count_of(found.samples, 'sample')} that nothing was fitted on; widths are rounded, saved is at the last one\n"
    return [*shown, Text(said, style="dim")]


def _lost(width: Width | None) -> str:
    return "–" if width is None or width.failed else f"{width.lost:.3g}"


def sensitivity_data(found: Sensitivity) -> dict[str, Any]:
    """Exact numbers."""
    data = asdict(found)
    for group in data["groups"]:
        for width in group["widths"]:
            if width["failed"]:
                width |= {"quality": None, "lost": None}
    return data


def _csv(found: Sensitivity) -> bytes:
    head = ["group", "channels", "layers", "ratio", "width", found.metric, "lost", *KINDS, *(f"{k}_left" for k in KINDS), "failed"]
    lines: list[list[Any]] = [head]
    for group in found.groups:
        layers = "; ".join(layer.node for layer in group.layers)
        for w in group.widths:
            figures = ["", ""] if w.failed else [w.quality, w.lost]
            lines.append([group.name, group.size, layers, w.ratio, w.width, *figures, *(w.costs[k] for k in KINDS),
                          *(w.shares[k] for k in KINDS), w.failed])  # fmt: skip
    return csv_of(lines).encode()


def _json(found: Sensitivity) -> bytes:
    return json_text(sensitivity_data(found)).encode()


def _png(found: Sensitivity) -> bytes:
    """A line a group, the worst first: what it loses at each ratio, and what it saves beside it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadOption("A PNG plot needs matplotlib: pip install 'spa-prune[plot]'.") from error
    groups = order(found)[:BARS]
    drawn = Figure(figsize=(9.0, 1.6 + 0.27 * len(groups)), dpi=150, layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    rows = range(len(groups))
    for axes in (left, right):
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for row, group in enumerate(groups):
        known = [w.lost for w in group.widths if not w.failed]
        left.plot([min(known, default=0), max(known, default=0)], [row, row], color="#CCCCCC", linewidth=2, zorder=1)
    for number, ratio in enumerate(sorted(found.ratios)):
        places = [(w.lost, row) for row, g in enumerate(groups) for w in g.widths if w.ratio == ratio and not w.failed]
        left.scatter([x for x, _ in places], [y for _, y in places], s=34, color=COLOURS[number % len(COLOURS)], zorder=2,
                     edgecolors="white", linewidths=0.7, label=f"{100 * ratio:g} % of its channels gone")  # fmt: skip
    saved = [100 * (1 - min(w.shares["macs"] for w in g.widths)) for g in groups]
    right.barh(list(rows), saved, color="#9DB4C0", height=0.6)
    left.axvline(0, color="#444444", linewidth=0.8)
    left.set_yticks(list(rows), [_label(g) for g in groups], fontsize=7.5)
    left.invert_yaxis()
    left.set_xlabel(f"{found.metric} lost{f', {found.unit}' if found.unit else ''} (as it is {worth(found.quality)})")
    right.set_xlabel("MACs saved at most, %")
    drawn.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=len(found.ratios))
    held = io.BytesIO()
    drawn.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _label(group: GroupSensitivity) -> str:
    chief = main_layers(group.layers)
    first = shorten(chief[0].node if chief else group.name, 34).replace("$", r"\$")
    return first + (f" and {len(chief) - 1} more" if len(chief) > 1 else "") + f", {group.size} channels"


WRITERS: Mapping[str, Callable[[Sensitivity], bytes]] = {".csv": _csv, ".json": _json, ".png": _png}


def check_file(path: str | os.PathLike[str]) -> Path:
    """The path, if its suffix is one that can be written. Raises BadOption."""
    found = Path(path)
    if found.suffix.lower() not in WRITERS:
        raise BadOption(f"--output {found} names no kind of file that can be written: give it the suffix .csv, .json or .png.")
    if found.suffix.lower() == ".png":
        _needs_matplotlib()
    return found


def _needs_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadOption("A PNG plot needs matplotlib: pip install 'spa-prune[plot]'.") from error


def write_sensitivity(found: Sensitivity, *paths: str | os.PathLike[str]) -> None:
    """Writes files by their suffixes, all or none: .csv, .json, .png. Raises BadOption for others, BadFile if one can't be written."""
    write_files([(path, [WRITERS[path.suffix.lower()](found)]) for path in map(check_file, paths)])
