"""Protect lists: coordinates that stay whatever their scores say.

A list is lines of text. A line is a pattern of groups, as --include takes them, or such a pattern with coordinates:

    # heads that retrieve
    h.3.attn.*: 0, 4-6
    kind:key-value: 0
    lm_head.weight:1

Coordinates are counted from 0 inside each group; a colon and a space come before them (names may hold colons). What follows # is a remark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spa.data.samples import reason
from spa.errors import BadFile, BadOption
from spa.graph.groups import Group, Groups

_NUMBERS = re.compile(r"\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*")


@dataclass(frozen=True)
class Line:
    """One line: groups of a pattern, and ranges (first, last) of their coordinates; none for all of them. where: for errors."""

    pattern: str
    ranges: tuple[tuple[int, int], ...]
    where: str


def read_protect(path: Path) -> tuple[str, ...]:
    """The lines of a file, remarks and empty ones too, so that a line's place is its number.

    Raises BadFile if it can't be read, BadOption if it names nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"The protect file {path} can't be read: {reason(error)}.") from error
    lines = tuple(text.splitlines())
    if not parsed(lines):
        raise BadOption(f"The protect file {path} names nothing: give a group on each line, such as 'layer4.*' or 'heads.*: 3,7-9'.")
    return lines


def parsed(lines: Sequence[str]) -> list[Line]:
    """What lines say. Raises BadOption for coordinates that are none."""
    found = []
    for number, raw in enumerate(lines, start=1):
        text = re.sub(r"(^|\s)#.*$", "", raw).strip()
        if not text:
            continue
        where = f"--protect, line {number} ({text!r})"
        pattern, colon, numbers = (part.strip() for part in re.match(r"(.*?)(?:(:)\s+(.*))?$", text).groups(default=""))  # type: ignore[union-attr]
        if colon and not _NUMBERS.fullmatch(numbers):
            raise BadOption(f"{where}: after the colon come coordinates, such as 3,7-9.")
        ends = [part.split("-") for part in re.sub(r"\s", "", numbers).split(",") if part]
        ranges = tuple((int(part[0]), int(part[-1])) for part in ends)
        for first, last in ranges:
            if last < first:
                raise BadOption(f"{where}: {first}-{last} ends before it begins.")
        found.append(Line(pattern, ranges, where))
    return found


def protected(groups: Groups, lines: Sequence[str], named: Callable[[str], Iterable[Group]]) -> NDArray[np.bool_]:
    """(total,) the coordinates that lines protect. named: groups of a pattern. Raises BadOption for a line that names nothing."""
    held = np.zeros(groups.total, bool)
    for line in parsed(lines):
        chosen = list(named(line.pattern))
        if not chosen:
            raise BadOption(f"{line.where}: {line.pattern!r} matches no group, node or value; `spa inspect` lists the groups.")
        for group in chosen:
            if not line.ranges:
                held[group.coordinates] = True
            for first, last in line.ranges:
                if last >= group.size:
                    raise BadOption(f"{line.where}: {group.name} has no coordinate {last}; its {group.size} are 0 to {group.size - 1}.")
                held[group.start + first : group.start + last + 1] = True
    return held
