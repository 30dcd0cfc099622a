"""Resizing: one axis after the other, each a matrix (out, in) that says how much every position gives.

All interpolations are sums of neighbours with the weights of a kernel k,

    y_i = Σ_j k((j - x(i)) r) x_j / Σ_j k((j - x(i)) r)        r = min(scale, 1) with antialias, else 1

with x(i) the coordinate in the input (``coordinate_transformation_mode``); positions beyond an edge are those of the edge.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.torch_ops.table import Call, Results, Tensor, op, torch

Floats = NDArray[np.float64]


def _coordinates(mode: str, out: int, length: int, scale: float, region: tuple[float, float]) -> Floats:
    """(out,) where each position lies in the input."""
    i = np.arange(out, dtype=np.float64)
    if mode == "asymmetric":
        return i / scale
    if mode == "align_corners":
        return i * (length - 1) / (out - 1) if out > 1 else np.zeros(out)
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = (edge * (length - 1) for edge in region)
        return start + i * (end - start) / (out - 1) if out > 1 else np.full(out, (start + end) / 2)
    if mode == "pytorch_half_pixel" and out == 1:
        return np.zeros(1)
    offset = length / 2 * (1 - out / (scale * length)) if mode == "half_pixel_symmetric" else 0.0
    return offset + (i + 0.5) / scale - 0.5


def _nearest(mode: str, x: Floats) -> NDArray[np.int64]:
    return {
        "round_prefer_floor": lambda: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda: np.floor(x + 0.5),
        "floor": lambda: np.floor(x),
        "ceil": lambda: np.ceil(x),
    }[mode]().astype(np.int64)


def _kernel(mode: str, distance: Floats, a: float) -> Floats:
    d = np.abs(distance)
    if mode == "linear":
        return np.asarray(np.clip(1 - d, 0, 1))
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0.0)))


def _matrix(mode: str, x: Floats, length: int, ratio: float, a: float, exclude: bool) -> Floats:
    """(out, length) weights for coordinates x."""
    reach = int(np.ceil((1 if mode == "linear" else 2) / ratio))
    places = np.floor(x).astype(np.int64)[:, None] + np.arange(-reach + 1, reach + 1)  # (out, neighbours)
    weights = _kernel(mode, (places - x[:, None]) * ratio, a)
    if exclude:
        weights = np.where((places >= 0) & (places < length), weights, 0.0)
    weights = weights / weights.sum(1, keepdims=True)
    found = np.zeros((len(x), length))
    np.add.at(found, (np.arange(len(x))[:, None], np.clip(places, 0, length - 1)), weights)
    return found


def _targets(call: Call, sizes: list[int]) -> tuple[list[int], list[float]]:
    """How long each resized axis becomes, and its scale."""
    scales, wanted = call.numbers(2), call.numbers(3)
    if scales:
        return [int(np.floor(n * s)) for n, s in zip(sizes, scales, strict=True)], scales
    assert wanted is not None
    policy = call.attr("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [int(w) for w in wanted], [w / n for w, n in zip(wanted, sizes, strict=True)]
    pick = min if policy == "not_larger" else max
    scale = pick(w / n for w, n in zip(wanted, sizes, strict=True))
    return [int(np.floor(scale * n + 0.5)) for n in sizes], [scale] * len(sizes)


@op("Resize")
def resize(call: Call) -> Results:
    """Nearest, linear or cubic."""
    if call.opset < 11:
        return _resized(call, call[0], [], call.numbers(1) or [], "asymmetric", "floor")
    axes = [a % call[0].dim() for a in call.attr("axes") or range(call[0].dim())]
    outs, scales = _targets(call, [call[0].shape[a] for a in axes])
    mode = call.attr("coordinate_transformation_mode", "half_pixel")
    return _resized(call, call[0], outs, scales, mode, call.attr("nearest_mode", "round_prefer_floor"), axes)


@op("Upsample")
def upsample(call: Call) -> Results:
    """What Resize was before opset 10."""
    return _resized(call, call[0], [], call.numbers(1, "scales") or [], "asymmetric", "floor")


def _resized(call: Call, x: Tensor, outs: list[int], scales: list[float], mode: str, nearest: str, axes: list[int] | None = None) -> Tensor:
    kind, region = call.attr("mode", "nearest"), call.numbers(1) if mode == "tf_crop_and_resize" else None
    axes = list(range(x.dim())) if axes is None else axes
    outside: Any = None
    for i, axis in enumerate(axes):
        length = x.shape[axis]
        out = outs[i] if outs else int(np.floor(length * scales[i]))
        span = (region[i], region[len(axes) + i]) if region else (0.0, 1.0)
        if out == length and scales[i] == 1 and span == (0.0, 1.0):
            continue
        at = _coordinates(mode, out, length, scales[i], span)
        if kind == "nearest":
            x = x.index_select(axis, torch.from_numpy(np.clip(_nearest(nearest, at), 0, length - 1)))
        else:
            ratio = min(scales[i], 1.0) if call.attr("antialias", 0) else 1.0
            smooth = kind.removeprefix("bi")
            weights = _matrix(smooth, at, length, ratio, call.attr("cubic_coeff_a", -0.75), bool(call.attr("exclude_outside", 0)))
            x = torch.matmul(x.movedim(axis, -1), torch.from_numpy(weights.T.copy()).to(x.dtype)).movedim(-1, axis)
        if mode == "tf_crop_and_resize":
            beyond = torch.from_numpy((at < 0) | (at > length - 1)).reshape([-1 if j == axis else 1 for j in range(x.dim())])
            outside = beyond if outside is None else outside | beyond
    if outside is None:
        return x
    return torch.where(outside, torch.full_like(x, call.attr("extrapolation_value", 0.0)), x)


@op("GridSample")
def grid_sample(call: Call) -> Results:
    """Samples at given coordinates, as torch's."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(call.attr("mode", "linear"), call.attr("mode", "linear"))
    corners = bool(call.attr("align_corners", 0))
    return torch.nn.functional.grid_sample(call[0], call[1], mode, call.attr("padding_mode", "zeros"), corners)
