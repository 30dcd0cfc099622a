"""Vocabulary: ids that never occur go, with their rows of the tables that they look up and their columns of the logits.

That a row of an embedding is never asked for is nothing that a graph can tell: it is a user's promise (`spa.graph.promise.Vocabulary`).
Under it the ids are one group like any other. The kept ids are numbered anew, in their old order, and the pruned model is fed

    place "file":   new ids, by a map that is written beside it;
    place "graph":  old ids, since the map stands in the graph; unknown ids become the one for unknown.

Logits have a column for each new id either way. Removing equals masking as everywhere, for feeds that hold kept ids alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import insert_id_maps
from spa.errors import BadOption
from spa.graph.groups import Group, Groups
from spa.graph.promise import Vocabulary
from spa.graph.trace import Traced, node_name, outer_values
from spa.proof.feeds import Feeds
from spa.signatures.arithmetic import KEEPS_VALUES, READS_SHAPE

SIDES = ("both", "input", "output")
PLACES = ("file", "graph")

Gone = NDArray[np.bool_]


# ---------------------------------------------------------------------- the promise


def promised(traced: Traced, wish: Mapping[str, Any]) -> Vocabulary:
    """The promise for a model that was traced without it.

    wish: `inputs` that hold ids (by default those that look up the longest table), `sides`, `place`, `unknown` (an old id).
    Raises BadOption where the graph has no ids, or reads them in a way that numbering them anew would break.
    """
    sides, place, unknown = wish.get("sides", "both"), wish.get("place", "file"), wish.get("unknown")
    for option, value, choice in (("--vocab-side", sides, SIDES), ("--vocab-map", place, PLACES)):
        if value not in choice:
            raise BadOption(f"{option} is {value!r}; the choice is: {', '.join(choice)}.")
    tables = {t.name: _tables(traced, _values(traced, t.name)) for t in traced.graph.inputs}
    found = {name: max(sizes.values()) for name, sizes in tables.items() if sizes}
    if not found:
        raise BadOption("No input of the model looks up rows of a table, so there is no vocabulary to prune.")
    asked = wish.get("inputs") or [n for n, size in found.items() if size == max(found.values())]
    for name in asked:
        if name not in found:
            raise BadOption(f"--vocab-input: input {name!r} looks up no table; those that do: {', '.join(found)}.")
    sizes = {found[n] for n in asked}
    if len(sizes) > 1:
        raise BadOption(f"--vocab-input: the tables of {', '.join(asked)} differ in size ({sorted(sizes)}): prune one after the other.")
    size = sizes.pop()
    nodes = {node for name in asked for node, length in tables[name].items() if length == size}
    lookups = {n.node.outputs[0].name: i for n in traced.nodes if n.signature and n.node.outputs[0].name in nodes
               for i in n.signature.picked.values()}  # fmt: skip
    if place == "file" and sides != "output":
        _check_readers(traced, asked, lookups)
    return Vocabulary(tuple(asked), size, lookups, sides, place, None if unknown is None else int(unknown))


def told(promise: Vocabulary) -> dict[str, Any]:
    """A promise as `promised` takes it, for plans."""
    return {"inputs": list(promise.inputs), "sides": promise.sides, "place": promise.place, "unknown": promise.unknown}


def _values(traced: Traced, name: str) -> set[str]:
    """Values that hold the same numbers as an input."""
    values = {name}
    for node in traced.nodes:
        if node.node.op in KEEPS_VALUES and node.node.inputs and node.node.inputs[0].name in values:
            values.update(t.name for t in node.node.outputs if t.name)
    return values


def _tables(traced: Traced, values: set[str]) -> dict[str, int]:
    """Nodes (by their first output) that look these values up in a table, and the table's length."""
    found: dict[str, int] = {}
    for node in traced.nodes:
        for dim, index in node.signature.picked.items() if node.signature is not None else ():
            axis = node.dims.get(dim)
            if axis is not None and axis.length > 1 and node.node.inputs[index].name in values:
                found[node.node.outputs[0].name] = max(axis.length, found.get(node.node.outputs[0].name, 0))
    return found


def _check_readers(traced: Traced, inputs: Sequence[str], lookups: Mapping[str, int]) -> None:
    """Raises BadOption where ids are used for what they are worth: compared, added up, or given out."""
    for name in inputs:
        values = _values(traced, name)
        for tensor in traced.graph.outputs:
            if tensor.name in values:
                raise BadOption(f"Input {name!r} comes out again as output {tensor.name!r}: keep its ids with --vocab-map graph.")
        for node in traced.nodes:
            read = {t.name for t in node.node.inputs} | set(outer_values(node.node))
            harmless = node.node.op in READS_SHAPE | KEEPS_VALUES or node.node.outputs[0].name in lookups
            if read & values and not harmless:
                raise BadOption(
                    f"Input {name!r} is also read by {node.node.op} {node_name(node.node)}, to which new ids would mean something else: "
                    "keep its ids as they are with --vocab-map graph."
                )


# ---------------------------------------------------------------------- the group


def vocabulary_group(groups: Groups) -> Group:
    """The group of all ids. Raises BadOption where ids can't go, such as from one side of a tied table."""
    traced = groups.traced
    promise = traced.vocabulary
    assert promise is not None
    if traced.ids is None:
        raise BadOption(f"No output has an axis of {promise.size} ids, and --vocab-side {promise.sides} asks for no other.")
    labels = groups.dim_labels(traced.ids)  # (ids, 1)
    of = groups.of_coordinate()
    group = groups.groups[int(of[labels.ravel()[0] - 1])] if labels.size else None
    if group is None or labels.shape[1] != 1 or group.size != promise.size or not labels.all():
        raise BadOption("Some ids of the vocabulary can't be told apart from other positions of the model, so that none can go.")
    if group.frozen is not None:
        table = next((v for v, _ in group.sites if v in traced.constants), "the table")
        if promise.sides != "both" and _tied(groups, group):
            raise BadOption(
                f"{table} is both what {', '.join(promise.inputs)} look up and what makes an output (tied), so that ids can't go from one "
                "side alone: ask for --vocab-side both, or export the model untied."
            )
        raise BadOption(f"The vocabulary must stay: {group.frozen}.")
    return group


def _tied(groups: Groups, group: Group) -> bool:
    """Whether ids are both looked up and put out."""
    outputs = {t.name for t in groups.traced.graph.outputs}
    given = groups.traced.vocabulary
    assert given is not None
    read = {n.node.inputs[0].name for n in groups.traced.nodes if n.node.outputs and n.node.outputs[0].name in given.lookups}
    values = {v for v, _ in group.sites}
    return bool(values & outputs) and bool(values & read)


def gone_of(groups: Groups, kept: NDArray[np.int64]) -> Gone:
    """A mask over all coordinates that removes all but the kept ids."""
    group = vocabulary_group(groups)
    assert groups.traced.ids is not None
    stays = np.zeros(group.size, bool)
    stays[kept] = True
    gone = np.zeros(groups.total, bool)
    gone[groups.dim_labels(groups.traced.ids)[:, 0] - 1] = ~stays
    return gone


# ---------------------------------------------------------------------- what is left of it


@dataclass(frozen=True)
class Ids:
    """The ids that are left. kept: (new ids,) the old id of each, ascending. outputs: output -> axis that has a position for each."""

    promise: Vocabulary
    kept: NDArray[np.int64]
    outputs: Mapping[str, int]

    @cached_property
    def new(self) -> NDArray[np.int64]:
        """(old ids,) the new id of each, -1 of those that are gone."""
        found = np.full(self.promise.size, -1, np.int64)
        found[self.kept] = np.arange(len(self.kept))
        return found

    @property
    def unknown(self) -> int:
        """The new id that stands for all that are gone, where the map is in the graph: that of the promise, else the first."""
        old = self.promise.unknown
        return int(self.new[old]) if old is not None and self.new[old] >= 0 else 0

    @property
    def fed(self) -> tuple[str, ...]:
        """Inputs that may only hold kept ids."""
        return self.promise.inputs if self.promise.sides != "output" else ()

    def drawn(self, feeds: Feeds) -> Feeds:
        """Feeds that were drawn, with kept ids in place of any."""
        return {n: self.kept[v.astype(np.int64) % len(self.kept)].astype(v.dtype) if n in self.fed else v for n, v in feeds.items()}

    def check(self, feeds: Feeds) -> Feeds:
        """A user's feeds. Raises BadOption if they hold ids that go."""
        for name in self.fed:
            ids = np.asarray(feeds[name], np.int64)
            lost = ids[self.new[ids] < 0]
            if lost.size:
                raise BadOption(f"The feeds hold id {int(lost[0])} in input {name!r}, which goes: give feeds of kept ids.")
        return feeds

    def renumbered(self, feeds: Feeds) -> Feeds:
        """What the pruned model is fed."""
        if self.promise.place == "graph":
            return feeds
        return {n: self.new[v.astype(np.int64)].astype(v.dtype) if n in self.fed else v for n, v in feeds.items()}

    def for_both(self, feeds: Feeds) -> Feeds:
        """Feeds that the model runs with before and after, whatever they then mean: for timing."""
        return {n: np.minimum(v, len(self.kept) - 1).astype(v.dtype) if n in self.fed else v for n, v in feeds.items()}

    def data(self) -> dict[str, Any]:
        """The map, for a file."""
        return {
            "format": "spa-vocabulary",
            "version": 1,
            "inputs": list(self.fed),
            "inputs_hold": "old ids" if self.promise.place == "graph" else "new ids",
            "outputs": dict(self.outputs),
            "old_size": self.promise.size,
            "new_size": len(self.kept),
            "old_of_new": self.kept.tolist(),
            "new_of_old": {str(old): new for new, old in enumerate(self.kept.tolist())},
        }


def ids_of(groups: Groups, gone: Gone) -> Ids | None:
    """What a removal leaves of the vocabulary; None if it takes nothing from it."""
    traced = groups.traced
    if traced.vocabulary is None or traced.ids is None:
        return None
    stays = groups.dim_keep(traced.ids, gone)
    if stays is None:
        return None
    return Ids(traced.vocabulary, np.flatnonzero(stays), dict(_columns(groups, gone)))


def _columns(groups: Groups, gone: Gone) -> Iterator[tuple[str, int]]:
    size = groups.traced.vocabulary.size if groups.traced.vocabulary is not None else 0
    for tensor in groups.traced.graph.outputs:
        for axis, length in enumerate(groups.traced.facts.shapes.get(tensor.name) or ()):
            if length == size and groups.keep((tensor.name, axis), gone) is not None:
                yield tensor.name, axis


def map_name(model: Path) -> Path:
    """Where the map of a pruned model goes: small.onnx -> small.vocab.json."""
    return model.with_name(f"{model.stem if model.suffix else model.name}.vocab.json")


def with_map(graph: gs.Graph, ids: Ids | None) -> None:
    """Puts the map into a pruned graph, where that is its place."""
    if ids is None or ids.promise.place != "graph" or not ids.fed:
        return
    insert_id_maps(graph, ids.promise.lookups, np.where(ids.new < 0, ids.unknown, ids.new))
