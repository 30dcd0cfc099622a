"""Layout chains that only permute one axis become a Gather."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

MOST = 1 << 22  # elements; a chain is tried out on the positions of a whole value


def gather_shuffles(graph: gs.Graph, shapes: Mapping[str, tuple[int, ...] | None]) -> int:
    """Replaces chains of Reshape and Transpose that amount to a permutation of one axis.

    before -> after: Reshape (n, g c, s) -> (n, g, c, s), Transpose to (n, c, g, s), Reshape to (n, c g, s)
    becomes Gather(axis=1, permutation). The chain ties channels together as a grid, the Gather lets each go alone (channel
    shuffle). What a chain does is found by running it on positions, so any chain will do. Returns the number of chains replaced.
    """
    outputs = {t.name for t in graph.outputs}
    replaced = 0
    taken = set(graph.tensors())
    for first in list(graph.nodes):
        chain = _chain(first, outputs)
        if len(chain) < 3 or (
            first.inputs[0].inputs and first.inputs[0].inputs[0].op in ("Reshape", "Transpose") and len(first.inputs[0].outputs) == 1
        ):
            continue
        source, target = first.inputs[0], chain[-1].outputs[0]
        found = _permutation(chain, shapes)
        if found is None:
            continue
        axis, permutation = found
        name = f"{target.name}/permutation"
        while name in taken:
            name += "_"
        taken.add(name)
        last = chain[-1]
        last.op, last.attrs = "Gather", {"axis": axis}
        last.inputs = [source, gs.Constant(name, permutation)]
        replaced += 1
    return replaced


def _chain(node: gs.Node, outputs: set[str]) -> list[gs.Node]:
    """The node and its only readers, as long as they are layout operators."""
    chain: list[gs.Node] = []
    while node.op in ("Reshape", "Transpose") and not node.domain:
        chain.append(node)
        out = node.outputs[0]
        if len(out.outputs) != 1 or out.name in outputs:
            break
        node = out.outputs[0]
        if node.inputs[0] is not out:
            break
    return chain


def _permutation(chain: list[gs.Node], shapes: Mapping[str, tuple[int, ...] | None]) -> tuple[int, NDArray[np.int64]] | None:
    """Axis and permutation that a chain amounts to, if it does."""
    shape = shapes.get(chain[0].inputs[0].name)
    if not shape or shapes.get(chain[-1].outputs[0].name) != shape or not 0 < np.prod(shape) <= MOST:
        return None
    positions = np.arange(int(np.prod(shape))).reshape(shape)
    for node in chain:
        target = shapes.get(node.outputs[0].name)
        if target is None:
            return None
        if node.op == "Transpose":
            positions = positions.transpose(node.attrs.get("perm"))
        elif int(np.prod(target)) == positions.size:
            positions = positions.reshape(target)
        if positions.shape != tuple(target):
            return None
    moved = [
        np.unique(i - np.arange(n).reshape([-1 if a == b else 1 for b in range(len(shape))]))
        for a, (i, n) in enumerate(zip(np.unravel_index(positions, shape), shape, strict=True))
    ]
    axes = [a for a, m in enumerate(moved) if len(m) > 1 or m[0]]
    if len(axes) != 1:
        return None
    axis = axes[0]
    index = np.unravel_index(positions, shape)[axis]
    line = np.moveaxis(index, axis, 0).reshape(shape[axis], -1)
    return (axis, line[:, 0].astype(np.int64)) if (line == line[:, :1]).all() else None
