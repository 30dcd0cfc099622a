"""States as a table: what a caller hands from call to call, and the shapes it has now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.text import Text

from spa.graph.groups import Groups, Kept
from spa.tables.report import Name, count_of, table


def states_data(groups: Groups, gone: NDArray[np.bool_] | None = None) -> list[dict[str, Any]]:
    """Each state with its shape as declared (names of free sizes among them), before and, if something is removed, after."""
    traced = groups.traced
    kept = None if gone is None else Kept(groups, gone)
    declared = {t.name: list(t.shape or ()) for t in traced.graph.inputs}
    found = []
    for state in traced.states:
        before = [n if isinstance(n, int | str) else "?" for n in declared[state.input]]
        entry: dict[str, Any] = {"input": state.input, "output": state.output, "grows": state.grows, "shape": before}
        if kept is not None:
            left = kept.shape(state.input) or ()
            entry["left"] = [m if isinstance(n, int) else n for n, m in zip(before, left, strict=True)]
        found.append(entry)
    return found


def states(found: list[dict[str, Any]]) -> list[RenderableType]:
    """The table of `states_data`; nothing where there are no states, a line where they stay as they were."""
    if not found:
        return []
    changed = [s for s in found if s.get("left", s["shape"]) != s["shape"]]
    title = f"States: {count_of(len(found), 'input')} with the outputs that take their place"
    if "left" not in found[0]:
        rows = [(Name(s["input"]), Name(s["output"]), _sizes(s, "shape")) for s in found]
        return [table(title, ("input", "output", "shape"), rows)]
    if not changed:
        return [Text(f"{title}, none of which shrinks\n", style="dim")]
    moved = [(Name(s["input"]), Name(s["output"]), _sizes(s, "shape"), "→", _sizes(s, "left")) for s in changed]
    return [table(title, ("input", "output", "from", "", "to"), moved)]


def _sizes(state: Mapping[str, Any], key: str) -> str:
    return " × ".join(map(str, state[key]))
