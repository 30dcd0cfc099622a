"""A budget as a table: what was asked, what was found, and what it does to the quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from spa.budgets.targets import EXACT, amount
from spa.tables.report import percent, printable, table

NAMES = {"macs": "MACs", "params": "parameters", "size": "file size", "memory": "peak activations", "latency": "latency (predicted)"}


def budget(record: Mapping[str, Any]) -> RenderableType:
    """The record that a plan keeps of its budget."""
    rows = []
    for kind, (dense, found, limit) in record["costs"].items():
        if limit is not None or kind == "latency":
            asked, reached = ("", "") if limit is None else (amount(kind, limit), met(found, limit))
            rows.append((NAMES[kind], amount(kind, dense), asked, amount(kind, found), percent(found, dense), reached))
    if "latency" in record:
        timed = record["latency"]
        rows.append((f"latency (measured, {timed['provider']})", amount("latency", timed["dense"]), "",
                     amount("latency", timed["measured"]), percent(timed["measured"], timed["dense"]), ""))  # fmt: skip
    for metric, (dense, small) in record["quality"].items():
        worse = f"{abs(dense - small):.4g} {'lost' if record.get('max_drop') is None else 'of ' + format(record['max_drop'], 'g')}"
        rows.append((printable(metric), f"{dense:.4g}", "", f"{small:.4g}", "", worse))
    how = f"widths by {record['allocation']}, losses {record['losses']}"
    if record.get("evaluated"):
        how += f"; quality on {record['evaluated']} samples that nothing was fitted on"
    if record.get("compared"):
        how += "; lost on held-out data: " + ", ".join(f"{way} {value:.3g}" for way, value in record["compared"].items())
    return Lines(table("Budget", ["", ">before", ">limit", ">after", ">", ">"], rows, limit=None), Text(f"  {how}", style="dim"))


def met(found: float, limit: float) -> str:
    """How near a limit was reached."""
    share = found / limit
    return "reached" if 1 - EXACT <= share <= 1 else f"{100 * (1 - share):.1f} % below" if share < 1 else f"{100 * (share - 1):.1f} % above"
