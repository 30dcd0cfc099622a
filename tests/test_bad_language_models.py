"""What users of language models get wrong, on the command line: one sentence, exit code 2, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_cli import refused
from test_signatures_fused import layer, width_of

import spa
from models.llama import LlamaConfig, write_llama

IDS = 200


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Llama of two blocks with a cache, text, and a tokenizer of more words than the model has ids."""
    monkeypatch.chdir(tmp_path)
    write_llama(LlamaConfig(2, hidden=32, heads=4, kv_heads=2, mlp=48, vocab=IDS), tmp_path / "m")
    Path("text.txt").write_text(" ".join(f"w{i % (2 * IDS)}" for i in range(2000)))
    Path("tokenizer.json").write_text(json.dumps(words(2 * IDS)))
    Path("protect.txt").write_text("headz.*: 3\n")
    return tmp_path


def words(count: int) -> dict[str, Any]:
    """A tokenizer of whole words."""
    vocab = {"[UNK]": 0, **{f"w{i}": i for i in range(1, count)}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}}  # fmt: skip


TEXT = ("--calibration", "text.txt", "--tokenizer", "tokenizer.json", "--samples", "4", "--length", "16")


@pytest.mark.parametrize(("args", "says"), [
    (("--ratio", "0.25", "--criterion", "wanda", *TEXT), "looks up a table of 200: give the model's own tokenizer"),
    (("--drop-layers", "1", *TEXT), "give the model's own tokenizer"),
    (("--vocab", "0.5", "--tokenizer", "tokenizer.json"), "a tokenizer that does not match: it has 400 ids"),
    (("--vocab", "0.5", "--target", "macs=0.5"), "run pruned models on data that hold ids that went"),
    (("--ratio", "0.25", "--protect", "protect.txt"), "--protect, line 1 ('headz.*: 3'): 'headz.*' matches no group"),
    (("--drop-layers", "4", "--layers", "random", "--layer-kind", "mlp"), "--drop-layers asks for 4 of 2"),
    (("--drop-layers", "balance", "--layers", "random"), "--target params"),
    (("--drop-layers", "1"), "look"),
])  # fmt: skip
def test_one_sentence(folder: Path, args: tuple[str, ...], says: str) -> None:
    if "text.txt" in args:
        pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    refused(folder, "prune", "m/model.onnx", "-o", "s.onnx", "--no-bench", *args, says=says)


def test_head_widths_that_a_kernel_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GroupQueryAttention takes head widths that are multiples of 8: a plan of 20 of 24 is refused before anything runs."""
    monkeypatch.chdir(tmp_path)
    onnx.save(layer(), "m.onnx")
    made = json.loads(spa.plan(layer(), 0.5, multiple_of=1, include=[width_of(layer(), 24)]).to_json())
    made["model_sha256"] = spa.load("m.onnx").sha256
    for entry in made["groups"].values():
        entry["kept"] = list(range(20))
    Path("p.json").write_text(json.dumps(made))
    refused(tmp_path, "apply", "m.onnx", "p.json", "-o", "s.onnx", says="where a multiple of 8 is needed")


def test_scores_of_what_is_not_there(folder: Path) -> None:
    np.savez("scores.npz", **{"model.layers.9.mlp.gate_proj.weight:1": np.ones(48)})
    refused(folder, "prune", "m/model.onnx", "-o", "s.onnx", "--no-bench", "--ratio", "0.5", "--scores", "scores.npz", says="layers.9")
