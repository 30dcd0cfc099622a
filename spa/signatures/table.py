"""The language of signatures, and the table of them.

A signature says how the axes of a node's inputs and outputs share dims:

    "n c *s, o c *k, o -> n o *t"         one operand between commas, one term an axis
    "n (g c) *s, (g o) c *k -> n (g o) *t"  (g c): a product, outer factor first
    "n a s, n b s -> n (a|b) s"           (a|b): a sum, one block after the other
    "*s" as many axes as are left;  "1" an axis of size one that is spread over the others;
    "4" (in a product) a fixed factor;  "_" an axis that nothing may be removed from;  "-" an operand read as a setting

`Kind` says what removing a coordinate of a dim does to the rest of the output (DESIGN.md §1). A `Carry` names a place
that restates a dim's size: an attribute, or elements of a constant input.

A rule is a function of a `NodeView` that returns a `Signature` or a `Refusal`; `signature` enters it into the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa.signatures.terms import (
    FIXED,
    MAP,
    STAT,
    SUM,
    Carry,
    Demand,
    Dim,
    Kind,
    Linear,
    Mixture,
    NodeView,
    One,
    Operand,
    Parted,
    Pick,
    Product,
    Refusal,
    Signature,
    Sum,
    Term,
    Window,
    cause_of,
    dims_of,
    kind_of,
)  # fmt: skip

Rule: TypeAlias = Callable[[NodeView], Signature | Refusal]

_TABLE: dict[tuple[str, str], Rule] = {}
_TOKEN = re.compile(r"\(|\)|\||\*?[A-Za-z_][A-Za-z_0-9]*|\d+|-")


class PatternError(ValueError):
    """A signature that can't be parsed or does not fit the ranks of its node."""


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    left, arrow, right = text.partition("->")
    if not arrow:
        raise PatternError(f"signature {text!r} has no '->'")

    def side(part: str) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(_TOKEN.findall(operand)) for operand in part.split(","))

    return side(left), side(right)


def _term(tokens: list[str], sizes: dict[str, int]) -> Term:
    """One term from the front of the tokens, which it consumes."""
    token = tokens.pop(0)
    if token != "(":
        return _atom(token, sizes)
    parts: list[Term] = []
    bars = 0
    while tokens[0] != ")":
        if tokens[0] == "|":
            bars += 1
            tokens.pop(0)
        else:
            parts.append(_term(tokens, sizes))
    tokens.pop(0)
    if bars and bars != len(parts) - 1:
        raise PatternError("products and sums in one bracket need brackets of their own")
    return Sum(tuple(parts)) if bars else Product(tuple(parts))


def _atom(token: str, sizes: dict[str, int]) -> Term:
    if token == "1":
        return One()
    if token.isdigit():
        name = f"_{token}x{len(sizes)}"
        sizes[name] = int(token)
        return Dim(name)
    return Dim(token)


def _operand(tokens: Iterable[str], rank: int | None, sizes: dict[str, int], blank: list[int]) -> Operand:
    rest = list(tokens)
    if rest == ["-"] or rank is None:
        return None
    terms: list[Term | str] = []
    while rest:
        if rest[0].startswith("*"):
            terms.append(rest.pop(0)[1:])
        else:
            terms.append(_term(rest, sizes))
    out: list[Term] = []
    for term in terms:
        if isinstance(term, str):
            count = rank - (len(terms) - 1)
            if count < 0:
                raise PatternError(f"rank {rank} is too small")
            out += [Dim(f"{term}.{i}") for i in range(count)]
        elif term == Dim("_"):
            blank.append(len(blank))
            out.append(Dim(f"_{len(blank)}"))
        else:
            out.append(term)
    if len(out) != rank:
        raise PatternError(f"rank {rank}, but the signature has {len(out)} axes")
    return tuple(out)


def make(
    node: NodeView,
    text: str,
    *,
    sizes: Mapping[str, int] | None = None,
    carries: Iterable[Carry] = (),
    causes: Mapping[str, str] | None = None,
    macs: tuple[tuple[str | int, ...], ...] = (),
    kinds: Mapping[str, Kind] | None = None,
    linear: tuple[Linear, ...] = (),
    moments: tuple[int, int] | None = None,
    roles: Mapping[str, str] | None = None,
    demands: tuple[Demand, ...] = (),
    picked: Mapping[str, int] | None = None,
    affine: tuple[int, int | None] | None = None,
    masked: tuple[int, ...] | None = None,
    mixture: Mixture | None = None,
    **more: Kind,
) -> Signature | Refusal:
    """Signature of a node from its pattern.

    Keyword arguments give kinds by dim name (`s=FIXED` holds for all of `*s`); `causes` say why FIXED dims are.
    Operands that the node does not have are passed over; trailing outputs may be missing.
    """
    left, right = _parse(text)
    known = dict(sizes or {})
    given = set(known)
    blank: list[int] = []
    try:
        ranks = [None if s is None else len(s) for s in node.inputs]
        for i, rank in enumerate(ranks):
            if rank is None and node.present[i] and i < len(left) and left[i] != ("-",):
                return Refusal("the shape of an operand is unknown")
        inputs = tuple(
            _operand(left[i], r, known, blank) if i < len(left) and node.present[i] else None
            for i, r in enumerate(ranks)
        )
        by_name = {str(t).split(".")[0]: 0 for o in inputs for t in o or () if isinstance(t, Dim) and "." in t.name}
        for o in inputs:
            for t in o or ():
                if isinstance(t, Dim) and "." in t.name:
                    star, index = t.name.split(".")
                    by_name[star] = max(by_name[star], int(index) + 1)
        outputs: list[Operand] = []
        for i, shape in enumerate(node.outputs):
            if i >= len(right):
                outputs.append(None)
                continue
            rank = len(shape) if shape is not None else _rank(right[i], by_name)
            outputs.append(_operand(right[i], rank, known, blank))
    except PatternError as error:
        return Refusal(f"its signature {text!r} does not fit: {error}")
    fixed = dict(causes or {})
    all_kinds = {**(kinds or {}), **more}
    for name in known:
        if name not in given:
            all_kinds[name] = FIXED
            fixed.setdefault(name, "counts parts that the operator always has")
    for i in range(1, len(blank) + 1):
        all_kinds[f"_{i}"] = FIXED
    return Signature(inputs, tuple(outputs), all_kinds, fixed, known, tuple(carries), macs=macs, linear=linear, moments=moments,
                     roles=dict(roles or {}), demands=demands, picked=dict(picked or {}), affine=affine, masked=masked, mixture=mixture)


def _rank(tokens: Iterable[str], stars: Mapping[str, int]) -> int | None:
    rest, count = list(tokens), 0
    while rest:
        if rest[0].startswith("*"):
            name = rest.pop(0)[1:]
            if name not in stars:
                return None
            count += stars[name]
        else:
            _term(rest, {})
            count += 1
    return count


def signature(
    *ops: str, domain: str = "", pattern: str | None = None, sizes: Mapping[str, int] | None = None, **kinds: Kind
) -> Callable[[Rule], Rule]:
    """Enters operators into the table: a decorator for a rule, or with `pattern` the rule itself.

        spa.signature("MyNorm", domain="my.domain", pattern="n c *s, c -> n c *s", s=spa.STAT)

    Later entries replace earlier ones, so that a user can also correct a rule.
    """

    def enter(rule: Rule) -> Rule:
        for op in ops:
            _TABLE[domain, op] = rule
        return rule

    if pattern is not None:
        _parse(pattern)
        enter(lambda node: make(node, pattern, sizes=sizes, kinds=kinds))
    return enter


def rule_of(domain: str, op: str) -> Rule | None:
    """The rule of an operator; "ai.onnx" is the default domain."""
    return _TABLE.get(("" if domain == "ai.onnx" else domain, op))


def read(rule: Rule | None, node: NodeView) -> Signature | Refusal:
    """The signature of a node. A node that breaks its operator's rules may make a rule fail in any way; that is a refusal."""
    if rule is None:
        return Refusal("the operator has no signature")
    try:
        return rule(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, AssertionError) as error:
        return Refusal(f"its inputs and attributes do not fit the operator ({type(error).__name__}: {error})")


def operators() -> list[tuple[str, str]]:
    """All (domain, operator) of the table, sorted."""
    return sorted(_TABLE)


def axis_of(node: NodeView, default: int, rank: int, name: str = "axis") -> int:
    """An axis attribute, counted from the front."""
    axis = int(node.attrs.get(name, default))
    return axis + rank if axis < 0 else axis


def ints(array: NDArray[Any] | Iterable[int] | None) -> list[int] | None:
    """A small constant as Python ints."""
    return None if array is None else [int(v) for v in np.asarray(array).ravel()]


__all__ = [
    "FIXED", "MAP", "STAT", "SUM", "Carry", "Demand", "Dim", "Kind", "Linear", "Mixture", "NodeView", "One", "Operand", "Parted",
    "PatternError", "Pick", "Product", "Refusal", "Rule", "Signature", "Sum", "Term", "Window", "axis_of", "cause_of", "dims_of", "ints",
    "kind_of", "make", "operators", "read", "rule_of", "signature",
]  # fmt: skip
