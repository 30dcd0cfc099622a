"""The one table: what every operator does with the axes of its operands. See `spa.signatures.table`."""

from spa.signatures import (
    attention,
    blocks,
    contraction,
    elementwise,
    indexing,
    layout,
    moe,
    normalization,
    opaque,
    reduction,
    rotary,
    sequence,
)
from spa.signatures.table import FIXED, MAP, STAT, SUM, Carry, Kind, Refusal, Signature, operators, rule_of, signature

__all__ = [
    "FIXED",
    "MAP",
    "STAT",
    "SUM",
    "Carry",
    "Kind",
    "Refusal",
    "Signature",
    "attention",
    "blocks",
    "contraction",
    "elementwise", "indexing",
    "layout",
    "moe",
    "normalization",
    "opaque",
    "operators",
    "reduction",
    "rotary",
    "rule_of",
    "sequence",
    "signature",
]
