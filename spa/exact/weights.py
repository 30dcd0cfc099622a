"""Stored tensors on their way through several rewrites: read in float64, kept in their own type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import Weight
from spa.exact.flow import Source
from spa.graph.linear import Layer
from spa.graph.offsets import Offset

Array = NDArray[np.float64]


class Weights:
    """New values of stored tensors, by name. What is asked for is in float64, what is held in the tensor's own type."""

    def __init__(self, constants: dict[str, gs.Constant]) -> None:
        self._constants = constants
        self.changed: dict[str, NDArray[Any]] = {}

    def read(self, name: str) -> Array:
        """A tensor as it is now, a copy."""
        if name in self.changed:
            return self.changed[name].astype(np.float64)
        tensor = self._constants[name]
        held = tensor._values
        return np.array(held.load() if isinstance(held, Weight) else tensor.values, np.float64)

    def write(self, name: str, array: Array) -> None:
        """Holds a tensor's new values."""
        self.changed[name] = array.astype(np.dtype(self._constants[name].dtype))

    def precision(self, name: str) -> float:
        """Relative spacing of a tensor's type."""
        dtype = np.dtype(self._constants[name].dtype)
        return 2.0**-8 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)

    def matrix(self, layer: Layer) -> Array:
        """(outputs, columns) of a layer, its parts one after the other."""
        held = layer.weight.canonical(layer.place.read(self.read(layer.place.name), layer.weight_shape))
        return np.array(held, np.float64).reshape(layer.parts * layer.outputs, layer.columns)

    def put_matrix(self, layer: Layer, matrix: Array) -> None:
        """Its inverse."""
        stored = self.read(layer.place.name)
        layer.place.write(stored, layer.weight.back(matrix.reshape(layer.parts, layer.outputs, layer.columns)).reshape(layer.weight_shape))
        self.write(layer.place.name, stored)

    def bias(self, source: Source) -> Array | None:
        """(outputs,) what a layer adds to weight · data, None if it has no bias."""
        if source.offset is None:
            return None
        offset, stored = source.offset, self.read(source.offset.place.name)
        matrix = np.asarray(offset.layout.canonical(offset.place.read(stored, offset.shape)), np.float64)
        return np.asarray(matrix[0].reshape(-1) / offset.gain)

    def put_bias(self, source: Source, bias: Array) -> None:
        """Its inverse."""
        before = self.bias(source)
        assert source.offset is not None
        assert before is not None
        self.add_bias(source.offset, source.layer, bias - before)

    def add_bias(self, offset: Offset, layer: Layer, change: Array) -> None:
        """Adds (outputs,) to what a layer gives."""
        stored = self.read(offset.place.name)
        offset.add(stored, change.reshape(layer.parts, layer.outputs))
        self.write(offset.place.name, stored)
