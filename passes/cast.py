"""Half-precision weights in float32, converted piece by piece when they are read: a model of twice the size that takes no memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from passes.weights import Array, Weight


class Widened(Weight):
    """The values of another weight, in float32.

    Parameters
    ----------
    narrow
        A weight of a floating-point type.
    """

    def __init__(self, narrow: Weight) -> None:
        super().__init__(narrow.source, narrow.shape, TensorProto.FLOAT, note=narrow.header())
        self.narrow = narrow

    def take(self, indices: npt.ArrayLike, axis: int) -> Weight:
        """Select positions along an axis, without reading anything; raises as `Weight.take` does."""
        return Widened(self.narrow.take(indices, axis))

    def load(self) -> Array:
        """Read the values into a new array."""
        return self.narrow.load().astype(np.float32)

    def rows(self, step: int) -> Iterator[Array]:
        """Read the values `step` positions of the first axis at a time."""
        for block in self.narrow.rows(step):
            yield block.astype(np.float32)

    def pieces(self) -> Iterator[memoryview]:
        """Read the bytes in raw layout, in pieces of bounded size."""
        for piece in self.narrow.pieces():
            yield np.frombuffer(piece, self.narrow.dtype).astype(np.float32).view(np.uint8).data
