"""Rotary embedding: pairs of a head's width are turned, by tables with a column a pair."""

from __future__ import annotations

from spa.signatures.table import FIXED, MAP, Carry, Dim, NodeView, Product, Refusal, Signature, make, signature

MS = "com.microsoft"
CAUSES = {
    "two": "is a pair that is turned",
    "m": "has one row for each position in time",
    "t": "is time, counted from the first position",
}


@signature("RotaryEmbedding")
def rotary(node: NodeView) -> Signature | Refusal:
    """X (b, h, t, d) or (b, t, h d); tables (b, t, r), or (m, r) of which the fourth input picks rows."""
    return _rotary(node, table=1, ids=3)


@signature("RotaryEmbedding", domain=MS)
def microsoft_rotary(node: NodeView) -> Signature | Refusal:
    """x, the positions in time (b, t) or of the first token (1), tables (m, r)."""
    return _rotary(node, table=2, ids=1)


def _rotary(node: NodeView, *, table: int, ids: int) -> Signature | Refusal:
    """Pairs are halves (2 r) or, if interleaved, neighbours (r 2) of a head's width, or of its first part: the rest passes."""
    shape, rows = node.inputs[0], node.inputs[table]
    if shape is None or rows is None:
        return Refusal("its shape is unknown")
    turned = 2 * rows[-1]
    partial = int(node.attrs.get("rotary_embedding_dim", 0))
    heads = int(node.attrs.get("num_heads", 0))
    if len(shape) == 3 and not heads and (partial or node.domain != MS):
        return Refusal("its number of heads is not given")
    depth = shape[3] if len(shape) == 4 else shape[2] // heads if heads else turned
    if turned > depth or (turned < depth and partial != turned):
        return Refusal("its tables do not fit the width of its heads")
    width = "(r two)" if node.attrs.get("interleaved") else "(two r)"
    width = f"({width}|d)" if turned < depth else width
    text = f"b h t {width}" if len(shape) == 4 else f"b t (h {width})"
    carries = [Carry("num_heads", Dim("h"))] if heads else []
    carries += [Carry("rotary_embedding_dim", Product((Dim("two"), Dim("r"))))] if partial else []
    columns = "b t r" if len(rows) == 3 else "m r"
    picks = "b t" if len(node.inputs) > ids and len(node.inputs[ids] or ()) == 2 else "-"
    operands = [text, columns, columns]
    operands.insert(ids, picks)
    return make(
        node, f"{', '.join(operands)} -> {text}",
        sizes={"two": 2, "r": turned // 2, "d": depth - turned} | ({} if len(shape) == 4 else {"h": shape[2] // depth}),
        carries=carries, causes=CAUSES,
        r=MAP, two=FIXED, m=FIXED, t=FIXED if picks == "-" and columns == "m r" else MAP,
    )
