"""Calibration data from text: tokens in rows, the other inputs of language models, and one sentence for whatever is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from calibration_cases import ids, read, refusal, sizes, together, traced, vectors, without

from spa.data.calibration import calibration
from spa.errors import BadFile, BadOption

WORDS = "the a cat dog sat ran on under mat tree".split()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    module = pytest.importorskip("tokenizers")
    made = module.Tokenizer(module.models.WordLevel({w: i for i, w in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = module.pre_tokenizers.Whitespace()
    made.enable_truncation(3)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    made.save(str(path))
    return path


def corpus(count: int, seed: int = 0) -> tuple[str, list[int]]:
    found = np.random.default_rng(seed).integers(1, 11, count)
    return "".join(WORDS[i - 1] + (" \n"[n % 7 == 0]) for n, i in enumerate(found)), found.tolist()


def test_text_is_cut_into_rows(tmp_path: Path, tokenizer: Path) -> None:
    text, wanted = corpus(103)
    (tmp_path / "a.txt").write_text(text)
    found = calibration(tmp_path / "a.txt", ids(), tokenizer=tokenizer, length=10, batch=4)
    assert found.samples is None
    assert "text in" in found.name
    batches = read(tmp_path / "a.txt", ids(), tokenizer=tokenizer, length=10, batch=4)
    assert sizes(batches, "input_ids") == [4, 4, 2]
    assert together(batches, "input_ids").ravel().tolist() == wanted[:100]
    assert batches[0]["input_ids"].dtype == np.int64
    assert sizes(read(tmp_path / "a.txt", ids(), tokenizer=tokenizer.parent, length=10, samples=3), "input_ids") == [3]


def test_text_in_folders_and_compressed(tmp_path: Path, tokenizer: Path) -> None:
    (one, first), (other, second) = corpus(33), corpus(40, 1)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text(one, encoding="utf-8-sig")
    (folder / "b.txt.gz").write_bytes(gzip.compress(other.encode()))
    batches = read(folder, ids(), tokenizer=tokenizer, length=10)
    assert together(batches, "input_ids").ravel().tolist() == (first + second)[:70]


def test_long_text_is_read_in_blocks(tmp_path: Path, tokenizer: Path) -> None:
    text, wanted = corpus(60_000)
    (tmp_path / "a.txt").write_text(text)
    batches = read(tmp_path / "a.txt", ids(), tokenizer=tokenizer, length=100, samples=10_000)
    assert together(batches, "input_ids").ravel().tolist() == wanted


LANGUAGE = """c = Cast<to=1>(attention_mask) p = Gather(pt, position_ids) g = Gather(st, token_type_ids) e = Gather(t, input_ids)
    a = Add(e, p) y = Add(a, g) z = Concat<axis=2>(past, past) m = Neg(c)"""


def test_the_other_inputs_of_a_language_model(tmp_path: Path, tokenizer: Path) -> None:
    inputs = """int32[n,s] input_ids, int64[n,t] attention_mask, int64[n,s] position_ids, int64[n,s] token_type_ids, float[n,2,p,8] past,
        bool[1] use_cache_branch"""
    model = traced(
        f"{inputs} -> float[n,s,4] y, float[n,2,q,8] z, float[n,t] m, bool[1] b", LANGUAGE + " b = Not(use_cache_branch)",
        t=(50, 4), pt=(24, 4), st=(2, 4),
    )  # fmt: skip
    (tmp_path / "a.txt").write_text(corpus(60)[0])
    (batch,) = read(tmp_path / "a.txt", model, tokenizer=tokenizer)
    assert batch["input_ids"].shape == (2, 24)  # as far as there are positions
    assert batch["input_ids"].dtype == np.int32
    assert batch["attention_mask"].tolist() == [[1] * 24] * 2
    assert batch["position_ids"].tolist() == [list(range(24))] * 2
    assert batch["token_type_ids"].tolist() == [[0] * 24] * 2
    assert batch["past"].shape == (2, 2, 0, 8)
    assert batch["use_cache_branch"].tolist() == [False]
    assert "24 positions" in refusal(BadOption, tmp_path / "a.txt", model, tokenizer=tokenizer, length=25)
    (drawn,) = read(None, model, samples=3, length=9)
    assert {n: v.shape for n, v in drawn.items() if n != "use_cache_branch"} == {
        "input_ids": (3, 9), "attention_mask": (3, 9), "position_ids": (3, 9), "token_type_ids": (3, 9), "past": (3, 2, 0, 8),
    }  # fmt: skip


def test_text_for_a_model_of_fixed_shape(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text(corpus(64)[0])
    model = traced("int64[3,5] input_ids -> float[3,5,4] y", "y = Gather(t, input_ids)", t=(50, 4))
    found = calibration(tmp_path / "a.txt", model, tokenizer=tokenizer)
    assert [b["input_ids"].shape for b in found] == [(3, 5)] * 4
    assert "--length 6 does not fit" in refusal(BadOption, tmp_path / "a.txt", model, tokenizer=tokenizer, length=6)
    flat = traced("int64[5] words -> float[5,4] y", "y = Gather(t, words)", t=(50, 4))
    assert [b["words"].shape for b in read(tmp_path / "a.txt", flat, tokenizer=tokenizer, samples=2)] == [(5,)] * 2


def test_a_directory_of_hugging_face(tmp_path: Path) -> None:
    """Without tokenizer.json: transformers reads what it finds."""
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    text, wanted = corpus(40)
    (tmp_path / "a.txt").write_text(text)
    batches = read(tmp_path / "a.txt", ids(), tokenizer=folder, length=10)
    assert together(batches, "input_ids").ravel().tolist() == [i + 4 for i in wanted]
    (tmp_path / "empty").mkdir()
    assert "can't be read" in refusal(BadFile, tmp_path / "a.txt", ids(), tokenizer=tmp_path / "empty")


def test_text_that_does_not_fit(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(corpus(30)[0])
    assert "--tokenizer tokenizer.json" in refusal(BadOption, path, ids())
    assert "gives 30 tokens" in refusal(BadOption, path, ids(), tokenizer=tokenizer)
    assert "no.json does not exist" in refusal(BadFile, path, ids(), tokenizer=tmp_path / "no.json")
    assert "no input of the model takes token ids" in refusal(BadOption, path, vectors(), tokenizer=tokenizer)
    assert "a table of 8" in refusal(BadOption, path, ids(table=8), tokenizer=tokenizer, length=5)
    other = ids("int64[n,s] input_ids, float[n,4] extra")
    assert "'extra' is no ids" in refusal(BadOption, path, other, tokenizer=tokenizer)
    past = ids("int64[n,s] input_ids, float[n,2,16,4] past")
    assert "past of fixed length" in refusal(BadOption, path, past, tokenizer=tokenizer)


def test_text_and_tokenizers_that_can_not_be_read(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("caffè".encode("latin1"))
    assert "not UTF-8" in refusal(BadFile, path, ids(), tokenizer=tokenizer, length=2)
    (tmp_path / "b.gz").write_bytes(b"no gzip")
    assert "b.gz can't be read" in refusal(BadFile, tmp_path / "b.gz", ids(), tokenizer=tokenizer)
    (tmp_path / "c.gz").write_bytes(gzip.compress(corpus(5000)[0].encode())[:200])
    assert "c.gz can't be read" in refusal(BadFile, tmp_path / "c.gz", ids(), tokenizer=tokenizer)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"a": 1}))
    path.write_text("the cat")
    assert "broken.json can't be read" in refusal(BadFile, path, ids(), tokenizer=broken)


def test_text_without_tokenizers(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    without(monkeypatch, "tokenizers")
    assert "spa-prune[text]" in refusal(BadOption, tmp_path / "a.txt", ids(), tokenizer=tokenizer)
