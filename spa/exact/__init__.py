"""Exact rewrites: the same function with less in it, or in another basis. See `spa.exact.attention` and `spa.exact.experts`."""

from spa.exact.attention import Step
from spa.exact.ranks import NO_RANKS, Cut, Ranks, truncation

__all__ = ["NO_RANKS", "Cut", "Ranks", "Step", "truncation"]
