"""Counts by hand, and counts of a selection against counts of the graph that is left of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from test_groups import attention, grouped_queries
from test_trace import groups_of, ints, net

import spa
from spa.graph.count import Counts
from spa.plans.plan import mask_of


def counts(model: onnx.ModelProto) -> Counts:
    return spa.count(groups_of(model))


LSTM = "o, h, c = LSTM<hidden_size=8>(x, w, r, b) s = Squeeze(o, one) y = MatMul(s, w2)"
CASES: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    "Conv": ("float[2,3,8,8] x -> float[2,6,4,4] y", "y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w, b)", {"w": (6, 3, 3, 3), "b": (6,)},
             2 * 6 * 4 * 4 * 3 * 9, 6 * 27 + 6),
    "grouped Conv": ("float[2,8,5,5] x -> float[2,12,5,5] y", "y = Conv<group=4>(x, w)", {"w": (12, 2, 1, 1)}, 2 * 12 * 25 * 2, 24),
    "depthwise Conv": ("float[2,8,5,5] x -> float[2,8,3,3] y", "y = Conv<group=8>(x, w)", {"w": (8, 1, 3, 3)}, 2 * 8 * 9 * 9, 72),
    "ConvTranspose": ("float[2,3,4,4] x -> float[2,6,8,8] y", "y = ConvTranspose<strides=[2,2]>(x, w)", {"w": (3, 6, 2, 2)},
                      2 * 3 * 16 * 6 * 4, 72),
    "grouped ConvTranspose": ("float[2,4,4,4] x -> float[2,6,4,4] y", "y = ConvTranspose<group=2>(x, w)", {"w": (4, 3, 1, 1)},
                              2 * 4 * 16 * 3, 12),
    "MatMul": ("float[2,7,4] x -> float[2,7,5] y", "y = MatMul(x, w)", {"w": (4, 5)}, 2 * 7 * 4 * 5, 20),
    "MatMul of batches": ("float[3,7,4] x, float[3,4,5] z -> float[3,7,5] y", "y = MatMul(x, z)", {}, 3 * 7 * 4 * 5, 0),
    "MatMul of a vector": ("float[7,4] x -> float[7] y", "y = MatMul(x, w)", {"w": (4,)}, 7 * 4, 4),
    "Gemm": ("float[2,4] x -> float[2,5] y", "y = Gemm<transB=1>(x, w, b)", {"w": (5, 4), "b": (5,)}, 2 * 4 * 5, 25),
    "Gemm, transposed": ("float[4,2] x -> float[2,5] y", "y = Gemm<transA=1>(x, w)", {"w": (4, 5)}, 2 * 4 * 5, 20),
    "LSTM": ("float[6,2,4] x -> float[6,2,5] y", LSTM, {"w": (1, 32, 4), "r": (1, 32, 8), "b": (1, 64), "one": ints(1), "w2": (8, 5)},
             6 * 2 * 4 * 8 * (4 + 8) + 6 * 2 * 8 * 5, 32 * 4 + 32 * 8 + 64 + 40),
    "Einsum": ("float[2,7,4] x -> float[2,7,5] y", 'y = Einsum<equation="btk,kn->btn">(x, w)', {"w": (4, 5)}, 2 * 7 * 4 * 5, 20),
    "no products": ("float[2,4] x -> float[2,4] y", "a = Add(x, w) y = Relu(a)", {"w": (4,)}, 0, 4),
    "a free batch": ("float[n,4] x -> float[n,5] y", "y = MatMul(x, w)", {"w": (4, 5)}, 4 * 5, 20),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case: str) -> None:
    values, body, weights, macs, parameters = CASES[case]
    found = counts(net(values, body, **weights))
    assert (found.macs, found.parameters) == (macs, parameters)
    whole = sum(8 * w.size for w in weights.values() if isinstance(w, np.ndarray))
    assert found.weight_bytes == 4 * parameters + whole


CHAIN = ("float[2,3,8,8] x -> float[2,5] y", "a = Conv(x, w1) r = Relu(a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) f = Flatten(p)"
         " y = Gemm<transB=1>(f, w2)", {"w1": (10, 3, 1, 1), "w2": (5, 160)})


def test_peak_of_a_chain() -> None:
    """Input and result of a node live together: a and r are the largest pair."""
    assert counts(net(*CHAIN[:2], **CHAIN[2])).peak_bytes == 4 * 2 * 64 * (10 + 10)


def test_peak_of_a_branch() -> None:
    """The input of a residual lives until it is added: x, a and b at Relu; then a goes."""
    body = "a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) y = Add(x, c)"
    found = counts(net("float[1,4,2,2] x -> float[1,4,2,2] y", body, w1=(6, 4, 1, 1), w2=(4, 6, 1, 1)))
    assert found.peak_bytes == 4 * 4 * (4 + 6 + 6)


def test_outputs_live_to_the_end() -> None:
    body = "y = Relu(x) a = MatMul(x, w1) b = Relu(a) z = MatMul(b, w2)"
    found = counts(net("float[1,4] x -> float[1,4] y, float[1,2] z", body, w1=(4, 8), w2=(8, 2)))
    assert found.peak_bytes == 4 * (4 + 8 + 8)


def test_peak_is_that_of_one_sample_and_of_its_type() -> None:
    assert counts(net("float[n,4] x -> float[n,4] y", "y = Relu(x)")).peak_bytes == 4 * 8
    assert counts(net("float16[3,4] x -> float16[3,4] y", "y = Relu(x)")).peak_bytes == 2 * 24


MODELS = {
    "chain": lambda: net(*CHAIN[:2], **CHAIN[2]),
    "attention": attention,
    "grouped queries": grouped_queries,
    **{case: (lambda c=case: net(*CASES[c][:2], **CASES[c][2])) for case in ("LSTM",)},
    "grouped": lambda: net("float[n,3,4,4] x -> float[n,5,4,4] y", "a = Conv(x, w1) b = Conv<group=2>(a, w2) c = Conv<group=12>(b, w3)"
                           " d = ConvTranspose<group=3>(c, w4) y = Conv(d, w5)", w1=(8, 3, 1, 1), w2=(12, 4, 1, 1), w3=(12, 1, 1, 1),
                           w4=(12, 2, 1, 1), w5=(5, 6, 1, 1)),
}


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", MODELS)
def test_a_selection_counts_as_the_graph_that_is_left(name: str, ratio: float) -> None:
    model = MODELS[name]()
    result = spa.prune(model, ratio, multiple_of=1)
    assert result.before == counts(model)
    assert result.after == counts(result.to_proto())
    assert result.after.macs < result.before.macs
    assert result.after.parameters < result.before.parameters
    assert result.after.peak_bytes <= result.before.peak_bytes
    assert result.after.weight_bytes < result.before.weight_bytes


def test_what_a_channel_costs_adds_up() -> None:
    """One channel less costs as much less as the group says."""
    model = MODELS["chain"]()
    groups = groups_of(model)
    plan = spa.plan(model, 0.1, multiple_of=1)
    gone = mask_of(plan, groups)
    assert gone.sum() == 1
    group = groups.by_name["w1:0"]
    dense, small = spa.count(groups), spa.count(groups, gone)
    assert dense.macs - small.macs == group.macs
    assert dense.parameters - small.parameters == group.parameters
