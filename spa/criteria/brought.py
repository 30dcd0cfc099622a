"""What users bring of channels: scores, masks and scales of their own, from an .npz file, by the names that `spa inspect` prints.

    np.savez("learned.npz", **{"blocks.0.fc1.weight:0": importance, "mask:heads.weight:0": stays, "gate:blocks.1.fc1.weight:0": gates})

A key is the name of a group, or `VALUE:AXIS` of any tensor or activation that it occurs on; then there is a number for each position of
the axis. In front of it may stand what the numbers are:

    score:   high = keep, in place of the criterion's (LoRAPrune's moving averages, say)
    mask:    0 or 1: what is 0 goes, what is 1 stays, whatever the ratio
    scale:   what a channel is multiplied by where it is summed; it is folded into the weights that sum over it
    gate:    both: what is 0 goes, the others are scales (VTrans's and SHRP's learned gates)

Without a prefix, numbers that are all 0 or 1 are a mask, others scores.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.criteria.score import Scores
from spa.data.samples import reason
from spa.errors import BadFile, BadOption
from spa.exact.ranks import Cut
from spa.graph.demands import check_demands
from spa.graph.explain import near
from spa.graph.groups import Group, Groups

Array = NDArray[np.float64]
KINDS = ("score", "mask", "scale", "gate")


@dataclass(frozen=True)
class Brought:
    """Arrays of one axis by their keys, checked for what can be checked without a model. name: for reports."""

    name: str
    arrays: Mapping[str, Array] = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """Hash of the arrays."""
        digest = hashlib.sha256()
        for key in sorted(self.arrays):
            digest.update(key.encode() + b"\0" + self.arrays[key].tobytes())
        return digest.hexdigest()

    def only_scores(self) -> Brought:
        """The same. Raises BadOption if there are masks or scales among them, which leave nothing to compare."""
        other = next((k for k, a in self.arrays.items() if _kind(k)[0] not in ("", "score") or (not _kind(k)[0] and _binary(a))), None)
        if other is not None:
            raise BadOption(f"--scores {self.name}: {other!r} is no score; `spa sweep` takes scores, `spa prune` masks and scales too.")
        return self


@dataclass(frozen=True)
class Said:
    """What arrays say of a model. scores, scales: (total,) of all coordinates, NaN and 1 where nothing is said. masks: what they remove."""

    scores: Array
    scales: Array
    masks: Cut | None

    def fill(self, groups: Groups, criterion: Callable[..., Scores]) -> Scores:
        """All scores; the criterion gives those of groups that the file has none of."""
        rest = [g for g in groups.free() if np.isnan(self.scores[g.coordinates]).any()]
        found = criterion(only=rest)
        return Scores(found.criterion, np.where(np.isnan(self.scores), found.values, self.scores), found.instead, found.held, found.notes)


def read_brought(source: str | os.PathLike[str] | Mapping[str, Any] | Brought | None) -> Brought | None:
    """Arrays from an .npz file or a mapping; None stays None.

    Raises BadFile if the file can't be read, BadOption for arrays that hold anything but finite numbers of one axis.
    """
    if source is None or isinstance(source, Brought):
        return source
    given, name = (dict(source), "arrays") if isinstance(source, Mapping) else (_loaded(Path(source)), os.fspath(source))
    where = "--scores" if isinstance(source, Mapping) else f"--scores {name}"
    if not given:
        raise BadOption(f"{where} holds no arrays: save some under the names of groups, as `spa inspect` prints them.")
    return Brought(name, {key: _checked(where, key, np.asarray(array)) for key, array in given.items()})


def _loaded(path: Path) -> dict[str, NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise BadFile(f"--scores {path} is no .npz file; numpy.savez writes one.")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadFile(f"--scores {path} can't be read as .npz: {reason(error)}.") from error


def _checked(where: str, key: str, array: NDArray[Any]) -> Array:
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise BadOption(f"{where}: {key!r} holds {array.dtype}, but scores, masks and scales are numbers.")
    if array.ndim != 1:
        raise BadOption(f"{where}: {key!r} has the shape {array.shape}, but must have one axis, a number for each channel.")
    found = array.astype(np.float64)
    if not np.isfinite(found).all():
        raise BadOption(f"{where}: {key!r} holds {'NaN' if np.isnan(found).any() else 'infinity'}.")
    if _kind(key)[0] == "mask" and not _binary(found):
        raise BadOption(f"{where}: {key!r} is a mask, but holds other numbers than 0 and 1; gate: takes those.")
    return found


def _kind(key: str) -> tuple[str, str]:
    """What the numbers of a key are, "" if it does not say; and whose."""
    kind, colon, name = key.partition(":")
    return (kind, name) if colon and kind in KINDS else ("", key)


def _binary(array: Array) -> bool:
    return bool(np.isin(array, (0, 1)).all())


def resolved(brought: Brought, groups: Groups, *, target: bool = False) -> Said:
    """What arrays say of the groups of a model. target: whether a target is to be met too, which masks leave no room for.

    Raises BadOption where a name, a length or a mask does not fit the model.
    """
    scores, scales = np.full(groups.total, np.nan), np.ones(groups.total)
    masks = np.full(groups.total, np.nan)
    for key, array in brought.arrays.items():
        kind, name = _kind(key)
        for group, found in _spread(brought.name, key, name, array, groups):
            if kind == "score" or (not kind and not _binary(array)):
                _put(scores, group, found, key)
            if kind in ("mask", "gate") or (not kind and _binary(array)):
                _put(masks, group, (found != 0).astype(np.float64), key)
            if kind in ("scale", "gate"):
                _put(scales, group, np.where(found == 0, 1.0, found) if kind == "gate" else found, key, nothing=1.0)
    if target and not np.isnan(masks).all():
        raise BadOption("--scores holds masks, which decide what goes: --target needs scores; --ratio goes with masks, for other groups.")
    return Said(scores, scales, _cut(brought, groups, masks))


def _put(all_: Array, group: Group, found: Array, key: str, nothing: float = np.nan) -> None:
    here = all_[group.coordinates]
    if not np.array_equal(here, np.full(group.size, nothing), equal_nan=True):
        raise BadOption(f"--scores: {key!r} speaks of the group {group.name}, of which another array has spoken already.")
    all_[group.coordinates] = found


def _cut(brought: Brought, groups: Groups, masks: Array) -> Cut | None:
    masked = [g for g in groups.groups if not np.isnan(masks[g.coordinates]).all()]
    gone = masks == 0
    for group in masked:
        here = gone[group.coordinates]
        if here.any() and group.frozen is not None:
            raise BadOption(f"--scores masks channels of {group.name}, which must stay: {group.frozen}.")
        if here.all():
            raise BadOption(f"--scores masks all {group.size} channels of {group.name}; at least one has to stay.")
    check_demands(groups, gone)
    names = tuple(g.name for g in masked if g.frozen is None)
    return Cut(gone, names, dict.fromkeys(names, f"was decided by the mask in {brought.name}")) if masked else None


def _spread(source: str, key: str, name: str, array: Array, groups: Groups) -> list[tuple[Group, Array]]:
    """Groups that an array speaks of, each with a number for each coordinate."""
    group = groups.by_name.get(name)
    if group is not None and len(array) == group.size:
        return [(group, array)]
    sites = _sites(name, groups)
    lengths = {site: len(groups.labels[site]) for site in sites}
    fitting = [site for site in sites if lengths[site] == len(array)]
    if len(fitting) == 1 and groups.labels[fitting[0]].shape[1] == 1:
        return _by_position(key, array, groups, groups.labels[fitting[0]][:, 0])
    on = [g for g in groups.groups if set(g.sites) & set(sites) and g.size == len(array)]
    if len(on) == 1:
        return [(on[0], array)]
    factors = _by_factor(array, groups, groups.labels[fitting[0]]) if len(fitting) == 1 else []
    if len(factors) == 1:
        return factors
    if not sites and group is None:
        known = [*groups.by_name, *(f"{v}:{a}" for v, a in groups.labels)]
        raise BadOption(f"--scores {source}: there is no group or value {name!r}{near(name, known)}; `spa inspect` lists the groups.")
    if fitting or on:
        raise BadOption(f"--scores {source}: {key!r} lies along several axes or groups: give the numbers of one, as `spa inspect` has it.")
    sizes = [group.size] if group is not None else sorted({*lengths.values()})
    wanted = " or ".join(map(str, sizes))
    raise BadOption(f"--scores {source}: {key!r} holds {len(array)} numbers, but has {wanted} channels in this model.")


def _sites(name: str, groups: Groups) -> list[tuple[str, int]]:
    """Axes that a name means: VALUE:AXIS, or all of a value that groups occur on."""
    value, _, axis = name.rpartition(":")
    if axis.isdigit() and (value, int(axis)) in groups.labels:
        return [(value, int(axis))]
    return [site for site in groups.labels if site[0] == name]


def _by_position(key: str, array: Array, groups: Groups, labels: NDArray[np.int64]) -> list[tuple[Group, Array]]:
    """Numbers by position of an axis as numbers by coordinate. Raises BadOption where positions of one coordinate differ."""
    there = labels > 0
    found = np.full(groups.total, np.nan)
    found[labels[there] - 1] = array[there]
    if not np.array_equal(found[labels[there] - 1], array[there]):
        raise BadOption(f"--scores: {key!r} has different numbers where positions are one channel: give one for each of the group.")
    chosen = [g for g in groups.groups if not np.isnan(found[g.coordinates]).all()]
    whole = [g for g in chosen if not np.isnan(found[g.coordinates]).any()]
    if len(whole) < len(chosen):
        part = next(g for g in chosen if g not in whole)
        raise BadOption(f"--scores: {key!r} holds only a part of the group {part.name}: give numbers for all of its {part.size} channels.")
    return [(g, found[g.coordinates]) for g in whole]


def _by_factor(array: Array, groups: Groups, labels: NDArray[np.int64]) -> list[tuple[Group, Array]]:
    """Groups that are a factor of an axis, and of whose coordinates the numbers of its positions are, the same for all other factors."""
    found = []
    for index in np.unique(groups.of_coordinate()[labels[labels > 0] - 1]):
        group = groups.groups[index]
        inside = (labels > group.start) & (labels <= group.start + group.size)
        one = (labels * inside).max(axis=1, initial=0) - 1 - group.start
        numbers = np.full(group.size, np.nan)
        numbers[one[one >= 0]] = array[one >= 0]
        if (one >= 0).all() and np.array_equal(numbers[one], array):
            found.append((group, numbers))
    return found
