"""A node run by itself, in onnx's reference evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter


def opsets_of(graph: gs.Graph) -> dict[str, int]:
    """Domain -> version."""
    return {d.domain: d.version for d in graph.import_domains or ()} or {"": graph.opset}


def evaluated(node: gs.Node, feeds: Mapping[str, NDArray[Any]], opsets: Mapping[str, int]) -> NDArray[Any] | None:
    """The node's first output on its inputs; None where the evaluator lacks the operator or does not get through."""
    try:
        graph = helper.make_graph(
            [OnnxExporter.export_node(node)], "one", [_info(n, np.asarray(v)) for n, v in feeds.items()],
            [helper.make_empty_tensor_value_info(t.name) for t in node.outputs[:1]],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in opsets.items()])
        with np.errstate(all="ignore"):
            results: Any = ReferenceEvaluator(model).run(None, dict(feeds))
        return np.asarray(results[0])
    except Exception:  # the reference evaluator has gaps; what it does not compute is unknown
        return None


def _info(name: str, value: NDArray[Any]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
