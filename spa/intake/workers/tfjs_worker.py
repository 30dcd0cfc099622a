"""TensorFlow.js: `model.json` with its shards, of layers models (Keras networks) and graph models (frozen graphs). `serve.py` says what a
worker is.

tf2onnx has a reader of graph models too; it stumbles over the hints of shapes that TF.js's converter writes today.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
import os
import sys
from typing import Any

import numpy as np

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

import keras_worker as as_keras
import tensorflow_worker as as_graph
import through_tf2onnx as bridge

tf = bridge.tf
FUSED = {"_FusedConv2D": "Conv2D", "_FusedMatMul": "MatMul", "FusedDepthwiseConv2dNative": "DepthwiseConv2dNative",
         "_FusedDepthwiseConv2dNative": "DepthwiseConv2dNative"}  # fmt: skip
"""What TF.js's converter fused biases and activations into."""
OWN = ("num_args", "fused_ops", "epsilon", "leakyrelu_alpha", "TArgs", "num_host_args", "use_cudnn_on_gpu", "filter_format")
"""Attributes that the fused operators have and the plain ones lack."""


def inputs(source: str, wish: Any) -> list[dict[str, Any]]:
    """What the network takes."""
    if is_layers(source):
        return as_keras.taken(network(source))
    definition, takes, _ = graph(source)
    with tf.Graph().as_default() as live:
        tf.import_graph_def(definition, name="")
        return [as_graph.described(name, live.get_tensor_by_name(at)) for name, at in takes.items()]


def convert(source: str, target: str, wish: Any) -> None:
    """Writes the ONNX file."""
    if is_layers(source):
        as_keras.write(network(source), target, wish)
        return
    definition, takes, gives = graph(source)
    shapes = {takes[name]: shape for name, shape in bridge.asked(wish, takes).items()}
    names = {at: name for side in (takes, gives) for name, at in side.items()}
    reads, makes = list(takes.values()), list(gives.values())
    bridge.write(target, wish, graph=bridge.simplified(definition, reads, makes), input_names=reads, output_names=makes,
                 tensors_to_rename=names, shape_override=shapes, weights=manifest(source)[1])  # fmt: skip


def outputs(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """What Keras or TensorFlow gives for the same network."""
    if is_layers(source):
        return as_keras.results(network(source), feeds)
    definition, takes, gives = graph(source)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(definition, name="")
        return as_graph.run(session, gives, {takes[name]: value for name, value in feeds.items()})


def layers(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """Intermediate results, in order of execution."""
    if is_layers(source):
        return as_keras.between(network(source), feeds)
    definition, takes, _ = graph(source)
    return as_graph.everything(definition, {takes[name]: value for name, value in feeds.items()})


def model_file(source: str) -> str:
    """The model.json of a folder, or the file itself."""
    return os.path.join(source, "model.json") if os.path.isdir(source) else source


@functools.lru_cache(maxsize=1)
def manifest(source: str) -> tuple[Any, dict[str, Any]]:
    """What model.json says, and the weights by name. Raises OSError."""
    path = model_file(source)
    try:
        said = json.loads(contents(path))
        groups = said["weightsManifest"]
        return said, {name: value for group in groups for name, value in weights(group, os.path.dirname(path))}
    except (KeyError, TypeError, ValueError) as error:
        raise OSError(f"it is damaged, or no model of TensorFlow.js: {error}") from error


def contents(path: str) -> bytes:
    """A file's bytes; TF Hub's are compressed without saying so."""
    with open(path, "rb") as file:
        raw = file.read()
    return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw


def weights(group: Any, folder: str) -> list[tuple[str, Any]]:
    """The weights of a group of shards."""
    data, at, found = b"".join(contents(os.path.join(folder, path)) for path in group["paths"]), 0, []
    for entry in group["weights"]:
        value, at = weight(entry, data, at)
        found.append((entry["name"], value))
    if at != len(data):
        raise ValueError(f"its shards hold {len(data)} bytes, and its weights take {at}")
    return found


def weight(entry: Any, data: bytes, at: int) -> tuple[Any, int]:
    """A weight from its place among the bytes, and where the next one begins. Quantised ones are scaled back."""
    count, quantised = math.prod(entry["shape"]), entry.get("quantization")
    if entry["dtype"] == "string":
        strings = []
        for _ in range(count):
            size = int.from_bytes(data[at : at + 4], "little")
            strings.append(data[at + 4 : at + 4 + size])
            at += 4 + size
        return np.array(strings, object).reshape(entry["shape"]), at
    stored = np.dtype((quantised or entry)["dtype"])
    value = np.frombuffer(data, stored, count, at).reshape(entry["shape"])
    if quantised and "scale" in quantised:
        value = value.astype(entry["dtype"]) * quantised["scale"] + quantised["min"]
    return value.astype(entry["dtype"]), at + count * stored.itemsize


def is_layers(source: str) -> bool:
    """Whether a model is a Keras network."""
    topology = manifest(source)[0]["modelTopology"]
    return "node" not in topology


# Layers models


@functools.lru_cache(maxsize=1)
def network(source: str) -> Any:
    """A layers model as a Keras network. Raises OSError, ValueError."""
    from keras.src.legacy.saving.saving_utils import model_from_config  # reads what Keras 2 wrote, as TF.js does

    said, values = manifest(source)
    topology = said["modelTopology"].get("model_config", said["modelTopology"])
    try:
        model = model_from_config(for_keras_3(json.loads(json.dumps(topology))))
        fill(model, values)
    except Exception as error:  # whatever Keras' own and foreign layers raise
        raise as_keras.refusal(error) from error
    return model


def for_keras_3(network: Any) -> Any:
    """A network's description as Keras 3 reads it, changed in place.

    Sequential models get an input layer, in place of a first layer that tells the shape; their calls inside another network are counted
    from 0, where Keras 2 counted from 1.
    """
    inner = network["config"]
    layers = inner if isinstance(inner, list) else inner.get("layers", [])
    for layer in layers:
        if "layers" in layer["config"] or isinstance(layer["config"], list):
            for_keras_3(layer)
    if network["class_name"] == "Sequential":
        first = layers[0]["config"]
        size = None if layers[0]["class_name"] == "InputLayer" else first.pop("batch_input_shape", None)
        if size is not None:
            start = {"name": f"{first['name']}_input", "batch_input_shape": size, "dtype": first.get("dtype", "float32")}
            layers.insert(0, {"class_name": "InputLayer", "config": start})
        return network
    sequential = {layer["config"].get("name") for layer in layers if layer["class_name"] == "Sequential"}
    calls = [call for layer in layers for node in layer["inbound_nodes"] for call in node]
    for call in (*calls, *inner["output_layers"]):
        if call[0] in sequential:
            call[1] -= 1
    return network


def fill(model: Any, values: Any) -> None:
    """Sets the weights of each layer that has some: they are called after the layer, and come in the order that Keras keeps them in."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            fill(layer, values)
        elif layer.weights:
            own = [value for name, value in values.items() if name.startswith(f"{layer.name}/")]
            layer.set_weights(own)


# Graph models


@functools.lru_cache(maxsize=1)
def graph(source: str) -> tuple[Any, dict[str, str], dict[str, str]]:
    """A graph model as a GraphDef, with the tensors of its inputs and outputs by name. Raises OSError."""
    from google.protobuf.json_format import ParseDict, ParseError

    said, values = manifest(source)
    definition = tf.compat.v1.GraphDef()
    try:
        ParseDict(plain(said["modelTopology"]), definition, ignore_unknown_fields=True)
    except ParseError as error:
        raise OSError(f"its graph is damaged: {error}") from error
    for node in definition.node:
        for hint in [key for key in node.attr if key.startswith("_")]:  # tf2onnx stumbles over those of TF.js's converter
            del node.attr[hint]
        if node.name in values and node.op == "Const":
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values[node.name], tf.as_dtype(node.attr["dtype"].type)))
    definition = unfused(definition)
    takes = {node.name: f"{node.name}:0" for node in definition.node if node.op == "Placeholder"}
    read = {name.split(":")[0].lstrip("^") for node in definition.node for name in node.input}
    gives = {node.name: f"{node.name}:0" for node in definition.node if node.name not in read and node.op != "Const"}
    signed = said.get("signature") or {}
    return definition, tensors(signed.get("inputs")) or takes, tensors(signed.get("outputs")) or gives


def unfused(definition: Any) -> Any:
    """The graph with plain operators in place of what TF.js's converter fused, and of its own Prelu."""
    made = type(definition)(versions=definition.versions, library=definition.library)
    for node in definition.node:
        if node.op in FUSED:
            unfuse(made, node)
        elif node.op == "Prelu":
            act(made, node.name, "Prelu", *node.input)
        else:
            made.node.add().CopyFrom(node)
    return made


def unfuse(made: Any, node: Any) -> None:
    """A fused operator as a plain one, and what follows it."""
    ops = [op.decode() for op in node.attr["fused_ops"].list.s if op != b"NoOp"]
    plain_one = made.node.add(name=f"{node.name}/plain" if ops else node.name, op=FUSED[node.op], input=node.input[:2])
    for key, value in node.attr.items():
        if key not in OWN:
            plain_one.attr[key].CopyFrom(value)
    plain_one.attr["T"].type = node.attr["T"].type or tf.float32.as_datatype_enum
    more, at = list(node.input[2:]), plain_one.name
    for place, op in enumerate(ops):
        operands = [more.pop(0)] if op in ("BiasAdd", "Prelu") else []
        name = node.name if place == len(ops) - 1 else f"{node.name}/{op}"
        act(made, name, op, at, *operands, alpha=node.attr["leakyrelu_alpha"].f)
        at = name


def act(made: Any, name: str, op: str, *operands: str, alpha: float = 0.0) -> None:
    """Adds a bias or an activation. Prelu is relu(x) - alpha * relu(-x)."""
    if op == "Prelu":
        value, slope = operands
        act(made, f"{name}/positive", "Relu", value)
        act(made, f"{name}/turned", "Neg", value)
        act(made, f"{name}/negative", "Relu", f"{name}/turned")
        act(made, f"{name}/scaled", "Mul", f"{name}/negative", slope)
        act(made, name, "Sub", f"{name}/positive", f"{name}/scaled")
        return
    node = made.node.add(name=name, op=op, input=operands)
    node.attr["T"].type = tf.float32.as_datatype_enum
    if op == "LeakyRelu":
        node.attr["alpha"].f = alpha


def tensors(side: Any) -> dict[str, str]:
    """The tensors of a signature's side by name."""
    found = {name: of["name"] for name, of in (side or {}).items()}
    return {name: at if ":" in at else f"{at}:0" for name, at in found.items()}


def plain(topology: Any) -> Any:
    """A graph as protobuf's JSON has it: old files hold strings as lists of bytes."""
    if isinstance(topology, list):
        return [plain(entry) for entry in topology]
    if not isinstance(topology, dict):
        return topology
    return {key: text(key, plain(value)) for key, value in topology.items()}


def text(key: str, value: Any) -> Any:
    """The value of a string's key."""
    if key == "s" and isinstance(value, list) and value and isinstance(value[0], int):
        return base64.b64encode(bytes(value)).decode()
    return value
