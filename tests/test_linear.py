"""Linear maps in canonical form: rows @ weight.T + constant is what ONNX Runtime computes of the node, for every operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from spa.graph.linear import Layer, find_layers
from spa.graph.offsets import Missing, Offset, Offsets
from spa.statistics.rows import extents, row_count, rows


def layers_of(model: onnx.ModelProto, **settings: Any) -> tuple[spa.Groups, list[Layer]]:
    groups = spa.analyze(model, **settings).groups
    return groups, list(find_layers(groups))


def stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    held = {t.name: t for t in model.graph.initializer}
    return numpy_helper.to_array(held[name]).astype(np.float64)


def matrices(model: onnx.ModelProto, layer: Layer) -> np.ndarray:
    """(parts, outputs, columns)."""
    value = layer.place.read(stored(model, layer.place.name), layer.weight_shape)
    return layer.weight.canonical(value)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ran(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    return spa.proof.check.run(spa.load(model), feeds)["y"]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * max(np.abs(expected).max(), 1)


def by_channel(y: np.ndarray, parts: int) -> np.ndarray:
    """(n, parts · outputs, *space) -> (parts, rows, outputs)."""
    last = np.moveaxis(y, 1, -1)
    return last.reshape(-1, parts, last.shape[-1] // parts).transpose(1, 0, 2)


# ------------------------------------------------------------------------------------------------ convolutions

CONVS = {
    "plain": ("", (2, 3, 6, 7), (4, 3, 3, 2)),
    "point": ("", (2, 3, 6, 7), (4, 3, 1, 1)),
    "strided": ("strides=[2,3], pads=[1,0,2,1]", (2, 3, 9, 8), (4, 3, 3, 3)),
    "dilated": ("dilations=[2,3], pads=[2,3,1,2]", (2, 3, 9, 9), (4, 3, 3, 2)),
    "all": ("strides=[2,1], dilations=[2,1], pads=[2,1,0,3], group=2", (2, 4, 9, 8), (6, 2, 2, 3)),
    "upper": ('auto_pad="SAME_UPPER", strides=[2,3]', (2, 3, 8, 9), (4, 3, 3, 4)),
    "lower": ('auto_pad="SAME_LOWER", strides=[2,3]', (2, 3, 8, 9), (4, 3, 3, 4)),
    "upper, even, stride one": ('auto_pad="SAME_UPPER"', (1, 3, 5, 6), (4, 3, 2, 4)),
    "lower, even, stride one": ('auto_pad="SAME_LOWER"', (1, 3, 5, 6), (4, 3, 2, 4)),
    "valid": ('auto_pad="VALID", strides=[2,2]', (2, 3, 8, 9), (4, 3, 3, 4)),
    "grouped": ("group=3, pads=[1,1,1,1]", (2, 6, 5, 5), (9, 2, 3, 3)),
    "depthwise": ("group=4, pads=[1,1,1,1], strides=[2,2]", (2, 4, 6, 6), (4, 1, 3, 3)),
    "multiplier": ("group=4", (2, 4, 6, 6), (8, 1, 3, 3)),
    "one space axis": ("strides=[2], pads=[1,2], dilations=[2]", (2, 3, 11), (4, 3, 3)),
    "three space axes": ("strides=[1,2,1], pads=[1,0,1,1,1,0]", (2, 2, 4, 5, 3), (3, 2, 3, 2, 2)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_conv(name: str, with_bias: bool) -> None:
    attributes, shape, kernel = CONVS[name]
    spelled = f"y = Conv <{attributes}> (x, w{', b' if with_bias else ''})" if attributes else f"y = Conv(x, w{', b' if with_bias else ''})"
    dims = ",".join(map(str, shape))
    free = ",".join("abcde"[: len(shape)])
    model = net(f"float[{dims}] x -> float[{free}] y", spelled, w=kernel, **({"b": (kernel[0],)} if with_bias else {}))
    groups, (layer,) = layers_of(model)
    x = drawn(shape)
    y = ran(model, x=x)
    assert layer.window is not None
    assert extents(layer.window, shape[2:]) == y.shape[2:]
    assert row_count(layer, shape) == y.shape[0] * np.prod(y.shape[2:])
    weight = matrices(model, layer)
    assert weight.shape == (layer.parts, layer.outputs, layer.columns)
    found = rows(layer, x.astype(np.float64)) @ weight.transpose(0, 2, 1)
    if with_bias:
        found = found + constant(model, groups, layer)[:, None]
    close(found, by_channel(y, layer.parts))


def constant(model: onnx.ModelProto, groups: spa.Groups, layer: Layer) -> np.ndarray:
    """(parts, outputs) what is added to a layer's output."""
    offset = Offsets(groups).of(layer)
    assert isinstance(offset, Offset)
    held = offset.place.read(stored(model, offset.place.name), offset.shape)
    return (offset.layout.canonical(held)[0] / offset.gain).reshape(layer.parts, layer.outputs)


TRANSPOSED = {
    "plain": ("", (2, 3, 4, 5), (3, 4, 3, 2)),
    "strided": ("strides=[2,3]", (2, 3, 4, 5), (3, 4, 3, 2)),
    "padded": ("strides=[2,2], pads=[1,0,1,2]", (2, 3, 4, 5), (3, 4, 4, 3)),
    "output padding": ("strides=[2,3], pads=[1,1,1,1], output_padding=[1,2]", (2, 3, 4, 4), (3, 4, 3, 3)),
    "dilated": ("strides=[2,1], dilations=[2,3], pads=[1,1,0,2]", (2, 3, 4, 5), (3, 4, 3, 2)),
    "grouped": ("group=2, strides=[2,2], output_padding=[1,0]", (2, 4, 3, 4), (4, 3, 3, 3)),
    "depthwise": ("group=4, strides=[2,2]", (2, 4, 3, 4), (4, 1, 2, 2)),
    "upper": ('auto_pad="SAME_UPPER", strides=[2,2]', (1, 3, 4, 5), (3, 4, 3, 3)),
    "lower": ('auto_pad="SAME_LOWER", strides=[2,2]', (1, 3, 4, 5), (3, 4, 3, 3)),
    "valid": ('auto_pad="VALID", strides=[2,2]', (1, 3, 4, 5), (3, 4, 3, 3)),
    "one space axis": ("strides=[3], pads=[1,0]", (2, 3, 5), (3, 4, 4)),
    "three space axes": ("strides=[1,2,1]", (1, 2, 3, 2, 3), (2, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose(name: str) -> None:
    attributes, shape, kernel = TRANSPOSED[name]
    group = 4 if "group=4" in attributes else 2 if "group=2" in attributes else 1
    dims = ",".join(map(str, shape))
    free = ",".join("abcde"[: len(shape)])
    body = f"y = ConvTranspose <{attributes}> (x, w, b)" if attributes else "y = ConvTranspose(x, w, b)"
    model = net(f"float[{dims}] x -> float[{free}] y", body, w=kernel, b=(kernel[1] * group,))
    groups, (layer,) = layers_of(model)
    x = drawn(shape)
    y = ran(model, x=x)
    assert layer.window is not None
    assert extents(layer.window, shape[2:]) == y.shape[2:]
    found = rows(layer, x.astype(np.float64)) @ matrices(model, layer).transpose(0, 2, 1) + constant(model, groups, layer)[:, None]
    close(found, by_channel(y, layer.parts))


def test_rows_of_a_kernel_are_what_one_hot_kernels_see() -> None:
    """The kernels of an identity give the columns themselves; channels first, then positions."""
    kernel = np.eye(12, dtype=np.float32).reshape(12, 3, 2, 2)
    model = net("float[2,3,5,4] x -> float[2,12,4,3] y", "y = Conv(x, w)", w=kernel)
    _, (layer,) = layers_of(model)
    x = drawn((2, 3, 5, 4))
    np.testing.assert_array_equal(rows(layer, x), by_channel(ran(model, x=x), 1))
    some = np.array([0, 3, 17, 23])
    np.testing.assert_array_equal(rows(layer, x, some), rows(layer, x)[:, some])


def test_a_conv_of_a_computed_output_shape_is_not_known() -> None:
    model = net("float[1,3,4,4] x -> float[a,b,c,d] y", "y = ConvTranspose <output_shape=[9,9], strides=[2,2]> (x, w)", w=(3, 4, 3, 3))
    assert layers_of(model)[1] == []


# ------------------------------------------------------------------------------------------------ matrix products

def flat(y: np.ndarray) -> np.ndarray:
    return y.reshape(1, -1, y.shape[-1])


PRODUCTS = {
    "gemm": ("float[5,6] x -> float[5,4] y", "y = Gemm(x, w, b)", {"w": (6, 4), "b": (4,)}, flat),
    "gemm, weight transposed": ("float[5,6] x -> float[5,4] y", "y = Gemm <transB=1> (x, w, b)", {"w": (4, 6), "b": (1, 4)}, flat),
    "gemm, data transposed": ("float[6,5] x -> float[5,4] y", "y = Gemm <transA=1> (x, w, b)", {"w": (6, 4), "b": (4,)}, flat),
    "gemm, both": ("float[6,5] x -> float[5,4] y", "y = Gemm <transA=1, transB=1> (x, w, b)", {"w": (4, 6), "b": (4,)}, flat),
    "gemm, weight left": ("float[6,5] x -> float[4,5] y", "y = Gemm(w, x, b)", {"w": (4, 6), "b": (4, 1)}, lambda y: y.T[None]),
    "gemm, weight left, both": ("float[5,6] x -> float[4,5] y", "y = Gemm <transA=1, transB=1> (w, x, b)",
                                {"w": (6, 4), "b": (4, 1)}, lambda y: y.T[None]),
    "matmul": ("float[2,5,6] x -> float[2,5,4] y", "y = MatMul(x, w)", {"w": (6, 4)}, flat),
    "matmul, a vector": ("float[6] x -> float[4] y", "y = MatMul(x, w)", {"w": (6, 4)}, flat),
    "matmul, weight left": ("float[2,6,5] x -> float[2,4,5] y", "y = MatMul(w, x)", {"w": (4, 6)},
                            lambda y: y.transpose(0, 2, 1).reshape(1, -1, 4)),
    "matmul, parts": ("float[3,5,6] x -> float[3,5,4] y", "y = MatMul(x, w)", {"w": (3, 6, 4)}, lambda y: y),
    "matmul, parts behind a batch": ("float[2,3,5,6] x -> float[2,3,5,4] y", "y = MatMul(x, w)", {"w": (3, 6, 4)},
                                     lambda y: y.transpose(1, 0, 2, 3).reshape(3, -1, 4)),
    "matmul, parts left": ("float[3,6,5] x -> float[3,4,5] y", "y = MatMul(w, x)", {"w": (3, 4, 6)}, lambda y: y.transpose(0, 2, 1)),
    "matmul, weight with a one": ("float[2,5,6] x -> float[2,5,4] y", "y = MatMul(x, w)", {"w": (1, 6, 4)}, flat),
    "fused, transposed": ("float[2,5,6] x -> float[2,5,4] y", "y = com.microsoft.FusedMatMul <transB=1> (x, w)", {"w": (4, 6)}, flat),
    "fused, data transposed": ("float[2,6,5] x -> float[2,5,4] y", "y = com.microsoft.FusedMatMul <transA=1> (x, w)", {"w": (6, 4)}, flat),
    "einsum": ("float[2,5,6] x -> float[2,5,4] y", 'y = Einsum <equation="bti,io->bto"> (x, w)', {"w": (6, 4)}, flat),
    "einsum, weight first": ("float[2,6,5] x -> float[2,4,5] y", 'y = Einsum <equation="oi,bit->bot"> (w, x)', {"w": (4, 6)},
                             lambda y: y.transpose(0, 2, 1).reshape(1, -1, 4)),
    "einsum, heads made": ("float[2,5,6] x -> float[2,3,5,4] y", 'y = Einsum <equation="bti,ihd->bhtd"> (x, w)', {"w": (6, 3, 4)},
                           lambda y: y.transpose(0, 2, 1, 3).reshape(1, -1, 12)),
    "einsum, heads summed": ("float[2,3,5,4] x -> float[2,5,6] y", 'y = Einsum <equation="bhtd,hdo->bto"> (x, w)', {"w": (3, 4, 6)}, flat),
    "einsum, parts": ("float[2,3,5,6] x -> float[2,3,5,4] y", 'y = Einsum <equation="bgti,goi->bgto"> (x, w)', {"w": (3, 4, 6)},
                      lambda y: y.transpose(1, 0, 2, 3).reshape(3, -1, 4)),
}


def data_shape(values: str) -> tuple[int, ...]:
    return tuple(int(n) for n in values.split("[")[1].split("]")[0].split(","))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    values, body, weights, canonical = PRODUCTS[name]
    model = net(values, body, **weights)
    groups, (layer,) = layers_of(model)
    x = drawn(data_shape(values))
    expected = canonical(ran(model, x=x))
    found = rows(layer, x.astype(np.float64))
    assert found.shape[:2] == expected.shape[:2]
    assert row_count(layer, x.shape) == found.shape[1]
    found = found @ matrices(model, layer).transpose(0, 2, 1)
    if "b" in weights:
        found = found + constant(model, groups, layer)[:, None]
    close(found, expected)
    np.testing.assert_array_equal(layer.rows(x)[:, :1], rows(layer, x, np.array([0])))


@pytest.mark.parametrize("alpha, beta", [(0.5, 1.0), (2.0, 0.25), (-1.5, 3.0)])
def test_factors_of_a_gemm(alpha: float, beta: float) -> None:
    """The rows give the output over alpha; what the bias is worth there is its gain."""
    model = net("float[5,6] x -> float[5,4] y", f"y = Gemm <alpha={alpha}, beta={beta}, transB=1> (x, w, b)", w=(4, 6), b=(4,))
    groups, (layer,) = layers_of(model)
    x = drawn((5, 6))
    found = rows(layer, x.astype(np.float64)) @ matrices(model, layer).transpose(0, 2, 1) + constant(model, groups, layer)[:, None]
    close(alpha * found, flat(ran(model, x=x)))


# ------------------------------------------------------------------------------------------------ recurrent layers, packed attention

def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_lstm(direction: str) -> None:
    """With no recurrent weight a state is a function of the gates before their nonlinearities, which are the layer's outputs."""
    r, h = (2 if direction == "bidirectional" else 1), 3
    body = f'o, y, c = LSTM <hidden_size=3, direction="{direction}"> (x, w, u, b)'
    model = net(f"float[1,5,4] x -> float[{r},5,3] y, float[{r},5,3] c", body, w=(r, 12, 4), u=np.zeros((r, 12, 3), np.float32), b=(r, 24))
    groups, (layer,) = layers_of(model)
    assert (layer.parts, layer.outputs, layer.columns) == (1, r * 12, 4)
    x = drawn((1, 5, 4))
    gates = rows(layer, x.astype(np.float64))[0] @ matrices(model, layer)[0].T + constant(model, groups, layer)[0]
    b = stored(model, "b").reshape(r, 2, 12)
    gates = gates.reshape(5, r, 4, h) + b[:, 1].reshape(r, 4, h)  # the offset is the input's bias; the other is the state's
    i, o, _, c = gates.transpose(2, 1, 0, 3)
    close(ran(model, x=x).astype(np.float64), sigmoid(o) * np.tanh(sigmoid(i) * np.tanh(c)))


def test_gru_and_rnn() -> None:
    model = net("float[1,5,4] x -> float[1,5,3] y", "o, y = GRU <hidden_size=3> (x, w, u, b)",
                w=(1, 9, 4), u=np.zeros((1, 9, 3), np.float32), b=(1, 18))
    groups, (layer,) = layers_of(model)
    x = drawn((1, 5, 4))
    gates = rows(layer, x.astype(np.float64))[0] @ matrices(model, layer)[0].T + constant(model, groups, layer)[0]
    z, _, n = (gates + stored(model, "b")[0, 9:]).reshape(5, 3, 3).transpose(1, 0, 2)
    close(ran(model, x=x).astype(np.float64)[0], (1 - sigmoid(z)) * np.tanh(n))
    model = net("float[1,5,4] x -> float[1,5,3] y", "o, y = RNN <hidden_size=3> (x, w, u, b)",
                w=(1, 3, 4), u=np.zeros((1, 3, 3), np.float32), b=(1, 6))
    groups, (layer,) = layers_of(model)
    gates = rows(layer, x.astype(np.float64))[0] @ matrices(model, layer)[0].T + constant(model, groups, layer)[0]
    close(ran(model, x=x).astype(np.float64)[0], np.tanh(gates + stored(model, "b")[0, 3:]))


def test_packed_attention() -> None:
    """One weight for query, key and value: the layer's outputs are those, before the attention."""
    model = net("float[2,5,8] x -> float[2,5,6] y", "y = com.microsoft.Attention <num_heads=2> (x, w, b)", w=(8, 18), b=(18,))
    groups, (layer,) = layers_of(model)
    assert (layer.parts, layer.outputs, layer.columns) == (1, 18, 8)
    x = drawn((2, 5, 8))
    packed = rows(layer, x.astype(np.float64))[0] @ matrices(model, layer)[0].T + constant(model, groups, layer)[0]
    q, k, v = packed.reshape(2, 5, 3, 2, 3).transpose(2, 0, 3, 1, 4)  # (b, h, t, d)
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(3))
    out = scores / scores.sum(-1, keepdims=True) @ v
    close(ran(model, x=x).astype(np.float64), out.transpose(0, 2, 1, 3).reshape(2, 5, 6))


# ------------------------------------------------------------------------------------------------ weights that are moved

MOVED = {
    "transposed": ("m = Transpose(w) y = MatMul(x, m)", {"w": (4, 6)}),
    "reshaped": ("m = Reshape(w, s) y = MatMul(x, m)", {"w": (3, 2, 4), "s": ints(6, 4)}),
    "both": ("t = Transpose <perm=[2,0,1]> (w) m = Reshape(t, s) y = MatMul(x, m)", {"w": (3, 4, 2), "s": ints(6, 4)}),
    "cast": ("m = Cast <to=1> (w) y = MatMul(x, m)", {"w": np.arange(24, dtype=np.float16).reshape(6, 4)}),
    "squeezed": ("m = Squeeze(w, a) y = MatMul(x, m)", {"w": (6, 1, 4), "a": ints(1)}),
    "sliced": ("m = Slice(w, b, e, a) y = MatMul(x, m)", {"w": (6, 9), "b": ints(3), "e": ints(7), "a": ints(1)}),
    "split": ("u, m = Split <axis=1> (w, s) y = MatMul(x, m)", {"w": (6, 7), "s": ints(3, 4)}),
    "identity": ("m = Identity(w) y = MatMul(x, m)", {"w": (6, 4)}),
    "gathered": ("g = Gather <axis=0> (w, i) y = MatMul(x, g)", {"w": (8, 4), "i": ints(7, 0, 3, 2, 1, 5)}),
}


@pytest.mark.parametrize("name", MOVED)
def test_weights_behind_what_moves_them(name: str) -> None:
    body, weights = MOVED[name]
    model = net("float[2,5,6] x -> float[2,5,4] y", body, **weights)
    _, (layer,) = layers_of(model)
    assert layer.place.name == "w"
    x = drawn((2, 5, 6))
    close(rows(layer, x.astype(np.float64)) @ matrices(model, layer).transpose(0, 2, 1), flat(ran(model, x=x)))
    held, fresh = stored(model, "w"), drawn(layer.weight_shape, 1).astype(np.float64)
    others = held.copy()
    layer.place.write(held, fresh)
    np.testing.assert_array_equal(layer.place.read(held, layer.weight_shape), fresh)
    assert (held == others).sum() == held.size - fresh.size  # the elements that are not the layer's stay


@pytest.mark.parametrize(
    "body, weights",
    [
        ("m = Mul(w, f) y = MatMul(x, m)", {"w": (6, 4), "f": (1,)}),
        ("m = Relu(w) y = MatMul(x, m)", {"w": (6, 4)}),
        ("m = Expand(w, s) y = MatMul(x, m)", {"w": (1, 4), "s": ints(6, 4)}),
        ("m = Concat <axis=0> (w, v) y = MatMul(x, m)", {"w": (2, 4), "v": (4, 4)}),
        ("m = Gather <axis=0> (w, i) y = MatMul(x, m)", {"w": (8, 4), "i": ints(7, 0, 3, 3, 1, 5)}),
        ("m = Transpose(x) n = MatMul(x, m) y = MatMul(n, w)", {"w": (2, 5, 4)}),
    ],
)
def test_what_is_computed_is_no_layer(body: str, weights: dict[str, Any]) -> None:
    """Weights that are computed, that hold an element twice; products of two values."""
    model = net(f"float[{'5,6' if 'Transpose' in body else '2,5,6'}] x -> float[a,b,c] y", body, **weights)
    found = layers_of(model)[1]
    assert [layer.node.inputs[layer.linear.data].name for layer in found] == (["n"] if "Transpose" in body else [])


def test_products_of_stored_values_are_no_layers() -> None:
    model = net("float[2,6] x -> float[2,4] y", "m = MatMul(v, w) y = Add(x, m)", v=(2, 6), w=(6, 6), opset=17)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 6
    assert layers_of(model)[1] == []


def test_layout_is_undone() -> None:
    for values, body, weights, _ in PRODUCTS.values():
        model = net(values, body, **weights)
        _, (layer,) = layers_of(model)
        held = stored(model, "w")
        found = layer.weight.back(layer.weight.canonical(held)).reshape(held.shape)
        np.testing.assert_array_equal(found, held)


# ------------------------------------------------------------------------------------------------ what goes, and what goes together

def test_columns_that_go() -> None:
    """After a Flatten a channel is a block of columns; in a kernel, all its positions."""
    body = "a = Conv <pads=[1,1,1,1]> (x, w1) r = Relu(a) c = Conv(r, w2) f = Flatten(c) y = Gemm <transB=1> (f, w3)"
    model = net("float[2,3,4,4] x -> float[2,5] y", body, w1=(8, 3, 3, 3), w2=(6, 8, 3, 3), w3=(5, 24))
    groups, (first, second, third) = layers_of(model)
    gone = np.zeros(groups.total, bool)
    one, two = groups.by_name["w1:0"], groups.by_name["w2:0"]
    gone[one.start + 2] = gone[two.start + 1] = gone[two.start + 5] = True
    kept = spa.graph.groups.Kept(groups, gone)
    assert not first.removed(kept).any()
    np.testing.assert_array_equal(second.removed(kept)[0], np.repeat(np.arange(8) == 2, 9))
    np.testing.assert_array_equal(third.removed(kept)[0], np.repeat(np.isin(np.arange(6), [1, 5]), 4))
    np.testing.assert_array_equal(second.coordinates(groups, one.start, one.start + 8)[0], np.repeat(np.arange(8), 9))
    np.testing.assert_array_equal(third.coordinates(groups, two.start, two.start + 6)[0], np.repeat(np.arange(6), 4))
    assert (third.coordinates(groups, one.start, one.start + 8) == -1).all()
    assert len(np.unique(third.channels)) == 6


def test_parts_that_go_as_a_whole_lose_nothing() -> None:
    """A depthwise convolution has nothing to repair; a grouped one does where channels of groups that stay go."""
    body = "a = Conv(x, w1) b = Conv <group=8> (a, w2) c = Conv <group=4> (b, w3) y = Conv(c, w4)"
    model = net("float[2,3,4,4] x -> float[2,5,4,4] y", body, w1=(8, 3, 1, 1), w2=(8, 1, 1, 1), w3=(12, 2, 1, 1), w4=(5, 12, 1, 1))
    groups, (_, depthwise, grouped, last) = layers_of(model)
    sizes = {g.size: g for g in groups.groups if ("w3", 0) in g.sites or ("w3", 1) in g.sites}
    for size, expected in ((4, 0), (2, 4)):
        gone = np.zeros(groups.total, bool)
        gone[sizes[size].start] = True
        kept = spa.graph.groups.Kept(groups, gone)
        assert depthwise.removed(kept).sum() == 0
        assert grouped.removed(kept).sum() == expected
        assert last.removed(kept).sum() == (3 if size == 4 else 0)


def test_a_square_and_its_transpose_are_other_rows() -> None:
    body = "h = MatMul(x, w1) a = Gemm(h, w2) b = Gemm <transA=1> (h, w3) y = Add(a, b)"
    _, layers = layers_of(net("float[6,6] x -> float[6,4] y", body, w1=(6, 6), w2=(6, 4), w3=(6, 4)))
    assert len({layer.key for layer in layers}) == 3


def test_layers_that_read_the_same_rows() -> None:
    body = "h = MatMul(x, w1) a = MatMul(h, w2) b = Gemm <transB=1> (h, w3) t = Transpose(h) c = Gemm <transA=1> (t, w4)"
    body += " d = Add(a, b) y = Add(d, c)"
    model = net("float[5,6] x -> float[5,4] y", body, w1=(6, 6), w2=(6, 4), w3=(4, 6), w4=(6, 4))
    _, layers = layers_of(model)
    by = {layer.place.name: layer.key for layer in layers}
    assert by["w1"] != by["w2"]
    assert (by["w2"] == by["w3"], by["w2"] == by["w4"]) == (True, False)


# ------------------------------------------------------------------------------------------------ constants

IMAGE = "float[2,3,4,4] x -> float[2,5,4,4] y"
NORM = {"s": (5,), "b": (5,), "m": (5,), "v": np.ones(5, np.float32)}
HOMES = {  # model, where the constant of the layer of w is: place and gain, or the slot and shape of a new one
    "own": (IMAGE, "y = Conv(x, w, c)", {"w": (5, 3, 1, 1), "c": (5,)}, ("c", 1.0)),
    "own, before a norm": (IMAGE, "a = Conv(x, w, c) y = BatchNormalization(a, s, b, m, v)", {"w": (5, 3, 1, 1), "c": (5,), **NORM},
                           ("c", 1.0)),
    "norm": (IMAGE, "a = Conv(x, w) y = BatchNormalization(a, s, b, m, v)", {"w": (5, 3, 1, 1), **NORM}, ("m", -1.0)),
    "norm, but read twice": (IMAGE, "a = Conv(x, w) n = BatchNormalization(a, s, b, m, v) y = Add(a, n)", {"w": (5, 3, 1, 1), **NORM},
                             (2, (5,))),
    "addition": ("float[2,6] x -> float[2,4] y", "a = MatMul(x, w) y = Add(a, c)", {"w": (6, 4), "c": (4,)}, ("c", 1.0)),
    "addition from the left": ("float[2,6] x -> float[2,4] y", "a = MatMul(x, w) y = Add(c, a)", {"w": (6, 4), "c": (1, 4)}, ("c", 1.0)),
    "addition to a convolution": (IMAGE, "a = Conv(x, w) y = Add(a, c)", {"w": (5, 3, 1, 1), "c": (1, 5, 1, 1)}, ("c", 1.0)),
    "addition of a map": (IMAGE, "a = Conv(x, w) y = Add(a, c)", {"w": (5, 3, 1, 1), "c": (1, 5, 4, 4)}, (2, (5,))),
    "addition of one number": ("float[2,6] x -> float[2,4] y", "a = MatMul(x, w) y = Add(a, c)", {"w": (6, 4), "c": (1,)}, (None, (4,))),
    "addition of another value": ("float[2,6] x, float[2,4] z -> float[2,4] y", "a = MatMul(x, w) y = Add(a, z)", {"w": (6, 4)},
                                  (None, (4,))),
    "addition of rows": ("float[2,6] x -> float[2,4] y", "a = MatMul(x, w) y = Add(a, c)", {"w": (6, 4), "c": (2, 4)}, (None, (4,))),
    "addition to an output": ("float[2,6] x -> float[2,4] y, float[2,4] a", "a = MatMul(x, w) y = Add(a, c)", {"w": (6, 4), "c": (4,)},
                              (None, (4,))),
    "addition of what others read": ("float[2,6] x -> float[2,4] y", "a = MatMul(x, w) b = Add(a, c) y = Mul(b, c)",
                                     {"w": (6, 4), "c": (4,)}, ("c", 1.0)),  # normalising gives each reader of a small one its own
    "addition of what others read, moved": ("float[2,6] x -> float[2,4] y",
                                            "m = Reshape(c, s) a = MatMul(x, w) b = Add(a, m) y = Mul(b, m)",
                                            {"w": (6, 4), "c": (2, 2), "s": ints(4)}, (None, (4,))),
    "nothing, Conv": (IMAGE, "y = Conv(x, w)", {"w": (5, 3, 1, 1)}, (2, (5,))),
    "nothing, grouped": ("float[2,4,4,4] x -> float[2,6,4,4] y", "y = Conv <group=2> (x, w)", {"w": (6, 2, 1, 1)}, (2, (6,))),
    "nothing, MatMul": ("float[2,7,6] x -> float[2,7,4] y", "y = MatMul(x, w)", {"w": (6, 4)}, (None, (4,))),
    "nothing, weight left": ("float[2,6,7] x -> float[2,4,7] y", "y = MatMul(w, x)", {"w": (4, 6)}, (None, (4, 1))),
    "nothing, parts": ("float[2,3,7,6] x -> float[2,3,7,4] y", "y = MatMul(x, w)", {"w": (3, 6, 4)}, (None, (3, 1, 4))),
    "nothing, LSTM": ("float[1,5,4] x -> float[1,1,5,3] y", "y = LSTM <hidden_size=3> (x, w, u)", {"w": (1, 12, 4), "u": (1, 12, 3)},
                      (3, (1, 24))),
    "nothing, Gemm": ("float[2,6] x -> float[2,4] y", "y = Gemm(x, w)", {"w": (6, 4)}, (2, (4,))),
    "nothing, Gemm, weight left": ("float[6,5] x -> float[4,5] y", "y = Gemm(w, x)", {"w": (4, 6)}, (2, (4, 1))),
    "nothing, packed attention": ("float[2,5,8] x -> float[2,5,6] y", "y = com.microsoft.Attention <num_heads=2> (x, w)", {"w": (8, 18)},
                                  (2, (18,))),
    "rows of a Gemm": ("float[2,6] x -> float[2,4] y", "y = Gemm(x, w, c)", {"w": (6, 4), "c": (2, 4)}, (None, (4,))),
    "factor and bias": ("float[2,6] x -> float[2,4] y", "y = Gemm <alpha=3.0, beta=2.0> (x, w, c)", {"w": (6, 4), "c": (4,)}, ("c", 1.5)),
    "factor and addition": ("float[2,6] x -> float[2,4] y", "a = Gemm <alpha=3.0, beta=2.0> (x, w) y = Add(a, c)",
                            {"w": (6, 4), "c": (4,)}, ("c", 3.0)),
    "fused factor": ("float[2,6] x -> float[2,4] y", "a = com.microsoft.FusedMatMul <alpha=3.0> (x, w) y = Add(a, c)",
                     {"w": (6, 4), "c": (4,)}, ("c", 3.0)),
    "a square norm over rows": ("float[2,5,6] x -> float[2,5,5] y", "a = MatMul(x, w) y = BatchNormalization(a, s, b, m, v)",
                                {"w": (6, 5), **NORM}, (None, (5,))),
    "fused activation": (IMAGE, 'a = com.microsoft.FusedConv <activation="Relu"> (x, w) y = Add(a, c)',
                         {"w": (5, 3, 1, 1), "c": (5, 1, 1)}, (2, (5,))),
}


@pytest.mark.parametrize("name", HOMES)
def test_where_the_constant_is(name: str) -> None:
    values, body, weights, expected = HOMES[name]
    groups, layers = layers_of(net(values, body, **weights))
    layer = next(x for x in layers if x.place.name == "w")
    found = Offsets(groups).of(layer)
    if isinstance(found, Missing):
        assert (found.slot, found.shape) == expected
    else:
        assert (found.place.name, found.gain) == expected


@pytest.mark.parametrize("name", [n for n, (*_, e) in HOMES.items() if isinstance(e[0], str) and "norm" not in n and "read" not in n])
def test_what_is_added_to_the_constant_is_added_to_the_output(name: str) -> None:
    values, body, weights, (home, _) = HOMES[name]
    model = net(values, body, **weights)
    groups, layers = layers_of(model)
    layer = next(x for x in layers if x.place.name == "w")
    offset = Offsets(groups).of(layer)
    assert isinstance(offset, Offset)
    change, held = drawn((layer.parts, layer.outputs), 3).astype(np.float64), stored(model, home)
    offset.add(held, change)
    x = drawn(data_shape(values))
    before = ran(model, x=x)
    for tensor in model.graph.initializer:
        if tensor.name == home:
            tensor.CopyFrom(numpy_helper.from_array(held.astype(np.float32), home))
    scale = 3.0 if "factor" in name else 1.0  # what Gemm and FusedMatMul multiply by after the sum
    shape = (1, -1, 1, 1) if before.ndim == 4 else (1, -1)
    close(ran(model, x=x) - before, np.broadcast_to(scale * change[0].reshape(shape), before.shape))
