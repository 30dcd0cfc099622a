"""Seeded example feeds for a model, made from its declared inputs alone."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

DIMS: Mapping[str, int] = MappingProxyType({"batch": 2, "height": 64, "width": 64, "sequence": 12})
"""Sizes of the dynamic dims that the graphs of ``models/zoo`` declare."""

_LARGEST_ID = 15  # below every vocabulary of the zoo


def example_inputs(model: ModelProto, seed: int = 0, dims: Mapping[str, int] = DIMS) -> dict[str, NDArray[np.generic]]:
    """Make one value per graph input: floats normal, integers ids of 0..15, masks and booleans all ones.

    Parameters
    ----------
    model
        Initializers that are also declared as inputs get no value.
    seed
        Same seed, same values.
    dims
        Sizes of the dynamic dims by name. A dim without a name is asked for as ``INPUT.AXIS``.

    Raises
    ------
    ValueError
        A dynamic dim has no size in `dims`, or an input is no tensor.
    """
    generator = np.random.default_rng(seed)
    held = {tensor.name for tensor in model.graph.initializer}
    feeds: dict[str, NDArray[np.generic]] = {}
    for value in model.graph.input:
        if value.name not in held:
            feeds[value.name] = _example(value, generator, dims)
    return feeds


def _example(value: ValueInfoProto, generator: np.random.Generator, dims: Mapping[str, int]) -> NDArray[np.generic]:
    if not value.type.HasField("tensor_type"):
        raise ValueError(f"input {value.name} is no tensor: no example can be made")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    shape = _shape(value, dims)
    if dtype.kind == "b" or "mask" in value.name.lower():
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        return generator.integers(0, _LARGEST_ID, size=shape, endpoint=True).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _shape(value: ValueInfoProto, dims: Mapping[str, int]) -> tuple[int, ...]:
    shape: list[int] = []
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        name = dim.dim_param or f"{value.name}.{axis}"
        if not dim.HasField("dim_value") and name not in dims:
            raise ValueError(f"axis {axis} of input {value.name} is dynamic: give a size for {name!r}")
        shape.append(dim.dim_value if dim.HasField("dim_value") else dims[name])
    return tuple(shape)
