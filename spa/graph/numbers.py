"""The numbers by which a transformer's configuration describes it, read off the groups: before a removal and after it, layer by layer.

Heads are key-value heads with the queries of each, or plain heads; they have a width in keys and one in values. The hidden width is
that of the residual stream, neurons are those of each MLP, and there are as many layers as there are attentions and MLPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.graph.groups import Group, Groups, Kept
from spa.graph.kinds import kinds_of

HEADS, KEY_VALUES, KEY_WIDTH, VALUE_WIDTH = "heads", "key-value heads", "width of keys", "width of values"
HIDDEN, NEURONS, LAYERS, TOKENS = "hidden width", "neurons", "layers", "tokens"


@dataclass(frozen=True)
class Number:
    """One number in every layer that has it, in graph order, before and after; one entry where all layers share it."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def one(self) -> int | None:
        """What it is after, None where layers differ."""
        return self.after[0] if len(set(self.after)) == 1 else None


def numbers_of(dense: Groups, groups: Groups, gone: NDArray[np.bool_]) -> Mapping[str, Number]:
    """All numbers that the groups show.

    dense: of the model as it was; groups: after the edits that come first (the same ones if there were none), of which `gone` is removed.
    A number that no group shows is left out: nothing of it can have been removed, since removing needs a group.
    """
    before = _sizes(dense, np.zeros(dense.total, bool))
    after = before if dense is groups and not gone.any() else _sizes(groups, gone)
    found = {name: Number(tuple(before[name]), tuple(after[name])) for name in before if before[name] and after.get(name)}
    attentions, blocks = (len(s[HEADS]) for s in (before, after)), (len(s[NEURONS]) for s in (before, after))
    was, now = zip(attentions, blocks, strict=True)
    if was[0] == was[1] and now[0] == now[1]:
        found[LAYERS] = Number((was[0],), (now[0],))
    return found


def _sizes(groups: Groups, gone: NDArray[np.bool_]) -> dict[str, list[int]]:
    kinds = kinds_of(groups)
    left = {g.index: g.size - int(np.count_nonzero(gone[g.coordinates])) for g in groups.groups}
    found: dict[str, list[int]] = {name: [] for name in (HEADS, KEY_VALUES, KEY_WIDTH, VALUE_WIDTH, HIDDEN, NEURONS, TOKENS)}
    kept = Kept(groups, gone)
    for group, kind in zip(groups.groups, kinds, strict=True):
        if kind in ("head", "key-value"):
            queries = [left[n] for n in groups.families.neighbors(group.index) if kinds[n] == "query"]
            found[KEY_VALUES].append(left[group.index])
            found[HEADS].append(left[group.index] * (max(queries) if queries and kind == "key-value" else 1))
        elif kind in _PLAIN:
            found[_PLAIN[kind]].append(left[group.index])
        elif kind in _WIDTHS:
            for name in _WIDTHS[kind]:
                found[name] += _width(groups, kept, group)
    return found


_PLAIN = {"residual": HIDDEN, "neuron": NEURONS, "vocabulary": TOKENS}
_WIDTHS = {"qk": (KEY_WIDTH,), "vo": (VALUE_WIDTH,), "head-width": (KEY_WIDTH, VALUE_WIDTH)}


def _width(groups: Groups, kept: Kept, group: Group) -> Iterator[int]:
    """Positions that are left of the longest axis that is made of this group alone: a turned pair of positions is one coordinate."""
    rows = range(group.start + 1, group.start + group.size + 1)
    alone = [s for s in group.sites if groups.labels[s].size and np.isin(groups.labels[s], rows).all()]
    longest = max(alone, key=lambda s: len(groups.labels[s]), default=None)
    if longest is not None:
        keep = kept.site(longest)
        yield len(groups.labels[longest]) if keep is None else int(np.count_nonzero(keep))
