"""Float16 and bfloat16 models in float32, for the proof: what is to be proven is about the graph, not about rounding."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from passes import Weight, Widened
from passes.weights import PIECE_BYTES
from spa.graph.view import constant_of
from spa.plans.rewrite import copy_graph
from spa.proof.feeds import Feeds
from spa.storage.store import Model, with_graph

HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def widen(model: Model, feeds: Feeds) -> tuple[Model, Feeds]:
    """The model and its feeds with every half-precision tensor in float32; both as they were if there is none."""
    graph = copy_graph(model.graph)
    changed = False
    for tensor in graph.tensors().values():
        changed |= _widen_tensor(tensor)
    for node in graph.nodes:
        held = constant_of(node)
        if held is not None:
            changed |= _widen_tensor(held)
        for key, value in node.attrs.items():
            if key in ("to", "dtype", "output_dtype", "stash_type") and _number(value) in HALF:
                node.attrs[key] = onnx.TensorProto.FLOAT
                changed = True
            elif isinstance(value, gs.Constant) and value is not held:
                changed |= _widen_tensor(value)
    if not changed:
        return model, feeds
    wide = {k: v.astype(np.float32) if v.dtype.name in ("float16", "bfloat16") else v for k, v in feeds.items()}
    return with_graph(model, graph), wide


def _number(value: object) -> int:
    try:
        return int(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError):
        try:
            return int(helper.np_dtype_to_tensor_dtype(np.dtype(value)))  # type: ignore[call-overload]
        except (TypeError, KeyError, ValueError):
            return 0


def _widen_tensor(tensor: gs.Tensor) -> bool:
    if isinstance(tensor, gs.Constant):
        if np.dtype(tensor.dtype).name not in ("float16", "bfloat16"):
            return False
        values = tensor._values
        if isinstance(values, Weight) and values.nbytes > PIECE_BYTES:
            tensor._values = Widened(values)
        else:
            array = values.load() if isinstance(values, Weight) else tensor.values
            tensor._values = np.asarray(array).astype(np.float32)
        tensor._export_dtype = None
        return True
    if _number(tensor.dtype) in HALF:
        tensor.dtype = np.float32
        return True
    return False
