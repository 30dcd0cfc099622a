"""Where the elements of a computed weight are stored: exporters put Transpose, Reshape or Cast between an initializer and its reader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from spa.graph.trace import Traced
from spa.signatures.arithmetic import MOVES, READS_SHAPE, REINTERPRETS

CASTS = frozenset({"Cast", "CastLike"})
FOLLOWED = ((MOVES - READS_SHAPE) | CASTS | REINTERPRETS) - {"Concat"}  # each element of the result is one of the first input


@dataclass(frozen=True)
class Place:
    """A value's elements in a stored tensor: `name`, and `index` of the value's shape into the flattened tensor (None: as they are)."""

    name: str
    index: NDArray[np.int64] | None

    def read(self, stored: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The value, from the stored tensor."""
        return stored.reshape(shape) if self.index is None else stored.reshape(-1)[self.index]

    def write(self, stored: NDArray[Any], value: NDArray[Any]) -> None:
        """Puts a new value into the stored tensor."""
        if self.index is None:
            stored[...] = value.reshape(stored.shape)
        else:
            stored.reshape(-1)[self.index.ravel()] = value.ravel()


def place_of(traced: Traced, value: str, makers: Mapping[str, gs.Node]) -> Place | None:
    """Where a value's elements are stored; None if it is computed, or holds an element twice."""
    if value in traced.constants:
        return Place(value, None)
    chain: list[gs.Node] = []
    source = value
    while source not in traced.constants:
        node = makers.get(source)
        if node is None or node.domain or node.op not in FOLLOWED or not node.inputs:
            return None
        if any(t.name and t.name not in traced.facts.values for t in node.inputs[1:]) and node.op not in CASTS:
            return None
        chain.append(node)
        source = node.inputs[0].name
    shape = traced.facts.shapes.get(source) or ()
    index: NDArray[Any] = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    for node in reversed(chain):
        wanted = source_output(node, chain, value)
        onward = moved(traced, node, index, wanted)
        if onward is None:
            return None
        index = onward
    held = np.zeros(math.prod(shape), bool)
    held[index.reshape(-1)] = True
    if np.count_nonzero(held) != index.size:
        return None
    return Place(source, index)


def source_output(node: gs.Node, chain: list[gs.Node], value: str) -> int:
    """Which output of a node of the chain leads on."""
    place = chain.index(node)
    name = value if place == 0 else chain[place - 1].inputs[0].name
    return next(i for i, t in enumerate(node.outputs) if t.name == name)


def moved(traced: Traced, node: gs.Node, index: NDArray[Any], output: int) -> NDArray[np.int64] | None:
    """Which element of its first input each element of an output is, if `index` numbers those; None where that can't be told."""
    if node.op in CASTS:
        return index
    opsets = {d.domain: d.version for d in traced.graph.import_domains or ()} or {"": traced.graph.opset}
    try:
        proto = OnnxExporter.export_node(node)
        graph = helper.make_graph(
            [proto], "moves", [helper.make_value_info(t.name, helper.make_tensor_type_proto(7, None)) for t in node.inputs if t.name],
            [helper.make_value_info(t.name, helper.make_tensor_type_proto(7, None)) for t in node.outputs if t.name],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in opsets.items()])
        feeds = {t.name: traced.facts.values[t.name] for t in node.inputs[1:] if t.name}
        results: Any = ReferenceEvaluator(model).run(None, {node.inputs[0].name: index, **feeds})
        return np.asarray(results[[i for i, t in enumerate(node.outputs) if t.name].index(output)], np.int64)
    except Exception:  # the reference evaluator has gaps; a weight that can't be followed is not repaired, and said to be so
        return None
