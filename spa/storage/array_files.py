""".npy and .npz files, read a few samples at a time: .npy is mapped, members of .npz are streamed; pickles are never loaded."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from spa.data.samples import Array, Layout, Piece, check_type, fit, name_entries, piece, reason
from spa.errors import BadFile

SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class Entry:
    """An array of a file. `whole` reads it, `pieces` reads it in pieces of so many rows of its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    whole: Callable[[], Array]
    pieces: Callable[[int], Iterator[Array]]


def of_array(array: Array) -> Entry:
    """An array in memory as an entry."""

    def pieces(rows: int) -> Iterator[Array]:
        for start in range(0, array.shape[0], rows):
            yield array[start : start + rows]

    return Entry(array.shape, array.dtype, lambda: array, pieces)


@contextmanager
def _reading(path: Path, entry: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        what = f"Entry {entry!r} of the calibration file {path}" if entry else f"The calibration file {path}"
        raise BadFile(f"{what} can't be read: {reason(error)}; write it anew with numpy.{_writer(path)}.") from error


def _writer(path: Path) -> str:
    return "savez" if path.suffix.lower() == ".npz" else "save"


def _header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type. Raises BadFile for pickles, ValueError for what is no array."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version[0]}.{version[1]} of the format holds no plain numbers")
    shape, columns, dtype = npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
    if dtype.hasobject:
        what = f"Entry {name!r} of the calibration file {path}" if name else f"The calibration file {path}"
        raise BadFile(f"{what} holds pickled Python objects, which are never loaded as they can run code: save plain numbers.")
    return shape, columns, dtype


def read_npy(path: Path) -> Entry:
    """The array of an .npy file, mapped. Raises BadFile."""
    with _reading(path), path.open("rb") as stream:
        shape, _, dtype = _header(path, "", stream)
        have, needed = path.stat().st_size - stream.tell(), math.prod(shape) * dtype.itemsize
        if have < needed:
            raise ValueError(f"it ends early, with {have} of {needed} bytes")

    def mapped() -> Array:
        with _reading(path):
            loaded: Array = np.load(path, mmap_mode="r" if 0 not in shape and shape else None, allow_pickle=False)
            return loaded

    def pieces(rows: int) -> Iterator[Array]:
        array = mapped()
        for start in range(0, shape[0], rows):
            yield np.array(array[start : start + rows])

    return Entry(shape, dtype, lambda: np.array(mapped()), pieces)


def read_npz(path: Path) -> dict[str, Entry]:
    """The entries of an .npz file by name; only their headers are read. Raises BadFile."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        return {n.removesuffix(".npy"): _member(path, archive, n) for n in archive.namelist() if not n.endswith("/")}


def _member(path: Path, archive: zipfile.ZipFile, member: str) -> Entry:
    name = member.removesuffix(".npy")
    with _reading(path, name), archive.open(member) as stream:
        shape, columns, dtype = _header(path, name, stream)

    def pieces(rows: int) -> Iterator[Array]:
        if columns and len(shape) > 1:
            yield from of_array(whole()).pieces(rows)
            return
        with _reading(path, name), zipfile.ZipFile(path) as opened, opened.open(member) as data:
            _header(path, name, data)
            for start in range(0, shape[0], rows):
                part = (min(rows, shape[0] - start), *shape[1:])
                yield np.frombuffer(_exactly(data, math.prod(part) * dtype.itemsize), dtype).reshape(part)

    def whole() -> Array:
        with _reading(path, name), zipfile.ZipFile(path) as opened, opened.open(member) as data:
            _header(path, name, data)
            flat = np.frombuffer(_exactly(data, math.prod(shape) * dtype.itemsize), dtype)
            return flat.reshape(shape[::-1]).T if columns else flat.reshape(shape)

    return Entry(shape, dtype, whole, pieces)


def _exactly(stream: IO[bytes], count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        more = stream.read(min(count - len(data), 1 << 24))
        if not more:
            raise EOFError(f"it ends early, with {len(data)} of {count} bytes")
        data += more
    return data


def read_entries(path: Path) -> dict[str, Entry]:
    """The entries of an .npz file; that of an .npy file has the name "". Raises BadFile."""
    return read_npz(path) if path.suffix.lower() == ".npz" else {"": read_npy(path)}


@dataclass(frozen=True)
class ArraySource:
    """Entries that fit a model's inputs.

    Attributes
    ----------
    where
        The source, as the beginning of a sentence.
    entries
        By input, and the labels.
    count, bare
        Samples, and whether it is one without an axis that counts.
    """

    where: str
    entries: Mapping[str, Entry]
    layout: Layout
    count: int
    bare: bool

    def pieces(self, rows: int) -> Iterator[Piece]:
        """Samples, at most `rows` at a time. Raises BadFile or BadOption."""
        if self.bare:
            yield piece(self.where, {n: e.whole() for n, e in self.entries.items()}, self.layout)
            return
        axes = {**dict.fromkeys(self.entries, 0), **self.layout.axes}
        streams = {n: e.pieces(rows) for n, e in self.entries.items() if axes[n] == 0}
        held = {n: e.whole() for n, e in self.entries.items() if axes[n] != 0}
        everything = Piece(held, self.count, axes)
        for start in range(0, self.count, rows):
            part = everything.cut(start, start + rows).feeds
            yield piece(self.where, {**{n: next(s) for n, s in streams.items()}, **part}, self.layout)


def source_of(where: str, entries: Mapping[str, Entry], layout: Layout, labels: str | None) -> ArraySource:
    """Entries as samples, after a check of names, shapes and types. where: beginning of a sentence. Raises BadOption."""
    names = name_entries(where, list(entries), layout, labels, by_place=True)
    placed = {names[n]: e for n, e in entries.items()}
    for name, entry in placed.items():
        if name in layout.inputs:
            check_type(where, entry.dtype, layout.inputs[name])
    count, bare = fit(where, {n: e.shape for n, e in placed.items()}, layout)
    return ArraySource(where, placed, layout, count, bare)


def sources_of(files: Sequence[Path], layout: Layout, labels: str | None, samples: int) -> tuple[list[ArraySource], int]:
    """Files as samples, only as many as `samples` needs, and how many samples they hold. Raises BadFile or BadOption."""
    found: list[ArraySource] = []
    count = 0
    for path in files:
        found.append(source_of(f"The calibration file {path}", read_entries(path), layout, labels))
        count += found[-1].count
        if count >= samples:
            break
    return found, min(count, samples)


__all__ = ["SUFFIXES", "ArraySource", "Entry", "of_array", "read_entries", "read_npy", "read_npz", "source_of", "sources_of"]
