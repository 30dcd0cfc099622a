"""The table {(domain, operator): function of a call}, and torch itself, imported when it is first used.

    @op("Relu")
    def relu(call: Call) -> Tensor: return torch.relu(call[0])

Conventions. Float types of the file (half, bfloat16, float, double) are all one torch dtype, the executor's; whole numbers are
torch's of the same width, unsigned ones that torch does not compute with the next wider. Nothing works in place, so that
gradients of gradients exist wherever torch has them. A quantised value is held as a float, rounded with a straight-through
gradient (Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import tensor_dtype_to_np_dtype

from spa.errors import BadOption, UnsupportedModel
from spa.graph.view import FLOATS, type_of

Tensor: TypeAlias = Any
Results: TypeAlias = Any  # a tensor, or a sequence of tensors and None

WAY_OUT = "choose a criterion that needs no gradients, such as l2"


class _Torch:
    """The torch module, imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(importlib.import_module("torch"), name)
        except ImportError as error:
            raise BadOption(f"Gradients need torch: run pip install 'spa-prune[torch]', or {WAY_OUT}.") from error


torch: Any = _Torch()

_WHOLE: dict[int, str] = {
    onnx.TensorProto.BOOL: "bool",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT16: "int16",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.UINT16: "int32",
    onnx.TensorProto.UINT32: "int64",
    onnx.TensorProto.UINT64: "int64",
    onnx.TensorProto.INT4: "int8",
    onnx.TensorProto.UINT4: "uint8",
}


@dataclass(frozen=True)
class Call:
    """A node about to run.

    Attributes
    ----------
    node
        The node.
    opset
        Version of ONNX's own operators.
    inputs
        Its operands; None where one is left out.
    dtype
        The torch dtype that stands for every float type.
    body
        Runs a graph held by an attribute, with the values around it in sight, and gives its outputs.
    moments
        Where norms with stored statistics take the batch's instead: filled with the running ones, by the names of the operands; else None.
    """

    node: gs.Node
    opset: int
    inputs: Sequence[Tensor]
    dtype: Any
    body: Callable[[gs.Graph], list[Tensor]]
    moments: dict[str, Tensor] | None = None

    def __getitem__(self, index: int) -> Tensor:
        """Input `index`, None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.node.attrs.get(name, default)

    def wants(self, index: int) -> bool:
        """Whether somebody may read output `index`."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def numbers(self, index: int, name: str = "") -> list[Any] | None:
        """Input `index` as a list of Python numbers, else attribute `name` (which older opsets have in its place), else None."""
        if self[index] is not None:
            return list(self[index].detach().reshape(-1).tolist())
        value = self.attr(name)
        return None if value is None else [value] if isinstance(value, int | float) else list(value)

    def cast(self, tensor: Tensor, onnx_type: int) -> Tensor:
        """The tensor as an ONNX type."""
        return tensor.to(self.torch_type(onnx_type))

    def torch_type(self, onnx_type: int) -> Any:
        """The torch dtype that stands for an ONNX type."""
        return torch_type(onnx_type, self.dtype)

    def refuse(self, what: str) -> UnsupportedModel:
        """The error for a setting of the node that is not implemented."""
        return UnsupportedModel(f"Node {self.name!r} ({self.node.op}) uses {what}, which has no gradients here: {WAY_OUT}.")

    @property
    def name(self) -> str:
        """The node's name, or its first output."""
        return str(self.node.name or (self.node.outputs[0].name if self.node.outputs else self.node.op))


Op: TypeAlias = Callable[[Call], Results]
TABLE: dict[tuple[str, str], Op] = {}


def op(*names: str, domain: str = "") -> Callable[[Op], Op]:
    """Enters a function into the table, for ONNX's own operators or for those of another domain."""

    def enter(function: Op) -> Op:
        TABLE.update({(domain, name): function for name in names})
        return function

    return enter


def table_of(functions: Mapping[str, Callable[..., Results]], domain: str = "") -> None:
    """Enters functions of plain tensors, all inputs of the node being their arguments."""
    for name, function in functions.items():
        TABLE[domain, name] = _of_inputs(function)


def _of_inputs(function: Callable[..., Results]) -> Op:
    return lambda call: function(*call.inputs)


def torch_type(onnx_type: int, dtype: Any) -> Any:
    """The torch dtype that stands for an ONNX type; `dtype` is that of floats."""
    if onnx_type in FLOATS:
        return dtype
    if onnx_type in _WHOLE:
        return getattr(torch, _WHOLE[onnx_type])
    kind = onnx.TensorProto.DataType.Name(onnx_type) if onnx_type in onnx.TensorProto.DataType.values() else "an unknown type"
    raise UnsupportedModel(f"The model holds values of type {kind}, for which torch has no gradients: {WAY_OUT}.")


def to_tensor(array: Any, dtype: Any) -> Tensor:
    """A torch tensor with a copy of an array's values, in the type that stands for the array's."""
    found = np.asarray(array)
    wanted = torch_type(type_of(found.dtype), dtype)
    if type_of(found.dtype) in FLOATS:
        found = found.astype(np.float64 if dtype == torch.float64 else np.float32)
    elif found.dtype.kind not in "biu" or (found.dtype.kind == "u" and found.dtype.itemsize > 1):
        found = found.astype(np.int64)
    return torch.from_numpy(np.array(found, order="C")).to(wanted)


def constant(value: Any, dtype: Any) -> Tensor:
    """A tensor held by an attribute."""
    held = value.values if isinstance(value, gs.Constant) else value
    return to_tensor(held, dtype)


def onnx_type(value: Any) -> int:
    """A type attribute, which graph-surgeon reads as a number or as a numpy type."""
    return int(value) if isinstance(value, int | np.integer) else type_of(value)


def numpy_type(number: int) -> np.dtype[Any]:
    """Numpy's dtype of an ONNX type."""
    return np.dtype(tensor_dtype_to_np_dtype(number))
