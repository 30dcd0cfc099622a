"""Feeds: inputs that a model accepts, drawn when the user has none. Ids stay inside the tables that they index."""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from spa.trace import Traced

Feeds = dict[str, NDArray[np.generic]]


def draw(traced: Traced, *, seed: int = 0) -> Feeds:
    """One batch of inputs under the shapes that tracing assumed.

    Floats are standard normal; whole numbers that end up as indices of an axis are drawn below its length, all others are
    ones (masks, lengths); booleans are true.
    """
    rng = np.random.default_rng(seed)
    limits = _limits(traced)
    feeds: Feeds = {}
    for tensor in traced.graph.inputs:
        shape = traced.facts.shapes.get(tensor.name) or ()
        kind = traced.facts.types.get(tensor.name, onnx.TensorProto.FLOAT)
        if kind == onnx.TensorProto.STRING:
            feeds[tensor.name] = np.full(shape, "a", object)
            continue
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        if np.issubdtype(dtype, np.integer):
            top = limits.get(tensor.name)
            feeds[tensor.name] = (np.ones(shape) if top is None else rng.integers(0, top, shape)).astype(dtype)
        elif dtype == np.bool_:
            feeds[tensor.name] = np.ones(shape, bool)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(np.float32).astype(dtype)
    return feeds


def _limits(traced: Traced) -> Mapping[str, int]:
    """Smallest length among the axes that an integer input's values index."""
    names = {t.name for t in traced.graph.inputs}
    flow: nx.DiGraph = nx.DiGraph()
    limits: dict[str, int] = {}
    readers = []
    for node in traced.nodes:
        signature = node.signature
        holds = signature is not None and "holds positions" in signature.causes.values()
        for k, tensor in enumerate(node.node.inputs):
            for out in node.node.outputs:
                flow.add_edge(tensor.name, out.name)
            if holds and k == 1 and signature is not None and tensor.name:
                axis = node.dims.get("row")
                if axis is not None:
                    readers.append((tensor.name, axis.length))
    for name, length in readers:
        if name not in flow:
            continue
        for source in ({name} | nx.ancestors(flow, name)) & names:
            limits[source] = min(limits.get(source, length), length)
    return {n: max(limit, 1) for n, limit in limits.items()}
