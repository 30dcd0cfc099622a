"""Text as a language model's inputs: files are tokenised piece by piece, the tokens laid end to end and cut into rows.

Which inputs take ids is read off the graph (their values look up rows of a table), the rest by name: masks are ones, positions 0, 1, 2 …,
segments zeros, and a past (key-values of earlier tokens) is empty.
"""

from __future__ import annotations

import gzip
import importlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import onnx

from spa.data.samples import Array, Input, Layout, Piece, piece, reason, with_added_axis
from spa.errors import BadFile, BadOption
from spa.graph.trace import Traced
from spa.proof.feeds import Feeds, _limits

SUFFIXES = (".txt", ".md", ".gz")
USUAL_LENGTH = 128
_BLOCK, _LINE = 1 << 16, 1 << 12  # characters that are tokenised at once, and how far the end of a line is looked for
_WHOLE = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.INT16, onnx.TensorProto.UINT32, onnx.TensorProto.UINT16)

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class TokenInputs:
    """What each input of a language model is for.

    Attributes
    ----------
    layout
        The model's inputs.
    roles
        Input -> ids, mask, position, segment, past or off.
    limits
        Length of the tables that inputs look up.
    length
        Tokens in a row.
    """

    layout: Layout
    roles: Mapping[str, str]
    limits: Mapping[str, int]
    length: int

    def shape(self, name: str, count: int) -> tuple[int, ...]:
        """The shape of an input for so many rows; free axes are the length, those of a past 0."""
        found = self.layout.inputs[name]
        free = 0 if self.roles[name] == "past" else self.length
        return tuple(count if a == found.axis else free if n is None else n for a, n in enumerate(found.sizes))

    def feeds(self, rows: Array) -> Feeds:
        """All inputs for rows of ids (rows, length)."""
        made: Feeds = {}
        for name, role in self.roles.items():
            found = self.layout.inputs[name]
            shape = self.shape(name, len(rows))
            if role == "ids":
                made[name] = rows.astype(found.dtype)
            elif role == "position":
                made[name] = np.broadcast_to(np.arange(shape[-1] if shape else 0), shape).astype(found.dtype)
            else:
                made[name] = np.full(shape, role == "mask").astype(found.dtype)
        return made


def token_inputs(traced: Traced, layout: Layout, length: int | None) -> TokenInputs | None:
    """Reads off a model what its inputs are for; None if none of them takes ids. length: None for the model's, or 128 where that is free.

    Raises BadOption if the length does not fit or an input has no known part in it.
    """
    limits = _limits(traced)
    kinds = {n: i.kind for n, i in layout.inputs.items()}
    named = {n: _role(n, i, limits) for n, i in layout.inputs.items()}
    ids = [n for n, role in named.items() if role == "ids"]
    if not ids:
        return None
    if all(len(layout.inputs[n].sizes) == 1 for n in ids) and not layout.added:  # tokens of one sample: its axis is no count of samples
        plain = {n: Input(n, i.sizes, None, kinds[n]) for n, i in layout.inputs.items()}
        layout = with_added_axis(Layout(plain, None))
    for name in ids:
        if len(layout.inputs[name].sizes) != 2 or layout.inputs[name].axis != 0:
            raise BadOption(f"Input {name!r} takes ids as {layout.inputs[name]}, not as rows of tokens: give the data as .npz.")
    for name, role in named.items():
        if role == "" or (role == "past" and None not in _inner(layout.inputs[name])):
            what = "takes a past of fixed length" if role == "past" else "is no ids, mask, positions, segments or past"
            raise BadOption(f"Input {name!r} {what}, so that text alone can't feed it: give the data as .npz with all of {layout.names}.")
    fixed = {s for n in ids if (s := layout.inputs[n].sizes[1]) is not None}
    if len(fixed) > 1 or (length is not None and fixed and fixed != {length}):
        raise BadOption(f"--length {length} does not fit input {ids[0]!r}, which takes {layout.inputs[ids[0]]}: leave it out.")
    tables = [limits[n] for n, role in named.items() if role == "position" and n in limits]
    found = length or (fixed.pop() if fixed else min([USUAL_LENGTH, *tables]))
    if tables and found > min(tables):
        raise BadOption(f"--length {found} is more than the {min(tables)} positions of the model: give less.")
    return TokenInputs(layout, named, limits, found)


def _inner(found: Input) -> list[int | None]:
    return [n for a, n in enumerate(found.sizes) if a != found.axis]


def _role(name: str, found: Input, limits: Mapping[str, int]) -> str:
    text = name.lower()
    if "use_cache" in text:
        return "off"
    if "mask" in text:
        return "mask"
    if found.kind not in _WHOLE:
        return "past" if re.search("past|cache|key_values", text) else ""
    if "token_type" in text or "segment" in text:
        return "segment"
    if "position" in text:
        return "position"
    return "ids" if _is_ids(name) or (name in limits and limits[name] == max(limits.values())) else ""


def _is_ids(name: str) -> bool:
    return re.search(r"input_?ids|^tokens$", name.lower()) is not None


# ---------------------------------------------------------------------- tokenizers


def tokenizer_of(given: str | Path) -> Encode:
    """Text -> ids, without special tokens, from a `tokenizer.json` or a Hugging Face directory (local files only).

    Raises BadFile if it can't be read, BadOption if the package that reads it is not installed.
    """
    path = Path(given)
    if not path.exists():
        raise BadFile(f"The tokenizer {path} does not exist: give a tokenizer.json or a directory that holds one.")
    if path.is_dir() and (path / "tokenizer.json").is_file() and _importable("tokenizers"):
        path = path / "tokenizer.json"
    if path.is_dir():
        return _from_directory(path)
    module = _package("tokenizers", "A tokenizer.json", "text")
    try:
        tokenizer = module.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception as error:  # the package raises bare Exceptions
        raise BadFile(f"The tokenizer {path} can't be read: {reason(error)}; give a tokenizer.json of Hugging Face.") from error
    return lambda text: cast("list[int]", tokenizer.encode(text, add_special_tokens=False).ids)


def _from_directory(path: Path) -> Encode:
    module = _package("transformers", "A directory without tokenizer.json", "dev")
    try:
        tokenizer = module.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the directory's class raises
        raise BadFile(f"The tokenizer in {path} can't be read: {reason(error)}; give a tokenizer.json.") from error
    return lambda text: cast("list[int]", tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _package(name: str, what: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadOption(f"{what} as tokenizer needs the package {name}: install it with pip install 'spa-prune[{extra}]'.") from error


# ---------------------------------------------------------------------- text


@dataclass(frozen=True)
class TextSource:
    """Text files as rows of tokens."""

    name: str
    files: tuple[Path, ...]
    encode: Encode
    inputs: TokenInputs
    tokenizer: str

    def pieces(self, rows: int) -> Iterator[Piece]:
        """At most `rows` rows at a time; what does not fill the last row is left out. Raises BadFile or BadOption."""
        length = self.inputs.length
        held: list[int] = []
        given = False
        for path in self.files:
            for text in _blocks(path):
                held += self._ids(text)
                while len(held) >= length:
                    count = min(rows, len(held) // length)
                    given = True
                    yield self._piece(np.array(held[: count * length], np.int64).reshape(count, length))
                    del held[: count * length]
        if not given:
            raise BadOption(
                f"{self.name} gives {len(held)} tokens, where one sample takes {length}: give more text"
                f"{f', or --length {len(held)} or less' if held else ''}."
            )

    def _ids(self, text: str) -> Sequence[int]:
        try:
            return self.encode(text)
        except Exception as error:  # foreign code
            raise BadFile(f"The tokenizer {self.tokenizer} fails on {self.name}: {reason(error)}; try another one.") from error

    def _piece(self, rows: Array) -> Piece:
        for name, role in self.inputs.roles.items():
            limit = self.inputs.limits.get(name)
            if role == "ids" and limit is not None and int(rows.max()) >= limit:
                raise BadOption(
                    f"The tokenizer {self.tokenizer} gives id {int(rows.max())}, but input {name!r} looks up a table of {limit}: "
                    "give the model's own tokenizer."
                )
        return piece(self.name, self.inputs.feeds(rows), self.inputs.layout)


def _blocks(path: Path) -> Iterator[str]:
    try:
        with _opened(path) as stream:
            while text := stream.read(_BLOCK):
                yield text + stream.readline(_LINE)
    except UnicodeDecodeError as error:
        raise BadFile(f"The text {path} is not UTF-8 ({error.reason} at byte {error.start}): convert it first.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadFile(f"The text {path} can't be read: {reason(error)}.") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8-sig"))
    return path.open(encoding="utf-8-sig")


def text_source(
    name: str, files: Sequence[Path], traced: Traced, layout: Layout, tokenizer: str | Path | None, length: int | None
) -> TextSource:
    """Text files with a tokenizer. name: beginning of a sentence. Raises BadOption or BadFile."""
    inputs = token_inputs(traced, layout, length)
    if inputs is None:
        raise BadOption(f"{name} is text, but no input of the model takes token ids; its inputs are: {layout.names}.")
    if tokenizer is None:
        raise BadOption(f"{name} is text and needs the model's tokenizer: give --tokenizer tokenizer.json or a directory that holds one.")
    return TextSource(name, tuple(files), tokenizer_of(tokenizer), inputs, str(tokenizer))


__all__ = ["SUFFIXES", "TextSource", "TokenInputs", "text_source", "token_inputs", "tokenizer_of"]
