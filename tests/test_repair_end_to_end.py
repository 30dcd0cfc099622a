"""Repair through `spa.plan` and `spa.apply`; what it says, and does, where weights are tied, recurrent or normalise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper, parser
from repair_cases import (
    NETWORKS,
    batches,
    every_row,  # noqa: F401
    network,
    outputs_of,
    weights_of,
)
from test_trace import net

import spa
from spa.errors import BadOption
from spa.plans.rewrite import rewrite
from spa.proof.check import run
from spa.repairs.repair import RepairOptions, repair
from spa.statistics.stepper import tapped
from spa.storage.store import with_graph


@pytest.mark.parametrize("name", NETWORKS)
def test_repaired_models_are_proven_and_can_be_cut_again(tmp_path: Path, name: str) -> None:
    model, shape = network(name)
    data = np.concatenate([b["x"] for b in batches(shape, 2)])
    options = RepairOptions(inputs="dense") if name == "grouped" else "obspa"
    plan = spa.plan(model, 0.34, multiple_of=1)
    result = spa.apply(model, plan, repair=options, calibration=data)
    assert result.check is not None
    assert result.check.passed
    assert result.repaired is not None
    assert result.repaired.layers
    assert not result.repaired.skipped
    plain = spa.apply(model, plan)
    held_out = batches(shape, seed=7, count=2)

    def off(small: Any) -> float:
        pairs = zip(outputs_of(model, held_out), outputs_of(small, held_out), strict=True)
        return float(np.mean([((a["y"] - b["y"]) ** 2).mean() for a, b in pairs]))

    assert off(result.model) < off(plain.model)
    result.save_repaired(tmp_path / "repaired.onnx", plan=tmp_path / "plan.json")
    again = spa.apply(tmp_path / "repaired.onnx", tmp_path / "plan.json")
    first, second = outputs_of(result.model, held_out), outputs_of(again.model, held_out)
    assert all((a["y"] == b["y"]).all() for a, b in zip(first, second, strict=True))
    a, b = weights_of(result.model), weights_of(again.model)
    assert {n: v.tobytes() for n, v in a.items()} == {n: v.tobytes() for n, v in b.items()}


def test_a_small_bias_that_is_shared_is_not_merged_again() -> None:
    """Readers of one small tensor get copies to be analysed; a repaired one has to stay apart."""
    body = "h = MatMul(x, w1) r = Relu(h) m = MatMul(r, w) a = Add(m, b) n = MatMul(x, w3) e = Add(n, b) y = Concat <axis=1> (a, e)"
    model = net("float[200,6] x -> float[200,8] y", body, w1=(6, 12), w=(12, 4), w3=(6, 4), b=(4,))
    data = batches((200, 6), 1)
    plan = spa.plan(model, 0.4, multiple_of=1)
    result = spa.apply(model, plan, repair=RepairOptions(damping=0), calibration=[b["x"] for b in data])
    dense, small = (np.concatenate([o["y"] for o in outputs_of(m, data)]) for m in (model, result.model))
    np.testing.assert_array_equal(dense[:, 4:], small[:, 4:])
    np.testing.assert_allclose(dense[:, :4].mean(axis=0), small[:, :4].mean(axis=0), atol=1e-4)


def test_repair_wants_data() -> None:
    model, _ = network("mlp")
    plan = spa.plan(model, 0.34, multiple_of=1)
    with pytest.raises(BadOption, match="--repair obspa fits layers to data"):
        spa.apply(model, plan, repair="obspa")
    plain = spa.apply(model, plan)
    with pytest.raises(BadOption, match="Nothing was repaired"):
        plain.save_repaired("nowhere.onnx")


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_tied_weight_stays_as_it_is(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table is embedding and head: fitting the head would change what tokens mean, so only a constant is fitted, and it says so."""
    monkeypatch.setattr(sys.modules["spa.graph.normalize"], "SHARED", 0)
    rng = np.random.default_rng(5)
    table, w = rng.standard_normal((20, 16)).astype(np.float32), rng.standard_normal((16, 16)).astype(np.float32)
    graph = parser.parse_graph("g (int64[n,4] ids) => (float[n,4,20] y) { e = Gather(table, ids) h = MatMul(e, w) r = Relu(h) "
                               "s = Add(e, r) t = Transpose<perm=[1,0]>(table) y = MatMul(s, t) }")
    graph.initializer.extend([numpy_helper.from_array(table, "table"), numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    analysis = spa.analyze(model)
    group = next(g for g in analysis.groups.free() if ("table", 1) in g.sites)
    gone = np.zeros(analysis.groups.total, bool)
    gone[group.start : group.start + 5] = True
    feeds = [{"ids": rng.integers(0, 20, (32, 4))} for _ in range(4)]
    found = repair(analysis.normal.model, analysis.groups, gone, feeds, RepairOptions("obspa", inputs=inputs))
    constants = found.groups.traced.constants
    assert "table" in constants
    stored = next(t for n in found.model.graph.nodes for t in n.inputs if t.name == "table")
    assert np.array_equal(np.asarray(stored.values), table)
    assert any("reads its weight too" in why for why in found.skipped.values())


def test_recurrent_weights_are_only_cut_and_it_is_said() -> None:
    """Hidden units of an LSTM: the state that its recurrent weight reads is not a value of the graph; the layer behind is repaired."""
    rng = np.random.default_rng(6)
    model = net("float[5,n,6] x -> float[5,1,n,3] y",
                "h, last, cell = LSTM <hidden_size=8> (x, w, r, b) y = MatMul(h, o)", w=(1, 32, 6), r=(1, 32, 8), b=(1, 64), o=(8, 3))
    analysis = spa.analyze(model)
    group = next(g for g in analysis.groups.free() if ("o", 0) in g.sites)
    gone = np.zeros(analysis.groups.total, bool)
    gone[group.start : group.start + 3] = True
    feeds = [{"x": rng.standard_normal((5, 16, 6)).astype(np.float32)} for _ in range(4)]
    found = repair(analysis.normal.model, analysis.groups, gone, feeds, RepairOptions("obspa"))
    assert len(found.layers) == 1
    assert [why for why in found.skipped.values() if "hidden state" in why]


def test_depthwise_convolutions_are_not_called_skipped() -> None:
    model = net("float[n,3,6,6] x -> float[n,4,6,6] y",
                "a = Conv(x, w, b) d = Conv <group=6, pads=[1,1,1,1]> (a, k) y = Conv(d, o)",
                w=(6, 3, 1, 1), b=(6,), k=(6, 1, 3, 3), o=(4, 6, 1, 1))
    analysis = spa.analyze(model)
    gone = np.zeros(analysis.groups.total, bool)
    group = next(g for g in analysis.groups.free() if ("k", 0) in g.sites)
    gone[group.start : group.start + 2] = True
    feeds = [{"x": np.random.default_rng(i).standard_normal((8, 3, 6, 6)).astype(np.float32)} for i in range(3)]
    assert not repair(analysis.normal.model, analysis.groups, gone, feeds, RepairOptions("obspa")).skipped


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("method", ["bias", "fold"])
def test_normalisations_over_pruned_channels_give_what_they_gave(op: str, method: str) -> None:
    """Each kept channel behind the normalisation has its old mean and deviation again (LayerNorm), or root mean square (RMSNorm)."""
    rng = np.random.default_rng(8)
    bias = ", nb" if op == "LayerNormalization" else ""
    more = {"nb": (12,)} if bias else {}
    model = net("float[n,5,9] x -> float[n,5,4] y", f"e = MatMul(x, w1) n = {op} <axis=-1> (e, ns{bias}) y = MatMul(n, w2)",
                opset=23, w1=(9, 12), ns=np.full(12, 1.5, np.float32), w2=(12, 4), **more)
    analysis = spa.analyze(model)
    group = next(g for g in analysis.groups.free() if ("w2", 0) in g.sites)
    gone = np.zeros(analysis.groups.total, bool)
    gone[group.start + 2 : group.start + 7] = True
    mix = rng.standard_normal((9, 9))
    feeds = [{"x": (rng.standard_normal((32, 5, 9)) @ mix + 1).astype(np.float32)} for _ in range(4)]

    def behind(options: RepairOptions) -> np.ndarray:
        found = repair(analysis.normal.model, analysis.groups, gone, feeds, options)
        assert found.norms == (1 if options.norms else 0)
        small = with_graph(found.model, rewrite(found.model.graph, found.groups, found.gone))
        part = tapped(small, small.graph, ["x"], ["n"], found.groups.traced.facts.types)
        return np.concatenate([run(part, f)["n"] for f in feeds]).reshape(-1, 7)

    part = tapped(analysis.normal.model, analysis.normal.model.graph, ["x"], ["n"], analysis.groups.traced.facts.types)
    keep = ~gone[group.coordinates]
    dense = np.concatenate([run(part, f)["n"] for f in feeds]).reshape(-1, 12)[:, keep]
    norm, plain = behind(RepairOptions(method)), behind(RepairOptions(method, norms=False))
    if bias:
        assert np.allclose(norm.mean(0), dense.mean(0), atol=1e-4)
        assert np.allclose(norm.std(0), dense.std(0), rtol=1e-4)
        assert not np.allclose(plain.std(0), dense.std(0), rtol=1e-2)
    else:
        assert np.allclose((norm**2).mean(0), (dense**2).mean(0), rtol=1e-4)
        assert not np.allclose((plain**2).mean(0), (dense**2).mean(0), rtol=1e-2)
