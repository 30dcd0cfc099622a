"""Constant values that stay where they are until somebody needs them.

A model of 16 GB is analysed, cut and saved on a machine with less memory than that, because nothing here is read before
it is used: a `Weight` knows the shape and type of its values and where their bytes lie (in a mapped file, in a
TensorProto, in an array), and carries the *selections* that passes have made so far. ``load`` and ``pieces`` carry the
selections out, touching only the rows that are kept.

    Weight(shape (o, c), no selection) --take([0, 2], axis=0)--> Weight(shape (2, c), rows 0 and 2 recorded)

`Weight` is a graph-surgeon ``LazyValues``, so that ``gs.Constant`` and the graph-surgeon exporter accept it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

INLINE_BYTES = 1024
"""Weights up to this many bytes are worth no indirection: shape inference wants to see shape constants."""

PIECE_BYTES = 4 << 20
"""Weights are read and written in pieces of this size, which bounds the memory that streaming takes."""

LAZY_LOCATION = "spa:lazy"
"""External location of a placeholder: says that the bytes are held by a `Weight` and are in no file of that name."""

_SUB_BYTE_BITS: dict[int, int] = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
    TensorProto.FLOAT6E2M3: 6,
    TensorProto.FLOAT6E3M2: 6,
}


def storage_bytes(shape: Sequence[int], data_type: int) -> int:
    """Bytes that ONNX's raw layout takes for a tensor, types smaller than a byte being packed.

    Parameters
    ----------
    shape
        Sizes of the axes.
    data_type
        A ``TensorProto.DataType`` other than STRING and UNDEFINED.
    """
    bits = _SUB_BYTE_BITS.get(data_type) or 8 * helper.tensor_dtype_to_np_dtype(data_type).itemsize
    return -(-math.prod(shape) * bits // 8)


class Source(Protocol):
    """Where bytes lie. ``release`` says that a range was used and may leave memory until it is asked for again."""

    def view(self) -> memoryview:
        """Give all bytes, without copying them where that is possible."""
        ...

    def release(self, start: int, stop: int) -> None:
        """Let the bytes of a range leave memory."""
        ...


class Buffer:
    """Bytes that are in memory anyway."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = memoryview(data).toreadonly()

    def view(self) -> memoryview:
        """Give all bytes."""
        return self._view

    def release(self, start: int, stop: int) -> None:
        """Do nothing: the bytes belong to somebody else."""


class MappedFile:
    """A whole file, mapped read-only, shared by all weights that lie in it.

    Parameters
    ----------
    path
        The file; it must not be empty, since nothing can be mapped then.
    descriptor
        An open descriptor of it, for callers that checked what they opened; it stays open.
    """

    def __init__(self, path: str | os.PathLike[str], descriptor: int | None = None) -> None:
        self.path = os.fspath(path)
        opened = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC) if descriptor is None else descriptor
        try:
            self._map = mmap.mmap(opened, 0, access=mmap.ACCESS_READ)
        finally:
            if descriptor is None:
                os.close(opened)
        self.size = len(self._map)

    def view(self, start: int = 0, stop: int | None = None) -> memoryview:
        """Give the bytes of a range, without reading them."""
        return memoryview(self._map)[start:stop]

    def release(self, start: int, stop: int) -> None:
        """Let pages leave memory; a view that is still in use reads them from the file again."""
        first = start - start % mmap.PAGESIZE
        stop = min(stop, self.size)
        if stop > first and hasattr(mmap, "MADV_DONTNEED"):
            # Where the system cannot do this, pages stay resident: slower for others, never wrong.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)


class FileSlice:
    """A range of a mapped file."""

    def __init__(self, file: MappedFile, offset: int, length: int) -> None:
        self.file = file
        self._offset = offset
        self._length = length

    def view(self) -> memoryview:
        """Give the range, without reading it."""
        return self.file.view(self._offset, self._offset + self._length)

    def release(self, start: int, stop: int) -> None:
        """Let the pages of a range of this slice leave memory."""
        self.file.release(self._offset + start, self._offset + min(stop, self._length))


class InProto:
    """The values of a TensorProto, asked for anew each time: protobuf hands out copies, and keeping them would double
    the memory that the model takes.
    """

    def __init__(self, proto: TensorProto) -> None:
        self.proto = proto

    def view(self) -> memoryview:
        """Give the values in raw layout, whichever field they are stored in."""
        if self.proto.HasField("raw_data"):
            return memoryview(self.proto.raw_data)
        return memoryview(raw_bytes(numpy_helper.to_array(self.proto)))

    def release(self, start: int, stop: int) -> None:
        """Do nothing: the copy goes when its user lets it go."""


def raw_bytes(array: Array) -> bytes:
    """Lay an array out as ``TensorProto.raw_data`` wants it: little-endian, packed where elements are below a byte."""
    if helper.np_dtype_to_tensor_dtype(array.dtype) in _SUB_BYTE_BITS:
        packed: bytes = numpy_helper.from_array(array).raw_data
        return packed
    return numpy_helper.tobytes_little_endian(array)


class Weight(LazyValues):  # type: ignore[misc]  # graph-surgeon has no type information
    """Constant values that are read when they are needed, less what selections have dropped.

    Parameters
    ----------
    source
        Where the bytes lie, in the layout of ``TensorProto.raw_data``; an `InProto` for STRING tensors.
    shape
        Sizes of the axes in the source.
    data_type
        A ``TensorProto.DataType``.
    note
        A tensor whose name, doc_string and metadata_props go with the values; its data is ignored.
    kept
        For each axis that was selected from: the positions, in the source, that are there now.
    """

    def __init__(
        self,
        source: Source,
        shape: Sequence[int],
        data_type: int,
        *,
        note: TensorProto | None = None,
        kept: Mapping[int, Indices] | None = None,
    ) -> None:
        # LazyValues.__init__ is left out on purpose: it wants a TensorProto that holds the data.
        self.source = source
        self.data_type = data_type
        self.dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(data_type)
        self._stored = tuple(int(size) for size in shape)
        self._kept = dict(kept or {})
        self._note = TensorProto()
        if note is not None:
            if note.name:
                self._note.name = note.name
            if note.doc_string:
                self._note.doc_string = note.doc_string
            self._note.metadata_props.extend(note.metadata_props)

    @classmethod
    def of_array(cls, array: Array) -> Weight:
        """Wrap an array that a pass made, so that every constant can be treated as a weight."""
        if array.dtype.kind in "OUS":
            proto = TensorProto(data_type=TensorProto.STRING, dims=array.shape)
            proto.string_data.extend(s if isinstance(s, bytes) else str(s).encode() for s in array.reshape(-1).tolist())
            return cls(InProto(proto), array.shape, TensorProto.STRING)
        return cls(Buffer(raw_bytes(array)), array.shape, helper.np_dtype_to_tensor_dtype(array.dtype))

    @classmethod
    def of_proto(cls, proto: TensorProto) -> Weight:
        """Wrap a TensorProto that holds its own data, in whichever field; nothing is copied, so leave it unchanged."""
        return cls(InProto(proto), proto.dims, proto.data_type, note=proto)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes after the selections."""
        return tuple(len(self._kept[a]) if a in self._kept else size for a, size in enumerate(self._stored))

    @property
    def is_string(self) -> bool:
        """Whether the elements are strings, which have no raw layout and always travel inside the model."""
        return self.data_type == TensorProto.STRING

    @property
    def nbytes(self) -> int:
        """Bytes in raw layout, after the selections; for strings, the bytes of the stored strings."""
        if self.is_string:
            return sum(len(text) for text in self._strings())
        return storage_bytes(self.shape, self.data_type)

    @property
    def tensor(self) -> TensorProto:
        """A fresh TensorProto for graph-surgeon's exporter: whole where small, a placeholder without data otherwise."""
        if self.is_string or self.nbytes <= INLINE_BYTES:
            return self.to_tensor()
        proto = self.header()
        proto.data_location = TensorProto.EXTERNAL
        proto.external_data.add(key="location", value=LAZY_LOCATION)
        return proto

    def header(self) -> TensorProto:
        """Everything of the TensorProto but its data."""
        proto = TensorProto()
        proto.CopyFrom(self._note)
        proto.dims.extend(self.shape)
        proto.data_type = self.data_type
        return proto

    def to_tensor(self) -> TensorProto:
        """The TensorProto with its data, read now."""
        proto = self.header()
        if self.is_string:
            proto.string_data.extend(self.take_strings())
        else:
            proto.raw_data = b"".join(self.pieces())
        return proto

    def take(self, indices: npt.ArrayLike, axis: int) -> Weight:
        """Select positions along an axis, without reading anything.

        Parameters
        ----------
        indices
            The positions that stay, in the order in which they stay, counted in the current shape.
        axis
            The axis, negative ones counting from the end.

        Raises
        ------
        IndexError
            If the axis or a position does not exist; negative positions do not.
        """
        rank = len(self._stored)
        if not -rank <= axis < rank:
            raise IndexError(f"axis {axis} of a weight with {rank} axes does not exist")
        axis %= rank
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise IndexError("positions to keep are a one-dimensional array of integers")
        chosen = chosen.astype(np.int64)
        size = self.shape[axis]
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < size):
            raise IndexError(f"a position to keep lies outside axis {axis}, which has {size} positions")
        if len(chosen) == size and bool((np.diff(chosen, prepend=-1) == 1).all()):
            return self
        kept = dict(self._kept)
        kept[axis] = kept[axis][chosen] if axis in kept else chosen
        return Weight(self.source, self._stored, self.data_type, note=self._note, kept=kept)

    def load(self) -> Array:
        """Read the values.

        Returns
        -------
        numpy.ndarray
            A read-only view of the bytes where nothing is selected and they are aligned for their type, a copy
            otherwise. Do not write to it: it may be the model file itself.
        """
        if self.is_string:
            return _text_array(self.take_strings(), self.shape)
        if self.data_type in _SUB_BYTE_BITS:
            return self._unpacked()
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        if not self._kept:
            values = np.frombuffer(self.source.view(), self.dtype).reshape(self.shape)
            return values if values.flags.aligned else values.copy()
        result = np.empty(self.shape, self.dtype)
        flat, filled = result.reshape(-1).view(np.uint8), 0
        for block in self._blocks():
            flat[filled : filled + block.size] = block
            filled += block.size
        return result

    def rows(self, step: int) -> Iterator[Array]:
        """Read the values `step` positions of the first axis at a time; a block is valid until the next one is asked for."""
        if self._kept or self.is_string or self.data_type in _SUB_BYTE_BITS or not self._stored or math.prod(self._stored) == 0:
            whole = self.load()
            yield from (whole[i : i + step] for i in range(0, len(whole), step)) if whole.ndim else (whole,)
            return
        data, size = self.source.view(), storage_bytes(self._stored, self.data_type) // self._stored[0]
        for start in range(0, self._stored[0], step):
            stop = min(start + step, self._stored[0])
            block = np.frombuffer(data[start * size : stop * size], self.dtype).reshape(stop - start, *self._stored[1:])
            yield block if block.flags.aligned else block.copy()
            self.source.release(start * size, stop * size)

    def pieces(self) -> Iterator[memoryview]:
        """Read the bytes in raw layout, in pieces of bounded size; a piece is valid until the next one is asked for."""
        if self.is_string:
            raise TypeError("strings have no raw layout")
        if self._kept and self.data_type in _SUB_BYTE_BITS:
            yield memoryview(raw_bytes(self._unpacked()))
        elif self._kept:
            for block in self._blocks():
                yield block.data
        else:
            whole = self.source.view()
            for start in range(0, len(whole), PIECE_BYTES):
                yield whole[start : start + PIECE_BYTES]
                self.source.release(start, start + PIECE_BYTES)

    def take_strings(self) -> list[bytes]:
        """The strings that the selections keep, in C order."""
        grid = np.arange(math.prod(self._stored)).reshape(self._stored)
        for axis, kept in self._kept.items():
            grid = grid.take(kept, axis)
        strings = self._strings()
        return [strings[position] for position in grid.reshape(-1).tolist()]

    def _strings(self) -> Sequence[bytes]:
        assert isinstance(self.source, InProto)
        strings: Sequence[bytes] = self.source.proto.string_data
        return strings

    def _unpacked(self) -> Array:
        # Elements share bytes, so positions cannot be picked before they are unpacked.
        packed = TensorProto(dims=self._stored, data_type=self.data_type, raw_data=bytes(self.source.view()))
        self.source.release(0, len(packed.raw_data))
        values: Array = numpy_helper.to_array(packed)
        for axis in _smallest_first(self._kept, self._stored):
            values = values.take(self._kept[axis], axis)
        return values

    def _blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        # Opaque elements: numpy would copy a misaligned tensor as a whole before it takes from it.
        whole = self.source.view()
        opaque = np.frombuffer(whole, np.dtype(f"V{self.dtype.itemsize}")).reshape(self._stored)
        kept = [self._kept.get(axis) for axis in range(opaque.ndim)]
        for block in _blocks(opaque, kept):
            if block.size:
                yield np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            self.source.release(0, len(whole))

    def __str__(self) -> str:
        return f"Weight (shape={self.shape}, dtype={self.dtype})"


def _smallest_first(kept: Mapping[int, Indices], shape: Sequence[int]) -> list[int]:
    """Axes in the order that keeps what lies between two selections small."""
    return sorted(kept, key=lambda axis: len(kept[axis]) / max(shape[axis], 1))


def _blocks(values: Array, kept: Sequence[Indices | None]) -> Iterator[Array]:
    """Selected parts of an array in C order, each made from `PIECE_BYTES` of it, or one element, if that is more."""
    if values.ndim == 0 or values.size == 0:
        yield values
        return
    first, rest = kept[0], kept[1:]
    count = values.shape[0] if first is None else len(first)
    row_bytes = values.nbytes // values.shape[0]
    if row_bytes > PIECE_BYTES and values.ndim > 1:
        for row in range(count) if first is None else first.tolist():
            yield from _blocks(values[row], rest)
        return
    step = max(1, PIECE_BYTES // row_bytes)
    inner = {axis: chosen for axis, chosen in enumerate(rest, start=1) if chosen is not None}
    for start in range(0, count, step):
        rows = slice(start, start + step)
        block = values[rows] if first is None else values[first[rows]]
        for axis in _smallest_first(inner, values.shape):
            block = block.take(inner[axis], axis)
        yield block


def _text_array(strings: Sequence[bytes], shape: Sequence[int]) -> Array:
    """Strings as graph-surgeon and onnx show them; bytes that are no text stay bytes rather than fail."""
    result = np.empty(len(strings), dtype=object)
    for position, text in enumerate(strings):
        try:
            result[position] = text.decode()
        except UnicodeDecodeError:
            result[position] = text
    return result.reshape(shape)


__all__ = [
    "INLINE_BYTES",
    "LAZY_LOCATION",
    "PIECE_BYTES",
    "Buffer",
    "FileSlice",
    "InProto",
    "MappedFile",
    "Source",
    "Weight",
    "raw_bytes",
    "storage_bytes",
]
