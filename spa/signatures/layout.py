"""Operators that move elements: reshape, transpose, concat, split, tile, pad, resize."""

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
