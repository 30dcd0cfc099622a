"""Calibration data from Python code that is not ours: items become samples, a single reading is kept, another one must give the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from spa.data.samples import Array, Layout, Piece, name_entries, piece, reason
from spa.errors import BadOption, SpaError
from spa.proof.feeds import Feeds


def pieces_of(name: str, items: Iterator[Any], layout: Layout, labels: str | None) -> Iterator[Piece]:
    """Samples from what others' code gives, item by item. name: what it is. Raises BadOption or BadFile."""
    number = 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except SpaError:
            raise
        except Exception as error:  # the user's generator
            raise BadOption(f"The calibration data {name} fail at item {number}: {reason(error)}.") from error
        where = f"Item {number} of the calibration data {name}"
        if isinstance(item, tuple | list | str | bytes) or item is None:
            raise BadOption(f"{where} is a {type(item).__name__}: give a dict {{input: array}}, or an array for a sole input.")
        given = {str(n): v for n, v in item.items()} if isinstance(item, Mapping) else {"": item}
        arrays = {n: as_array(f"{where} (entry {n!r})" if n else where, v).copy() for n, v in given.items()}  # buffers may be used again
        names = name_entries(where, list(arrays), layout, labels, by_place=not isinstance(item, Mapping))
        yield piece(where, {names[n]: v for n, v in arrays.items()}, layout)
        number += 1


def as_array(where: str, value: Any) -> Array:
    """A value as an array. where: what it is, as the beginning of a sentence. Raises BadOption."""
    try:
        return np.asarray(value)
    except Exception as error:  # foreign objects convert themselves
        raise BadOption(f"{where} is a {type(value).__name__} that is no array: {reason(error)}.") from error


class Replay:
    """What an iterator gave, kept so that it can be gone through again; it is only asked for as much as is used."""

    def __init__(self, once: Iterator[Piece]) -> None:
        self.once, self.kept = once, list[Piece]()
        self.error: SpaError | None = None

    def __iter__(self) -> Iterator[Piece]:
        i = 0
        while True:
            if i == len(self.kept):
                if self.error is not None:
                    raise self.error
                try:
                    self.kept.append(next(self.once))
                except StopIteration:
                    return
                except SpaError as error:
                    self.error = error
                    raise
            yield self.kept[i]
            i += 1


class Steady:
    """Holds others' code to giving the same batches at every reading, by checksums."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sums: list[int] = []
        self.full = False

    def check(self, batches: Iterator[Feeds]) -> Iterator[Feeds]:
        """The batches, as they are. Raises BadOption at the first that differs from the one read before."""
        count = 0
        for feeds in batches:
            found = _checksum(feeds)
            if count == len(self.sums) and not self.full:
                self.sums.append(found)
            elif count == len(self.sums) or self.sums[count] != found:
                raise self._changed(count)
            count += 1
            yield feeds
        if count < len(self.sums):
            raise self._changed(count)
        self.full = True

    def _changed(self, batch: int) -> BadOption:
        return BadOption(f"{self.source} gave another batch {batch} when read again: draw with a fixed seed and do not shuffle.")


def _checksum(feeds: Feeds) -> int:
    found = 0
    for name, value in feeds.items():
        head = f"{name} {value.dtype} {value.shape}".encode()
        data = repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        found = zlib.crc32(data, zlib.crc32(head, found))
    return found


__all__ = ["Replay", "Steady", "as_array", "pieces_of"]
