"""Models come in and go out here: nothing else in spa reads or writes a model file.

Reading takes the memory of the graph, not of the weights: they stay in the file until they are used. Writing goes from
file to file, one bounded piece after the other, and is all or nothing. What comes in is not trusted: whatever it is,
the answer is a `Model` or a `SpaError` that says what to do.

    path, bytes, ModelProto --load--> Model --with_graph--> Model --save--> path
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from passes.weights import INLINE_BYTES, LAZY_LOCATION, PIECE_BYTES, Buffer, FileSlice, MappedFile, Weight
from spa.errors import BadFile, BadModel, BadOption, SpaError, UnsupportedModel
from spa.storage import wire
from spa.storage.exporter import constants, export
from spa.storage.files import Pieces, write_files
from spa.storage.origin import Origin
from spa.storage.protos import Notes, check_graph, check_model, check_text, inline_functions, take_notes
from spa.storage.sources import Sources, without_data

LARGEST_FILE = (2 << 30) - (16 << 20)
"""Protobuf refuses messages of 2 GiB; what is left below that is for tools that add to the model, such as type
inference."""

_ALIGNMENT = 4096  # a page, so that runtimes can map single tensors

_FOREIGN = (
    (b"\xfd7zXZ", "is compressed; decompress it with `xz -d` first"),
    (b"\x1f\x8b", "is compressed; decompress it with `gunzip` first"),
    (b"BZh", "is compressed; decompress it with `bunzip2` first"),
    (b"\x28\xb5\x2f\xfd", "is compressed; decompress it with `zstd -d` first"),
    (b"PK\x03\x04", "is a zip archive, maybe a PyTorch checkpoint; unpack it, or export the model to ONNX"),
    (b"\x89PNG", "is a picture, not an ONNX model; give the .onnx file"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the model itself; fetch it with `git lfs pull`"),
    (b"\x89HDF", "is an HDF5 file; export the model to ONNX first"),
)


@dataclass(frozen=True, eq=False)
class Model:
    """A model: its graph, and what stands around the graph.

    Attributes
    ----------
    graph
        The graph; constants hold a `passes.weights.Weight`. Treat it as immutable and copy it to change it.
    header
        Versions, opsets, producer, metadata, doc_string, training_info, and of the graph its inputs, outputs,
        value_info, annotations and metadata as they were read: all but nodes and initializers.
    path
        The file it was read from, or None.
    nbytes
        Bytes of the model file and of all its external files.
    external
        Whether it has external files.
    notes
        What graph-surgeon cannot carry; `to_proto` and `save` put it back.
    origin
        What it was read from.
    narrowed
        Inputs that are smaller than those of the model that this one was cut from: input -> axis -> positions that are left.
        Whoever runs it takes inputs of either size (`spa.graph.state.feeds_for`).
    """

    graph: gs.Graph
    header: ModelProto
    path: Path | None
    nbytes: int
    external: bool
    notes: Notes
    origin: Origin
    narrowed: Mapping[str, Mapping[int, NDArray[np.int64]]] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of the bytes that the model was read from, worked out when first asked for.

        It is that of ``cat model.onnx model.data | sha256sum``, and stays that of the source after `with_graph`.
        """
        return self.origin.sha256


def load(model: str | os.PathLike[str] | bytes | ModelProto) -> Model:
    """Read a model, leaving its weights where they are.

    Parameters
    ----------
    model
        A path, a serialized ModelProto, or a ModelProto. The weights are read from it later on, so that neither file
        nor ModelProto may change while the result is in use.

    Returns
    -------
    Model
        With the model's own functions inlined.

    Raises
    ------
    BadFile
        If a file cannot be read, is no ONNX file, or is an external file that is missing, short or not to be trusted.
    BadModel
        If the model breaks ONNX's rules.
    UnsupportedModel
        If it uses something that could not be carried over unharmed.
    """
    location = _secret_location()
    name = "the model in memory"
    try:
        if isinstance(model, ModelProto):
            return _from_proto(model, location)
        if isinstance(model, bytes | bytearray | memoryview):
            return _from_bytes(memoryview(model), location)
        if isinstance(model, str | os.PathLike):
            name = os.fsdecode(model)
            return _from_path(Path(name), location)
    except SpaError as error:
        raise type(error)(_printable(f"{name}: {error}")) from error
    raise BadOption(f"a model is a path, bytes or a ModelProto, not a {type(model).__name__}; give one of these")


def _printable(text: str) -> str:
    """One line: names may hold line breaks, terminal codes and what not."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _from_path(path: Path, location: str) -> Model:
    file = _map_model(path)
    view = file.view()
    skeleton, spans = _lift(view, location)
    lifted = [FileSlice(file, start, stop - start) for start, stop in spans]
    sources = Sources(location, lifted, path.parent)
    graph, header, notes = _import(_parse(skeleton), sources)
    file.release(0, file.size)
    externals = [sources.files[name] for name in sorted(sources.files)]
    files = [file, *externals]
    origin = Origin(tuple(f.path for f in files), sum(f.size for f in files), lambda: _read_files(files))
    return Model(graph, header, path, origin.nbytes, bool(externals), notes, origin)


def _from_bytes(data: memoryview, location: str) -> Model:
    if not data:
        raise BadFile("it is empty; give a serialized model")
    skeleton, spans = _lift(data, location)
    lifted = [Buffer(data[start:stop]) for start, stop in spans]
    graph, header, notes = _import(_parse(skeleton), Sources(location, lifted, None))
    return Model(graph, header, None, len(data), False, notes, Origin((), len(data), lambda: iter([data])))


def _from_proto(model: ModelProto, location: str) -> Model:
    skeleton, lifted = without_data(model, location)
    sources = Sources(location, lifted, None)
    plain = skeleton.SerializeToString(deterministic=True)
    graph, header, notes = _import(skeleton, sources)
    parts = wire.splice(plain, location, lambda proto, _: wire.inline(proto, sources.weight(proto)))
    nbytes = wire.length(parts)
    return Model(graph, header, None, nbytes, False, notes, Origin((), nbytes, lambda: wire.stream(parts)))


def _read_files(files: Sequence[MappedFile]) -> Iterator[memoryview]:
    for file in files:
        for start in range(0, file.size, PIECE_BYTES):
            yield file.view(start, start + PIECE_BYTES)
            file.release(start, start + PIECE_BYTES)


def _map_model(path: Path) -> MappedFile:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadFile("it is a folder; give the .onnx file in it")
        if not stat.S_ISREG(status.st_mode):
            raise BadFile("it is not an ordinary file; save the model to a file first")
        if status.st_size == 0:
            raise BadFile("it is empty; download or export it again")
        file = MappedFile(path)
    except FileNotFoundError as error:
        raise BadFile("there is no such file; check the path") from error
    except PermissionError as error:
        raise BadFile("it may not be read; change its permissions (chmod +r)") from error
    except (OSError, ValueError) as error:
        raise BadFile(f"it cannot be read ({error}); check the path and the disk") from error
    start = bytes(file.view(0, 32))
    for magic, hint in _FOREIGN:
        if start.startswith(magic):
            raise BadFile(f"it {hint}")
    return file


def _lift(data: memoryview, location: str) -> tuple[bytes, list[tuple[int, int]]]:
    try:
        return wire.lift(data, location)
    except wire.WireError as error:
        raise BadFile(f"it is no ONNX model, or a damaged one, since {error}; download or export it again") from error


def _parse(skeleton: bytes) -> ModelProto:
    try:
        model: ModelProto = ModelProto.FromString(skeleton)
        return model
    except DecodeError as error:
        raise BadFile("it is no ONNX model, or a damaged one; download or export it again") from error


def _import(skeleton: ModelProto, sources: Sources) -> tuple[gs.Graph, ModelProto, Notes]:
    """Check a skeleton, import it and give each constant its weight."""
    check_text(skeleton)
    check_model(skeleton)
    skeleton = inline_functions(skeleton)
    check_graph(skeleton.graph, sources)
    notes = take_notes(skeleton)
    try:
        # Graph-surgeon prints warnings about types that `Weight` handles.
        with G_LOGGER.suppress():
            graph = gs.import_onnx(skeleton)
    except Exception as error:  # graph-surgeon fails with whatever it trips over
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadModel(f"it cannot be imported ({reason}); check it with onnx.checker") from error
    for constant in constants(graph):
        values = constant._values
        if isinstance(values, LazyValues) and not isinstance(values, Weight | SparseValues):
            constant._values = sources.weight(values.tensor)
            constant.data_location = None  # it says where the placeholder's data was, and that is over
    header = ModelProto()
    header.CopyFrom(skeleton)
    for part in ("node", "initializer", "sparse_initializer"):
        header.graph.ClearField(part)
    return graph, header, notes


def with_graph(model: Model, graph: gs.Graph) -> Model:
    """The same model around another graph; path, size and hash stay those of the source."""
    return replace(model, graph=graph)


def to_proto(model: Model, *, data: bool = True) -> ModelProto:
    """Make a ModelProto.

    Parameters
    ----------
    model
        The model.
    data
        Whether to read the weights. Without, those above 1024 bytes are placeholders: enough to infer shapes, or to
        look at the graph, of a model that is larger than memory.
    """
    if not data:
        return export(model.graph, model.header, model.notes, _placed)
    return export(model.graph, model.header, model.notes, _filled)


def _placed(weight: Weight, name: str) -> TensorProto:
    return _named(weight.tensor, name)


def _filled(weight: Weight, name: str) -> TensorProto:
    return _named(weight.to_tensor(), name)


def _named(proto: TensorProto, name: str) -> TensorProto:
    if proto.name != name:  # setting '' would write an empty field
        proto.name = name
    return proto


def to_bytes(model: Model) -> bytes:
    """Serialize a model, weights and all.

    Raises
    ------
    UnsupportedModel
        If it comes to 2 GiB or more, which ONNX can only hold in several files.
    """
    skeleton, location, weights = _skeleton(model)
    parts = wire.splice(skeleton, location, lambda proto, key: wire.inline(proto, weights[key]))
    if wire.length(parts) > LARGEST_FILE:
        raise UnsupportedModel("the model comes to 2 GiB or more, which protobuf cannot hold; save it to a file instead")
    return b"".join(wire.stream(parts))


def _secret_location() -> str:
    """A location for placeholders; a file that knew it could pass off its own tensors as placeholders."""
    return f"{LAZY_LOCATION}:{secrets.token_hex(16)}"


def _skeleton(model: Model) -> tuple[bytes, str, list[Weight]]:
    """Serialize a model with placeholders, the key of each being its place in the list."""
    location = _secret_location()
    weights: list[Weight] = []

    def place(weight: Weight, name: str) -> TensorProto:
        if weight.is_string or weight.nbytes <= INLINE_BYTES:
            return _filled(weight, name)
        proto = weight.header()
        proto.MergeFrom(wire.placeholder(location, len(weights)))
        weights.append(weight)
        return _named(proto, name)

    proto = export(model.graph, model.header, model.notes, place)
    return proto.SerializeToString(deterministic=True), location, weights


def save(model: Model, path: str | os.PathLike[str], *, external: bool | None = None, beside: Sequence[tuple[Path, Pieces]] = ()) -> None:
    """Write a model to a file, all or nothing.

    Parameters
    ----------
    model
        The model.
    path
        Where to; what is there is replaced, unless the model was read from it.
    external
        Whether weights above 1024 bytes go to ``<name>.data`` beside the file; by default as the model was read.
        Models of 2 GiB and more always do.
    beside
        Other files with their content that appear together with the model, or not at all.

    Raises
    ------
    BadOption
        If the path is one of the model's own files, or is not one of an ordinary file.
    BadFile
        If it cannot be written. Nothing is left behind then, and what was there is there.
    """
    target = Path(path)
    skeleton, location, weights = _skeleton(model)
    parts = wire.splice(skeleton, location, lambda proto, key: wire.inline(proto, weights[key]))
    writes: list[tuple[Path, Pieces]] = [(target, wire.stream(parts))]
    if (model.external if external is None else external) or wire.length(parts) > LARGEST_FILE:
        data = _DataFile(f"{target.name}.data")
        outer = wire.splice(skeleton, location, lambda proto, key: data.add(proto, weights[key]))
        writes = [(target, wire.stream(outer))]
        if data.parts:
            # The data first: a model without its data would be broken, data without a model is only litter.
            writes.insert(0, (target.with_name(data.name), wire.stream(data.parts)))
    write_files([*writes, *beside], model.origin.files)


class _DataFile:
    """The content of an external data file: weights, each on a page of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts: wire.Parts = []
        self._size = 0

    def add(self, proto: TensorProto, weight: Weight) -> wire.Parts:
        """Append a weight, and give the tensor that refers to it."""
        gap = -self._size % _ALIGNMENT
        offset = self._size + gap
        self.parts += [bytes(gap), weight]
        self._size = offset + weight.nbytes
        proto.ClearField("external_data")
        for key, value in (("location", self.name), ("offset", str(offset)), ("length", str(weight.nbytes))):
            proto.external_data.add(key=key, value=value)
        return [proto.SerializeToString(deterministic=True)]
