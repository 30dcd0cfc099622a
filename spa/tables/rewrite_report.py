"""Exact rewrites, for people and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from spa.exact import Step
from spa.proof.check import Check
from spa.tables.report import LIMIT, Name, count_of, table

UNITS = {"key bias": "channel", "value bias": "channel", "QK basis": "head", "VO basis": "head", "split MLP": "part"}


def steps_data(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Every step; `done` counts what changed, `why` says why nothing did."""
    return [{"rewrite": s.rewrite, "place": s.place, "done": s.done, "why": s.why or None} for s in steps]


def steps_shown(steps: Sequence[Step], *, limit: int | None = LIMIT) -> list[RenderableType]:
    """A table of what was done where, and one of what was left alone and why."""
    done = [(s.rewrite, Name(s.place), count_of(s.done, UNITS[s.rewrite])) for s in steps if s.done]
    left = [(s.rewrite, Name(s.place), s.why) for s in steps if not s.done]
    shown: list[RenderableType] = [table(f"Rewritten: {count_of(len(done), 'place')}", ("rewrite", "at", ">of"), done, limit=limit)]
    if left:
        shown.append(table(f"Left alone: {count_of(len(left), 'place')}", ("rewrite", "at", "because"), left, limit=limit))
    return shown


def proof_shown(check: Check | None) -> RenderableType:
    """The largest difference between the model and the rewritten one."""
    if check is None:
        return Text("Proof: not run (--no-check)\n", style="yellow")
    says = f"outputs differ by at most {check.worst:.1e} of their scale, {check.tolerance:.0e} is allowed"
    return Text(f"Proof: it computes what it did; {says}\n", style="green")
