"""What `models.llama` builds graphs of: sizes, random weights that need not be held, and a builder that names what it adds."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

_BLOCK = 2_097_143  # a prime, so that rows of no length repeat


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes, and how the graph is written.

    layers, hidden, heads, kv_heads, mlp, vocab: as in a ``config.json``. head: width of a head, ``hidden // heads`` if None. cache: past
    keys and values go in, present ones come out. float16: weights and arithmetic, norms in float32. fused: contrib operators; always with
    cache. context: longest sequence of the fused rotary tables.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 176
    vocab: int = 256
    head: int | None = None
    cache: bool = False
    float16: bool = False
    fused: bool = False
    context: int = 4096

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.width % 2:
            raise ValueError(f"rotary embedding needs heads of even width, not {self.width}")

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.head or self.hidden // self.heads

    @property
    def type(self) -> int:
        """Of weights and activations, a ``TensorProto.DataType``."""
        return int(TensorProto.FLOAT16 if self.float16 else TensorProto.FLOAT)


@dataclass(frozen=True)
class RandomWeight:
    """A random tensor: mean + standard normal / sqrt(fan)."""

    name: str
    shape: tuple[int, ...]
    fan: float
    mean: float = 0.0

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def pieces(self, config: LlamaConfig, seed: int) -> Iterator[NDArray[Any]]:
        """The values, flat, in pieces of bounded size."""
        block = _values(self.fan, self.mean, config.float16, seed)
        at, left = zlib.crc32(self.name.encode()) % _BLOCK, self.count
        while left:
            piece = block[at : at + left]
            yield piece
            at, left = 0, left - len(piece)


@lru_cache(maxsize=8)
def _values(fan: float, mean: float, half: bool, seed: int) -> NDArray[Any]:
    drawn = np.random.default_rng(seed).standard_normal(_BLOCK, dtype=np.float32)
    return (drawn / np.float32(math.sqrt(fan)) + np.float32(mean)).astype(np.float16 if half else np.float32)


@dataclass
class Builder:
    """Collects nodes, small constants and random weights; methods add a node and give the name of its output."""

    config: LlamaConfig
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    weights: list[RandomWeight] = field(default_factory=list)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, outputs: Sequence[str] | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node; by default it has one output, named after it."""
        made = list(outputs or [f"{name}_output"])
        self.nodes.append(helper.make_node(op, list(inputs), made, name, domain=domain, **attributes))
        return made[0]

    def weight(self, name: str, *shape: int, fan: float, mean: float = 0.0) -> str:
        """Adds a random initializer."""
        self.weights.append(RandomWeight(name, shape, fan, mean))
        return name

    def ints(self, *values: int) -> str:
        """(n,) whole numbers."""
        return self.table(f"ints_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def scalar(self, value: float, kind: int | None = None) -> str:
        """A number, by default of the type of activations."""
        dtype = helper.tensor_dtype_to_np_dtype(self.config.type if kind is None else kind)
        return self.table(f"scalar_{value}_{dtype}", np.array(value, dtype))

    def table(self, name: str, values: NDArray[Any]) -> str:
        """A constant."""
        self.constants.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def size(self, value: str, axis: int, name: str) -> str:
        """(1,) the size of an axis at run time."""
        return self.node("Shape", [value], name, start=axis, end=axis + 1)

    def tensor(self, name: str, kind: int, shape: Sequence[int | str]) -> ValueInfoProto:
        """An input or output of the graph."""
        return helper.make_tensor_value_info(name, kind, shape)
