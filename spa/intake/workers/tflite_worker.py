"""TFLite (LiteRT) files. `serve.py` says what a worker is.

Quantised networks stay quantised: each operator reads dequantised values and its result is quantised again, as pairs of QuantizeLinear and
DequantizeLinear.
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

import through_tf2onnx as bridge

MAGIC = b"TFL3"  # from the fifth byte on


def inputs(source: str, wish: Any) -> list[dict[str, Any]]:
    """What the network takes."""
    takes, _ = ends(interpreter(source))
    return [{"name": name, "dtype": of["dtype"].__name__, "shape": free(of)} for name, of in takes.items()]


def convert(source: str, target: str, wish: Any) -> None:
    """Writes the ONNX file."""
    opened = interpreter(source)
    names = {of["name"]: name for side in ends(opened) for name, of in side.items()}
    bridge.write(target, wish, tflite_path=source, names=names)


def outputs(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """The interpreter's own."""
    opened = ran(source, feeds)
    return {name: opened.get_tensor(of["index"]) for name, of in ends(opened)[1].items()}


def layers(source: str, feeds: Any, wish: Any) -> dict[str, Any]:
    """All real tensors that operators make, in their order."""
    opened = ran(source, feeds, experimental_preserve_all_tensors=True)
    made = [index for operator in opened._get_ops_details() for index in operator["outputs"]]
    details = {of["index"]: of for of in opened.get_tensor_details()}
    found = {}
    for index in made:
        if details[index]["dtype"].__name__.startswith("float"):
            found[details[index]["name"].removesuffix(":0")] = opened.get_tensor(index)
    return found


def interpreter(source: str, **options: Any) -> Any:
    """An interpreter of a file. Raises OSError."""
    with open(source, "rb") as file:
        if file.read(8)[4:] != MAGIC:
            raise OSError("it does not begin as TFLite files do")
    try:
        opened = bridge.tf.lite.Interpreter(model_path=source, num_threads=1, **options)
        opened.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise OSError(f"TFLite cannot load it: {' '.join(str(error).split())}") from error
    return opened


def ran(source: str, feeds: Any, **options: Any) -> Any:
    """An interpreter after a run."""
    opened = interpreter(source, **options)
    takes, _ = ends(opened)
    for name, of in takes.items():
        if tuple(of["shape"]) != feeds[name].shape:
            opened.resize_tensor_input(of["index"], feeds[name].shape)
    opened.allocate_tensors()
    for name, of in takes.items():
        opened.set_tensor(of["index"], feeds[name])
    opened.invoke()
    return opened


def ends(opened: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of the inputs and of the outputs, by the names of the only signature, else by those of the tensors."""
    takes, gives = opened.get_input_details(), opened.get_output_details()
    signatures = opened.get_signature_list()
    if len(signatures) != 1:
        return ({of["name"].removesuffix(":0"): of for of in side} for side in (takes, gives))  # type: ignore[return-value]
    runner = opened.get_signature_runner(next(iter(signatures)))
    return named(takes, runner.get_input_details()), named(gives, runner.get_output_details())


def named(details: Any, by_signature: Any) -> dict[str, Any]:
    """Tensors in the file's order, by the names of a signature; what it leaves out keeps its own."""
    names = {of["index"]: name for name, of in by_signature.items()}
    return {names.get(of["index"], of["name"].removesuffix(":0")): of for of in details}


def free(details: Any) -> list[int | None]:
    """Sizes of a tensor, None where they are free."""
    signature = details.get("shape_signature")
    sizes = details["shape"] if signature is None or not len(signature) else signature
    return [int(size) if size >= 0 else None for size in sizes]
