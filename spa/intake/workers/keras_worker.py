"""Keras networks in `.keras` and `.h5` files, of Keras 3, or of Keras 2 as far as Keras 3 reads that. `serve.py` says what a worker is.

Where Keras 3 does not, and the package tf_keras (Keras 2) is there, that reads it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import zipfile
from typing import Any

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

import through_tf2onnx as bridge

tf = bridge.tf
_CODE = re.compile(r"Lambda|safe_mode|enable_unsafe_deserialization|arbitrary code", re.IGNORECASE)
_NO_CLASS = re.compile(r"(?:Could not locate class '|Unknown (?:layer|object): '?\"?)(\w+)")
_NO_NETWORK = re.compile(r"No model config found|model_config|config\.json")


def inputs(source: str, wish: Any) -> list[dict[str, Any]]:
    """What the network takes."""
    return taken(network(source, bool(wish.get("trust"))))


def convert(source: str, target: str, wish: Any) -> None:
    """Writes the ONNX file."""
    write(network(source, bool(wish.get("trust"))), target, wish)


def outputs(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """Keras' own."""
    return results(network(source, bool(wish.get("trust"))), feeds)


def layers(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """What each layer gives, in their order."""
    return between(network(source, bool(wish.get("trust"))), feeds)


@functools.lru_cache(maxsize=1)
def network(source: Any, trust: bool) -> Any:
    """The network in a file, or one that lives in this process. Raises OSError, ValueError."""
    import keras

    if keras.backend.backend() != "tensorflow":
        raise ValueError(f"it runs on {keras.backend.backend()}; save it with model.save(FILE), which TensorFlow opens")
    try:
        model = source if not isinstance(source, str) else keras.saving.load_model(source, compile=False, safe_mode=not trust)
    except Exception as error:  # whatever Keras' own and foreign layers raise
        model = by_keras_2(source, trust)
        if model is None:
            raise refusal(error) from error
    if not getattr(model, "inputs", None):
        raise ValueError("it does not say what its inputs are; build it with a keras.Input, call it once before saving, or save it with "
                         "model.export(FOLDER), which spa reads too")  # fmt: skip
    return model


def by_keras_2(source: str, trust: bool) -> Any:
    """The same by tf_keras; None where that is absent or fails too."""
    if importlib.util.find_spec("tf_keras") is None:
        return None
    try:
        return importlib.import_module("tf_keras").models.load_model(source, compile=False, safe_mode=not trust)
    except Exception:  # its sentence would be of less use than that of Keras 3
        return None


def refusal(error: Exception) -> Exception:
    """Whose fault it is that a file cannot be loaded, in a sentence."""
    text = " ".join(str(error).split())
    missing = _NO_CLASS.search(text)
    if missing is not None:
        return ValueError(f"its class {missing[1]} is none of Keras' own, so its code is not in the file; where that code is, "
                          "model.export(FOLDER) writes a SavedModel, which spa reads")  # fmt: skip
    if _CODE.search(text):
        return ValueError("it holds Python code (a Lambda layer), which loading would run; --trust allows it")
    if isinstance(error, OSError | zipfile.BadZipFile) or not _NO_NETWORK.search(text):
        return OSError(f"Keras cannot load it: {text or type(error).__name__}; if Keras 2 wrote it, pip install tf_keras helps")
    return OSError("it holds weights alone, not the network; save that with model.save(FILE)")


def names_of(tensors: Any) -> list[str]:
    """Names of inputs or outputs: those of the layers that make them, each once."""
    found: list[str] = []
    for tensor in tensors:
        history = getattr(tensor, "_keras_history", None)
        name = getattr(getattr(history, "operation", getattr(history, "layer", None)), "name", None) or tensor.name
        found.append(name if name not in found else f"{name}_{len(found)}")
    return found


def taken(model: Any) -> list[dict[str, Any]]:
    """What a network takes."""
    return [
        {"name": name, "dtype": tf.as_dtype(tensor.dtype).as_numpy_dtype.__name__, "shape": list(tensor.shape)}
        for name, tensor in zip(names_of(model.inputs), model.inputs, strict=True)
    ]


def called(model: Any, arrays: Any) -> Any:
    """A network's outputs in a list, of inputs in a list."""
    structure = getattr(model, "input", None)
    fed = tf.nest.pack_sequence_as(structure, list(arrays)) if isinstance(structure, dict | list | tuple) else arrays[0]
    return tf.nest.flatten(model(fed, training=False))


def write(model: Any, target: str, wish: Any) -> None:
    """Writes the ONNX file of a network; shapes that the user gave take the place of free sizes."""
    takes, gives = taken(model), names_of(model.outputs)
    shapes = bridge.asked(wish, [e["name"] for e in takes])
    specs = [tf.TensorSpec(shapes.get(e["name"], e["shape"]), e["dtype"], name=f"input_{k}") for k, e in enumerate(takes)]
    concrete = tf.function(lambda *arrays: called(model, arrays), input_signature=specs).get_concrete_function()
    reads = [tensor.name for tensor in concrete.inputs[: len(specs)]]  # behind them are variables and constants that it captured
    makes = [tensor.name for tensor in concrete.outputs]
    graph, tables = frozen(model, concrete, reads, makes)
    names = dict(zip(reads, (e["name"] for e in takes), strict=True))
    names.update((at, name if name not in names.values() else f"{name}_output") for at, name in zip(makes, gives, strict=True))
    weights = {getattr(w, "path", w.name.removesuffix(":0")): w.numpy() for w in model.weights}
    bridge.write(target, wish, graph=graph, input_names=reads, output_names=makes, tensors_to_rename=names, initialized_tables=tables,
                 weights=weights)  # fmt: skip


def frozen(model: Any, concrete: Any, reads: list[str], makes: list[str]) -> tuple[Any, Any]:
    """A traced call with its variables made constants, and its lookup tables."""
    try:
        with tf.device("/cpu:0"):
            graph, tables = bridge.tf_loader.from_trackable(model, concrete, reads, makes, False)
        return bridge.simplified(graph, reads, makes), tables
    except ValueError as error:
        raise bridge.too_large(error) from error


def results(model: Any, feeds: Any) -> dict[str, Any]:
    """What a network gives, by the names that `write` gives its outputs."""
    takes = [entry["name"] for entry in taken(model)]
    names = [name if name not in takes else f"{name}_output" for name in names_of(model.outputs)]
    made = called(model, [tf.constant(feeds[name]) for name in takes])
    return {name: value.numpy() for name, value in zip(names, made, strict=True)}


def between(model: Any, feeds: Any) -> dict[str, Any]:
    """What each layer of a network gives, in their order; of layers that were called more than once, nothing."""
    made = {layer.name: layer.output for layer in model.layers if one_output(layer)}
    inner = type(model)(model.inputs, made) if "Functional" in type(model).__name__ else functional(model, made)
    found = inner(tf.nest.pack_sequence_as(model.inputs, [tf.constant(feeds[e["name"]]) for e in taken(model)]), training=False)
    return {name: value.numpy() for name, value in found.items()}


def functional(model: Any, made: dict[str, Any]) -> Any:
    """A network that gives other outputs of the same layers."""
    package = importlib.import_module(type(model).__module__.split(".")[0])
    return package.Model(model.inputs, made)


def one_output(layer: Any) -> bool:
    """Whether a layer was called once, and gave one tensor."""
    try:
        return bool(tf.as_dtype(layer.output.dtype).is_floating)
    except (AttributeError, ValueError, RuntimeError, TypeError):
        return False
