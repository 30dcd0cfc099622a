"""The language of signatures: terms of axes, kinds of dims, and what a signature says beside them.

`table.py` parses the written form and holds the rules; everything that reads signatures imports from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
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
class Mixture:
    """A mixture of experts in one operator: y = Σ g_e f_e(x) over the `count` experts that the router scores highest.

    data, router: input numbers. experts: their dim. g is the softmax of the scores, or the chosen ones' share of it. alone: attributes by
    which the operator takes one expert a token, with weight one. unknown: why g is neither, if it is known to be neither.
    """

    data: int
    router: int
    experts: str
    count: int
    alone: Mapping[str, Any]
    unknown: str = ""


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
    mixture: Mixture | None = None  # where it holds a mixture of experts
    gives: Mapping[int, str] = field(default_factory=dict)  # output -> the dim whose positions its elements are, as found in the data
    roles: Mapping[str, str] = field(default_factory=dict)  # of dims in an operator that holds an attention, see `spa.graph.kinds`
    demands: tuple[Demand, ...] = ()  # of the kernel, on the sizes of dims
    masked: tuple[int, ...] | None = None  # inputs that are enough to mask; stored ones stay so: its kernel computes otherwise with others
    cancels: tuple[str, ...] = ()  # dims along which a number added to all of input 0 changes nothing
    unit: tuple[str, ...] = ()  # dims along which output 0 sums to one
    straight: tuple[int, ...] = ()  # inputs that each element of output 0 is a number times, plus a number; the others tell these numbers

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
