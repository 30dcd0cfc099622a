"""Operators that act on each element alone, and those that spread operands over each other."""

from __future__ import annotations

from collections.abc import Sequence

from spa.signatures.table import (
    MAP,
    Carry,
    Dim,
    NodeView,
    One,
    Operand,
    Refusal,
    Rule,
    Signature,
    make,
    rule_of,
    signature,
)

Shape = tuple[int, ...] | None

UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu ImageScaler ParametricSoftplus ScaledTanh Bernoulli
BitCast RandomNormalLike RandomUniformLike""".split()
BROADCAST = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean
Min Mod Mul Or Pow PRelu Sub Sum Where Xor""".split()

SUMS = frozenset({"Add", "Sum"})
ADDITIONS = SUMS | {"Sub"}
STRAIGHT = {**dict.fromkeys(ADDITIONS | {"Mul"}, (0, 1)), "Div": (0,)}  # operator -> inputs that it only multiplies and adds to


def spread(shape: Shape, over: Shape, names: Sequence[str] | None = None) -> Operand:
    """Terms of an operand that is spread over a result, aligned at the last axis."""
    if shape is None or over is None or len(shape) > len(over):
        return None
    offset = len(over) - len(shape)
    return tuple(
        One() if size == 1 and over[offset + i] != 1 else Dim(names[offset + i] if names else f"a.{offset + i}")
        for i, size in enumerate(shape)
    )


def result_shape(shapes: Sequence[Shape]) -> Shape:
    """Shape of the operands spread over each other; None if any is unknown."""
    if any(s is None for s in shapes) or not shapes:
        return None
    known = [s for s in shapes if s is not None]
    rank = max(map(len, known))
    padded = [(1,) * (rank - len(s)) + s for s in known]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))


@signature(*UNARY)
def unary(node: NodeView) -> Signature | Refusal:
    """Each element alone."""
    return make(node, "*a -> *a", a=MAP)


signature("Binarizer", domain="ai.onnx.ml")(unary)
signature("CastLike", pattern="*a, *z -> *a")  # of the second operand only the type is read
signature("SwiGLU", pattern="*a, *a -> *a")


@signature("Clip", "Dropout", "Trunc")
def unary_with_settings(node: NodeView) -> Signature | Refusal:
    """Each element alone; what follows the first input are scalars (or a mask as second output)."""
    return make(node, "*a -> *a, *a", a=MAP)


@signature(*BROADCAST)
def broadcast(node: NodeView) -> Signature | Refusal:
    """Operands spread over each other (numpy's rule)."""
    legacy = legacy_slope(node) if node.op == "PRelu" else legacy_axis(node)
    shapes = list(node.inputs)
    out = result_shape([s for s, there in zip(shapes, node.present, strict=True) if there])
    if legacy is not None:
        return legacy
    if out is None:
        return Refusal("the shape of an operand is unknown")
    adds = tuple(range(len(shapes))) if node.op in ADDITIONS else ()
    return Signature(tuple(spread(s, out) for s in shapes), tuple(spread(out, out) for _ in node.outputs), adds=adds,
                     sums=0 if node.op in SUMS else None, straight=STRAIGHT.get(node.op, ()))  # fmt: skip


def legacy_axis(node: NodeView) -> Signature | None:
    """Before opset 7, attributes `broadcast` and `axis` place the second operand's axes from `axis` on."""
    if node.opset >= 7 or "axis" not in node.attrs or not node.attrs.get("broadcast") or len(node.inputs) != 2:
        return None
    x, y = node.inputs
    if x is None or y is None:
        return None
    axis = int(node.attrs["axis"]) % len(x)
    names = [f"a.{i}" for i in range(len(x))]
    second = tuple(One() if n == 1 and x[axis + i] != 1 else Dim(names[axis + i]) for i, n in enumerate(y))
    whole = tuple(map(Dim, names))
    return Signature((whole, second), (whole,))


def legacy_slope(node: NodeView) -> Signature | None:
    """Before opset 7, a slope with one number a channel belongs to axis 1."""
    x, slope = node.inputs[:2]
    if node.opset >= 7 or x is None or slope is None or len(slope) != 1 or slope[0] == 1 or len(x) < 2:
        return None
    whole = tuple(Dim(f"a.{i}") for i in range(len(x)))
    return Signature((whole, whole[1:2]), (whole,))


@signature("Expand")
def expand(node: NodeView) -> Signature | Refusal:
    """Spread over a shape that is given; the copies that it makes are a dim of their own."""
    shape, out = node.inputs[0], node.outputs[0]
    if shape is None or out is None:
        return Refusal("its shape is unknown")
    target = node.inputs[1]
    skipped = len(out) - (target[0] if target else len(out))
    whole = spread(out, out) or ()
    sizes = tuple(None if len(shape) - len(out) + i >= 0 and shape[len(shape) - len(out) + i] == n else t
                  for i, (n, t) in enumerate(zip(out, whole, strict=True)))
    sizes = tuple(whole[skipped:]) if skipped >= 0 else sizes
    return Signature((spread(shape, out), None), (whole,), carries=(Carry(1, sizes),), kinds={"new": MAP})


def alias(domain: str, op: str, of: str) -> None:
    """Another operator with the signature of a standard one."""
    rule: Rule | None = rule_of("", of)
    assert rule is not None
    signature(op, domain=domain)(rule)
