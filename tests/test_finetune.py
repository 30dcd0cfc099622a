"""Fine-tuning: what is learned and what is not, that it goes on where it stopped, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser
from test_cli import refused, run

import spa
from spa.data.evidence import values
from spa.graph.trace import constant_values
from spa.learning.finetune import Epoch, Finetuned
from spa.learning.training import Samples, learned, moved, rate_at

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")


def network() -> onnx.ModelProto:
    """A convolution with a norm, a mask that is no weight, and a classifier of three classes."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]> g (float[n,2,4,4] x) => (float[n,3] y) {
        a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, conv_weight, conv_bias)
        b = BatchNormalization(a, norm_weight, norm_bias, norm_mean, norm_var)
        c = Add(b, mask)
        d = Relu(c)
        e = GlobalAveragePool(d)
        f = Flatten(e)
        y = Gemm<transB=1>(f, head_weight, head_bias)
    }""")
    rng = np.random.default_rng(0)
    arrays = {
        "conv_weight": rng.standard_normal((16, 2, 3, 3)), "conv_bias": rng.standard_normal(16), "norm_weight": np.ones(16),
        "norm_bias": np.zeros(16), "norm_mean": rng.standard_normal(16), "norm_var": np.full(16, 2.0),
        "mask": rng.standard_normal((1, 1, 4, 4)), "head_weight": rng.standard_normal((3, 16)), "head_bias": np.zeros(3),
    }  # fmt: skip
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, what is left of it, and data."""
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "m.onnx")
    spa.prune("m.onnx", 0.5, criterion="random", multiple_of=1).save("small.onnx")
    x = np.random.default_rng(1).standard_normal((240, 2, 4, 4)).astype(np.float32)
    y = spa.proof.check.run(spa.load("m.onnx"), {"x": x})["y"].argmax(1)
    np.savez("d.npz", x=x, labels=y)
    np.savez("plain.npz", x=x)
    return tmp_path


def batches(labels: bool = True) -> list[dict[str, np.ndarray]]:
    data = np.load("d.npz")
    return [{n: data[n][i : i + 40] for n in data if labels or n != "labels"} for i in range(0, 240, 40)]


def trained(**more: Any) -> Finetuned:
    how = {"epochs": 4, "rate": 0.01, "batch": 20} | more.pop("how", {})
    return spa.finetune("small.onnx", more.pop("data", batches()), training=spa.Training(**how), **more)


def held(found: Finetuned) -> dict[str, np.ndarray]:
    return {n: values(found.model.graph, n) for n in constant_values(found.model.graph)}


@pytest.mark.parametrize("teacher", [None, "m.onnx"])
def test_training_makes_up_for_what_was_removed(folder: Path, teacher: str | None) -> None:
    found = trained(teacher=teacher)
    assert (found.metric, found.dense) == ("accuracy", found.history[0].value if teacher is None else 100.0)
    assert found.best.value == max(e.value for e in found.history) > found.history[0].value
    assert [e.number for e in found.history] == [0, 1, 2, 3, 4]
    judged = spa.proof.check.run(found.model, batches()[5])["y"].argmax(1) == batches()[5]["labels"]
    assert found.best.value == pytest.approx(100 * np.mean([judged.mean(), _right(found, 4)]), abs=15)


def _right(found: Finetuned, number: int) -> float:
    batch = batches()[number]
    return float((spa.proof.check.run(found.model, batch)["y"].argmax(1) == batch["labels"]).mean())


def test_a_teacher_needs_no_labels(folder: Path) -> None:
    found = trained(data=batches(labels=False), teacher="m.onnx")
    assert found.metric == "kl"
    assert found.best.value < 0.7 * found.history[0].value
    other = trained(data=batches(labels=False), teacher="m.onnx", metric="error")
    assert other.best.value < 0.7 * other.history[0].value


def test_only_weights_are_learned(folder: Path) -> None:
    names = learned(spa.analyze("small.onnx"))
    assert names == {"conv_weight", "conv_bias", "norm_weight", "norm_bias", "head_weight", "head_bias"}
    before = {n: values(spa.load("small.onnx").graph, n) for n in constant_values(spa.load("small.onnx").graph)}
    after = held(trained(how={"norms": "stored"}))
    assert {n for n in after if not np.array_equal(after[n], before[n])} == names
    after = held(trained())
    assert {n for n in after if not np.array_equal(after[n], before[n])} == names | {"norm_mean", "norm_var"}
    assert [t.name for t in trained(how={"epochs": 1}).model.graph.inputs] == ["x"]


def test_a_training_goes_on_where_it_was(folder: Path) -> None:
    whole = trained(how={"epochs": 4})
    seen: list[int] = []

    def stop(epoch: Epoch) -> None:
        seen.append(epoch.number)
        if epoch.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(checkpoint="c.pt", tell=stop)
    again = trained(checkpoint="c.pt", tell=lambda e: seen.append(e.number))
    assert seen == [0, 1, 2, 0, 1, 2, 3, 4]
    assert again.history == whole.history
    one, other = held(whole), held(again)
    assert all(np.array_equal(one[n], other[n]) for n in one)
    with pytest.raises(spa.BadFile, match="is of another model, other data or other settings"):
        trained(checkpoint="c.pt", how={"rate": 0.02})
    Path("c.pt").write_bytes(b"no checkpoint")
    with pytest.raises(spa.BadFile, match="can't be read as one"):
        trained(checkpoint="c.pt")


def test_a_checkpoint_of_another_model_is_refused_and_left_as_it_is(folder: Path) -> None:
    words = ("--data", "d.npz", "--labels", "labels", "--epochs", "1", "--checkpoint", "c.pt")
    assert run("finetune", "small.onnx", "-o", "t.onnx", *words).exit_code == 0
    kept = Path("c.pt").read_bytes()
    refused(folder, "finetune", "m.onnx", "-o", "o.onnx", *words, says="--checkpoint c.pt is of another model")
    assert Path("c.pt").read_bytes() == kept
    assert not Path("o.onnx").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_best(folder: Path) -> None:
    found = trained(how={"rate": 1e30})
    assert "the loss became nan in epoch 1: the best model before it was kept" in found.stopped
    assert found.best.number == 0
    before = {n: values(spa.load("small.onnx").graph, n) for n in constant_values(spa.load("small.onnx").graph)}
    assert all(np.array_equal(before[n], v) for n, v in held(found).items())


def test_a_metric_that_is_no_number_stops_and_keeps_the_best(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([50.0, 20.0, 60.0, float("nan"), 90.0])  # the teacher's, then epochs 0, 1, 2
    monkeypatch.setattr("spa.budgets.quality.measure", lambda *_: next(figures))
    found = trained()
    assert "the accuracy became nan in epoch 2: the best model before it was kept" in found.stopped
    assert (found.best.number, found.best.value, len(found.history)) == (1, 60.0, 2)
    figures = iter([50.0, float("nan"), 60.0, 55.0])
    assert trained(how={"epochs": 2}).best.number == 1


def test_nothing_gets_worse(folder: Path) -> None:
    found = trained(how={"rate": 1e6, "epochs": 1})
    assert found.best.value >= found.history[0].value


def test_rates_rise_and_fall() -> None:
    training = spa.Training(rate=1.0, warmup=0.1)
    rates = [rate_at(s, 100, training) for s in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001


def test_samples_are_dealt_out_anew_and_all_of_them(folder: Path) -> None:
    samples = Samples(batches(), spa.Training(batch=32), ["x"])
    epochs = [np.concatenate([b["x"] for b in samples.epoch(e)]) for e in (1, 1, 2)]
    assert np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], epochs[2])
    assert np.array_equal(np.sort(epochs[0], axis=0), np.sort(epochs[2], axis=0))
    assert len(samples) == 8


def test_pictures_are_moved_and_mirrored() -> None:
    images = np.arange(64 * 256, dtype=np.float32).reshape(64, 1, 16, 16)
    made = moved(images, np.random.default_rng(0))
    assert made.shape == images.shape
    inner = images[:, 0, 8, 8]
    assert all(inner[i] in made[i] for i in range(64))
    assert 16 < sum(made[i, 0, 8, 5] > made[i, 0, 8, 9] for i in range(64)) < 48


def test_the_command(folder: Path) -> None:
    result = run("finetune", "small.onnx", "--data", "d.npz", "--labels", "labels", "--teacher", "m.onnx", "--epochs", "2", "-o", "t.onnx",
                 "--rate", "0.01", "--batch", "20")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "epoch 2/2: loss" in result.stderr
    assert "before" in result.stdout
    assert set(constant_values(spa.load("t.onnx").graph)) == set(constant_values(spa.load("small.onnx").graph))


@pytest.mark.parametrize(("words", "says"), [
    (("--data", "plain.npz"), "There is nothing to learn from: give labels with the data (--labels), or a --teacher."),
    ((), "give some with --data"),
    (("--data", "d.npz", "--labels", "labels", "--epochs", "0"), "--epochs is 0, but must be 1 or more"),
    (("--data", "plain.npz", "--teacher", "m.onnx", "--loss", "cross-entropy"), "--loss cross-entropy needs labels"),
    (("--data", "d.npz", "--labels", "labels", "--loss", "kl"), "--loss kl needs a --teacher"),
    (("--data", "d.npz", "--labels", "labels", "--device", "cuda:7"), "--device cuda:7 is not there"),
    (("--data", "plain.npz", "--teacher", "none.onnx"), "none.onnx"),
])  # fmt: skip
def test_what_is_refused(folder: Path, words: tuple[str, ...], says: str) -> None:
    refused(folder, "finetune", "small.onnx", "-o", "t.onnx", *words, says=says)
