"""Operators that move elements or say how many there are: reshapes, slices, gathers, scatters, pads, shapes."""

from __future__ import annotations

import math
from typing import Any

from spa.torch_ops.table import Call, Results, Tensor, constant, onnx_type, op, torch


def _whole(numbers: list[Any] | None) -> list[int]:
    return [int(n) for n in numbers or ()]


# ------------------------------------------------------------------ shapes and numbers


@op("Constant")
def constant_node(call: Call) -> Results:
    """A number or a list of them; tensors are values of the executor."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        held = call.attr(name)
        if held is not None:
            return constant(held, call.dtype) if name == "value" else torch.tensor(held, dtype=call.dtype if "f" in name else torch.int64)
    raise call.refuse("a value that is no tensor")


@op("ConstantOfShape")
def constant_of_shape(call: Call) -> Results:
    """One value everywhere."""
    held = call.attr("value")
    value = torch.zeros(1, dtype=call.dtype) if held is None else constant(held, call.dtype)
    return value.reshape(()).expand(_whole(call.numbers(0))).clone()


@op("Shape")
def shape(call: Call) -> Results:
    """Sizes from `start` to `end`."""
    return torch.tensor(list(call[0].shape)[call.attr("start", 0) : call.attr("end")], dtype=torch.int64)


@op("Size")
def size(call: Call) -> Results:
    """How many elements there are."""
    return torch.tensor(call[0].numel())


@op("Range")
def range_(call: Call) -> Results:
    """From start to limit in steps of delta."""
    start, limit, delta = (v.reshape(()).item() for v in call.inputs)
    return start + torch.arange(max(math.ceil((limit - start) / delta), 0)).to(call[0].dtype) * delta


@op("EyeLike")
def eye_like(call: Call) -> Results:
    """Ones on diagonal `k`."""
    kind = call.torch_type(onnx_type(call.attr("dtype"))) if call.attr("dtype") is not None else call[0].dtype
    return torch.ones(tuple(call[0].shape)).triu(call.attr("k", 0)).tril(call.attr("k", 0)).to(kind)


@op("OneHot")
def one_hot(call: Call) -> Results:
    """The second value at the index, the first elsewhere."""
    depth, axis = int(call[1].reshape(())), call.attr("axis", -1)
    index = call[0].to(torch.int64)
    inside = torch.where(index < 0, index + depth, index).unsqueeze(axis)
    places = torch.arange(depth).reshape([-1 if i == axis % inside.dim() else 1 for i in range(inside.dim())])
    return torch.where(inside == places, call[2][1], call[2][0])


@op("NonZero")
def non_zero(call: Call) -> Results:
    """(rank, count) positions."""
    return call[0].nonzero().T


# ------------------------------------------------------------------ reshapes


@op("Reshape")
def reshape(call: Call) -> Results:
    """0 keeps a size unless allowzero, -1 is what is left."""
    wanted = _whole(call.numbers(1, "shape"))
    if not call.attr("allowzero", 0):
        wanted = [call[0].shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return call[0].reshape(wanted)


@op("Flatten")
def flatten(call: Call) -> Results:
    """To a matrix, the axes before `axis` and those from it on."""
    axis = call.attr("axis", 1)
    axis = axis + call[0].dim() if axis < 0 else axis
    return (
        call[0].reshape(math.prod(call[0].shape[:axis]), -1)
        if call[0].numel()
        else call[0].reshape(math.prod(call[0].shape[:axis]), math.prod(call[0].shape[axis:]))
    )


@op("Squeeze")
def squeeze(call: Call) -> Results:
    """Without axes of size one."""
    axes = call.numbers(1, "axes")
    return call[0].squeeze() if axes is None else call[0].squeeze(tuple(_whole(axes)))


@op("Unsqueeze")
def unsqueeze(call: Call) -> Results:
    """With new axes of size one, counted in the result."""
    axes = _whole(call.numbers(1, "axes"))
    rank = call[0].dim() + len(axes)
    x = call[0]
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Transpose")
def transpose(call: Call) -> Results:
    """Axes in another order, by default the reverse."""
    return call[0].permute(call.attr("perm") or list(range(call[0].dim()))[::-1])


@op("Expand")
def expand(call: Call) -> Results:
    """Spread to a shape; either side may have the ones."""
    return call[0].expand(torch.broadcast_shapes(tuple(call[0].shape), tuple(_whole(call.numbers(1)))))


@op("Tile")
def tile(call: Call) -> Results:
    """Repeated along each axis."""
    return call[0].repeat(_whole(call.numbers(1)))


@op("DepthToSpace")
def depth_to_space(call: Call) -> Results:
    """Blocks of channels to blocks of pixels."""
    n, c, h, w = call[0].shape
    b = call.attr("blocksize")
    if call.attr("mode", "DCR") == "DCR":
        return call[0].reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)
    return call[0].reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth")
def space_to_depth(call: Call) -> Results:
    """Blocks of pixels to blocks of channels."""
    n, c, h, w = call[0].shape
    b = call.attr("blocksize")
    x = call[0].reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if call.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.permute(order).reshape(n, c * b * b, h // b, w // b)


# ------------------------------------------------------------------ parts


@op("Concat")
def concat(call: Call) -> Results:
    """One after the other."""
    return torch.cat(list(call.inputs), call.attr("axis", 1))


@op("Split")
def split(call: Call) -> Results:
    """Into given sizes, or equal ones of which the last may be smaller."""
    axis, sizes = call.attr("axis", 0), call.numbers(1, "split")
    if sizes is None:
        return call[0].split(-(-call[0].shape[axis] // len(call.node.outputs)), axis)
    return call[0].split(_whole(sizes), axis)


@op("Slice")
def slice_(call: Call) -> Results:
    """As Python's, on the given axes; settings were attributes before opset 10."""
    x = call[0]
    starts, ends = _whole(call.numbers(1, "starts")), _whole(call.numbers(2, "ends"))
    axes = _whole(call.numbers(3, "axes")) or list(range(len(starts)))
    steps = _whole(call.numbers(4)) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        start, end, step = slice(start, end, step).indices(x.shape[axis])
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(start, max(end, start), step),)]
        else:
            x = x.index_select(axis, torch.arange(start, min(end, start), step))
    return x


def _inside(index: Tensor, length: int) -> Tensor:
    """Indices as torch wants them: whole numbers that do not count from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + length, index)


@op("Gather")
def gather(call: Call) -> Results:
    """Positions of an axis, in the shape of the index."""
    x, axis = call[0], call.attr("axis", 0) % call[0].dim()
    index = _inside(call[1], x.shape[axis])
    return x.index_select(axis, index.reshape(-1)).reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


@op("GatherElements")
def gather_elements(call: Call) -> Results:
    """One element for each of the index."""
    axis = call.attr("axis", 0)
    return call[0].gather(axis, _inside(call[1], call[0].shape[axis]))


def _batched(index: Tensor, x: Tensor, batch: int) -> tuple[Tensor, ...]:
    """One index tensor an axis, from an index whose last axis holds them; the first `batch` axes go along."""
    depth = index.shape[-1]
    rank = index.dim() - 1
    leading = [torch.arange(x.shape[i]).reshape([-1 if j == i else 1 for j in range(rank)]) for i in range(batch)]
    return (*leading, *(_inside(index[..., k], x.shape[batch + k]) for k in range(depth)))


@op("GatherND")
def gather_nd(call: Call) -> Results:
    """Slices whose leading positions the index holds."""
    return call[0][_batched(call[1], call[0], call.attr("batch_dims", 0))]


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements", "Scatter")
def scatter_elements(call: Call) -> Results:
    """Elements put where the index says."""
    axis, kind = call.attr("axis", 0), call.attr("reduction", "none")
    index = _inside(call[1], call[0].shape[axis])
    if kind == "none":
        return call[0].scatter(axis, index, call[2])
    return call[0].scatter_reduce(axis, index, call[2], _SCATTER[kind], include_self=True)


@op("ScatterND")
def scatter_nd(call: Call) -> Results:
    """Slices put where the index says; worked out on flat positions."""
    x, index, updates = call.inputs[:3]
    kind = call.attr("reduction", "none")
    flat = torch.arange(x.numel()).reshape(x.shape)[_batched(index, x, 0)].reshape(-1)
    if kind == "none":
        return x.reshape(-1).scatter(0, flat, updates.reshape(-1)).reshape(x.shape)
    return x.reshape(-1).scatter_reduce(0, flat, updates.reshape(-1), _SCATTER[kind], include_self=True).reshape(x.shape)


@op("Compress")
def compress(call: Call) -> Results:
    """Positions where the condition holds."""
    x, axis = (call[0].reshape(-1), 0) if call.attr("axis") is None else (call[0], call.attr("axis"))
    return x.index_select(axis, call[1].nonzero().reshape(-1))


@op("Trilu")
def trilu(call: Call) -> Results:
    """The upper or lower triangle, else zero."""
    k = 0 if call[1] is None else int(call[1].reshape(()))
    return call[0].triu(k) if call.attr("upper", 1) else call[0].tril(k)


@op("ReverseSequence")
def reverse_sequence(call: Call) -> Results:
    """The first elements of each sequence, in reverse."""
    time, batch = call.attr("time_axis", 0), call.attr("batch_axis", 1)
    x = call[0].movedim((time, batch), (0, 1))
    steps, lengths = torch.arange(x.shape[0]).unsqueeze(1), call[1].to(torch.int64).unsqueeze(0)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)  # (time, batch)
    return x[order, torch.arange(x.shape[1]).unsqueeze(0)].movedim((0, 1), (time, batch))


# ------------------------------------------------------------------ pads


@op("Pad")
def pad(call: Call) -> Results:
    """Constant, edge, reflect or wrap; negative pads cut. All settings were attributes before opset 11."""
    x, mode = call[0], call.attr("mode", "constant")
    pads = _whole(call.numbers(1, "pads") or call.attr("paddings"))
    axes = [a % x.dim() for a in _whole(call.numbers(3))] if call[3] is not None else list(range(x.dim()))
    before, after = dict(zip(axes, pads[: len(axes)], strict=True)), dict(zip(axes, pads[len(axes) :], strict=True))
    if mode == "constant":
        value = call.numbers(2, "value")
        wide = [n for axis in reversed(range(x.dim())) for n in (before.get(axis, 0), after.get(axis, 0))]
        filled = value[0] if value else 0
        return (
            torch.nn.functional.pad(x, wide, value=filled)
            if x.dtype != torch.bool
            else torch.nn.functional.pad(x.to(torch.uint8), wide, value=int(filled)).bool()
        )
    for axis in axes:
        x = x.index_select(axis, _padded(x.shape[axis], before[axis], after[axis], mode))
    return x


def _padded(length: int, before: int, after: int, mode: str) -> Tensor:
    """(before + length + after,) where each position comes from."""
    places = torch.arange(-before, length + after)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    turn = max(2 * (length - 1), 1)
    return (length - 1) - ((places % turn) - (length - 1)).abs()


# ------------------------------------------------------------------ bodies


@op("If")
def if_(call: Call) -> Results:
    """One of two bodies."""
    return call.body(call.attr("then_branch") if bool(call[0].reshape(())) else call.attr("else_branch"))
