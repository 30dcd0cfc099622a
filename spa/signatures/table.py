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
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray


class Kind(Enum):
    """What removing one coordinate of a dim means for what is left of the output."""

    MAP = "map"  # the rest is as it was
    SUM = "sum"  # a term of a sum is gone: the same as a zero there
    STAT = "stat"  # a mean, norm or softmax ran over it: now over the kept positions
    FIXED = "fixed"  # the operator has no meaning without it


MAP, SUM, STAT, FIXED = Kind.MAP, Kind.SUM, Kind.STAT, Kind.FIXED


@dataclass(frozen=True)
class Dim:
    """A dim of the signature; the same name anywhere in it is the same dim."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Product:
    """Axis (a b …), outer factor first."""

    parts: tuple[Term, ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Sum:
    """Axis (a|b|…), one block after the other."""

    parts: tuple[Term, ...]

    def __str__(self) -> str:
        return f"({'|'.join(map(str, self.parts))})"


@dataclass(frozen=True)
class One:
    """An axis of size one that is spread over another operand's axis, or was reduced to one."""

    def __str__(self) -> str:
        return "1"


@dataclass(frozen=True)
class Pick:
    """Output axis that takes positions `index` of dim `part`, in that order."""

    part: Dim
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.part}[{len(self.index)} picked]"


Term: TypeAlias = Dim | Product | Sum | One | Pick
Operand: TypeAlias = tuple[Term, ...] | None  # None: read as a setting, nothing may be removed from it


@dataclass(frozen=True)
class Carry:
    """A place that restates sizes: attribute `where`, or input number `where`.

    `sizes` is one term (a number) or a tuple of them (a list; None = an element that is left alone).
    `value` is written as it is, into a node that loses anything: a default that depended on a size.
    `remap` is for indices into a dim: they are renumbered, and those of removed positions go.
    """

    where: str | int
    sizes: Term | tuple[Term | int | None, ...] | None = None
    value: Any = None
    remap: Pick | None = None
    infer: bool = False  # an element of -1 is inferred by the operator


@dataclass(frozen=True)
class Demand:
    """What a kernel wants of how many positions of a dim there are: a multiple of `multiple`, and `least` of them.

    cause: why, in words that follow what may shrink.
    """

    dim: str
    multiple: int = 1
    least: int = 1
    cause: str = ""


@dataclass(frozen=True)
class Window:
    """How a kernel slides over the space axes; `same` is the auto_pad attribute where that decides the pads at run time.

    pads: (begin, end) of each axis. transposed: the kernel is spread from each position instead of gathered to it.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    same: str = ""
    transposed: bool = False
    extra: tuple[int, ...] = ()  # output_padding of a transposed one


@dataclass(frozen=True)
class Linear:
    """What the node computes of operand `data` is weight · data + bias / gain, summed over the SUM dims (and the window).

    data, weight: input numbers. bias: input number where a bias belongs, None if the operator has no place for one.
    spread: the bias's axes where they are others than the signature's; dims that the map lacks count at their position 0.
    """

    data: int
    weight: int
    bias: int | None = None
    window: Window | None = None
    gain: float = 1.0
    spread: Operand = None


@dataclass(frozen=True)
class Parted:
    """A node as two: the sum of its operands `terms` and of stored ones, and the operator `op` over that sum and its inputs `rest`.

    attributes: those that `op` shares with the node, with the node's defaults. sum: number of the output that holds the sum.
    """

    op: str
    domain: str
    terms: tuple[int, int]
    stored: tuple[int, ...]
    rest: tuple[int, ...]
    sum: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Signature:
    """One node's signature, with ranks known and variadic axes spelled out."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    causes: Mapping[str, str] = field(default_factory=dict)  # of FIXED dims
    sizes: Mapping[str, int] = field(default_factory=dict)
    carries: tuple[Carry, ...] = ()
    equations: tuple[tuple[Term, Term], ...] = ()  # terms that are the same axis: (of dims to be found, of input dims)
    macs: tuple[tuple[str | int, ...], ...] = ()  # products of dims, summed: multiply-accumulates of the node
    setting_cause: str = "is read as a setting"
    linear: tuple[Linear, ...] = ()  # the linear maps in it, by their data operands
    moments: tuple[int, int] | None = None  # inputs that hold a stored mean and variance of input 0, a dim each channel
    affine: tuple[int, int | None] | None = None  # inputs that hold the scale and bias of what a normalisation gives
    adds: tuple[int, ...] = ()  # inputs that are added up, element by element
    sums: int | None = None  # output that holds the plain sum of those inputs
    parted: Parted | None = None  # how it would be without the sum in it
    picked: Mapping[str, int] = field(default_factory=dict)  # FIXED dims of which positions are picked -> the input that holds these
    roles: Mapping[str, str] = field(default_factory=dict)  # of dims in an operator that holds an attention, see `spa.graph.kinds`
    demands: tuple[Demand, ...] = ()  # of the kernel, on the sizes of dims
    masked: tuple[int, ...] | None = None  # inputs that are enough to mask; stored ones stay so: its kernel computes otherwise with others
    cancels: tuple[str, ...] = ()  # dims along which a number added to all of input 0 changes nothing
    unit: tuple[str, ...] = ()  # dims along which output 0 sums to one

    def __str__(self) -> str:
        def operand(axes: Operand) -> str:
            return "-" if axes is None else " ".join(map(str, axes))

        return f"{', '.join(map(operand, self.inputs))} -> {', '.join(map(operand, self.outputs))}"


@dataclass(frozen=True)
class Refusal:
    """Why nothing may be removed from any axis of this node."""

    cause: str


class NodeView(Protocol):
    """What a rule may look at. Shapes are None where the rank is unknown; values are small constants."""

    op: str
    domain: str
    opset: int
    attrs: Mapping[str, Any]
    inputs: tuple[tuple[int, ...] | None, ...]
    outputs: tuple[tuple[int, ...] | None, ...]
    present: tuple[bool, ...]  # input i is given

    def value(self, index: int) -> NDArray[Any] | None:
        """Input `index` as an array if it is a known small constant."""

    def positions(self, index: int) -> NDArray[np.int64] | None:
        """Input `index` if it is a stored tensor of whole numbers, of any size."""

    def constant(self, index: int) -> bool:
        """Whether input `index` is an initializer, a Constant or made of such."""


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
                     roles=dict(roles or {}), demands=demands, picked=dict(picked or {}), affine=affine, masked=masked)


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


def kind_of(signature: Signature, name: str) -> Kind:
    """Kind of a dim; `*s` gives its kind to s.0, s.1, …"""
    kinds = signature.kinds
    return kinds.get(name) or kinds.get(name.split(".")[0]) or MAP


def cause_of(signature: Signature, name: str) -> str:
    """Why a FIXED dim is fixed, in words that follow an axis's name."""
    causes = signature.causes
    return causes.get(name) or causes.get(name.split(".")[0]) or "has no meaning without all of this axis"


def dims_of(term: Term) -> Iterable[str]:
    """Names of the dims in a term, outer or first ones first."""
    if isinstance(term, Dim):
        yield term.name
    elif isinstance(term, Pick):
        yield term.part.name
    elif isinstance(term, Product | Sum):
        for part in term.parts:
            yield from dims_of(part)


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
