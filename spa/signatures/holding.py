"""Which outputs of an operator hold the elements of which inputs, as they are: moved, with others beside, or partly written over.

Following these from a graph output back to a graph input finds what a model carries from call to call (`spa.graph.state`).
"""

from __future__ import annotations

from spa.signatures.arithmetic import KEEPS_VALUES

Pairs = tuple[tuple[int, int], ...]  # (input, output)

EVERY = -1
"""In place of an input's number: all of them."""

_CONTRIB = "com.microsoft"

_GROWS: dict[tuple[str, str], Pairs] = {
    ("", "Concat"): ((EVERY, 0),),
    ("", "Scatter"): ((0, 0),),
    ("", "ScatterElements"): ((0, 0),),
    ("", "ScatterND"): ((0, 0),),
    ("", "TensorScatter"): ((0, 0),),
    ("", "Attention"): ((4, 1), (5, 2)),
    (_CONTRIB, "Attention"): ((4, 1),),
    (_CONTRIB, "MultiHeadAttention"): ((6, 1), (7, 2)),
    (_CONTRIB, "GroupQueryAttention"): ((3, 1), (4, 2)),
}


def grows_by(domain: str | None, op: str) -> Pairs:
    """(input, output) where the output is the input with more elements, or with some written over: a cache and its next state."""
    return _GROWS.get((_plain(domain), op), ())


def held_by(domain: str | None, op: str) -> Pairs:
    """(input, output) where the output holds elements of the input as they are; `grows_by` is a part of it."""
    moved: Pairs = ((0, 0),) if not _plain(domain) and op in KEEPS_VALUES - {"Concat"} else ()
    return moved + grows_by(domain, op)


def _plain(domain: str | None) -> str:
    return "" if domain in (None, "ai.onnx") else str(domain)
