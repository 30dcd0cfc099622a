"""Reductions, softmax, and operators that run along one axis."""

from __future__ import annotations

from spa.signatures.table import (
    FIXED,
    MAP,
    STAT,
    SUM,
    Demand,
    Dim,
    Kind,
    NodeView,
    One,
    Refusal,
    Signature,
    Term,
    axis_of,
    ints,
    make,
    signature,
)

SUMS = ["ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"]
STATISTICS = """ReduceMean ReduceMax ReduceMin ReduceProd ReduceLogSum ReduceLogSumExp""".split()


def _axes(node: NodeView, rank: int) -> set[int] | None:
    """Axes that a reduction runs over; None if they are computed at run time."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and node.present[1]:
        axes = node.value(1)
        if axes is None:
            return None
    listed = ints(axes) or []
    if not listed:
        return set() if node.attrs.get("noop_with_empty_axes") else set(range(rank))
    return {a % rank for a in listed}


def _reduce(node: NodeView, kind: Kind) -> Signature | Refusal:
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    rank = len(shape)
    axes = _axes(node, rank)
    if axes is None:
        return Refusal("its axes are computed at run time")
    keep = bool(node.attrs.get("keepdims", 1))
    names = [f"r.{i}" if i in axes else f"a.{i}" for i in range(rank)]
    out: tuple[Term, ...] = tuple(One() if i in axes else Dim(n) for i, n in enumerate(names) if keep or i not in axes)
    return Signature((tuple(map(Dim, names)), None), (out,), {"r": kind, "a": MAP})


@signature(*SUMS)
def sums(node: NodeView) -> Signature | Refusal:
    """A term that is gone counts as zero."""
    return _reduce(node, SUM)


@signature(*STATISTICS)
def statistics(node: NodeView) -> Signature | Refusal:
    """Over the positions that are kept."""
    return _reduce(node, STAT)


@signature("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: NodeView) -> Signature | Refusal:
    """One axis from opset 13 on; before, all axes from `axis` on together."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    rank = len(shape)
    if not rank:
        return Refusal("it has no axis")
    axis = axis_of(node, -1 if node.opset >= 13 else 1, rank)
    over = {axis} if node.opset >= 13 else set(range(axis, rank))
    terms = tuple(Dim(f"r.{i}" if i in over else f"a.{i}") for i in range(rank))
    ran = tuple(f"r.{i}" for i in sorted(over))
    return Signature((terms,), (terms,), {"r": STAT, "a": MAP}, cancels=ran, unit=() if node.op == "LogSoftmax" else ran)


@signature("ArgMax", "ArgMin")
def argument(node: NodeView) -> Signature | Refusal:
    """Positions along one axis are the result."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    axis = axis_of(node, 0, len(shape))
    keep = bool(node.attrs.get("keepdims", 1))
    names = [Dim("r" if i == axis else f"a.{i}") for i in range(len(shape))]
    out: tuple[Term, ...] = tuple(One() if i == axis else n for i, n in enumerate(names) if keep or i != axis)
    return Signature((tuple(names),), (out,), {"r": STAT, "a": MAP}, gives={0: "r"})


@signature("TopK")
def top(node: NodeView) -> Signature | Refusal:
    """The k largest among the positions that there are, and where they are: at least k positions stay."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    axis = axis_of(node, -1, len(shape))
    counts = ints(node.value(1)) if len(node.inputs) > 1 else ints([node.attrs.get("k", 1)])
    terms = tuple(Dim("r" if i == axis else f"a.{i}") for i in range(len(shape)))
    out = tuple(Dim("q" if i == axis else f"a.{i}") for i in range(len(shape)))
    outputs = tuple(out if s is not None and len(s) == len(shape) else None for s in node.outputs)
    known = counts is not None and len(counts) == 1 and len(node.outputs) == len(outputs)
    demands = (Demand("r", least=counts[0], cause="so many of them are chosen"),) if known and counts else ()
    causes = {"r": "has an unknown number of its positions chosen", "q": "counts what is chosen"}
    return Signature((terms, *[None] * (len(node.inputs) - 1)), outputs, {"r": STAT if known else FIXED, "q": FIXED}, causes,
                     demands=demands, gives={1: "r"})


@signature("CumSum", "CumProd", "Compress")
def along(node: NodeView) -> Signature | Refusal:
    """What happens along one axis depends on the order or the rank of all positions; other axes pass."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    axis: int | None = None
    if "axis" in node.attrs:
        axis = axis_of(node, -1, len(shape))
    elif node.op != "Compress" and len(node.inputs) > 1:
        listed = ints(node.value(1))
        axis = listed[0] % len(shape) if listed else None
    if axis is None:
        return Refusal("the axis that it runs along is not known")
    terms = tuple(Dim("r" if i == axis else f"a.{i}") for i in range(len(shape)))
    out = tuple(Dim("q" if i == axis else f"a.{i}") for i in range(len(shape)))
    outputs = tuple(out if s is not None and len(s) == len(shape) else None for s in node.outputs)
    causes = {"r": "the order of all positions along it matters"}
    return Signature((terms, *[None] * (len(node.inputs) - 1)), outputs, {"r": FIXED, "q": FIXED}, causes)


@signature("LpNormalization")
def lp_normalization(node: NodeView) -> Signature | Refusal:
    """Divides by a norm along one axis."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    axis = axis_of(node, -1, len(shape))
    terms = tuple(Dim("r" if i == axis else f"a.{i}") for i in range(len(shape)))
    return Signature((terms,), (terms,), {"r": STAT})


@signature("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(node: NodeView) -> Signature | Refusal:
    """Over all spatial axes."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    ones = " 1" * (len(shape) - 2)
    return make(node, f"n c *s -> n c{ones}", s=STAT)


@signature("AveragePool", "MaxPool", "LpPool")
def pool(node: NodeView) -> Signature | Refusal:
    """Each channel alone; windows in space. Indices count through all channels."""
    if any(s is not None for s in node.outputs[1:]):
        return make(node, "n c *s -> n c *t, n c *t", n=FIXED, c=FIXED, s=FIXED, t=FIXED,
                    causes={"c": "is counted by its indices", "n": "is counted by its indices", "s": "a window slides along it"})
    return make(node, "n c *s -> n c *t", s=FIXED, t=FIXED, causes={"s": "a window slides along it"})
