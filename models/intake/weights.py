"""Weights of the networks, and their shapes: all elements of a tensor differ, so that no wrong index can hide."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]
EPSILON = 1e-5  # of the normalisations
IMAGE = (3, 16, 16)  # channels, height, width
FEATURES = 12
BLOCKS = {"first": (8, 8, 1), "second": (8, 16, 2)}  # name -> channels in, channels out, stride


def resnet(seed: int = 0) -> Weights:
    """A stem, a block whose shortcut is the identity, one that halves the picture, a pooled classifier."""
    draw = np.random.default_rng(seed)
    made = {**_conv(draw, "stem", 3, 8, 3)}
    for name, (into, out, stride) in BLOCKS.items():
        made |= _conv(draw, f"{name}.one", into, out, 3) | _conv(draw, f"{name}.two", out, out, 3)
        if stride > 1:
            made |= _conv(draw, f"{name}.short", into, out, 1)
    return made | _dense(draw, "head", 16, 10)


def mlp(seed: int = 0) -> Weights:
    """Three dense layers."""
    draw = np.random.default_rng(seed)
    return _dense(draw, "one", FEATURES, 32) | _dense(draw, "two", 32, 24) | _dense(draw, "three", 24, 5)


def shape(name: str, batch: int | None = 2, *, last: bool = False) -> tuple[Any, ...]:
    """Shape of a network's input; `last` puts channels last."""
    if name == "mlp":
        return batch, FEATURES
    channels, height, width = IMAGE
    return (batch, height, width, channels) if last else (batch, channels, height, width)


def _conv(draw: np.random.Generator, name: str, into: int, out: int, kernel: int) -> Weights:
    """A convolution without a bias, and its normalisation."""
    weight = draw.normal(size=(out, into, kernel, kernel)) * (2 / (into * kernel**2)) ** 0.5
    norm = {"gain": draw.uniform(0.5, 1.5, out), "offset": 0.1 * draw.normal(size=out),
            "mean": 0.1 * draw.normal(size=out), "variance": draw.uniform(0.5, 1.5, out)}  # fmt: skip
    return {f"{name}.weight": weight.astype(np.float32), **{f"{name}.{n}": a.astype(np.float32) for n, a in norm.items()}}


def _dense(draw: np.random.Generator, name: str, into: int, out: int) -> Weights:
    weight = draw.normal(size=(out, into)) * (2 / into) ** 0.5
    return {f"{name}.weight": weight.astype(np.float32), f"{name}.bias": (0.1 * draw.normal(size=out)).astype(np.float32)}
