"""Small models that engines are tried on."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from test_trace import net

import spa

X = {"x": np.ones((2, 4), np.float32)}


def small():
    return spa.load(net("float[2,4] x -> float[2,5] y", "y = MatMul(x, w1)", w1=(4, 5)))


def quantised():
    """x -> quantise -> dequantise -> product with a dequantised weight."""
    tensors = {"s": np.float32(0.1), "z": np.uint8(128), "w": np.ones((4, 5), np.int8), "ws": np.float32(0.01)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["v"]), helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("y", [2, 5])))
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()])
    return spa.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
