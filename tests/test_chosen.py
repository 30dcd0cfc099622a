"""Positions that a network chooses itself: experts that a router picks go with what they are picked from, and nothing else is let go."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from repair_cases import drawn, outputs_of, weights_of
from test_trace import groups_of, ints, net

import spa
from spa.errors import NothingToPrune
from spa.storage.store import to_proto

Array = np.ndarray
E, D, N, K = 6, 8, 12, 2

PICKED = """l = MatMul(x, wr) p = Softmax<axis=-1>(l) g, i = TopK(p, k) f = Reshape(i, flat) at = Unsqueeze(f, one)
  u = GatherND(w1, at) d = GatherND(w2, at) e = Unsqueeze(x, one) t = Expand(e, twice) r = Reshape(t, rows) c = Unsqueeze(r, two)
  h = MatMul(u, c) a = Relu(h) o = MatMul(d, a) s = Squeeze(o, two) b = Reshape(s, slots) v = Unsqueeze(g, two) w = Mul(b, v)
  m = ReduceSum<keepdims=0>(w, one) y = Add(x, m)"""
SPREAD = """l = MatMul(x, wr) g, i = TopK(l, k) q = Softmax<axis=-1>(g) z = Mul(l, zero) p = ScatterElements<axis=1>(z, i, q)
  h = MatMul(x, w1) a = Relu(h) o = MatMul(a, w2) t = Transpose<perm=[1,0]>(p) v = Unsqueeze(t, two) w = Mul(o, v)
  m = ReduceSum<keepdims=0>(w, nil) y = Add(x, m)"""
SHAPES = {"one": ints(1), "two": ints(2), "nil": ints(0), "flat": ints(-1), "twice": ints(1, K, 1), "rows": ints(-1, D),
          "slots": ints(-1, K, D), "k": ints(K), "zero": np.zeros(1, np.float32)}  # fmt: skip


def picked(**weights: Any) -> onnx.ModelProto:
    """Weights of the chosen experts are gathered for each token, as torch.onnx exports the mixtures of transformers."""
    given = {"wr": (D, E), "w1": (E, N, D), "w2": (E, D, N), **weights}
    return net(f"float[n,{D}] x -> float[n,{D}] y", PICKED, **given, **{n: v for n, v in SHAPES.items() if f"{n})" in PICKED})


def spread(**weights: Any) -> onnx.ModelProto:
    """All experts compute all tokens, and the gates of those that were not chosen are zero."""
    given = {"wr": (D, E), "w1": (E, D, N), "w2": (E, N, D), **weights}
    used = {n: v for n, v in SHAPES.items() if f"{n})" in SPREAD}
    return net(f"float[n,{D}] x -> float[n,{D}] y", SPREAD, opset=18, **given, **used)


def routed(x: Array, w: dict[str, Array], model: onnx.ModelProto) -> tuple[Array, Array]:
    """(tokens, experts) gates, zero where an expert was not chosen, and (tokens, experts, D) what each expert gives."""
    logits = x @ w["wr"]
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=1)[:, :K]
    gates = np.zeros_like(scores)
    np.put_along_axis(gates, chosen, np.take_along_axis(scores, chosen, 1), 1)
    if "ScatterElements" in {n.op_type for n in model.graph.node}:  # the softmax runs over the chosen ones
        gates /= gates.sum(-1, keepdims=True)
        hidden = np.maximum(np.einsum("md,edn->men", x, w["w1"]), 0)
        return gates, np.einsum("men,end->med", hidden, w["w2"])
    hidden = np.maximum(np.einsum("md,end->men", x, w["w1"]), 0)
    return gates, np.einsum("men,edn->med", hidden, w["w2"])


X = drawn((40, D), 3)


@pytest.mark.parametrize("make", [picked, spread])
def test_experts_go_with_their_router(make: Any) -> None:
    model = make()
    groups = spa.analyze(model).groups
    expert = next(g for g in groups.free() if g.kind == "expert")
    assert expert.size == E
    assert {"expert-neuron", "expert"} == {g.kind for g in groups.free()}
    result = spa.prune(model, 0.5, multiple_of=1, units=["expert"])
    kept = result.plan.groups[expert.name]["kept"]
    assert len(kept) == 3
    w = {n: v.astype(np.float64) for n, v in weights_of(model).items()}
    small = {**w, "wr": w["wr"][:, kept], "w1": w["w1"][kept], "w2": w["w2"][kept]}
    gates, given = routed(X.astype(np.float64), small, model)
    expected = X + np.einsum("me,med->md", gates, given)
    found = outputs_of(to_proto(result.model), [{"x": X}])[0]["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_at_least_as_many_experts_stay_as_are_chosen() -> None:
    result = spa.prune(picked(), 0.99, multiple_of=1, units=["expert"])
    assert [len(g["kept"]) for g in result.plan.groups.values()] == [K]


def test_both_experts_and_their_neurons_go() -> None:
    result = spa.prune(picked(), 0.5, multiple_of=1)
    assert result.check is not None
    shapes = {t.name: tuple(t.shape) for n in result.model.graph.nodes for t in n.inputs if t.name in ("wr", "w1", "w2")}
    assert shapes == {"wr": (D, E // 2), "w1": (E // 2, N // 2, D), "w2": (E // 2, D, N // 2)}


def test_the_nearest_of_a_codebook() -> None:
    body = """n = MatMul(x, codes) i = ArgMax<axis=1, keepdims=0>(n) y = Gather(table, i)"""
    model = net("float[n,4] x -> float[n,5] y", body, codes=(4, 10), table=(10, 5))
    result = spa.prune(model, 0.5, multiple_of=1)
    kept = result.plan.groups["codes:1"]["kept"]
    w = weights_of(model)
    x = drawn((9, 4), 1)
    expected = w["table"][kept][(x @ w["codes"][:, kept]).argmax(1)]
    np.testing.assert_allclose(outputs_of(to_proto(result.model), [{"x": x}])[0]["y"], expected)


READ = {
    "an output": ("float[n,4] x -> int64[n] i, float[n,5] y", "y = Gather(table, i)", "read by output i"),
    "arithmetic": ("float[n,4] x -> float[n,5] y", "j = Add(i, none) y = Gather(table, j)", "read by Add j"),
    "a part": ("float[n,4] x -> float[n,5] y, float[n] z",
               "j = Unsqueeze(i, axis) d = Concat<axis=1>(j, j) y = Gather(table, i) s = Cast<to=1>(d) z = ReduceSum<keepdims=0>(s, axis)",
               "read by Concat d"),
    "another table of more": ("float[n,4] x -> float[n,5] y, float[n,3] z", "y = Gather(table, i) z = Gather(o, i)", None),
    "a table that stays": ("float[n,4] x, float[10,3] o -> float[n,5] y, float[n,3] z", "y = Gather(table, i) z = Gather(o, i)",
                           "is an input of the graph"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_positions_that_anything_else_reads_keep_their_axis_whole(case: str) -> None:
    values, body, says = READ[case]
    body = f"h = MatMul(x, codes) i = ArgMax<axis=1, keepdims=0>(h) {body}"
    stored = {"none": np.array(0), "axis": ints(1), "o": (10, 3)}
    extra = {n: v for n, v in stored.items() if (f"{n})" in body or f"({n}," in body) and f" {n} ->" not in values}
    model = net(values, body, codes=(4, 10), table=(10, 5), **extra)
    if says is None:
        result = spa.prune(model, 0.5, multiple_of=1)
        assert {t.name: tuple(t.shape) for n in result.model.graph.nodes for t in n.inputs if t.name in extra} == {"o": (5, 3)}
        return
    frozen = groups_of(model).by_name["codes:1"].frozen
    assert frozen is not None
    assert says in str(frozen)
    with pytest.raises(NothingToPrune):
        spa.prune(model, 0.5, multiple_of=1)


def test_parts_of_positions_are_followed() -> None:
    body = """h = MatMul(x, codes) v, i = TopK(h, k) a, b = Split<axis=1>(i, parts) q = Squeeze(b, one) y = Gather(table, q)
      f = Squeeze(a, one) c = Cast<to=1>(f)"""
    model = net("float[n,4] x -> float[n,5] y, float[n] c", body, codes=(4, 10), table=(10, 5), k=ints(2), one=ints(1), parts=ints(1, 1))
    assert "read by output c" in str(groups_of(model).by_name["codes:1"].frozen)


def test_no_stat_leaves_choices_whole() -> None:
    assert spa.analyze(picked(), stat=False).groups.by_name["wr:1"].frozen is not None
