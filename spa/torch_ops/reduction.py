"""Reductions over axes, positions of the largest, running sums."""

from __future__ import annotations

import functools
from collections.abc import Callable

from spa.torch_ops.table import TABLE, Call, Op, Results, Tensor, op, torch


def _norm(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Root of the sum of squares, with the gradient zero where that is zero."""
    total = (x * x).sum(axes, keep)
    nothing = total == 0
    return torch.where(nothing, torch.zeros_like(total), torch.where(nothing, torch.ones_like(total), total).sqrt())


def _extreme(name: str, x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.dtype == torch.bool:
        return _extreme(name, x.to(torch.uint8), axes, keep).bool()
    if any(x.shape[a] == 0 for a in axes):
        info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        worst = (info.min if name == "amax" else info.max) if not x.is_floating_point() else float("-inf" if name == "amax" else "inf")
        shape = [1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes]
        return x.new_full(shape, worst)
    return getattr(torch, name)(x, axes, keep)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    found = functools.reduce(lambda y, axis: y.prod(axis, keepdim=True).to(x.dtype), axes, x)
    return found if keep else found.reshape([n for i, n in enumerate(x.shape) if i not in axes])


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep).to(x.dtype),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep).to(x.dtype),
    "ReduceMax": lambda x, axes, keep: _extreme("amax", x, axes, keep),
    "ReduceMin": lambda x, axes, keep: _extreme("amin", x, axes, keep),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep).to(x.dtype),
    "ReduceL2": _norm,
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep).to(x.dtype),
}


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Op:
    """Without axes: all of them, or nothing where noop_with_empty_axes says so."""

    def run(call: Call) -> Results:
        x, axes = call[0], call.numbers(1, "axes")
        if not axes:
            axes = [] if call.attr("noop_with_empty_axes", 0) else list(range(x.dim()))
        if not axes:
            return function(x.unsqueeze(0), [0], False)
        return function(x, [a % x.dim() for a in axes], bool(call.attr("keepdims", 1)))

    return run


TABLE.update({("", _name): _reduce(_function) for _name, _function in _REDUCTIONS.items()})


@op("GlobalAveragePool")
def global_average_pool(call: Call) -> Results:
    """Mean over the spatial axes."""
    return call[0].mean(list(range(2, call[0].dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(call: Call) -> Results:
    """Largest over the spatial axes."""
    return call[0].amax(list(range(2, call[0].dim())), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(call: Call) -> Results:
    """Norm over the spatial axes."""
    return torch.linalg.vector_norm(call[0], call.attr("p", 2), list(range(2, call[0].dim())), keepdim=True)


def _arg(call: Call, name: str) -> Results:
    axis, keep = call.attr("axis", 0), bool(call.attr("keepdims", 1))
    if not call.attr("select_last_index", 0):
        return getattr(torch, name)(call[0], axis, keep)
    return call[0].shape[axis] - 1 - getattr(torch, name)(call[0].flip(axis), axis, keep)


TABLE["", "ArgMax"] = lambda call: _arg(call, "argmax")
TABLE["", "ArgMin"] = lambda call: _arg(call, "argmin")


@op("TopK")
def top_k(call: Call) -> Results:
    """Values and positions, in order; equal ones by their position."""
    x, axis = call[0], call.attr("axis", -1)
    count = call.numbers(1, "k")
    assert count is not None
    order = torch.argsort(x.detach(), dim=axis, descending=bool(call.attr("largest", 1)), stable=True).narrow(axis, 0, int(count[0]))
    return x.gather(axis, order), order


def _running(call: Call, name: str, neutral: int) -> Results:
    x, axis = call[0], int(call[1])
    x = x.flip(axis) if call.attr("reverse", 0) else x
    y = getattr(torch, name)(x, axis).to(x.dtype)
    if call.attr("exclusive", 0):
        first = torch.full_like(y.narrow(axis, 0, 1), neutral)
        y = torch.cat([first, y.narrow(axis, 0, y.shape[axis] - 1)], axis)
    return y.flip(axis) if call.attr("reverse", 0) else y


TABLE["", "CumSum"] = lambda call: _running(call, "cumsum", 0)
TABLE["", "CumProd"] = lambda call: _running(call, "cumprod", 1)
