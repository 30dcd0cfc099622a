"""The networks in torch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from models.extras import need
from models.intake.weights import BLOCKS, EPSILON, Weights, shape


def resnet(weights: Weights) -> Any:
    """A residual network, (n, 3, 16, 16) -> (n, 10)."""
    torch = need("torch")
    nn = torch.nn

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self, name: str, into: int, out: int, stride: int) -> None:
            super().__init__()
            self.one, self.two = _conv(weights, f"{name}.one", stride, 1), _conv(weights, f"{name}.two", 1, 1)
            self.short = _conv(weights, f"{name}.short", stride, 0) if stride > 1 else nn.Identity()

        def forward(self, x: Any) -> Any:
            return torch.relu(self.two(torch.relu(self.one(x))) + self.short(x))

    blocks = [Block(name, *sizes) for name, sizes in BLOCKS.items()]
    layers = (_conv(weights, "stem", 1, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _dense(weights, "head"))
    return nn.Sequential(*layers).eval()


def mlp(weights: Weights) -> Any:
    """Dense layers, (n, 12) -> (n, 5)."""
    nn = need("torch").nn
    one, two, three = (_dense(weights, name) for name in ("one", "two", "three"))
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three).eval()


def save(name: str, weights: Weights, folder: Path) -> str:
    """Writes an exported program of any batch."""
    torch = need("torch")
    module = {"resnet": resnet, "mlp": mlp}[name](weights)
    example = torch.zeros(shape(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, folder / f"{name}.pt2")
    return str(folder / f"{name}.pt2")


def _conv(weights: Weights, name: str, stride: int, padding: int) -> Any:
    torch = need("torch")
    weight = torch.tensor(weights[f"{name}.weight"])
    conv = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], stride, padding, bias=False)
    norm = torch.nn.BatchNorm2d(len(weight), eps=EPSILON)
    conv.weight.data = weight
    for theirs, ours in {"weight": "gain", "bias": "offset", "running_mean": "mean", "running_var": "variance"}.items():
        getattr(norm, theirs).data = torch.tensor(weights[f"{name}.{ours}"])
    return torch.nn.Sequential(conv, norm)


def _dense(weights: Weights, name: str) -> Any:
    torch = need("torch")
    weight, bias = torch.tensor(weights[f"{name}.weight"]), torch.tensor(weights[f"{name}.bias"])
    dense = torch.nn.Linear(weight.shape[1], weight.shape[0])
    dense.weight.data, dense.bias.data = weight, bias
    return dense


if __name__ == "__main__":
    print(save(sys.argv[1], dict(np.load(sys.argv[2])), Path(sys.argv[3])))
