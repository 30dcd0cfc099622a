"""The pass that multiplies the outputs of linear maps by a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.weights import Weight


def mix_outputs(graph: gs.Graph, maps: Mapping[str, Mapping[str, int]], matrix: NDArray[np.generic]) -> int:
    """Multiplies stored operands along one axis by a matrix (old, new), in float64. Not idempotent: told once, done once.

    maps: node, by its first output -> input number, as text -> axis.

    before -> after: y = Gemm(x, W, b) -> y = Gemm(x, W T, b T). An operand that other nodes read too is copied first. Returns the number
    of operands. Raises KeyError for nodes that are not there, ValueError for operands that are not stored or of another size.
    """
    made = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
    taken = set(graph.tensors())
    count = 0
    for name, inputs in maps.items():
        node = made[name]
        for number, axis in inputs.items():
            old = node.inputs[int(number)]
            if not isinstance(old, gs.Constant) or old.shape[axis] != len(matrix):
                raise ValueError(f"operand {number} of {name!r} is no stored tensor with {len(matrix)} positions on axis {axis}")
            values = _mixed(old, axis, np.asarray(matrix, np.float64))
            if len(old.outputs) == 1:
                old._values = values
            else:
                node.inputs[int(number)] = gs.Constant(_fresh(f"{old.name}/mixed", taken), values)
            count += 1
    return count


def _mixed(tensor: gs.Constant, axis: int, matrix: NDArray[np.float64]) -> NDArray[Any]:
    held = tensor._values
    values = np.asarray(held.load() if isinstance(held, Weight) else tensor.values)
    mixed = np.moveaxis(np.tensordot(values.astype(np.float64), matrix, axes=(axis, 0)), -1, axis)
    return np.ascontiguousarray(mixed.astype(values.dtype))


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
