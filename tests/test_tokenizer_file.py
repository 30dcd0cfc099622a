"""Tokenizers of fewer ids: text of kept tokens is divided as before, for each kind; broken ones and other kinds are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa.errors import BadFile, BadOption, SpaError
from spa.vocabularies.tokenizer_file import read_tokenizer, verify

tokenizers = pytest.importorskip("tokenizers")

TEXT = ["the cat sat on the mat", "a cat and a dog that sat there", "dogs and cats and other things", "the other matter is the dog"] * 4


def trained(kind: str) -> Any:
    """A tokenizer of the package, trained on a few words."""
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    special = ["<unk>", "<end>"]
    made, trainer = {
        "BPE": lambda: (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=80, special_tokens=special)),
        "WordPiece": lambda: (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)),
        "Unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")),
        "WordLevel": lambda: (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(special_tokens=special)),
    }[kind]()
    found = tokenizers.Tokenizer(made)
    found.pre_tokenizer = pre.ByteLevel(add_prefix_space=False) if kind == "BPE" else pre.Whitespace()
    found.train_from_iterator(TEXT, trainer)
    return found


def saved(folder: Path, kind: str) -> Path:
    path = folder / "tokenizer.json"
    trained(kind).save(str(path))
    return path


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram", "WordLevel"])
def test_kept_text_is_divided_as_before(tmp_path: Path, kind: str) -> None:
    old = read_tokenizer(saved(tmp_path, kind))
    encode = tokenizers.Tokenizer.from_file(str(old.path)).encode
    wanted = encode("the cat sat on the mat").ids
    kept = np.array(sorted(old.closed({*wanted, *old.always})))
    assert len(kept) < old.size
    small = old.filtered(kept)
    after = tokenizers.Tokenizer.from_str(json.dumps(small))
    assert after.get_vocab_size() == len(kept)
    assert [int(kept[i]) for i in after.encode("the cat sat on the mat").ids] == wanted
    for token, new in after.get_vocab().items():
        assert tokenizers.Tokenizer.from_file(str(old.path)).token_to_id(token) == kept[new]
    assert verify(old, small, kept, [np.array(wanted)])


def test_a_token_needs_what_it_is_made_of(tmp_path: Path) -> None:
    old = read_tokenizer(saved(tmp_path, "BPE"))
    there = old.tokens["there"] if "there" in old.tokens else max(old.tokens.values())
    parts = old.closed([there])
    assert len(parts) > 2
    assert all(old.parts.get(i, set()) <= parts for i in parts)
    assert old.closed([there], known=parts) == set()


def test_another_division_is_found(tmp_path: Path) -> None:
    old = read_tokenizer(saved(tmp_path, "BPE"))
    kept = np.arange(old.size)
    broken = old.filtered(kept)
    broken["model"]["merges"] = []
    ids = tokenizers.Tokenizer.from_file(str(old.path)).encode("the cat").ids
    with pytest.raises(SpaError, match="encodes .* in another way"):
        verify(old, broken, kept, [np.array(ids)])


def test_single_bytes_and_added_tokens_always_stay(tmp_path: Path) -> None:
    old = read_tokenizer(saved(tmp_path, "BPE"))
    assert {old.tokens[c] for c in "thecat"} <= old.always
    assert {0, 1} <= old.always
    assert old.unknown == 0


def test_rows_beyond_the_ids_may_be_padding(tmp_path: Path) -> None:
    old = read_tokenizer(saved(tmp_path, "WordPiece"))
    old.check_fits(old.size)
    old.check_fits(old.size + 64)
    for rows in (old.size - 1, old.size + 5000):
        with pytest.raises(BadOption, match="does not match"):
            old.check_fits(rows)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"model": {}}', '{"model": {"type": "BPE", "vocab": {"a": "x"}}}', '{"model": {"type": "BPE", "vocab": {}}}'],
)
def test_files_that_are_no_tokenizers(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadFile, match="tokenizer"):
        read_tokenizer(tmp_path)


def test_other_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Magic", "vocab": {"a": 0}}}')
    with pytest.raises(BadOption, match="'Magic'"):
        read_tokenizer(tmp_path)
