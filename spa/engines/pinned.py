"""Models as converters like them: every size a number, plain names, no input that nobody reads.

Runtimes other than ONNX Runtime mangle names, want sizes at conversion, drop idle inputs (which shifts those behind them) and know fewer
types. So what they get is a copy whose inputs and outputs have names of letters and digits and the sizes of the feeds; which is which is
kept here, and results go back to the names and types that the model declares. A model of fixed sizes is converted when it is
loaded, another one when it first sees feeds, and again for feeds of other sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from spa.engines.table import Opened, Placement, Settings
from spa.engines.worker import Remote
from spa.errors import SpaError, UnsupportedModel
from spa.graph.shapes import infer
from spa.plans.rewrite import copy_graph
from spa.proof.feeds import Feeds
from spa.storage.store import Model, with_graph

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pinned:
    """A model with plain names and the shapes of its feeds.

    inputs, outputs: name in the model as given -> plain name. shapes: plain name -> shape, where it is known. types: plain name -> numpy
    type. flat: whether inputs and outputs are flattened, so that a runtime with a layout of its own can't reorder them.
    """

    model: Model  # of no bytes, which keeps weights in the model file as long as they fit: not all converters look for others
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    shapes: Shapes
    types: Mapping[str, np.dtype[Any]]
    flat: bool = False

    def interface(self) -> str:
        """Inputs and outputs for a child, as JSON: [[name, type, shape or null]]."""
        def listed(names: Mapping[str, str]) -> list[list[Any]]:
            shapes = {n: [math.prod(s)] if self.flat else list(s) for n, s in self.shapes.items()}
            return [[n, self.types[n].name, shapes.get(n)] for n in names.values()]

        return json.dumps({"inputs": listed(self.inputs), "outputs": listed(self.outputs)})


def fixed_shapes(model: Model) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the inputs, where all are numbers."""
    shapes = {}
    for tensor in model.graph.inputs:
        if tensor.shape is None or not all(isinstance(d, int) and d >= 0 for d in tensor.shape):
            return None
        shapes[tensor.name] = tuple(tensor.shape)
    return shapes


def pin(model: Model, shapes: Shapes, *, flat: bool = False) -> Pinned:
    """A copy of a model for feeds of these shapes; see `Pinned`. Raises UnsupportedModel if an output is no tensor."""
    graph = copy_graph(model.graph)
    for node in graph.nodes:  # shapes of values inside still hold the free sizes; converters infer them again
        for tensor in node.outputs:
            tensor.shape = tensor.dtype = None
    declared = {t.name: t.dtype for t in model.graph.outputs}
    read = _read_names(graph)
    graph.inputs = [t for t in graph.inputs if t.name in read]
    prefix = _fresh(graph, "tensor")
    types, inputs, outputs = {}, {}, {}
    for k, tensor in enumerate(graph.inputs):
        plain = inputs[tensor.name] = f"{prefix}{k}in"
        types[plain] = _numpy_type(tensor)
        tensor.shape = list(shapes[tensor.name])
    _own_outputs(graph)
    for k, (given, tensor) in enumerate(zip(model.graph.outputs, graph.outputs, strict=True)):
        tensor.dtype = declared[given.name]
        plain = outputs[given.name] = f"{prefix}{k}out"
        types[plain] = _numpy_type(tensor)
    for tensor, plain in zip((*graph.inputs, *graph.outputs), (*inputs.values(), *outputs.values()), strict=True):
        tensor.name = plain
    pinned = with_graph(model, graph)
    known = {inputs[n]: tuple(s) for n, s in shapes.items() if n in inputs} | _output_shapes(pinned)
    for tensor in graph.outputs:
        tensor.shape = list(known[tensor.name]) if tensor.name in known else None
    if flat:
        _flatten(graph, known)
    return Pinned(replace(pinned, path=None, nbytes=0), inputs, outputs, known, types, flat)


class Converted:
    """A model that is open in a runtime which wants every size at conversion.

    Parameters
    ----------
    model, settings
        As an engine is given them.
    start
        What opens a pinned model.
    label
        The runtime, as a sentence names it.
    flat
        Whether inputs and outputs are to be flattened.
    """

    def __init__(
        self, model: Model, settings: Settings, start: Callable[[Model, Settings], Opened], *, label: str, flat: bool = False
    ) -> None:
        self.placement = Placement({}, proven=False)  # until the first feeds, if sizes are free
        self._model, self._settings, self._start, self._label, self._flat = model, settings, start, label, flat
        self._now: tuple[Shapes, Pinned, Opened] | None = None
        for tensor in (*model.graph.inputs, *model.graph.outputs):
            _numpy_type(tensor)
        shapes = fixed_shapes(model)
        if shapes is not None:
            self._at(shapes)

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name. Raises UnsupportedModel if the runtime fails."""
        pinned, opened = self._for(feeds)
        try:
            found = opened.run(self._plain(pinned, feeds))
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self._label} does not run the model: {error}") from error
        return {n: self._declared(pinned, plain, found[plain]) for n, plain in pinned.outputs.items()}

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        """A call that runs once."""
        pinned, opened = self._for(feeds)
        return opened.bound(self._plain(pinned, feeds))

    def close(self) -> None:
        """Ends the runtime."""
        if self._now is not None:
            self._now[2].close()
        self._now = None

    def _for(self, feeds: Feeds) -> tuple[Pinned, Opened]:
        names = [t.name for t in self._model.graph.inputs]
        missing = [n for n in names if n not in feeds]
        if missing:
            raise UnsupportedModel(f"Input {missing[0]!r} has no feed.")
        return self._at({n: np.shape(feeds[n]) for n in names})

    def _at(self, shapes: Shapes) -> tuple[Pinned, Opened]:
        if self._now is not None and self._now[0] == shapes:
            return self._now[1], self._now[2]
        self.close()
        pinned = pin(self._model, shapes, flat=self._flat)
        options = {**self._settings.options, "interface": pinned.interface()}
        try:
            opened = self._start(pinned.model, replace(self._settings, options=options))
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self._label} can't take the model: {error}") from error
        self._now = shapes, pinned, opened
        self.placement = opened.placement
        return pinned, opened

    def _plain(self, pinned: Pinned, feeds: Feeds) -> Feeds:
        return {plain: np.reshape(feeds[n], -1) if self._flat else feeds[n] for n, plain in pinned.inputs.items()}

    def _declared(self, pinned: Pinned, plain: str, found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A result in the shape and type that the model says, where it holds as many elements."""
        shape, kind = pinned.shapes.get(plain), pinned.types[plain]
        if shape is not None and found.shape != shape and (self._flat or not shape or found.ndim <= 1) and found.size == math.prod(shape):
            found = found.reshape(shape)  # runtimes without scalars, or without axes of one
        return found.astype(kind) if found.dtype != kind else found


def converted(
    command: Callable[[], Sequence[str]], *, label: str, flat: bool = False
) -> Callable[[Model, Settings], Opened]:
    """How an engine loads models into a child that converts them."""
    def load(model: Model, settings: Settings) -> Opened:
        return Converted(model, settings, lambda m, s: Remote(command(), m, s), label=label, flat=flat)

    return load


def _read_names(graph: gs.Graph) -> set[str]:
    names = {t.name for t in graph.outputs}
    for nested in (graph, *graph.subgraphs(recursive=True)):
        names |= {t.name for n in nested.nodes for t in n.inputs} | {t.name for t in nested.outputs}
    return names


def _fresh(graph: gs.Graph, prefix: str) -> str:
    """A prefix that no name has: numbers behind it are free."""
    names = {t.name for g in (graph, *graph.subgraphs(recursive=True)) for n in g.nodes for t in (*n.inputs, *n.outputs)}
    while any(n.startswith(prefix) for n in names):
        prefix += "x"
    return prefix


def _own_outputs(graph: gs.Graph) -> None:
    """Gives each output a value of its own, where it is an input, a constant or an output twice."""
    taken = {id(t) for t in graph.inputs}
    for k, tensor in enumerate(graph.outputs):
        if id(tensor) in taken or isinstance(tensor, gs.Constant):
            copy = gs.Variable(f"{tensor.name}/copy{k}", dtype=tensor.dtype)
            graph.nodes.append(gs.Node("Identity", f"{tensor.name}/identity{k}", inputs=[tensor], outputs=[copy]))
            graph.outputs[k] = copy
        taken.add(id(graph.outputs[k]))


def _flatten(graph: gs.Graph, shapes: Shapes) -> None:
    """x: (n, c, h, w) -> y   becomes   x: (n·c·h·w) -> Reshape -> … -> Reshape -> y."""
    def reshape(name: str, source: gs.Tensor, target: gs.Tensor, shape: Sequence[int]) -> gs.Node:
        return gs.Node("Reshape", name, inputs=[source, gs.Constant(f"{name}/shape", np.array(shape, np.int64))], outputs=[target])

    ends = []
    for k, tensor in enumerate(graph.inputs):
        flat = gs.Variable(tensor.name, tensor.dtype, [math.prod(tensor.shape)])
        tensor.name = f"{tensor.name}/whole"
        ends.append(reshape(f"{flat.name}/unflatten", flat, tensor, tensor.shape))
        graph.inputs[k] = flat
    graph.nodes[:0] = ends
    for k, tensor in enumerate(graph.outputs):
        flat = gs.Variable(tensor.name, tensor.dtype, [math.prod(shapes[tensor.name])] if tensor.name in shapes else None)
        tensor.name = f"{tensor.name}/whole"
        graph.nodes.append(reshape(f"{flat.name}/flatten", tensor, flat, [-1]))
        graph.outputs[k] = flat


def _output_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs, where they can be told."""
    try:
        facts = infer(model.graph)
    except SpaError:  # shapes are a help, not a need
        return {}
    found = {t.name: facts.shapes.get(t.name) for t in model.graph.outputs}
    free = {n for n, axes in facts.dynamic.items() if any(axes)}
    return {n: tuple(map(int, s)) for n, s in found.items() if s is not None and n not in free}


def _numpy_type(tensor: gs.Tensor) -> np.dtype[Any]:
    """The type of an input or output. Raises UnsupportedModel for what is no tensor of numbers."""
    kind: Any = tensor.dtype
    if isinstance(kind, int):
        kind = helper.tensor_dtype_to_np_dtype(kind)
    if kind is None or np.dtype(kind).kind in "OUS":
        raise UnsupportedModel(f"{tensor.name!r} is no tensor of numbers, which only ONNX Runtime takes.")
    found: np.dtype[Any] = np.dtype(kind)
    return found


__all__ = ["Converted", "Pinned", "converted", "fixed_shapes", "pin"]
