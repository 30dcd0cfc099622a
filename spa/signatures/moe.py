"""Mixtures of experts in one operator: rows of tokens, each through the k experts that its router scores highest.

Letters: m tokens, i the residual width, e experts, j an expert's neurons. Experts are ranked and weighted among those that there are,
so e is STAT; the kernel wants k of them at least. A neuron goes with its gate. With weights of 2, 4 or 8 bits, whole
bytes and blocks go: i = (ii, …), j = (jj, …), see `blocks`.
"""

from __future__ import annotations

import math

from spa.signatures.attention import given
from spa.signatures.blocks import CAUSES, KINDS, Blocks, blocks_of
from spa.signatures.table import FIXED, STAT, SUM, Demand, Kind, Mixture, NodeView, Refusal, Signature, dims_of, make, signature

MS = "com.microsoft"
WHY = {**CAUSES, "m": "counts tokens", "r": "counts tokens", "two": "is a neuron with its gate", "p": "shares a byte"}
EXPERTS: dict[str, Kind] = {**KINDS, "m": FIXED, "r": FIXED, "two": FIXED, "p": FIXED, "e": STAT}


def _demand(node: NodeView) -> Demand:
    """At least as many experts as each token asks for."""
    return Demand("e", least=int(node.attrs.get("k", 1)), cause="so many experts are asked for each token")


def _mixture(node: NodeView, weighs: int | None = None) -> Mixture:
    """How experts are weighted. weighs: the input that holds other weights than the router's."""
    unknown = "takes its experts' weights from an input of their own" if weighs is not None and given(node, weighs) else ""
    if int(node.attrs.get("use_sparse_mixer", 0)):
        unknown = "weighs its experts by a sparse mixer, which kernels compute differently"
    return Mixture(0, 1, "e", int(node.attrs.get("k", 1)), {"k": 1}, unknown)


def _rows(node: NodeView, neurons: str) -> str:
    """Rows of the first weight: neurons, and with a gate in the same weight neighbours or halves."""
    if node.attrs.get("activation_type") != "swiglu" or not int(node.attrs.get("swiglu_fusion", 0)):
        return neurons
    return f"({neurons} two)" if int(node.attrs["swiglu_fusion"]) == 1 else f"(two {neurons})"


@signature("MoE", domain=MS)
def mixture(node: NodeView) -> Signature | Refusal:
    """Of x (…, i), router (m, e); per expert (j, i), (i, j) and for a gate of its own (j, i)."""
    data, first, second = node.inputs[0], node.inputs[2], node.inputs[4]
    if data is None or first is None or second is None:
        return Refusal("the shape of an operand is unknown")
    gated = _rows(node, "j") != "j"
    neurons = first[1] // 2 if gated else first[1]
    older = (first[2], second[1]) != (data[-1], data[-1]) or second[2] != neurons
    rows = _rows(node, "j")
    weights = ("e i j", "e j i", "e i j") if older else (f"e {rows} i", "e i j", "e j i")
    if older and gated:
        return Refusal("its weights are in an older order")
    held = {"i": FIXED, "j": FIXED} if older else {"i": SUM, "j": SUM}
    factor = 2 if gated or given(node, 6) else 1
    chosen = int(node.attrs.get("k", 1))
    return make(
        node, f"*m i, r e, {weights[0]}, e {rows}, {weights[1]}, e i, {weights[2]}, e j -> *m i", sizes={"two": 2},
        causes={**WHY, **dict.fromkeys("ij", "has weights in an older order, which is told by their sizes")},
        kinds={**EXPERTS, **held}, demands=(_demand(node),), macs=((chosen * (factor + 1), "m", "i", "j"),),
        roles={"e": "expert", "j": "expert-neuron"}, mixture=_mixture(node),
    )


@signature("QMoE", domain=MS)
def quantised_mixture(node: NodeView) -> Signature | Refusal:
    """As MoE, with weights in bytes (e, rows, bytes), and scales (e, rows), or (e, rows, blocks)."""
    data, first, second = node.inputs[0], node.inputs[2], node.inputs[5]
    if data is None or first is None or second is None:
        return Refusal("the shape of an operand is unknown")
    if any(node.present[15:]) or str(node.attrs.get("quant_type", "int")) != "int" or node.attrs.get("weights_prepacked") == 1:
        return Refusal("its form (scales of activations, prepacked weights) has no signature yet")
    bits, block = int(node.attrs.get("expert_weight_bits", 4)), int(node.attrs.get("block_size", 0))
    zeros = any(node.present[11:14])
    share = 8 // bits if zeros and block else 1
    i, j = (_axis(n, width, bits, block, share) for n, width in (("i", data[-1]), ("j", second[2] * 8 // bits)))
    rows = _rows(node, j.positions)
    gated = rows != j.positions
    if zeros and not block and gated and bits == 2:
        return Refusal("zero points of neurons and gates share bytes")
    by_row = {False: "j", True: "(j p)" if int(node.attrs.get("swiglu_fusion", 0)) == 1 else "(two j)"}[gated] if bits < 8 else rows
    scales = [f"e {rows}", f"e {i.positions}", f"e {j.positions}"]
    points = [f"e {by_row}", "e i" if bits < 8 else scales[1], "e j" if bits < 8 else scales[2]]
    if block:
        ends = (i, j, i)
        points = [f"{s} {p.zeros}" for s, p in zip(scales, ends, strict=True)]
        scales = [f"{s} {p.blocks}" for s, p in zip(scales, ends, strict=True)]
    held: dict[str, Kind] = {"i": FIXED if i.held else SUM, "j": FIXED if j.held else SUM}
    factor = 2 if gated or given(node, 8) else 1
    return make(
        node,
        f"*m {i.positions}, r e, e {rows} ({i.stored}), {scales[0]}, e {rows}, e {i.positions} ({j.stored}), {scales[1]}, e {i.positions},"
        f" e {j.positions} ({i.stored}), {scales[2]}, e {j.positions}, {points[0]}, {points[1]}, {points[2]}, r e -> *m {i.positions}",
        sizes={"two": 2, **i.sizes, **j.sizes}, causes={**WHY, "i": i.held, "j": j.held}, kinds={**EXPERTS, **held},
        demands=(_demand(node),), macs=((int(node.attrs.get("k", 1)) * (factor + 1) * _inner(i) * _inner(j), "m", "i", "j"),),
        roles={"e": "expert", "j": "expert-neuron"},
        mixture=_mixture(node, 14),
        masked=(0, 3, 4, 9, 10),
    )


def _axis(name: str, width: int, bits: int, block: int, share: int) -> Blocks:
    """A quantised axis: in blocks with scales of their own, or as one of which bytes go."""
    if block:
        return blocks_of(width, block, block * bits // 8, share, name)
    return Blocks(f"({name} p)", name, "", "", {name: width * bits // 8, "p": 8 // bits})


def _inner(axis: Blocks) -> int:
    """Positions that one coordinate of an axis stands for."""
    return math.prod(axis.sizes.get(str(d), 1) for d in dims_of(axis.size) if str(d) not in "ij")
