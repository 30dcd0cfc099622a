"""Ablation: each unit's score is what the metric loses with that unit zero, mean or swapped, restated with other weights in numpy."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_depth import D, H, analysed, data, decoder, inner, outputs, softmax, zeroed
from test_trace import net
from typer.testing import CliRunner

import spa
from spa.cli import app
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.layers.ablate import ablate

W = D // H


def without_head(model: onnx.ModelProto, layer: int, head: int) -> onnx.ModelProto:
    """The same model with a head's rows of the output weight zero."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name == f"wo{layer}":
            array = numpy_helper.to_array(tensor).copy()
            array[head * W : (head + 1) * W] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return made


def kl(dense: onnx.ModelProto, other: onnx.ModelProto) -> float:
    rows = [(softmax(outputs(dense, b).astype(np.float64)), softmax(outputs(other, b).astype(np.float64))) for b in data()]
    return float(np.mean([(p * np.log(p / q)).sum(-1).mean() for p, q in rows]))


def test_zeroed_heads() -> None:
    model = decoder(2)
    found = ablate(*analysed(model))
    assert [(s.block, s.head) for s in found.scores] == [(k, h) for k in range(2) for h in range(H)]
    assert found.dense == pytest.approx(0, abs=1e-9)
    for score in found.scores:
        assert score.head is not None
        assert score.drop == pytest.approx(kl(model, without_head(model, score.block, score.head)), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("unit, names", [("layers", ["wo0", "wd0", "wo1", "wd1"]), ("mlp", ["wd0", "wd1"]), ("attention", ["wo0", "wo1"])])
def test_zeroed_layers(unit: str, names: list[str]) -> None:
    model = decoder(2)
    found = ablate(*analysed(model), unit=unit)
    wanted = [kl(model, zeroed(model, name, name.replace("wd", "bd"))) for name in names]
    assert [s.drop for s in found.scores] == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_means_and_swaps_of_heads() -> None:
    """The last layer's heads: what flows past them is known from inner values."""
    model = decoder(1)
    arrays = {a.name: numpy_helper.to_array(a).astype(np.float64) for a in model.graph.initializer}
    seen = inner(model, "o0", "x0", "y0")  # (n, heads, tokens, width)
    mean = np.concatenate([s["o0"] for s in seen]).astype(np.float64).mean((0, 2), keepdims=True)
    for mode in ("mean", "swap"):
        found = ablate(*analysed(model), mode=mode, metric="error")
        for score in found.scores:
            errors, norms = 0.0, 0.0
            for s in seen:
                o = s["o0"].astype(np.float64)
                changed = o.copy()
                changed[:, score.head] = (np.broadcast_to(mean, o.shape) if mode == "mean" else np.roll(o, 1, axis=0))[:, score.head]
                merged = changed.transpose(0, 2, 1, 3).reshape(len(o), -1, D)
                y = s["x0"] + merged @ arrays["wo0"]
                z = (y + np.maximum(y @ arrays["wu0"], 0) @ arrays["wd0"] + arrays["bd0"]) @ arrays["wh"]
                errors, norms = errors + ((z - s["y"]) ** 2).sum(), norms + (s["y"].astype(np.float64) ** 2).sum()
            assert score.drop == pytest.approx(errors / norms, rel=1e-3, abs=1e-9)


def test_heads_of_one_operator() -> None:
    """Opset 23's attention with shared keys and values, its heads in one flat axis."""
    body = ("q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) p = MatMul(o, wo) "
            "s = Add(x, p) y = MatMul(s, wh)")
    model = net("float[n,5,8] x -> float[n,5,6] y", body, opset=23, ir=10, wq=(8, 12), wk=(8, 6), wv=(8, 6), wo=(12, 8), wh=(8, 6))
    analysis = spa.analyze(model)
    batches = [{"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}]
    found = ablate(analysis, Evidence("data", batches, analysis.normal.model, False), metric="error")
    dense = outputs(model, batches[0])
    assert len(found.scores) == 4
    for score in found.scores:
        other = onnx.ModelProto()
        other.CopyFrom(model)
        for tensor in other.graph.initializer:
            if tensor.name == "wo" and score.head is not None:
                array = numpy_helper.to_array(tensor).copy()
                array[score.head * 3 : score.head * 3 + 3] = 0
                tensor.CopyFrom(numpy_helper.from_array(array, "wo"))
        wanted = ((outputs(other, batches[0]) - dense) ** 2).sum() / (dense**2).sum()
        assert score.drop == pytest.approx(wanted, rel=1e-3)


def test_refusals() -> None:
    analysis, evidence = analysed(decoder(1))
    for options, words in (({"unit": "cells"}, "--unit"), ({"mode": "half"}, "--mode"), ({"metric": "nothing"}, "no metric"),
                           ({"metric": "perplexity"}, "needs labels"), ({"output": "z"}, "no output 'z'")):  # fmt: skip
        with pytest.raises(BadOption, match=words):
            ablate(analysis, evidence, **options)  # type: ignore[arg-type]
    single = Evidence("one", [{"x": data()[0]["x"][:1]}], analysis.normal.model, False)
    with pytest.raises(BadOption, match="second sample"):
        ablate(analysis, single, mode="swap")
    plain = spa.analyze(net("float[2,6] x -> float[2,5] y", "h = MatMul(x, w) y = MatMul(h, v)", w=(6, 8), v=(8, 5)))
    with pytest.raises(BadOption, match="no heads"):
        ablate(plain, evidence)


def test_command_line(tmp_path: Path) -> None:
    onnx.save(decoder(2), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=data(1, 8)[0]["x"])
    files = [str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz")]
    call: list[Any] = ["ablate", *files, "--unit", "layers", "-o", str(tmp_path / "s.csv")]
    made = CliRunner().invoke(app, call)
    assert made.exit_code == 0, made.output
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["kind"] for r in rows] == ["attention", "mlp"] * 2
    assert all(float(r["drop"]) > 0 for r in rows)
    refused = CliRunner().invoke(app, [*call, "--metric", "accuracy"])
    assert refused.exit_code == 2
    assert "labels" in refused.output


def test_the_heads_that_are_missed_most_stay(tmp_path: Path) -> None:
    """The list names coordinates that, removed, are those heads; a plan that takes it keeps them."""
    model = decoder(2)
    found = ablate(*analysed(model))
    heads = [s for s in found.scores if s.coordinates]
    assert len(heads) == 2 * H
    lines = found.protect(0.25)
    most = sorted(heads, key=lambda s: -s.drop)[: round(0.25 * 2 * H)]
    groups = spa.analyze(model).groups
    plan = spa.plan(model, 0.5, multiple_of=1, units=["head"], protect=lines.splitlines())
    for score in most:
        for group, coordinate in score.coordinates:
            assert groups.by_name[group].kind == "head"
            assert coordinate == score.head
            assert coordinate in plan.groups[group]["kept"]
    assert spa.plan(model, 0.5, multiple_of=1, units=["head"], protect=found.protect(1e-9).splitlines()).groups
    with pytest.raises(BadOption, match="--keep-top is 0"):
        found.protect(0)
    with pytest.raises(BadOption, match="take --unit heads"):
        ablate(*analysed(model), unit="mlp").protect(0.2)


def test_a_list_of_what_stays_on_the_command_line(tmp_path: Path) -> None:
    onnx.save(decoder(2), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", **{k: np.concatenate([b[k] for b in data()]) for k in data()[0]})
    keep = tmp_path / "keep.txt"
    args = ["ablate", tmp_path / "m.onnx", "-o", tmp_path / "s.csv", "--data", tmp_path / "data.npz", "--protect-out", keep]
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "keep.txt").read_text().startswith(f"# {round(0.2 * 2 * H)} coordinates")
    wish = ["plan", tmp_path / "m.onnx", "-o", tmp_path / "p.json", "--ratio", "0.5", "--units", "head", "--protect", tmp_path / "keep.txt"]
    assert CliRunner().invoke(app, [str(a) for a in wish]).exit_code == 0
    refused = CliRunner().invoke(app, [str(a) for a in [*args, "--keep-top", "2"]])
    assert refused.exit_code == 2
    assert "--keep-top is 2" in refused.output
