"""Shapes, types and small constants of every value, by one walk over the nodes.

Each node is asked alone (onnx's own inference in C++, a few microseconds), with the small constants that are known so far; so
chains of Shape, Gather, Concat … are evaluated on the way. Operators without an ONNX schema get their shape from
their signature. Axes of unknown size are given a number first ("binding"); a second walk with other numbers tells which axes
and which elements of shape arithmetic depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from spa.errors import BadModel, BadOption
from spa.graph.binding import Binding
from spa.graph.view import Shape, type_of
from spa.graph.walk import SMALL, Prepared, Walk, part_read
from spa.signatures.arithmetic import MOVES

_SPACE = (224, 64, 256, 128, 32, 192, 384, 299, 512, 640, 16)


@dataclass(frozen=True)
class Facts:
    """What is known before tracing.

    shapes: value -> shape under the binding, None where the rank is not known.
    types: value -> onnx.TensorProto.DataType.
    values: small constants, shape arithmetic among them.
    dynamic: value -> for each axis, whether its size depends on the inputs' free sizes.
    computed: values that come from shape arithmetic and depend on no free size (safe to fold).
    feeds: graph input -> shape that was assumed.
    unknown: nodes whose output shape could not be found, with the cause.
    """

    shapes: Mapping[str, Shape | None]
    types: Mapping[str, int]
    values: Mapping[str, NDArray[Any]]
    dynamic: Mapping[str, tuple[bool, ...]]
    computed: Mapping[str, NDArray[Any]]
    feeds: Mapping[str, Shape]
    unknown: Mapping[str, str] = field(default_factory=dict)


def infer(graph: gs.Graph, inputs: Mapping[str, Sequence[int]] | None = None) -> Facts:
    """Shapes and constants of a graph.

    `inputs` fixes the shape of graph inputs; free sizes that it does not name are chosen so that every node's shape is known.
    Raises BadOption if `inputs` names no input or has another rank, BadModel if an input's rank is unknown.
    """
    prepared = Prepared(graph)
    given = _given(graph, inputs or {})
    bind = Binding(graph, given)
    free = any(not isinstance(d, int) or d <= 0 for t in graph.inputs for d in given.get(t.name, t.shape) or ())
    best: Walk | None = None
    for space in _SPACE if free else (1,):
        walk = Walk(prepared, bind(2, space, 16))
        if best is None or len(walk.unknown) < len(best.unknown):
            best = walk
        if not walk.unknown:
            break
    assert best is not None
    if free and bind.has_state:
        probed = Walk(prepared, bind.probe()).shapes
        for floats in (False, True) if best.unknown else (False,):
            whole = bind.with_totals(probed, floats=floats)
            walk = Walk(prepared, whole(2, _SPACE[0], 16))
            if len(walk.unknown) <= len(best.unknown):
                best, bind = walk, whole
    other = best
    if free:
        trials = [Walk(prepared, bind(3, space, 24)) for space in _other_spaces(graph, given, best)]
        other = min(trials, key=lambda w: len(w.unknown))
    return _facts(best, other)


def _other_spaces(graph: gs.Graph, given: Mapping[str, Sequence[Any]], best: Walk) -> list[int]:
    used = {d for shape in best.feeds.values() for d in shape}
    return [s for s in _SPACE if s not in used][:3] or [48]


def _given(graph: gs.Graph, inputs: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Any]]:
    names = {t.name: t for t in graph.inputs}
    for name, shape in inputs.items():
        if name not in names:
            raise BadOption(f"--input names {name!r}, which is not an input of the model; its inputs are: {', '.join(names)}.")
        declared = names[name].shape
        if declared is not None and len(declared) != len(shape):
            raise BadOption(f"--input {name} has {len(shape)} sizes, but the model declares {len(declared)} axes.")
    for name, tensor in names.items():
        if tensor.shape is None and name not in inputs and getattr(tensor, "type", "tensor_type") == "tensor_type":
            raise BadModel(f"The shape of input {name!r} is not in the model: give it with --input {name}:1x3x224x224.")
    return {name: tuple(shape) for name, shape in inputs.items()}


def _facts(one: Walk, two: Walk) -> Facts:
    dynamic = {}
    for name, shape in one.shapes.items():
        other = two.shapes.get(name)
        if shape is not None:
            pairs = zip(shape, other, strict=True) if other is not None and len(other) == len(shape) else [(n, -1) for n in shape]
            dynamic[name] = tuple(a != b for a, b in pairs)
    free = _depends(one, dynamic) if one is not two else set()
    computed = {n: one.values[n] for n in one.arithmetic if n not in free}
    return Facts(one.shapes, one.types, one.values, dynamic, computed, one.feeds, one.unknown)


def with_new_constants(facts: Facts, graph: gs.Graph) -> Facts:
    """The facts, and those of constants that passes have made since; nothing that was known changes by passes that keep the function."""
    shapes, types = dict(facts.shapes), dict(facts.types)
    values, dynamic = dict(facts.values), dict(facts.dynamic)
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in shapes:
                shape = tuple(int(n) for n in tensor.shape)
                shapes[tensor.name], types[tensor.name] = shape, type_of(tensor.dtype)
                dynamic[tensor.name] = (False,) * len(shape)
                if int(np.prod(shape)) <= SMALL and types[tensor.name] != onnx.TensorProto.STRING:
                    values[tensor.name] = np.asarray(tensor.values)
    return replace(facts, shapes=shapes, types=types, values=values, dynamic=dynamic)


def _depends(walk: Walk, dynamic: Mapping[str, tuple[bool, ...]]) -> set[str]:
    """Values of shape arithmetic that depend on a free size; element by element where elements are only moved."""
    marks: dict[str, NDArray[np.bool_]] = {}
    for i, node in enumerate(walk.graph.nodes):
        if not any(t.name in walk.arithmetic for t in node.outputs):
            continue
        outputs = [t.name for t in node.outputs if t.name]
        if node.op == "Shape":
            flags = np.array(dynamic[node.inputs[0].name], bool)
            marks[outputs[0]] = flags[part_read(node)]
            continue
        touched = {t.name: marks[t.name] for t in node.inputs if t.name in marks and marks[t.name].any()}
        moved = _move(walk, i, node, touched) if touched and node.op in MOVES else None
        for k, name in enumerate(outputs):
            shape = walk.values[name].shape if name in walk.values else ()
            marks[name] = moved[k] if moved is not None else np.full(shape, bool(touched))
    return {name for name, mark in marks.items() if mark.any()}


def _move(walk: Walk, i: int, node: gs.Node, touched: Mapping[str, NDArray[np.bool_]]) -> list[NDArray[np.bool_]] | None:
    feeds = {}
    for k, tensor in enumerate(node.inputs):
        if not tensor.name:
            continue
        value = walk.values[tensor.name]
        if tensor.name in touched:
            if k > 0 and node.op != "Concat":
                return None  # how elements move depends on a free size
            feeds[tensor.name] = touched[tensor.name].astype(value.dtype)
        else:
            feeds[tensor.name] = np.zeros_like(value) if k == 0 or node.op == "Concat" else value
    try:
        evaluator = ReferenceEvaluator(walk.prepared.protos[i], opsets={d.domain: d.version for d in walk.prepared.opsets})
        return [np.asarray(r).astype(bool) for r in evaluator.run(None, feeds)]
    except Exception:  # as in _evaluate
        return None
