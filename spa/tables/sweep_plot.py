"""Plots of a sweep: a PNG for documents (matplotlib), and one HTML page that shows what is behind each point (plotly).

The line is the Pareto front. It is drawn in steps: with what lies between two of its points, the more expensive one can't be had.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spa.errors import BadOption
from spa.sweeps.points import COSTS, Point, Sweep
from spa.tables.sweep_report import figure, worth

# Colours that people with any colour vision tell apart (Okabe and Ito 2008); criteria get the colours, repairs the markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#444444")
MARKERS = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"), ("P", "cross"))
FRONT, DENSE, FAINT = "#222222", "#000000", 0.35
WIDE = 100.0  # largest over smallest quality above which the axis is logarithmic


def as_png(found: Sweep, cost: str = "macs", *, title: str = "") -> bytes:
    """Quality against a cost. Raises BadOption if matplotlib is not there, or the cost was not measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadOption("A PNG plot needs matplotlib: pip install 'spa-prune[plot]'.") from error
    front = found.front(cost)
    best = {p.name for p in front}
    drawn = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
    axes = drawn.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.axhline(found.quality, color=DENSE, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.6)
    x, y = _stairs(found, front, cost)
    axes.plot(x, y, color=FRONT, linewidth=1.4, alpha=0.75, zorder=2, label="Pareto front")
    for series, points in _series(found, cost).items():
        colour, marker = _look(found, series)
        axes.plot([100 * p.shares[cost] for p in points], [p.quality for p in points], color=colour, linewidth=0.8, alpha=0.3, zorder=1)
        for chosen, alpha in ((False, FAINT), (True, 1.0)):
            some = [p for p in points if (p.name in best) == chosen]
            axes.scatter([100 * p.shares[cost] for p in some], [p.quality for p in some], s=42 if chosen else 30, marker=marker[0],
                         color=colour, alpha=alpha, edgecolors="white", linewidths=0.8, zorder=4 if chosen else 3)  # fmt: skip
        axes.scatter([], [], s=42, marker=marker[0], color=colour, label=_name(found, series))
    axes.scatter([100], [found.quality], s=130, marker="*", color=DENSE, zorder=5, label="as it is")
    if _logarithmic(found):
        axes.set_yscale("log")
    axes.set_xlabel(f"{COSTS[cost]} left, % of {figure(cost, found.dense[cost])}")
    axes.set_ylabel(_worth_axis(found))
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    held = io.BytesIO()
    drawn.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def as_html(found: Sweep, cost: str = "macs", *, title: str = "") -> bytes:
    """The same as one page that loads nothing: a button for each cost, and what was asked and where the plan lies at each point.

    Raises BadOption if plotly is not there.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise BadOption("An interactive plot needs plotly: pip install 'spa-prune[plot]'.") from error
    drawn = graph_objects.Figure()
    shown: list[str] = []
    for kind in found.kinds:
        before = len(drawn.data)
        _traces(graph_objects, drawn, found, kind, visible=kind == cost)
        shown += [kind] * (len(drawn.data) - before)
    buttons = [{
        "label": COSTS[k], "method": "update",
        "args": [{"visible": [s == k for s in shown]}, {"xaxis.title.text": _cost_axis(found, k)}],
    } for k in found.kinds]  # fmt: skip
    heading = html.escape(title or f"What {found.model or 'the model'} costs and what it is worth")
    drawn.update_layout(
        template="plotly_white", font={"family": "system-ui, sans-serif", "size": 14}, hoverlabel={"align": "left"},
        title={"text": heading, "x": 0.02},
        xaxis={"title": {"text": _cost_axis(found, cost)}, "ticksuffix": " %", "rangemode": "tozero"},
        yaxis={"title": {"text": html.escape(_worth_axis(found))}, "type": "log" if _logarithmic(found) else "linear"},
        margin={"l": 70, "r": 30, "t": 110, "b": 60}, hovermode="closest",
        updatemenus=[{"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
                      "buttons": buttons, "active": found.kinds.index(cost), "showactive": True}],
    )  # fmt: skip
    plot = drawn.to_html(include_plotlyjs=True, full_html=False, div_id="sweep", default_height="100vh", config={"displaylogo": False})
    head = f"<head><meta charset=\"utf-8\"><title>{heading}</title></head>"
    page = f"<!doctype html>\n<html lang=\"en\">{head}<body style=\"margin:0\">{plot}</body></html>\n"
    return page.encode("utf-8", "backslashreplace")


def _traces(graph_objects: Any, drawn: Any, found: Sweep, cost: str, *, visible: bool) -> None:
    """Everything that is drawn against one cost."""
    front = found.front(cost)
    best = {p.name for p in front}
    x, y = _stairs(found, front, cost)
    drawn.add_trace(graph_objects.Scatter(x=x, y=y, mode="lines", name="Pareto front", line={"color": FRONT, "width": 1.6},
                                          hoverinfo="skip", visible=visible))  # fmt: skip
    for series, points in _series(found, cost).items():
        colour, marker = _look(found, series)
        name = html.escape(_name(found, series))
        drawn.add_trace(graph_objects.Scatter(  # stands in the legend, where the points' own size and opacity would be those of the first
            x=[None], y=[None], mode="markers", name=name, legendgroup=name, visible=visible,
            marker={"color": colour, "symbol": marker[1], "size": 11},
        ))  # fmt: skip
        drawn.add_trace(graph_objects.Scatter(
            x=[100 * p.shares[cost] for p in points], y=[p.quality for p in points], mode="lines+markers", name=name, legendgroup=name,
            text=[_hover(found, p) for p in points], hovertemplate="%{text}<extra></extra>", visible=visible, showlegend=False,
            marker={"color": colour, "symbol": marker[1], "size": [13 if p.name in best else 9 for p in points],
                    "opacity": [1.0 if p.name in best else FAINT for p in points], "line": {"width": 1, "color": "white"}},
            line={"color": f"{colour}44", "width": 1},
        ))  # fmt: skip
    told = "<br>".join(["<b>as it is</b>", *(f"{COSTS[k]}: {figure(k, v)}" for k, v in found.dense.items()),
                        html.escape(f"{found.metric}: {worth(found.quality)}")])  # fmt: skip
    drawn.add_trace(graph_objects.Scatter(x=[100], y=[found.quality], mode="markers", name="as it is", text=[told], visible=visible,
                                          hovertemplate="%{text}<extra></extra>",
                                          marker={"symbol": "star", "size": 16, "color": DENSE}))  # fmt: skip


def _hover(found: Sweep, point: Point) -> str:
    """What was asked for, what came of it, and where the plan lies."""
    setting = point.setting
    lines = [f"<b>{html.escape(setting.asked)}</b>, {html.escape(setting.way)}"]
    lines += [f"criterion {html.escape(setting.criterion)}", f"repair {html.escape(setting.repair)}"] if setting.criterion else []
    lines += [""]
    lines += [f"{COSTS[k]}: {figure(k, v)} ({100 * point.shares[k]:.1f} %)" for k, v in point.costs.items()]
    lines += [f"{html.escape(found.metric)}: {worth(point.quality)} (as it is {worth(found.quality)})", "", html.escape(point.plan)]
    return "<br>".join(lines)


def _stairs(found: Sweep, front: Sequence[Point], cost: str) -> tuple[list[float], list[float]]:
    """The best that can be had for at most so much: along the front, then up to the model as it is."""
    x = [100 * p.shares[cost] for p in front] + [100.0]
    y = [p.quality for p in front]
    ends = [found.quality] if not y or (found.quality > y[-1]) == found.higher_is_better else [y[-1]]
    level = y + ends
    steps_x, steps_y = x[:1], level[:1]
    for i in range(1, len(x)):
        steps_x += [x[i], x[i]]
        steps_y += [level[i - 1], level[i]]
    return steps_x, steps_y


def _series(found: Sweep, cost: str) -> dict[tuple[str, str, str], list[Point]]:
    """Points that share a criterion, a way and a repair, and whose cost is known; the cheapest first."""
    made: dict[tuple[str, str, str], list[Point]] = {}
    for point in found.made:
        if cost in point.shares:
            made.setdefault(point.setting.series, []).append(point)
    return {series: sorted(points, key=lambda p: p.shares[cost]) for series, points in sorted(made.items())}


def _look(found: Sweep, series: tuple[str, str, str]) -> tuple[str, tuple[str, str]]:
    """Colour of the criterion and marker of the rest."""
    every = [p.setting.series for p in found.made]
    colours = sorted({c for c, _, _ in every})
    rest = sorted({(r, w) for _, w, r in every})
    criterion, way, repair = series
    return COLOURS[colours.index(criterion) % len(COLOURS)], MARKERS[rest.index((repair, way)) % len(MARKERS)]


def _name(found: Sweep, series: tuple[str, str, str]) -> str:
    """What tells a series from the others."""
    settings = [p.setting.series for p in found.made]
    criterion, way, repair = series
    parts = [criterion]
    if len({s[1] for s in settings}) > 1 or not criterion:
        parts.append(way)
    if len({s[2] for s in settings}) > 1 and repair:
        parts.append("no repair" if repair == "none" else f"{repair} repair")
    return ", ".join(part for part in parts if part)


def _logarithmic(found: Sweep) -> bool:
    values = np.array([found.quality, *(p.quality for p in found.made)])
    positive = values[values > 0]
    lowest = not found.higher_is_better and len(positive) >= 2 and len(positive) >= len(values) - 1  # the dense one may be at 0
    return bool(lowest and positive.max() / positive.min() > WIDE and math.isfinite(positive.max()))


def _cost_axis(found: Sweep, cost: str) -> str:
    return f"{COSTS[cost]} left, of {figure(cost, found.dense[cost])}"


def _worth_axis(found: Sweep) -> str:
    return f"{found.metric} ({'more' if found.higher_is_better else 'less'} is better)"
