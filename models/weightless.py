"""Weightless ONNX: a model whose weights are replaced by a recipe, so that real architectures fit in git.

A stripped tensor keeps its name, type and dims, holds no data, and has the doc string ``weightless MEAN STD``.
Filling it draws

    standard_normal(dims) * STD + MEAN        with numpy's default_rng(crc32(name)), in float32

so that every machine gets the same weights, and elements differ from each other: a wrong index cannot hide behind
equal values. A tensor whose name ends in ``var`` or contains ``running_var`` is folded to positive values.
"""

import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper

KEY = "weightless"

_SMALLEST = 64  # elements; below this the data costs less than it explains
_MASK_VALUES = 8  # with fewer distinct values than this a large tensor is a mask or a constant, not a weight
_LARGEST_WEIGHT = 1e3
_NOT_WEIGHTS = frozenset({"Resize", "Upsample", "Range", "Pad", "Slice", "Clip"})  # operators with float settings
_DTYPES: dict[int, type[np.floating]] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def strip(model: ModelProto) -> ModelProto:
    """Replace the data of every weight by its mean and standard deviation, in place.

    A weight is a float tensor (initializer or constant, also inside subgraphs) of 64 elements or more that is finite,
    moderate in size and has at least 8 distinct values. Everything else keeps its data.

    Returns
    -------
    ModelProto
        The model that was given.
    """
    settings = {name for graph in _graphs(model.graph) for name in _setting_names(graph)}
    for tensor in _tensors(model.graph):
        if tensor.name in settings or tensor.data_type not in _DTYPES or np.prod(tensor.dims) < _SMALLEST:
            continue
        values = numpy_helper.to_array(tensor).astype(np.float64)
        if not _is_weight(values):
            continue
        for field in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(field)
        tensor.doc_string = f"{KEY} {float(values.mean())!r} {float(values.std())!r}"
    return model


def fill(model: ModelProto) -> ModelProto:
    """Draw the data of every stripped tensor, in place; tensors that hold data are left alone.

    Returns
    -------
    ModelProto
        The model that was given.
    """
    for tensor in _tensors(model.graph):
        if tensor.doc_string.startswith(KEY):
            _, mean, std = tensor.doc_string.split()
            values = _draw(tensor.name, tuple(tensor.dims), float(mean), float(std) or 0.02)
            tensor.raw_data = values.astype(_DTYPES[tensor.data_type]).tobytes()
            tensor.doc_string = ""
    return model


def load(path: str | Path) -> ModelProto:
    """Read a ``.onnx.xz`` file and fill in its weights.

    Raises
    ------
    OSError
        The file cannot be read.
    lzma.LZMAError
        It is not an xz file.
    """
    return fill(onnx.load_model_from_string(lzma.decompress(Path(path).read_bytes())))


def save(model: ModelProto, path: str | Path) -> int:
    """Write a stripped copy of a model to a ``.onnx.xz`` file; exporters' remarks are left out.

    Returns
    -------
    int
        The size of the file in bytes.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    strip(copy)
    copy.ClearField("metadata_props")
    for graph in _graphs(copy.graph):
        graph.ClearField("metadata_props")
        for item in (*graph.node, *graph.value_info, *graph.input, *graph.output):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
        for tensor in graph.initializer:
            tensor.ClearField("metadata_props")
    packed = lzma.compress(copy.SerializeToString(deterministic=True), preset=9 | lzma.PRESET_EXTREME)
    Path(path).write_bytes(packed)
    return len(packed)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, then every subgraph in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every initializer and every tensor of a Constant node, also inside subgraphs."""
    for part in _graphs(graph):
        yield from part.initializer
        for node in part.node:
            if node.op_type == "Constant":
                yield from (attribute.t for attribute in node.attribute if attribute.type == AttributeProto.TENSOR)


def _setting_names(graph: GraphProto) -> Iterator[str]:
    """Names of the inputs of operators whose float inputs are settings."""
    for node in graph.node:
        if node.op_type in _NOT_WEIGHTS:
            yield from node.input


def _is_weight(values: NDArray[np.float64]) -> bool:
    if not np.isfinite(values).all() or np.abs(values).max() > _LARGEST_WEIGHT:
        return False
    return len(np.unique(values)) >= _MASK_VALUES


def _draw(name: str, dims: tuple[int, ...], mean: float, std: float) -> NDArray[np.float32]:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(dims, dtype=np.float32) * std + mean
    lowered = name.lower()
    if "running_var" in lowered or lowered.endswith("var"):
        values = np.abs(values) + 0.1
    return values.astype(np.float32, copy=False)
