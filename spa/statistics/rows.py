"""Rows of a linear map: its data as (parts, rows, columns), unfolded along a kernel's window (im2col) and thinned out.

rows @ weight.T (+ bias) = the node's output, one row a position of it
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spa.graph.linear import Layer
from spa.signatures.table import Window

Data = NDArray[np.floating]


def rows(layer: Layer, data: Data, chosen: NDArray[np.int64] | None = None, parts: int | None = None) -> Data:
    """(parts, rows, columns) of a layer's data, all rows or the chosen ones; `data` may have lost channels, or all but `parts` parts."""
    if layer.window is None:
        whole = layer.rows(data)
        return np.asarray(whole if chosen is None else whole[:, chosen])
    return unfold(data, layer.window, layer.parts if parts is None else parts, chosen)


def row_count(layer: Layer, shape: Sequence[int]) -> int:
    """How many rows data of this shape have."""
    if layer.window is not None:
        return int(shape[0]) * math.prod(extents(layer.window, shape[2:]))
    inside = set(layer.positions)
    return math.prod(n for a, n in enumerate(shape) if a not in inside)


def extents(window: Window, space: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the output's space axes."""
    found = []
    for i, size in enumerate(space):
        begin, end = _pads(window, i, size)
        reach = (window.kernel[i] - 1) * window.dilations[i] + 1
        if window.transposed:
            found.append(window.strides[i] * (size - 1) + window.extra[i] + reach - begin - end)
        else:
            found.append((size + begin + end - reach) // window.strides[i] + 1)
    return tuple(found)


def _pads(window: Window, axis: int, size: int) -> tuple[int, int]:
    if not window.same:
        return window.pads[axis]
    stride, reach = window.strides[axis], (window.kernel[axis] - 1) * window.dilations[axis] + 1
    if window.transposed:
        total = max(stride * (size - 1) + window.extra[axis] + reach - size * stride, 0)
    else:
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    small = total // 2
    return (small, total - small) if window.same == "SAME_UPPER" else (total - small, small)


def unfold(data: Data, window: Window, parts: int, chosen: NDArray[np.int64] | None = None) -> Data:
    """im2col: data (n, parts · channels, *space) -> (parts, rows, channels · kernel positions), rows in the order of the output.

    Kernel position k of output position t sees data position t · stride - pad + k · dilation; of a transposed convolution,
    (t + pad - k · dilation) / stride where that is whole. Outside there are zeros.
    """
    n, channels, *space = data.shape
    outside = extents(window, space)
    total = n * math.prod(outside)
    flat = np.arange(total) if chosen is None else chosen
    places = np.unravel_index(flat, (n, *outside))
    taps = np.stack(np.unravel_index(np.arange(math.prod(window.kernel)), window.kernel))  # (axes, taps)
    index = np.broadcast_to(places[0][:, None], (len(flat), taps.shape[1])).astype(np.int64)
    valid = np.ones(index.shape, bool)
    for axis, size in enumerate(space):
        begin, _ = _pads(window, axis, size)
        out, tap = places[axis + 1][:, None], taps[axis][None, :] * window.dilations[axis]
        if window.transposed:
            at, rest = np.divmod(out + begin - tap, window.strides[axis])
            valid &= rest == 0
        else:
            at = out * window.strides[axis] - begin + tap
        valid &= (at >= 0) & (at < size)
        index = index * size + np.clip(at, 0, size - 1)
    last = np.ascontiguousarray(np.moveaxis(data, 1, -1)).reshape(-1, channels)
    found = last[index]  # (rows, taps, channels)
    found[~valid] = 0
    found = found.reshape(len(flat), taps.shape[1], parts, channels // parts).transpose(2, 0, 3, 1)
    return np.asarray(found.reshape(parts, len(flat), -1))
