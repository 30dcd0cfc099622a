"""Nodes and tensors of a graph as rules see them, and what a graph-surgeon type means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

Shape = tuple[int, ...]
QUANTIZED = frozenset({onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4})
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16})


@dataclass
class View:
    """A node as its rule sees it (`spa.signatures.table.NodeView`)."""

    node: gs.Node
    op: str
    domain: str
    opset: int
    attrs: Mapping[str, Any]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]
    present: tuple[bool, ...]
    values: Mapping[str, NDArray[Any]]
    constants: frozenset[str] | set[str]

    def value(self, index: int) -> NDArray[Any] | None:
        """Input `index` if it is a known small constant."""
        if index >= len(self.node.inputs):
            return None
        return self.values.get(self.node.inputs[index].name)

    def positions(self, index: int) -> NDArray[np.int64] | None:
        """Input `index` if it is a stored tensor of whole numbers, of any size."""
        tensor = self.node.inputs[index]
        held = constant_of(tensor.inputs[0]) if isinstance(tensor, gs.Variable) and tensor.inputs else tensor
        if not isinstance(held, gs.Constant) or np.dtype(held.dtype).kind not in "iu":
            return None
        return np.asarray(held._values.load() if hasattr(held._values, "load") else held._values, np.int64)

    def constant(self, index: int) -> bool:
        """Whether input `index` is stored in the file."""
        return self.node.inputs[index].name in self.constants


def stored(tensor: gs.Tensor) -> bool:
    """Whether a tensor is an initializer or the output of a Constant node."""
    return isinstance(tensor, gs.Constant) or (bool(tensor.inputs) and tensor.inputs[0].op == "Constant")


def constant_of(node: gs.Node) -> gs.Constant | None:
    """The tensor that a Constant node holds, None for any other node."""
    value = node.attrs.get("value") if node.op == "Constant" else None
    return value if isinstance(value, gs.Constant) else None


def view(
    graph: gs.Graph,
    node: gs.Node,
    shapes: Mapping[str, Shape | None],
    values: Mapping[str, NDArray[Any]],
    constants: set[str] | frozenset[str],
) -> View:
    """A node with the shapes and constants that are known of its operands."""
    domain = node.domain or ""
    present = tuple(bool(t.name) for t in node.inputs)
    return View(
        node,
        node.op,
        "" if domain == "ai.onnx" else domain,
        opset_of(graph, ""),
        node.attrs,
        tuple(shapes.get(t.name) if t.name else None for t in node.inputs),
        tuple(shapes.get(t.name) if t.name else None for t in node.outputs),
        present,
        values,
        constants,
    )


def opset_of(graph: gs.Graph, domain: str) -> int:
    """Opset of a domain that the graph imports."""
    for imported in graph.import_domains or ():
        if imported.domain == domain or (not domain and imported.domain == "ai.onnx"):
            return int(imported.version)
    return int(graph.opset) if not domain else 1


def dtype_holds_weights(dtype: Any) -> bool:
    """Whether elements of a gs dtype are parameters: floats, and the integers of at most 8 bits that quantised weights are stored as."""
    if dtype is None:
        return False
    try:
        return dtype_to_onnx(dtype) in FLOATS | QUANTIZED
    except (TypeError, ValueError, KeyError):
        return False


def dtype_is_float(dtype: Any) -> bool:
    """Whether a gs dtype (numpy's or ONNX's number) is floating point."""
    if dtype is None:
        return False
    try:
        return dtype_to_onnx(dtype) in FLOATS
    except (TypeError, ValueError, KeyError):
        return False


def type_of(dtype: Any) -> int:
    """onnx.TensorProto.DataType of a graph-surgeon dtype, 0 if it has none."""
    if dtype is None:
        return 0
    try:
        return int(dtype_to_onnx(dtype))
    except (TypeError, KeyError, ValueError):
        return 0
