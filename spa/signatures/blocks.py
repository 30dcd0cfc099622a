"""Weights in blocks of 2, 4 or 8 bits that share a scale, packed into bytes: products, embedding tables, experts.

Letters: q blocks along the quantised axis, x positions of a block, y bytes of a block. Whole blocks go, as their scales do. Where the
zero points of neighbouring blocks share a byte, (q' z), they go together.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from spa.signatures.attention import given
from spa.signatures.indexing import BY_DATA
from spa.signatures.table import FIXED, SUM, Carry, Dim, Kind, NodeView, Product, Refusal, Signature, make, signature

MS = "com.microsoft"
BITS = "has zero points that share bytes, the last one alone"
CAUSES = {
    "x": "shares one scale",
    "y": "shares one scale",
    "z": "shares a byte of zero points",
    "w": "has a last block that is not full",
    **dict.fromkeys(("oq", "oi", "oj"), "shares a byte of zero points"),
}
KINDS = dict.fromkeys(CAUSES, FIXED)


@dataclass(frozen=True)
class Blocks:
    """Patterns of an axis in blocks: its positions, its bytes, its blocks, and its zero points; the sizes of their dims.

    held: why no block may go, empty if they may.
    """

    positions: str
    stored: str
    blocks: str
    zeros: str
    sizes: dict[str, int]
    held: str = ""

    @property
    def size(self) -> Product:
        """Number of positions."""
        return Product(tuple(map(Dim, re.findall(r"[a-z]\w*", self.positions))))


def blocks_of(length: int, block: int, stored: int, share: int, q: str = "q") -> Blocks:
    """An axis of `length` in blocks of `block` positions and `stored` bytes, called `q`; `share` zero points are in a byte."""
    full, rest = divmod(length, block)
    count = full + bool(rest)
    sizes = {"x": block, "y": stored, "z": share, f"o{q}": -(-count // share)}
    zeros = q if share == 1 else f"o{q}"
    if rest:
        return Blocks("w", f"{q} y", q, zeros, {**sizes, q: count}, CAUSES["w"])
    if share == 1 or count % share:
        return Blocks(f"({q} x)", f"{q} y", q, zeros, {**sizes, q: count}, "" if share == 1 else BITS)
    return Blocks(f"(({q} z) x)", f"({q} z) y", f"({q} z)", q, {**sizes, q: count // share})


@signature("MatMulNBits", domain=MS)
def matmul_bits(node: NodeView) -> Signature | Refusal:
    """Of x (…, k), weights (n, q, y), scales (n, q) or flat: y[…, n] = Σ_k x[…, k] w[n, k] + b[n]."""
    data, weight = node.inputs[:2]
    if data is None or weight is None or len(weight) != 3:
        return Refusal("its shape is unknown")
    if node.attrs.get("weight_prepacked"):
        return Refusal("its weights are in the order of one machine")
    length, bits, block = int(node.attrs["K"]), int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
    zeros = node.inputs[3] if given(node, 3) else None
    alone = zeros is None or math.prod(zeros) == weight[0] * weight[1]
    parts = blocks_of(length, block, weight[2], 1 if alone else 8 // bits)
    held = "is in an order that its fifth input gives" if given(node, 4) else parts.held

    def flat(index: int, term: str) -> str:
        shape = node.inputs[index] if given(node, index) else None
        return "-" if shape is None else f"n {term}" if len(shape) == 2 else f"(n {term})"

    return make(
        node, f"*m {parts.positions}, n {parts.stored}, {flat(2, parts.blocks)}, {flat(3, parts.zeros)}, -, n -> *m n",
        sizes=parts.sizes, carries=[Carry("N", Dim("n")), *([] if held else [Carry("K", parts.size)])], causes={**CAUSES, "q": held},
        kinds={**KINDS, "q": FIXED if held else SUM}, macs=(("m", "q", "z", "x", "w", "n"),), roles={"n": "output", "q": "column"},
        masked=(0,),
    )


@signature("GatherBlockQuantized", domain=MS)
def gather_blocks(node: NodeView) -> Signature | Refusal:
    """Rows of a table (row, width) in blocks along its width, chosen by data."""
    data, index, scales = node.inputs[:3]
    if data is None or index is None or scales is None:
        return Refusal("its shape is unknown")
    if len(data) != 2 or int(node.attrs.get("gather_axis", 0)) or int(node.attrs.get("quantize_axis", 1)) not in (1, -1):
        return Refusal("it does not pick rows of a matrix that is quantised along its columns")
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs.get("block_size", 128))
    if data[1] % scales[1]:
        return Refusal(f"it {CAUSES['w']}")
    zeros = node.inputs[3] if given(node, 3) else None
    parts = blocks_of(scales[1] * block, block, data[1] // scales[1], 1 if zeros in (None, scales) else 8 // bits)
    held: dict[str, Kind] = {"q": FIXED} if parts.held else {}
    return make(
        node, f"row ({parts.stored}), *i, row {parts.blocks}, row {parts.zeros} -> *i {parts.positions}", sizes=parts.sizes,
        causes={**CAUSES, "row": BY_DATA, "i": "holds positions", "q": parts.held},
        kinds={**KINDS, "row": FIXED, "i": FIXED, **held}, picked={"row": 1},
    )
