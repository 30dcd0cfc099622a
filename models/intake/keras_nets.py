"""The networks in Keras 3, channels last; any backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from models.extras import need
from models.intake.weights import BLOCKS, EPSILON, Weights, shape


def resnet(weights: Weights) -> Any:
    """A residual network, (n, 16, 16, 3) -> (n, 10)."""
    keras = need("keras")
    x = start = keras.Input(shape("resnet", last=True)[1:])
    x = keras.layers.ReLU()(_conv(weights, "stem", 1, x))
    for name, (_, _, stride) in BLOCKS.items():
        y = keras.layers.ReLU()(_conv(weights, f"{name}.one", stride, x))
        y = _conv(weights, f"{name}.two", 1, y)
        x = keras.layers.ReLU()(keras.layers.Add()([y, _conv(weights, f"{name}.short", stride, x) if stride > 1 else x]))
    return keras.Model(start, _dense(weights, "head", keras.layers.GlobalAveragePooling2D()(x)), name="resnet")


def mlp(weights: Weights) -> Any:
    """Dense layers, (n, 12) -> (n, 5)."""
    keras = need("keras")
    x = start = keras.Input(shape("mlp")[1:])
    x = _dense(weights, "one", x, "relu")
    x = _dense(weights, "two", x, "relu")
    return keras.Model(start, _dense(weights, "three", x), name="mlp")


def save(name: str, weights: Weights, folder: Path) -> str:
    """Writes a .keras file."""
    {"resnet": resnet, "mlp": mlp}[name](weights).save(folder / f"{name}.keras")
    return str(folder / f"{name}.keras")


def save_for_jax(name: str, weights: Weights, folder: Path) -> str:
    """Writes the weights, and a file of Python that builds the network, whose backend has to be JAX."""
    np.savez(folder / f"keras_{name}.npz", **weights)  # type: ignore[arg-type]
    (folder / f"keras_{name}.py").write_text(
        "import os\nos.environ['KERAS_BACKEND'] = 'jax'\nimport jax\nimport numpy as np\nfrom pathlib import Path\n"
        "from models.intake import keras_nets\n\n\n"
        f"def network():\n    return keras_nets.{name}(dict(np.load(Path(__file__).parent / 'keras_{name}.npz')))\n"
    )
    return f"{folder / f'keras_{name}.py'}:network"


def _conv(weights: Weights, name: str, stride: int, x: Any) -> Any:
    keras = need("keras")
    kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
    if kernel.shape[0] > 1:  # "same" pads on one side only where the stride is 2
        x = keras.layers.ZeroPadding2D(1)(x)
    stem = name.replace(".", "_")
    conv = keras.layers.Conv2D(kernel.shape[-1], kernel.shape[:2], strides=stride, use_bias=False, name=f"{stem}_conv")
    norm = keras.layers.BatchNormalization(epsilon=EPSILON, name=f"{stem}_norm")
    y = norm(conv(x))
    conv.set_weights([kernel])
    norm.set_weights([weights[f"{name}.{part}"] for part in ("gain", "offset", "mean", "variance")])
    return y


def _dense(weights: Weights, name: str, x: Any, activation: str | None = None) -> Any:
    keras = need("keras")
    kernel = weights[f"{name}.weight"].T
    dense = keras.layers.Dense(kernel.shape[1], activation=activation, name=name)
    y = dense(x)
    dense.set_weights([kernel, weights[f"{name}.bias"]])
    return y


if __name__ == "__main__":
    print(save(sys.argv[1], dict(np.load(sys.argv[2])), Path(sys.argv[3])))
