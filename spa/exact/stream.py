"""The residual stream, read for a change of its basis: what writes it, what reads it, and which norms stand between.

Every value on the stream's axis is followed through the graph, as v = s ∘ (Q u) + c of a turned value u (Ashkboos et al. 2024, SliceGPT,
arXiv 2401.15024, §3): scale s and offset c come from norms, and are taken up by the linear maps that read the value. A mean that is taken
off (LayerNorm) is taken off by those who write, since LayerNorm(x) = RMSNorm(C x), C = 1 - 11ᵀ/D (ibid., §3.1). What keeps no turned vector
turned is refused, with the node and the reason. Which operators do what stands in `spa.signatures.rotation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from passes import Weight
from spa.errors import BadOption
from spa.graph.groups import Group, Groups
from spa.graph.linear import Layer, find_layers
from spa.graph.moved import place_of
from spa.graph.trace import NodeTrace, node_name
from spa.signatures.rotation import epsilon_of, role_of

Array = NDArray[np.float64]


class NotTurnable(BadOption):
    """The stream can't be turned: the node and the reason."""


@dataclass(frozen=True)
class Frame:
    """What a value is of a turned one: scale ∘ (Q u) + offset. None: ones, zeros.

    off_mean: what is left out of u by a mean that its writers take off, so that only a norm that takes it off too may read it.
    square: it holds the squares of the elements, of which only the sum means anything.
    """

    scale: Array | None = None
    offset: Array | None = None
    off_mean: bool = False
    square: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is Q u itself."""
        return self.scale is None and self.offset is None and not self.square

    def same(self, other: Frame) -> bool:
        """Whether the sum of two such values is one."""
        if (self.scale is None) != (other.scale is None) or self.square or other.square:
            return False
        return self.scale is None or bool(np.array_equal(self.scale, other.scale if other.scale is not None else 1))


@dataclass(frozen=True)
class Reader:
    """A linear map that reads the stream. held: the stored weight, `axis` the stream's on it."""

    layer: Layer
    held: str
    axis: int
    frame: Frame


@dataclass
class Stream:
    """All that is on the stream. centred: its norms take a mean off.

    writers: stored value -> axis. skipped: node -> the input that becomes its result. means, norms: nodes that become sums of squares.
    """

    group: Group
    centred: bool
    writers: dict[str, int] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    means: list[str] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)


def read_stream(groups: Groups, group: Group) -> Stream:
    """Follows the stream through the graph. Raises NotTurnable where something on it is not the same in another basis."""
    try:
        return _Follow(groups, group, centred=False).stream()
    except _TakesMean:
        return _Follow(groups, group, centred=True).stream()


class _TakesMean(Exception):
    """A norm takes the mean off."""


class _Follow:
    def __init__(self, groups: Groups, group: Group, *, centred: bool) -> None:
        self.groups, self.traced, self.group = groups, groups.traced, group
        self.found = Stream(group, centred)
        self.frames: dict[str, Frame] = {}
        self.means: dict[str, str] = {}  # mean over the stream -> of which value
        self.stored: dict[str, str] = {n: n for n in self.traced.constants}  # value -> what holds its elements
        self.makers = {t.name: n.node for n in self.traced.nodes for t in n.node.outputs}
        self.axes = self._axes()
        self.layers = {layer.node.outputs[0].name: layer for layer in find_layers(groups)}

    def _axes(self) -> dict[str, int]:
        """Value -> the stream's axis, on which it must be alone and in order."""
        wanted = np.arange(self.group.start + 1, self.group.start + self.group.size + 1)
        found: dict[str, int] = {}
        for value, axis in self.group.sites:
            labels = self.groups.labels[value, axis]
            if labels.shape != (self.group.size, 1) or not np.array_equal(labels[:, 0], wanted) or value in found:
                raise NotTurnable(f"Group {self.group.name} can't be turned: axis {axis} of {value} mixes it or takes it apart.")
            found[value] = axis
        return found

    def stream(self) -> Stream:
        for node in self.traced.nodes:
            names = [t.name for t in node.node.inputs if t.name]
            if names and all(n in self.stored for n in names):
                self._moved(node)
            elif any(n in self.axes for n in names) or any(t.name in self.axes for t in node.node.outputs):
                self._visit(node)
        if not self.found.readers or not self.found.writers:
            raise NotTurnable(f"Group {self.group.name} can't be turned: no linear maps with stored weights write and read it.")
        return self.found

    def _moved(self, node: NodeTrace) -> None:
        """Values made of stored ones: their elements are those of one, or nothing is known of them."""
        for tensor in node.node.outputs:
            place = place_of(self.traced, tensor.name, self.makers) if tensor.name in self.axes else None
            if tensor.name in self.axes and (place is None or place.name not in self.axes):
                self._refuse(node, "computes a weight of it")
            self.stored[tensor.name] = place.name if place is not None else tensor.name

    def _refuse(self, node: NodeTrace, why: str) -> None:
        raise NotTurnable(f"Group {self.group.name} can't be turned: {node.node.op} {node_name(node.node)} {why}.")

    # ------------------------------------------------------------------ nodes

    def _visit(self, node: NodeTrace) -> None:
        layer = self.layers.get(node.node.outputs[0].name)
        turned = [t.name for t in node.node.outputs if t.name in self.axes]
        if layer is not None and layer.data in self.frames:
            self._read(node, layer, turned)
            return
        held = [t.name for t in node.node.inputs if t.name in self.axes and t.name in self.stored]
        moving = [t.name for t in node.node.inputs if t.name in self.frames]
        if not moving and held and turned:  # weights, biases, tables
            for name in held:
                self._write(name)
            self.frames.update(dict.fromkeys(turned, self._fresh()))
            return
        role = role_of(node.node.domain, node.node.op)
        if role is None or not moving:
            self._refuse(node, "means something else in another basis")
        assert role is not None
        rules: Mapping[str, Callable[[NodeTrace, list[str], list[str]], Frame | None]] = {
            "size": lambda *_: None, "same": self._same, "sum": self._sum, "difference": self._difference, "product": self._product,
            "quotient": self._quotient, "power": self._power, "mean": self._mean, "total": self._total, "length": self._length,
            "norm": self._norm, "centred norm": self._norm,
        }  # fmt: skip
        frame = rules[role](node, moving, held)
        if bool(turned) != (frame is not None):
            self._refuse(node, "means something else in another basis")
        if frame is not None:
            self.frames.update(dict.fromkeys(turned, frame))

    def _fresh(self) -> Frame:
        return Frame(off_mean=self.found.centred)

    def _write(self, value: str) -> None:
        held = self.stored[value]
        self.found.writers[held] = self.axes[held]

    def _read(self, node: NodeTrace, layer: Layer, turned: list[str]) -> None:
        frame = self.frames[layer.data]
        held = layer.place.name
        if turned or held not in self.axes:
            self._refuse(node, "reads and writes it at once" if turned else "reads it with a weight that is computed")
        if frame.off_mean or frame.square:
            self._refuse(node, "reads it past the norm that takes its mean off")
        self.found.readers.append(Reader(layer, held, self.axes[held], frame))

    # ------------------------------------------------------------------ roles: (node, values that come turned, stored operands)

    def _all_alike(self, node: NodeTrace, moving: list[str]) -> Frame:
        first = self.frames[moving[0]]
        if any(self.frames[n] is not first and not (self.frames[n].plain and first.plain) for n in moving):
            self._refuse(node, "joins values that were scaled differently")
        return replace(first, off_mean=any(self.frames[n].off_mean for n in moving))

    def _same(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        frame = self._all_alike(node, moving)
        if held and not frame.plain:
            self._refuse(node, "joins stored values and scaled ones")
        for name in held:
            self._write(name)
        return frame

    def _sum(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        frames = [self.frames[n] for n in moving]
        others = [t.name for t in node.node.inputs if t.name not in moving and t.name not in held]
        if others or any(not f.same(frames[0]) for f in frames):
            self._refuse(node, "adds to it what is not turned, or was scaled otherwise")
        offsets = [f.offset for f in frames if f.offset is not None]
        offset = np.sum(offsets, axis=0) if offsets else None
        frame = replace(frames[0], offset=offset, off_mean=any(f.off_mean for f in frames))
        for name in held:
            if frame.scale is None and frame.offset is None:
                self._write(name)
            elif len(moving) == 1 and len(held) == 1:
                zeros = np.zeros(self.group.size) if frame.offset is None else frame.offset
                frame = replace(frame, offset=zeros + self._vector(node, name))
                self._skip(node, moving[0])
            else:
                self._refuse(node, "adds several things to scaled values")
        return frame

    def _difference(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        first, second = (t.name for t in node.node.inputs[:2])
        if self.means.get(second) == first and first in self.frames:
            self._skip(node, first)
            return replace(self.frames[first], off_mean=False)
        if held or not all(n in self.frames and self.frames[n].plain for n in (first, second)):
            self._refuse(node, "takes off what is not turned alike")
        return self._all_alike(node, moving)

    def _product(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        frame = self.frames[moving[0]]
        names = [t.name for t in node.node.inputs]
        if names == [moving[0]] * 2:
            return self._squared(node, frame)
        if len(moving) > 1 or frame.square:
            self._refuse(node, "multiplies its elements")
        if not held:
            return self._by_number(node, frame)
        scale = self._vector(node, held[0])
        self._skip(node, moving[0])
        ones = np.ones(self.group.size)
        return replace(frame, scale=(ones if frame.scale is None else frame.scale) * scale,
                       offset=None if frame.offset is None else frame.offset * scale)  # fmt: skip

    def _quotient(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        if held or moving != [node.node.inputs[0].name]:
            self._refuse(node, "divides by its elements")
        return self._by_number(node, self.frames[moving[0]])

    def _by_number(self, node: NodeTrace, frame: Frame) -> Frame:
        if frame.offset is not None:
            self._refuse(node, "scales it behind the bias of a norm")
        return frame

    def _power(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        exponent = self.traced.facts.values.get(node.node.inputs[1].name)
        if moving != [node.node.inputs[0].name] or exponent is None or exponent.size != 1 or float(exponent.ravel()[0]) != 2:
            self._refuse(node, "takes a power of its elements")
        return self._squared(node, self.frames[moving[0]])

    def _squared(self, node: NodeTrace, frame: Frame) -> Frame:
        if not frame.plain or frame.off_mean:
            self._refuse(node, "squares values that were scaled, or have a mean that others take off")
        return Frame(square=True)

    def _mean(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        frame, out = self.frames[moving[0]], node.node.outputs[0].name
        if out in self.axes:  # over other axes
            return frame
        if frame.square:
            self._last(node, moving[0])
            self.found.means.append(out)
        elif frame.plain:
            self._takes_mean()
            self.means[out] = moving[0]
        else:
            self._refuse(node, "takes the mean of scaled values")
        return None

    def _total(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        frame = self.frames[moving[0]]
        if node.node.outputs[0].name in self.axes:
            return self._by_number(node, frame)
        if not frame.square:
            self._refuse(node, "adds up its elements")
        return None

    def _length(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        if not self.frames[moving[0]].plain or self.frames[moving[0]].off_mean or node.node.outputs[0].name in self.axes:
            self._refuse(node, "takes the length of something else")
        return None

    def _norm(self, node: NodeTrace, moving: list[str], held: list[str]) -> Frame | None:
        x = node.node.inputs[0].name
        frame = self.frames.get(x)
        if frame is None or not frame.plain or [t.name for t in node.node.outputs if t.name and t.outputs][1:]:
            self._refuse(node, "is a norm of something else")
        assert frame is not None
        assert node.signature is not None
        self._last(node, x)
        if role_of(node.node.domain, node.node.op) == "centred norm":
            self._takes_mean()
        elif frame.off_mean:
            self._refuse(node, "is a norm that takes no mean off, among others that do")
        if self.traced.facts.types.get(x) != TensorProto.FLOAT:
            self._refuse(node, "is a norm in half precision, which would overflow in single steps")
        self.found.norms[node.node.outputs[0].name] = epsilon_of(dict(node.node.attrs))
        scale, bias = node.signature.affine or (None, None)
        given = [None if i is None or i >= len(node.node.inputs) else node.node.inputs[i].name for i in (scale, bias)]
        vectors = [self._vector(node, name) if name else None for name in given]
        return Frame(vectors[0], vectors[1])

    def _takes_mean(self) -> None:
        if not self.found.centred:
            raise _TakesMean

    def _last(self, node: NodeTrace, value: str) -> None:
        rank = len(self.traced.facts.shapes.get(value) or ())
        removed = [d for d, a in node.dims.items() if d.startswith("r.") and a.length > 1]
        if self.axes[value] != rank - 1 or len(removed) != 1:
            self._refuse(node, "runs over other axes than the last")

    def _skip(self, node: NodeTrace, value: str) -> None:
        names = [t.name for t in node.node.inputs]
        self.found.skipped[node.node.outputs[0].name] = names.index(value)

    def _vector(self, node: NodeTrace, value: str) -> Array:
        """A stored number for each position of the stream."""
        held = self.traced.constants.get(self.stored.get(value, ""))
        array = None if held is None else np.asarray(held._values.load() if isinstance(held._values, Weight) else held.values)
        if array is None or array.size != self.group.size:
            self._refuse(node, "scales it by more than a number for each position")
        assert array is not None
        return array.astype(np.float64).ravel()
