"""Which ids a vocabulary keeps: the most frequent in calibration data, those of the largest rows, all that occur, or those of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes import Weight
from spa.data.evidence import Evidence
from spa.errors import BadFile, BadOption, NothingToPrune
from spa.graph.analysis import Analysis
from spa.graph.groups import Groups
from spa.plans.plan import Plan, make_plan, mask_of
from spa.proof.feeds import Feeds
from spa.vocabularies.tokenizer_file import TokenizerFile
from spa.vocabularies.vocabulary import gone_of, vocabulary_group

USED = "used"


@dataclass(frozen=True)
class Keep:
    """What `--vocab` asks for. count: of ids; share: of them; ids: just these. None of them: all that occur in the calibration data."""

    count: int | None = None
    share: float | None = None
    ids: tuple[int, ...] | None = None

    def number(self, size: int) -> int | None:
        """How many ids are to stay; None where that is not said."""
        if self.share is not None:
            return max(round(self.share * size), 1)
        return None if self.count is None else min(self.count, size)


def read_keep(given: str | int | float | Iterable[int]) -> Keep:
    """Keep from what an option or a caller gives: a share below 1, a number, "used", a file of ids, or ids. Raises BadOption or BadFile."""
    if isinstance(given, str) and given == USED:
        return Keep()
    if isinstance(given, str) and not re.fullmatch(r"-?\d+|-?\d*\.\d+(e-?\d+)?", given):
        return Keep(ids=tuple(_file_ids(Path(given))))
    if isinstance(given, str):
        given = int(given) if re.fullmatch(r"-?\d+", given) else float(given)
    if isinstance(given, int | np.integer) and given >= 1:
        return Keep(count=int(given))
    if isinstance(given, float) and 0 < given < 1:
        return Keep(share=given)
    if isinstance(given, int | float):
        raise BadOption(f"--vocab is {given}, but must be a share of the ids below 1, a number of them, {USED!r}, or a file of ids.")
    return Keep(ids=tuple(int(i) for i in given))


def _file_ids(path: Path) -> list[int]:
    """Ids from JSON (a list, or a map of tokens to ids), .npy, or text with one number a word."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.dtype.kind not in "iu":
                raise ValueError(f"it holds {array.dtype}")
            return [int(i) for i in array.ravel()]
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            listed = found.get("old_of_new", found.values()) if isinstance(found, Mapping) else found
            if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
                raise ValueError("it holds something else")
            return list(listed)
        return [int(word) for word in text.split()]
    except FileNotFoundError as error:
        raise BadFile(f"--vocab {path} is neither a number nor a file: give a share, a number, {USED!r}, or a file of ids.") from error
    except (OSError, ValueError, TypeError, RecursionError, EOFError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise BadFile(f"--vocab {path} can't be read as ids ({reason}): give whole numbers as text, JSON or .npy.") from error


def count_ids(batches: Iterable[Feeds], inputs: Iterable[str], size: int) -> NDArray[np.int64]:
    """(size,) how often each id occurs in the inputs that hold ids. Raises BadOption for ids beyond the table."""
    found = np.zeros(size, np.int64)
    for batch in batches:
        for name in inputs:
            ids = np.asarray(batch[name]).astype(np.int64).ravel()
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise BadOption(f"The calibration data hold id {int(ids.max())}, but input {name!r} looks up a table of {size} rows.")
            found += np.bincount(ids, minlength=size)
    return found


def row_norms(groups: Groups) -> NDArray[np.float64]:
    """(ids,) L2 norm of all that is stored for each id."""
    group = vocabulary_group(groups)
    traced = groups.traced
    assert traced.ids is not None
    square = np.zeros(groups.total + 1)
    for value, axis in group.sites:
        if value not in traced.constants:
            continue
        held = traced.constants[value]
        array = np.asarray(held._values.load() if isinstance(held._values, Weight) else held.values)
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        step = max(1, (1 << 22) // max(rows.shape[1], 1))
        for start in range(0, len(rows), step):
            part = rows[start : start + step].astype(np.float32)
            square[groups.labels[value, axis][start : start + step, 0]] += np.einsum("ij,ij->i", part, part, dtype=np.float64)
    return np.asarray(np.sqrt(square[groups.dim_labels(traced.ids)[:, 0]]))


def choose_ids(
    groups: Groups, keep: Keep, *, evidence: Evidence | None = None, tokenizer: TokenizerFile | None = None, always: Iterable[int] = ()
) -> NDArray[np.int64]:
    """The ids that stay, ascending.

    By frequency where there are data (equals: the lower id first, the commoner token of most tokenizers), by norm of the rows where there
    are none. always: ids that stay in any case; the tokenizer adds its own, and what it makes kept tokens of.
    Raises BadOption where that is not possible.
    """
    vocabulary_group(groups)
    promise = groups.traced.vocabulary
    assert promise is not None
    size = promise.size
    if tokenizer is not None:
        tokenizer.check_fits(size)
    must = _inside(always, size) | (set(tokenizer.always) if tokenizer is not None else set())
    must |= {promise.unknown} if promise.unknown is not None and 0 <= promise.unknown < size else set()
    counts = None if evidence is None else count_ids(evidence.batches, promise.inputs, size)
    if keep.ids is not None:
        wrong = [i for i in keep.ids if not 0 <= i < size]
        if wrong or not keep.ids:
            raise BadOption(f"--vocab lists {f'id {wrong[0]}' if wrong else 'no ids'}, but the model has ids 0 … {size - 1}.")
        wanted = must | set(keep.ids)
        found = tokenizer.closed(wanted) if tokenizer is not None else wanted
    elif keep.number(size) is None:
        if counts is None:
            raise BadOption(f"--vocab {USED} keeps the ids that occur in calibration data: give some with --calibration.")
        wanted = must | set(np.flatnonzero(counts).tolist())
        found = tokenizer.closed(wanted) if tokenizer is not None else wanted
    else:
        worth = counts if counts is not None else row_norms(groups)
        found = _best(worth, keep.number(size) or 1, must, tokenizer)
    if len(found) >= size:
        raise NothingToPrune(f"Nothing to prune: all {size} ids are to stay.")
    return np.array(sorted(found), np.int64)


def _inside(ids: Iterable[int], size: int) -> set[int]:
    return {int(i) for i in ids if 0 <= int(i) < size}


def _best(worth: NDArray[Any], number: int, must: set[int], tokenizer: TokenizerFile | None) -> set[int]:
    """The ids that are worth most, one after the other, each with what it is made of."""
    found = tokenizer.closed(must) if tokenizer is not None else set(must)
    if len(found) > number:
        raise BadOption(f"--vocab asks for {number} ids, but special tokens and single bytes alone are {len(found)}: ask for more.")
    last = tokenizer.size if tokenizer is not None else len(worth)
    for one in np.argsort(-worth[:last], kind="stable").tolist():
        if len(found) >= number:
            break
        new = tokenizer.closed([one], found) if tokenizer is not None else {one} - found
        if len(found) + len(new) <= number:
            found |= new
    return found


def plan_vocabulary(
    analysis: Analysis, kept: NDArray[np.int64], *, options: Mapping[str, Any] | None = None, beside: Plan | None = None
) -> Plan:
    """A plan that keeps these ids alone, and removes what the plan `beside` removes from other groups of the same analysis."""
    groups = analysis.groups
    gone = gone_of(groups, kept)
    own: dict[str, Any] = {"vocabulary": {**(options or {}), "kept": len(kept)}}
    if beside is not None:
        gone |= mask_of(beside, groups)
        own = {**beside.options, **own}
    notes = {} if beside is None else beside.notes
    return make_plan(analysis.given, groups, gone, copies=analysis.normal.copies, options=own, trace=analysis.settings, notes=notes)
