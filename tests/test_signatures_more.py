"""Cases that onnx's own lack: several channels, groups and heads, old operator sets, and ONNX Runtime's fused operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from signature_cases import Case, Outcome, examine, on_runtime, trace_case, with_initializers
from test_trace import net

import spa
from spa.plans.rewrite import rewrite
from spa.storage.store import load, to_proto, with_graph

MICROSOFT = "com.microsoft"
F = np.float32


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def case(name: str, op: str, *inputs: Any, opset: int = 23, domain: str = "", outputs: int = 1, kind: int = TensorProto.FLOAT,
         **attributes: Any) -> Case:
    """A case with one node: a tuple stands for random floats of this shape, an array for itself, None for an absent input."""
    rng = np.random.default_rng(sum(map(ord, name)))
    arrays = [rng.standard_normal(i).astype(F) if isinstance(i, tuple) else i for i in inputs]
    names = [f"x{k}" if a is not None else "" for k, a in enumerate(arrays)]
    node = helper.make_node(op, names, [f"y{k}" for k in range(outputs)], domain=domain, **attributes)
    graph = helper.make_graph(
        [node], name,
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
         for n, a in zip(names, arrays, strict=True) if n],
        [helper.make_tensor_value_info(f"y{k}", kind, None) for k in range(outputs)],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 21 else 10)
    return Case(name, model, tuple(a for a in arrays if a is not None))


def index(*shape: int, below: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape)


def positive(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.5, 1.5, shape).astype(F)


CONVOLUTIONS = [
    case("conv", "Conv", (2, 4, 5, 5), (6, 4, 3, 3), (6,)),
    case("conv of opset 7", "Conv", (2, 4, 5), (6, 4, 3), opset=7, pads=[1, 1]),
    case("conv, 3-D", "Conv", (1, 3, 4, 4, 4), (5, 3, 2, 2, 2), (5,), strides=[2, 2, 2]),
    case("conv, dilated", "Conv", (2, 4, 7, 7), (6, 4, 3, 3), dilations=[2, 2], auto_pad="SAME_UPPER"),
    case("conv, groups", "Conv", (2, 12, 5, 5), (9, 4, 3, 3), (9,), group=3),
    case("conv, depthwise", "Conv", (2, 6, 5, 5), (6, 1, 3, 3), (6,), group=6),
    case("conv, depthwise with multiplier", "Conv", (2, 4, 5, 5), (8, 1, 3, 3), (8,), group=4),
    case("transposed", "ConvTranspose", (2, 4, 3, 3), (4, 6, 3, 3), (6,), strides=[2, 2], output_padding=[1, 1]),
    case("transposed, groups", "ConvTranspose", (2, 6, 3, 3), (6, 4, 3, 3), (12,), group=3, pads=[1, 1, 1, 1]),
    case("transposed, output shape", "ConvTranspose", (2, 4, 3), (4, 6, 3), strides=[2], output_shape=[8]),
    case("deform", "DeformConv", (1, 4, 4, 4), (6, 4, 2, 2), (1, 8, 3, 3), (6,), (1, 4, 3, 3), opset=22),
    case("deform, groups", "DeformConv", (1, 4, 4, 4), (6, 2, 2, 2), (1, 8, 3, 3), (6,), opset=22, group=2),
    case("fused conv", "FusedConv", (2, 4, 5, 5), (6, 4, 3, 3), (6,), domain=MICROSOFT, activation="Relu"),
    case("fused conv with a sum", "FusedConv", (2, 4, 5, 5), (6, 4, 3, 3), (6,), (2, 6, 3, 3), domain=MICROSOFT, activation="Relu"),
    case("fused conv, groups", "FusedConv", (2, 8, 5, 5), (6, 4, 3, 3), (6,), domain=MICROSOFT, group=2,
         activation="LeakyRelu", activation_params=[0.1]),
    case("causal", "CausalConvWithState", (2, 4, 5), (4, 1, 3), (4,), (2, 4, 2), opset=27, outputs=2, activation="silu"),
]
PRODUCTS = [
    case("gemm", "Gemm", (3, 4), (4, 5), (5,)),
    case("gemm, both transposed", "Gemm", (4, 3), (5, 4), (3, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("gemm of opset 6", "Gemm", (3, 4), (4, 5), (5,), opset=6, broadcast=1),
    case("matmul, batches", "MatMul", (2, 1, 3, 4), (5, 4, 6)),
    case("matmul, vector", "MatMul", (4,), (2, 4, 3)),
    case("matmul by a vector", "MatMul", (2, 3, 4), (4,)),
    case("fused matmul", "FusedMatMul", (2, 4, 3), (5, 4), domain=MICROSOFT, transA=1, transB=1, alpha=0.5),
    case("fused matmul, batch", "FusedMatMul", (2, 3, 3, 4), (2, 3, 4, 5), domain=MICROSOFT, transBatchA=1, transA=1),
    case("fused gemm", "FusedGemm", (3, 4), (5, 4), (5,), domain=MICROSOFT, transB=1, activation="Relu"),
    case("einsum", "Einsum", (2, 3, 4), (2, 4, 5), equation="bij,bjk->bik"),
    case("einsum, implicit output", "Einsum", (3, 4), (4, 5), equation="zj, ja"),
    case("einsum, ellipsis", "Einsum", (2, 3, 4), (2, 4), equation="...ij,...j->...i"),
    case("einsum, ellipsis spread", "Einsum", (5, 1, 3, 4), (2, 4, 6), equation="...ij,...jk->...ik"),
    case("einsum, diagonal", "Einsum", (4, 4), equation="ii->i"),
    case("einsum, trace", "Einsum", (4, 4), equation="ii"),
    case("einsum, three operands", "Einsum", (3, 4), (4, 5), (5, 2), equation="ij,jk,kl->il"),
    case("einsum, heads", "Einsum", (2, 3, 4, 5), (2, 6, 4, 5), equation="bqhd,bkhd->bhqk"),
    case("einsum, one operand summed", "Einsum", (3, 4, 2), equation="abc->b"),
]
ELEMENTWISE = [
    case("mul of opset 6, inner axes", "Mul", (2, 4, 3), (4, 3), opset=6, broadcast=1, axis=1),
    case("add of opset 6, suffix", "Add", (2, 4, 3), (3,), opset=6, broadcast=1),
    case("prelu", "PRelu", (2, 4, 3, 3), (4, 1, 1)),
    case("prelu, one slope", "PRelu", (2, 4, 3, 3), (1,)),
    case("prelu, all slopes", "PRelu", (2, 4, 3), (2, 4, 3)),
    case("prelu, last axis", "PRelu", (2, 4, 3), (3,)),
    case("clip of opset 6", "Clip", (3, 4), opset=6, min=-0.5, max=0.5),
    case("clip", "Clip", (3, 4), np.array(-0.5, F), np.array(0.5, F)),
    case("dropout of opset 7", "Dropout", (3, 4), opset=7, ratio=0.5),
    case("where", "Where", np.arange(12).reshape(1, 3, 4) % 3 > 0, (2, 1, 4), (3, 1)),
    case("sum of three", "Sum", (3, 4), (4,), (1, 1)),
    case("mean of three", "Mean", (3, 4), (4,), (3, 1)),
    case("expand", "Expand", (3, 1), ints(2, 3, 4)),
    case("expand to a lower rank", "Expand", (2, 3, 1), ints(3, 4)),
    case("expand by ones", "Expand", (3, 4), ints(1, 1)),
    case("swiglu", "SwiGLU", (3, 4), (3, 4), opset=28),
    case("gelu", "Gelu", (3, 4), domain=MICROSOFT),
    case("quick gelu", "QuickGelu", (3, 4), domain=MICROSOFT),
    case("bias gelu", "BiasGelu", (2, 3, 4), (4,), domain=MICROSOFT),
    case("fast gelu", "FastGelu", (2, 3, 4), (4,), domain=MICROSOFT),
    case("fast gelu without bias", "FastGelu", (2, 3, 4), domain=MICROSOFT),
    case("binarizer", "Binarizer", (3, 4), domain="ai.onnx.ml"),
]
LAYOUT = [
    case("reshape of opset 1", "Reshape", (2, 6, 4), opset=1, shape=[2, 2, 3, 4]),
    case("reshape, heads", "Reshape", (2, 5, 12), ints(0, 0, 3, -1)),
    case("reshape, merged", "Reshape", (2, 3, 4, 5), ints(2, -1, 5)),
    case("reshape, split and merged", "Reshape", (4, 6), ints(2, 12)),
    case("reshape, crossing", "Reshape", (4, 6), ints(3, 8)),
    case("flatten", "Flatten", (2, 4, 3, 3), axis=1),
    case("flatten, last", "Flatten", (2, 4, 3), axis=-1),
    case("flatten, first", "Flatten", (2, 4, 3), axis=0),
    case("transpose", "Transpose", (2, 3, 4), perm=[2, 0, 1]),
    case("squeeze of opset 1", "Squeeze", (1, 3, 1, 4), opset=1, axes=[0, 2]),
    case("squeeze of opset 11, all", "Squeeze", (1, 3, 1, 4), opset=11),
    case("squeeze", "Squeeze", (1, 3, 1, 4), ints(-2)),
    case("squeeze, all", "Squeeze", (1, 3, 1, 4)),
    case("unsqueeze of opset 11", "Unsqueeze", (3, 4), opset=11, axes=[0, 3]),
    case("unsqueeze", "Unsqueeze", (3, 4), ints(1, -1)),
    case("concat", "Concat", (2, 3, 4), (2, 5, 4), axis=1),
    case("concat of opset 1", "Concat", (2, 3), (2, 5), opset=1, axis=1),
    case("split of opset 2", "Split", (2, 9), opset=2, outputs=3, axis=1, split=[2, 3, 4]),
    case("split of opset 2, equal", "Split", (2, 9), opset=2, outputs=3, axis=1),
    case("split of opset 13", "Split", (2, 9), ints(2, 3, 4), opset=13, outputs=3, axis=-1),
    case("split of opset 13, equal", "Split", (2, 9), opset=13, outputs=3, axis=-1),
    case("split of opset 18, by number", "Split", (2, 8), opset=18, outputs=3, axis=1, num_outputs=3),
    case("slice of opset 1", "Slice", (4, 9), opset=1, axes=[1], starts=[2], ends=[7]),
    case("slice of opset 1, negative", "Slice", (4, 9), opset=1, axes=[0, 1], starts=[-3, -7], ends=[-1, 1000]),
    case("slice", "Slice", (4, 9), ints(2), ints(7), ints(1)),
    case("slice, no axes", "Slice", (4, 9), ints(1, 3), ints(3, 9)),
    case("slice, negative ends", "Slice", (4, 9), ints(-7), ints(-2), ints(-1)),
    case("slice, every second", "Slice", (4, 8), ints(0), ints(8), ints(1), ints(2)),
    case("slice, every second, odd", "Slice", (4, 8), ints(1), ints(2**31), ints(1), ints(2)),
    case("slice, every third, cut", "Slice", (4, 8), ints(1), ints(7), ints(1), ints(3)),
    case("slice, backwards", "Slice", (4, 9), ints(-1), ints(-(2**31)), ints(1), ints(-1)),
    case("slice, backwards, part", "Slice", (4, 9), ints(6), ints(1), ints(1), ints(-1)),
    case("gather, list", "Gather", (6, 4), ints(5, 0, 3, 0)),
    case("gather, inner axis", "Gather", (2, 6, 4), ints(-1, 1, 2), axis=1),
    case("gather, one", "Gather", (6, 4), np.array(2), axis=0),
    case("gather, list of one", "Gather", (6, 4), ints(2), axis=0),
    case("gather, matrix", "Gather", (6, 4), index(2, 3, below=6)),
    case("gather elements", "GatherElements", (3, 4, 5), index(3, 2, 5, below=4), axis=1),
    case("scatter elements", "ScatterElements", (3, 4, 5), index(3, 2, 5, below=4), (3, 2, 5), axis=1, reduction="add"),
    case("gather nd", "GatherND", (3, 4, 5, 6), index(2, 2, below=3)),
    case("gather nd, batch", "GatherND", (2, 4, 5, 6), index(2, 3, 1, below=4), batch_dims=1),
    case("scatter nd", "ScatterND", (4, 5, 6), index(3, 1, below=4), (3, 5, 6), reduction="add"),
    case("tensor scatter", "TensorScatter", (2, 3, 6, 4), (2, 3, 2, 4), ints(1, 3), opset=24),
    case("tile", "Tile", (3, 1, 4), ints(2, 3, 2)),
    case("pad of opset 1", "Pad", (2, 3, 4), opset=1, paddings=[0, 1, 0, 0, 2, 0], value=1.5),
    case("pad of opset 2", "Pad", (2, 3, 4), opset=2, pads=[0, 1, 1, 0, 2, 0], value=1.5),
    case("pad", "Pad", (2, 3, 4), ints(0, 1, 1, 0, 2, 0), np.array(1.5, F)),
    case("pad, axes", "Pad", (2, 3, 4), ints(2, 1, 3, 0), None, ints(2, 1)),
    case("pad, reflected", "Pad", (2, 3, 4), ints(0, 1, 0, 0, 2, 0), mode="reflect"),
    case("pad, cropped", "Pad", (2, 3, 4), ints(0, 0, -1, 0, 0, 0)),
    case("upsample of opset 7", "Upsample", (2, 4, 3, 3), opset=7, scales=[1.0, 1.0, 2.0, 2.0]),
    case("upsample of opset 9", "Upsample", (2, 4, 3, 3), np.array([1, 1, 2, 2], F), opset=9),
    case("resize of opset 10", "Resize", (2, 4, 3, 3), np.array([1, 1, 2, 2], F), opset=10),
    case("resize of opset 11", "Resize", (2, 4, 3, 3), np.zeros(0, F), np.array([1, 1, 2, 2], F), opset=11, mode="linear"),
    case("resize of opset 11, sizes", "Resize", (2, 4, 3, 3), np.zeros(0, F), np.zeros(0, F), ints(2, 4, 5, 6), opset=11),
    case("resize of opset 13", "Resize", (2, 4, 3, 3), None, np.array([1, 1, 2, 2], F), opset=13, mode="cubic"),
    case("resize, axes", "Resize", (2, 4, 3, 3), None, np.array([2, 2], F), axes=[2, 3]),
    case("resize, axes and sizes", "Resize", (2, 4, 3, 3), None, None, ints(4, 3), axes=[1, 2]),
    case("resize, size stays but values move", "Resize", (2, 4, 9, 3), None, np.array([1.05, 2], F), axes=[2, 3], mode="linear"),
    case("resize, size stays but is cropped", "Resize", (2, 4, 6, 6), np.array([0.1, 0.1, 0.8, 0.8], F), None, ints(6, 8), axes=[2, 3],
         mode="linear", coordinate_transformation_mode="tf_crop_and_resize"),
    case("resize, aspect ratio", "Resize", (2, 4, 6, 4), None, None, ints(6, 8), axes=[2, 3], keep_aspect_ratio_policy="not_larger"),
    case("depth to space", "DepthToSpace", (2, 12, 2, 3), blocksize=2),
    case("depth to space of opset 1", "DepthToSpace", (2, 12, 2, 3), opset=1, blocksize=2),
    case("depth to space, columns first", "DepthToSpace", (2, 12, 2, 3), blocksize=2, mode="CRD"),
    case("space to depth", "SpaceToDepth", (2, 3, 4, 6), blocksize=2),
    case("space to depth, columns first", "SpaceToDepth", (2, 3, 4, 6), opset=28, blocksize=2, mode="CRD"),
    case("constant of shape", "ConstantOfShape", ints(3, 4)),
    case("columns to image", "Col2Im", (2, 12, 4), ints(3, 3), ints(2, 2)),
    case("columns to image, strides", "Col2Im", (2, 12, 4), ints(4, 4), ints(2, 2), strides=[2, 2]),
    case("reverse sequence", "ReverseSequence", (4, 3, 5), ints(4, 2, 3), time_axis=0, batch_axis=1),
    case("reverse sequence, batch first", "ReverseSequence", (3, 4, 5), ints(4, 2, 3), time_axis=1, batch_axis=0),
    case("triangle", "Trilu", (3, 4, 4), np.array(1)),
]
REDUCTIONS = [
    *(case(f"{op} of opset {opset}", op, positive(3, 4, 5), *([ints(1)] if opset >= 18 else []), opset=opset,
           **({} if opset >= 18 else {"axes": [1]}), keepdims=keep)
      for op in ("ReduceMean", "ReduceMax", "ReduceL2", "ReduceProd", "ReduceLogSumExp", "ReduceSumSquare")
      for opset, keep in ((11, 0), (18, 1))),
    case("reduce sum of opset 11", "ReduceSum", (3, 4, 5), opset=11, axes=[-1]),
    case("reduce sum", "ReduceSum", (3, 4, 5), ints(0, -1), keepdims=0),
    case("reduce sum, nothing", "ReduceSum", (3, 4), noop_with_empty_axes=1),
    case("reduce mean, everything", "ReduceMean", (3, 4), keepdims=0),
    *(case(f"{op} of opset {opset}", op, (2, 3, 4), opset=opset, axis=1)
      for op in ("Softmax", "LogSoftmax", "Hardmax") for opset in (11, 13)),
    case("softmax of opset 11, default axis", "Softmax", (2, 3, 4), opset=11),
    case("arg max", "ArgMax", (3, 4, 5), kind=TensorProto.INT64, axis=1, keepdims=0),
    case("arg min of opset 11", "ArgMin", (3, 4, 5), opset=11, kind=TensorProto.INT64, axis=0),
    case("top k", "TopK", (3, 5, 4), ints(2), axis=1, outputs=2),
    case("top k of opset 1", "TopK", (3, 5), opset=1, k=2, axis=1, outputs=2),
    case("cumulative sum", "CumSum", (3, 4, 5), np.array(1)),
    case("compress", "Compress", (3, 4, 5), np.array([True, False, True, True]), axis=1),
    case("compress, no axis", "Compress", (3, 4), np.array([True, False, True])),
    case("norm along an axis", "LpNormalization", (3, 4, 5), axis=1, p=2),
    case("global average", "GlobalAveragePool", (2, 4, 3, 3)),
    case("global maximum", "GlobalMaxPool", (2, 4, 3)),
    case("global norm", "GlobalLpPool", (2, 4, 3, 3), opset=21, p=2),
    case("average pool", "AveragePool", (2, 4, 5, 5), kernel_shape=[2, 2]),
    case("max pool", "MaxPool", (2, 4, 5, 5), kernel_shape=[2, 2]),
    case("max pool, indices", "MaxPool", (2, 4, 5, 5), kernel_shape=[2, 2], outputs=2),
    case("norm pool", "LpPool", (2, 4, 5), kernel_shape=[2], p=2),
]
NORMS = [
    *(case(f"batch norm of opset {opset}", "BatchNormalization", (2, 4, 3), (4,), (4,), (4,), positive(4), opset=opset)
      for opset in (7, 9, 14, 15)),
    case("batch norm of opset 6", "BatchNormalization", (2, 4, 3), (4,), (4,), (4,), positive(4), opset=6, is_test=1),
    case("batch norm, not spatial", "BatchNormalization", (2, 4, 3), (4, 3), (4, 3), (4, 3), positive(4, 3), opset=7, spatial=0),
    case("batch norm, two axes", "BatchNormalization", (5, 4), (4,), (4,), (4,), positive(4)),
    case("instance norm", "InstanceNormalization", (2, 4, 3, 3), (4,), (4,)),
    case("group norm of opset 18", "GroupNormalization", (2, 6, 3), (3,), (3,), opset=18, num_groups=3),
    case("group norm of opset 21", "GroupNormalization", (2, 12, 3), (12,), (12,), opset=21, num_groups=3),
    case("local response", "LRN", (2, 8, 3, 3), size=3),
    case("mean and variance", "MeanVarianceNormalization", (3, 4, 3, 3), opset=13, axes=[0, 2, 3]),
    case("layer norm", "LayerNormalization", (2, 3, 4), (4,), (4,), outputs=3),
    case("layer norm, two axes", "LayerNormalization", (2, 3, 4), (3, 4), (3, 4), axis=1),
    case("layer norm, spread scale", "LayerNormalization", (2, 3, 4), (4,), axis=-2),
    case("rms norm", "RMSNormalization", (2, 3, 4), (4,)),
    case("rms norm, two axes", "RMSNormalization", (2, 3, 4), (3, 4), axis=1),
    case("simplified layer norm", "SimplifiedLayerNormalization", (2, 3, 4), (4,), axis=-1),
    case("skip layer norm", "SkipLayerNormalization", (2, 3, 4), (2, 3, 4), (4,), (4,), (4,), domain=MICROSOFT, outputs=4),
    case("skip layer norm, spread", "SkipLayerNormalization", (2, 3, 4), (3, 4), (4,), domain=MICROSOFT),
    case("skip rms norm", "SkipSimplifiedLayerNormalization", (2, 3, 4), (2, 3, 4), (4,), domain=MICROSOFT),
]
_STATE = {"LSTM": 4, "GRU": 3, "RNN": 1}
RECURRENT = [
    case(f"{op}, {'both' if both else 'one'}", op, (5, 2, 3), (1 + both, g * 4, 3), (1 + both, g * 4, 4), (1 + both, 2 * g * 4),
         np.array([5, 3], np.int32), (1 + both, 2, 4), *([(1 + both, 2, 4)] if op == "LSTM" else []), outputs=3 if op == "LSTM" else 2,
         hidden_size=4, **({"direction": "bidirectional"} if both else {}), opset=14)
    for op, g in _STATE.items() for both in (0, 1)
] + [
    case("LSTM, peepholes", "LSTM", (5, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32), None, None, None, (1, 12), hidden_size=4, input_forget=1),
    case("LSTM, sigmoids", "LSTM", (5, 2, 3), (1, 16, 3), (1, 16, 4), hidden_size=4, activations=["Sigmoid", "Sigmoid", "Sigmoid"]),
    case("GRU, linear first", "GRU", (5, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24), hidden_size=4, linear_before_reset=1),
    case("GRU, sigmoids", "GRU", (5, 2, 3), (1, 12, 3), (1, 12, 4), hidden_size=4, activations=["Sigmoid", "Sigmoid"]),
    case("RNN, affine", "RNN", (5, 2, 3), (1, 4, 3), (1, 4, 4), hidden_size=4, activations=["Affine"], activation_alpha=[0.5],
         activation_beta=[0.3]),
    case("LSTM, batch first", "LSTM", (2, 5, 3), (1, 16, 3), (1, 16, 4), (1, 32), None, (2, 1, 4), (2, 1, 4), outputs=3, opset=14,
         hidden_size=4, layout=1),
]
OTHERS = [
    case("grid sample", "GridSample", (2, 4, 3, 3), (2, 5, 5, 2)),
    case("region align", "RoiAlign", (2, 4, 6, 6), positive(3, 4), ints(0, 1, 0), output_height=2, output_width=2),
    case("region pool", "MaxRoiPool", (2, 4, 6, 6), np.array([[0, 0, 0, 3, 3], [1, 1, 1, 5, 5]], F), opset=21, pooled_shape=[2, 2]),
    case("quantize", "QuantizeLinear", (3, 4), np.array(0.02, F), np.array(3, np.int8), kind=TensorProto.INT8),
    case("quantize an axis", "QuantizeLinear", (3, 4, 2), positive(4) / 50, np.zeros(4, np.int8), kind=TensorProto.INT8, axis=1),
    case("dequantize an axis", "DequantizeLinear", np.arange(12, dtype=np.int8).reshape(3, 4), positive(4), axis=-1),
    case("dequantize blocks", "DequantizeLinear", np.arange(24, dtype=np.int8).reshape(8, 3), (4, 3), axis=0, block_size=2),
    case("dequantize a vector", "DequantizeLinear", np.arange(6, dtype=np.int8), positive(1), opset=13),
]
CASES = CONVOLUTIONS + PRODUCTS + ELEMENTWISE + LAYOUT + REDUCTIONS + NORMS + RECURRENT + OTHERS

NOTHING = {
    "fused matmul, batch": "it transposes a batch axis",
    "reshape, crossing": "the reshape neither splits nor merges axes",
    "batch norm, not spatial": "does not fit",
    "reshape of opset 1": "its shape is unknown",
    "pad of opset 1": "its shape is unknown",
    "compress": "->",
    "max pool, indices": "->",
    "compress, no axis": "the axis that it runs along is not known",
}
"""Cases that lose nothing, with a part of the cause."""


def named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def outcome_of(name: str, **settings: Any) -> Outcome:
    return examine(named(name), **settings)


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_removing_equals_masking_equals_selecting(name: str) -> None:
    outcome = outcome_of(name)
    assert not outcome.problems, "\n".join(outcome.problems[:5])
    if name in NOTHING:
        assert not outcome.groups
        assert NOTHING[name] in outcome.signature
    else:
        assert outcome.groups, outcome.signature
        assert outcome.engines, outcome.skipped
        if any(i.dtype.kind in "ib" for i in named(name).inputs):
            again = outcome_of(name, whole_numbers=False)
            assert not again.problems, "\n".join(again.problems[:5])


def test_legacy_axis_places_the_second_operand() -> None:
    """No engine runs these any more; the specification of opset 6 says where the axes go."""
    add = examine(case("a", "Add", (2, 4, 3, 5), (4,), opset=6, broadcast=1, axis=1), engines=())
    assert add.signature == "a.0 a.1 a.2 a.3, a.1 -> a.0 a.1 a.2 a.3"
    mul = examine(case("b", "Mul", (2, 4, 3), (4, 1), opset=6, broadcast=1, axis=1), engines=())
    assert mul.signature == "a.0 a.1 a.2, a.1 1 -> a.0 a.1 a.2"
    slope = examine(case("c", "PRelu", (2, 4, 4), (4,), opset=6), engines=())
    assert slope.signature == "a.0 a.1 a.2, a.1 -> a.0 a.1 a.2"


def test_sizes_that_are_read_are_the_new_ones() -> None:
    proto, _ = with_initializers(case("shape", "Shape", (3, 4, 5), kind=TensorProto.INT64))
    model, groups = trace_case(load(proto))
    gone = np.zeros(groups.total, bool)
    gone[groups.by_name["x0:1"].start] = True
    small = to_proto(with_graph(model, rewrite(model.graph, groups, gone)))
    assert on_runtime(small, {})[0].tolist() == [3, 3, 5]


def test_inputs_that_a_signature_does_not_name_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.signatures.table import _TABLE, Dim, Signature

    terms = (Dim("a.0"), Dim("a.1"))
    monkeypatch.setitem(_TABLE, ("", "Where"), lambda node: Signature((terms,), (terms,)))
    forgetful = case("where", "Where", np.ones((3, 4), bool), (3, 4), (3, 4))
    _, groups = trace_case(load(with_initializers(forgetful)[0]))
    assert {v for g in groups.groups if g.frozen is None for v, _ in g.sites}.isdisjoint({"x1", "x2"})


def test_names_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
    assert onnx.defs.onnx_opset_version() >= 23


def test_quantised_weights_are_weights() -> None:
    """As onnxruntime.quantization writes them: a bias with a scale of shape (1,) and a zero point that is a scalar."""
    body = """wf = DequantizeLinear(w1, s1, z1) bf = DequantizeLinear(b1, sb, zb) h = Gemm<transB=1>(x, wf, bf) r = Relu(h)
      vf = DequantizeLinear<axis=0>(w2, s2, z2) y = Gemm<transB=1>(r, vf)"""
    rng = np.random.default_rng(0)
    model = net("float[n,6] x -> float[n,4] y", body, w1=rng.integers(-127, 127, (8, 6)).astype(np.int8), s1=np.array(0.01, np.float32),
                z1=np.array(0, np.int8),
                b1=rng.integers(-9, 9, 8).astype(np.int32), sb=np.array([0.001], np.float32), zb=np.array(0, np.int32),
                w2=rng.integers(-127, 127, (4, 8)).astype(np.int8), s2=np.full(4, 0.02, np.float32), z2=np.zeros(4, np.int8))  # fmt: skip
    result = spa.prune(model, 0.5, multiple_of=1)
    assert result.plan.groups["w1:0"]["size"] == 8
    assert result.after.macs == result.before.macs / 2
    assert result.check is not None
    assert result.check.worst == 0
