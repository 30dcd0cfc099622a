"""Operators that work element by element, and those that make elements from nothing but numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from spa.graph.view import type_of
from spa.torch_ops.table import TABLE, Call, Op, Results, Tensor, onnx_type, op, table_of, torch

_SAME_NAME = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Cos Cosh Erf Exp Floor Log Neg Reciprocal Relu Round Sigmoid Sign Sin Sinh Sqrt Tan Tanh"
    " IsNaN"
)


def _unary(name: str) -> Op:
    return lambda call: getattr(torch, name)(call[0])


TABLE.update({("", _name): _unary(_name.lower()) for _name in _SAME_NAME.split()})

table_of(
    {
        "Not": lambda x: torch.logical_not(x),
        "BitwiseNot": lambda x: torch.bitwise_not(x),
        "HardSwish": lambda x: x * (x / 6 + 0.5).clamp(0, 1),
        "Mish": lambda x: torch.nn.functional.mish(x),
        "Softplus": lambda x: torch.nn.functional.softplus(x, threshold=50),
        "Softsign": lambda x: x / (1 + x.abs()),
        "PRelu": lambda x, slope: torch.where(x >= 0, x, x * slope),
        "Where": lambda condition, x, y: torch.where(condition, x, y),
        "Sum": lambda *x: functools.reduce(lambda a, b: a + b, x),
        "Mean": lambda *x: functools.reduce(lambda a, b: a + b, x) / len(x),
        "Max": lambda *x: functools.reduce(lambda a, b: torch.maximum(a, b), x),
        "Min": lambda *x: functools.reduce(lambda a, b: torch.minimum(a, b), x),
        "Identity": lambda x: x,
    }
)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _pow(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        exponent = b.to(a.dtype)
        if not exponent.requires_grad or exponent.numel() != 1:
            return torch.pow(a, exponent)
        # The derivative by the exponent holds log(a), NaN below zero: a stored exponent is a setting.
        return torch.pow(a, exponent.detach())
    return torch.pow(a.double(), b.double()).to(a.dtype)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _div,
    "Pow": _pow,
    "And": lambda a, b: torch.logical_and(a, b),
    "Or": lambda a, b: torch.logical_or(a, b),
    "Xor": lambda a, b: torch.logical_xor(a, b),
    "BitwiseAnd": lambda a, b: torch.bitwise_and(a, b),
    "BitwiseOr": lambda a, b: torch.bitwise_or(a, b),
    "BitwiseXor": lambda a, b: torch.bitwise_xor(a, b),
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
}


def _aligned(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    """Before opset 7 the second operand was spread from an attribute `axis` on."""

    def run(call: Call) -> Results:
        a, b = call[0], call[1]
        axis = call.attr("axis")
        if call.opset < 7 and call.attr("broadcast", 0) and axis is not None:
            b = b.reshape(tuple(b.shape) + (1,) * (a.dim() - axis % a.dim() - b.dim()))
        return function(a, b)

    return run


TABLE.update({("", _name): _aligned(_function) for _name, _function in _BINARY.items()})


@op("Mod")
def mod(call: Call) -> Results:
    """Sign of the divisor; with fmod=1, of the dividend."""
    return torch.fmod(call[0], call[1]) if call.attr("fmod", 0) else torch.remainder(call[0], call[1])


@op("BitShift")
def bit_shift(call: Call) -> Results:
    """By as many bits as the second operand says, within the width of the first."""
    if call.attr("direction") == "RIGHT":
        return torch.bitwise_right_shift(call[0], call[1])
    return torch.bitwise_left_shift(call[0], call[1])


@op("IsInf")
def is_inf(call: Call) -> Results:
    """Either sign, as the attributes say."""
    x = call[0]
    positive, negative = torch.isposinf(x), torch.isneginf(x)
    if not call.attr("detect_positive", 1):
        positive = torch.zeros_like(positive)
    return torch.logical_or(positive, negative) if call.attr("detect_negative", 1) else positive


@op("LeakyRelu")
def leaky_relu(call: Call) -> Results:
    """x, or alpha x below zero."""
    return torch.where(call[0] >= 0, call[0], call[0] * call.attr("alpha", 0.01))


@op("Elu")
def elu(call: Call) -> Results:
    """x, or alpha (e^x - 1) below zero."""
    return torch.nn.functional.elu(call[0], call.attr("alpha", 1.0))


@op("Celu")
def celu(call: Call) -> Results:
    """x, or alpha (e^(x / alpha) - 1) below zero."""
    return torch.nn.functional.celu(call[0], call.attr("alpha", 1.0))


@op("Selu")
def selu(call: Call) -> Results:
    """Scaled Elu."""
    alpha, gamma = call.attr("alpha", 1.67326319217681884765625), call.attr("gamma", 1.05070102214813232421875)
    return gamma * torch.nn.functional.elu(call[0], alpha)


@op("ThresholdedRelu")
def thresholded_relu(call: Call) -> Results:
    """X above alpha, else zero."""
    return torch.where(call[0] > call.attr("alpha", 1.0), call[0], torch.zeros_like(call[0]))


@op("HardSigmoid")
def hard_sigmoid(call: Call) -> Results:
    """Alpha x + beta between zero and one."""
    return (call[0] * call.attr("alpha", 0.2) + call.attr("beta", 0.5)).clamp(0, 1)


@op("Shrink")
def shrink(call: Call) -> Results:
    """Towards zero by `bias`, zero within `lambd`."""
    x, bias, edge = call[0], call.attr("bias", 0.0), call.attr("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


@op("Swish")
@op("QuickGelu", domain="com.microsoft")
def swish(call: Call) -> Results:
    """X sigmoid(alpha x)."""
    default = 1.0 if not call.node.domain else 1.702
    return call[0] * torch.sigmoid(call[0] * call.attr("alpha", default))


@op("Gelu")
@op("Gelu", "BiasGelu", domain="com.microsoft")
def gelu(call: Call) -> Results:
    """Exact or by tanh; a second input is a bias."""
    x = call[0] if call[1] is None else call[0] + call[1]
    return torch.nn.functional.gelu(x, approximate=call.attr("approximate", "none"))


@op("FastGelu", domain="com.microsoft")
def fast_gelu(call: Call) -> Results:
    """By tanh; a second input is a bias."""
    return torch.nn.functional.gelu(call[0] if call[1] is None else call[0] + call[1], approximate="tanh")


@op("BiasAdd", domain="com.microsoft")
def bias_add(call: Call) -> Results:
    """X + bias + skip."""
    return call[0] + call[1] + call[2]


@op("SwiGLU")
def swiglu(call: Call) -> Results:
    """The second operand, gated by the swish of the first."""
    return call[0] * torch.sigmoid(call[0] * call.attr("alpha", 1.0)) * call[1]


@op("Clip")
def clip(call: Call) -> Results:
    """Between two numbers, attributes before opset 11."""
    low, high = call[1], call[2]
    low = call.attr("min") if low is None else low.detach()
    high = call.attr("max") if high is None else high.detach()
    x = call[0]
    if low is not None:
        x = torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device))
    return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device))


@op("Dropout")
def dropout(call: Call) -> Results:
    """Nothing, as in inference; the mask is all true."""
    return (call[0], torch.ones_like(call[0], dtype=torch.bool))[: len(call.node.outputs)]


@op("Cast")
def cast(call: Call) -> Results:
    """To another type; all float types are one."""
    return call.cast(call[0], onnx_type(call.attr("to")))


@op("CastLike")
def cast_like(call: Call) -> Results:
    """To the type of the second input."""
    return call[0].to(call[1].dtype)


_LIMITS = {2: (0.0, 255.0), 3: (-128.0, 127.0), 4: (0.0, 65535.0), 5: (-32768.0, 32767.0), 21: (0.0, 15.0), 22: (-8.0, 7.0)}


def _rounded(x: Tensor) -> Tensor:
    """Rounded, with the gradient of x itself."""
    return x + (x.round() - x).detach()


def spread(setting: Tensor, x: Tensor, axis: int, block: int = 0) -> Tensor:
    """A scale or zero point along its axis of x; in blocks, each stands for so many positions."""
    if setting.numel() == 1 and setting.dim() <= 1:
        return setting.reshape(())
    if setting.dim() == x.dim() and block:
        return setting.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return setting.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def dequantized(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1, block: int = 0) -> Tensor:
    """(x - zero) scale."""
    x = x.to(call.dtype)
    if zero is not None:
        x = x - spread(zero, x, axis, block).to(call.dtype)
    return x * spread(scale, x, axis, block).to(call.dtype)


def quantized(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None, kind: int, axis: int = 1, block: int = 0) -> Tensor:
    """round(x / scale) + zero, clipped to the type's range; a float with a straight-through gradient."""
    if kind not in _LIMITS:
        raise call.refuse("a quantised type other than 4, 8 or 16 bits")
    low, high = _LIMITS[kind]
    offset = 0 if zero is None else spread(zero, x, axis, block).to(call.dtype)
    scaled = x.to(call.dtype) / spread(scale, x, axis, block).to(call.dtype)
    return (_rounded(scaled) + offset).clamp(low, high)


def quantized_type(call: Call, index: int) -> int:
    """The type of a zero point, input `index`, as the file declares it; uint8 if it is left out."""
    if index < len(call.node.inputs) and call.node.inputs[index].name:
        return type_of(call.node.inputs[index].dtype) or 2
    return int(call.attr("output_dtype", 0)) or 2


@op("QuantizeLinear")
@op("QuantizeLinear", domain="com.microsoft")
def quantize_linear(call: Call) -> Results:
    """Straight through."""
    return quantized(call, call[0], call[1], call[2], quantized_type(call, 2), call.attr("axis", 1), call.attr("block_size", 0))


@op("DequantizeLinear")
@op("DequantizeLinear", domain="com.microsoft")
def dequantize_linear(call: Call) -> Results:
    """(x - zero point) scale."""
    return dequantized(call, call[0], call[1], call[2], call.attr("axis", 1), call.attr("block_size", 0))


@op("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call) -> Results:
    """To uint8, by the range of the values."""
    x = call[0].detach()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    return (_rounded(call[0] / scale) + zero).clamp(0, 255), scale, zero
