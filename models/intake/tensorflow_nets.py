"""The networks of `keras_nets` in the other formats of TensorFlow: SavedModel, frozen graph, `.h5` and TFLite, also quantised."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from models.extras import need
from models.intake import keras_nets
from models.intake.weights import shape


def save(name: str, network: Any, folder: Path, kinds: list[str]) -> str:
    """Writes one file or folder of each kind; gives the last one's path."""
    writers = {"keras": network.save, "h5": network.save, "saved": lambda path: network.export(path, verbose=False), "pb": _frozen(network),
               "tflite": _tflite(network), "int8": _tflite(network, name)}  # fmt: skip
    path = ""
    for kind in kinds:
        path = str(folder / {"saved": f"{name}_saved", "int8": f"{name}_int8.tflite"}.get(kind, f"{name}.{kind}"))
        writers[kind](path)
    return path


def _frozen(network: Any) -> Any:
    tf = need("tensorflow")

    def write(path: str) -> None:
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

        call = tf.function(lambda x: network(x, training=False), input_signature=[tf.TensorSpec(network.inputs[0].shape, name="x")])
        graph = convert_variables_to_constants_v2(call.get_concrete_function()).graph
        Path(path).write_bytes(graph.as_graph_def().SerializeToString())

    return write


def _tflite(network: Any, quantised: str = "") -> Any:
    tf = need("tensorflow")

    def examples() -> Iterator[list[Any]]:
        rng = np.random.default_rng(0)
        for _ in range(4):
            yield [rng.normal(size=(1, *shape(quantised, last=True)[1:])).astype(np.float32)]

    def write(path: str) -> None:
        converter = tf.lite.TFLiteConverter.from_keras_model(network)
        if quantised:
            converter.optimizations, converter.representative_dataset = [tf.lite.Optimize.DEFAULT], examples
        Path(path).write_bytes(converter.convert())

    return write


if __name__ == "__main__":
    made = {"resnet": keras_nets.resnet, "mlp": keras_nets.mlp}[sys.argv[1]](dict(np.load(sys.argv[2])))
    print(save(sys.argv[1], made, Path(sys.argv[3]), sys.argv[4:] or ["keras", "h5", "saved", "pb", "tflite", "int8"]))
