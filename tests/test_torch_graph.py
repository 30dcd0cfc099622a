"""Graphs in torch against ONNX: the node tests of the onnx package, the zoo on ONNX Runtime, and gradients against differences."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from test_trace import ints, net

import spa
from models import weightless
from spa.errors import BadOption, UnsupportedModel
from spa.proof.check import difference, run
from spa.proof.feeds import draw
from spa.statistics.torch_graph import TorchGraph
from spa.storage import store
from spa.torch_ops import TABLE

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")

ZOO = sorted((Path(__file__).parents[1] / "models" / "zoo").glob("*.onnx.xz"))

OTHER = {  # node tests whose result is another one here, and why
    r"cast.*(FLOAT8|FLOAT4|INT2|INT4)|(de)?quantizelinear.*(e4m3|e5m2|float4|int2|2bit)": "torch has no gradients for these types",
    r"(bf16|bfloat16|BFLOAT16)": "half precision is float32 here, more exact than the tolerance of these tests",
    r"training_dropout": "dropout does nothing here",
    r"bitwise_not_3d": "uint16 is held as int32",
    r"equal_string|^test_if_(seq|opt)": "text, sequences and optional values",
    r"maxpool_with_argmax": "refused in one sentence",
    r"resize_downsample_scales_(linear|cubic)_align_corners$": "as ONNX Runtime, which takes the rounded length",
}


@cache
def cases() -> dict[str, Any]:
    """Node tests by name, of graphs whose operators are all in the table."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return {c.name: c for c in found if c.model is not None and all(("", n.op_type) in TABLE and not n.domain for n in c.model.graph.node)}


def array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def unlike(case: Any) -> str:
    """What is wrong with the results of a node test, if anything."""
    graph = store.load(case.model).graph
    network = TorchGraph(graph)
    for inputs, outputs in case.data_sets:
        found = network.run({t.name: array(v) for t, v in zip(graph.inputs, inputs, strict=False)})
        for tensor, expected in zip(graph.outputs, map(array, outputs), strict=False):
            value = found[tensor.name].detach().numpy()
            if value.shape != expected.shape:
                return f"{value.shape} instead of {expected.shape}"
            if not np.allclose(value.astype(np.float64), expected.astype(np.float64), max(case.rtol, 1e-3), 1e-5, equal_nan=True):
                return "other values"
    return ""


@pytest.mark.parametrize("expanded, least", [(False, 850), pytest.param(True, 350, marks=pytest.mark.slow)])
def test_node_cases(expanded: bool, least: int) -> None:
    """All in one test, since collecting them takes as long as running them; expanded ones spell an operator out in others."""
    wrong, counted = [], 0
    for name, case in cases().items():
        if ("expanded" in name) != expanded or any(re.search(pattern, name) for pattern in OTHER):
            continue
        try:
            problem = unlike(case)
        except Exception as error:  # the list of all of them is the point
            problem = str(error)
        counted += 1
        wrong += [f"{name}: {problem}"] if problem else []
    assert not wrong, "\n".join(wrong)
    assert counted > least


def test_every_exception_is_needed() -> None:
    for pattern in OTHER:
        assert any(re.search(pattern, name) for name in cases()), pattern


# ------------------------------------------------------------------ the zoo


def worst(model: onnx.ModelProto) -> float:
    analysis = spa.analyze(model)
    feeds = draw(analysis.groups.traced)
    with torch.no_grad():
        found = TorchGraph(analysis.normal.model.graph).run(feeds)
    return max(difference(n, v, found[n].numpy()).relative for n, v in run(analysis.normal.model, feeds).items())


@pytest.mark.slow
@pytest.mark.parametrize("path", ZOO, ids=lambda p: p.name.removesuffix(".onnx.xz"))
def test_the_zoo(path: Path) -> None:
    assert worst(weightless.load(path)) < 1e-3


@pytest.mark.parametrize("name", ["gpt2.script", "recurrent.script", "mobilenetv3.dynamo", "unet.dynamo"])
def test_some_of_the_zoo(name: str) -> None:
    assert worst(weightless.load(ZOO[0].parent / f"{name}.onnx.xz")) < 1e-4


# ------------------------------------------------------------------ gradients against differences of ONNX Runtime


GRADIENTS = {
    "conv": (
        "float[2,4,7,7] x -> float[2,6,4,4] y",
        "y = Conv<group=2, strides=[2,2], pads=[1,1,1,1]>(x, w, b)",
        {"w": (6, 2, 3, 3), "b": (6,)},
    ),
    "conv_transpose": (
        "float[2,4,5,5] x -> float[2,6,9,9] y",
        "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1]>(x, w)",
        {"w": (4, 6, 3, 3)},
    ),
    "gemm": ("float[3,5] x -> float[3,4] y", "y = Gemm<transB=1, alpha=0.5>(x, w, b)", {"w": (4, 5), "b": (4,)}),
    "norms": (
        "float[2,6,5] x -> float[2,6,5] y",
        "a = LayerNormalization(x, s, b) y = InstanceNormalization(a, t, c)",
        {"s": (5,), "b": (5,), "t": (6,), "c": (6,)},
    ),
    "batch": (
        "float[2,6,5] x -> float[2,6,5] y",
        "y = BatchNormalization(x, s, b, m, v)",
        {"s": (6,), "b": (6,), "m": (6,), "v": np.linspace(0.5, 2, 6).astype(np.float32)},
    ),
    "attention": (
        "float[2,4,6] x -> float[2,4,6] y",
        "q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, q)",
        {"wq": (6, 6), "wk": (6, 6)},
    ),
    "activations": (
        "float[3,5] x -> float[3,5] y",
        "a = Mul(x, w) b = Gelu(a) c = Sigmoid(b) d = HardSwish(c) e = Erf(d) f = Softplus(e) y = PRelu(f, w)",
        {"w": (5,)},
    ),
    "layout": (
        "float[2,6,4] x -> float[2,3,6] y",
        "a = Gather<axis=1>(w, i) b = Reshape(a, r) c = Concat<axis=1>(b, x) d = Slice(c, b0, e0, ax, st) p = Pad(d, pads)"
        " q = Transpose<perm=[0,2,1]>(p) y = Slice(q, b0, three, ax)",
        {
            "w": (2, 6, 2),
            "i": ints(1, 1, 4, 0),
            "r": ints(2, 2, 4),
            "b0": ints(0),
            "e0": ints(8),
            "ax": ints(1),
            "st": ints(2),
            "pads": ints(0, 1, 0, 0, 1, 0),
            "three": ints(3),
        },
    ),
    "pools": (
        "float[2,3,9,9] x -> float[2,3,3,3] y",
        "a = Mul(x, w) b = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, pads=[1,1,1,1]>(a)"
        " y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(b)",
        {"w": (3, 1, 1)},
    ),
    "reductions": (
        "float[3,4,5] x -> float[3,1] y",
        "a = Mul(x, w) b = ReduceL2<keepdims=0>(a, last) c = ReduceLogSumExp(b, one) y = Exp(c)",
        {"w": (4, 5), "last": ints(2), "one": ints(1)},
    ),
    "lstm": ("float[5,2,3] x -> float[5,1,2,4] y", "y = LSTM<hidden_size=4>(x, w, r, b)", {"w": (1, 16, 3), "r": (1, 16, 4), "b": (1, 32)}),
    "gru": (
        "float[5,2,3] x -> float[5,2,2,4] y",
        'y = GRU<hidden_size=4, linear_before_reset=1, direction="bidirectional">(x, w, r, b)',
        {"w": (2, 12, 3), "r": (2, 12, 4), "b": (2, 24)},
    ),
    "resize": (
        "float[1,2,5,5] x -> float[1,2,8,8] y",
        'a = Mul(x, w) y = Resize<mode="cubic">(a, , , sizes)',
        {"w": (2, 1, 1), "sizes": ints(1, 2, 8, 8)},
    ),
}


def perturbed(model: onnx.ModelProto, changes: dict[str, np.ndarray], step: float) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in changes:
            value = numpy_helper.to_array(tensor) + step * changes[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    return copy


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_onnx_runtime(name: str) -> None:
    """Of a random sum of the outputs, in a random direction of all weights; float32, so a step of 1e-2 and a difference of order 4."""
    values, body, weights = GRADIENTS[name]
    model = net(values, body, opset=20, ir=9, **weights)
    rng = np.random.default_rng(0)
    loaded = store.load(model)
    network = TorchGraph(loaded.graph, dtype=torch.float64)
    feeds = {"x": rng.standard_normal([int(n) for n in re.findall(r"\d+", values.split("]")[0])]).astype(np.float32)}
    directions = {n: rng.standard_normal(tuple(p.shape)) for n, p in network.parameters.items()}
    y = network.run(feeds)["y"]
    mix = rng.standard_normal(tuple(y.shape))
    (y * torch.from_numpy(mix)).sum().backward()
    found = sum(float((p.grad * torch.from_numpy(directions[n])).sum()) for n, p in network.parameters.items())

    def value(step: float) -> float:
        result = run(store.load(perturbed(model, directions, step)), feeds)["y"].astype(np.float64)
        return float((result * mix).sum())

    h = 1e-2
    expected = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert found == pytest.approx(expected, rel=3e-3, abs=3e-3)


# ------------------------------------------------------------------ the executor itself


def graph_of(values: str, body: str, **weights: Any) -> Any:
    return store.load(net(values, body, **weights)).graph


def test_parameters_taps_and_replacements() -> None:
    graph = graph_of("float[2,3] x -> float[2,4] y", "a = MatMul(x, w) c = Constant<value=float {2.0}>() y = Mul(a, c)", w=(3, 4))
    network = TorchGraph(graph)
    assert set(network.parameters) == {"w", "c"}
    x = np.ones((2, 3), np.float32)
    found = network.run({"x": x, "other": x}, ["a", "w", "x"])
    assert list(found) == ["y", "a", "w", "x"]
    assert torch.equal(found["y"], found["a"] * 2)
    assert torch.equal(network.run({"x": x}, parameters={"w": torch.zeros(3, 4)})["y"], torch.zeros(2, 4))


def test_half_precision_is_float32() -> None:
    graph = graph_of("float16[2,3] x -> float16[2,4] y", "y = MatMul(x, w)", w=np.ones((3, 4), np.float16))
    network = TorchGraph(graph)
    assert network.parameters["w"].dtype == torch.float32
    assert network.run({"x": np.ones((2, 3), np.float16)})["y"].dtype == torch.float32


def test_bodies() -> None:
    branches = "then_branch = g1 () => (float[2] t) { t = Mul(a, w) }, else_branch = g2 () => (float[2] e) { e = Neg(x) }"
    body = f"a = Mul(x, w) y = If (c) <{branches}>"
    network = TorchGraph(graph_of("float[2] x, bool c -> float[2] y", body, w=np.array([3, 5], np.float32)))
    x = np.array([1, 2], np.float32)
    assert torch.equal(network.run({"x": x, "c": np.array(False)})["y"], torch.tensor([-1.0, -2.0]))
    network.run({"x": x, "c": np.array(True)})["y"].sum().backward()
    assert torch.equal(network.parameters["w"].grad, torch.tensor([6.0, 20.0]))  # 2 x w


def test_quantisation_goes_straight_through() -> None:
    body = "a = Mul(x, w) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z)"
    graph = graph_of("float[4] x -> float[4] y", body, w=np.ones(1, np.float32), s=np.float32(0.1), z=np.uint8(10))
    network = TorchGraph(graph)
    y = network.run({"x": np.array([0.52, 0.31, -5, 90], np.float32)})["y"]
    assert y.detach().numpy() == pytest.approx([0.5, 0.3, -1.0, 24.5], abs=1e-6)
    y.sum().backward()
    assert float(network.parameters["w"].grad) == pytest.approx(0.83, abs=1e-6)  # those beyond the range have no gradient


def test_what_is_refused_is_said_in_one_sentence() -> None:
    with pytest.raises(UnsupportedModel, match=r"Node 'y' is a NonMaxSuppression, .* choose a criterion that needs no gradients"):
        TorchGraph(graph_of("float[1,2,4] b, float[1,1,2] s -> int64[n,3] y", "y = NonMaxSuppression(b, s)"))
    with pytest.raises(UnsupportedModel, match=r"does not run in torch"):
        TorchGraph(graph_of("float[2,3] x -> float[n,m] y", "y = MatMul(x, w)", w=(4, 4))).run({"x": np.ones((2, 3), np.float32)})
    with pytest.raises(BadOption, match="has no feed"):
        TorchGraph(graph_of("float[2] x -> float[2] y", "y = Relu(x)")).run({})
    with pytest.raises(BadOption, match="no value 'nothing'"):
        TorchGraph(graph_of("float[2] x -> float[2] y", "y = Relu(x)")).run({"x": np.ones(2, np.float32)}, ["nothing"])


def test_torch_is_imported_late_and_missed_politely() -> None:
    code = (
        "import sys, onnx; sys.modules['torch'] = None\n"
        "from spa.storage import store; from spa.statistics.torch_graph import TorchGraph; from spa.errors import SpaError\n"
        "import spa.statistics.gradients\n"
        "model = onnx.parser.parse_model('<ir_version: 8, opset_import: [\"\" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }')\n"
        "try: TorchGraph(store.load(model).graph)\n"
        "except SpaError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "pip install 'spa-prune[torch]'" in found.stdout
    assert found.stdout.count("\n") == 1
