"""Operators of ONNX in torch, so that their gradients exist: one table, of which `spa.statistics.torch_graph` runs graphs."""

from spa.torch_ops import contraction, elementwise, layout, normalization, reduction, resize, sequence, window
from spa.torch_ops.table import TABLE, WAY_OUT, Call, Tensor, to_tensor, torch, torch_type

__all__ = [
    "TABLE", "WAY_OUT", "Call", "Tensor", "contraction", "elementwise", "layout", "normalization", "reduction", "resize", "sequence",
    "to_tensor", "torch", "torch_type", "window",
]  # fmt: skip
