"""Sensitivity: each group alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from repair_cases import drawn
from test_cli import convnet, frozen_net, refused, run
from test_sweep import folder  # noqa: F401

import spa
from spa.budgets.sensitivity import layers_of
from spa.timing import share

DATA = ("--calibration", "d.npz", "--multiple-of", "1")


def measured(*args: Any) -> dict[str, Any]:
    result = run("sensitivity", "m.onnx", *DATA, *args, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_each_group_alone(folder: Path) -> None:  # noqa: F811
    data = measured("--ratio", "0.25,0.5", "--evaluate", "d.npz")
    assert [g["name"] for g in data["groups"]] == ["w1:0", "w3:0"]
    assert data["metric"] == "kl"
    for group in data["groups"]:
        assert [w["width"] for w in group["widths"]] == [group["size"] * 3 // 4, group["size"] // 2]
        for width in group["widths"]:
            args = ("--ratio", width["ratio"], "--include", group["name"], *DATA, "--evaluate", "d.npz", "--repair", "none")
            result = run("sweep", "m.onnx", "-o", f"{group['name'][:2]}{width['width']}", *args, "--json")
            point = json.loads(result.stdout)["points"][0]
            assert point["costs"] == pytest.approx(width["costs"], rel=1e-3)  # a file's last byte is not counted
            assert point["costs"]["macs"] == width["costs"]["macs"]
            assert point["quality"] == pytest.approx(width["quality"], rel=1e-5)
            assert width["lost"] == pytest.approx(width["quality"] - data["quality"])


def test_coupled_layers_are_named(folder: Path) -> None:  # noqa: F811
    groups = spa.analyze("m.onnx").groups
    assert [(layer.node, layer.op, layer.weights) for layer in layers_of(groups, groups.by_name["w1:0"])] == [
        ("conv1", "Conv", ("w1",)), ("conv2", "Conv", ("w2",)), ("fc1", "Gemm", ("w3",))]  # fmt: skip
    assert all(layer.matrix for layer in layers_of(groups, groups.by_name["w1:0"]))
    shown = run("sensitivity", "m.onnx", *DATA)
    assert "conv1, conv2 and 1 more" in shown.stdout
    assert "fc1, fc2" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120


def test_files(folder: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    data = measured("-o", "s.csv", "-o", "s.json", "-o", "s.png", "--ratio", "0.5")
    assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "s.csv").read_text().splitlines()[0].startswith("group,channels,layers,ratio,width,kl,lost,macs,")
    assert len((folder / "s.csv").read_text().splitlines()) == 3
    assert json.loads((folder / "s.json").read_text())["groups"] == data["groups"]


def test_repairs_lose_less(folder: Path) -> None:  # noqa: F811
    plain, repaired = (measured("--ratio", "0.5", "--repair", r)["groups"][0]["widths"][0]["lost"] for r in ("none", "obspa"))
    assert repaired < plain


@pytest.mark.skipif(share.cores() < 2, reason="one core")
def test_workers_give_the_same(folder: Path) -> None:  # noqa: F811
    one, two = measured("--jobs", "1"), measured("--jobs", "2")
    for a, b in zip(one["groups"], two["groups"], strict=True):
        np.testing.assert_allclose([w["quality"] for w in a["widths"]], [w["quality"] for w in b["widths"]], rtol=1e-4)


def test_widths_that_rounding_forbids_are_told(folder: Path) -> None:  # noqa: F811
    result = run("sensitivity", "m.onnx", "--calibration", "d.npz", "--multiple-of", "16", "--json")
    data = json.loads(result.stdout)
    assert data["notes"]["w1:0"].startswith("no width below its own")
    assert [w["width"] for w in data["groups"][1]["widths"]] == [48, 32, 16]


@pytest.mark.parametrize(("args", "says"), [
    (("--criterion", "l7"), "no criterion 'l7'"), (("--ratio", "2"), "between 0 and 1"), (("--repair", "glue"), "--repair is 'glue'"),
    (("-o", "s.pdf"), ".csv, .json or .png"), (("-o", "m.csv/x.csv"), "no folder"), (("--jobs", "1000"), "cores"),
    (("--metric", "accuracy"), "--labels"), (("--metric", "beauty"), "beauty"), (("--multiple-of", "0"), "--multiple-of"),
    (("--exclude", "*"), "Nothing"),
])  # fmt: skip
def test_bad_options(folder: Path, args: tuple[str, ...], says: str) -> None:  # noqa: F811
    refused(folder, "sensitivity", "m.onnx", *DATA, *args, says=says, code=1 if says == "Nothing" else 2)


def test_quality_needs_data(folder: Path) -> None:  # noqa: F811
    refused(folder, "sensitivity", "m.onnx", says="there are no data")
    refused(folder, "sensitivity", "m.onnx", "--repair", "obspa", "--evaluate", "d.npz", says="--calibration")


def test_nothing_to_prune(folder: Path) -> None:  # noqa: F811
    onnx.save(frozen_net(), "frozen.onnx")
    np.savez("f.npz", x=drawn((8, 4), 0).astype(np.float32))
    refused(folder, "sensitivity", "frozen.onnx", "--calibration", "f.npz", says="Nothing to prune", code=1)


def test_a_metric_that_is_nan(folder: Path) -> None:  # noqa: F811
    onnx.save(convnet(shape=("n", 3, 8, 8), width=16, nan=True), "m.onnx")
    refused(folder, "sensitivity", "m.onnx", *DATA, says="NaN")
