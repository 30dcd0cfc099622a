"""Protobuf's wire format, as far as it takes to keep big tensors out of protobuf.

Parsing a model with protobuf copies all its weights, and protobuf cannot hold 2 GiB at all. But a message is only a
list of ``(tag, payload)``, messages nest as payloads, and the order of fields is free. So two mirrored walks suffice:

    lift    model bytes -> skeleton bytes (big ``raw_data`` left out, a placeholder in its tensor) + where the data was
    splice  skeleton bytes + weights -> the model's bytes as a list of parts, written out one after the other

A tag is ``field number << 3 | wire type``; wire types are 0 (varint), 1 (8 bytes), 2 (length, then bytes) and 5
(4 bytes). See https://protobuf.dev/programming-guides/encoding. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx import TensorProto

from passes.weights import INLINE_BYTES, Weight

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA, TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION = 9, 13, 14

_CHILDREN = {
    "model": {MODEL_GRAPH: "graph", 25: "function"},
    "graph": {1: "node", GRAPH_INITIALIZER: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
}
"""For each kind of message, the fields that can lead to a big tensor."""

_MAX_DEPTH = 64
"""Deeper than protobuf's own limit of 100 messages can be with four of them for each nested graph."""

Buffer = bytes | memoryview
Part = bytes | memoryview | Weight
Parts = list[Part]


class WireError(ValueError):
    """The bytes are no protobuf message; the text says what is wrong, without naming the file."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its number, wire type, and where its tag starts, its payload starts and both end."""

    number: int
    wire: int
    tag: int
    start: int
    stop: int


def varint(value: int) -> bytes:
    """Encode a number that is not negative, seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: Buffer, position: int, stop: int) -> tuple[int, int]:
    """Decode a number; returns it and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= stop:
            raise WireError("it ends in the middle of a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError("it has a number of more than 64 bits")


def fields(data: Buffer, start: int, stop: int) -> Iterator[Field]:
    """Walk over the fields of a message, without looking into any."""
    position = start
    while position < stop:
        key, after = read_varint(data, position, stop)
        number, wire = key >> 3, key & 7
        if not 1 <= number < 1 << 29:
            raise WireError("it has a field number that does not exist")
        if wire == VARINT:
            _, end = read_varint(data, after, stop)
        elif wire == BYTES:
            length, after = read_varint(data, after, stop)
            end = after + length
        elif wire in (FIXED32, FIXED64):
            end = after + (4 if wire == FIXED32 else 8)
        else:
            raise WireError("it has a field type that does not exist")
        if end > stop:
            raise WireError("it ends in the middle of a field, so it is truncated or damaged")
        yield Field(number, wire, position, after, end)
        position = end


def length(parts: Parts) -> int:
    """Bytes that the parts come to."""
    return sum(part.nbytes if isinstance(part, (Weight, memoryview)) else len(part) for part in parts)


def stream(parts: Parts) -> Iterator[Buffer]:
    """The bytes of the parts, one bounded piece after the other."""
    for part in parts:
        if isinstance(part, Weight):
            yield from part.pieces()
        else:
            yield part


OnTensor = Callable[[int, int], Parts | None]
Enter = Callable[[int, int], bool]


def _rewrite(
    data: Buffer, start: int, stop: int, *, kind: str, enter: Enter, on_tensor: OnTensor, depth: int = 0
) -> Parts | None:
    """A message with the tensors that `on_tensor` answers for replaced, and all lengths around them corrected.

    None if it answers for none: by its length a replacement cannot be told from what it replaces.
    """
    if kind == "tensor":
        return on_tensor(start, stop)
    children = _CHILDREN[kind]
    parts: Parts = []
    done = start
    for field in fields(data, start, stop):
        child = children.get(field.number)
        if child is None or field.wire != BYTES or depth >= _MAX_DEPTH or not enter(field.start, field.stop):
            continue
        inner = _rewrite(data, field.start, field.stop, kind=child, enter=enter, on_tensor=on_tensor, depth=depth + 1)
        if inner is None:
            continue  # it goes out with what is around it
        parts += [data[done : field.tag], varint(field.number << 3 | BYTES) + varint(length(inner)), *inner]
        done = field.stop
    return [*parts, data[done:stop]] if parts else None


def lift(data: Buffer, location: str) -> tuple[bytes, list[tuple[int, int]]]:
    """Take the big tensors out of a serialized model.

    Parameters
    ----------
    data
        A serialized ModelProto; only the pages with something else than weights are read.
    location
        What the placeholders give as their external location. It must be one that no file can know, since a
        placeholder is trusted.

    Returns
    -------
    skeleton, spans
        The model with placeholders, whose external data has a ``key`` that counts the spans; where the bytes of each
        start and stop.

    Raises
    ------
    WireError
        If the bytes are no protobuf message.
    """
    spans: list[tuple[int, int]] = []

    def on_tensor(start: int, stop: int) -> Parts | None:
        raw = None
        kept: Parts = []
        for field in fields(data, start, stop):
            if field.number in (TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION):
                return None
            if field.number == TENSOR_RAW_DATA and field.wire == BYTES:
                raw = field
            else:
                kept.append(data[field.tag : field.stop])
        if raw is None or raw.stop - raw.start <= INLINE_BYTES:
            return None
        spans.append((raw.start, raw.stop))
        return [*kept, placeholder(location, len(spans) - 1).SerializeToString()]

    def enter(start: int, stop: int) -> bool:
        return stop - start > INLINE_BYTES

    parts = _rewrite(data, 0, len(data), kind="model", enter=enter, on_tensor=on_tensor)
    return (bytes(data) if parts is None else b"".join(stream(parts))), spans


def placeholder(location: str, key: int) -> TensorProto:
    """A tensor whose data is elsewhere, under a key."""
    proto = TensorProto(data_location=TensorProto.EXTERNAL)
    proto.external_data.add(key="location", value=location)
    proto.external_data.add(key="key", value=str(key))
    return proto


def placeholder_key(proto: TensorProto, location: str) -> int | None:
    """The key of a placeholder, or None if the tensor is not one of this location."""
    if proto.data_location != TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in proto.external_data}
    return int(entries["key"]) if entries.get("location") == location else None


def splice(skeleton: bytes, location: str, replace: Callable[[TensorProto, int], Parts]) -> Parts:
    """Put tensors back where `lift`, or an exporter, left placeholders.

    Parameters
    ----------
    skeleton
        A serialized model with placeholders.
    location
        The external location that tells placeholders from other tensors.
    replace
        Gives the serialized tensor for a placeholder and its key: `inline`, or an external reference.
    """
    needle = location.encode()

    def on_tensor(start: int, stop: int) -> Parts | None:
        proto = TensorProto.FromString(skeleton[start:stop])
        key = placeholder_key(proto, location)
        return None if key is None else replace(proto, key)

    def enter(start: int, stop: int) -> bool:
        return skeleton.find(needle, start, stop) >= 0

    parts = _rewrite(skeleton, 0, len(skeleton), kind="model", enter=enter, on_tensor=on_tensor)
    return [skeleton] if parts is None else parts


def inline(proto: TensorProto, weight: Weight) -> Parts:
    """The parts of a tensor that holds the bytes of a weight, in the order in which protobuf writes them itself."""
    proto.ClearField("data_location")
    proto.ClearField("external_data")
    body = proto.SerializeToString(deterministic=True)
    split = next((f.tag for f in fields(body, 0, len(body)) if f.number > TENSOR_RAW_DATA), len(body))
    return [body[:split], varint(TENSOR_RAW_DATA << 3 | BYTES) + varint(weight.nbytes), weight, body[split:]]
