"""`spa weights`: files of a framework's arrays, cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_acting import apart
from test_cli import run
from test_trees import numbers

import spa


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A model, a plan and the weights in a folder."""
    (tmp_path / "net.onnx").write_bytes(apart().SerializeToString())
    spa.prune(tmp_path / "net.onnx", 0.5, multiple_of=1).save(tmp_path / "small.onnx", plan=tmp_path / "plan.json")
    flat = {f"{k}.{n}": a for k, part in numbers("keras").items() for n, a in part.items()}
    np.savez(tmp_path / "net.npz", **flat)
    return tmp_path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_written_under_the_same_names(made: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed (pip install safetensors)")
    out = made / f"out{suffix}"
    result = run("weights", made / "net.onnx", made / "plan.json", made / "net.npz", "-o", out)
    assert result.exit_code == 0, result.output
    assert "6 of 6 arrays are smaller" in result.output
    small = dict(np.load(out)) if suffix == ".npz" else safetensors.load_file(out)
    assert {n: a.shape for n, a in small.items()} == {
        "a.kernel": (3, 3, 3, 4), "n.gamma": (4,), "n.beta": (4,), "n.mean": (4,), "n.var": (4,), "b.kernel": (1, 1, 4, 4)}
    again = run("weights", made / "net.onnx", made / "plan.json", made / "net.npz", "--pruned", made / "small.onnx", "-o", made / "b.npz")
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(np.load(made / "b.npz")["a.kernel"], small["a.kernel"])


@pytest.mark.parametrize(("weights", "out", "says"), [
    ("net.npz", "out.txt", "weights are read and written as .npz or .safetensors"), ("none.npz", "out.npz", "There is no file"),
    ("plan.json", "out.npz", "weights are read and written as"), ("bad.npz", "out.npz", "can't be read as a file of weights"),
    ("net.npz", "net.npz", "net.npz"), ("other.npz", "out.npz", "what these arrays lose: x"),
    ("pickled.npz", "out.npz", "can't be read as a file of weights"),
])  # fmt: skip
def test_refused(made: Path, weights: str, out: str, says: str) -> None:
    (made / "bad.npz").write_bytes(b"PK\x03\x04")
    np.savez(made / "other.npz", x=np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), **np.load(made / "net.npz"))
    np.savez(made / "pickled.npz", x=np.array([{}], object))
    before = {p.name: p.read_bytes() for p in made.iterdir()}
    result = run("weights", made / "net.onnx", made / "plan.json", made / weights, "-o", made / out)
    assert result.exit_code == 2
    assert says in result.stderr
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before
