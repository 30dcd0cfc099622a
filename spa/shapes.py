"""Shapes, types and small constants of every value, by one walk over the nodes.

Each node is asked alone (onnx's own inference in C++, a few microseconds), with the small constants that are known so far; so
chains of Shape, Gather, Concat … are evaluated on the way. Operators without an ONNX schema get their shape from
their signature. Axes of unknown size are given a number first ("binding"); a second walk with other numbers tells which axes
and which elements of shape arithmetic depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx

from spa.errors import BadModel, BadOption
from spa.signatures.table import Dim, One, Product, Refusal, Sum, Term, read, rule_of

Shape = tuple[int, ...]
SMALL = 4096  # elements; larger constants are weights, not shape arithmetic
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16})
_MOVES = frozenset({"Shape", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Transpose", "Split"})
_SPACE = (224, 64, 256, 128, 32, 192, 384, 299, 512, 640, 16)


@dataclass(frozen=True)
class Facts:
    """What is known before tracing.

    shapes: value -> shape under the binding, None where the rank is not known.
    types: value -> onnx.TensorProto.DataType.
    values: small constants, shape arithmetic among them.
    dynamic: value -> for each axis, whether its size depends on the inputs' free sizes.
    computed: values that come from shape arithmetic and depend on no free size (safe to fold).
    feeds: graph input -> shape that was assumed.
    unknown: nodes whose output shape could not be found, with the cause.
    """

    shapes: Mapping[str, Shape | None]
    types: Mapping[str, int]
    values: Mapping[str, NDArray[Any]]
    dynamic: Mapping[str, tuple[bool, ...]]
    computed: Mapping[str, NDArray[Any]]
    feeds: Mapping[str, Shape]
    unknown: Mapping[str, str] = field(default_factory=dict)


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


def view(graph: gs.Graph, node: gs.Node, shapes: Mapping[str, Shape | None], values: Mapping[str, NDArray[Any]],
         constants: set[str] | frozenset[str]) -> View:
    """A node with the shapes and constants that are known of its operands."""
    domain = node.domain or ""
    present = tuple(bool(t.name) for t in node.inputs)
    return View(
        node, node.op, "" if domain == "ai.onnx" else domain, _opset(graph, ""), node.attrs,
        tuple(shapes.get(t.name) if t.name else None for t in node.inputs),
        tuple(shapes.get(t.name) if t.name else None for t in node.outputs), present, values, constants,
    )


def _opset(graph: gs.Graph, domain: str) -> int:
    for imported in graph.import_domains or ():
        if imported.domain == domain or (not domain and imported.domain == "ai.onnx"):
            return int(imported.version)
    return int(graph.opset) if not domain else 1


def infer(graph: gs.Graph, inputs: Mapping[str, Sequence[int]] | None = None) -> Facts:
    """Shapes and constants of a graph.

    `inputs` fixes the shape of graph inputs; free sizes that it does not name are chosen so that every node's shape is known.
    Raises BadOption if `inputs` names no input or has another rank, BadModel if an input's rank is unknown.
    """
    prepared = _Prepared(graph)
    given = _given(graph, inputs or {})
    free = any(not isinstance(d, int) or d <= 0 for t in graph.inputs for d in given.get(t.name, t.shape) or ())
    best: _Walk | None = None
    for space in _SPACE if free else (1,):
        walk = _Walk(prepared, _bind(graph, given, 2, space, 16))
        if best is None or len(walk.unknown) < len(best.unknown):
            best = walk
        if not walk.unknown:
            break
    assert best is not None
    other = best
    if free:
        trials = [_Walk(prepared, _bind(graph, given, 3, space, 24)) for space in _other_spaces(graph, given, best)]
        other = min(trials, key=lambda w: len(w.unknown))
    return _facts(best, other)


def _other_spaces(graph: gs.Graph, given: Mapping[str, Sequence[Any]], best: _Walk) -> list[int]:
    used = {d for shape in best.feeds.values() for d in shape}
    return [s for s in _SPACE if s not in used][:3] or [48]


def _given(graph: gs.Graph, inputs: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Any]]:
    names = {t.name: t for t in graph.inputs}
    for name, shape in inputs.items():
        if name not in names:
            raise BadOption(f"--input names {name!r}, which is not an input of the model; its inputs are: {', '.join(names)}.")
        declared = names[name].shape
        if declared is not None and len(declared) != len(shape):
            raise BadOption(f"--input {name} has {len(shape)} sizes, but the model declares {len(declared)} axes.")
    for name, tensor in names.items():
        if tensor.shape is None and name not in inputs and getattr(tensor, "type", "tensor_type") == "tensor_type":
            raise BadModel(f"The shape of input {name!r} is not in the model: give it with --input {name}:1x3x224x224.")
    return {name: tuple(shape) for name, shape in inputs.items()}


def _bind(graph: gs.Graph, given: Mapping[str, Sequence[Any]], batch: int, space: int, length: int) -> dict[str, Shape]:
    """A size for every free axis; axes of the same name get the same size."""
    names: dict[str, int] = {}
    feeds = {}
    for tensor in graph.inputs:
        shape = given.get(tensor.name, tensor.shape)
        if shape is None:
            continue
        sizes = []
        picture = len(shape) >= 4 and dtype_is_float(tensor.dtype)
        for axis, size in enumerate(shape):
            if isinstance(size, int) and size > 0:
                sizes.append(size)
                continue
            guess = batch if axis == 0 else space if picture else length
            sizes.append(names.setdefault(size, guess) if isinstance(size, str) else guess)
        feeds[tensor.name] = tuple(sizes)
    return feeds


def dtype_is_float(dtype: Any) -> bool:
    """Whether a gs dtype (numpy's or ONNX's number) is floating point."""
    try:
        return dtype_to_onnx(dtype) in FLOATS
    except (TypeError, ValueError, KeyError):
        return False


class _Prepared:
    """What both walks need: node messages and schemas."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.opsets = [helper.make_opsetid(d.domain, d.version) for d in graph.import_domains or ()]
        self.protos: list[onnx.NodeProto | None] = []
        self.schemas: list[Any] = []
        for node in graph.nodes:
            schema = _schema(graph, node)
            plain = schema is not None and node.op != "Constant"
            proto = _exported(_as_standard(node)) if plain else None
            self.protos.append(proto)
            self.schemas.append(schema if proto is not None else None)


def _exported(node: gs.Node) -> onnx.NodeProto | None:
    """A node as a message; None where its attributes have no type (an empty list in the model)."""
    try:
        return OnnxExporter.export_node(node)
    except (TypeError, ValueError):
        return None


_STANDARD = {"FusedConv": ("Conv", ("activation", "activation_params")), "FusedGemm": ("Gemm", ("activation",))}


def _as_standard(node: gs.Node) -> gs.Node:
    """com.microsoft operators that are a standard one with more attributes, for shape inference only."""
    if node.op not in _STANDARD or node.domain != "com.microsoft":
        return node
    op, extra = _STANDARD[node.op]
    attrs = {k: v for k, v in node.attrs.items() if not k.startswith(extra)}
    plain = gs.Node(op, node.name, attrs)
    object.__setattr__(plain, "inputs", list(node.inputs)[:3])
    object.__setattr__(plain, "outputs", list(node.outputs))
    return plain


def _schema(graph: gs.Graph, node: gs.Node) -> Any:
    domain = node.domain or ""
    op = node.op
    if domain == "com.microsoft" and op in _STANDARD:
        domain, op = "", _STANDARD[op][0]
    domain = "" if domain == "ai.onnx" else domain
    try:
        return onnx.defs.get_schema(op, _opset(graph, domain), domain)
    except onnx.defs.SchemaError:
        return None


class _Walk:
    """One pass over the nodes, with numbers for all free sizes."""

    def __init__(self, prepared: _Prepared, feeds: Mapping[str, Shape]) -> None:
        self.prepared, self.graph, self.feeds = prepared, prepared.graph, dict(feeds)
        self.shapes: dict[str, Shape | None] = {}
        self.types: dict[str, int] = {}
        self.values: dict[str, NDArray[Any]] = {}
        self.arithmetic: set[str] = set()
        self.unknown: dict[str, str] = {}
        self._protos: dict[str, onnx.TypeProto] = {}
        self.constants: set[str] = set()
        for tensor in self.graph.inputs:
            self._set(tensor.name, _type_of(tensor.dtype), self.feeds.get(tensor.name))
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
        self._set(name, _type_of(tensor.dtype), shape)
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
            self._set(tensor.name, kind or _type_of(tensor.dtype) or self._like_first(node), shape)
        if any(t.name and self.shapes[t.name] is None for t in node.outputs):
            self._from_signature(node)

    def _like_first(self, node: gs.Node) -> int:
        return next((self.types[t.name] for t in node.inputs if self.types.get(t.name)), 0)

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
        if node.op in ("Shape", "Size"):
            return bool(node.inputs) and self.shapes.get(node.inputs[0].name) is not None
        if not node.inputs or any(t.name and t.name not in self.values for t in node.inputs) or _has_graph(node):
            return False
        if node.op.startswith(("Random", "Quantize", "Dequantize")) or node.op in ("Dropout", "Bernoulli", "Multinomial"):
            return False
        sizes = [int(np.prod(s)) if (s := self.shapes.get(t.name)) is not None else SMALL for t in node.outputs]
        if max(sizes) > SMALL:
            return False
        if max(sizes) <= 1:
            return True
        derived = any(t.name in self.arithmetic for t in node.inputs)
        whole = all(self.types.get(t.name) in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
                    for t in node.outputs)
        return derived or whole

    def _evaluate(self, i: int, node: gs.Node) -> None:
        results: Sequence[Any]
        if node.op == "Shape":
            results = [np.array((self.shapes[node.inputs[0].name] or ())[_part(node)], np.int64)]
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
                if node.op in ("Shape", "Size") or np.asarray(result).dtype.kind in "iub" or any(
                    t.name in self.arithmetic for t in node.inputs
                ):
                    self.arithmetic.add(tensor.name)


def _part(node: gs.Node) -> slice:
    """The axes that a Shape node reads."""
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    return slice(start if isinstance(start, int) else 0, end if isinstance(end, int) else None)


def _has_graph(node: gs.Node) -> bool:
    return any(isinstance(v, gs.Graph) for v in node.attrs.values())


def _type_of(dtype: Any) -> int:
    if dtype is None:
        return 0
    try:
        return int(dtype_to_onnx(dtype))
    except (TypeError, KeyError, ValueError):
        return 0


def _read(found: onnx.TypeProto | None) -> tuple[int, Shape | None]:
    if found is None or not found.HasField("tensor_type"):
        return 0, None
    tensor = found.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(d.dim_value for d in tensor.shape.dim)


def output_shape(signature: Any, inputs: Sequence[Shape | None], index: int) -> Shape | None:
    """Shape of output `index` from a signature and the inputs' shapes; None if a dim's size is not in them."""
    sizes = dim_sizes(signature, inputs)
    axes = signature.outputs[index] if index < len(signature.outputs) else None
    if axes is None or sizes is None:
        return None
    found = [term_size(t, sizes) for t in axes]
    return None if any(n is None for n in found) else tuple(n for n in found if n is not None)


def term_size(term: Term, sizes: Mapping[str, int]) -> int | None:
    """Number of positions of a term; None if a dim's size is not known."""
    if isinstance(term, One):
        return 1
    if isinstance(term, Dim):
        return sizes.get(term.name)
    if not isinstance(term, Product | Sum):
        return len(term.index)
    parts = [term_size(p, sizes) for p in term.parts]
    if any(p is None for p in parts):
        return None
    known = [p for p in parts if p is not None]
    return int(np.prod(known)) if isinstance(term, Product) else sum(known)


def dim_sizes(signature: Any, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None] = ()) -> dict[str, int] | None:
    """Size of every dim, from operands' shapes; None if they contradict each other."""
    sizes = dict(signature.sizes)
    pairs = [(t, n) for operands, shapes in ((signature.inputs, inputs), (signature.outputs, outputs))
             for axes, shape in zip(operands, shapes, strict=False) if axes is not None and shape is not None
             for t, n in zip(axes, shape, strict=False)]
    if any(axes is not None and shape is not None and len(axes) != len(shape)
           for operands, shapes in ((signature.inputs, inputs), (signature.outputs, outputs))
           for axes, shape in zip(operands, shapes, strict=False)):
        return None
    for _ in range(3):
        for term, size in pairs:
            if not _solve(term, size, sizes):
                return None
    return sizes


def _solve(term: Term, size: int, sizes: dict[str, int]) -> bool:
    """Learns the size of a term's only unknown dim; False on a contradiction."""
    if isinstance(term, Dim):
        return sizes.setdefault(term.name, size) == size
    if isinstance(term, One) or not isinstance(term, Product | Sum):
        return True
    known = [term_size(p, sizes) for p in term.parts]
    missing = [p for p, n in zip(term.parts, known, strict=True) if n is None]
    have = [n for n in known if n is not None]
    if len(missing) > 1:
        return True
    if not missing:
        total = int(np.prod(have)) if isinstance(term, Product) else sum(have)
        return total == size
    if isinstance(term, Sum):
        return _solve(missing[0], size - sum(have), sizes)
    product = int(np.prod(have)) or 1
    return size % product == 0 and _solve(missing[0], size // product, sizes)


def _facts(one: _Walk, two: _Walk) -> Facts:
    dynamic = {}
    for name, shape in one.shapes.items():
        other = two.shapes.get(name)
        if shape is not None:
            pairs = zip(shape, other, strict=True) if other is not None and len(other) == len(shape) else [(n, -1) for n in shape]
            dynamic[name] = tuple(a != b for a, b in pairs)
    free = _depends(one, dynamic) if one is not two else set()
    computed = {n: one.values[n] for n in one.arithmetic if n not in free}
    return Facts(one.shapes, one.types, one.values, dynamic, computed, one.feeds, one.unknown)


def with_new_constants(facts: Facts, graph: gs.Graph) -> Facts:
    """The facts, and those of constants that passes have made since; nothing that was known changes by passes that keep the function."""
    shapes, types = dict(facts.shapes), dict(facts.types)
    values, dynamic = dict(facts.values), dict(facts.dynamic)
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in shapes:
                shape = tuple(int(n) for n in tensor.shape)
                shapes[tensor.name], types[tensor.name] = shape, _type_of(tensor.dtype)
                dynamic[tensor.name] = (False,) * len(shape)
                if int(np.prod(shape)) <= SMALL and types[tensor.name] != onnx.TensorProto.STRING:
                    values[tensor.name] = np.asarray(tensor.values)
    return replace(facts, shapes=shapes, types=types, values=values, dynamic=dynamic)


def _depends(walk: _Walk, dynamic: Mapping[str, tuple[bool, ...]]) -> set[str]:
    """Values of shape arithmetic that depend on a free size; element by element where elements are only moved."""
    marks: dict[str, NDArray[np.bool_]] = {}
    for i, node in enumerate(walk.graph.nodes):
        if not any(t.name in walk.arithmetic for t in node.outputs):
            continue
        outputs = [t.name for t in node.outputs if t.name]
        if node.op == "Shape":
            flags = np.array(dynamic[node.inputs[0].name], bool)
            marks[outputs[0]] = flags[_part(node)]
            continue
        touched = {t.name: marks[t.name] for t in node.inputs if t.name in marks and marks[t.name].any()}
        moved = _move(walk, i, node, touched) if touched and node.op in _MOVES else None
        for k, name in enumerate(outputs):
            shape = walk.values[name].shape if name in walk.values else ()
            marks[name] = moved[k] if moved is not None else np.full(shape, bool(touched))
    return {name for name, mark in marks.items() if mark.any()}


def _move(walk: _Walk, i: int, node: gs.Node, touched: Mapping[str, NDArray[np.bool_]]) -> list[NDArray[np.bool_]] | None:
    feeds = {}
    for k, tensor in enumerate(node.inputs):
        if not tensor.name:
            continue
        value = walk.values[tensor.name]
        if tensor.name in touched:
            if k > 0 and node.op != "Concat":
                return None  # how elements move depends on a free size
            feeds[tensor.name] = touched[tensor.name].astype(value.dtype)
        else:
            feeds[tensor.name] = np.zeros_like(value) if k == 0 or node.op == "Concat" else value
    try:
        evaluator = ReferenceEvaluator(walk.prepared.protos[i], opsets={d.domain: d.version for d in walk.prepared.opsets})
        return [np.asarray(r).astype(bool) for r in evaluator.run(None, feeds)]
    except Exception:  # as in _evaluate
        return None
