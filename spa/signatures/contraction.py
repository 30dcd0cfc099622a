"""Convolutions and matrix products: what sums over a dim of two operands."""

from __future__ import annotations

from spa.signatures.elementwise import spread
from spa.signatures.table import (
    FIXED,
    MAP,
    SUM,
    Carry,
    Dim,
    Linear,
    NodeView,
    One,
    Operand,
    Refusal,
    Signature,
    Window,
    ints,
    make,
    signature,
)

WINDOW = {"s": "a convolution slides along it", "k": "is a kernel's extent"}


def _slides(node: NodeView, *, transposed: bool = False) -> tuple[Linear, ...]:
    """The linear map of a convolution; none where its kernel or its padding is not known."""
    if len(node.inputs) < 2 or node.inputs[1] is None or node.attrs.get("output_shape"):
        return ()
    kernel = tuple(node.inputs[1][2:])
    ones = (1,) * len(kernel)
    pads = ints(node.attrs.get("pads")) or [0] * (2 * len(kernel))
    same = str(node.attrs.get("auto_pad") or "NOTSET")
    window = Window(
        kernel, tuple(ints(node.attrs.get("strides")) or ones), tuple(ints(node.attrs.get("dilations")) or ones),
        tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)), same if same.startswith("SAME") else "", transposed,
        tuple(ints(node.attrs.get("output_padding")) or (0,) * len(kernel)) if transposed else (),
    )
    return (Linear(0, 1, 2, window),)


@signature("Conv")
def conv(node: NodeView) -> Signature | Refusal:
    """y[n, g o, t] = Σ_c,k x[n, g c, s] w[g o, c, k] + b[g o]; a depthwise one has no c left."""
    group = int(node.attrs.get("group", 1))
    text = "n c *s, o c *k, o, n o *t -> n o *t" if group == 1 else "n (g c) *s, (g o) c *k, (g o), n (g o) *t -> n (g o) *t"
    macs = ("n", "o", "t", "c", "k") if group == 1 else ("n", "g", "o", "t", "c", "k")
    return make(
        node, text, sizes={"g": group} if group > 1 else {}, carries=[Carry("group", Dim("g"))] if group > 1 else (),
        causes=WINDOW, macs=(macs,), c=SUM, s=FIXED, k=FIXED, t=FIXED, linear=_slides(node),
    )


@signature("ConvTranspose")
def conv_transpose(node: NodeView) -> Signature | Refusal:
    """As Conv, with the weight's first two axes exchanged."""
    group = int(node.attrs.get("group", 1))
    text = "n c *s, c o *k, o -> n o *t" if group == 1 else "n (g c) *s, (g c) o *k, (g o) -> n (g o) *t"
    macs = ("n", "c", "s", "o", "k") if group == 1 else ("n", "g", "c", "s", "o", "k")
    return make(
        node, text, sizes={"g": group} if group > 1 else {}, carries=[Carry("group", Dim("g"))] if group > 1 else (),
        causes=WINDOW, macs=(macs,), c=SUM, s=FIXED, k=FIXED, t=FIXED, linear=_slides(node, transposed=True),
    )


@signature("DeformConv")
def deform_conv(node: NodeView) -> Signature | Refusal:
    """As Conv where all channels share one field of offsets."""
    if int(node.attrs.get("offset_group", 1)) != 1:
        return Refusal("its offsets are in groups of channels")
    group = int(node.attrs.get("group", 1))
    return make(
        node, "n (g c) *s, (g o) c *k, n z *t, (g o), n y *t -> n (g o) *t",
        sizes={"g": group}, carries=[Carry("group", Dim("g"))] if group > 1 else (),
        causes=WINDOW, macs=(("n", "g", "o", "t", "c", "k"),), c=SUM, s=FIXED, k=FIXED, t=FIXED, z=FIXED, y=FIXED,
    )


@signature("CausalConvWithState")
def causal_conv(node: NodeView) -> Signature | Refusal:
    """A depthwise convolution along time that carries its last positions: each channel alone."""
    return make(node, "n c l, c 1 k, c, n c p -> n c l, n c p", macs=(("n", "c", "l", "k"),), causes={"l": "is time", **WINDOW},
                l=FIXED, k=FIXED, p=FIXED)


def matmul_operands(a: tuple[int, ...], b: tuple[int, ...], trans_a: bool = False, trans_b: bool = False) -> Signature:
    """numpy.matmul: the last two axes are matrices, those before are spread over each other."""
    rank = max(len(a), len(b), 2)

    def side(shape: tuple[int, ...], matrix: list[str]) -> tuple[Operand, int]:
        batch = shape[:-2]
        offset = rank - 2 - len(batch)
        return tuple(Dim(f"b.{offset + i}") for i in range(len(batch))) + tuple(map(Dim, matrix)), offset

    left, off_a = side(a, (["k", "m"] if trans_a else ["m", "k"]) if len(a) > 1 else ["k"])
    right, off_b = side(b, (["n", "k"] if trans_b else ["k", "n"]) if len(b) > 1 else ["k"])
    both: dict[int, int] = {}
    for shape, offset in ((a, off_a), (b, off_b)):
        for i, size in enumerate(shape[:-2]):
            both[offset + i] = max(both.get(offset + i, 1), size)

    def thin(operand: Operand, shape: tuple[int, ...], offset: int) -> Operand:
        assert operand is not None
        return tuple(
            One() if i < len(shape) - 2 and shape[i] == 1 and both[offset + i] != 1 else t for i, t in enumerate(operand)
        )

    out = tuple(Dim(f"b.{i}") for i in sorted(both))
    out += (Dim("m"),) if len(a) > 1 else ()
    out += (Dim("n"),) if len(b) > 1 else ()
    macs = ("b", "m", "k", "n")
    maps = (Linear(0, 1), Linear(1, 0))
    return Signature((thin(left, a, off_a), thin(right, b, off_b)), (out,), {"k": SUM, "b": MAP}, macs=(macs,), linear=maps)


@signature("MatMul")
def matmul(node: NodeView) -> Signature | Refusal:
    """Y = A B."""
    a, b = node.inputs[:2]
    return Refusal("the shape of an operand is unknown") if not a or not b else matmul_operands(a, b)


@signature("FusedMatMul", "TransposeMatMul", domain="com.microsoft")
def fused_matmul(node: NodeView) -> Signature | Refusal:
    """MatMul with either matrix transposed first."""
    a, b = node.inputs[:2]
    if not a or not b:
        return Refusal("the shape of an operand is unknown")
    if node.attrs.get("transBatchA") or node.attrs.get("transBatchB"):
        return Refusal("it transposes a batch axis")
    return matmul_operands(a, b, bool(node.attrs.get("transA")), bool(node.attrs.get("transB")))


@signature("Gemm")
def gemm(node: NodeView) -> Signature | Refusal:
    """Y = A B + C, C spread over Y."""
    if node.inputs[0] is None or node.inputs[1] is None:
        return Refusal("the shape of an operand is unknown")
    a = "k m" if node.attrs.get("transA") else "m k"
    b = "n k" if node.attrs.get("transB") else "k n"
    gain = float(node.attrs.get("alpha", 1.0)) / (float(node.attrs.get("beta", 1.0)) or 1.0)
    maps = (Linear(0, 1, 2, gain=gain), Linear(1, 0, 2, gain=gain))
    made = make(node, f"{a}, {b} -> m n", macs=(("m", "k", "n"),), k=SUM, linear=maps)
    if isinstance(made, Refusal) or len(node.inputs) < 3 or not node.present[2]:
        return made
    rows = node.inputs[0][1 if node.attrs.get("transA") else 0]
    columns = node.inputs[1][0 if node.attrs.get("transB") else 1]
    c = spread(node.inputs[2], (rows, columns), ["m", "n"])
    return Signature((*made.inputs[:2], c), made.outputs, made.kinds, macs=made.macs, linear=maps)


signature("FusedGemm", domain="com.microsoft")(gemm)
signature("FusedConv", domain="com.microsoft")(conv)


@signature("Einsum")
def einsum(node: NodeView) -> Signature | Refusal:
    """The equation is the signature; a letter that the output lacks is summed over."""
    equation = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    if any(s is None for s in node.inputs):
        return Refusal("the shape of an operand is unknown")
    shapes = [s for s in node.inputs if s is not None]
    dots = max(len(s) - len(o.replace("...", "")) for o, s in zip(operands, shapes, strict=True))
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))

    sizes: dict[str, int] = {}

    def names(text: str, rank: int | None) -> list[str]:
        head, ellipsis, tail = text.partition("...")
        count = 0 if not ellipsis else dots if rank is None else rank - len(head) - len(tail)
        return [*head, *(f"e.{dots - count + i}" for i in range(count)), *tail]

    spelled = [names(o, len(s)) for o, s in zip(operands, shapes, strict=True)]
    for axes, shape in zip(spelled, shapes, strict=True):
        for name, size in zip(axes, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    inputs = tuple(
        tuple(One() if size == 1 and sizes[name] != 1 else Dim(name) for name, size in zip(axes, shape, strict=True))
        for axes, shape in zip(spelled, shapes, strict=True)
    )
    out = names(right, None)
    kinds = {name: SUM for axes in spelled for name in axes if name not in out}
    macs = (tuple(dict.fromkeys(n for axes in spelled for n in axes)),) if len(operands) > 1 else ()
    maps = (Linear(0, 1), Linear(1, 0)) if len(operands) == 2 else ()
    return Signature(inputs, (tuple(map(Dim, out)),), kinds, macs=macs, linear=maps)
