"""Layers of models with a cache, and of models whose sums are fused with the norms behind them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from test_depth import zeroed
from test_trace import net

import spa
from models.llama import LlamaConfig, llama_graph
from spa.data.evidence import Evidence
from spa.graph.parting import parted
from spa.layers.ablate import ablate
from spa.layers.depth import Depth, choose_layers, without_layers
from spa.layers.sublayers import sub_layers
from spa.proof.check import run
from spa.proof.prove import runnable


def llama(fused: bool = False, cache: bool = True) -> onnx.ModelProto:
    return llama_graph(LlamaConfig(3, 64, 4, 2, 96, 64, fused=fused, cache=cache))


def name(block: int, kind: str) -> str:
    return f"model.layers.{block}." + ("self_attn.o_proj" if kind == "attention" else "mlp.down_proj")


@pytest.mark.parametrize("fused", [False, True])
def test_the_layers_of_a_cached_model(fused: bool) -> None:
    found = sub_layers(parted(spa.analyze(llama(fused))).groups).layers
    assert [(s.name, s.kind, s.block) for s in found] == [(name(b, k), k, b) for b in range(3) for k in ("attention", "mlp")]
    past = [f"past_key_values.1.{part}" for part in ("key", "value")]
    assert (list(found[2].inputs), list(found[2].outputs)) == (past, [p.replace("past_key_values", "present") for p in past])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chosen", [[(1, "attention")], [(1, "attention"), (1, "mlp")], [(0, "mlp"), (2, "mlp")], [(2, "attention")]])
def test_a_dropped_layer_takes_its_cache_along(fused: bool, chosen: list[tuple[int, str]]) -> None:
    model = llama(fused)
    result = spa.prune(model, drop_layers=Depth([name(*c) for c in chosen]))
    assert result.check is not None
    assert result.check.worst < 1e-5
    attentions = {b for b, k in chosen if k == "attention"}
    left = {f"past_key_values.{b}.{part}" for b in range(3) if b not in attentions for part in ("key", "value")}
    assert {t.name for t in result.model.graph.inputs if t.name.startswith("past")} == left
    assert {t.name for t in result.model.graph.outputs} == {"logits"} | {n.replace("past_key_values", "present") for n in left}
    analysis = spa.analyze(model)
    feeds = runnable(analysis.normal.model, analysis.groups.traced)
    other = zeroed(model, *[f"{name(*c)}.weight" for c in chosen])
    wanted, found = run(spa.load(other), feeds)["logits"], run(result.model, feeds)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    again = spa.apply(model, spa.load_plan(result.plan))
    assert spa.storage.store.to_bytes(again.model) == spa.storage.store.to_bytes(result.model)


def test_a_past_that_is_read_for_its_length_stays() -> None:
    """The unfused model counts past tokens on the first layer's keys."""
    result = spa.prune(llama(), drop_layers=Depth([name(0, "attention")]))
    gone = {t.name for t in spa.load(llama()).graph.inputs} - {t.name for t in result.model.graph.inputs}
    assert gone == {"past_key_values.0.value"}
    assert "present.0.key" in {t.name for t in result.model.graph.outputs}


def test_only_sums_that_lose_a_branch_are_taken_apart() -> None:
    result = spa.prune(llama(fused=True), drop_layers=Depth([name(1, "mlp")]))
    before = [n.op_type for n in llama(fused=True).graph.node]
    after = [n.op for n in result.model.graph.nodes]
    assert before.count("SkipSimplifiedLayerNormalization") - after.count("SkipSimplifiedLayerNormalization") == 1
    assert after.count("Add") == before.count("Add")


def test_channels_after_layers_of_a_cached_model() -> None:
    result = spa.prune(llama(fused=True), 0.5, multiple_of=1, drop_layers=Depth([name(1, "attention")]))
    assert result.plan.groups
    assert result.check is not None
    assert result.check.passed


FUSED = """q = MatMul(x, w1) a = Relu(q) b = MatMul(a, w2) y = com.microsoft.SkipLayerNormalization<epsilon=0.001>(b, x, g, h, c)
z = MatMul(y, w3) r = Relu(z) m = MatMul(r, w4) e, _m, _v, s = com.microsoft.SkipLayerNormalization(y, m, g2, h2)
t = Add(s, e) o = MatMul(t, w5)"""


def post_norm() -> onnx.ModelProto:
    """Sums whose first operand is the branch, with its bias; one of them gives the sum as well."""
    return net("float[2,3,8] x -> float[2,3,5] o", FUSED, w1=(8, 12), w2=(12, 8), g=(8,), h=(8,), c=(8,), w3=(8, 12), w4=(12, 8), g2=(8,),
               h2=(8,), w5=(8, 5))  # fmt: skip


def test_the_bias_in_a_fused_sum_goes_with_the_branch() -> None:
    found = sub_layers(parted(spa.analyze(post_norm())).groups).layers
    assert [s.total for s in found] == ["y/sum", "s"]
    x = {"x": np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)}
    apart = run(parted(spa.analyze(post_norm())).edited, x)["o"]
    np.testing.assert_allclose(apart, run(spa.load(post_norm()), x)["o"], atol=1e-5)
    for layer, zero in zip(found, (["w2", "c"], ["w4"]), strict=True):
        result = spa.prune(post_norm(), drop_layers=Depth([layer.name]))
        np.testing.assert_allclose(run(result.model, x)["o"], run(spa.load(zeroed(post_norm(), *zero)), x)["o"], atol=1e-5)


def test_searches_and_ablation_see_fused_layers() -> None:
    model = llama(fused=True, cache=False)
    analysis = spa.analyze(model)
    feeds = [runnable(analysis.normal.model, analysis.groups.traced, seed=k) for k in range(2)]
    evidence = Evidence("drawn", feeds, analysis.normal.model, False)
    plain = spa.analyze(llama(cache=False))
    same = Evidence("drawn", feeds, plain.normal.model, False)
    for depth in (Depth(2, "finercut", "attention"), Depth(2, "llm-drop"), Depth(1, "shortgpt")):
        one, other = choose_layers(analysis, depth, evidence), choose_layers(plain, depth, same)
        assert one.order == other.order
        assert one.scores == pytest.approx(other.scores, rel=1e-2, abs=1e-6)
    small, _, dropped = without_layers(analysis, Depth(1, "replaceme"), evidence)
    assert len(dropped.layers) == 2
    assert np.isfinite(run(small.edited, feeds[0])["logits"]).all()
    heads, others = (ablate(a, e, metric="error").scores for a, e in ((analysis, evidence), (plain, same)))
    assert [s.drop for s in heads] == pytest.approx([s.drop for s in others], rel=1e-2)


@pytest.mark.parametrize("method", ["finercut", "replaceme"])
def test_layers_then_neurons_then_scales_and_again_from_the_plan(method: str) -> None:
    """COMP's stages in one call; the plan does it again, all that was fitted to the data fitted anew."""
    model = llama(cache=False)
    analysis = spa.analyze(model)
    feeds = [runnable(analysis.normal.model, analysis.groups.traced, seed=k) for k in range(3)]
    how = {"calibration": feeds, "repair": "affine"}
    result = spa.prune(model, 0.25, multiple_of=1, units=["neuron"], drop_layers=Depth(1, method, "block"), **how)
    assert result.repaired is not None
    assert {e["size"] for e in result.plan.groups.values()} == {96}
    assert len(result.plan.groups) == 2
    again = spa.apply(model, result.plan, **how)
    assert again.check is not None
    assert spa.storage.store.to_bytes(again.model) == spa.storage.store.to_bytes(result.model)
