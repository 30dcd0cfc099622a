"""Attention in one operator: the standard one, and ONNX Runtime's with the projections in it, with shared heads, for decoding.

Letters: b batch, t queries, s keys, p past keys, u keys in all; h heads, kv g heads that share a key with g - 1 others; d width of
query and key in a head, e of the value. A head goes with its part of every operand. A position of d is a term of each
score, so it is SUM; one of e passes. Where a kernel wants keys and values of one width, d is both.

What a kernel refuses stands here as it was found by trying ONNX Runtime 1.32 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from spa.signatures.table import (
    FIXED,
    MAP,
    SUM,
    Carry,
    Demand,
    Dim,
    Kind,
    Linear,
    NodeView,
    Product,
    Refusal,
    Signature,
    make,
    signature,
)

HEADS = Product((Dim("kv"), Dim("g")))
MULTIPLE = 8
"""GroupQueryAttention: "head_size must be a multiple of 8"; with rotation of 16, and the tables' width of 8."""
MS = "com.microsoft"
LENGTHS = dict.fromkeys("tspu", "counts positions in time") | {"mt": "counts positions in time", "ms": "counts positions in time"}
ROLES = {"h": "head", "kv": "head", "g": "query", "d": "qk", "e": "vo"}
TIED_ROLES = {**ROLES, "d": "head-width", "r": "head-width"}
"""What the dims are (`spa.graph.kinds`): with a width of its own for the value, and with one for all."""
TIMES: dict[str, Kind] = dict.fromkeys(LENGTHS, FIXED)


def given(node: NodeView, index: int) -> bool:
    """Whether input `index` is there."""
    return index < len(node.present) and node.present[index]


def over(node: NodeView, index: int, names: Sequence[str]) -> str:
    """Pattern of an operand that is spread over axes of these names, aligned at the last one; "-" if it is not there."""
    shape = node.inputs[index] if given(node, index) else None
    if not shape:
        return "-"
    return " ".join("1" if n == 1 else names[len(names) - len(shape) + i] for i, n in enumerate(shape))


def _keys(node: NodeView, past: int, new: int, *, buffer: bool = False) -> dict[str, int]:
    """Size of u, the keys in all, where no output tells it. buffer: the past has room for the new keys."""
    shape = node.inputs[past] if given(node, past) else None
    held = 0 if shape is None else shape[-2]
    return {"u": held if buffer else held + new} if any(s is None for s in node.outputs[1:]) else {}


def _scale(node: NodeView, depth: int) -> list[Carry]:
    """Without a scale the kernel takes 1/√d, which must not change with d."""
    return [] if node.attrs.get("scale") else [Carry("scale", value=1 / math.sqrt(depth))]


def _products(node: NodeView, past: int, heads: Sequence[str], widths: Sequence[Sequence[str | int]]) -> tuple[tuple[str | int, ...], ...]:
    """Multiply-accumulates of scores and of weighted values, each of one of the `widths`, over new keys and past ones."""
    times = ("s", "p") if given(node, past) else ("s",)
    return tuple(("b", *heads, "t", time, *width) for time in times for width in widths)


@signature("Attention")
def attention(node: NodeView) -> Signature | Refusal:
    """Scaled dot-product attention of opset 23: 4-D operands, or 3-D ones with head counts as attributes."""
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None:
        return Refusal("the shape of an operand is unknown")
    flat = len(query) == 3
    heads = int(node.attrs["q_num_heads"]) if flat else query[1]
    shared = int(node.attrs["kv_num_heads"]) if flat else key[1]
    depth = query[2] // heads if flat else query[3]
    sizes = {"kv": shared, "g": heads // shared}
    carries = [] if "scale" in node.attrs else [Carry("scale", value=1 / math.sqrt(depth))]
    if flat:
        text = "b t (kv g d), b s (kv d), b s (kv e)"
        carries += [Carry("q_num_heads", HEADS), Carry("kv_num_heads", Dim("kv"))]
        sizes |= {"d": depth}
    else:
        text = "b (kv g) t d, b kv s d, b kv s e"
    out = "b t (kv g e)" if flat else "b (kv g) t e"
    sizes |= _keys(node, 4, key[1] if flat else key[2])
    mask = over(node, 3, ["b", "(kv g)", "mt", "ms"])
    return make(
        node, f"{text}, {mask}, b kv p d, b kv p e, b -> {out}, b kv u d, b kv u e, b (kv g) t u",
        sizes=sizes, carries=carries, causes=LENGTHS, macs=_products(node, 4, ("kv", "g"), ("d", "e")), kinds=TIMES, d=SUM,
        roles=ROLES,
    )


@signature("MultiHeadAttention", domain=MS)
def multi_head_attention(node: NodeView) -> Signature | Refusal:
    """Query (b, t, h d) with key and value flat, by heads (b, h, s, d), or packed: (b, s, h, 2, d), (b, t, h, 3, d).

    With a past, or by heads, the kernel wants keys and values of one width.
    """
    query = node.inputs[0]
    heads = int(node.attrs.get("num_heads", 0))
    if query is None or not heads or (given(node, 1) and node.inputs[1] is None):
        return Refusal("the shape of an operand is unknown")
    ranks = [len(query), *(len(node.inputs[i] or ()) if given(node, i) else 0 for i in (1, 2))]
    past = given(node, 6)
    e = "e" if ranks == [3, 3, 3] and not past else "d"
    forms = {
        (3, 3, 3): f"b t (h d), b s (h d), b s (h {e})",
        (3, 4, 4): "b t (h d), b h s d, b h s d",
        (3, 5, 0): "b t (h d), b s h 2 d, -",
        (5, 0, 0): "b t h 3 d, -, -",
    }
    text = forms.get((ranks[0], ranks[1], ranks[2]))
    if text is None:
        return Refusal(f"operands of ranks {ranks} are no form that it is known to take")
    depth = query[4] if len(query) == 5 else query[2] // heads
    new = query[1] if ranks[1] == 0 else (node.inputs[1] or ())[2 if ranks[1] == 4 else 1]
    padding, free = _padding(node, 4, query[0])
    sizes = {"h": heads, "d": depth, **_keys(node, 6, new, buffer=given(node, 8))}
    if ranks[0] == 5:
        sizes["s"] = query[1]
    return make(
        node,
        f"{text}, ((h d)|(h d)|(h {e})), {padding}, {over(node, 5, ['b', 'h', 'mt', 'ms'])}, b h p d, b h p d, -, -"
        f" -> b t (h {e}), b h u d, b h u {e}, b h t u",
        sizes=sizes, carries=[Carry("num_heads", Dim("h")), *_scale(node, depth)], causes=LENGTHS,
        macs=_products(node, 6, "h", ("d", e)), kinds=TIMES, d=SUM, b=MAP if free else FIXED, roles=ROLES if e == "e" else TIED_ROLES,
    )


def _padding(node: NodeView, index: int, batch: int) -> tuple[str, bool]:
    """Pattern of a mask over keys, and whether samples could go: of (b), (b, s), (b, t, s), or counts in another order."""
    shape = node.inputs[index] if given(node, index) else None
    if not shape:
        return "-", not given(node, index)
    if len(shape) > 3 or (len(shape) == 1 and shape[0] != batch):
        return "-", False
    return {1: "b", 2: over(node, index, ["b", "ms"]), 3: over(node, index, ["b", "mt", "ms"])}[len(shape)], True


@signature("DecoderMaskedMultiHeadAttention", domain=MS)
def decoder_attention(node: NodeView) -> Signature | Refusal:
    """One new query; the past is a buffer with room for its key, or the keys of an encoder come by heads."""
    query, key = node.inputs[:2]
    heads = int(node.attrs.get("num_heads", 0))
    if query is None or key is None or not heads:
        return Refusal("its operands are packed")
    depth = query[2] // heads
    text = "b t (h d), b s (h d), b s (h d)" if len(key) == 3 else "b t (h d), b h s d, b h s d"
    room = bool(node.attrs.get("past_present_share_buffer"))
    mask = over(node, 3, ["b", "ms"])
    return make(
        node,
        f"{text}, {mask}, {over(node, 4, ['b', 'h', 'mt', 'mb'])}, b h p d, b h p d, -, -, -, ((h d)|(h d)|(h d))"
        " -> b t (h d), b h u d, b h u d, b h t mq",
        sizes={"h": heads, "d": depth, **_keys(node, 5, query[1], buffer=room)},
        carries=[Carry("num_heads", Dim("h")), *_scale(node, depth)], causes=LENGTHS,
        macs=_products(node, 5, "h", ("d", "d")), kinds=TIMES, d=SUM, mb=FIXED, mq=FIXED, b=MAP if not any(node.present[7:10]) else FIXED,
        roles=TIED_ROLES,
    )


# ---------------------------------------------------------------------- with the projections in it


def _widths(node: NodeView, width: int, heads: int) -> tuple[int, int]:
    """Widths of a head in query and key, and in the value."""
    split = [int(n) for n in node.attrs.get("qkv_hidden_sizes") or ()]
    return (split[0] // heads, split[2] // heads) if split else (width // 3 // heads, width // 3 // heads)


def _hidden(node: NodeView, e: str) -> list[Carry]:
    """qkv_hidden_sizes, which is needed as soon as the widths differ; where they can't, it is restated if it is there."""
    if e == "d" and not node.attrs.get("qkv_hidden_sizes"):
        return []
    width = Product((Dim("h"), Dim("d")))
    return [Carry("qkv_hidden_sizes", (width, width, Product((Dim("h"), Dim(e)))))]


@signature("Attention", domain=MS)
def projected_attention(node: NodeView) -> Signature | Refusal:
    """One weight for query, key and value: x (b s i), w (i, h·d + h·d + h·e) -> (b s h·e).

    With past or present keys the kernel wants d = e: they are in one tensor.
    """
    data, weight = node.inputs[:2]
    heads = int(node.attrs.get("num_heads", 0))
    if data is None or weight is None or not heads:
        return Refusal("the shape of an operand is unknown")
    cached = given(node, 4) or len(node.outputs) > 1
    depth, value = _widths(node, weight[1], heads)
    if cached and depth != value:
        return Refusal("its keys and values have different widths in one cache")
    e = "d" if cached else "e"
    columns = f"((h d)|(h d)|(h {e}))"
    padding, free = _padding(node, 3, data[0])
    room = bool(node.attrs.get("past_present_share_buffer"))
    kinds = dict.fromkeys(("both", "ms", "mt", "s", "p", "u"), FIXED) | {"d": SUM, "i": SUM}
    causes = dict(LENGTHS)
    if node.attrs.get("do_rotary"):
        kinds |= {"d": FIXED}
        causes |= {"d": "is turned inside the kernel"}
    past = (("b", "h", "s", "p", "d"), ("b", "h", "s", "p", e)) if given(node, 4) else ()
    return make(
        node,
        f"b s i, i {columns}, {columns}, {padding}, both b h p d, {over(node, 5, ['b', 'h', 'mt', 'ms'])}, -"
        f" -> b s (h {e}), both b h u d",
        sizes={"h": heads, "d": depth, e: value, "both": 2, **_keys(node, 4, data[1], buffer=room)},
        carries=[Carry("num_heads", Dim("h")), *_scale(node, depth), *_hidden(node, e)], causes=causes,
        macs=((2, "b", "s", "i", "h", "d"), ("b", "s", "i", "h", e), ("b", "h", "s", "s", "d"), ("b", "h", "s", "s", e), *past),
        linear=(Linear(0, 1, 2),), kinds=kinds, b=MAP if free and not given(node, 6) else FIXED, roles=ROLES if e == "e" else TIED_ROLES,
    )


@signature("PackedAttention", domain=MS)
def packed_attention(node: NodeView) -> Signature | Refusal:
    """As Attention, over the tokens of all samples one after the other, without padding: x (n i) -> (n h·e)."""
    weight = node.inputs[1]
    heads = int(node.attrs.get("num_heads", 0))
    if weight is None or not heads:
        return Refusal("the shape of an operand is unknown")
    depth, value = _widths(node, weight[1], heads)
    columns = "((h d)|(h d)|(h e))"
    return make(
        node, f"n i, i {columns}, {columns}, -, -, {over(node, 5, ['b', 'h', 'mt', 'ms'])} -> n (h e)",
        sizes={"h": heads, "d": depth, "e": value},
        carries=[Carry("num_heads", Dim("h")), *_scale(node, depth), *_hidden(node, "e")], causes={"n": "counts tokens", **LENGTHS},
        macs=((2, "n", "i", "h", "d"), ("n", "i", "h", "e"), ("n", "n", "h", "d"), ("n", "n", "h", "e")),
        linear=(Linear(0, 1, 2),), kinds=TIMES, i=SUM, d=SUM, n=FIXED, b=FIXED, roles=ROLES,
    )


@signature("PackedMultiHeadAttention", domain=MS)
def packed_multi_head_attention(node: NodeView) -> Signature | Refusal:
    """As MultiHeadAttention, over the tokens of all samples one after the other: (n, h d) three times, or (n, h, 3, d)."""
    query = node.inputs[0]
    heads = int(node.attrs.get("num_heads", 0))
    if query is None or not heads:
        return Refusal("the shape of an operand is unknown")
    packed = len(query) == 4
    e = "d" if packed else "e"
    depth = query[3] if packed else query[1] // heads
    return make(
        node,
        f"{'n h 3 d, -, -' if packed else 'n (h d), n (h d), n (h e)'}, ((h d)|(h d)|(h {e})), -, -,"
        f" {over(node, 6, ['b', 'h', 'mt', 'ms'])} -> n (h {e})",
        sizes={"h": heads, "d": depth}, carries=[Carry("num_heads", Dim("h")), *_scale(node, depth)],
        causes={"n": "counts tokens", **LENGTHS}, macs=(("n", "n", "h", "d"), ("n", "n", "h", e)), kinds=TIMES, d=SUM, n=FIXED, b=FIXED,
        roles=ROLES if e == "e" else TIED_ROLES,
    )


# ---------------------------------------------------------------------- with shared heads


@signature("GroupQueryAttention", domain=MS)
def group_query_attention(node: NodeView) -> Signature | Refusal:
    """Query (b, t, kv g d), key and value (b, s, kv d), or all three packed in one axis; rotation inside, cache in and out.

    Keys and values have one width. It is made of pairs where it is turned, whose table has a column each.
    """
    query = node.inputs[0]
    heads, shared = int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
    if query is None or (given(node, 1) and not given(node, 2)):
        return Refusal("the shape of an operand is unknown")
    if heads % shared:
        return Refusal("its number of heads is no multiple of the heads of its keys")
    if given(node, 12) and int(node.attrs.get("kv_cache_bit_width", 8)) != 8:
        return Refusal("two numbers of its cache share a byte")
    packed = not given(node, 1)
    depth = query[2] // (heads + 2 * shared if packed else heads)
    turned = (node.inputs[7] or (0, 0))[1] if node.attrs.get("do_rotary") and given(node, 7) else 0
    if node.attrs.get("do_rotary") and not turned:
        return Refusal("its tables of rotation are not known")
    width, demands = _turned(node, depth, turned)
    flat = f"b t ((kv g {width})|(kv {width})|(kv {width})), -, -"
    text = flat if packed else f"b t (kv g {width}), b s (kv {width}), b s (kv {width})"
    new = query[1] if packed else (node.inputs[1] or (0, 0))[1]
    kinds = {**TIMES, "m": FIXED, "d": SUM, "r": SUM, "two": FIXED}
    causes = {**LENGTHS, "m": "has one row for each position in time", "two": "is a pair that is turned"}
    norms = "d" if not turned else "-"
    widths: list[Sequence[str | int]] = [(4, "r")] if turned else []  # pairs, of keys and of values
    widths += [(2, "d")] if depth > 2 * turned else []
    if any(given(node, i) for i in (14, 15)):
        kinds |= {"d": FIXED, "r": FIXED}
        causes |= dict.fromkeys("dr", "is normalised inside the kernel")
    scales = [_cache_scale(node, i, width) for i in (12, 13)]
    time, table = over(node, 9, ["b", "t"]), "m r" if turned else "-"
    return make(
        node,
        f"{text}, b kv p {width}, b kv p {width}, {over(node, 5, ['b', 'one'][: len(node.inputs[5] or ())])}, -, {table}, {table}, {time},"
        f" {over(node, 10, ['b', '(kv g)', 'mt', 'ms'])}, (kv g), {scales[0]}, {scales[1]}, {norms}, {norms}, b"
        f" -> b t (kv g {width}), b kv u {width}, b kv u {width}, b (kv g) t mq",
        sizes={"kv": shared, "g": heads // shared, "d": depth - 2 * turned if turned else depth, "r": turned, "two": 2,
               **_present(node, new)},
        carries=[Carry("num_heads", HEADS), Carry("kv_num_heads", Dim("kv")), *_scale(node, depth)], causes=causes,
        macs=_products(node, 3, ("kv", "g"), widths), kinds=kinds, demands=demands, mq=FIXED,
        roles=TIED_ROLES,
    )


def _turned(node: NodeView, depth: int, turned: int) -> tuple[str, tuple[Demand, ...]]:
    """Pattern of a head's width of which the first 2 · `turned` positions are turned in pairs, and what the kernel wants of it."""
    why = "the kernel of GroupQueryAttention takes no other head width"
    if not turned:
        return "d", (Demand("d", multiple=MULTIPLE, cause=why),)
    pairs = "(r two)" if node.attrs.get("rotary_interleaved") else "(two r)"
    demands = (Demand("r", multiple=MULTIPLE, cause=why),)
    if 2 * turned == depth:
        return pairs, demands
    return f"({pairs}|d)", (*demands, Demand("d", multiple=2 * MULTIPLE, cause=why))


def _cache_scale(node: NodeView, index: int, width: str) -> str:
    """Scales of a quantised cache: one, or one a channel as (kv d) or with more axes."""
    shape = node.inputs[index] if given(node, index) else None
    if not shape or shape == (1,):
        return "1" if shape else "-"
    return {1: f"(kv {width})", 2: f"kv {width}", 4: f"1 kv 1 {width}"}.get(len(shape), "-")


def _present(node: NodeView, new: int) -> dict[str, int]:
    """Sizes of u, keys in the cache, and mq, keys that scores are given for, where no output tells: it grows, or has the room already."""
    held = (node.inputs[3] or (0, 0, 0))[2] if given(node, 3) else 0
    total = node.value(6)
    every = held + new if total is None else int(total.ravel()[0])
    return {n: size for n, size, i in (("u", max(held, every), 1), ("mq", every, 3)) if i < len(node.outputs) and node.outputs[i] is None}
