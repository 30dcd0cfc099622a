"""Normalisations and softmax. Inputs are (n, c, *s) unless an attribute `axis` says otherwise."""

from __future__ import annotations

from spa.torch_ops.table import TABLE, Call, Results, Tensor, op, torch


def channelwise(vector: Tensor, rank: int) -> Tensor:
    """(c,) -> (c, 1, …), so that it fits axis 1 of a value."""
    return vector.reshape((-1,) + (1,) * (rank - 2))


@op("BatchNormalization", "SpatialBN")
def batch_normalization(call: Call) -> Results:
    """By the stored statistics; in training mode by those of the batch, and gives the running ones too.

    Where a run tracks moments (`Call.moments`), by those of the batch whatever the mode.
    """
    x, scale, bias, mean, variance = call.inputs[:5]
    epsilon = call.attr("epsilon", 1e-5)
    if call.moments is not None and not call.attr("training_mode", 0):
        now = [torch.zeros_like(mean), torch.ones_like(variance)]  # momentum 1 below: what runs is the batch's own
        y = torch.nn.functional.batch_norm(x, *now, scale, bias, True, 1.0, epsilon)
        momentum = call.attr("momentum", 0.9)
        for place, old, new in zip((3, 4), (mean, variance), now, strict=True):
            call.moments[call.node.inputs[place].name] = old.detach() * momentum + new * (1 - momentum)
        return y
    if not call.attr("training_mode", 0):
        slope = scale * torch.rsqrt(variance + epsilon)  # torch's own has no gradient by the statistics
        return x * channelwise(slope, x.dim()) + channelwise(bias - mean * slope, x.dim())
    axes = [i for i in range(x.dim()) if i != 1]
    now, spread = x.mean(axes), x.var(axes, unbiased=False)
    momentum = call.attr("momentum", 0.9)
    y = torch.nn.functional.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return y, mean * momentum + now * (1 - momentum), variance * momentum + spread * (1 - momentum)


@op("InstanceNormalization")
def instance_normalization(call: Call) -> Results:
    """Each channel of each sample by itself."""
    rank = call[0].dim()
    y = _over(call[0], list(range(2, rank)), call.attr("epsilon", 1e-5))
    return y * channelwise(call[1], rank) + channelwise(call[2], rank)


def _over(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)


@op("GroupNormalization")
def group_normalization(call: Call) -> Results:
    """Each group of channels of each sample; scale and bias were one a group before opset 21."""
    x, scale, bias = call.inputs[:3]
    groups = call.attr("num_groups")
    y = torch.nn.functional.group_norm(x, groups, eps=call.attr("epsilon", 1e-5))
    if scale.numel() == groups != x.shape[1]:
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return y * channelwise(scale, x.dim()) + channelwise(bias, x.dim())


def layer_norm(call: Call, x: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised value, mean and reciprocal deviation over the axes from `axis` on."""
    axes = list(range(axis % x.dim(), x.dim()))
    y = torch.nn.functional.layer_norm(x, tuple(x.shape[a] for a in axes), eps=call.attr("epsilon", 1e-5))
    y = y if scale is None else y * scale
    mean = deviation = None
    if any(call.wants(i) for i in (1, 2)):
        mean = x.mean(axes, keepdim=True)
        deviation = torch.rsqrt(((x - mean) ** 2).mean(axes, keepdim=True) + call.attr("epsilon", 1e-5))
    return (y if bias is None else y + bias), mean, deviation


@op("LayerNormalization")
def layer_normalization(call: Call) -> Results:
    """Over the axes from `axis` on."""
    return layer_norm(call, call[0], call[1], call[2], call.attr("axis", -1))[: len(call.node.outputs)]


def rms_norm(call: Call, x: Tensor, scale: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The value over its root mean square, and the reciprocal of that."""
    axes = list(range(axis % x.dim(), x.dim()))
    root = torch.rsqrt((x * x).mean(axes, keepdim=True) + call.attr("epsilon", 1e-5))
    return x * root * scale, root


@op("RMSNormalization", "SimplifiedLayerNormalization")
@op("SimplifiedLayerNormalization", domain="com.microsoft")
def rms_normalization(call: Call) -> Results:
    """Over the axes from `axis` on, without a mean."""
    return rms_norm(call, call[0], call[1], call.attr("axis", -1))[: len(call.node.outputs)]


@op("SkipLayerNormalization", domain="com.microsoft")
def skip_layer_normalization(call: Call) -> Results:
    """Of x + skip + bias; the sum is the fourth output."""
    total = call[0] + call[1] if call[4] is None else call[0] + call[1] + call[4]
    return (*layer_norm(call, total, call[2], call[3], -1), total)[: len(call.node.outputs)]


@op("SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_rms_normalization(call: Call) -> Results:
    """Of x + skip + bias; the sum is the fourth output."""
    total = call[0] + call[1] if call[3] is None else call[0] + call[1] + call[3]
    y, root = rms_norm(call, total, call[2], -1)
    return (y, None, root, total)[: len(call.node.outputs)]


@op("MeanVarianceNormalization")
def mean_variance_normalization(call: Call) -> Results:
    """To mean zero and variance one over `axes`."""
    x, axes = call[0], list(call.attr("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


@op("LpNormalization")
def lp_normalization(call: Call) -> Results:
    """To norm one along an axis; zero stays zero."""
    norm = torch.linalg.vector_norm(call[0], call.attr("p", 2), call.attr("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(call[0]), call[0] / torch.where(norm == 0, torch.ones_like(norm), norm))


@op("LRN")
def lrn(call: Call) -> Results:
    """X / (bias + alpha / size (sum of squares of the neighbouring channels))^beta."""
    x, size = call[0], call.attr("size")
    before = (size - 1) // 2
    squares = torch.nn.functional.pad(x * x, [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    total = squares.unfold(1, size, 1).sum(-1)
    return x / (call.attr("bias", 1.0) + call.attr("alpha", 1e-4) / size * total) ** call.attr("beta", 0.75)


def _along(call: Call, name: str) -> Results:
    """Before opset 13 the axes from `axis` on counted as one."""
    x = call[0]
    function = getattr(torch, name)
    if call.opset >= 13:
        return function(x, call.attr("axis", -1))
    return function(x.flatten(call.attr("axis", 1)), -1 if call.attr("axis", 1) else 0).reshape(x.shape)


TABLE["", "Softmax"] = lambda call: _along(call, "softmax")
TABLE["", "LogSoftmax"] = lambda call: _along(call, "log_softmax")


@op("Hardmax")
def hardmax(call: Call) -> Results:
    """One at the first largest element, else zero."""
    x, axis = (call[0], call.attr("axis", -1)) if call.opset >= 13 else (call[0].flatten(call.attr("axis", 1)), -1)
    first = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1).reshape(call[0].shape)
