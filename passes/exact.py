"""Passes that carry out exact rewrites: constants take other values, biases that are zero go, a branch becomes several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes.weights import Weight


def replace_constants(graph: gs.Graph, values: Mapping[str, NDArray[Any]]) -> int:
    """Gives stored tensors other values of the same shape and type.

    before -> after: queries W_q x, keys W_k y -> (T_q W_q) x, (T_k W_k) y with T_qᵀ T_k = 1, which have the same products.
    Returns the number of tensors that held anything else before.
    """
    changed: set[str] = set()
    seen: set[int] = set()
    for node in graph.nodes:
        held = node.attrs.get("value") if node.op == "Constant" else None
        named = [(t.name, t) for t in node.inputs] + ([(node.outputs[0].name, held)] if held is not None else [])
        for name, tensor in named:
            if name not in values or not isinstance(tensor, gs.Constant) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            before = tensor._values
            before = before.load() if isinstance(before, Weight) else tensor.values
            new = np.asarray(values[name], order="C")
            if new.shape != before.shape or new.dtype != before.dtype:
                raise ValueError(f"{name} is {before.dtype} {before.shape}, its new values are {new.dtype} {new.shape}")
            if not np.array_equal(before, new):
                tensor._values = new
                changed.add(name)
    return len(changed)


def drop_biases(graph: gs.Graph, biases: Mapping[str, int | None]) -> int:
    """Removes biases that are zero, of nodes that are named by their first output: input number `slot`, or None for an Add as a whole.

    before -> after: Conv(x, w, 0) -> Conv(x, w); y = Add(MatMul(x, w), 0) -> y = MatMul(x, w), where y keeps its name. The inverse of
    `insert_biases`; a bias that is not zero stays. Returns the number of biases that went.
    """
    dropped = 0
    for node in list(graph.nodes):
        name = node.outputs[0].name if node.outputs else ""
        if name not in biases:
            continue
        slot = biases[name]
        if slot is not None:
            if slot >= len(node.inputs) or not _is_zero(node.inputs[slot]):
                continue
            if slot == len(node.inputs) - 1:
                del node.inputs[slot]
            else:
                node.inputs[slot] = gs.Variable.empty()
            dropped += 1
        elif node.op == "Add":
            zeros = [i for i, t in enumerate(node.inputs) if _is_zero(t)]
            if len(zeros) != 1 or not node.inputs[1 - zeros[0]].inputs:
                continue
            maker, before = node.inputs[1 - zeros[0]].inputs[0], node.inputs[1 - zeros[0]]
            out = node.outputs[0]
            if len(before.outputs) != 1 or any(t is before for t in graph.outputs):
                continue
            node.inputs.clear()
            node.outputs.clear()
            maker.outputs[[t is before for t in maker.outputs].index(True)] = out
            graph.nodes.remove(node)
            dropped += 1
    return dropped


def _is_zero(tensor: gs.Tensor) -> bool:
    held: Any = tensor
    if isinstance(tensor, gs.Variable) and tensor.inputs and tensor.inputs[0].op == "Constant":
        held = tensor.inputs[0].attrs.get("value")
    if not isinstance(held, gs.Constant):
        return False
    values = held._values.load() if isinstance(held._values, Weight) else held.values
    return not np.asarray(values, np.float64).any()
