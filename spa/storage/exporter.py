"""From a graph-surgeon graph back to protobuf, with nothing lost that `spa.storage.protos.Notes` has kept.

Graph-surgeon's own exporter writes int4 unpacked and strings as pointers once somebody looked at them, fails on empty
lists and maps, forgets initializers that are graph outputs, and writes those of an outer graph again into each graph
nested in it. Hence this one. It changes nothing in the graph it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    defs,
    helper,
)
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from passes.weights import Weight
from spa.errors import BadModel, UnsupportedModel
from spa.storage.protos import Notes

Place = Callable[[Weight, str], TensorProto]
"""Makes the TensorProto of a weight, under a name: with its data, or with a placeholder for it."""

_INPUTS_HOLD_INITIALIZERS = 4  # from this IR version on, an initializer need not be listed as an input as well


def export(graph: gs.Graph, header: ModelProto, notes: Notes, place: Place) -> ModelProto:
    """Write a graph as a ModelProto.

    Parameters
    ----------
    graph
        The graph.
    header
        Everything that stands around it.
    notes
        What graph-surgeon dropped when the model was loaded.
    place
        What is to be written for each weight.

    Raises
    ------
    BadModel
        If two different constants have one name.
    UnsupportedModel
        If an attribute or a constant is of a kind that ONNX has no place for.
    """
    model = ModelProto()
    model.CopyFrom(header)
    model.ClearField("opset_import")
    model.opset_import.extend(_opsets(graph, header))
    _Exporter(header, notes, place, _homes(graph, notes)).main(graph, model.graph)
    return model


def weight_of(constant: gs.Constant) -> Weight:
    """The values of a constant as a weight, whether a pass has made them, has read them or has never seen them."""
    values = constant._values
    if isinstance(values, Weight):
        return values
    if isinstance(values, LazyValues):
        if values.tensor.data_location == TensorProto.EXTERNAL:
            raise UnsupportedModel(f"constant '{constant.name}' is in a file that graph-surgeon opened; use spa.load")
        return Weight.of_proto(values.tensor)
    return Weight.of_array(np.asarray(values))


def constants(graph: gs.Graph) -> Iterable[gs.Constant]:
    """All constants of a graph and those nested in it, in node attributes too; shared ones come more than once."""
    for node in graph.nodes:
        yield from (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))
        for value in node.attrs.values():
            if isinstance(value, gs.Constant):
                yield value
            elif isinstance(value, gs.Graph):
                yield from constants(value)
    yield from (tensor for tensor in graph.outputs if isinstance(tensor, gs.Constant))


def _opsets(graph: gs.Graph, header: ModelProto) -> list[OperatorSetIdProto]:
    """The model's opsets, with what passes have changed or added."""
    versions = {opset.domain: opset.version for opset in header.opset_import}
    main = "ai.onnx" if "ai.onnx" in versions and "" not in versions else ""
    if main in versions and graph.opset is not None:
        versions[main] = graph.opset
    graphs = [graph, *graph.subgraphs(recursive=True)]
    for domain in sorted({node.domain or "" for nested in graphs for node in nested.nodes}):
        if domain not in versions and not (domain in ("", "ai.onnx") and main in versions):
            versions[domain] = graph.opset if domain in ("", "ai.onnx") else 1
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _homes(main: gs.Graph, notes: Notes) -> dict[int, list[gs.Constant]]:
    """For each graph, by id, the constants that are its initializers: the innermost that all readers can see."""
    paths: dict[int, tuple[gs.Constant, tuple[int, ...]]] = {}

    def visit(graph: gs.Graph, outer: tuple[int, ...]) -> None:
        path = (*outer, id(graph))
        for node in graph.nodes:
            for tensor in node.inputs:
                note(tensor, path)
            for value in node.attrs.values():
                if isinstance(value, gs.Graph):
                    visit(value, path)
        for tensor in graph.outputs:
            note(tensor, path)

    def note(tensor: gs.Tensor, path: tuple[int, ...]) -> None:
        if isinstance(tensor, gs.Constant):
            _, known = paths.get(id(tensor), (tensor, path))
            shared = sum(1 for a, b in zip(known, path, strict=False) if a == b)
            paths[id(tensor)] = tensor, path[:shared]

    visit(main, ())
    top = {tensor.name: tensor for tensor, path in paths.values() if len(path) == 1}
    homes: dict[int, dict[str, gs.Constant]] = {}
    for tensor, path in paths.values():
        # Graph.copy gives nested graphs copies of the main graph's constants: they go home if nobody changed them.
        if tensor.name in notes.initializers and top.setdefault(tensor.name, tensor)._values is tensor._values:
            path = path[:1]
        other = homes.setdefault(path[-1], {}).setdefault(tensor.name, tensor)
        if other._values is not tensor._values:
            raise BadModel(f"two different constants have the name '{tensor.name}'; a pass has to rename one of them")
    order = {name: position for position, name in enumerate(notes.initializers)}
    return {
        home: sorted(tensors.values(), key=lambda tensor: order.get(tensor.name, len(order)))
        for home, tensors in homes.items()
    }


class _Exporter:
    def __init__(
        self, header: ModelProto, notes: Notes, place: Place, homes: Mapping[int, Sequence[gs.Constant]]
    ) -> None:
        self._header = header
        self._notes = notes
        self._place = place
        self._homes = homes
        self._value_order = {name: position for position, name in enumerate(notes.values)}

    def main(self, graph: gs.Graph, proto: GraphProto) -> None:
        """Fill in the main graph, whose header is there already."""
        for field in ("input", "output", "value_info", "quantization_annotation"):
            proto.ClearField(field)
        self._fill(graph, proto)
        if graph.doc_string:
            proto.doc_string = graph.doc_string
        self._list_default_inputs(graph, proto)
        names = {t.name for t in proto.initializer} | {name for node in proto.node for name in node.output}
        names |= {value.name for value in proto.input}
        for annotation in self._header.graph.quantization_annotation:
            used = {annotation.tensor_name, *(entry.value for entry in annotation.quant_parameter_tensor_names)}
            if used <= names:
                proto.quantization_annotation.add().CopyFrom(annotation)

    def _fill(self, graph: gs.Graph, proto: GraphProto) -> None:
        proto.name = graph.name
        proto.node.extend(self._node(node) for node in graph.nodes)
        proto.input.extend(self._value(tensor) for tensor in graph.inputs)
        proto.output.extend(self._value(tensor) for tensor in graph.outputs)
        for constant in self._homes.get(id(graph), ()):
            if isinstance(constant._values, SparseValues):
                sparse: SparseTensorProto = proto.sparse_initializer.add()
                sparse.CopyFrom(constant._values.tensor)
            else:
                proto.initializer.append(self._place(weight_of(constant), constant.name))
        outside = {tensor.name for tensor in (*graph.inputs, *graph.outputs)} | {""}
        inside = {tensor.name: tensor for node in graph.nodes for tensor in node.outputs if tensor.name not in outside}
        ordered = sorted(inside.values(), key=lambda t: self._value_order.get(t.name, len(self._value_order)))
        values = (self._value(tensor) for tensor in ordered)
        proto.value_info.extend(value for value in values if value.HasField("type"))

    def _list_default_inputs(self, graph: gs.Graph, proto: GraphProto) -> None:
        """List initializers among the inputs again where they were, or where the IR version has them there."""
        constants = {constant.name: constant for constant in self._homes.get(id(graph), ())}
        old = self._header.ir_version < _INPUTS_HOLD_INITIALIZERS
        missing = [name for name in constants if old or name in self._notes.inputs]
        if not missing:
            return
        order = {name: position for position, name in enumerate(self._notes.inputs)}
        values = [*proto.input, *(self._value(constants[name]) for name in missing)]
        proto.ClearField("input")
        proto.input.extend(sorted(values, key=lambda value: order.get(value.name, len(order))))

    def _value(self, tensor: gs.Tensor) -> ValueInfoProto:
        """A value's type as it is now, in the words of the original as far as it has not changed."""
        original = self._notes.values.get(tensor.name)
        if original is not None and original.HasField("type") and not original.type.HasField("tensor_type"):
            return original  # graph-surgeon cannot describe sequences, maps, optionals, and types that say nothing
        value = ValueInfoProto(name=tensor.name)
        if original is not None:
            if original.doc_string:
                value.doc_string = original.doc_string
            value.metadata_props.extend(original.metadata_props)
        if tensor.dtype is not None or tensor.shape is not None:
            value.type.CopyFrom(_tensor_type(tensor))
        if original is not None and _undenoted(original.type) == value.type:
            return original
        return value

    def _node(self, node: gs.Node) -> NodeProto:
        proto = NodeProto(op_type=node.op)
        key = next((tensor.name for tensor in node.outputs if tensor.name), "")
        extra = self._notes.nodes.get(key)
        if extra is not None and extra.op_type == node.op:
            proto.CopyFrom(extra)
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        if node.name:
            proto.name = node.name
        if node.domain is not None:
            proto.domain = node.domain
        for name, value in node.attrs.items():
            proto.attribute.append(self._attribute(node, key, name, value))
        return proto

    def _attribute(self, node: gs.Node, key: str, name: str, value: Any) -> AttributeProto:
        attribute = AttributeProto(name=name)
        if isinstance(value, gs.Constant):
            attribute.type = AttributeProto.TENSOR
            attribute.t.CopyFrom(self._place(weight_of(value), value.name))
        elif isinstance(value, gs.Graph):
            attribute.type = AttributeProto.GRAPH
            self._fill(value, attribute.g)
            if value.doc_string:
                attribute.g.doc_string = value.doc_string
        elif isinstance(value, list | tuple | np.ndarray) and len(value) == 0:
            kind = self._notes.empty_lists.get((key, name)) or _schema_type(node, name)
            attribute.type = AttributeProto.AttributeType.Name(kind)
        else:
            if isinstance(value, type):  # graph-surgeon allows numpy types, meaning their ONNX number
                value = helper.np_dtype_to_tensor_dtype(np.dtype(value))
            try:
                attribute = helper.make_attribute(name, value)
            except (TypeError, ValueError) as error:
                raise UnsupportedModel(
                    f"attribute '{name}' of node '{node.name}' ({node.op}) holds a {type(value).__name__}, "
                    "which ONNX has no attribute type for; a pass has to set something else"
                ) from error
        return attribute


def _schema_type(node: gs.Node, name: str) -> int:
    """The type that the operator's definition gives an attribute; lists of integers are the most common by far."""
    try:
        kind = defs.get_schema(node.op, node.domain or "").attributes[name].type
    except (defs.SchemaError, KeyError):
        return AttributeProto.INTS
    return int(AttributeProto.AttributeType.Value(str(kind).rpartition(".")[2]))


def _tensor_type(tensor: gs.Tensor) -> TypeProto:
    kind = TypeProto()
    kind.tensor_type.SetInParent()
    if isinstance(tensor.dtype, int):  # ONNX's number, where graph-surgeon thinks that numpy has no such type
        kind.tensor_type.elem_type = tensor.dtype
    elif tensor.dtype is not None:
        kind.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    _drop_undefined(kind)
    if tensor.shape is None:
        return kind
    kind.tensor_type.shape.SetInParent()
    for size in tensor.shape:
        dimension = kind.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dimension.dim_param = size
        elif size is not None and size >= 0:
            dimension.dim_value = size
    return kind


def _undenoted(kind: TypeProto) -> TypeProto:
    """A type without the remarks that graph-surgeon does not know."""
    plain = TypeProto()
    plain.CopyFrom(kind)
    plain.ClearField("denotation")
    _drop_undefined(plain)
    for dimension in plain.tensor_type.shape.dim if plain.tensor_type.HasField("shape") else ():
        dimension.ClearField("denotation")
    return plain


def _drop_undefined(kind: TypeProto) -> None:
    """Make an element type that is given as undefined one that is not given."""
    if kind.HasField("tensor_type") and not kind.tensor_type.elem_type:
        kind.tensor_type.ClearField("elem_type")
