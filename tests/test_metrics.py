"""Metrics against their definitions, measured losses, and judges."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_trace import net

import spa
from spa.budgets.metrics import METRICS, find_metric, measure
from spa.budgets.quality import first, judge, measured_losses, rungs_to_measure, split
from spa.data.evidence import Evidence
from spa.errors import BadOption

RNG = np.random.default_rng(0)
FOUND, DENSE = RNG.standard_normal((20, 6)), RNG.standard_normal((20, 6))
LABELS = RNG.integers(0, 6, 20)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


class Fixed:
    """Gives what it was told, batch by batch."""

    def __init__(self, outputs: list[np.ndarray]) -> None:
        self.outputs = iter(outputs)

    def run(self, feeds: Any) -> Any:
        return {"y": next(self.outputs)}


def of(name: str, found: np.ndarray, dense: np.ndarray, labels: np.ndarray | None = None, parts: int = 3) -> float:
    cuts = np.array_split(np.arange(len(found)), parts)
    batches = [{"x": found[c]} | ({} if labels is None else {"labels": labels[c]}) for c in cuts]
    return measure(METRICS[name], Fixed([found[c] for c in cuts]), [{"y": dense[c]} for c in cuts], batches, "y",
                   None if labels is None else "labels")


EXPECTED = {
    "accuracy": 100 * (FOUND.argmax(1) == LABELS).mean(),
    "top5": 100 * np.mean([t in np.argsort(-f)[:5] for f, t in zip(FOUND, LABELS, strict=True)]),
    "agreement": 100 * (FOUND.argmax(1) == DENSE.argmax(1)).mean(),
    "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(FOUND, DENSE, strict=True)]),
    "kl": np.mean((softmax(DENSE) * np.log(softmax(DENSE) / softmax(FOUND))).sum(1)),
    "error": ((FOUND - DENSE) ** 2).sum() / (DENSE**2).sum(),
    "perplexity": math.exp(-np.log(softmax(FOUND)[np.arange(20), LABELS]).mean()),
}


@pytest.mark.parametrize("name", METRICS)
def test_by_hand(name: str) -> None:
    assert of(name, FOUND, DENSE, LABELS) == pytest.approx(EXPECTED[name])


def test_probabilities_are_not_taken_for_logits() -> None:
    assert of("kl", softmax(FOUND), softmax(DENSE)) == pytest.approx(EXPECTED["kl"])
    assert of("perplexity", softmax(FOUND), softmax(DENSE), LABELS) == pytest.approx(EXPECTED["perplexity"])


def test_classes_of_pixels_and_of_tokens() -> None:
    maps, tokens = FOUND.reshape(5, 2, 2, 6), LABELS.reshape(5, 2, 2)
    assert of("accuracy", np.moveaxis(maps, -1, 1), np.moveaxis(maps, -1, 1), tokens, 2) == pytest.approx(EXPECTED["accuracy"])
    rows = FOUND.reshape(5, 4, 6)
    padded = LABELS.reshape(5, 4).copy()
    padded[0, 1:] = -100
    wanted = -np.log(softmax(rows)[np.arange(5)[:, None], np.arange(4), padded.clip(0)])[padded >= 0]
    assert of("perplexity", rows, rows, padded, 2) == pytest.approx(math.exp(wanted.mean()))


def test_drops_point_down() -> None:
    assert METRICS["accuracy"].drop(90.0, 88.0) == pytest.approx(2)
    assert METRICS["perplexity"].drop(20.0, 25.0) == pytest.approx(5)


@pytest.mark.parametrize(("name", "labels", "says"), [("accuracy", None, "--labels"), ("accuracy", LABELS[:7], "do not fit|too")])
def test_labels_that_lack_or_do_not_fit(name: str, labels: np.ndarray | None, says: str) -> None:
    with pytest.raises((BadOption, ValueError), match=says):
        measure(METRICS[name], Fixed([FOUND]), [{"y": DENSE}], [{"x": FOUND} | ({} if labels is None else {"labels": labels})], "y",
                None if labels is None else "labels")


def test_nan_is_a_sentence() -> None:
    with pytest.raises(BadOption, match="--metric error is NaN on these data"):
        of("error", np.full((4, 6), np.nan), DENSE[:4])


@pytest.mark.parametrize(("body", "says"), [
    ("return float('nan')", "returned nan, but must return a finite number"), ("raise KeyError('k')", "failed with KeyError: 'k'"),
    ("return 'good'", "failed with ValueError"),
])  # fmt: skip
def test_metrics_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metric", raising=False)
    Path("own_metric.py").write_text(f"def bad(run):\n    {body}\n\ndef good(run):\n    return float(run({{'x': 1}})['y'].sum())\n")
    assert measure(find_metric("own_metric:good"), Fixed([DENSE]), [], [], "y", None) == pytest.approx(DENSE.sum())
    with pytest.raises(BadOption, match=says):
        measure(find_metric("own_metric:bad"), Fixed([DENSE]), [], [], "y", None)


@pytest.mark.parametrize(("name", "says"), [("acuracy", "near it are: accuracy"), ("no_module_here:f", "no_module_here")])
def test_metrics_that_are_none(name: str, says: str) -> None:
    with pytest.raises(BadOption, match=says):
        find_metric(name)


# ---------------------------------------------------------------------- losses and judges


def test_losses_between_measured_rungs_follow_the_guess() -> None:
    ladder = np.arange(1, 12)
    guess = (1 - ladder / 11) ** 2
    asked = []

    def loss(group: int, width: int) -> float:
        asked.append(width)
        return 7 * (1 - width / 11) ** 2

    [found], count = measured_losses([ladder], loss, guesses=[guess])
    assert count == len(asked) == len(rungs_to_measure(ladder)) == 5
    assert 11 not in asked
    assert 1 in asked
    np.testing.assert_allclose(found, 7 * guess, atol=1e-12)


def test_losses_fall_with_width_whatever_is_measured() -> None:
    noise = np.random.default_rng(1)
    ladders = [np.arange(1, 9), np.arange(2, 20, 3), np.array([5])]
    found, _ = measured_losses(ladders, lambda g, w: float(noise.random()), guesses=[1.0 - x / x[-1] for x in ladders])
    assert all((np.diff(x) <= 0).all() and x[-1] == 0 for x in found)


def test_time_is_spread_over_groups() -> None:
    ladders = [np.arange(1, 9)] * 3
    asked: list[int] = []

    def loss(group: int, width: int) -> float:
        asked.append(group)
        return 2.0 * (8 - width)

    found, count = measured_losses(ladders, loss, guesses=[np.linspace(7, 0, 8)] * 3, seconds=0)
    assert count == 1
    np.testing.assert_allclose(found[2], 2 * np.linspace(7, 0, 8))  # not measured: the guess, in the proportion of what was
    asked.clear()
    measured_losses(ladders, loss, guesses=[np.linspace(7, 0, 8)] * 3)
    assert asked[:3] == [0, 1, 2]


def model() -> onnx.ModelProto:
    return net("float[n,6] x -> float[n,4] y", "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)", w1=(6, 12), w2=(12, 4))


def evidence(sizes: tuple[int, ...] = (8, 8, 8, 8)) -> Evidence:
    rng = np.random.default_rng(2)
    loaded = spa.analyze(model()).normal.model
    batches = [{"x": rng.standard_normal((n, 6)).astype(np.float32), "t": rng.integers(0, 4, n)} for n in sizes]
    return Evidence("drawn", batches, loaded, False, "t")


def test_a_judge_finds_no_drop_in_the_same_model() -> None:
    data = evidence()
    judged = judge(data.model, METRICS["accuracy"], data)
    assert judged.drop(data.model) == 0
    assert judged.samples == 32
    small = spa.prune(model(), 0.5, multiple_of=1).model
    assert judge(data.model, METRICS["error"], data).drop(small) > 0.01
    with pytest.raises(BadOption, match="no output 'z'; it has: y"):
        judge(data.model, METRICS["error"], data, output="z")


def test_held_out_data_are_not_fitted_on() -> None:
    data = evidence()
    fit, held = split(data)
    assert [b["x"].shape[0] for b in (*fit.batches, *held.batches)] == [8, 8, 8, 8]
    assert len(held.batches) == 1
    fit, held = split(evidence((16,)))
    assert (fit.samples, held.samples) == (12, 4)
    with pytest.raises(BadOption, match="too few calibration data"):
        split(evidence((2,)))
    assert first(data, 16).samples == 16
