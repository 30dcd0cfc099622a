"""Edits: changes of the graph that come before tracing, recorded as plain data and done again whenever the plan is used.

An edit is {"kind": name, argument: value, …}. The table says which pass a kind stands for; the arguments are the pass's. `analyze` applies
a list of edits, in order, to a copy of the model as given, whose hash the plan keeps; so a plan leads from the model as given to the
pruned one, and can be applied to another checkpoint of the same graph.

    given --edits--> edited --normalize--> normal --trace, group--> groups

Some edits put in arrays that were fitted to data (`Kind.arrays`). A plan does not hold them: where they are missing, the edit is left out,
and `Edited.left_out` says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes import drop_branches, mix_outputs, part_sums, zero_branches
from spa.errors import BadPlan
from spa.plans.rewrite import copy_graph
from spa.storage.store import Model, with_graph


@dataclass(frozen=True)
class Kind:
    """A pass(graph, **arguments) that returns how many changes it made, and raises KeyError or ValueError where it does not fit the graph.

    other: a pass of the same arguments that leads to the same outputs in another way, as zeros do where branches go; for proofs. None
    where `change` keeps the function or is its own definition. arrays: arguments that are fitted to data and no part of a plan. words: what
    such an edit does, for the note that it was left out. told: arguments that say what arrays are fitted to, which the pass does not take.
    """

    change: Callable[..., int]
    other: Callable[..., int] | None = None
    arrays: tuple[str, ...] = ()
    words: str = ""
    told: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "drop_branches": Kind(drop_branches, zero_branches),
    "part_sums": Kind(part_sums),
    "mix_outputs": Kind(mix_outputs, arrays=("matrix",), told=("fit",), words="The linear map that stands in for the dropped layers"),
}


@dataclass(frozen=True)
class Edit:
    """One change. arguments: plain data, as JSON holds them. arrays: what was fitted to data, empty where it is not at hand."""

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[np.generic]] = field(default_factory=dict, compare=False)

    @property
    def record(self) -> dict[str, Any]:
        """The edit as a plan holds it."""
        return {"kind": self.kind, **self.arguments}


@dataclass(frozen=True)
class Edited:
    """A model after its edits. left_out: a sentence for each edit that needs data which were not at hand."""

    model: Model
    left_out: tuple[str, ...] = ()


def read_edits(records: Any, label: str = "The list of edits") -> tuple[Edit, ...]:
    """Edits from plain data. Raises BadPlan, with a sentence, for anything that is no list of edits of known kinds."""
    if not isinstance(records, Sequence) or isinstance(records, str):
        raise BadPlan(f"{label} holds edits that are no list, but {type(records).__name__}.")
    found = []
    for number, record in enumerate(records, 1):
        edit = record if isinstance(record, Edit) else _edit(record, number, label)
        if edit.kind not in KINDS:
            known = ", ".join(sorted(KINDS))
            raise BadPlan(f"{label} has an edit of the kind {edit.kind!r}, which this spa does not know; it knows {known}.")
        kind = KINDS[edit.kind]
        try:
            inspect.signature(kind.change).bind(None, **_passed(edit), **dict.fromkeys(kind.arrays))
        except TypeError as error:
            raise BadPlan(f"{label} has an edit, number {number} ({edit.kind}), with wrong arguments: {error}.") from error
        found.append(edit)
    return tuple(found)


def _passed(edit: Edit) -> dict[str, Any]:
    """Arguments that the pass takes."""
    return {k: v for k, v in edit.arguments.items() if k not in KINDS[edit.kind].told}


def _edit(record: Any, number: int, label: str) -> Edit:
    if not isinstance(record, Mapping) or not isinstance(record.get("kind"), str):
        raise BadPlan(f'{label} has an edit, number {number}, that is not of the form {{"kind": name, …}}.')
    return Edit(record["kind"], {str(k): v for k, v in record.items() if k != "kind"})


def edited(model: Model, edits: Sequence[Edit], *, otherwise: bool = False) -> Edited:
    """The model after the edits; `model` itself is not changed (weights are shared, not copied). Raises BadPlan where one does not fit.

    otherwise: by the other pass of each kind that has one.
    """
    if not edits:
        return Edited(model)
    graph = copy_graph(model.graph)
    left_out = []
    for number, edit in enumerate(edits, 1):
        kind = KINDS[edit.kind]
        if not all(name in edit.arrays for name in kind.arrays):
            anew = "; --calibration fits it anew" if any(name in edit.arguments for name in kind.told) else ""
            left_out.append(f"{kind.words or edit.kind} was left out: it is fitted to data, which a plan does not hold{anew}.")
            continue
        try:
            change = kind.other if otherwise and kind.other is not None else kind.change
            change(graph, **_passed(edit), **edit.arrays)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = str(error.args[0]) if error.args else type(error).__name__
            raise BadPlan(f"Edit {number} ({edit.kind}) does not fit the model: {reason}.") from error
    return Edited(with_graph(model, graph), tuple(left_out))
