"""The report as one HTML page: no script, style, font or picture from elsewhere, and every name as text.

jinja2 escapes whatever the template prints; control characters, which no page may hold, are spelled out before that. Data for the
page's own script stand in a JSON element in which `<`, `>` and `&` are written as numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spa.graph.explain import printable
from spa.graph.trace import Reason
from spa.reporting import wording
from spa.reporting.picture import Frame, Picture, picture, shape_text
from spa.reporting.wording import headline, lap_rows, number, option_text
from spa.tables.report import amount, because, count_of, duration, percent, shorten

ROWS = 25  # of a list before it is opened


def as_html(data: Mapping[str, Any]) -> str:
    """The page of a report's dictionary."""
    drawn = picture(data["network"])
    script = {"frames": [_frame(f) for f in drawn.frames], "nodes": [_details(n, data["network"]["values"]) for n in drawn.nodes]}
    return _environment().get_template("report.html.jinja").render(
        data=data, headline=headline(data), cards=_cards(data), races=[(r, lap_rows(r)) for r in data["latency"]],
        limits=wording.budget_rows(data["budget"]),
        groups=_groups(data), picture=drawn, rows=ROWS, drawn_text=_drawn(drawn), script=_embedded(script),
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("spa.reporting", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, finalize=_harmless,
    )
    made.filters.update(amount=amount, duration=duration, shorten=shorten, number=number, option=option_text, reason=reason_text,
                        embed=_included)
    made.globals.update(percent=percent, count_of=count_of, wording=wording)
    return made


def _harmless(value: Any) -> Any:
    """What an expression of the template gives, without control characters."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _included(name: str) -> Markup:
    """A file beside the template, as it is: the page's own style and script."""
    source, _, _ = _environment().loader.get_source(_environment(), name)  # type: ignore[union-attr]
    return Markup(source)  # ours, not the model's


def _embedded(data: Any) -> Markup:
    """JSON that can stand inside a script element, whatever names it holds."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def reason_text(reason: Mapping[str, Any] | None) -> str:
    """A reason as a clause, "" for none."""
    return "" if reason is None else "".join(
        because(Reason(reason["node"], reason["op"], reason["value"], reason["axis"], reason["cause"])))


def _cards(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures at the top: what it was, what it is, and the share that is left."""
    found = [{"name": e.name, "before": e.before, "after": e.after, "share": e.share, "note": ""} for e in wording.entries(data)]
    for race in data["latency"][:1]:
        laps = lap_rows(race)
        if len(laps) > 1:
            found.append({"name": f"Latency, {race['provider']}", "before": duration(laps[0].median), "after": duration(laps[1].median),
                          "share": laps[1].ratio, "note": laps[1].interval})
    return found


def _groups(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups with the share of the model that lies on them."""
    macs, parameters = max(data["before"]["macs"], 1), max(data["before"]["parameters"], 1)
    return [{**g, "state": "pruned" if g["kept"] < g["size"] else "frozen" if g["frozen"] else "whole", "macs": g["macs"] / macs,
             "parameters": g["parameters"] / parameters} for g in data["groups"]]


def _drawn(drawn: Picture) -> str:
    """What the picture shows, in words."""
    folded = f", folded into {count_of(len(drawn.frames[0].items), 'part')} that open" if drawn.blocks else ""
    hidden = drawn.left_out
    rest = f" {count_of(hidden, 'node')} that only compute{'s' if hidden == 1 else ''} sizes and constants {'is' if hidden == 1 else 'are'}"
    return f"{count_of(len(drawn.nodes), 'node')}{folded}.{rest + ' not drawn.' if hidden else ''}"


def _frame(frame: Frame) -> dict[str, Any]:
    """What the page's script needs to make room for a block that opens."""
    items = [[i.width, i.height, i.inside] for i in frame.items]
    return {"items": items, "x": [*(i.x for i in frame.items), *frame.bends], "rows": frame.rows,
            "links": [[a, b] for a, b, _ in frame.links], "width": frame.width, "height": frame.height}


def _details(node: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What the panel beside the picture says of a node: [heading, name, [[label, [lines]], …]]."""
    def shapes(names: Sequence[str]) -> list[str]:
        return [f"{printable(v)}  {shape_text(values[v])}" if v in values else printable(v) for v in names]

    weights = [f"{printable(w['name'])}  {shape_text({**w, 'free': []})}" for w in node["weights"]]
    costs = [f"{label}  {amount(old)} → {amount(new)}, {percent(new, old)}" for label, old, new in (
        ("MACs", node["macs_before"], node["macs_after"]), ("parameters", node["parameters_before"], node["parameters_after"])) if old]
    state = {"pruned": "Pruned", "whole": "Could shrink, kept whole", "frozen": "Frozen", "plain": "Nothing to prune here"}[node["status"]]
    op = printable(node["op"]) + (f" ({printable(node['domain'])})" if node["domain"] else "")
    parts = [["Reads", shapes(node["inputs"])], ["Weights", weights], ["Gives", shapes(node["outputs"])], ["Costs", costs],
             ["Stays", [printable(r) for r in node["reasons"]]], ["Freezes here", [printable(g) for g in node["begins"]]]]
    return [op, printable(node["name"]), state, [p for p in parts if p[1]]]
