"""Operators that pick positions: slice, gather, scatter."""

from __future__ import annotations

from spa.signatures.layout import UNKNOWN, whole
from spa.signatures.table import FIXED, Carry, Dim, NodeView, Pick, Product, Refusal, Signature, Sum, Term, axis_of, ints, signature

BY_DATA = "positions are chosen by data"


def _bounds(node: NodeView, shape: tuple[int, ...]) -> list[tuple[int, int, int, int]] | None:
    """(axis, start, end, step) of a Slice, start and end clamped; None if computed at run time."""
    if node.opset < 10:
        starts, ends = ints(node.attrs.get("starts")), ints(node.attrs.get("ends"))
        axes, steps = ints(node.attrs.get("axes")), None
    else:
        starts, ends = ints(node.value(1)), ints(node.value(2))
        absent = [len(node.inputs) <= i or not node.present[i] for i in (3, 4)]
        axes = None if absent[0] else ints(node.value(3))
        steps = None if absent[1] else ints(node.value(4))
        if (axes is None and not absent[0]) or (steps is None and not absent[1]):
            return None
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else [a % len(shape) for a in axes]
    steps = steps or [1] * len(starts)
    found = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        low, high, step = slice(start, end if step > 0 or end >= -shape[axis] else None, step).indices(shape[axis])
        found.append((axis, low, high, step))
    return found


@signature("Slice")
def slice_(node: NodeView) -> Signature | Refusal:
    """A block of an axis is a part of a sum; every step-th position is the inner part of a product."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal(UNKNOWN)
    bounds = _bounds(node, shape)
    if bounds is None:
        return _run_time_slice(node, shape)
    left, right = list(whole(len(shape))), list(whole(len(shape)))
    sizes: dict[str, int] = {}
    kinds = {}
    causes = {}
    starts: list[Term | int | None] = []
    ends: list[Term | int | None] = []
    for axis, low, high, step in bounds:
        size = shape[axis]
        start: Term | None = None
        end: Term | None = None
        if step == 1 and (low, high) == (0, size):
            pass
        elif step == 1 and high > low:
            blocks = {f"{n}.{axis}": k for n, k in (("before", low), ("kept", high - low), ("after", size - high)) if k}
            sizes |= blocks
            terms = tuple(map(Dim, blocks))
            left[axis], right[axis] = (Sum(terms) if len(terms) > 1 else terms[0]), Dim(f"kept.{axis}")
            start = Dim(f"before.{axis}") if low else None
            end = Sum(terms[: 1 + bool(low)]) if high < size else None
        elif step == -1 and low == size - 1 and high == -1:
            right[axis] = Pick(Dim(f"a.{axis}"), tuple(range(size))[::-1])
        elif step > 1 and size % step == 0 and len(range(low, high, step)) == size // step and low < step:
            sizes |= {f"q.{axis}": size // step, f"step.{axis}": step}
            kinds[f"step.{axis}"], causes[f"step.{axis}"] = FIXED, "every so-manieth position is taken"
            left[axis], right[axis] = Product((Dim(f"q.{axis}"), Dim(f"step.{axis}"))), Dim(f"q.{axis}")
            end = left[axis] if high < size else None
        else:
            kinds[f"a.{axis}"], causes[f"a.{axis}"] = FIXED, f"positions {low}:{high}:{step} are taken"
            right[axis], kinds[f"out.{axis}"] = Dim(f"out.{axis}"), FIXED
        starts.append(start)
        ends.append(end)
    old = node.opset < 10
    carries = (Carry("starts" if old else 1, tuple(starts)), Carry("ends" if old else 2, tuple(ends)))
    return Signature((tuple(left), *[None] * (len(node.inputs) - 1)), (tuple(right),), kinds, causes, sizes, carries)


def _run_time_slice(node: NodeView, shape: tuple[int, ...]) -> Signature | Refusal:
    """Bounds that are computed: the axes that are known to be left alone pass."""
    axes = ints(node.value(3)) if len(node.inputs) > 3 and node.present[3] else None
    if axes is None:
        return Refusal("what it cuts out is computed at run time")
    cut = {a % len(shape) for a in axes}
    left = whole(len(shape))
    right = tuple(Dim(f"out.{i}") if i in cut else t for i, t in enumerate(left))
    kinds = {f"{p}.{i}": FIXED for i in cut for p in ("a", "out")}
    return Signature((left, *[None] * (len(node.inputs) - 1)), (right,), kinds,
                     {f"a.{i}": "what is cut out is computed at run time" for i in cut})


@signature("Gather")
def gather(node: NodeView) -> Signature | Refusal:
    """Rows of one axis: a constant list of them is renumbered; otherwise that axis stays whole (embedding tables)."""
    data, index = node.inputs[:2]
    if data is None or index is None:
        return Refusal(UNKNOWN)
    axis = axis_of(node, 0, len(data))
    names = whole(len(data))
    known = node.positions(1)
    rows = tuple(Dim("row") if i == axis else t for i, t in enumerate(names))
    listed = whole(len(index), "i")
    out = names[:axis] + listed + names[axis + 1 :]
    if known is None or known.size < 2:
        cause = BY_DATA if known is None else "single positions are picked from it"
        looked_up = {"row": 1} if known is None and index else {}
        kinds = {"row": FIXED} if looked_up else {"row": FIXED, "i": FIXED}
        return Signature((rows, listed), (out,), kinds, {"row": cause, "i": "holds positions"}, picked=looked_up)
    picked = Pick(Dim("row"), tuple((known.ravel() % data[axis]).tolist()))
    return Signature((rows, listed), (out,), equations=((Product(listed), picked),), carries=(Carry(1, remap=picked),))


@signature("GatherElements", "ScatterElements", "Scatter")
def gather_elements(node: NodeView) -> Signature | Refusal:
    """Positions along one axis are data; all operands have the same axes otherwise."""
    shape = node.inputs[0]
    if shape is None or node.inputs[1] is None:
        return Refusal(UNKNOWN)
    axis = axis_of(node, 0, len(shape))
    index = node.inputs[1]
    same = [i != axis and shape[i] == index[i] for i in range(len(shape))]
    data = tuple(Dim(f"a.{i}" if s else f"x.{i}") for i, s in enumerate(same))
    rows = tuple(Dim(f"a.{i}" if s else f"y.{i}") for i, s in enumerate(same))
    scatter = len(node.inputs) > 2
    return Signature((data, rows, *([rows] if scatter else [])), (data if scatter else rows,),
                     {"x": FIXED, "y": FIXED} if scatter else {"x": FIXED}, {"x": BY_DATA, "y": "holds positions"}, picked={f"x.{axis}": 1})


@signature("TensorScatter")
def tensor_scatter(node: NodeView) -> Signature | Refusal:
    """Writes a block into a cache at places that are data: the axis of time stays, and so does the batch that has the places."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal(UNKNOWN)
    axis = axis_of(node, -2, len(shape))
    cache = tuple(Dim(f"x.{i}" if i in (0, axis) else f"a.{i}") for i in range(len(shape)))
    update = tuple(Dim("y") if i == axis else t for i, t in enumerate(cache))
    return Signature((cache, update, None), (cache,), {"x": FIXED, "y": FIXED}, {"x": BY_DATA})


@signature("GatherND", "ScatterND")
def gather_nd(node: NodeView) -> Signature | Refusal:
    """The leading axes are picked by data; those behind them pass."""
    data, index = node.inputs[:2]
    if data is None or not index:
        return Refusal(UNKNOWN)
    batch = int(node.attrs.get("batch_dims", 0))
    depth = batch + index[-1]
    left = tuple(Dim(f"x.{i}" if i < depth else f"a.{i}") for i in range(len(data)))
    rows = whole(len(index), "y")
    picked = whole(len(index) - 1, "y") + left[depth:]
    causes = {"x": BY_DATA, "y": "holds positions"}
    one = {f"x.{batch}": 1} if index[-1] == 1 else {}
    if node.op == "ScatterND":
        return Signature((left, rows, picked), (left,), {"x": FIXED, "y": FIXED}, causes, picked=one)
    held = {f"y.{i}": FIXED for i in (*range(batch), len(index) - 1)}
    return Signature((left, rows), (picked,), {"x": FIXED, **held}, causes, picked=one)
