"""Experts scored by what they add (REAP), and super experts that stay, in every form that a mixture is written in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from repair_cases import drawn, outputs_of, weights_of
from test_chosen import D, E, K, N, X, picked, routed, spread
from test_trace import ints, net

import spa
from spa.criteria.experts import super_experts
from spa.criteria.views import Data
from spa.graph.analysis import Analysis
from spa.statistics.terms import Terms

Array = np.ndarray
BATCHES = [{"x": X[:25]}, {"x": X[25:]}]


def fused(**settings: Any) -> onnx.ModelProto:
    attributes = ", ".join(f"{k}={v}" for k, v in {"k": K, "activation_type": '"relu"', **settings}.items())
    body = f"p = MatMul(x, wr) m = com.microsoft.MoE<{attributes}>(x, p, w1, , w2) y = Add(m, x)"
    return net(f"float[n,{D}] x -> float[n,{D}] y", body, wr=(D, E), w1=(E, N, D), w2=(E, D, N))


def looked(model: onnx.ModelProto, batches: list[dict[str, Array]] | None = None) -> tuple[Analysis, spa.Scores]:
    analysis = spa.analyze(model)
    data = Data(analysis.normal.model, BATCHES if batches is None else batches)
    return analysis, spa.score(analysis.normal.model.graph, analysis.groups, "reap", data=data)


def expected(model: onnx.ModelProto, *, scaled: bool = False) -> Array:
    """S_e = mean over the tokens routed to e of g_e ‖f_e‖₂."""
    gates, given = routed(X.astype(np.float64), {n: w.astype(np.float64) for n, w in weights_of(model).items()}, model)
    if scaled:
        gates /= gates.sum(-1, keepdims=True)
    norms = gates * np.linalg.norm(given, axis=-1)
    return norms.sum(0) / np.maximum((gates > 0).sum(0), 1)


FORMS = {
    "picked": (picked, False), "spread": (spread, False), "fused": (fused, False),
    "fused, scaled": (lambda: fused(normalize_routing_weights=1), True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_reap_is_the_mean_weighted_norm_of_an_experts_output(form: str) -> None:
    make, scaled = FORMS[form]
    model = make()
    analysis, found = looked(model)
    group = next(g for g in analysis.groups.free() if g.kind == "expert")
    assert group.name not in found.instead
    np.testing.assert_allclose(found.values[group.coordinates], expected(model, scaled=scaled), rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_models_that_run_in_pieces_are_seen_too(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, scaled = FORMS[form]
    monkeypatch.setattr("spa.proof.pieces.WHOLE", 0)
    monkeypatch.setattr("spa.proof.pieces.PIECE", 256)
    model = make()
    analysis, found = looked(model)
    group = next(g for g in analysis.groups.free() if g.kind == "expert")
    np.testing.assert_allclose(found.values[group.coordinates], expected(model, scaled=scaled), rtol=1e-4)


def test_reap_of_all_experts_on_all_tokens() -> None:
    """No router: every expert sees every token, with weight one."""
    body = "u = Unsqueeze(x, zero) h = MatMul(u, w1) r = Relu(h) d = MatMul(r, w2) y = ReduceSum<keepdims=0>(d, zero)"
    model = net("float[n,8] x -> float[n,5] y", body, w1=(4, 8, 12), w2=(4, 12, 5), zero=ints(0))
    analysis, found = looked(model)
    w = weights_of(model)
    terms = np.einsum("emn,eno->meo", np.maximum(np.einsum("mi,ein->emn", X, w["w1"]), 0), w["w2"])
    group = next(g for g in analysis.groups.free() if g.kind == "expert")
    np.testing.assert_allclose(found.values[group.coordinates], np.linalg.norm(terms, axis=-1).mean(0), rtol=1e-4)


def test_experts_with_weights_of_four_bits_are_seen() -> None:
    """Against the same operator with a router that asks for one expert alone."""
    drawn_bytes = np.random.default_rng(4).integers(0, 256, (2, 4, 16, 16)).astype(np.uint8)
    scales = np.full((4, 16), 0.05, np.float32)
    operator = 'com.microsoft.QMoE<k=2, expert_weight_bits=4, activation_type="silu">(x, p, w1, s1, , w2, s2)'
    stored = {"w1": drawn_bytes[0], "s1": scales, "w2": drawn_bytes[1][:, :, :8].repeat(2, 1), "s2": np.full((4, 32), 0.05, np.float32)}
    model = net("float[n,32] x -> float[n,32] y", f"p = MatMul(x, wr) m = {operator} y = Add(m, x)", wr=(32, 4), **stored)
    bare = net("float[n,32] x, float[n,4] p -> float[n,32] y", operator.join(("y = ", "")), **stored)
    x = drawn((24, 32), 9)
    logits = x.astype(np.float64) @ weights_of(model)["wr"]
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gates[gates < np.sort(gates, axis=1)[:, -2:-1]] = 0
    gates /= gates.sum(axis=1, keepdims=True)  # as the kernel does, told or not
    alone = [outputs_of(bare, [{"x": x, "p": np.where(np.arange(4) == e, 0, -1e4).repeat(24).reshape(4, 24).T.astype(np.float32)}])[0]["y"]
             for e in range(4)]
    norms = gates * np.linalg.norm(np.stack(alone, axis=1), axis=-1)
    analysis, found = looked(model, [{"x": x}])
    group = next(g for g in analysis.groups.free() if g.kind == "expert")
    np.testing.assert_allclose(found.values[group.coordinates], norms.sum(0) / (gates > 0).sum(0), rtol=1e-4)


@pytest.mark.parametrize("settings, says", [({"use_sparse_mixer": 1}, "sparse mixer")])
def test_what_cannot_be_seen_is_said(settings: dict[str, Any], says: str) -> None:
    analysis, found = looked(fused(**settings))
    group = next(g for g in analysis.groups.free() if g.kind == "expert")
    assert group.name in found.instead
    assert says in found.notes[group.name]
    assert "was scored by l2" in found.notes[group.name]


def test_a_kernel_that_weighs_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms must add up to what the operator gives."""
    monkeypatch.setattr("spa.statistics.terms.Inside.shares", lambda self, scores: np.full(scores.shape, 0.3))
    analysis, found = looked(fused())
    group = next(g for g in analysis.groups.free() if g.kind == "expert")
    assert "a rule that is not known" in found.notes[group.name]


def test_other_groups_are_scored_by_l2_and_a_note_says_so() -> None:
    plan = spa.plan(picked(), 0.5, criterion="reap", calibration=BATCHES, multiple_of=1)
    neurons = next(n for n, e in plan.groups.items() if e["size"] == N)
    assert "it holds no experts, so reap says nothing of it" in plan.notes[neurons]


def test_the_experts_that_add_least_go() -> None:
    model = picked()
    plan = spa.plan(model, 0.5, criterion="reap", calibration=BATCHES, multiple_of=1, units=["expert"])
    (entry,) = plan.groups.values()
    worth = expected(model)
    worth[np.abs(seen(model)).max((0, 2)).argmax()] = np.inf  # looks like a super expert
    assert sorted(entry["kept"]) == sorted(np.argsort(-worth)[:3].tolist())


def test_reap_needs_data() -> None:
    with pytest.raises(spa.BadOption, match="give data with --calibration"):
        spa.plan(picked(), 0.5, criterion="reap")


# ---------------------------------------------------------------------- super experts


def seen(model: onnx.ModelProto, *, everywhere: bool = False) -> Array:
    """(tokens, experts, D) what experts give of the tokens that are routed to them."""
    gates, given = routed(X.astype(np.float64), {n: w.astype(np.float64) for n, w in weights_of(model).items()}, model)
    return given if everywhere else np.where((gates > 0)[..., None], given, 0)


@pytest.mark.parametrize("make", [picked, spread, fused])
def test_the_largest_output_of_each_expert_is_seen(make: Any) -> None:
    from spa.statistics.terms import observed

    model = make()
    analysis = spa.analyze(model)
    expert = [g for g in analysis.groups.free() if g.kind == "expert"]
    terms, _ = observed(analysis.normal.model, analysis.groups, expert, BATCHES)
    sees = seen(model, everywhere=make is spread)  # all compute all tokens there
    np.testing.assert_allclose(terms[expert[0].index].extreme, np.abs(sees).max((0, 2)), rtol=1e-4)


def mixtures(count: int) -> spa.Groups:
    body, weights, before = [], {}, "x"
    for i in range(count):
        mixture = f"com.microsoft.MoE<k=1>({before}, p{i}, w1{i}, , w2{i})"
        body.append(f"p{i} = MatMul({before}, wr{i}) m{i} = {mixture} h{i} = Add(m{i}, {before})")
        weights |= {f"wr{i}": (D, E), f"w1{i}": (E, N, D), f"w2{i}": (E, D, N)}
        before = f"h{i}"
    return spa.analyze(net(f"float[n,{D}] x -> float[n,{D}] y", " ".join([*body, f"y = Identity({before})"]), **weights)).groups


def test_super_experts_are_the_papers() -> None:
    """Above the 99.5th percentile and a tenth of the largest, in the first three quarters of the layers."""
    groups = mixtures(4)
    experts = [g for g in groups.free() if g.kind == "expert"]
    rng = np.random.default_rng(0)
    m = rng.uniform(0, 1, (4, E))
    m[1, 2], m[3, 4] = 40, 50  # the second is in the last layer
    found = {g.index: Terms(np.ones(E), np.ones(E), m[i]) for i, g in enumerate(experts)}
    held, notes = super_experts(groups, (found, {}))
    above = (m > np.percentile(m, 99.5)) & (m > m.max() / 10)
    above[3:] = False
    assert held is not None
    np.testing.assert_array_equal(np.stack([held[g.coordinates] for g in experts]), above)
    assert not above[1, 2]  # alone at the top is the one of the last layer
    m[3, 4] = 1
    held, notes = super_experts(groups, (found, {}))
    assert held is not None
    assert held.sum() == 1
    assert "super experts" in notes[experts[1].name]
    assert ": 2" in notes[experts[1].name]


def test_a_super_expert_stays_whatever_its_score() -> None:
    """What one expert gives grows a thousandfold, and its score is the least all the same."""
    model, last = picked(), picked()
    analysis = spa.analyze(model)
    group = next(g for g in analysis.groups.free() if g.kind == "expert")
    data = Data(analysis.normal.model, BATCHES)
    scores = spa.score(analysis.normal.model.graph, analysis.groups, "l2", data=data)
    assert scores.held is not None
    (stays,) = np.flatnonzero(scores.held[group.coordinates])
    assert stays == np.argmax(np.abs(seen(last)).max((0, 2)))
    scored = scores.values[group.coordinates]
    for given, keeps in ((None, False), (BATCHES, True)):
        brought = {group.name: np.where(np.arange(E) == stays, 0.0, scored)}
        kept = spa.plan(model, 0.67, multiple_of=1, units=["expert"], calibration=given, scores=brought).groups[group.name]["kept"]
        assert (stays in kept) == keeps


def test_they_stay_in_a_sweep_that_goes_on(tmp_path: Path) -> None:
    made = [spa.sweep(picked(), tmp_path / "s", ratio=[r], criterion=["reap"], calibration=[{"x": X}] * 2, multiple_of=1, repair="none",
                      units=["expert"], metric="error") for r in (0.5, 0.6)]  # fmt: skip
    assert [len(s.points) for s in made] == [1, 2]
    assert not any(p.failed for p in made[-1].points)
