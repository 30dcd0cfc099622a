"""Memory that analysing, pruning and proving take, over the size of the file; and what happens where the disk is full."""

import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import spa
from models.llama import LlamaConfig, write_llama
from spa.errors import BadFile
from spa.storage.spill import Spill
from tools.bench_size import measured

FORTY = LlamaConfig(1, 1024, 8, 2, 2816, 4000, float16=True)  # MB
FIVE_HUNDRED = LlamaConfig(7, 1536, 12, 4, 4096, 26000, float16=True, cache=True)


def _file(model: Path) -> int:
    return model.stat().st_size + model.with_name(f"{model.name}.data").stat().st_size


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    model = write_llama(FORTY, tmp_path)
    assert 35e6 < _file(model) < 60e6
    spa.prune(write_llama(LlamaConfig(float16=True), tmp_path / "warm"), 0.25, check=False)  # modules and caches
    tracemalloc.start()
    try:
        spa.prune(model, 0.25, check=False).save(tmp_path / "small.onnx")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.75 * _file(model)
    assert 0.4 < _file(tmp_path / "small.onnx") / _file(model) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("command,share", [
    (["inspect"], 0.2), (["prune", "--ratio", "0.25", "--no-bench", "--no-check"], 0.4),
    (["prune", "--ratio", "0.25", "--no-bench", "--memory", "1GB"], 2.0),
])  # fmt: skip
def test_half_a_gigabyte(tmp_path: Path, command: list[str], share: float) -> None:
    large, tiny = write_llama(FIVE_HUNDRED, tmp_path / "large"), write_llama(LlamaConfig(8, float16=True, cache=True), tmp_path / "tiny")
    assert 460e6 < _file(large) < 540e6
    resident = []
    for model in (large, tiny):
        written = [] if command[0] == "inspect" else ["-o", str(tmp_path / f"{model.parent.name}.onnx")]
        resident.append(measured([sys.executable, "-m", "spa", command[0], str(model), *written, *command[1:]]).resident)
    assert resident[0] - resident[1] < share * _file(large)


@pytest.mark.parametrize("command", [
    ["prune", "--ratio", "0.25", "--no-bench"], ["prune", "--vocab", "0.9", "--drop-layers", "1", "--layers", "random", "--no-bench"],
    ["rewrite", "--all"],
], ids=["channels", "ids and layers", "rewritten"])  # fmt: skip
def test_no_room_for_the_result_is_one_sentence_and_no_file(tmp_path: Path, command: list[str]) -> None:
    model = write_llama(LlamaConfig(hidden=256, heads=4, kv_heads=2, mlp=512, vocab=2000), tmp_path / "model")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    out = tmp_path / "out"
    out.mkdir()
    words = [command[0], str(model), "-o", str(out / "small.onnx"), *command[1:]]
    done = subprocess.run([sys.executable, "-m", "spa", *words], preexec_fn=small_files, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "small.onnx.data: it cannot be written (File too large); choose another folder or make room" in done.stderr
    assert os.listdir(out) == []


def test_no_room_for_values_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", save)
    spill = Spill(0)
    with pytest.raises(BadFile, match=r"No space left on device\): make room there"):
        spill.keep(np.zeros(1 << 20))
    spill.close()
