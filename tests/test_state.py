"""States: which inputs and outputs a model carries from call to call, and that they shrink together. Home of `cached`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from test_cli import run as command
from test_trace import groups_of, ints, net, reason

import spa
from spa.graph.binding import Binding
from spa.graph.state import State, composed, feeds_for
from spa.proof.feeds import Feeds
from spa.proof.prove import runnable
from spa.storage.store import load

HEADS, WIDTH = 4, 6
PAST = f"float[n,{HEADS},p,{WIDTH}]"
PRESENT = f"float[n,{HEADS},u,{WIDTH}]"
FIXED = f"float[n,{HEADS},9,{WIDTH}]"
SPLIT = "{to}0 = MatMul(x, w{to}) {to}1 = Reshape({to}0, heads) {to} = Transpose<perm=[0,2,1,3]>({to}1)"
GROWN = "present_k = Concat<axis=2>(past_k, k) present_v = Concat<axis=2>(past_v, v)"
MIXED = """kt = Transpose<perm=[0,1,3,2]>(present_k) s = MatMul(q, kt) m = Add(s, mask) p = Softmax(m) o = MatMul(p, present_v)
    t = Transpose<perm=[0,2,1,3]>(o) c = Reshape(t, flat) y = MatMul(c, wo)"""


def cached(grown: str = GROWN, past: str = PAST, present: str = PRESENT, more: str = "", seen: str = "u") -> onnx.ModelProto:
    """One layer of attention over a cache: x (n, s, 16), mask (n, 1, s, u), past keys and values -> y, present ones."""
    body = " ".join([*(SPLIT.format(to=to) for to in "qkv"), grown, MIXED])
    size = HEADS * WIDTH
    return net(
        f"float[n,s,16] x, float[n,1,s,{seen}] mask, {past} past_k, {past} past_v{more} -> "
        f"float[n,s,16] y, {present} present_k, {present} present_v",
        body, wq=(16, size), wk=(16, size), wv=(16, size), wo=(size, 16), heads=ints(0, 0, HEADS, WIDTH), flat=ints(0, 0, -1),
    )  # fmt: skip


def states(model: onnx.ModelProto, **settings: Any) -> tuple[State, ...]:
    return groups_of(model, **settings).traced.states


def shape(model: onnx.ModelProto, name: str) -> list[Any]:
    tensor = next(t for t in (*model.graph.input, *model.graph.output) if t.name == name)
    return [d.dim_value or d.dim_param for d in tensor.type.tensor_type.shape.dim]


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, feeds)), strict=True))


def example(new: int = 3, past: int = 5, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    mask = np.where(np.arange(past + new) <= past + np.arange(new)[:, None], 0, -1e9)
    found: dict[str, Any] = {"x": rng.standard_normal((2, new, 16)), "mask": np.tile(mask, (2, 1, 1, 1))}
    found |= {f"past_{k}": rng.standard_normal((2, HEADS, past, WIDTH)) for k in "kv"}
    return {k: v.astype(np.float32) for k, v in found.items()}


# ---------------------------------------------------------------------- finding


def test_a_cache_is_a_state() -> None:
    assert states(cached()) == (State("past_k", "present_k", 2, (1, 3)), State("past_v", "present_v", 2, (1, 3)))
    groups = groups_of(cached())
    heads = groups.by_name["wq:1"]
    assert heads.frozen is None
    assert heads.size == HEADS
    assert {(v, a) for v in ("past_k", "past_v", "present_k", "present_v") for a in (1,)} <= set(heads.sites)
    widths = {g.name: g for g in groups.free() if ("past_k", 3) in g.sites or ("past_v", 3) in g.sites}
    assert {("past_k", 3) in g.sites: g.size for g in widths.values()} == {True: WIDTH, False: WIDTH}


def test_what_is_not_shared_stays() -> None:
    groups = groups_of(cached())
    assert "is an input of the graph" in reason(groups, "past_k", 0)
    assert "is an input of the graph" in reason(groups, "past_k", 2)
    assert "is an output of the graph" in reason(groups, "y", 2)


def test_states_are_kept_if_asked() -> None:
    groups = groups_of(cached(), keep_state=True)
    assert not groups.traced.states
    assert all("present_k" not in {v for v, _ in g.sites} for g in groups.free())
    assert "is an input of the graph" in reason(groups, "past_k", 1)


@pytest.mark.parametrize(
    ("grown", "past", "present", "more"),
    [
        ("a = Transpose<perm=[0,2,1,3]>(past_k) b = Concat<axis=1>(a, k1) present_k = Transpose<perm=[0,2,1,3]>(b) "
         "present_v = Concat<axis=2>(past_v, v)", PAST, PRESENT, ""),
        ("a = Gather(past_k, beams) b = Gather(past_v, beams) present_k = Concat<axis=2>(a, k) present_v = Concat<axis=2>(b, v)",
         PAST, PRESENT, ", int64[n] beams"),
        ("a = Concat<axis=2>(past_k, k) present_k = Slice(a, low, high, axes) b = Concat<axis=2>(past_v, v) "
         "present_v = Slice(b, low, high, axes)", FIXED, FIXED, ""),
        ("new = Shape(k) at = Expand(places, new) present_k = ScatterElements<axis=2>(past_k, at, k) "
         "present_v = ScatterElements<axis=2>(past_v, at, v)", FIXED, FIXED, ", int64[1,1,s,1] places"),
    ],
    ids=["transposed", "beams", "window", "written"],
)  # fmt: skip
def test_other_ways_to_carry_one(grown: str, past: str, present: str, more: str) -> None:
    model = cached(grown, past, present, more, "u" if past == PAST else "9")
    if "axes" in grown:
        given = {"axes": 2, "low": -9, "high": np.iinfo(np.int64).max}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(ints(n), name) for name, n in given.items())
    found = states(model)
    assert [(s.input, s.output) for s in found] == [("past_k", "present_k"), ("past_v", "present_v")]
    assert all({1, 3} <= set(s.axes) for s in found)
    result = spa.prune(model, 0.5, multiple_of=1, include=["wq:1"])
    assert shape(result.to_proto(), "past_k")[1] == shape(result.to_proto(), "present_v")[1] == 2
    assert result.check is not None
    assert result.check.passed


FUSED = {
    "Attention": (23, 10, "Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, , past_k, past_v)", "p", ""),
    "GroupQueryAttention": (
        17, 8, "com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, past_k, past_v, lens, total)", "9",
        ", int32[2] lens, int32[1] total",
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", FUSED)
def test_fused_operators_carry_states(op: str) -> None:
    opset, ir, node, length, more = FUSED[op]
    past = f"float[2,2,{length},8]"
    present = past if length == "9" else "float[2,2,u,8]"
    body = f"q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) o, present_k, present_v = {node} y = MatMul(o, wo)"
    model = net(f"float[2,1,16] x, {past} past_k, {past} past_v{more} -> float[2,1,16] y, {present} present_k, {present} present_v", body,
                opset, ir, wq=(16, 32), wk=(16, 16), wv=(16, 16), wo=(32, 16))  # fmt: skip
    found = states(model)
    assert [(s.input, s.output) for s in found] == [("past_k", "present_k"), ("past_v", "present_v")]
    assert all({1, 3} <= set(s.axes) for s in found)
    result = spa.prune(model, 0.5, multiple_of=1, include=["kind:key-value"])
    assert {shape(result.to_proto(), n)[1] for n in ("past_k", "past_v", "present_k", "present_v")} == {1}
    assert result.check is not None
    assert result.check.passed


def test_what_comes_back_changed_is_no_state() -> None:
    denoiser = net("float[n,8,t] x -> float[n,8,t] y", "a = Conv(x, w) y = Add(x, a)", w=(8, 8, 1))
    untouched = net("float[n,8,t] x -> float[n,8,t] z, float[n,4,t] y", "y = Conv(x, w) z = Identity(x)", w=(4, 8, 1))
    features = net("float[n,8,t] x -> float[n,12,t] z, float[n,4,t] y", "y = Conv(x, w) z = Concat<axis=1>(x, y)", w=(4, 8, 1))
    for model in (denoiser, untouched, features):
        groups = groups_of(model)
        assert not groups.traced.states
        assert "is an input of the graph" in reason(groups, "x", 1)
        assert not groups.free()


def test_two_outputs_of_one_past() -> None:
    """One of them is the state; the other is an output like any, and holds both."""
    model = cached(GROWN + " twice = Identity(present_k)")
    model.graph.output.append(onnx.helper.make_tensor_value_info("twice", 1, ["n", HEADS, "u", WIDTH]))
    assert ("past_k", 1) not in {s for g in groups_of(model).free() for s in g.sites}


# ---------------------------------------------------------------------- pruning


def halved(**settings: Any) -> spa.Result:
    """Without half of the heads."""
    return spa.prune(cached(), 0.5, multiple_of=1, include=["wq:1"], **settings)


def test_widths_of_keys_and_values_shrink_apart() -> None:
    result = spa.prune(cached(), 0.5, multiple_of=1, ratios={"wq:1": 0, "wv:1": 1 / 3})
    small = result.to_proto()
    assert (shape(small, "past_k"), shape(small, "past_v")) == (["n", HEADS, "p", 3], ["n", HEADS, "p", 4])
    assert shape(small, "present_v") == ["n", HEADS, "u", 4]
    assert result.check is not None
    assert result.check.passed


def test_both_sides_shrink_and_the_proof_holds() -> None:
    result = halved()
    small = result.to_proto()
    assert shape(small, "past_k") == shape(small, "past_v") == ["n", 2, "p", WIDTH]
    assert shape(small, "present_k") == shape(small, "present_v") == ["n", 2, "u", WIDTH]
    assert result.check is not None
    assert {d.output for d in result.check.differences} == {"y", "present_k", "present_v"}
    assert result.check.passed
    assert len(result.plan.removed["past_k"]["1"]) == 2
    assert result.plan.removed["past_k"] == result.plan.removed["present_k"]


def test_a_wrong_slice_of_the_past_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    import spa.plans.cutting

    def other(*args: Any) -> Any:
        return {n: {a: (k + 1) % 4 for a, k in axes.items()} for n, axes in narrowed(*args).items()}

    narrowed = spa.plans.cutting.narrowed_inputs
    monkeypatch.setattr(spa.plans.cutting, "narrowed_inputs", other)
    with pytest.raises(spa.errors.CheckFailed, match="Removing and masking differ"):
        halved()


def test_the_pruned_model_generates_the_same_with_cache_as_without() -> None:
    small = halved().to_proto()
    x = np.random.default_rng(1).standard_normal((1, 7, 16)).astype(np.float32)
    past = {f"past_{k}": np.zeros((1, 2, 0, WIDTH), np.float32) for k in "kv"}
    causal = np.where(np.tril(np.ones((7, 7), bool)), 0, -1e9).astype(np.float32)
    whole = run(small, {"x": x, "mask": causal[None, None], **past})["y"]
    for t in range(7):
        found = run(small, {"x": x[:, t : t + 1], "mask": causal[None, None, t : t + 1, : t + 1], **past})
        past = {f"past_{k}": found[f"present_{k}"] for k in "kv"}
        assert np.allclose(found["y"][:, 0], whole[:, t], atol=1e-6)


def test_inputs_for_the_dense_model_are_cut_for_the_pruned_one() -> None:
    feeds = example()
    result = halved(feeds=feeds)
    assert result.check is not None
    assert result.check.passed
    cut = feeds_for(result.model.narrowed, feeds)
    assert cut["past_k"].shape == (2, 2, 5, WIDTH)
    assert feeds_for(result.model.narrowed, cut)["past_k"] is cut["past_k"]
    assert cut["x"] is feeds["x"]


def test_steps_carry_the_cut_along() -> None:
    data = [example(seed=s) for s in range(4)]
    settings = {"criterion": "activation", "calibration": data, "feeds": example(seed=9), "repair": "obspa"}
    result = spa.prune(cached(), 0.75, multiple_of=1, steps=2, include=["wq:1"], **settings)
    assert shape(result.to_proto(), "past_k")[1] == 1
    kept = np.flatnonzero(~np.isin(np.arange(HEADS), result.plan.removed["past_k"]["1"]))
    assert {a: k.tolist() for a, k in result.model.narrowed["past_k"].items()} == {1: kept.tolist()}


def test_two_cuts_compose() -> None:
    first, second = {"a": {1: ints(0, 2, 3)}}, {"a": {1: ints(1, 2), 2: ints(0)}, "b": {0: ints(4)}}
    found = composed(first, second)
    assert {n: {a: k.tolist() for a, k in axes.items()} for n, axes in found.items()} == {"a": {1: [2, 3], 2: [0]}, "b": {0: [4]}}


def test_quality_is_measured_with_the_past_that_is_left() -> None:
    data = [example(seed=s) for s in range(6)]
    budget = spa.Budget(("params=0.7",), metric="error", repair=spa.RepairOptions("bias"))
    result = spa.prune(cached(), target=budget, multiple_of=1, calibration=data, criterion="obspa")
    dense, pruned = result.plan.options["budget"]["quality"]["error"]
    assert dense == 0 < pruned


def test_no_check_still_looks_at_shapes() -> None:
    assert spa.prune(cached(), 0.5, multiple_of=1, check=False).check is None


def test_a_plan_of_an_older_version_keeps_the_state() -> None:
    model = net("float[n,8] x, float[n,p,6] past -> float[n,u,6] present, float[n,5] y", "a = MatMul(x, w1) y = MatMul(a, w2) "
                "b = MatMul(x, w3) c = Unsqueeze(b, one) present = Concat<axis=1>(past, c)",
                w1=(8, 9), w2=(9, 5), w3=(8, 6), one=ints(1))  # fmt: skip
    plan = spa.plan(model, 0.5, keep_state=True, multiple_of=1)
    assert list(plan.groups) == ["w1:1"]
    older = replace(plan, trace={k: v for k, v in plan.trace.items() if k != "keep_state"})
    assert not spa.api.analyzed_for(model, older).groups.traced.states
    assert spa.api.analyzed_for(model, spa.plan(model, 0.5, multiple_of=1)).groups.traced.states


def test_the_command_line(tmp_path: Path) -> None:
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    onnx.save(cached(), dense)
    np.savez(tmp_path / "feeds.npz", **example())
    plan = tmp_path / "small.plan.json"
    made = command("prune", dense, "-o", small, "--multiple-of", "1", "--feeds", tmp_path / "feeds.npz", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["latency"] is not None
    for more in ((), ("--provider", "cpu"), ("--feeds", tmp_path / "feeds.npz")):
        checked = command("check", dense, small, "--plan", plan, *more)
        assert checked.exit_code == 0, checked.output
    assert command("bench", dense, small, "--rounds", "3").exit_code == 0


# ---------------------------------------------------------------------- sizes that are assumed


def test_masks_cover_the_past_and_what_is_new() -> None:
    body = "w = Gather(table, ids) k0 = Reshape(w, split) k = Transpose<perm=[0,2,1,3]>(k0) present = Concat<axis=2>(past, k) "
    body += "y = Cast<to=1>(mask)"
    inputs = "int64[n,s] ids, int64[n,total] mask, int64[n,s] positions, float[n,2,p,4] past"
    model = net(f"{inputs} -> float[n,2,u,4] present, float[n,total] y", body, table=(9, 8), split=ints(0, 0, 2, 4))
    traced = groups_of(model).traced
    assert traced.facts.feeds == {"ids": (2, 16), "mask": (2, 32), "positions": (2, 16), "past": (2, 2, 16, 4)}
    assert runnable(load(model), traced)["mask"].shape == (2, 32)


def test_sums_in_names() -> None:
    model = net("float[n,p] a, float[n,p] b -> float[n,p] y", "y = Add(a, b)")
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "p + 1"
    bound = Binding(load(model).graph, {})
    assert bound(2, 64, 16) == {"a": (2, 16), "b": (2, 17)}
