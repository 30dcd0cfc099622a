"""Operators that move elements: reshape, transpose, concat, split, slice, gather, tile, pad, resize."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np

from passes.remove import DELETE
from spa.signatures.table import (
    FIXED,
    MAP,
    Carry,
    Dim,
    NodeView,
    One,
    Operand,
    Pick,
    Product,
    Refusal,
    Signature,
    Sum,
    Term,
    axis_of,
    ints,
    make,
    signature,
)

UNKNOWN = "its shape is unknown"
BY_DATA = "positions are chosen by data"


def whole(rank: int, prefix: str = "a") -> tuple[Term, ...]:
    """One plain dim an axis."""
    return tuple(Dim(f"{prefix}.{i}") for i in range(rank))


def shape_carry(node: NodeView, terms: tuple[Term, ...], *, infer: bool = False) -> tuple[Carry, ...]:
    """The shape that a node is given, as attribute (old opsets) or as second input."""
    return (Carry("shape" if "shape" in node.attrs else 1, terms, infer=infer),)


def _suffixes(shape: tuple[int, ...]) -> list[int]:
    return list(accumulate(reversed(shape), lambda a, b: a * b))[::-1]


def factor(source: tuple[int, ...], target: tuple[int, ...]) -> tuple[tuple[Term, ...], tuple[Term, ...], dict[str, int]] | None:
    """Terms of both sides of a reshape over the finest common factors; None if it neither splits nor merges.

    Row-major order: a boundary between axes is the number of elements behind it. Both sides are products of common
    factors exactly if, from the end, each boundary of either side divides the next.
    """
    if math.prod(source) != math.prod(target) or not math.prod(source):
        return None
    bounds = sorted({1, *_suffixes(source), *_suffixes(target)})
    chain = [bounds[0]]
    broken: list[tuple[int, int]] = []  # stretches in which boundaries cross: one factor that nothing is removed from
    common = {1, *_suffixes(source)} & {1, *_suffixes(target)}
    for bound in bounds[1:]:
        if bound % chain[-1]:
            low = max(c for c in common if c <= chain[-1])
            high = min(c for c in common if c >= bound)
            broken.append((low, high))
        chain.append(bound)
    if broken:
        return None
    sizes = {f"f.{i}": high // low for i, (low, high) in enumerate(pairwise(chain))}

    def side(shape: tuple[int, ...]) -> tuple[Term, ...]:
        terms: list[Term] = []
        behind = [*_suffixes(shape), 1]
        for axis, size in enumerate(shape):
            if size == 1:
                terms.append(One())
                continue
            low, high = chain.index(behind[axis + 1]), chain.index(behind[axis])
            parts = tuple(Dim(f"f.{i}") for i in reversed(range(low, high)))
            terms.append(parts[0] if len(parts) == 1 else Product(parts))
        return tuple(terms)

    return side(source), side(target), sizes


@signature("Reshape", "Flatten")
def reshape(node: NodeView) -> Signature | Refusal:
    """Splits and merges axes in row-major order; its target shape restates the sizes."""
    source, target = node.inputs[0], node.outputs[0]
    if source is None or target is None:
        return Refusal(UNKNOWN)
    found = factor(source, target)
    if found is None:
        return Refusal("the reshape neither splits nor merges axes")
    left, right, sizes = found
    restated = len(node.inputs) > 1 or "shape" in node.attrs
    carries = shape_carry(node, right, infer=True) if restated else ()
    return Signature((left, None), (right,), {"f": MAP}, sizes=sizes, carries=carries)


@signature("Transpose")
def transpose(node: NodeView) -> Signature | Refusal:
    """Axes in another order."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal(UNKNOWN)
    perm = ints(node.attrs.get("perm")) or list(range(len(shape)))[::-1]
    terms = whole(len(shape))
    return Signature((terms,), (tuple(terms[i] for i in perm),))


@signature("Squeeze", "Unsqueeze")
def squeeze(node: NodeView) -> Signature | Refusal:
    """Axes of size one go or come. Without `axes`, those of size one now are named, lest a dim that shrinks to one goes."""
    source, target = node.inputs[0], node.outputs[0]
    if source is None or target is None:
        return Refusal(UNKNOWN)
    given = node.attrs.get("axes")
    if given is None and len(node.inputs) > 1 and node.present[1]:
        given = node.value(1)
        if given is None:
            return Refusal("its axes are computed at run time")
    longer = source if node.op == "Squeeze" else target
    listed = ints(given)
    axes = {i for i, n in enumerate(longer) if n == 1} if listed is None else {a % len(longer) for a in listed}
    names = whole(len(longer))
    long: tuple[Term, ...] = tuple(One() if i in axes else t for i, t in enumerate(names))
    short = tuple(t for i, t in enumerate(long) if i not in axes)
    carries: tuple[Carry, ...] = ()
    if listed is None:
        carries = (Carry("axes" if node.opset < 13 else 1, value=sorted(axes)),)
    inputs: tuple[Operand, ...] = (long if node.op == "Squeeze" else short, None)
    return Signature(inputs, (short if node.op == "Squeeze" else long,), carries=carries)


@signature("Concat")
def concat(node: NodeView) -> Signature | Refusal:
    """One block after the other."""
    if any(s is None for s in node.inputs) or not node.inputs:
        return Refusal("the shape of an operand is unknown")
    rank = len(node.inputs[0] or ())
    axis = axis_of(node, 1, rank)
    names = whole(rank)
    blocks = [Dim(f"part.{i}") for i in range(len(node.inputs))]
    inputs = tuple(tuple(b if i == axis else t for i, t in enumerate(names)) for b in blocks)
    out = tuple(Sum(tuple(blocks)) if i == axis else t for i, t in enumerate(names))
    return Signature(inputs, (out,))


@signature("Split")
def split(node: NodeView) -> Signature | Refusal:
    """Blocks of one axis; the list of sizes restates them."""
    shape = node.inputs[0]
    if shape is None or any(s is None for s in node.outputs):
        return Refusal(UNKNOWN)
    axis = axis_of(node, 0, len(shape))
    names = whole(len(shape))
    sizes = {f"part.{i}": s[axis] for i, s in enumerate(node.outputs) if s is not None}
    if sum(sizes.values()) != shape[axis]:
        return Refusal("the sizes of its parts are not known")
    blocks = tuple(Dim(n) for n in sizes)
    inputs = tuple(Sum(blocks) if i == axis else t for i, t in enumerate(names))
    outputs = tuple(tuple(b if i == axis else t for i, t in enumerate(names)) for b in blocks)
    where: str | int = "split" if node.opset < 13 else 1
    carries = (Carry(where, blocks), *((Carry("num_outputs", value=DELETE),) if "num_outputs" in node.attrs else ()))
    return Signature((inputs, None), outputs, sizes=sizes, carries=carries)


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
        return Signature((rows, listed), (out,), {"row": FIXED, "i": FIXED}, {"row": cause, "i": "holds positions"})
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
    return Signature((data, rows, *([rows] if scatter else [])), (data if scatter else rows,), {"x": FIXED, "y": FIXED},
                     {"x": BY_DATA, "y": "holds positions"})


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
    if node.op == "ScatterND":
        return Signature((left, rows, picked), (left,), {"x": FIXED, "y": FIXED}, causes)
    return Signature((left, rows), (picked,), {"x": FIXED, "y": FIXED}, causes)


@signature("Tile")
def tile(node: NodeView) -> Signature | Refusal:
    """The copies are the outer factor."""
    shape, out = node.inputs[0], node.outputs[0]
    if shape is None or out is None or len(shape) != len(out):
        return Refusal(UNKNOWN)
    left = whole(len(shape))
    right = tuple(
        t if n == m else Dim(f"copies.{i}") if n == 1 else Product((Dim(f"copies.{i}"), t))
        for i, (t, n, m) in enumerate(zip(left, shape, out, strict=True))
    )
    left = tuple(One() if n == 1 and m != 1 else t for t, n, m in zip(left, shape, out, strict=True))
    sizes = {f"copies.{i}": m // n for i, (n, m) in enumerate(zip(shape, out, strict=True)) if n and n != m}
    return Signature((left, None), (right,), {"copies": FIXED}, {"copies": "counts copies"}, sizes)


@signature("Pad")
def pad(node: NodeView) -> Signature | Refusal:
    """What a constant pads is positions of their own; other modes need the axis as it is."""
    shape = node.inputs[0]
    out = node.outputs[0]
    if shape is None or out is None:
        return Refusal(UNKNOWN)
    rank = len(shape)
    name = "paddings" if node.opset < 2 else "pads"
    listed = ints(node.attrs.get(name)) if name in node.attrs else ints(node.value(1))
    axes = ints(node.value(3)) if len(node.inputs) > 3 and node.present[3] else list(range(rank))
    left, right = list(whole(rank)), list(whole(rank))
    sizes: dict[str, int] = {}
    kinds = {}
    if listed is None or axes is None:
        kinds = {f"{p}.{i}": FIXED for i in range(rank) if shape[i] != out[i] for p in ("a", "z")}
        right = [Dim(f"z.{i}") if shape[i] != out[i] else t for i, t in enumerate(left)]
        return Signature((tuple(left), *[None] * (len(node.inputs) - 1)), (tuple(right),), kinds,
                         {"a": "how much is padded is computed at run time"})
    axes = [a % rank for a in axes]
    mode = str(node.attrs.get("mode", "constant"))
    carried: list[Term | int | None] = [None] * len(listed)
    for i, axis in enumerate(axes):
        before, after = listed[i], listed[i + len(axes)]
        if not before and not after:
            continue
        if mode != "constant" or before < 0 or after < 0:
            kinds[f"a.{axis}"] = kinds[f"z.{axis}"] = FIXED
            right[axis] = Dim(f"z.{axis}")
            continue
        blocks = {n: k for n, k in ((f"before.{axis}", before), (f"a.{axis}", shape[axis]), (f"after.{axis}", after)) if k}
        sizes |= {n: k for n, k in blocks.items() if not n.startswith("a.")}
        right[axis] = Sum(tuple(map(Dim, blocks)))
        carried[i] = Dim(f"before.{axis}") if before else None
        carried[i + len(axes)] = Dim(f"after.{axis}") if after else None
    where: str | int = name if name in node.attrs else 1
    return Signature((tuple(left), *[None] * (len(node.inputs) - 1)), (tuple(right),), kinds,
                     {"a": "is padded with its own values"}, sizes, (Carry(where, tuple(carried)),))


@signature("Resize", "Upsample")
def resize(node: NodeView) -> Signature | Refusal:
    """Axes that are scaled by one pass; the others are space."""
    shape, out = node.inputs[0], node.outputs[0]
    if shape is None or out is None or len(shape) != len(out):
        return Refusal(UNKNOWN)
    same = [n == m and i not in _resampled(node, len(shape)) for i, (n, m) in enumerate(zip(shape, out, strict=True))]
    left = tuple(Dim(f"a.{i}" if s else f"x.{i}") for i, s in enumerate(same))
    right = tuple(Dim(f"a.{i}" if s else f"y.{i}") for i, s in enumerate(same))
    carries: tuple[Carry, ...] = ()
    if len(node.inputs) > 3 and node.present[3]:
        axes = ints(node.attrs.get("axes")) or list(range(len(shape)))
        carries = (Carry(3, tuple(right[a] if same[a % len(shape)] else None for a in axes)),)
    inputs: tuple[Operand, ...] = (left, *[None] * (len(node.inputs) - 1))
    return Signature(inputs, (right,), {"x": FIXED, "y": FIXED}, {"x": "is resized"}, carries=carries)


def _resampled(node: NodeView, rank: int) -> set[int]:
    """Axes that are resampled even where their size stays: scaled by nearly one, cropped, moved, or tied by the aspect ratio."""
    axes = [a % rank for a in ints(node.attrs.get("axes")) or range(rank)]
    moved = str(node.attrs.get("coordinate_transformation_mode", "")) in ("tf_crop_and_resize", "tf_half_pixel_for_nn")
    if moved or str(node.attrs.get("keep_aspect_ratio_policy", "stretch")) != "stretch":
        return set(axes)
    place = 1 if node.opset < 11 else 2
    scales = node.attrs.get("scales")
    if scales is None and place < len(node.inputs) and node.present[place] and node.inputs[place] != (0,):
        scales = node.value(place)
        if scales is None:
            return set(axes)
    return set() if scales is None else {a for a, s in zip(axes, np.ravel(scales), strict=False) if s != 1}


@signature("DepthToSpace")
def depth_to_space(node: NodeView) -> Signature | Refusal:
    """Part of the channels becomes space; `mode` says which."""
    block = int(node.attrs["blocksize"])
    channel = "(c p q)" if node.attrs.get("mode", "DCR") == "CRD" else "(p q c)"
    return make(node, f"n {channel} h w -> n c (h p) (w q)", sizes={"p": block, "q": block}, p=FIXED, q=FIXED, h=FIXED, w=FIXED)


@signature("SpaceToDepth")
def space_to_depth(node: NodeView) -> Signature | Refusal:
    """Space becomes part of the channels; `mode` says which."""
    block = int(node.attrs["blocksize"])
    channel = "(c p q)" if node.attrs.get("mode", "DCR") == "CRD" else "(p q c)"
    return make(node, f"n c (h p) (w q) -> n {channel} h w", sizes={"p": block, "q": block}, p=FIXED, q=FIXED, h=FIXED, w=FIXED)


@signature("Col2Im")
def col2im(node: NodeView) -> Signature | Refusal:
    """Blocks of each channel are put together to an image, each channel alone."""
    block = ints(node.value(2))
    if block is None:
        return Refusal("the shape of its blocks is computed at run time")
    return make(node, "n (c k) l, -, - -> n c *s", sizes={"k": math.prod(block)}, k=FIXED, l=FIXED, s=FIXED,
                causes={"k": "is a block's extent"})


@signature("Constant")
def constant(node: NodeView) -> Signature | Refusal:
    """A stored value, free as an initializer is; tracing treats both alike."""
    out = node.outputs[0]
    return Refusal(UNKNOWN) if out is None else Signature((), (whole(len(out)),), sizes={f"a.{i}": n for i, n in enumerate(out)})


@signature("ConstantOfShape")
def constant_of_shape(node: NodeView) -> Signature | Refusal:
    """One value everywhere: every axis is free, and the shape restates it."""
    out = node.outputs[0]
    if out is None:
        return Refusal(UNKNOWN)
    terms = whole(len(out))
    return Signature((None,), (terms,), sizes={f"a.{i}": n for i, n in enumerate(out)}, carries=(Carry(0, terms),))


@signature("Shape", "Size")
def shape_of(node: NodeView) -> Signature | Refusal:
    """Reads sizes only: what is read is restated where it is used."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal(UNKNOWN)
    return Signature((whole(len(shape)),), ((Dim("sizes"),) if node.op == "Shape" else (),), {"sizes": FIXED})


@signature("ReverseSequence")
def reverse_sequence(node: NodeView) -> Signature | Refusal:
    """Batch and time stay; other axes pass."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal(UNKNOWN)
    terms = tuple(Dim("x" if i < 2 else "a") if i < 2 else Dim(f"a.{i}") for i in range(len(shape)))
    terms = (Dim("x0"), Dim("x1"), *terms[2:])[: len(shape)]
    return Signature((terms, None), (terms,), {"x0": FIXED, "x1": FIXED})


@signature("Trilu")
def trilu(node: NodeView) -> Signature | Refusal:
    """The last two axes are a matrix."""
    return make(node, "*a m n, - -> *a m n", a=MAP, m=FIXED, n=FIXED)


def positions(shape: tuple[int, ...]) -> np.ndarray:
    """Row-major positions of a block of axes; for tests of `factor`."""
    return np.arange(math.prod(shape)).reshape(shape)
