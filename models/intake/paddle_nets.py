"""The networks in PaddlePaddle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from models.extras import need
from models.intake.weights import BLOCKS, EPSILON, Weights, shape


def resnet(weights: Weights) -> Any:
    """A residual network, (n, 3, 16, 16) -> (n, 10)."""
    paddle = need("paddle")
    nn = paddle.nn

    class Block(nn.Layer):  # type: ignore[name-defined]
        def __init__(self, name: str, into: int, out: int, stride: int) -> None:
            super().__init__()
            self.one, self.two = _conv(weights, f"{name}.one", stride, 1), _conv(weights, f"{name}.two", 1, 1)
            self.short = _conv(weights, f"{name}.short", stride, 0) if stride > 1 else nn.Identity()

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.two(nn.functional.relu(self.one(x))) + self.short(x))

    blocks = [Block(name, *sizes) for name, sizes in BLOCKS.items()]
    layers = (_conv(weights, "stem", 1, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2D(1), nn.Flatten(), _dense(weights, "head"))
    return nn.Sequential(*layers)


def mlp(weights: Weights) -> Any:
    """Dense layers, (n, 12) -> (n, 5)."""
    nn = need("paddle").nn
    one, two, three = (_dense(weights, name) for name in ("one", "two", "three"))
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three)


def save(name: str, weights: Weights, folder: Path) -> str:
    """Writes an inference folder: inference.json, or inference.pdmodel before PaddlePaddle 3, and inference.pdiparams."""
    paddle = need("paddle")
    network = {"resnet": resnet, "mlp": mlp}[name](weights)
    network.eval()
    given = paddle.static.InputSpec(list(shape(name, None)), "float32", "x")
    paddle.jit.save(network, str(folder / name / "inference"), input_spec=[given])
    return str(folder / name)


def _conv(weights: Weights, name: str, stride: int, padding: int) -> Any:
    nn = need("paddle").nn
    weight = weights[f"{name}.weight"]
    conv = nn.Conv2D(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding, bias_attr=False)
    norm = nn.BatchNorm2D(len(weight), epsilon=EPSILON)
    conv.weight.set_value(weight)
    for theirs, ours in {"weight": "gain", "bias": "offset", "_mean": "mean", "_variance": "variance"}.items():
        getattr(norm, theirs).set_value(weights[f"{name}.{ours}"])
    return nn.Sequential(conv, norm)


def _dense(weights: Weights, name: str) -> Any:
    weight = weights[f"{name}.weight"].T
    dense = need("paddle").nn.Linear(*weight.shape)
    dense.weight.set_value(weight)
    dense.bias.set_value(weights[f"{name}.bias"])
    return dense


if __name__ == "__main__":
    print(save(sys.argv[1], dict(np.load(sys.argv[2])), Path(sys.argv[3])))
