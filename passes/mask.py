"""The pass that builds the masked model: the original with chosen positions out of every sum and every statistic."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from passes.weights import Weight


@dataclass(frozen=True)
class Mask:
    """Input `index` of a node counts as zero wherever `keep`, spread over its axes, is False."""

    index: int
    keep: NDArray[np.bool_]


@dataclass(frozen=True)
class Compress:
    """A node runs over the kept positions alone: inputs -> axis -> positions; outputs -> axis -> where each position is found.

    named: outputs whose elements are positions -> the positions that were kept, which are counted among themselves there.
    """

    inputs: Mapping[int, Mapping[int, NDArray[np.int64]]]
    outputs: Mapping[int, Mapping[int, NDArray[np.int64]]]
    named: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)


def insert_masks(
    graph: gs.Graph,
    masks: Mapping[str, list[Mask]],
    compress: Mapping[str, Compress],
    types: Mapping[str, int],
    *,
    stored: Collection[str] = (),
) -> int:
    """Masks inputs and compresses nodes, which are named by their first output; `types` gives element types.

    before -> after: Conv(x, w) -> Conv(Where(keep, x, 0), w);
    ReduceMean(x) -> ReduceMean(Gather(x, kept));
    ArgMax(x) -> Gather(kept, ArgMax(Gather(x, kept))). `Where`, not a product: a masked position may hold NaN.
    stored: nodes whose constants stay constants, masked and gathered beforehand. Returns the number of nodes that changed.
    """
    opset = next((d.version for d in graph.import_domains or () if d.domain in ("", "ai.onnx")), graph.opset)
    builder = _Builder(graph, types, int(opset))
    nodes: list[gs.Node] = []
    changed = 0
    for node in list(graph.nodes):
        name = node.outputs[0].name if node.outputs else ""
        after: list[gs.Node] = []
        if name in masks or name in compress:
            changed += 1
        fold = name in stored
        if name in compress:
            for index, axes in compress[name].inputs.items():
                held = node.inputs[index]
                node.inputs[index] = builder.gathered(held, axes) if fold and _held(held) else builder.gather(nodes, held, axes)
        for mask in masks.get(name, ()):
            held = node.inputs[mask.index]
            node.inputs[mask.index] = builder.zeroed(held, mask.keep) if fold and _held(held) else builder.where(nodes, held, mask.keep)
        if name in compress:
            for index, axes in compress[name].outputs.items():
                after += builder.spread(node, index, axes)
            for index, kept in compress[name].named.items():
                after += builder.renamed(node, index, kept)
        nodes += [node, *after]
    graph.nodes[:] = nodes
    return changed


def _held(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


class _Builder:
    def __init__(self, graph: gs.Graph, types: Mapping[str, int], opset: int) -> None:
        self.types, self.opset = dict(types), opset
        self.count = 0
        self.made: dict[Any, gs.Tensor] = {}

    def _name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}/masked{self.count}"

    def _variable(self, like: gs.Tensor) -> gs.Variable:
        kind = self.types.get(like.name, 0)
        made = gs.Variable(self._name(like.name), dtype=helper.tensor_dtype_to_np_dtype(kind) if kind else None, shape=None)
        self.types[made.name] = kind
        return made

    def where(self, nodes: list[gs.Node], tensor: gs.Tensor, keep: NDArray[np.bool_]) -> gs.Tensor:
        """Where(keep, tensor, 0)."""
        key = (tensor.name, keep.shape, keep.tobytes())
        if key not in self.made:
            kind = self.types.get(tensor.name) or onnx.TensorProto.FLOAT
            out = self._variable(tensor)
            zero = gs.Constant(self._name("zero"), np.zeros((), helper.tensor_dtype_to_np_dtype(kind)))
            mask = gs.Constant(self._name("keep"), keep)
            if self.opset < 9:  # no Where yet; positions that hold NaN can't be masked there
                mask = gs.Constant(self._name("keep"), keep.astype(helper.tensor_dtype_to_np_dtype(kind)))
                nodes.append(gs.Node("Mul", out.name, {}, [tensor, mask], [out]))
            else:
                nodes.append(gs.Node("Where", out.name, {}, [mask, tensor, zero], [out]))
            self.made[key] = out
        return self.made[key]

    def gather(self, nodes: list[gs.Node], tensor: gs.Tensor, axes: Mapping[int, NDArray[np.int64]]) -> gs.Tensor:
        """The listed positions of each axis."""
        for axis, index in axes.items():
            out = self._variable(tensor)
            at = gs.Constant(self._name("at"), index)
            nodes.append(gs.Node("Gather", out.name, {"axis": axis}, [tensor, at], [out]))
            tensor = out
        return tensor

    def zeroed(self, tensor: gs.Constant, keep: NDArray[np.bool_]) -> gs.Constant:
        """A new constant with zeros outside `keep`."""
        made = gs.Constant(self._name(tensor.name), np.where(keep, tensor.values, np.zeros((), tensor.values.dtype)))
        self.types[made.name] = self.types.get(tensor.name, 0)
        return made

    def gathered(self, tensor: gs.Constant, axes: Mapping[int, NDArray[np.int64]]) -> gs.Constant:
        """A new constant of the listed positions of each axis; one that is large is cut when it is read."""
        values = tensor._values
        for axis, index in axes.items():
            values = values.take(index, axis) if isinstance(values, Weight) else np.take(tensor.values, index, axis)
        made = gs.Constant(self._name(tensor.name), values)
        self.types[made.name] = self.types.get(tensor.name, 0)
        return made

    def spread(self, node: gs.Node, index: int, axes: Mapping[int, NDArray[np.int64]]) -> list[gs.Node]:
        """Puts the positions of an output back where they were; removed ones repeat another's value."""
        final = node.outputs[index]
        inner = self._variable(final)
        node.outputs[index] = inner
        made: list[gs.Node] = []
        self.gather(made, inner, axes)
        made[-1].outputs[0] = final
        return made

    def renamed(self, node: gs.Node, index: int, kept: NDArray[np.int64]) -> list[gs.Node]:
        """Positions among the kept ones as positions among all."""
        final = node.outputs[index]
        inner = self._variable(final)
        node.outputs[index] = inner
        table = gs.Constant(self._name("kept"), kept)
        return [gs.Node("Gather", final.name, {"axis": 0}, [table, inner], [final])]
