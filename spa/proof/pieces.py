"""A model run in pieces: nodes in graph order as long as their weights fit, one session after the other.

What a model computes can be had in the memory of one piece, or of its largest tensor, however large the model is. Values that later pieces
read are held in between, and wait in files above a limit (`spa.statistics.stepper`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from spa.graph.view import constant_of
from spa.proof.feeds import Feeds
from spa.proof.widen import widen
from spa.statistics.stepper import Stepper, reads
from spa.storage.store import Model
from spa.timing.share import room

WHOLE = 2 << 30  # bytes of weights in float32; a larger model runs in pieces
PIECE = 256 << 20  # bytes of weights of a piece, which may be one node that has more


def is_large(model: Model) -> bool:
    """Whether a model is to be run in pieces."""
    held = {id(c._values): c for node in model.graph.nodes for c in _constants(node)}
    return sum(_bytes(c) for c in held.values()) > room(WHOLE)


def in_pieces(
    model: Model, types: Mapping[str, int], batches: Iterable[Feeds], wanted: Sequence[str]
) -> Iterator[list[dict[str, NDArray[Any]]]]:
    """Runs a model in float32, and gives of each piece, for every batch, those of the wanted values that it makes.

    types: of the model's values, as far as they are known. Inputs of the graph count as made by the first piece.
    Raises UnsupportedModel in the runtime's words.
    """
    wide, _ = widen(model, {})
    fed = [{k: v.astype("float32") if v.dtype.name in ("float16", "bfloat16") else v for k, v in b.items()} for b in batches]
    kinds = {n: int(TensorProto.FLOAT) if t in (TensorProto.FLOAT16, TensorProto.BFLOAT16) else t for n, t in types.items()}
    inputs = {t.name for t in wide.graph.inputs}
    with Stepper(wide, kinds, fed, lean=True) as stepper:
        for number, values in enumerate(_cuts(wide.graph, set(wanted), room(PIECE * 4) // 4)):
            found = stepper.step([v for v in wanted if v in inputs] + values if number == 0 else values)
            yield [{n: v for n, v in one.items() if n in wanted} for one in found]


def _cuts(graph: gs.Graph, wanted: set[str], limit: int) -> Iterator[list[str]]:
    """Of each piece the values that it makes and that are wanted, or read by others."""
    pieces: list[list[gs.Node]] = []
    used = limit
    for node in graph.nodes:
        size = sum(_bytes(c) for c in _constants(node))
        if not pieces or (size and used + size > limit):
            pieces.append([])
            used = 0
        pieces[-1].append(node)
        used += size
    last = {name: number for number, nodes in enumerate(pieces) for node in nodes for name in reads(node)}
    for number, nodes in enumerate(pieces):
        made = [t.name for node in nodes for t in node.outputs if t.name]
        values = [n for n in made if n in wanted or last.get(n, number) > number]
        if values:
            yield values


def _constants(node: gs.Node) -> list[gs.Constant]:
    held = constant_of(node)
    return [t for t in (*node.inputs, *([] if held is None else [held])) if isinstance(t, gs.Constant)]


def _bytes(constant: gs.Constant) -> int:
    """Bytes in float32, if they are of half precision."""
    values = constant._values
    size = int(getattr(values, "nbytes", 0))
    return size * 2 if str(getattr(values, "dtype", "")) in ("float16", "bfloat16") else size
