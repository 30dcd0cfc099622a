"""What the workers of TensorFlow's formats share: tf2onnx, with what of it is out of date put right, and names that can be read.

    a frozen GraphDef, a TFLite file or a TF.js graph model  ->  an ONNX file whose weights are called what the framework calls them

Standalone, as the workers are; they put its folder at the end of sys.path.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its kernels round otherwise from run to run
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import onnx
import tensorflow as tf

if not hasattr(np, "product"):  # tf2onnx 1.17 still asks for it; numpy 2 has it no more
    setattr(np, "product", np.prod)  # noqa: B010  type checkers know that it is gone
if not hasattr(tf, "tables_initializer"):  # the same with TensorFlow 1's name
    tf.tables_initializer = tf.compat.v1.tables_initializer

from tf2onnx import optimizer, tf_loader
from tf2onnx.tfonnx import process_tf_graph

OPSET = 18  # the highest that tf2onnx 1.17 writes
FEWEST = 4  # nodes; TensorFlow's optimizer leaves smaller graphs as they are, even if all is in a function that one node calls
ONNX_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
_CALLS = re.compile(r"^(?:\^?(?:Stateful)?PartitionedCall(?:_\d+)?/)+")  # what inlining a function puts before its names
_MADE_UP = re.compile(r"const_fold_opt__\d+")
_FIRST_OUTPUT = re.compile(r":0$")
Weights = Mapping[str, "np.ndarray[Any, Any]"]


def frozen(session: Any, inputs: list[str], outputs: list[str]) -> tuple[Any, Any]:
    """A session's graph with its variables made constants and simplified, and its lookup tables.

    Raises NotImplementedError where the weights do not fit into one message of protobuf (2 GB).
    """
    try:
        graph, tables = tf_loader.freeze_session(session, input_names=inputs, output_names=outputs, get_tables=True)
        return simplified(graph, inputs, outputs), tables
    except ValueError as error:
        raise too_large(error) from error


def simplified(graph: Any, inputs: list[str], outputs: list[str]) -> Any:
    """A frozen GraphDef with functions inlined and constants folded; those for XLA too, as grouped convolutions of Keras are."""
    for node in (*graph.node, *(node for function in graph.library.function for node in function.node_def)):
        node.attr.pop("_XlaMustCompile", None)
    for function in graph.library.function:
        if function.attr.pop("_XlaMustCompile", None) is not None:
            function.attr.pop("_noinline", None)
    for k in range(FEWEST - len(graph.node)):
        graph.node.add(name=f"padding_{k}", op="NoOp")
    with tf.Graph().as_default():
        tf.import_graph_def(graph, name="")
        return tf_loader.tf_optimize(inputs, outputs, graph)


def too_large(error: Exception) -> Exception:
    """The sentence for networks over protobuf's limit; other errors as they are."""
    if "2GB" in str(error) or "string too long" in str(error):
        return NotImplementedError("its weights take more than 2 GB, which TensorFlow's own format for frozen graphs cannot hold")
    return error


def write(target: str, wish: Mapping[str, Any], *, names: Mapping[str, str] | None = None, weights: Weights | None = None,
          graph: Any = None, **source: Any) -> None:  # fmt: skip
    """Converts and writes.

    Parameters
    ----------
    target
        Path of the ONNX file.
    wish
        What the user asked for; `opset` counts here.
    names
        What tensors of the result should be called, by the names that the source gives them.
    weights
        The framework's own, by the names that it shows people.
    graph
        A frozen GraphDef; else one of tflite_path and tfjs_path is among the source's options.
    source
        Options of tf2onnx's process_tf_graph: input_names, output_names, initialized_tables, shape_override, tflite_path, tfjs_path …

    Raises
    ------
    NotImplementedError
        The network holds operators that tf2onnx does not know.
    """
    logging.basicConfig(level=logging.WARNING)
    with tf.device("/cpu:0"), tf.Graph().as_default() as live:
        if graph is not None:
            tf.import_graph_def(graph, name="")
        made = process_tf_graph(live, opset=wish.get("opset") or OPSET, custom_op_handlers=_lacking(), **source)
        model = optimizer.optimize_graph(made).make_model("")
    refuse_foreign(model)
    nodes = [node for inner in graphs(model.graph) for node in inner.node]
    brief = shorter(node.name for node in nodes)
    for node in nodes:
        node.name = brief.get(node.name, node.name)
    rename(model, {**shorter(values(model)), **(names or {})})
    rename(model, by_reader(model))
    rename(model, by_value(model, weights or {}))
    free_batch(model.graph)
    onnx.save(model, target)


def free_batch(graph: Any) -> None:
    """Calls the first axis "batch" where all inputs leave it free; tf2onnx gives each a name of its own."""
    sides = [[entry.type.tensor_type.shape.dim for entry in side] for side in (graph.input, graph.output)]
    if all(dims and not dims[0].HasField("dim_value") for dims in sides[0]):
        for dims in (*sides[0], *sides[1]):
            if dims and not dims[0].HasField("dim_value"):
                dims[0].dim_param = "batch"


def _lacking() -> dict[str, Any]:
    """Operators that tf2onnx lacks, as it wants them."""
    return {"Erfc": (_erfc, []), "Expm1": (_expm1, [])}


def _erfc(graph: Any, node: Any, name: str, arguments: Any) -> None:
    """erfc(x) = 1 - erf(x): what Keras 3 makes of an exact GELU, and tf2onnx lacks."""
    _one_and(graph, node, name, "Erf", lambda one, value: [one, value])


def _expm1(graph: Any, node: Any, name: str, arguments: Any) -> None:
    """expm1(x) = exp(x) - 1: of CELU."""
    _one_and(graph, node, name, "Exp", lambda one, value: [value, one])


def _one_and(graph: Any, node: Any, name: str, op: str, difference: Callable[[str, str], list[str]]) -> None:
    """Puts the difference of 1 and what `op` makes of a node's operand in its place."""
    kind = {"dtypes": [graph.get_dtype(node.output[0])], "shapes": [graph.get_shape(node.output[0])]}
    operand, outputs = node.input[0], list(node.output)
    graph.remove_node(name)
    one = graph.make_const(f"{name}/one", np.ones((), onnx.helper.tensor_dtype_to_np_dtype(kind["dtypes"][0])))
    value = graph.make_node(op, [operand], **kind)
    graph.make_node("Sub", difference(one.output[0], value.output[0]), name=name, outputs=outputs, **kind)


def refuse_foreign(model: Any) -> None:
    """tf2onnx leaves what it cannot convert as it was, with no more than a line in the log."""
    version = {entry.domain: entry.version for entry in model.opset_import}
    foreign: dict[str, list[str]] = defaultdict(list)
    for graph in graphs(model.graph):
        for node in graph.node:
            known = node.domain in ONNX_DOMAINS and onnx.defs.has(node.op_type, version.get(node.domain, 1), node.domain)
            if not known:
                foreign[node.op_type.removeprefix("TFL_")].append(node.name)
    if foreign:
        listed = ", ".join(f"{op} ({len(of)}×, such as {short(of[0])})" for op, of in sorted(foreign.items()))
        raise NotImplementedError(f"tf2onnx has no ONNX for {listed}")


def graphs(graph: Any) -> Iterator[Any]:
    """A graph and all that lie inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from graphs(inner)


def values(model: Any) -> dict[str, None]:
    """The names of all values, in all graphs, each once."""
    found: dict[str, None] = {}
    for graph in graphs(model.graph):
        found.update((name, None) for node in graph.node for name in (*node.input, *node.output) if name)
        found.update((entry.name, None) for entry in (*graph.initializer, *graph.input, *graph.output))
    return found


def shorter(names: Iterable[str]) -> dict[str, str]:
    """Short forms of names, numbered where they would be the same: without the calls that they were inlined from, the number of a node's
    first output, and, in TFLite, all but the first of the operators that were fused.
    """
    given = list(dict.fromkeys(names))
    taken, found = set(given), {}
    for name in given:
        new = brief = short(name)
        if brief == name:
            continue
        times = 0
        while new in taken:
            times += 1
            new = f"{brief}_{times}"
        taken.add(new)
        found[name] = new
    return found


def short(name: str) -> str:
    """A name as people know it."""
    return _FIRST_OUTPUT.sub("", _CALLS.sub("", name.split(";")[0])) or name


def by_reader(model: Any) -> dict[str, str]:
    """Names for initializers that tf2onnx made up, after the first node that reads them: Conv1/convolution/1 for its second operand."""
    made_up = {entry.name for entry in model.graph.initializer if _MADE_UP.fullmatch(entry.name)}
    taken, found = set(values(model)), {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            new = f"{node.name}/{position}"
            if name in made_up and name not in found and node.name and new not in taken:
                found[name] = new
                taken.add(new)
    return found


def by_value(model: Any, weights: Weights) -> dict[str, str]:
    """The framework's names for initializers that hold exactly its weights, in whatever order of axes; where two weights hold the same
    numbers nothing is said of either.
    """
    named: dict[Any, list[str]] = defaultdict(list)
    for name, value in weights.items():
        if value.size > 1:
            named[fingerprint(value)].append(short(name))
    taken, found = set(values(model)), {}
    for entry in model.graph.initializer:
        if np.prod(entry.dims) > 1:
            owners = named.get(fingerprint(onnx.numpy_helper.to_array(entry)), [])
            if len(owners) == 1 and owners[0] not in taken:
                found[entry.name] = owners[0]
                taken.add(owners[0])
    return found


def fingerprint(value: Any) -> Any:
    """Of an array's numbers, in any order: (how many, their kind, a hash)."""
    return value.size, value.dtype.str, hash(np.sort(np.asarray(value), axis=None).tobytes())


def rename(model: Any, names: Mapping[str, str]) -> None:
    """Gives values other names, in all graphs."""
    for graph in graphs(model.graph):
        for node in graph.node:
            for side in (node.input, node.output):
                side[:] = [names.get(name, name) for name in side]
        for entry in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            entry.name = names.get(entry.name, entry.name)


def asked(wish: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[int | None]]:
    """Shapes that the user gave, by name or by place; free sizes are None."""
    given = wish.get("inputs") or {}
    found = {name: given.get(name) or given.get(str(place)) for place, name in enumerate(names)}
    return {name: [size if isinstance(size, int) else None for size in shape] for name, shape in found.items() if shape}


def feed_shape(shape: Any) -> list[int | None] | None:
    """Sizes of a TensorShape, None where they are free; None where not even the rank is known."""
    return None if shape.rank is None else shape.as_list()
