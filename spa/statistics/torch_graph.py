"""A graph run in torch, one node after the other, so that autograd knows the gradient of everything.

    graph = TorchGraph(model.graph)
    y = graph.run(feeds)["y"];  y.sum().backward();  graph.parameters["conv.weight"].grad

Our own, because onnx2torch 1.5.15 (2024-08, the last one) converts 30 of the zoo's 97 graphs: it knows no operator as newer
opsets define it. `spa.torch_ops` holds the operators. torch is optional and imported when it is first used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.weights import Weight
from spa.errors import BadOption, SpaError, UnsupportedModel
from spa.graph.trace import constant_values, node_name, outer_values
from spa.graph.view import dtype_is_float, opset_of
from spa.torch_ops import TABLE, WAY_OUT, Call, Tensor, to_tensor, torch

Values = dict[str, Tensor]


class TorchGraph:
    """A graph in torch.

    Parameters
    ----------
    graph
        A graph, left as it is; its weights are copied.
    dtype
        The torch dtype that stands for every float type of the file, by default torch.float32.

    Attributes
    ----------
    parameters
        Every stored float tensor, initializer or Constant node, by the name of its value: leaves that require gradients.
    constants
        The other stored tensors, by name.

    Raises
    ------
    UnsupportedModel
        If the graph has an operator that is not in the table, or a type that torch does not have.
    BadOption
        If torch is not installed.
    """

    def __init__(self, graph: gs.Graph, *, dtype: Any = None) -> None:
        self.graph = graph
        self.dtype = torch.float32 if dtype is None else dtype
        self.opset = opset_of(graph, "")
        self.parameters: Values = {}
        self.constants: Values = {}
        _check_operators(graph)
        for name, tensor in constant_values(graph).items():
            found = to_tensor(_array(tensor), self.dtype)
            if dtype_is_float(tensor.dtype):
                self.parameters[name] = found.requires_grad_()
            else:
                self.constants[name] = found
        self._readers = _readers(graph)
        self._moments: Values | None = None

    def run(
        self, feeds: Mapping[str, Any], taps: Sequence[str] = (), *, parameters: Mapping[str, Tensor] | None = None,
        moments: Values | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Runs the graph.

        Parameters
        ----------
        feeds
            Arrays or tensors by the name of a graph input; entries of other names are ignored.
        taps
            Names of values to give besides the outputs: inputs, stored tensors or results of nodes.
        parameters
            Tensors to take in place of those in `parameters`, by name.
        moments
            If given, norms with stored statistics take the batch's, as in training, and put the running ones here, by name.

        Returns
        -------
        dict
            Tensors by name, outputs first. Float types are `dtype`.

        Raises
        ------
        BadOption
            If an input is missing or a tap is no value of the graph.
        UnsupportedModel
            If a node does not run in torch, or uses a setting that is not implemented.
        """
        values = self.constants | self.parameters | dict(parameters or {})
        self._moments = moments
        for tensor in self.graph.inputs:
            if tensor.name in feeds:
                values[tensor.name] = self._fed(feeds[tensor.name])
            elif tensor.name not in values:
                raise BadOption(f"The input {tensor.name!r} has no feed: give one under that name.")
        keep = {t.name for t in self.graph.outputs} | set(taps)
        self._walk(self.graph, values, dict(self._readers), keep)
        missing = [name for name in keep if name not in values]
        if missing:
            raise BadOption(f"There is no value {sorted(missing)[0]!r} in the graph: give the name of an input, weight or result.")
        return {name: values[name] for name in dict.fromkeys([t.name for t in self.graph.outputs] + list(taps))}

    def _fed(self, value: Any) -> Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(self.dtype) if value.is_floating_point() else value
        return to_tensor(value, self.dtype)

    def _walk(self, graph: gs.Graph, values: Values, readers: dict[str, int], keep: set[str]) -> None:
        """Runs the nodes; a value that nobody reads any more is dropped, autograd keeps what it needs."""
        for node in graph.nodes:
            if node.outputs and node.outputs[0].name in values:  # a stored tensor
                continue
            for tensor, value in zip(node.outputs, self._visit(node, values), strict=False):
                if tensor.name and value is not None:
                    values[tensor.name] = value
            for tensor in node.inputs:
                readers[tensor.name] = readers.get(tensor.name, 0) - 1
            for name in [t.name for t in (*node.inputs, *node.outputs) if t.name]:
                if readers.get(name, 0) <= 0 and name not in keep:
                    values.pop(name, None)

    def _visit(self, node: gs.Node, values: Values) -> Sequence[Tensor | None]:
        call = Call(
            node,
            self.opset,
            [values[t.name] if t.name else None for t in node.inputs],
            self.dtype,
            lambda body: self._body(body, values),
            self._moments,
        )
        try:
            found = _function(node)(call)
        except SpaError:
            raise
        except Exception as error:  # torch raises what it likes: RuntimeError, IndexError, ValueError, NotImplementedError
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UnsupportedModel(f"Node {node_name(node)!r} ({node.op}) does not run in torch ({reason}): {WAY_OUT}.") from error
        return [found] if isinstance(found, torch.Tensor) else list(found)

    def _body(self, body: gs.Graph, values: Values) -> list[Tensor]:
        """Outputs of a body that sees the values around it."""
        inner = {name: to_tensor(_array(tensor), self.dtype) for name, tensor in constant_values(body).items() if name not in values}
        inside = values | inner
        self._walk(body, inside, {}, set(inside) | {t.name for n in body.nodes for t in n.outputs})
        return [inside[t.name] for t in body.outputs]


def _function(node: gs.Node) -> Any:
    domain = node.domain or ""
    return TABLE.get(("" if domain == "ai.onnx" else domain, node.op))


def _check_operators(graph: gs.Graph) -> None:
    for node in graph.nodes:
        if _function(node) is None:
            raise UnsupportedModel(f"Node {node_name(node)!r} is a {node.op}, an operator without gradients here: {WAY_OUT}.")
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                _check_operators(attribute)


def _readers(graph: gs.Graph) -> Mapping[str, int]:
    """How many times each value is read by nodes; what bodies read is never dropped."""
    found: Counter[str] = Counter(t.name for node in graph.nodes for t in node.inputs if t.name)
    for node in graph.nodes:
        for name in outer_values(node):
            found[name] += len(graph.nodes) + 1
    return found


def _array(tensor: gs.Constant) -> Any:
    held = tensor._values
    found = held.load() if isinstance(held, Weight) else tensor.values
    if np.asarray(found).dtype.kind in "OSU":
        return np.zeros(0, np.int64)  # text: what reads it will be refused
    return found
