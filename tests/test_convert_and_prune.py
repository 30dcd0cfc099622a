"""One command from a framework's file to a pruned model: what the folder holds, and what is refused without leaving any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import spa
from tools import convert_and_prune as tool

ROOT = Path(__file__).parent.parent
NET = (f"{ROOT / 'tests' / 'intake_nets.py'}:seeded", "--input", "image:1x3x8x8", "--multiple-of", "1", "--no-bench")
FILES = ["conversion.json", "model.onnx", "report.html", "report.json", "report.md", "small.onnx", "small.plan.json"]


@pytest.fixture
def torch() -> Any:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'spa-prune[torch]')")
    return pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: object, says: str, code: int = 2) -> None:
    """One sentence, an exit code, and nothing left behind."""
    before = sorted(folder.iterdir())
    assert tool.main([str(w) for w in words]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert said.err.rstrip().count("\n") == 0
    assert sorted(folder.iterdir()) == before


def test_all_is_in_the_folder(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", image=rng.standard_normal((64, 3, 8, 8)).astype(np.float32))
    (tmp_path / "out").mkdir()  # an empty folder makes room
    command = [sys.executable, str(ROOT / "tools" / "convert_and_prune.py"), *NET[:-1], "--target", "macs=0.5", "--calibration", "data.npz",
               "--criterion", "obspa", "-o", "out", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["files"] == FILES == sorted(os.listdir(tmp_path / "out"))
    assert data["conversion"]["parity"]["passed"]
    assert data["proof"]["passed"]
    assert data["repair"]["layers"]
    assert len(data["latency"][0]["laps"]) == 2
    assert data["after"]["macs"] <= 0.5 * data["before"]["macs"]
    monkeypatch.chdir(tmp_path)
    onnx.checker.check_model("out/small.onnx", full_check=True)
    applied = spa.apply("out/model.onnx", "out/small.plan.json")
    assert applied.after.macs == data["after"]["macs"]
    assert json.loads(Path("out/conversion.json").read_text())["output"] == "out/model.onnx"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "out"]
    assert not any(b".out-" in (tmp_path / "out" / name).read_bytes() for name in FILES)  # nobody sees where it was made


def test_without_data_nothing_is_repaired(torch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*NET, "--ratio", "0.5", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "the same as PyTorch gives" in said
    assert "Repair: none, as there are no data; give some with --calibration" in said
    assert "removing equals masking" in said
    assert sorted(os.listdir(tmp_path / "out")) == FILES


def test_what_is_refused_before_anything_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "a").touch()
    file.touch()
    out = ("-o", tmp_path / "out")
    refused(tmp_path, capsys, "net.pt2", "-o", full, says="is not empty: give a new folder")
    refused(tmp_path, capsys, "net.pt2", "-o", file, says="is a file; give the name of a folder")
    refused(tmp_path, capsys, "net.pt2", "-o", tmp_path / "no" / "out", says="there is no folder")
    refused(tmp_path, capsys, "net.pt2", *out, says="net.pt2: there is no such file or folder")
    refused(tmp_path, capsys, file, *out, says="none of what can be converted")
    refused(tmp_path, capsys, "net.pt2", *out, "--target", "macs=2x", says="macs")
    refused(tmp_path, capsys, "net.pt2", *out, "--target", "macs=0.5", "--ratio", "0.5", says="ratio")
    refused(tmp_path, capsys, "net.pt2", *out, "--repair", "obspa", says="give some with --calibration")
    refused(tmp_path, capsys, "net.pt2", *out, "--criterion", "best", says="best")
    refused(tmp_path, capsys, "net.pt2", says="See --help")


def test_what_fails_on_the_way_leaves_nothing(torch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("-o", tmp_path / "out")
    refused(tmp_path, capsys, *NET, *out, "--exclude", "*", code=1, says="the options leave no channel to remove")
    branch = NET[0].replace("seeded", "Branch")
    refused(tmp_path, capsys, branch, "--input", "x:2x4", *out, code=1, says="does not give what PyTorch gives")
