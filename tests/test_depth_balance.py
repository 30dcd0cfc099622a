"""2SSP's balance of attention sub-layers and neurons, against its equation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_cli import refused, run
from test_depth import D, data, decoder

import spa
from spa.budgets.budget import Budget
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.layers.depth import BALANCE, Depth
from spa.layers.depth_budget import balanced
from spa.proof.check import run as run_model

LAYERS, HIDDEN = 4, 20
ATTENTION, MLP = 4 * D * D, 2 * D * HIDDEN + D  # parameters of each


def test_how_many_attention_sub_layers_go() -> None:
    analysis = spa.analyze(decoder(LAYERS))
    total = spa.count(analysis.groups).parameters
    found = {}
    for left in (0.95, 0.8, 0.6, 0.4, 0.3):
        share = (1 - left) * total / (LAYERS * (ATTENTION + MLP))
        expected = round(LAYERS * share ** ((MLP / ATTENTION) / 1.5))
        got = balanced(analysis, Depth(BALANCE), Budget((f"params={left}",)))
        found[left] = 0 if got is None else got.drop
        assert found[left] == expected
        assert got is None or got.kind == "attention"
    assert len(set(found.values())) > 2


def test_neurons_meet_the_rest() -> None:
    """With P neurons of each MLP gone, parameters are as many as the paper's two stages leave."""
    model = decoder(LAYERS)
    total = spa.count(spa.analyze(model).groups).parameters
    budget = Budget(("params=0.6",), "uniform")
    result = spa.prune(model, target=budget, drop_layers=Depth(BALANCE, "llm-drop"), units=["neuron"], criterion="2ssp", multiple_of=1,
                       calibration=data())  # fmt: skip
    gone = result.plan.options["depth"]
    widths = [len(e["kept"]) for e in result.plan.groups.values()]
    assert gone["kind"] == "attention"
    assert {s["kind"] for s in gone["dropped"]} == {"attention"}
    assert len(widths) == LAYERS
    assert max(widths) - min(widths) <= 1  # alike, but for what is left over
    spared = 0.4 * total - len(gone["dropped"]) * ATTENTION  # for the neurons, 2 D parameters each
    assert sum(HIDDEN - w for w in widths) == int(np.ceil(spared / (2 * D)))


def test_what_has_no_balance() -> None:
    analysis = spa.analyze(decoder(2))
    for depth, budget, says in (
        (Depth(BALANCE), Budget(), "say how many stay with --target params"), (Depth(BALANCE), Budget(("macs=0.5",)), "--target params"),
        (Depth(BALANCE, kind="mlp"), Budget(("params=0.5",)), "not those of the kind 'mlp'"),
        (Depth(BALANCE), Budget(("params=0.01",)), "fewer than are to go"),
    ):  # fmt: skip
        with pytest.raises(BadOption, match=says):
            balanced(analysis, depth, budget)
    small = spa.prune(decoder(2), drop_layers=Depth(("A*",))).model
    with pytest.raises(BadOption, match="has not both"):
        balanced(spa.analyze(small), Depth(BALANCE), Budget(("params=0.5",)))


def test_what_layers_lose_counts() -> None:
    """A quality is compared with that of the model as given, not with that of the model without the layers."""
    model, held = decoder(3), data(8, labels=True)
    judged = Evidence("held", held, spa.analyze(model).normal.model, False, "labels")

    def perplexity(given: spa.Model) -> float:
        rows = [np.take_along_axis(found - np.log(np.exp(found).sum(-1, keepdims=True)), b["labels"][..., None], -1)
                for b in held for found in [run_model(given, {"x": b["x"]})["y"].astype(np.float64)]]  # fmt: skip
        return float(np.exp(-np.mean(rows)))

    layers = spa.prune(model, drop_layers=Depth(("A1", "M1"))).model
    lost = perplexity(layers) - perplexity(spa.load(model))
    budget = Budget(max_drop=abs(lost) + 0.5, metric="perplexity", evaluate=judged, allocation="uniform")
    result = spa.prune(model, target=budget, drop_layers=Depth(("A1", "M1")), multiple_of=1, calibration=judged)
    before, after = result.plan.options["budget"]["quality"]["perplexity"]
    assert before == pytest.approx(perplexity(spa.load(model)), rel=1e-5)
    assert after == pytest.approx(perplexity(result.model), rel=1e-5)
    assert after - before <= abs(lost) + 0.5


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(decoder(LAYERS), "m.onnx")
    np.savez("d.npz", x=np.concatenate([b["x"] for b in data()]))
    asked = ("--drop-layers", "balance", "--layers", "llm-drop", "--calibration", "d.npz", "--no-bench")
    done = run("prune", "m.onnx", "-o", "s.onnx", *asked, "--target", "params=0.6", "--units", "neuron", "--multiple-of", 1,
               "--allocation", "uniform", "--repair", "none", "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    counts = json.loads(done.stdout)
    assert 0.5 < counts["after"]["parameters"] / counts["before"]["parameters"] <= 0.6
    for name in ("s.onnx", "s.plan.json"):
        Path(name).unlink()
    refused(tmp_path, "prune", "m.onnx", "-o", "s.onnx", *asked, "--ratio", "0.5", says="--target params")


@pytest.mark.parametrize("more", [("--ratio", "0.25", "--multiple-of", "1"), (), ("--target", "params=0.5", "--multiple-of", "1")])
def test_plans_hold_layers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    """`spa plan` and `spa apply` come to what `spa prune` does."""
    monkeypatch.chdir(tmp_path)
    onnx.save(decoder(3), "m.onnx")
    np.savez("d.npz", x=np.concatenate([b["x"] for b in data()]))
    asked = ("--drop-layers", "2", "--layers", "llm-drop", "--calibration", "d.npz", *more, *(("--repair", "none") if more else ()))
    for command in (("plan", "m.onnx", "-o", "p.json", *asked), ("apply", "m.onnx", "p.json", "-o", "a.onnx"),
                    ("prune", "m.onnx", "-o", "b.onnx", *asked, "--no-bench")):  # fmt: skip
        done = run(*command)
        assert done.exit_code == 0, done.stderr
        assert command[0] == "apply" or "Dropped: 2 layers by llm-drop" in done.stdout
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert Path("p.json").read_bytes() == Path("b.plan.json").read_bytes()
