"""Feeds: inputs that a model accepts, drawn when the user has none. Ids stay inside the tables that they index."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import networkx as nx
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from spa.graph.trace import Traced
from spa.signatures.arithmetic import KEEPS_VALUES

MOST_TRIES = 100
Feeds = dict[str, NDArray[np.generic]]


def draw(traced: Traced, *, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Feeds:
    """One batch of inputs under the shapes that tracing assumed, or under other ones.

    Floats are standard normal; whole numbers that end up as indices of an axis are drawn below its length, all others are
    ones (masks, lengths); booleans are true.
    """
    rng = np.random.default_rng(seed)
    limits = _limits(traced)
    feeds: Feeds = {}
    for tensor in traced.graph.inputs:
        shape = (shapes or {}).get(tensor.name) or traced.facts.shapes.get(tensor.name) or ()
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


def free_batch(traced: Traced) -> int:
    """The size that was assumed for a batch axis that all inputs leave free, 1 if there is none."""
    sizes = set()
    for tensor in traced.graph.inputs:
        shape = traced.facts.shapes.get(tensor.name)
        if not shape:
            continue
        declared = (tensor.shape or [None])[0]
        sizes.add(0 if isinstance(declared, int) and declared > 0 else shape[0])
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else 1


def one_sample(traced: Traced, feeds: Feeds) -> Feeds:
    """The first sample of each feed, where the batch size is free."""
    batch = free_batch(traced)
    return {n: v[:1] if batch > 1 and v.ndim and v.shape[0] == batch else v for n, v in feeds.items()}


def shapes_to_try(traced: Traced) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes that tracing assumed, then others: a free size may be too short for a window, or only work as one."""
    assumed = {t.name: traced.facts.shapes.get(t.name) or () for t in traced.graph.inputs}
    yield assumed
    symbols: dict[str, list[tuple[str, int]]] = {}
    for tensor in traced.graph.inputs:
        for axis, size in enumerate(tensor.shape or [None] * len(assumed[tensor.name])):
            if not isinstance(size, int) or size <= 0:
                symbols.setdefault(size if isinstance(size, str) and size else f"{tensor.name}.{axis}", []).append((tensor.name, axis))
    options = [(2, 1) if all(a == 0 for _, a in places) else (1, 512, 2, 64, 4096) for places in symbols.values()]
    for sizes in itertools.islice(itertools.product(*options), MOST_TRIES) if symbols else ():
        shapes = {n: list(s) for n, s in assumed.items()}
        for size, places in zip(sizes, symbols.values(), strict=True):
            for name, axis in places:
                shapes[name][axis] = size
        yield {n: tuple(s) for n, s in shapes.items()}


def _limits(traced: Traced) -> Mapping[str, int]:
    """Smallest length among the axes that an integer input's values index, as they are."""
    names = {t.name for t in traced.graph.inputs}
    flow: nx.DiGraph[str] = nx.DiGraph()
    limits: dict[str, int] = {}
    readers = []
    for node in traced.nodes:
        signature = node.signature
        for k, tensor in enumerate(node.node.inputs):
            if k == 0 and node.node.op in KEEPS_VALUES:  # ids through arithmetic could be anything: those inputs are ones
                flow.add_edges_from((tensor.name, out.name) for out in node.node.outputs)
            for dim, number in signature.picked.items() if signature is not None and tensor.name else ():
                if number == k and dim in node.dims:
                    readers.append((tensor.name, node.dims[dim].length))
    for name, length in readers:
        for source in ({name} | (nx.ancestors(flow, name) if name in flow else set())) & names:
            limits[source] = min(limits.get(source, length), length)
    return {n: max(limit, 1) for n, limit in limits.items()}
