"""What a graph declares of its values."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs


def drop_false_shapes(graph: gs.Graph, shapes: Mapping[str, tuple[int, ...] | None]) -> int:
    """Forgets declared shapes of inner values that are not their shapes: runtimes refuse to load what contradicts itself.

    before -> after: Conv(x) -> y (n, 8, 8, 16) that is declared (n, 16, 8, 8) -> y without a shape. Exporters move transposes and leave
    the shapes as they were. shapes: what values have; free sizes are compared with nothing. Returns the number of shapes dropped.
    """
    kept = {t.name for t in (*graph.inputs, *graph.outputs)}
    changed = 0
    for name, tensor in graph.tensors().items():
        if not isinstance(tensor, gs.Variable) or name in kept or tensor.shape is None:
            continue
        true = shapes.get(name)
        if true is not None and (len(true) != len(tensor.shape) or _differ(tensor.shape, true)):
            tensor.shape = None
            changed += 1
    return changed


def _differ(declared: list[int | str], true: tuple[int, ...]) -> bool:
    return any(isinstance(one, int) and one >= 0 and one != other for one, other in zip(declared, true, strict=True))
