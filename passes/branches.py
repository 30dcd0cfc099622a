"""The pass that drops branches of residual sums, and with them layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_graphsurgeon as gs

from passes.constants import drop_dead_nodes


def drop_branches(graph: gs.Graph, replace: Mapping[str, str], inputs: Collection[str] = (), outputs: Collection[str] = ()) -> int:
    """Lets all readers of a value read another one, and removes what nobody needs any more.

    replace: value -> the value that its readers get; a replacement that is replaced itself is followed. inputs, outputs: graph inputs
    and outputs that go with them (a cache that is no longer kept): the outputs unless they are read, the inputs if nothing reads them
    now. Other outputs stay, under their names: a replaced one becomes an Identity.

    before -> after: h = Add(x, F(x)), y = G(h) -> y = G(x). Returns the number of values replaced; values that are not there
    count as replaced before. Raises ValueError where the replacement is not in the graph, or depends on what it replaces.
    """
    made = {t.name: t for n in graph.nodes for t in n.outputs if t.name} | {t.name: t for t in graph.inputs}
    ends = {t.name for t in graph.outputs}
    todo = {value: _final(replace, value) for value in replace if value in made and (made[value].outputs or value in ends)}
    for value, by in todo.items():
        if by not in made:
            raise ValueError(f"there is no value {by!r} to put in the place of {value!r}")
        if value in _before(made[by]):
            raise ValueError(f"{by!r} depends on {value!r}")
    graph.outputs[:] = [t for t in graph.outputs if t.name not in outputs]
    above = {name for value in todo for name in (*_before(made[value]), _aside(value))}
    above |= {name for value in outputs if value in made for name in _before(made[value])}
    changed = sum(_redirect(graph, made[value], made[by]) for value, by in todo.items())
    drop_dead_nodes(graph, above)
    read = {t.name for t in graph.outputs}
    graph.inputs[:] = [t for t in graph.inputs if t.name not in inputs or t.outputs or t.name in read]
    return changed


def _final(replace: Mapping[str, str], value: str) -> str:
    seen = {value}
    while (value := replace[value]) in replace:
        if value in seen:
            raise ValueError(f"{value!r} is to be replaced by itself")
        seen.add(value)
    return value


def _before(tensor: gs.Tensor) -> set[str]:
    """Names of the values that a value is computed from, and its own."""
    found, rest = set(), [tensor]
    while rest:
        current = rest.pop()
        if current.name in found:
            continue
        found.add(current.name)
        for node in current.inputs:
            found.update(t.name for t in node.outputs if t.name)
            rest += [t for t in node.inputs if t.name]
    return found


def _aside(value: str) -> str:
    """The name of what an output of the graph was, once another value has its name."""
    return f"{value}/dropped"


def _redirect(graph: gs.Graph, value: gs.Tensor, by: gs.Tensor) -> int:
    """Gives readers of a value another one. An output of the graph keeps its name, as an Identity of it."""
    read = {id(n): n for n in value.outputs}
    for node in read.values():
        for i, tensor in enumerate(node.inputs):
            if tensor is value:
                node.inputs[i] = by
    if not any(t is value for t in graph.outputs):
        return int(bool(read))
    maker = value.inputs[0] if value.inputs else None
    if maker is not None and maker.op == "Identity" and maker.inputs[0] is by:
        return int(bool(read))
    fresh = gs.Variable(_aside(value.name), dtype=value.dtype, shape=value.shape)
    if maker is not None:
        maker.outputs[[t is value for t in maker.outputs].index(True)] = fresh
    graph.nodes.append(gs.Node("Identity", f"{value.name}/Identity", {}, [by], [value]))
    return 1
