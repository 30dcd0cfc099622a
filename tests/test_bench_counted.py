"""What stands beside the clock: layouts, padded multiplications, profiles by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bench_cases import (
    X,
    blocked,
    convnet,
    fakes,  # noqa: F401
    named,
)
from test_trace import net

import spa
from spa.budgets.layout_proxy import Proxy, layout_of, padded_macs, proxy
from spa.errors import BadOption
from spa.plans.plan import mask_of
from spa.tables import race_report
from spa.timing.profiling import parsed, profiles

# ---------------------------------------------------------------------- counted beside the clock


@blocked
def test_a_width_that_4_does_not_divide_leaves_the_blocks() -> None:
    whole, odd = (layout_of(spa.load(convnet(w))) for w in (64, 63))
    assert (whole.convolutions, whole.blocked_convolutions) == (3, 3)
    assert (odd.convolutions, odd.blocked_convolutions) == (3, 1)  # the one that reads the picture stays
    assert whole.blocked > odd.blocked
    assert whole.reorders >= 1
    assert whole.nodes >= whole.blocked + whole.reorders


def test_padded_macs_of_convolutions() -> None:
    def counted(width: int, group: int = 1) -> tuple[int, int]:
        return padded_macs(spa.analyze(convnet(width, group=group)).groups, 16)

    pixels = 64 * 9
    for width, up in ((64, 64), (63, 64), (65, 80)):
        exact = pixels * (3 * width + 2 * width * width) + 10 * width
        assert counted(width) == (exact, pixels * (3 * up + 2 * up * up) + 16 * up)  # 10 classes count as 16, the picture's 3 as 3
    width, up = 40, 48
    depthwise = pixels * (3 * width + width + width * width) + 10 * width
    assert counted(width, group=width) == (depthwise, pixels * (3 * up + up + up * up) + 16 * up)
    grouped = pixels * (3 * width + width * 5 + width * width) + 10 * width  # 8 groups of 5: (g c) and (g o) are both 40 wide
    assert counted(width, group=8) == (grouped, pixels * (3 * up + width * 5 * 48 * 48 // 1600 + up * up) + 16 * up)


def test_padded_macs_of_products() -> None:
    body = "q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose <perm=[0,2,1]> (k) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, q)"
    groups = spa.analyze(net("float[1,5,12] x -> float[1,5,20] y", body, wq=(12, 20), wk=(12, 20))).groups
    products = 5 * 5 * 20 * 2  # of two activations: as they are
    assert padded_macs(groups, 16) == (5 * 12 * 20 * 2 + products, 5 * 12 * 32 * 2 + products)  # what is given is 12 wide
    assert padded_macs(groups, 1)[0] == padded_macs(groups, 1)[1]
    many = spa.analyze(net("float[3,5,12] x -> float[3,5,20] y", "r = Relu(x) y = MatMul(r, w)", w=(3, 12, 20))).groups
    assert padded_macs(many, 16) == (3 * 5 * 12 * 20, 3 * 5 * 16 * 32)  # three products, each of them padded, not 16 products


def test_padded_macs_of_recurrence() -> None:
    model = net("float[7,1,6] x -> float[7,1,1,20] y", "y = LSTM <hidden_size=20> (x, w, r)", w=(1, 80, 6), r=(1, 80, 20))
    assert padded_macs(spa.analyze(model).groups, 16) == (7 * 4 * (20 * 6 + 20 * 20), 7 * 4 * (32 * 6 + 32 * 32))


def test_macs_of_a_removal_are_those_of_the_pruned_model() -> None:
    result = spa.prune(convnet(64), 0.3, multiple_of=1)
    groups = result.analysis.groups
    exact, padded = padded_macs(groups, 16, mask_of(result.plan, groups))
    assert exact == result.after.macs
    assert (exact, padded) == padded_macs(spa.analyze(result.model).groups, 16)
    assert padded > exact


def test_the_layout_is_counted_where_it_matters() -> None:
    model = spa.load(convnet(64))
    groups = spa.analyze(model).groups
    assert proxy(model, groups, 32, layout=False) == Proxy(*padded_macs(groups, 32), 32, None)
    assert proxy(model, groups, 16).layout is not None


# ---------------------------------------------------------------------- profiles


def event(name: str, op: str, microseconds: int, provider: str = "CPUExecutionProvider") -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": op, "provider": provider}}


def test_profiles_are_read() -> None:
    run = {"cat": "Session", "name": "model_run", "dur": 9, "args": {}}
    graph = spa.load(convnet(8)).graph
    lap = [event("ReorderInput", "ReorderInput", 1), event("r_nchwc", "Conv", 10), event("b", "FusedConv", 20),
           event("ReorderOutput_token_7", "ReorderOutput", 2), event("ReorderOutput", "ReorderOutput", 3), event("X_0", "X", 4, "Other")]
    cold = [event("r_nchwc", "Conv", 1000), run]
    warm = [*lap, run, *lap[:1], event("r_nchwc", "Conv", 30), run]
    found = parsed("m", graph, [{"cat": "Session", "name": "load", "dur": 1}, *cold * 3, *warm])
    assert found.runs == 2
    keys = {n.key: (n.op, n.provider, n.blocked, round(1e6 * n.seconds, 1)) for n in found.nodes}
    assert keys == {
        "ReorderInput (added by the runtime)": ("ReorderInput", "CPUExecutionProvider", False, 1.0),
        "a": ("Conv", "CPUExecutionProvider", True, 20.0),  # it is named after its ReLU, r
        "b": ("FusedConv", "CPUExecutionProvider", False, 10.0),
        "ReorderOutput (added by the runtime)": ("ReorderOutput", "CPUExecutionProvider", False, 2.5),
        "X_0": ("X", "Other", False, 2.0),
    }
    assert found.total == pytest.approx(35.5e-6)
    assert found.by_op()["Conv"] == pytest.approx(20e-6)


def test_profile_of_a_real_run() -> None:
    made = convnet(64)
    for node in made.graph.node:
        node.name = f"/{node.op_type} of {node.output[0]}"
    dense, small = spa.load(made), spa.prune(made, 0.5).model
    before, after = profiles({"dense": dense, "small": small}, {"x": np.ones((1, 3, 8, 8), np.float32)}, runs=3)
    for profile in (before, after):
        assert profile.runs == 3
        assert {"a", "b", "c", "y"} <= set(profile.by_key())
        assert profile.by_key()["a"].node == "/Conv of a"
        assert {n.provider for n in profile.nodes} == {"CPUExecutionProvider"}
        assert {"Conv", "MatMul"} <= set(profile.by_op()) or "Gemm" in profile.by_op()
        assert 0 < profile.total == pytest.approx(sum(profile.by_op().values()))
    found = race_report.changes(before, after)
    assert [abs(c["change"]) for c in found] == sorted((abs(c["change"]) for c in found), reverse=True)
    assert {c["node"] for c in found} >= {"/Conv of a", "/Conv of b", "/Conv of c", "/MatMul of y"}


def test_an_engine_without_profile_says_so() -> None:
    with pytest.raises(BadOption, match="fake writes no profile"):
        profiles({"A": named("a")}, X, engine="fake")
