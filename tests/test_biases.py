"""Biases that are inserted: zeros keep the function, others add to it, and names survive."""

from __future__ import annotations

import numpy as np
import onnx
from test_trace import ints, net

import spa
from passes import insert_biases
from spa.plans.rewrite import copy_graph
from spa.storage.store import to_proto, with_graph

BODY = "a = Conv(x, w1) r = Relu(a) f = Flatten(r) h = MatMul(f, w2) g = Gemm(h, w3) y = Relu(g)"


def model() -> onnx.ModelProto:
    return net("float[2,3,4,4] x -> float[2,5] y, float[2,6] h", BODY, w1=(8, 3, 1, 1), w2=(128, 6), w3=(6, 5))


def inserted(given: onnx.ModelProto, biases: dict[str, tuple[int | None, np.ndarray]]) -> tuple[onnx.ModelProto, int]:
    loaded = spa.load(given)
    graph = copy_graph(loaded.graph)
    added = insert_biases(graph, biases)
    return to_proto(with_graph(loaded, graph)), added


def ran(given: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    return spa.proof.check.run(spa.load(given), {"x": x})


X = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)


def test_zeros_change_nothing_but_the_graph() -> None:
    zeros = {"a": (2, np.zeros(8, np.float32)), "h": (None, np.zeros(6, np.float32)), "g": (2, np.zeros(5, np.float32))}
    small, added = inserted(model(), zeros)
    assert added == 3
    onnx.checker.check_model(small, full_check=True)
    before, after = ran(model(), X), ran(small, X)
    assert all((before[n] == after[n]).all() for n in before)
    assert [(n.op_type, list(n.output)) for n in small.graph.node] == [
        ("Conv", ["a"]), ("Relu", ["r"]), ("Flatten", ["f"]), ("MatMul", ["h/unbiased"]), ("Add", ["h"]), ("Gemm", ["g"]), ("Relu", ["y"]),
    ]
    assert {t.name for t in small.graph.initializer} == {"w1", "w2", "w3", "a/bias", "h/bias", "g/bias"}


def test_what_is_added() -> None:
    rng = np.random.default_rng(1)
    b = rng.standard_normal(6).astype(np.float32)
    small, _ = inserted(model(), {"h": (None, b)})
    np.testing.assert_allclose(ran(small, X)["h"], ran(model(), X)["h"] + b, atol=1e-6)
    c = rng.standard_normal(8).astype(np.float32)
    plain = net("float[2,3,4,4] x -> float[2,8,4,4] y", "y = Conv(x, w1)", w1=(8, 3, 1, 1))
    small, _ = inserted(plain, {"y": (2, c)})
    np.testing.assert_allclose(ran(small, X)["y"], ran(plain, X)["y"] + c[:, None, None], atol=1e-6)


def test_slots_before_the_bias_are_left_empty() -> None:
    """A recurrent layer's bias comes before its lengths; whoever has neither gets an empty name in between only."""
    plain = net("float[3,2,4] x -> float[1,2,3] y", "o, y = LSTM <hidden_size=3> (x, w, u, , s)", w=(1, 12, 4), u=(1, 12, 3),
                s=ints(3, 2).astype(np.int32))
    small, _ = inserted(plain, {"o": (3, np.zeros((1, 24), np.float32))})
    assert list(small.graph.node[0].input) == ["x", "w", "u", "o/bias", "s"]
    short = net("float[2,4] x -> float[2,5] y", "y = my.Linear(x)")
    small, _ = inserted(short, {"y": (2, np.zeros(5, np.float32))})
    assert list(small.graph.node[0].input) == ["x", "", "y/bias"]


def test_names_that_are_taken() -> None:
    body = 'c = Relu(x) y = MatMul(c, w) z = Add(y, "y/bias")'
    taken = net("float[2,4] x -> float[2,5] y, float[2,5] z", body.replace('"y/bias"', "b"), w=(4, 5), b=(5,))
    for node in taken.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = {"b": "y/bias", "c": "y/unbiased"}.get(name, name)
        for i, name in enumerate(node.output):
            node.output[i] = {"c": "y/unbiased"}.get(name, name)
    taken.graph.initializer[1].name = "y/bias"
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    small, _ = inserted(taken, {"y": (None, np.ones(5, np.float32))})
    assert {t.name for t in small.graph.initializer} == {"w", "y/bias", "y/bias_"}
    assert "y/unbiased_" in small.graph.node[1].output
    np.testing.assert_allclose(ran(small, x)["z"], ran(taken, x)["z"] + 1, atol=1e-6)
    assert len({n.name for n in small.graph.node if n.name}) == len([n for n in small.graph.node if n.name])


def test_nothing_to_add() -> None:
    small, added = inserted(model(), {})
    assert added == 0
    assert small.SerializeToString(deterministic=True) == to_proto(spa.load(model())).SerializeToString(deterministic=True)
    assert inserted(model(), {"nowhere": (None, np.zeros(3, np.float32))})[1] == 0
