"""A tokenizer.json whose vocabulary shrinks: which ids it can't do without, and what is left of it with the others gone.

Text whose old tokens are all kept gets the same tokens, under their new ids:

* BPE (Sennrich et al. 2016, arXiv 1508.07909) makes a token by merges of two others. With every merge that makes a kept token kept, and
  what it merges (`closed`), the cheapest merge of a text that led to kept tokens is there, and none that comes before it is new.
* WordPiece takes the longest token that fits: a longer one is not new, the one that was taken is there.
* Unigram takes the likeliest division, which is among those that are left. WordLevel looks whole words up.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadFile, BadOption, SpaError

PADDING = 1024  # rows of a table beyond the tokenizer's ids: exporters round its length up
KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
_BYTES = frozenset(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]))


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json as it was read."""

    path: Path
    data: Mapping[str, Any]

    @cached_property
    def kind(self) -> str:
        """Kind of its model."""
        return str(self.data["model"]["type"])

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token -> id, of the model alone."""
        vocab = self.data["model"]["vocab"]
        return {str(t): int(i) for t, i in vocab.items()} if isinstance(vocab, Mapping) else {str(e[0]): i for i, e in enumerate(vocab)}

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids of added tokens, special ones among them."""
        return frozenset(int(t["id"]) for t in self.data.get("added_tokens") or ())

    @cached_property
    def size(self) -> int:
        """One more than its largest id."""
        return max([-1, *self.tokens.values(), *self.added]) + 1

    @cached_property
    def unknown(self) -> int | None:
        """The id that it gives for what it has no token for."""
        model = self.data["model"]
        if isinstance(model.get("unk_id"), int):
            return int(model["unk_id"])
        return self.tokens.get(model.get("unk_token") or "")

    @cached_property
    def always(self) -> frozenset[int]:
        """Ids that it must keep: added and unknown ones, and single bytes, without which there is text that it can't write."""
        found = set(self.added) | ({self.unknown} if self.unknown is not None else set())
        if "ByteLevel" in json.dumps([self.data.get("pre_tokenizer"), self.data.get("normalizer")]):
            found |= {self.tokens[c] for c in _BYTES if c in self.tokens}
        if self.data["model"].get("byte_fallback"):
            found |= {i for b in range(256) if (i := self.tokens.get(f"<0x{b:02X}>")) is not None}
        return frozenset(found)

    @cached_property
    def parts(self) -> dict[int, set[int]]:
        """Id -> ids that merges make it of."""
        found: dict[int, set[int]] = {}
        for one, two, made in self._merges():
            found.setdefault(made, set()).update((one, two))
        return found

    def _merges(self) -> Iterator[tuple[int, int, int]]:
        model = self.data["model"]
        prefix = model.get("continuing_subword_prefix") or ""
        for merge in model.get("merges") or ():
            one, two = merge.split(" ", 1) if isinstance(merge, str) else merge
            made = one + (two[len(prefix) :] if prefix and two.startswith(prefix) else two)
            if one in self.tokens and two in self.tokens and made in self.tokens:
                yield self.tokens[one], self.tokens[two], self.tokens[made]

    def closed(self, ids: Iterable[int], known: set[int] | None = None) -> set[int]:
        """These ids and all that merges make them of, less those that are known to be there."""
        known = known or set()
        found: set[int] = set()
        waiting = list(ids)
        while waiting:
            one = waiting.pop()
            if one not in found and one not in known:
                found.add(one)
                waiting += self.parts.get(one, ())
        return found

    def check_fits(self, rows: int) -> None:
        """Raises BadOption if it is not the tokenizer of a model whose table has that many rows."""
        if not self.size <= rows <= self.size + PADDING:
            raise BadOption(
                f"{self.path} is a tokenizer that does not match: it has {self.size} ids, but the model's table has {rows} rows; "
                "give the model's own tokenizer, or none (--vocab also takes a file of ids)."
            )

    def filtered(self, kept: NDArray[np.int64]) -> dict[str, Any]:
        """What is left with ids `kept`, ascending, under their new ids 0, 1, 2 …"""
        new = {int(old): i for i, old in enumerate(kept)}
        data: dict[str, Any] = copy.deepcopy(dict(self.data))
        model = data["model"]
        if isinstance(model["vocab"], Mapping):
            model["vocab"] = {t: new[i] for t, i in self.tokens.items() if i in new}
        else:
            model["vocab"] = [e for i, e in enumerate(model["vocab"]) if i in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[int(model["unk_id"])]
        if model.get("merges"):
            there = model["vocab"]
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [m for m in model["merges"] if _whole(m, prefix, there)]
        data["added_tokens"] = [{**t, "id": new[int(t["id"])]} for t in data.get("added_tokens") or ()]
        _renumber(data.get("post_processor"), new)
        padding = data.get("padding")
        if isinstance(padding, dict) and int(padding.get("pad_id", -1)) in new:
            padding["pad_id"] = new[int(padding["pad_id"])]
        return data


def _whole(merge: str | Sequence[str], prefix: str, there: Mapping[str, int]) -> bool:
    """Whether what is merged and what is made are all there."""
    one, two = merge.split(" ", 1) if isinstance(merge, str) else merge
    made = one + (two[len(prefix) :] if prefix and two.startswith(prefix) else two)
    return one in there and two in there and made in there


def _renumber(part: Any, new: Mapping[int, int]) -> None:
    """Ids in what a post-processor puts around text: {"ids": [101]} of templates, ["[SEP]", 102] of BERT's and RoBERTa's."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        if key == "ids" and isinstance(value, list):
            part[key] = [new[int(i)] for i in value]
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            part[key] = [value[0], new[int(value[1])]]
        else:
            _renumber(value, new)


def read_tokenizer(path: Path) -> TokenizerFile:
    """A tokenizer.json, or the one in a folder. Raises BadFile, or BadOption for a kind that can't be rewritten."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise BadFile(f"The tokenizer {file} can't be read: {reason}; give a tokenizer.json of Hugging Face.") from error
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise BadFile(f"The tokenizer {file} has no model with a vocabulary: give a tokenizer.json of Hugging Face.")
    model.setdefault("type", "BPE" if "merges" in model else "WordPiece")
    if model["type"] not in KINDS:
        raise BadOption(f"The tokenizer {file} is of kind {model['type']!r}, which can't be rewritten; the choice is: {', '.join(KINDS)}.")
    try:
        found = TokenizerFile(file, data)
        whole = bool(found.size) and found.always is not None and found.parts is not None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadFile(f"The tokenizer {file} is damaged ({type(error).__name__} {error}): give one of Hugging Face.") from error
    if not whole:
        raise BadFile(f"The tokenizer {file} has no tokens: give a tokenizer.json of Hugging Face.")
    return found


def verify(old: TokenizerFile, small: Mapping[str, Any], kept: NDArray[np.int64], rows: Iterable[NDArray[Any]]) -> int | None:
    """Encodes the words of rows of ids with both tokenizers, as far as their old tokens are all kept; returns how many were compared.

    None without the package `tokenizers`. Raises SpaError where one comes out differently.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    before, after = Tokenizer.from_str(json.dumps(dict(old.data))), Tokenizer.from_str(json.dumps(dict(small)))
    new = np.full(old.size, -1, np.int64)
    inside = kept[kept < old.size]
    new[inside] = np.arange(len(inside))
    words = {w for row in rows for w in _words(before.decode(row[row < old.size].tolist(), skip_special_tokens=True))}
    compared = 0
    for word in sorted(words):
        wanted = new[np.asarray(before.encode(word, add_special_tokens=False).ids, np.int64)]
        if (wanted < 0).any():
            continue
        compared += 1
        if after.encode(word, add_special_tokens=False).ids != wanted.tolist():
            raise SpaError(f"The rewritten tokenizer encodes {word!r} in another way than {old.path}, so nothing was written.")
    return compared


def _words(text: str) -> Iterator[str]:
    """Words as they stand in a text, with the blank before them, and stretches of eight."""
    words = text.split(" ")
    for i, word in enumerate(words):
        yield (" " if i else "") + word
    for i in range(0, len(words), 8):
        yield " ".join(words[i : i + 8])
