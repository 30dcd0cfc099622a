"""Between protobuf and graph-surgeon: check what comes in, and put back what graph-surgeon drops on the way out.

Graph-surgeon imports broken graphs without a word, and keeps of a node its operator, names and attributes, of a value
its type and shape, of an initializer that no node reads nothing. So the skeleton is checked before it is imported, the
rest goes into `Notes`, keyed by names, and the export here, rather than graph-surgeon's, puts it back.
"""

from __future__ import annotations

import graphlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx.inliner
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, ValueInfoProto

from spa.errors import BadModel, UnsupportedModel
from spa.storage.sources import Sources

_CARRIED = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
    AttributeProto.STRINGS,
}
"""Attribute types that graph-surgeon carries; it drops the others with no more than a warning."""

_LISTS = {AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS}

_MAX_INLINED_NODES = 4_000_000
"""A few functions that call each other twice can stand for more nodes than there is memory."""


@dataclass(frozen=True, eq=False)
class Notes:
    """What graph-surgeon drops.

    Attributes
    ----------
    nodes
        For the first output of a node: its operator, and doc_string, metadata_props, overload, device_configurations.
    empty_lists
        Types of the attributes that are empty lists, by first output and attribute, since an empty list tells none.
    values
        Types of inputs, outputs and values as they were given, of all graphs.
    inputs
        Names of the inputs of the main graph, those with an initializer as their default included.
    initializers
        Names of the initializers of the main graph, in order.
    """

    nodes: Mapping[str, NodeProto]
    empty_lists: Mapping[tuple[str, str], int]
    values: Mapping[str, ValueInfoProto]
    inputs: tuple[str, ...]
    initializers: tuple[str, ...]


def check_model(model: ModelProto) -> None:
    """Check what stands around the graph.

    Raises
    ------
    BadModel, UnsupportedModel
        If there is no graph, or onnx as it is installed does not know the versions that the model asks for.
    """
    if not model.HasField("graph"):
        raise BadModel("there is no graph in it, so it is no ONNX model or only a part of one; export it again")
    if model.ir_version < 1:
        raise BadModel("it gives no IR version, so it is no ONNX model or a damaged one; export it again")
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedModel(
            f"it has IR version {model.ir_version} and the installed onnx knows {onnx.IR_VERSION} at most; "
            "update onnx or export with an older version"
        )
    if not model.opset_import:
        raise BadModel("it does not say which opset it uses, so it is damaged or incomplete; export it again")
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            continue
        if opset.version > newest:
            raise UnsupportedModel(
                f"it uses opset {opset.version} and the installed onnx knows {newest} at most; "
                "update onnx or export with an older opset"
            )
        if opset.version < 1:
            raise BadModel(f"it asks for opset {opset.version}, which does not exist; export it again")


def check_text(message: Message) -> None:
    """Check that all names and texts are UTF-8: where they are not, protobuf hands out bytes in place of str.

    Raises
    ------
    BadModel
        With the field and its content.
    """
    for descriptor, content in message.ListFields():
        items = content if descriptor.is_repeated else (content,)
        if descriptor.type == FieldDescriptor.TYPE_STRING:
            for text in items:
                if isinstance(text, bytes):
                    raise BadModel(f"the {descriptor.full_name} {text[:80]!r} is not UTF-8; export it again")
        elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for item in items:
                check_text(item)


def inline_functions(model: ModelProto) -> ModelProto:
    """Replace calls of the model's own functions by their bodies, so that nothing after this has to know functions.

    Raises
    ------
    BadModel, UnsupportedModel
        If functions call themselves or come to too many nodes, or one is written for another opset than the model.
    """
    if not model.functions:
        return model
    _check_functions(model)
    try:
        inlined = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # the inliner is C++ and throws whatever it meets
        raise BadModel(
            f"its functions cannot be inlined ({_first_line(error)}); export it without functions"
        ) from error
    left = {_function_id(function) for function in inlined.functions}
    if any((node.domain, node.op_type, node.overload) in left for node in _walk(inlined.graph.node)):
        raise UnsupportedModel("a function in it uses another opset than the model does; export it without functions")
    inlined.ClearField("functions")
    return inlined


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _function_id(function: FunctionProto) -> tuple[str, str, str]:
    return function.domain, function.name, function.overload


def _walk(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """All nodes, with those of nested graphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _walk(attribute.g.node)


def _check_functions(model: ModelProto) -> None:
    """Refuse recursion, which would crash the inliner, and calls that multiply beyond measure."""
    known = {_function_id(function) for function in model.functions}
    if len(known) < len(model.functions):
        raise BadModel("it has two functions of one name; export it without functions")
    calls: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for function in model.functions:
        calls[_function_id(function)] = [(n.domain, n.op_type, n.overload) for n in _walk(function.node)]
    try:
        order = list(graphlib.TopologicalSorter({f: known.intersection(c) for f, c in calls.items()}).static_order())
    except graphlib.CycleError as error:
        raise BadModel(
            "a function in it calls itself, which onnx does not allow; export it without functions"
        ) from error
    nodes: dict[tuple[str, str, str], int] = {}
    for function_id in order:
        nodes[function_id] = sum(nodes.get(call, 1) for call in calls[function_id])
    total = sum(nodes.get((n.domain, n.op_type, n.overload), 1) for n in _walk(model.graph.node))
    if total > _MAX_INLINED_NODES:
        raise UnsupportedModel(
            f"its functions stand for {total} nodes, too many to inline; export it without functions"
        )


def sort_nodes(graph: GraphProto) -> None:
    """Put nodes behind those whose outputs they read, otherwise in the order that they have.

    ONNX demands this order, but runtimes do not, and some converters add their nodes at the end. A circle is left alone.
    """
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    needs = [{maker[name] for name in _reads(node) if name in maker} for node in graph.node]
    if all(not before or max(before) < i for i, before in enumerate(needs)):
        return
    waiting = [len(before - {i}) + (i in before) for i, before in enumerate(needs)]
    readers: dict[int, list[int]] = {}
    for i, before in enumerate(needs):
        for j in before:
            readers.setdefault(j, []).append(i)
    ready = [i for i, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers.get(i, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) == len(graph.node):
        nodes = [graph.node[i] for i in order]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        graph.ClearField("node")
        graph.node.extend(copies)


def _reads(node: NodeProto) -> Iterator[str]:
    """Names that a node and the graphs in it read."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from (value.name for value in inner.output)
            for child in inner.node:
                yield from _reads(child)


def check_graph(graph: GraphProto, sources: Sources, outer: tuple[set[str], ...] = ()) -> None:
    """Check that each value is made once, before it is read, and that each tensor has the data its shape needs.

    Parameters
    ----------
    graph
        The skeleton's graph, or one nested in it.
    sources
        Where the tensors' data is.
    outer
        Names that the graphs around this one have made so far.

    Raises
    ------
    BadModel, UnsupportedModel, BadFile
        With the name of the node or tensor that is at fault.
    """
    sort_nodes(graph)
    made = _check_initializers(graph, sources)
    inputs: set[str] = set()
    for value in graph.input:
        if not value.name or value.name in inputs:
            raise BadModel(f"its inputs have no name or the same name '{value.name}' twice; export it again")
        inputs.add(value.name)
    made |= inputs
    for position, node in enumerate(graph.node):
        label = f"node '{node.name}' ({node.op_type})" if node.name else f"node {position} ({node.op_type})"
        if not node.op_type:
            raise BadModel(f"node '{node.name or position}' has no operator; export it again")
        for name in node.input:
            if name and name not in made and not any(name in names for names in outer):
                later = any(name in other.output for other in graph.node)
                fault = "which in the end is made from that" if later else "which nothing makes"
                raise BadModel(f"{label} reads '{name}', {fault}; export it again")
        _check_attributes(node, label, sources, (*outer, made))
        for name in filter(None, node.output):
            if name in made:
                raise BadModel(f"{label} makes '{name}', which something else has made already; export it again")
            made.add(name)
    outputs = [value.name for value in graph.output]
    for name in outputs:
        if name not in made and not any(name in names for names in outer):
            raise BadModel(f"nothing makes its output '{name}'; export it again")
    if len(set(outputs)) < len(outputs):
        raise BadModel("two of its outputs have one name; export it again")


def _check_initializers(graph: GraphProto, sources: Sources) -> set[str]:
    made: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in made:
            raise BadModel(f"its initializers have no name or the same name '{tensor.name}' twice; export it again")
        made.add(tensor.name)
        sources.weight(tensor)
    for sparse in graph.sparse_initializer:
        name = sparse.values.name
        if not name or name in made:
            raise BadModel(f"its initializers have no name or the same name '{name}' twice; export it again")
        made.add(name)
        for part in (sparse.values, sparse.indices):
            if part.data_location == onnx.TensorProto.EXTERNAL:
                raise UnsupportedModel(f"sparse initializer '{name}' is in an external file; save it within the model")
            sources.weight(part)
    return made


def _check_attributes(node: NodeProto, label: str, sources: Sources, scope: tuple[set[str], ...]) -> None:
    seen: set[str] = set()
    for attribute in node.attribute:
        what = f"attribute '{attribute.name}' of {label}"
        if attribute.name in seen or not attribute.name:
            raise BadModel(f"{what} is there twice or has no name; export it again")
        seen.add(attribute.name)
        if attribute.ref_attr_name:
            raise BadModel(f"{what} refers to a function's attribute outside of any function; export it again")
        if attribute.type not in _CARRIED:
            raise UnsupportedModel(f"{what} has a type that cannot be carried over; export the model without it")
        if attribute.type == AttributeProto.TENSOR:
            sources.weight(attribute.t)
        elif attribute.type == AttributeProto.GRAPH:
            check_graph(attribute.g, sources, scope)
        for text in (attribute.s, *attribute.strings):
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise UnsupportedModel(f"{what} is not UTF-8 text; export the model without it") from error


def take_notes(model: ModelProto) -> Notes:
    """Write down what graph-surgeon is going to drop.

    Raises
    ------
    UnsupportedModel
        If two nested graphs have a sequence, map or optional of one name with different types, since graph-surgeon
        keeps no such type and names are all there is to find it by.
    """
    nodes: dict[str, NodeProto] = {}
    empty_lists: dict[tuple[str, str], int] = {}
    values: dict[str, ValueInfoProto] = {}
    graphs = [model.graph]
    for node in _walk(model.graph.node):
        key = next(filter(None, node.output), "")
        extra = NodeProto(op_type=node.op_type)
        if node.doc_string:
            extra.doc_string = node.doc_string
        if node.overload:
            extra.overload = node.overload
        extra.metadata_props.extend(node.metadata_props)
        extra.device_configurations.extend(node.device_configurations)
        if len(extra.ListFields()) > 1:
            nodes.setdefault(key, extra)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                graphs.append(attribute.g)
            elif attribute.type in _LISTS and not (attribute.floats or attribute.ints or attribute.strings):
                empty_lists[key, attribute.name] = attribute.type
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            known = values.setdefault(value.name, value)
            if known.type != value.type and not (_is_tensor(known) and _is_tensor(value)):
                raise UnsupportedModel(
                    f"two values have the name '{value.name}' and different types; rename one of them"
                )
    return Notes(
        nodes=nodes,
        empty_lists=empty_lists,
        values=values,
        inputs=tuple(value.name for value in model.graph.input),
        initializers=tuple(tensor.name for tensor in model.graph.initializer),
    )


def _is_tensor(value: ValueInfoProto) -> bool:
    return value.type.WhichOneof("value") in (None, "tensor_type")
