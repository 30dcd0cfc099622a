"""Recurrent layers, attention and rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spa.signatures.table import (
    FIXED,
    MAP,
    SUM,
    Carry,
    Dim,
    Linear,
    NodeView,
    Product,
    Refusal,
    Signature,
    make,
    signature,
)

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@signature("LSTM", "GRU", "RNN")
def recurrent(node: NodeView) -> Signature | Refusal:
    """Hidden units go one by one, in both directions alike.

    In the masked form a unit has no parameters, and its column of the recurrent weight is zero: no other unit sees it.
    """
    gates = GATES[node.op]
    time = "b t" if node.attrs.get("layout") else "t b"
    state = "b r h" if node.attrs.get("layout") else "r b h"
    out = "b t r h" if node.attrs.get("layout") else "t r b h"
    both = (Dim("r"), Product((Dim("both"), Dim("gate"), Dim("h"))))  # biases of the input first, of the hidden state second
    return make(
        node,
        f"{time} i, r (gate h) i, r (gate h) h, r ({2 * gates} h), b, {state}, {state}, r (3 h) -> {out}, {state}, {state}",
        sizes={"gate": gates},
        carries=[Carry("hidden_size", Dim("h"))],
        causes={"t": "is time", "r": "counts directions", "gate": "counts parts that the operator always has"},
        macs=(("t", "b", "r", gates, "h", "i"), ("t", "b", "r", gates, "h", "h")),
        linear=(Linear(0, 1, 3, spread=both),),
        t=FIXED, r=FIXED, gate=FIXED, b=MAP, i=SUM, h=SUM,
    )


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
        carries += [Carry("q_num_heads", Product((Dim("kv"), Dim("g")))), Carry("kv_num_heads", Dim("kv"))]
        sizes |= {"d": depth}
    else:
        text = "b (kv g) t d, b kv s d, b kv s e"
    out = "b t (kv g e)" if flat else "b (kv g) t e"
    mask = node.inputs[3] if len(node.inputs) > 3 and node.present[3] else None
    axes = ["b", "(kv g)", "mt", "ms"]
    masks = " ".join("1" if n == 1 else axes[4 - len(mask) + i] for i, n in enumerate(mask)) if mask else "-"
    return make(
        node, f"{text}, {masks}, b kv p d, b kv p e, b -> {out}, b kv u d, b kv u e, b (kv g) t u",
        sizes=sizes, carries=carries, macs=(("b", "kv", "g", "t", "s", "d"), ("b", "kv", "g", "t", "s", "e")),
        d=SUM, t=FIXED, s=FIXED, p=FIXED, u=FIXED, mt=FIXED, ms=FIXED, roles={"kv": "head", "g": "query", "d": "qk", "e": "vo"},
    )


@signature("RotaryEmbedding")
def rotary(node: NodeView) -> Signature | Refusal:
    """Turns pairs of a head's dims: halves (r|r), or neighbours (r 2) if interleaved."""
    shape = node.inputs[0]
    if shape is None or node.inputs[1] is None:
        return Refusal("its shape is unknown")
    pair = "(r 2)" if node.attrs.get("interleaved") else "(2 r)"
    partial = int(node.attrs.get("rotary_embedding_dim", 0))
    tables = "b t" if len(node.inputs[1]) == 3 else "_"  # one row a position of x, or a table that the fourth input looks up
    if len(shape) == 4:
        depth, text, carries = shape[3], f"b h t {pair}", []
    else:
        heads = int(node.attrs.get("num_heads", 0))
        if not heads:
            return Refusal("its number of heads is not given")
        depth, text = shape[2] // heads, f"b t (h {pair})"
        carries = [Carry("num_heads", Dim("h"))]
    if partial not in (0, depth):
        plain = text.replace(pair, "d")
        return make(node, f"{plain}, {tables} z, {tables} z, b t -> {plain}", sizes={"d": depth}, carries=carries,
                    causes={"d": "only a part of it is turned"}, d=FIXED, z=FIXED)
    return make(node, f"{text}, {tables} r, {tables} r, b t -> {text}", sizes={"r": depth // 2}, carries=carries, r=MAP)


def _heads(node: NodeView) -> int:
    return int(node.attrs.get("num_heads", 0))


@signature("MultiHeadAttention", domain="com.microsoft")
def multi_head_attention(node: NodeView) -> Signature | Refusal:
    """Separate query, key and value (b, t, h d); no cache, no mask per head."""
    query = node.inputs[0]
    heads = _heads(node)
    if query is None or not heads or any(node.present[3:5]) or any(node.present[5:]):
        return Refusal("its form (packed, masked, biased or with cache) has no signature yet")
    if len(node.inputs) < 3 or any(s is None or len(s) != 3 for s in node.inputs[:3]):
        return Refusal("its operands are packed")
    carries = [Carry("num_heads", Dim("h"))]
    if not node.attrs.get("scale"):
        carries.append(Carry("scale", value=1 / math.sqrt(query[2] // heads)))
    return make(node, "b t (h d), b s (h d), b s (h e) -> b t (h e)", sizes={"h": heads}, carries=carries,
                macs=(("b", "h", "t", "s", "d"), ("b", "h", "t", "s", "e")), d=SUM, t=FIXED, s=FIXED,
                roles={"h": "head", "d": "qk", "e": "vo"})


@signature("Attention", domain="com.microsoft")
def packed_attention(node: NodeView) -> Signature | Refusal:
    """One weight for query, key and value: x (b s i), w (i 3·h·d) -> (b s h·d)."""
    heads = _heads(node)
    sizes: Mapping[str, int] = {"h": heads}
    weight = node.inputs[1]
    if weight is None or not heads or node.attrs.get("qkv_hidden_sizes") or any(node.present[4:]) \
            or node.attrs.get("do_rotary") or any(s is not None for s in node.outputs[1:]):
        return Refusal("its form (different widths, cache or bias of scores) has no signature yet")
    carries = [Carry("num_heads", Dim("h"))]
    if not node.attrs.get("scale"):
        carries.append(Carry("scale", value=1 / math.sqrt(weight[1] // 3 // heads)))
    return make(node, "b s i, i (3 h d), (3 h d), - -> b s (h d)", sizes=sizes, carries=carries,
                macs=(("b", "s", "i", 3, "h", "d"), (2, "b", "h", "s", "s", "d")), i=SUM, d=SUM, s=FIXED,
                linear=(Linear(0, 1, 2),), b=FIXED if any(node.present[3:]) else MAP, roles={"h": "head", "d": "head-width"})
