"""One network, written in torch, Keras, Flax and Paddle with the same weights: the same groups, the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intake_cases import ROOT, needed, saved

import spa
from models.intake import weights as drawn
from spa.proof.check import run

WRITTEN = ("exported", "keras", "keras-jax", "jax", "paddle")
LAST = ("keras", "keras-jax", "jax")  # channels last


def converted(framework: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> spa.Converted:
    row = framework.partition("-")[2] or framework
    needed(row, *(("flax",) if framework == "jax" else ("keras",) if "keras" in framework else ()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    inputs = {"x": drawn.shape(name, last=True)} if row == "jax" else {}
    return spa.convert(saved(framework, name, folder), framework=row, inputs=inputs)


def decided(model: Any, criterion: str) -> tuple[Any, spa.Result]:
    """What of the plan the file's names don't tell: kind, size and kept coordinates of each group, MACs before and after."""
    analysis = spa.analyze(model)
    plan = spa.plan(analysis, 0.5, criterion=criterion, multiple_of=1)
    result = spa.apply(analysis, plan)
    groups = analysis.groups
    found = sorted((groups.by_name[n].kind, g["size"], tuple(g["kept"])) for n, g in plan.groups.items())
    return (found, result.before.macs, result.after.macs), result


def expected(name: str, criterion: str) -> Any:
    """What torch's network with its norms folded away gives, worked out on weights alone: see the other tests for the ways there."""
    kept = {"resnet": {"l2": [(1, 3, 5, 7), (2, 3, 5, 7), (0, 1, 2, 3, 6, 8, 10, 11), (0, 2, 3, 9, 11, 12, 13, 15)],
                       "l1": [(2, 3, 5, 7), (3, 4, 5, 7), (0, 1, 2, 3, 6, 8, 10, 11), (0, 2, 3, 5, 9, 11, 12, 13)]},
            "mlp": {"l2": [(0, 1, 3, 6, 10, 11, 15, 16, 17, 18, 20, 21), (3, 4, 5, 6, 8, 11, 13, 14, 18, 19, 20, 21, 22, 23, 25, 30)],
                    "l1": [(0, 1, 3, 8, 10, 11, 15, 16, 17, 18, 20, 21), (3, 4, 5, 7, 8, 9, 14, 18, 19, 20, 21, 22, 24, 27, 28, 30)]},
            }[name][criterion]  # fmt: skip
    return sorted(kept), {"resnet": (579744, 158800), "mlp": (1272, 444)}[name]


@pytest.mark.parametrize("framework", WRITTEN)
@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_the_same_plan(name: str, framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = converted(framework, name, tmp_path, monkeypatch)
    assert made.parity is not None
    assert made.parity.passed
    for criterion in ("l2", "l1"):
        (groups, before, after), result = decided(made.model, criterion)
        kept, macs = expected(name, criterion)
        assert sorted(k for _, _, k in groups) == kept
        assert (before, after) == macs
        assert sorted(size for _, size, _ in groups) == ([8, 8, 16, 16] if name == "resnet" else [24, 32])
        assert [kind for kind, _, _ in groups] == (["channel"] * 3 + ["residual"] if name == "resnet" else ["neuron"] * 2)
        assert result.check is not None
        assert result.check.passed


def test_the_weights_mean_what_they_mean_in_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = converted("jax", "mlp", tmp_path, monkeypatch)
    x = np.random.default_rng(0).normal(size=drawn.shape("mlp")).astype(np.float32)
    w, hidden = drawn.mlp(), x
    for layer in ("one", "two"):
        hidden = np.maximum(hidden @ w[f"{layer}.weight"].T + w[f"{layer}.bias"], 0)
    found = next(iter(run(made.model, {"x": x}).values()))
    np.testing.assert_allclose(found, hidden @ w["three.weight"].T + w["three.bias"], rtol=1e-4, atol=1e-5)
