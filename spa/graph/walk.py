"""One walk over the nodes that finds shapes, types and small constants, with a number for every free size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from spa.graph.view import Shape, constant_of, opset_of, type_of, view
from spa.signatures.arithmetic import NEVER_FOLDED, READS_SHAPE, REINTERPRETS, standard_form, typed_by
from spa.signatures.sizes import output_shape
from spa.signatures.table import Refusal, read, rule_of

SMALL = 4096  # elements; larger constants are weights, not shape arithmetic


class Prepared:
    """What both walks need: node messages and schemas."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.opsets = [helper.make_opsetid(d.domain, d.version) for d in graph.import_domains or ()]
        self.protos: list[onnx.NodeProto | None] = []
        self.schemas: list[Any] = []
        for node in graph.nodes:
            schema = _schema(graph, node)
            plain = schema is not None and node.op != "Constant"
            proto = _exported(_as_standard(node, schema)) if plain else None
            self.protos.append(proto)
            self.schemas.append(schema if proto is not None else None)


def _exported(node: gs.Node) -> onnx.NodeProto | None:
    """A node as a message; None where its attributes have no type (an empty list in the model)."""
    try:
        proto: onnx.NodeProto = OnnxExporter.export_node(node)
        return proto
    except (TypeError, ValueError):
        return None


def _as_standard(node: gs.Node, schema: Any) -> gs.Node:
    """A fused operator as the standard one that has its shape, for shape inference only."""
    if standard_form(node.domain, node.op) is None:
        return node
    plain = gs.Node(schema.name, node.name, {k: v for k, v in node.attrs.items() if k in schema.attributes})
    object.__setattr__(plain, "inputs", list(node.inputs)[: schema.max_input])
    object.__setattr__(plain, "outputs", list(node.outputs))
    return plain


def _schema(graph: gs.Graph, node: gs.Node) -> Any:
    standard = standard_form(node.domain, node.op)
    domain, op = ("", standard) if standard else (node.domain or "", node.op)
    domain = "" if domain == "ai.onnx" else domain
    try:
        return onnx.defs.get_schema(op, opset_of(graph, domain), domain)
    except onnx.defs.SchemaError:
        return None


class Walk:
    """One pass over the nodes, with numbers for all free sizes."""

    def __init__(self, prepared: Prepared, feeds: Mapping[str, Shape]) -> None:
        self.prepared, self.graph, self.feeds = prepared, prepared.graph, dict(feeds)
        self.shapes: dict[str, Shape | None] = {}
        self.types: dict[str, int] = {}
        self.values: dict[str, NDArray[Any]] = {}
        self.arithmetic: set[str] = set()
        self.unknown: dict[str, str] = {}
        self._protos: dict[str, onnx.TypeProto] = {}
        self.constants: set[str] = set()
        for tensor in self.graph.inputs:
            self._set(tensor.name, type_of(tensor.dtype), self.feeds.get(tensor.name))
        for i, node in enumerate(self.graph.nodes):
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.name not in self.shapes:
                    self._store(tensor.name, tensor)
            self._visit(i, node)

    def _set(self, name: str, kind: int, shape: Shape | None) -> None:
        self.types[name], self.shapes[name] = kind, shape
        if kind:
            self._protos[name] = helper.make_tensor_type_proto(kind, shape)

    def _store(self, name: str, tensor: gs.Constant) -> None:
        shape = tuple(int(n) for n in tensor.shape)
        self.constants.add(name)
        self._set(name, type_of(tensor.dtype), shape)
        if int(np.prod(shape)) <= SMALL and self.types[name] != onnx.TensorProto.STRING:
            self.values[name] = np.asarray(tensor.values)

    def _visit(self, i: int, node: gs.Node) -> None:
        if node.op == "Constant" and not node.domain:
            self._constant_node(node)
            return
        self._infer(i, node)
        if self._is_arithmetic(node):
            self._evaluate(i, node)

    def _constant_node(self, node: gs.Node) -> None:
        held = constant_of(node)
        name = node.outputs[0].name
        if held is not None:
            self._store(name, held)
            return
        key, value = next(iter(node.attrs.items()), ("", None))
        if key.startswith("value_string") or value is None or key == "sparse_value":
            self.unknown[name] = "a constant of strings or sparse values"
            return
        try:
            array = np.asarray(value, np.float32 if "float" in key else np.int64)
        except (TypeError, ValueError, OverflowError):
            self.unknown[name] = "a constant that is no number"
            return
        self.constants.add(name)
        self._set(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        self.values[name] = array

    def _infer(self, i: int, node: gs.Node) -> None:
        proto, schema = self.prepared.protos[i], self.prepared.schemas[i]
        found: Mapping[str, onnx.TypeProto] = {}
        if schema is not None and proto is not None:
            names = [t.name for t in node.inputs if t.name]
            types = {n: self._protos[n] for n in names if n in self._protos}
            try:
                data = {n: numpy_helper.from_array(self.values[n]) for n in names if n in self.values and self.values[n].size <= 64}
                found = shape_inference.infer_node_outputs(
                    schema, proto, types, data, {}, self.prepared.opsets, self.graph.ir_version or 10
                )
            except Exception as error:  # the C++ library raises several kinds, all meaning "can't"
                self.unknown[node.outputs[0].name] = str(error).splitlines()[0]
        for tensor in node.outputs:
            if not tensor.name:
                continue
            kind, shape = _read(found.get(tensor.name))
            if shape is None:
                shape = self._declared(tensor)
            self._set(tensor.name, kind or type_of(tensor.dtype) or self._like_first(node), shape)
        if any(t.name and self.shapes[t.name] is None for t in node.outputs):
            self._from_signature(node)

    def _like_first(self, node: gs.Node) -> int:
        return next((self.types[t.name] for t in node.inputs[typed_by(node.domain, node.op) :] if self.types.get(t.name)), 0)

    def _declared(self, tensor: gs.Variable) -> Shape | None:
        shape = tensor.shape
        if shape is None or any(not isinstance(n, int) or n < 0 for n in shape):
            return None
        return tuple(shape)

    def _from_signature(self, node: gs.Node) -> None:
        rule = rule_of(node.domain or "", node.op)
        seen = view(self.graph, node, self.shapes, self.values, self.constants)
        made = read(rule, seen)
        for i, tensor in enumerate(node.outputs):
            if tensor.name and self.shapes[tensor.name] is None:
                shape = None if isinstance(made, Refusal) else output_shape(made, seen.inputs, i)
                self._set(tensor.name, self.types[tensor.name], shape)
                if shape is None:
                    self.unknown.setdefault(tensor.name, "the shape of its output is not known")

    def _is_arithmetic(self, node: gs.Node) -> bool:
        """Shape arithmetic: what starts at Shape, and integer computations on small constants."""
        if node.domain:
            return False
        if node.op in READS_SHAPE:
            return bool(node.inputs) and self.shapes.get(node.inputs[0].name) is not None
        if not node.inputs or any(t.name and t.name not in self.values for t in node.inputs) or _has_graph(node):
            return False
        if node.op in NEVER_FOLDED:
            return False
        sizes = [int(np.prod(s)) if (s := self.shapes.get(t.name)) is not None else SMALL for t in node.outputs]
        if max(sizes) > SMALL:
            return False
        if max(sizes) <= 1:
            return True
        derived = any(t.name in self.arithmetic for t in node.inputs)
        whole = all(self.types.get(t.name) in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL) for t in node.outputs)
        return derived or whole

    def _evaluate(self, i: int, node: gs.Node) -> None:
        results: Sequence[Any]
        if node.op == "Shape":
            results = [np.array((self.shapes[node.inputs[0].name] or ())[part_read(node)], np.int64)]
        elif node.op in REINTERPRETS and (shape := self.shapes[node.outputs[0].name]) is not None:
            value = self.values[node.inputs[0].name]
            if value.size != math.prod(shape):
                return
            results = [value.reshape(shape)]
        else:
            try:
                evaluator = ReferenceEvaluator(self.prepared.protos[i], opsets={d.domain: d.version for d in self.prepared.opsets})
                results = list(evaluator.run(None, {t.name: self.values[t.name] for t in node.inputs if t.name}))
            except Exception:  # the reference evaluator has gaps; a value that is not known is always safe
                return
        for tensor, result in zip(node.outputs, results, strict=False):
            if tensor.name and isinstance(result, np.ndarray | np.generic):
                self.values[tensor.name] = np.asarray(result)
                self._set(tensor.name, helper.np_dtype_to_tensor_dtype(np.asarray(result).dtype), np.asarray(result).shape)
                if node.op in READS_SHAPE or np.asarray(result).dtype.kind in "iub" or any(t.name in self.arithmetic for t in node.inputs):
                    self.arithmetic.add(tensor.name)


def part_read(node: gs.Node) -> slice:
    """The axes that a Shape node reads."""
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    return slice(start if isinstance(start, int) else 0, end if isinstance(end, int) else None)


def _has_graph(node: gs.Node) -> bool:
    return any(isinstance(v, gs.Graph) for v in node.attrs.values())


def _read(found: onnx.TypeProto | None) -> tuple[int, Shape | None]:
    if found is None or not found.HasField("tensor_type"):
        return 0, None
    tensor = found.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(d.dim_value for d in tensor.shape.dim)
