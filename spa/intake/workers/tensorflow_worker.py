"""TensorFlow: SavedModels of any age (TensorFlow 1, Keras 2, Keras 3) and frozen graphs (`.pb`). `serve.py` says what a worker is.

SavedModels are read as TensorFlow 1 did it: graph, signatures and variables, without reviving the Python objects that they were saved from.
`tf.saved_model.load` fails on those of Keras 2, whose optimizers are no more.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from typing import Any

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

import through_tf2onnx as bridge

tf = bridge.tf
DEFAULT = "serving_default"


@dataclass(frozen=True)
class Opened:
    """A frozen graph. inputs, outputs: name of a tensor by the name that the signature gives it; weights: by the names of the variables."""

    graph: Any
    inputs: dict[str, str]
    outputs: dict[str, str]
    tables: Any
    weights: dict[str, Any]


def inputs(source: str, wish: Any) -> list[dict[str, Any]]:
    """What the signature takes."""
    opened = frozen(source, wish.get("entry") or "")
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(opened.graph, name="")
        return [described(name, graph.get_tensor_by_name(at)) for name, at in opened.inputs.items()]


def described(name: str, tensor: Any) -> dict[str, Any]:
    """One entry of `inputs`."""
    shape = bridge.feed_shape(tensor.shape)
    if shape is None:
        raise ValueError(f"its input {name} has a shape of any rank; save it with a signature that says the rank")
    return {"name": name, "dtype": tensor.dtype.as_numpy_dtype.__name__, "shape": shape}


def convert(source: str, target: str, wish: Any) -> None:
    """Writes the ONNX file."""
    opened = frozen(source, wish.get("entry") or "")
    shapes = {opened.inputs[name]: shape for name, shape in bridge.asked(wish, opened.inputs).items()}
    names = {at: name for side in (opened.inputs, opened.outputs) for name, at in side.items()}
    bridge.write(target, wish, graph=opened.graph, input_names=list(opened.inputs.values()), output_names=list(opened.outputs.values()),
                 tensors_to_rename=names, initialized_tables=opened.tables, shape_override=shapes, weights=opened.weights)  # fmt: skip


def outputs(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """TensorFlow's own, from the graph as it was saved."""
    entry = wish.get("entry") or ""
    opened = frozen(source, entry)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded(session, source, entry)
        return run(session, opened.outputs, {opened.inputs[name]: value for name, value in feeds.items()})


def layers(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """All real tensors of the frozen graph, in order of execution."""
    opened = frozen(source, wish.get("entry") or "")
    return everything(opened.graph, {opened.inputs[name]: value for name, value in feeds.items()})


def everything(frozen_graph: Any, feeds: Any) -> dict[str, Any]:
    """Real tensors of a graph with constants alone, by name."""
    plain = tf.compat.v1.ConfigProto()
    plain.graph_options.rewrite_options.disable_meta_optimizer = True  # it would fuse what is asked for
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(config=plain) as session:
        tf.import_graph_def(frozen_graph, name="")
        made = [out for op in graph.get_operations() if op.inputs for out in op.outputs if out.dtype.is_floating]
        return run(session, {tensor.op.name: tensor.name for tensor in made}, feeds)


def run(session: Any, wanted: dict[str, str], feeds: Any) -> dict[str, Any]:
    """Tensors by the names wanted."""
    return dict(zip(wanted, session.run(list(wanted.values()), feeds), strict=True))


@functools.lru_cache(maxsize=1)
def frozen(source: str, entry: str) -> Opened:
    """The signature's part of the graph, with variables as constants. Raises OSError, ValueError."""
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        takes, gives = loaded(session, source, entry)
        variables = tf.compat.v1.global_variables()
        weights = dict(zip((v.op.name for v in variables), session.run([v.read_value() for v in variables]), strict=True))
        if os.path.isfile(source):
            return Opened(graph.as_graph_def(), takes, gives, None, {})
        constant, tables = bridge.frozen(session, list(takes.values()), list(gives.values()))
    return Opened(constant, takes, gives, tables, weights)


def loaded(session: Any, source: str, entry: str) -> tuple[dict[str, str], dict[str, str]]:
    """Fills a session; gives the tensors of the signature's inputs and outputs by name."""
    if os.path.isfile(source) and os.path.basename(source) != "saved_model.pb":
        return from_graph(source)
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    try:
        signatures = tf.compat.v1.saved_model.load(session, tags(folder), folder).signature_def
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise OSError(f"its graph or variables cannot be loaded: {reason(error)}") from error
    chosen = signature(signatures, entry)
    takes, gives = ({name: side[name].name for name in sorted(side)} for side in (chosen.inputs, chosen.outputs))
    return takes, gives


def tags(folder: str) -> list[str]:
    """Those of the graph for serving; of the only graph, or the first one, where none is for that. Raises OSError."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        with open(os.path.join(folder, "saved_model.pb"), "rb") as file:
            saved.ParseFromString(file.read())
    except DecodeError as error:
        raise OSError("its saved_model.pb is damaged: it cannot be parsed") from error
    found = [list(graph.meta_info_def.tags) for graph in saved.meta_graphs]
    if not found:
        raise OSError("its saved_model.pb holds no graph")
    return next((of for of in found if of == ["serve"]), found[0])


def signature(found: Any, entry: str) -> Any:
    """The signature asked for, that for serving, or the only one. Raises ValueError."""
    usable = {name: of for name, of in found.items() if not name.startswith("_") and of.inputs and of.outputs}
    if not usable:
        raise ValueError("it has no signature that says what goes in and comes out; save it with one: "
                         "tf.saved_model.save(model, FOLDER, signatures=model.function)")  # fmt: skip
    names = ", ".join(sorted(usable))
    if entry and entry not in usable:
        raise ValueError(f"it has no signature {entry}; it has: {names}")
    if not entry and DEFAULT not in usable and len(usable) != 1:
        raise ValueError(f"say which of its signatures with --entry NAME; it has: {names}")
    return usable[entry or (DEFAULT if DEFAULT in usable else next(iter(usable)))]


def from_graph(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Imports a frozen GraphDef into the graph at hand: inputs are its placeholders, outputs what no operator reads."""
    from google.protobuf.message import DecodeError

    definition = tf.compat.v1.GraphDef()
    try:
        with open(path, "rb") as file:
            definition.ParseFromString(file.read())
        tf.import_graph_def(definition, name="")
    except (DecodeError, ValueError) as error:
        raise OSError(f"it is no frozen graph of TensorFlow: {reason(error)}") from error
    operations = tf.compat.v1.get_default_graph().get_operations()
    takes = {op.name: op.outputs[0].name for op in operations if op.type == "Placeholder"}
    ends = [op for op in operations if op.inputs and op.outputs and not any(out.consumers() for out in op.outputs)]
    return takes, {op.name: op.outputs[0].name for op in ends}


def reason(error: Exception) -> str:
    """The first line of what TensorFlow says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
