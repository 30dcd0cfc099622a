"""The report as Markdown and as JSON.

In Markdown every name stands in a code span that is fenced with more backticks than it holds, so nothing in it is markup; a pipe is
escaped, as tables end cells at it even there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spa.graph.explain import printable
from spa.reporting import wording
from spa.reporting.picture import shape_text, width_text
from spa.reporting.wording import lap_rows, number, option_text
from spa.tables.report import amount, count_of, duration, percent


def as_json(data: Mapping[str, Any]) -> str:
    """The dictionary with exact numbers and exact names."""
    return json.dumps(data, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def as_markdown(data: Mapping[str, Any]) -> str:
    """The report's dictionary as Markdown with tables."""
    asked = data["asked"]
    parts = [f"# {prose(asked['model'])}, pruned", _asked(data), _outcome(data), _latency(data["latency"]), _quality(data["quality"]),
             _layers(data["depth"]), _groups(data), _network(data["network"]), _repair(data["repair"]), _reasons(data), _versions(asked)]
    return "\n\n".join(p for p in parts if p) + "\n"


def code(name: object) -> str:
    """A name as a code span in a table."""
    text = printable(str(name)).replace("|", "\\|")
    fence = "`" * (max((len(r) for r in re.findall(r"`+", text)), default=0) + 1)
    room = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{room}{text}{room}{fence}"


def prose(text: object) -> str:
    """A text that is no markup."""
    plain = printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~$])", r"\\\1", plain)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; columns whose head begins with ">" stand right."""
    lines = [f"| {' | '.join(h.lstrip('>') for h in head)} |", f"|{'|'.join('---:' if h.startswith('>') else '---' for h in head)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _asked(data: Mapping[str, Any]) -> str:
    asked = data["asked"]
    told = {k: v for k, v in asked["options"].items() if k in asked["given"] or not wording.unset(v)}
    rows = [(code(k), prose(option_text(v)), "given" if k in asked["given"] else "") for k, v in told.items()]
    return "## What was asked\n\n" + _table(("option", "value", ""), rows)


def _outcome(data: Mapping[str, Any]) -> str:
    rows = [(e.name, e.before, e.after, "–" if e.share is None else f"{100 * e.share:.1f} %") for e in wording.entries(data)]
    told = wording.headline(data)
    lines = ["## What came out", _table(("", ">before", ">after", ">left"), rows), f"**{told['label']}.** {told['text']}"]
    limits = wording.budget_rows(data["budget"])
    lines += [_table(("budget", ">before", ">limit", ">after"), [(prose(k), *rest) for k, *rest in limits])] if limits else []
    if data["proof"] and data["proof"]["outputs"]:
        outputs = [(code(n), number(d["absolute"]), number(d["relative"])) for n, d in data["proof"]["outputs"].items()]
        lines.append(_table(("output", ">largest difference", ">of its scale"), outputs))
    return "\n\n".join(lines)


def _latency(races: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for race in races:
        laps = lap_rows(race)
        rows = [(prose(x.name), duration(x.median), f"{duration(x.low)} – {duration(x.high)}", f"{100 * x.ratio:.1f} %", x.interval or "–",
                 prose(x.verdict) or "–") for x in laps]
        lines += [f"**{prose(wording.race_heading(race))}.** {prose(wording.race_text(race))}",
                  _table(("model", ">median", ">quartiles", ">to the first", ">95 % interval", ""), rows)]
        fell = [(prose(m), code(n), prose(why)) for m, n, why in wording.elsewhere(race)]
        lines += [_table(("model", "ran elsewhere than asked", "because"), fell)] if fell else []
    return "\n\n".join(["## Latency", *lines]) if lines else ""


def _quality(quality: Mapping[str, Mapping[str, float]]) -> str:
    rows = [(prose(n), number(q["before"]), number(q["after"])) for n, q in quality.items()]
    return "## Quality\n\n" + _table(("metric", ">before", ">after"), rows) if rows else ""


def _groups(data: Mapping[str, Any]) -> str:
    def row(group: Mapping[str, Any]) -> tuple[str, ...]:
        filled = round(16 * group["kept"] / group["size"]) if group["size"] else 16
        state = "frozen" if group["frozen"] else ""
        shares = (percent(group[k], data["before"][k]) for k in ("macs", "parameters"))
        bar = "█" * filled + "░" * (16 - filled)
        return (code(group["name"]), group["kind"], f"{group['size']} → {group['kept']}", bar, *shares, state)

    rows = [row(g) for g in data["groups"]]
    return "## Groups\n\n" + _table(("group", "kind", ">channels", "kept", ">MACs", ">parameters", ""), rows) if rows else ""


def _layers(depth: Mapping[str, Any] | None) -> str:
    """Layers that were dropped."""
    if depth is None:
        return ""
    rows = [(code(x["name"]), x["kind"], str(x["block"]), amount(x["parameters"]), amount(x["macs"]),
             "–" if x["score"] is None else number(x["score"])) for x in depth["dropped"]]  # fmt: skip
    table = _table(("layer", "kind", ">block", ">parameters", ">MACs", ">score"), rows)
    return "\n\n".join(["## Layers dropped", table, *map(prose, depth["left_out"])])


def _network(network: Mapping[str, Any]) -> str:
    """The nodes that cost something or froze something; all are in the JSON."""
    def row(node: Mapping[str, Any]) -> tuple[str, ...]:
        widths = [width_text(network["values"][v]) for v in node["outputs"] if v in network["values"]]
        return (code(node["op"]), code(node["name"]), ", ".join(w for w in widths if w) or "–",
                f"{amount(node['macs_before'])} → {amount(node['macs_after'])}",
                f"{amount(node['parameters_before'])} → {amount(node['parameters_after'])}", node["status"])

    told = [n for n in network["nodes"] if n["macs_before"] or n["parameters_before"] or n["begins"]]
    ends = [f"{way} {code(name)}: {shape_text(network['values'][name]) if name in network['values'] else 'unknown shape'}"
            for way, names in (("input", network["inputs"]), ("output", network["outputs"])) for name in names]
    head = "## Network\n\n" + "\n".join(f"* {e}" for e in ends)
    return head + "\n\n" + _table(("op", "node", ">width", ">MACs", ">parameters", "state"), [row(n) for n in told if not n["static"]])


def _repair(repair: Mapping[str, Any] | None) -> str:
    if repair is None:
        return ""
    rows = [(code(x["name"]), f"{x['removed']}/{x['columns']}", number(x["before"]), number(x["after"])) for x in repair["layers"]]
    lines = ["## Repair", _table(("layer", ">columns gone", ">error before", ">error after"), rows)] if rows else ["## Repair"]
    lines += [f"{count_of(repair['norms'], 'norm')} measured again."] if repair["norms"] else []
    skipped = [(code(n), prose(why)) for n, why in repair["skipped"].items()]
    return "\n\n".join([*lines, *([_table(("not repaired", "because"), skipped)] if skipped else [])])


def _reasons(data: Mapping[str, Any]) -> str:
    before = data["before"]
    causes = [(prose(c["cause"]), prose(c["op"]) or "–", str(c["groups"]), percent(c["parameters"], before["parameters"]),
               percent(c["stuck_parameters"], before["parameters"]), code(c["example"])) for c in data["frozen"]]
    lines = ["## What stays, and why", _table(("cause", "op", ">groups", ">parameters", ">stuck", "for example"), causes)] if causes else []
    notes = [(code(n), prose(t)) for n, t in data["notes"].items()]
    return "\n\n".join([*lines, *(["## Kept more than asked", _table(("group", "why"), notes)] if notes else [])])


def _versions(asked: Mapping[str, Any]) -> str:
    rows = [*asked["versions"].items(), ("model sha256", asked["model_sha256"]), ("graph sha256", asked["graph_sha256"])]
    return "## Made with\n\n" + _table(("", ""), [(prose(k), code(v)) for k, v in rows])
