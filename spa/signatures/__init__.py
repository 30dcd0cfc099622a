"""The one table: what every operator does with the axes of its operands. See `spa.signatures.table`."""

from spa.signatures import contraction, elementwise, indexing, layout, normalization, opaque, reduction, sequence
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
    "contraction",
    "elementwise", "indexing",
    "layout",
    "normalization",
    "opaque",
    "operators",
    "reduction",
    "rule_of",
    "sequence",
    "signature",
]
