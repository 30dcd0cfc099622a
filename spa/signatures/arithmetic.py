"""Operators that matter to shape arithmetic, by what they do; the rest of it is in onnx's own inference and evaluator."""

from __future__ import annotations

READS_SHAPE = frozenset({"Shape", "Size"})
"""Give sizes, not values."""

REINTERPRETS = frozenset({"Squeeze", "Unsqueeze", "Reshape", "Flatten", "Identity"})
"""Give the elements of their first input in the same order, in another shape."""

MOVES = READS_SHAPE | {"Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Transpose", "Split"}
"""Only move elements, so that each element of a result depends on one element."""

KEEPS_VALUES = (MOVES - READS_SHAPE) | {"Cast", "CastLike", "Expand", "Flatten", "Tile"}
"""Give values of their first input, and no others."""

NEVER_FOLDED = frozenset(
    """RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Multinomial Dropout QuantizeLinear DequantizeLinear
    DynamicQuantizeLinear""".split()
)
"""Draw numbers, or belong to a format that the runtime wants to see."""

PASSES = (KEEPS_VALUES - {"Concat"}) | {"Dropout"}
"""Give values of their first input and no others; each element of a result is one element of it."""

STILL = frozenset({"Cast", "CastLike", "Dropout", "Identity"})
"""Of those, what gives each element where it was."""

ADDS = frozenset({"Add"})
"""Add their operands, spread over each other: a stored one is a bias."""

SCALES = {"Mul": (0, 1), "Div": (0,)}
"""Operand numbers in which the result is linear while the other one is a constant."""

SHIFTS = {"Add": (0, 1), "Sub": (0,), "Where": (1, 2)}
"""Operand numbers to which a number can be added instead of to the result, as far as the result is made of that operand."""

MASKS = {"Where": {1: 2, 2: 1}}
"""Operand numbers of which some elements are replaced: the operand that these come from."""

_STANDARD = {("com.microsoft", "FusedConv"): "Conv", ("com.microsoft", "FusedGemm"): "Gemm"}


def standard_form(domain: str | None, op: str) -> str | None:
    """The standard operator whose shapes a fused operator has, None if it is none of those."""
    return _STANDARD.get((domain or "", op))


_TYPED_BY = {("com.microsoft", "EmbedLayerNormalization"): 2, ("com.microsoft", "GatherBlockQuantized"): 2}


def typed_by(domain: str | None, op: str) -> int:
    """The input whose type the results of an operator without an ONNX schema have: the first, but for look-ups."""
    return _TYPED_BY.get((domain or "", op), 0)
