"""Convolutions and pools: operators with windows. Values are (n, c, *s), weights (o, c / groups, *k)."""

from __future__ import annotations

from dataclasses import dataclass

from spa.torch_ops.elementwise import dequantized, quantized, quantized_type
from spa.torch_ops.normalization import channelwise
from spa.torch_ops.table import Call, Results, Tensor, op, torch


@dataclass(frozen=True)
class Frame:
    """Windows along the spatial axes, all lists one number an axis.

    `before` and `after` are the declared pads; `outs` is how many windows there are; `reach` is the pad after that the
    windows need, less than `after` (negative: elements are left over) or more (ceil_mode).
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    outs: list[int]
    reach: list[int]


def frame(call: Call, sizes: list[int], kernel: list[int]) -> Frame:
    """Windows of a node, from its attributes."""
    rank = len(sizes)
    strides, dilations = list(call.attr("strides") or [1] * rank), list(call.attr("dilations") or [1] * rank)
    pads, auto = list(call.attr("pads") or [0] * 2 * rank), call.attr("auto_pad", "NOTSET")
    before, after, outs, reach = [], [], [], []
    for i, (n, k, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        wide = (k - 1) * d + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max((-(-n // s) - 1) * s + wide - n, 0)
            begin = total // 2 if auto == "SAME_UPPER" else total - total // 2
            end = total - begin
        else:
            begin, end = (pads[i], pads[rank + i]) if auto != "VALID" else (0, 0)
        room = n + begin + end - wide
        out = room // s + 1
        if call.attr("ceil_mode", 0):
            out = -(-room // s) + 1
            out -= (out - 1) * s >= n + begin  # a window that begins in the pad after does not count
        before.append(begin)
        after.append(end)
        outs.append(out)
        reach.append((out - 1) * s + wide - n - begin)
    return Frame(kernel, strides, dilations, before, after, outs, reach)


def padded(x: Tensor, before: list[int], after: list[int], value: float = 0.0) -> Tensor:
    """Pads the spatial axes; negative pads cut."""
    wide = [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
    return torch.nn.functional.pad(x, wide, value=value) if any(wide) else x


def _by_rank(name: str, rank: int) -> Tensor:
    return getattr(torch.nn.functional, f"{name}{rank}d")


def convolved(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution that a node's attributes say."""
    windows = frame(call, list(x.shape[2:]), list(weight.shape[2:]))
    group, rank = call.attr("group", 1), x.dim() - 2
    if windows.before == windows.after:
        return _by_rank("conv", rank)(x, weight, bias, windows.strides, windows.before, windows.dilations, group)
    x = padded(x, windows.before, windows.after)
    return _by_rank("conv", rank)(x, weight, bias, windows.strides, 0, windows.dilations, group)


@op("Conv")
def conv(call: Call) -> Results:
    """Convolution with groups."""
    return convolved(call, call[0], call[1], call[2])


@op("FusedConv", domain="com.microsoft")
def fused_conv(call: Call) -> Results:
    """Convolution, a fourth input added, then an activation."""
    y = convolved(call, call[0], call[1], call[2])
    y = y if call[3] is None else y + call[3]
    return activation(call, call.attr("activation", ""), *(call.attr("activation_params") or ()))(y)


@op("FusedGemm", domain="com.microsoft")
def fused_gemm(call: Call) -> Results:
    """Gemm, then an activation."""
    from spa.torch_ops.contraction import product

    settings = [call.attr(f"activation_{n}") for n in ("alpha", "beta", "gamma")]
    return activation(call, call.attr("activation", ""), *[s for s in settings if s is not None])(product(call))


def activation(call: Call, name: str, *settings: float) -> Tensor:
    """The function that an attribute names; capitals do not matter."""
    functional = torch.nn.functional
    table = {
        "": lambda x: x,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softplus": functional.softplus,
        "softsign": functional.softsign,
        "affine": lambda x, a=1.0, b=0.0: x * a + b,
        "leakyrelu": lambda x, a=0.01: torch.where(x >= 0, x, x * a),
        "thresholdedrelu": lambda x, a=1.0: torch.where(x > a, x, torch.zeros_like(x)),
        "scaledtanh": lambda x, a=1.0, b=1.0: a * torch.tanh(b * x),
        "hardsigmoid": lambda x, a=0.2, b=0.5: (x * a + b).clamp(0, 1),
        "elu": lambda x, a=1.0: functional.elu(x, a),
        "clip": lambda x, low=-3.4e38, high=3.4e38: x.clamp(low, high),
    }
    if name.lower() not in table:
        raise call.refuse(f"the activation {name}")
    function = table[name.lower()]
    return lambda x: function(x, *settings)


@op("ConvTranspose")
def conv_transpose(call: Call) -> Results:
    """The whole transposed convolution, cut or extended by the pads; the bias comes last, since it is in the extension too."""
    x, weight, bias = call[0], call[1], call[2]
    rank = x.dim() - 2
    strides, dilations = list(call.attr("strides") or [1] * rank), list(call.attr("dilations") or [1] * rank)
    more = list(call.attr("output_padding") or [0] * rank)
    y = _by_rank("conv_transpose", rank)(x, weight, None, strides, 0, 0, call.attr("group", 1), dilations)
    wanted, auto = call.attr("output_shape"), call.attr("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER") and not wanted:
        wanted = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if wanted:
        total = [n + m - w for n, m, w in zip(y.shape[2:], more, wanted[-rank:], strict=True)]  # what the pads take
        before = [max(t, 0) // 2 if auto == "SAME_UPPER" else -(-max(t, 0) // 2) for t in total]
        after = [t - b for t, b in zip(total, before, strict=True)]
    else:
        pads = list(call.attr("pads") or [0] * 2 * rank) if auto != "VALID" else [0] * 2 * rank
        before, after = pads[:rank], pads[rank:]
    y = padded(y, [-b for b in before], [m - a for m, a in zip(more, after, strict=True)])
    return y if bias is None else y + channelwise(bias, y.dim())


@op("ConvInteger")
def conv_integer(call: Call) -> Results:
    """(x - zero point) * (w - zero point)."""
    x, weight = call[0].to(call.dtype), call[1].to(call.dtype)
    if call[3] is not None:
        zero = call[3].to(call.dtype)
        weight = weight - (zero.reshape((-1,) + (1,) * (weight.dim() - 1)) if zero.dim() else zero)
    return convolved(call, x if call[2] is None else x - call[2].to(call.dtype), weight, None)


@op("QLinearConv")
def qlinear_conv(call: Call) -> Results:
    """Quantised convolution, straight through; the bias is stored in units of both scales."""
    weight = dequantized(call, call[3], call[4], call[5], 0)
    bias = None if call[8] is None else call[8].to(call.dtype) * call[1] * call[4]
    y = convolved(call, dequantized(call, call[0], call[1], call[2]), weight, bias)
    return quantized(call, y, call[6], call[7], quantized_type(call, 7))


@op("MaxPool")
def max_pool(call: Call) -> Results:
    """Largest of each window."""
    if call.wants(1):
        raise call.refuse("the positions of the largest")
    windows = frame(call, list(call[0].shape[2:]), list(call.attr("kernel_shape")))
    x = call[0] if call[0].is_floating_point() else call[0].to(call.dtype)
    lowest = -float("inf")
    y = _by_rank("max_pool", x.dim() - 2)(
        padded(x, windows.before, windows.reach, lowest), windows.kernel, windows.strides, 0, windows.dilations
    )
    return y.to(call[0].dtype)


def _sums(x: Tensor, windows: Frame) -> Tensor:
    """Sum of each window of a value that is padded already; (n, c, *s) -> (n, c, *outs)."""
    flat = x.reshape((-1, 1, *x.shape[2:]))
    ones = x.new_ones((1, 1, *windows.kernel))
    y = _by_rank("conv", x.dim() - 2)(flat, ones, None, windows.strides, 0, windows.dilations)
    return y.reshape((*x.shape[:2], *y.shape[2:]))


@op("AveragePool")
def average_pool(call: Call) -> Results:
    """Mean of each window; with count_include_pad over the declared pads too, which are zeros."""
    x = call[0]
    windows = frame(call, list(x.shape[2:]), list(call.attr("kernel_shape")))
    there = x.new_ones((1, 1, *x.shape[2:]))
    if call.attr("count_include_pad", 0):
        there = padded(there, windows.before, windows.after, 1.0)
        rest = [r - a for r, a in zip(windows.reach, windows.after, strict=True)]
        there = padded(there, [0] * len(rest), rest)
    else:
        there = padded(there, windows.before, windows.reach)
    return _sums(padded(x, windows.before, windows.reach), windows) / _sums(there, windows)


@op("LpPool")
def lp_pool(call: Call) -> Results:
    """Norm of each window."""
    windows = frame(call, list(call[0].shape[2:]), list(call.attr("kernel_shape")))
    p = call.attr("p", 2)
    return _sums(padded(call[0], windows.before, windows.reach).abs() ** p, windows) ** (1 / p)
