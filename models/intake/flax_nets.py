"""The networks in Flax, channels last: modules of linen with their variables, and of nnx.

`spa convert models.intake.flax_nets:linen_resnet` calls `linen_resnet()`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from models.extras import need
from models.intake import weights as drawn
from models.intake.weights import BLOCKS, EPSILON, Weights


def resnet(weights: Weights) -> tuple[Any, dict[str, Any]]:
    """A residual network of linen and its variables, (n, 16, 16, 3) -> (n, 10)."""
    linen = need("flax.linen")

    class Conv(linen.Module):  # type: ignore[name-defined]
        features: int
        size: int
        stride: int

        @linen.compact
        def __call__(self, x: Any) -> Any:
            pad = ((self.size // 2,) * 2,) * 2
            x = linen.Conv(self.features, (self.size,) * 2, strides=self.stride, padding=pad, use_bias=False, name="conv")(x)
            return linen.BatchNorm(use_running_average=True, epsilon=EPSILON, name="norm")(x)

    class ResNet(linen.Module):  # type: ignore[name-defined]
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.relu(Conv(8, 3, 1, name="stem")(x))
            for name, (_, out, stride) in BLOCKS.items():
                y = Conv(out, 3, 1, name=f"{name}_two")(linen.relu(Conv(out, 3, stride, name=f"{name}_one")(x)))
                x = linen.relu(y + (Conv(out, 1, stride, name=f"{name}_short")(x) if stride > 1 else x))
            return linen.Dense(10, name="head")(x.mean(axis=(1, 2)))

    parameters: dict[str, Any] = {"head": _dense(weights, "head")}
    statistics: dict[str, Any] = {}
    for name in (n.removesuffix(".gain") for n in weights if n.endswith(".gain")):
        key = name.replace(".", "_")
        parameters[key] = {"conv": {"kernel": weights[f"{name}.weight"].transpose(2, 3, 1, 0)},
                           "norm": {"scale": weights[f"{name}.gain"], "bias": weights[f"{name}.offset"]}}  # fmt: skip
        statistics[key] = {"norm": {"mean": weights[f"{name}.mean"], "var": weights[f"{name}.variance"]}}
    return ResNet(), {"params": parameters, "batch_stats": statistics}


def mlp(weights: Weights) -> tuple[Any, dict[str, Any]]:
    """Dense layers of linen and their variables, (n, 12) -> (n, 5)."""
    linen = need("flax.linen")

    class Mlp(linen.Module):  # type: ignore[name-defined]
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.relu(linen.Dense(32, name="one")(x))
            return linen.Dense(5, name="three")(linen.relu(linen.Dense(24, name="two")(x)))

    return Mlp(), {"params": {name: _dense(weights, name) for name in ("one", "two", "three")}}


def nnx_mlp(weights: Weights) -> Any:
    """The dense layers as a module of nnx."""
    nnx = need("flax.nnx")

    class Mlp(nnx.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            for name in ("one", "two", "three"):
                dense = _dense(weights, name)
                layer = nnx.Linear(*dense["kernel"].shape, rngs=nnx.Rngs(0))
                layer.kernel[...], layer.bias[...] = dense["kernel"], dense["bias"]
                setattr(self, name, layer)

        def __call__(self, x: Any) -> Any:
            return self.three(nnx.relu(self.two(nnx.relu(self.one(x)))))

    return Mlp()


def linen_resnet() -> tuple[Any, dict[str, Any]]:
    """With the weights of seed 0."""
    return resnet(drawn.resnet())


def linen_mlp() -> tuple[Any, dict[str, Any]]:
    """With the weights of seed 0."""
    return mlp(drawn.mlp())


def nnx_network() -> Any:
    """With the weights of seed 0."""
    return nnx_mlp(drawn.mlp())


def save(name: str, weights: Weights, folder: Path) -> str:
    """Writes the weights, and a file of Python that builds the network with them."""
    np.savez(folder / f"{name}.npz", **weights)  # type: ignore[arg-type]
    (folder / f"flax_{name}.py").write_text(
        "import numpy as np\nfrom pathlib import Path\nfrom models.intake import flax_nets\n\n\n"
        f"def network():\n    return flax_nets.{name}(dict(np.load(Path(__file__).parent / '{name}.npz')))\n"
    )
    return f"{folder / f'flax_{name}.py'}:network"


def _dense(weights: Weights, name: str) -> dict[str, Any]:
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


if __name__ == "__main__":
    print(save(sys.argv[1], dict(np.load(sys.argv[2])), Path(sys.argv[3])))
