"""What a user promises of the data that a model is fed, and no graph can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """A promise on which ids occur, which lets the rows of the tables go that ids look up.

    inputs: of the graph, that hold ids. size: how many ids there were. lookups: nodes, by their first output, that look them up in tables
    of that size, and the input that holds them. sides: "input": rows of these tables may go; "output": positions of output axes of that
    size; "both": all of these, as one. place, unknown: where ids are numbered anew, see `spa.vocabularies.vocabulary`.
    """

    inputs: tuple[str, ...]
    size: int
    lookups: Mapping[str, int]
    sides: str = "both"
    place: str = "file"
    unknown: int | None = None
