"""Companions: the files beside a language model that tell runtimes its sizes, written anew beside the pruned model.

    config.json          Hugging Face: a number that differs from layer to layer becomes a list, and a note says so
    genai_config.json    onnxruntime-genai: it reads one number for all layers, so that layers which differ are refused
    tokenizers, generation settings     copied as they are

A field changes only if it held what the graph shows before the removal; everything else stays as it was, in its order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadFile, BadOption, UnsupportedModel
from spa.graph.analysis import Analysis
from spa.graph.numbers import HEADS, HIDDEN, KEY_VALUES, KEY_WIDTH, LAYERS, NEURONS, TOKENS, VALUE_WIDTH, Number, numbers_of

CONFIG, GENAI, GENERATION = "config.json", "genai_config.json", "generation_config.json"
COPIED = (
    GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip

Remap: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]

_FIELDS: Mapping[str, str] = {
    "num_attention_heads": HEADS, "n_head": HEADS, "num_heads": HEADS,
    "num_key_value_heads": KEY_VALUES, "num_kv_heads": KEY_VALUES,
    "head_dim": KEY_WIDTH, "head_size": KEY_WIDTH, "v_head_dim": VALUE_WIDTH,
    "hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN,
    "intermediate_size": NEURONS, "n_inner": NEURONS, "ffn_dim": NEURONS,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS,
    "vocab_size": TOKENS,
}  # fmt: skip
"""Fields of both files -> what they count."""


@dataclass(frozen=True)
class Companions:
    """Files found beside a model: the two that are written anew, as read, and those that are copied. note: why none are."""

    folder: Path
    read: Mapping[str, dict[str, Any]]
    copied: tuple[str, ...]
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.read, *self.copied)


@dataclass(frozen=True)
class Written:
    """Files to write with the model, and what people should know of them."""

    files: tuple[tuple[Path, list[bytes]], ...] = ()
    notes: tuple[str, ...] = ()


def find_companions(model: Path, output: Path, choice: str | None = None) -> Companions | None:
    """The companions that go with a result; None if there are none, or none are wanted.

    choice: a folder, "none", or None for the model's own folder, from which nothing is taken if the result goes there too; a note says so.
    Raises BadFile for one that is no JSON object, BadOption for a folder without any, or where a file of another model would be lost.
    """
    if choice == "none":
        return None
    folder = model.parent if choice is None else Path(choice)
    there = {name for name in (CONFIG, GENAI, *COPIED) if (folder / name).is_file()}
    if choice is not None and not there & {CONFIG, GENAI}:
        raise BadOption(f"--companions {choice}: there is neither {CONFIG} nor {GENAI} in that folder; give another, or none.")
    same = os.path.realpath(folder) == os.path.realpath(output.parent)
    if same and choice is not None:
        raise BadOption(f"--companions {choice}: the result goes to the same folder, where {CONFIG} is the model's own; write to another.")
    if not there & {CONFIG, GENAI}:
        return None
    if same:
        listed = " and ".join(n for n in (CONFIG, GENAI) if n in there)
        return Companions(folder, {}, (), f"not written: {listed}, as the result is in the model's own folder; write it to another.")
    found = Companions(folder, {n: _read(folder / n) for n in (CONFIG, GENAI) if n in there}, tuple(n for n in COPIED if n in there))
    for name, content in found.read.items():
        target = output.parent / name
        if target.is_file() and _kind(_read(target)) != _kind(content):
            raise BadOption(f"{target} belongs to another model and would be written over: choose another folder, or --companions none.")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} can't be read as JSON ({error}): repair it, or leave it out with --companions none.") from error
    if not isinstance(content, dict):
        raise BadFile(f"{path} holds no JSON object: repair it, or leave it out with --companions none.")
    return content


def _kind(content: Mapping[str, Any]) -> Any:
    """What says that two files describe networks of one kind."""
    inner = content.get("model")
    return content.get("model_type"), inner.get("type") if isinstance(inner, dict) else None


def rewritten(
    found: Companions | None, analysis: Analysis, gone: NDArray[np.bool_], model: Path, output: Path, *, remap: Remap | None = None
) -> Written:
    """The companions as they belong beside a pruned model. Raises UnsupportedModel where a runtime could not use it.

    remap: gives a configuration its new ids, where ids went; tokenizers are not copied then, as they give old ids.
    """
    if found is None or found.note:
        return Written(notes=() if found is None else (found.note,))
    numbers = numbers_of(analysis.dense.groups, analysis.groups, gone)
    files, notes = [], []
    for name, content in found.read.items():
        made = json.loads(json.dumps(content))  # a copy of plain data
        if name == GENAI:
            _genai(made, numbers, analysis, model.name, output.name)
        else:
            notes += _config(made, numbers)
        files.append((output.parent / name, _text(made if remap is None else _remapped(made, remap))))
    for name in found.copied:
        if remap is not None and name == GENERATION:
            files.append((output.parent / name, _text(_remapped(_read(found.folder / name), remap))))
        elif remap is None:
            files.append((output.parent / name, [_bytes(found.folder / name)]))
    return Written(tuple(files), tuple(notes))


def _text(content: Mapping[str, Any]) -> list[bytes]:
    return [(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()]


def _remapped(content: dict[str, Any], remap: Remap) -> dict[str, Any]:
    """New ids in a configuration, and in the section of onnxruntime-genai that holds ids."""
    inner = content.get("model")
    return remap({**content, "model": remap(inner)} if isinstance(inner, dict) else content)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path} can't be read ({error.strerror}): repair it, or leave it out with --companions none.") from error


def _changed(section: Mapping[str, Any], numbers: Mapping[str, Number]) -> dict[str, Number]:
    """Fields that hold what the graph showed before, and that show something else now."""
    found = {}
    for field, what in _FIELDS.items():
        number, old = numbers.get(what), section.get(field)
        if number is None or isinstance(old, bool) or not isinstance(old, int):
            continue
        if set(number.before) == {old} and set(number.after) != {old}:
            found[field] = number
    return found


def _config(content: dict[str, Any], numbers: Mapping[str, Number]) -> list[str]:
    """Writes a Hugging Face configuration anew, in place; returns notes."""
    section = content["text_config"] if isinstance(content.get("text_config"), dict) else content
    notes = []
    derived = _derived_width(section, numbers)
    if derived is not None:
        section["head_dim"] = derived
    for field, number in _changed(section, numbers).items():
        section[field] = number.one if number.one is not None else list(number.after)
        if number.one is None:
            listed = ", ".join(map(str, number.after))
            notes.append(f"{CONFIG}: {field} differs from layer to layer ({listed}): it is a list, which few runtimes read.")
    keys, values = numbers.get(KEY_WIDTH), numbers.get(VALUE_WIDTH)
    if keys is not None and values is not None and keys.one != values.one and set(keys.before) == set(values.before):
        section["v_head_dim"] = values.one if values.one is not None else list(values.after)
        notes.append(f"{CONFIG}: keys and values differ in width, so that v_head_dim says how wide values are; few runtimes read it.")
    return notes


def _derived_width(section: Mapping[str, Any], numbers: Mapping[str, Number]) -> int | None:
    """The width of a head, where the configuration leaves it to be worked out from numbers that have changed."""
    hidden, heads, width = numbers.get(HIDDEN), numbers.get(HEADS), numbers.get(KEY_WIDTH)
    if section.get("head_dim") is not None or hidden is None or heads is None or width is None or width.one is None:
        return None
    if len(set(hidden.before)) != 1 or len({*heads.before}) != 1 or hidden.before[0] != heads.before[0] * width.before[0]:
        return None
    same = hidden.one is not None and heads.one is not None and hidden.one == heads.one * width.one
    return None if same else width.one


def _genai(content: dict[str, Any], numbers: Mapping[str, Number], analysis: Analysis, was: str, now: str) -> None:
    """Writes the configuration of onnxruntime-genai anew, in place. Raises UnsupportedModel."""
    model = content.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        raise BadFile(f"{GENAI} has no model.decoder: repair it, or leave it out with --companions none.")
    for section in (model, decoder):
        for field, number in _changed(section, numbers).items():
            if number.one is None:
                raise UnsupportedModel(_differs(field, number))
            section[field] = number.one
    keys, values = numbers.get(KEY_WIDTH), numbers.get(VALUE_WIDTH)
    if "head_size" in decoder and keys is not None and values is not None and keys.one != values.one and keys.before[0] == values.before[0]:
        raise UnsupportedModel(
            f"{GENAI} has one head_size for keys and values, which are {keys.after[0]} and {values.after[0]} wide now: leave widths of "
            "heads whole with --exclude kind:qk --exclude kind:vo, or give --companions none if another runtime will run the model."
        )
    _numbered(decoder, analysis)
    if decoder.get("filename") == was:
        decoder["filename"] = now


def _differs(field: str, number: Number) -> str:
    usual = max(set(number.after), key=number.after.count)
    layers = [f"{i} ({n})" for i, n in enumerate(number.after) if n != usual]
    listed = ", ".join(layers[:8]) + (", …" if len(layers) > 8 else "")
    return (
        f"{GENAI} has one {field} for all layers, but they would differ: {usual} in most, and in layer {listed}. Take the same share of "
        "every layer (--scope local, --allocation uniform), leave these groups out with --exclude, or give --companions none if another "
        "runtime will run the model; nothing was written."
    )


def _numbered(decoder: Mapping[str, Any], analysis: Analysis) -> None:
    """The runtime counts caches from 0: every name up to the number of layers must be there."""
    inputs, layers = decoder.get("inputs"), decoder.get("num_hidden_layers")
    there = {t.name for t in analysis.edited.graph.inputs}
    for kind in ("past_key_names", "past_value_names"):
        pattern = inputs.get(kind) if isinstance(inputs, dict) else None
        if not isinstance(pattern, str) or pattern.count("%d") != 1 or not isinstance(layers, int):
            continue
        missing = [name for name in (pattern.replace("%d", str(i)) for i in range(layers)) if name not in there]
        if missing:
            raise UnsupportedModel(
                f"onnxruntime-genai numbers caches from 0 to {layers - 1}, but the model without the dropped layers has no input "
                f"{missing[0]!r}: drop the last layers alone, or give --companions none if another runtime will run the model."
            )


__all__ = ["Companions", "Written", "find_companions", "rewritten"]
