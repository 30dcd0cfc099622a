"""Where the bytes of each tensor of a model lie: left out of the skeleton, in the TensorProto, or in external files.

Everything here trusts nothing: sizes are compared with shapes before anything is allocated, and external files are
opened only if they are ordinary files in the model's own folder (https://onnx.ai/onnx/repo-docs/ExternalData.html).
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from passes.weights import INLINE_BYTES, Buffer, FileSlice, InProto, MappedFile, Source, Weight, storage_bytes
from spa.errors import BadFile, BadModel, UnsupportedModel
from spa.storage import wire

_MAX_RANK = 64  # numpy has no arrays of more axes
_NESTED = {message.DESCRIPTOR for message in (AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto)}
_TYPED_ENTRIES: dict[int, Callable[[int], int]] = {
    TensorProto.COMPLEX64: lambda count: 2 * count,
    TensorProto.COMPLEX128: lambda count: 2 * count,
    TensorProto.UINT4: lambda count: -(-count // 2),
    TensorProto.INT4: lambda count: -(-count // 2),
    TensorProto.FLOAT4E2M1: lambda count: -(-count // 2),
    TensorProto.UINT2: lambda count: -(-count // 4),
    TensorProto.INT2: lambda count: -(-count // 4),
}
"""Entries that a typed field (``int32_data`` and so on) has for a number of elements, where it is not one each."""


class Sources:
    """The places that one model's tensors can be in.

    Parameters
    ----------
    location
        External location of the placeholders in the skeleton.
    lifted
        Where the data of each placeholder is.
    folder
        The model's folder, against which external files are resolved; None if the model came from no file.
    """

    def __init__(self, location: str, lifted: Sequence[Source], folder: Path | None) -> None:
        self._location = location
        self._lifted = lifted
        self._folder = folder
        self.files: dict[str, MappedFile] = {}

    def weight(self, proto: TensorProto) -> Weight:
        """Make a weight of a tensor of the skeleton.

        Raises
        ------
        BadModel, BadFile, UnsupportedModel
            If shape, type and data do not belong together, or an external file is missing or not to be trusted.
        """
        label = f"tensor '{proto.name}'" if proto.name else "a tensor without a name"
        _check_type(proto, label)
        key = wire.placeholder_key(proto, self._location)
        if key is not None:
            source = self._lifted[key]
            _check_size(proto, len(source.view()), label)
            return Weight(source, proto.dims, proto.data_type, note=proto)
        if proto.data_location == TensorProto.EXTERNAL or proto.external_data:
            return Weight(self._external(proto, label), proto.dims, proto.data_type, note=proto)
        _check_data(proto, label)
        return Weight.of_proto(proto)

    def _external(self, proto: TensorProto, label: str) -> Source:
        if proto.HasField("raw_data") or proto.data_type == TensorProto.STRING:
            raise BadModel(
                f"{label} is external and cannot be, since it has data of its own or strings; export it again"
            )
        entries = {entry.key: entry.value for entry in proto.external_data}
        size = storage_bytes(proto.dims, proto.data_type)
        offset = _number(entries.get("offset", "0"), "offset", label)
        _check_size(proto, _number(entries.get("length", str(size)), "length", label), label)
        location = entries.get("location", "")
        _check_location(location, label)
        if self._folder is None:
            raise BadModel(
                f"the data of {label} is in the external file '{location}', and a model that comes from no file has no "
                "folder to look in; load it from its path"
            )
        if size == 0:
            return Buffer(b"")
        file = self._file(location)
        if offset + size > file.size:
            raise BadFile(
                f"{label} needs {size} bytes at {offset} of the external file '{location}', which has {file.size}; "
                "copy that file again as a whole"
            )
        return FileSlice(file, offset, size)

    def _file(self, location: str) -> MappedFile:
        location = str(PurePosixPath(location))
        if location not in self.files:
            assert self._folder is not None
            self.files[location] = _map_external(self._folder, location)
        return self.files[location]


def without_data(model: ModelProto, location: str) -> tuple[ModelProto, list[Source]]:
    """Copy a ModelProto except for its big tensors, as `wire.lift` does for bytes.

    Returns
    -------
    skeleton, sources
        The copy with placeholders, and where their data is: still in the tensors of the model that was given.
    """
    skeleton = ModelProto()
    sources: list[Source] = []
    _copy(model, skeleton, location, sources)
    return skeleton, sources


def _copy(source: Any, target: Any, location: str, sources: list[Source]) -> None:
    if isinstance(source, TensorProto):
        _copy_tensor(source, target, location, sources)
        return
    for descriptor, value in source.ListFields():
        child = getattr(target, descriptor.name)
        repeated = hasattr(child, "extend")
        if descriptor.message_type in _NESTED or descriptor.message_type is TensorProto.DESCRIPTOR:
            if not repeated:
                child.SetInParent()
            for item in value if repeated else (value,):
                _copy(item, child.add() if repeated else child, location, sources)
        elif repeated:
            child.extend(value)
        elif descriptor.message_type is not None:
            child.CopyFrom(value)
        else:
            setattr(target, descriptor.name, value)


def _copy_tensor(source: TensorProto, target: TensorProto, location: str, sources: list[Source]) -> None:
    special = source.data_location == TensorProto.EXTERNAL or source.external_data or source.HasField("segment")
    if special or len(source.raw_data) <= INLINE_BYTES:
        target.CopyFrom(source)
        return
    target.CopyFrom(wire.placeholder(location, len(sources)))
    target.dims.extend(source.dims)
    target.metadata_props.extend(source.metadata_props)
    for name in ("data_type", "name", "doc_string"):
        if source.HasField(name):
            setattr(target, name, getattr(source, name))
    sources.append(InProto(source))


def _check_type(proto: TensorProto, label: str) -> None:
    """Refuse shapes and types that numpy, or arithmetic, could trip over later."""
    if proto.HasField("segment"):
        raise UnsupportedModel(f"{label} is split into segments, which no current exporter writes; export it again")
    if proto.data_type == TensorProto.UNDEFINED or proto.data_type not in TensorProto.DataType.values():
        raise BadModel(f"{label} has the element type {proto.data_type}, which onnx does not know; export it again")
    if any(size < 0 for size in proto.dims):
        raise BadModel(f"{label} has a negative size in its shape {list(proto.dims)}; export it again")
    widest = math.prod(size for size in proto.dims if size) * helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
    if widest >= 1 << 62 or len(proto.dims) > _MAX_RANK:
        raise BadModel(f"{label} has a shape that no memory could hold; the file is damaged, so export it again")


def _check_size(proto: TensorProto, stored: int, label: str) -> None:
    if proto.data_type == TensorProto.STRING:
        raise BadModel(f"{label} has strings stored as raw bytes, which onnx does not allow; export it again")
    expected = storage_bytes(proto.dims, proto.data_type)
    if stored != expected:
        raise BadModel(f"{label} has {stored} bytes where its shape needs {expected}; export it again")


def _check_data(proto: TensorProto, label: str) -> None:
    if proto.HasField("raw_data"):
        _check_size(proto, len(proto.raw_data), label)
        return
    entries = len(getattr(proto, helper.tensor_dtype_to_field(proto.data_type)))
    count = math.prod(proto.dims)
    expected = _TYPED_ENTRIES[proto.data_type](count) if proto.data_type in _TYPED_ENTRIES else count
    if entries != expected:
        raise BadModel(f"{label} has {entries} values where its shape needs {expected}; export it again")


def _number(text: str, what: str, label: str) -> int:
    # int() alone would take '-1', ' 1_0 ' and digits of other scripts.
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise BadModel(f"{label} gives '{text[:40]}' as the {what} of its external data, not a number; export it again")
    return int(text)


def _check_location(location: str, label: str) -> None:
    """Refuse locations that lead, or on another system would lead, out of the model's folder."""
    windows = PureWindowsPath(location)
    if not location or "\0" in location:
        raise BadModel(f"{label} is external but names no file; export it again")
    if location.startswith("/") or windows.drive or windows.root or ".." in windows.parts:
        raise BadModel(
            f"{label} asks for the external file '{location}' outside of the model's folder, which is refused; "
            "save the model again with its data beside it"
        )


def _map_external(folder: Path, location: str) -> MappedFile:
    """Map an external file, having made sure that it is an ordinary file of its own, in the model's folder."""
    path = folder / location
    try:
        if _crosses_link(folder, location):
            raise BadFile(f"the external file '{location}' is or goes through a symbolic link; put the real file there")
        # Without O_NONBLOCK, a named pipe in place of the file would hang here.
        flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)
    except OSError as error:
        raise BadFile(_cannot_open(location, error)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(f"the external file '{location}' is not an ordinary file; put the real file there")
        if status.st_nlink > 1:
            raise BadFile(f"the external file '{location}' is a hard link; put a copy of its own there")
        if status.st_size == 0:
            raise BadFile(f"the external file '{location}' is empty; copy that file again as a whole")
        return MappedFile(path, descriptor)
    finally:
        os.close(descriptor)


def _crosses_link(folder: Path, location: str) -> bool:
    path = folder
    for part in PurePosixPath(location).parts:
        path = path / part
        if path.is_symlink():
            return True
    return False


def _cannot_open(location: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"the external file '{location}' is missing; put it beside the model"
    return f"the external file '{location}' cannot be opened ({error.strerror}); make it readable"
