"""Pruning a vocabulary, from the wish to the files: ids chosen, rows and columns removed and proven, and what goes with it written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spa import api
from spa.data.evidence import Evidence
from spa.errors import BadFile
from spa.graph.analysis import Analysis, Source, analyze, evidence_for
from spa.layers.depth import Depth, without_layers
from spa.proof.check import TOLERANCE
from spa.proof.feeds import Feeds
from spa.repairs.repair import RepairOptions
from spa.stages import Stage, quiet
from spa.storage.files import Pieces
from spa.vocabularies.tokenizer_file import TokenizerFile, read_tokenizer, verify
from spa.vocabularies.vocabulary import Ids, vocabulary_group
from spa.vocabularies.vocabulary_choice import Keep, choose_ids, plan_vocabulary, read_keep

CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Wish:
    """What is asked of a vocabulary. keep: as `spa.vocabularies.vocabulary_choice.read_keep` takes it. inputs: that hold ids, None for
    those found.

    special: ids that stay in any case, beside those of the tokenizer.
    """

    keep: Keep
    sides: str = "both"
    place: str = "file"
    inputs: tuple[str, ...] | None = None
    tokenizer: TokenizerFile | None = None
    special: frozenset[int] = frozenset()

    @property
    def promise(self) -> dict[str, Any]:
        """As `analyze` takes it."""
        unknown = self.tokenizer.unknown if self.tokenizer is not None else None
        return {"inputs": self.inputs, "sides": self.sides, "place": self.place, "unknown": unknown}


def prune_vocabulary(
    model: Source,
    keep: str | int | float | Iterable[int],
    *,
    calibration: Any = None,
    tokenizer: str | Path | None = None,
    special: Iterable[int] = (),
    sides: str = "both",
    place: str = "file",
    inputs: Sequence[str] | None = None,
    ratio: float | None = None,
    drop_layers: Depth | None = None,
    check: bool = True,
    seed: int = 0,
    stage: Stage = quiet,
) -> api.Result:
    """Removes ids from a model: their rows of the tables that they look up, their columns of the logits.

    keep: a share of the ids below 1, a number of them, "used" (all in the calibration data), a file of ids, or ids. Of a share or a
    number those stay that are most frequent in `calibration`, or whose rows are largest where there is none. tokenizer: a tokenizer.json,
    whose special tokens, and parts of kept tokens, stay too. special: more ids that stay. sides: "both", "input" or "output". place:
    "file" (the pruned model takes new ids) or "graph" (it takes old ones). ratio: share of all other groups' channels that goes as well,
    by l2. drop_layers: layers that go first, as in `spa.prune`.
    Raises SpaError; BadOption for a tokenizer that does not match, and for one side of a tied table.

    >>> result = prune_vocabulary("model.onnx", 0.25, calibration=batches)
    >>> result.save("small.onnx")  # and small.vocab.json
    """
    read = None if tokenizer is None else read_tokenizer(Path(tokenizer))
    wish = Wish(read_keep(keep), sides, place, None if inputs is None else tuple(inputs), read, frozenset(special))
    analysis = analyze(model, vocabulary=wish.promise, stage=stage)
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage)
    return carried_out(analysis, wish, evidence, {}, ratio=ratio, check=check, seed=seed, depth=drop_layers, stage=stage)


def carried_out(
    analysis: Analysis, wish: Wish, evidence: Evidence | None, wishes: Mapping[str, Any], *, ratio: float | None = None, check: bool = True,
    seed: int = 0, feeds: Feeds | None = None, tolerance: float = TOLERANCE, repair: str | RepairOptions = "none",
    depth: Depth | None = None, stage: Stage = quiet,
) -> api.Result:  # fmt: skip
    """Plans and applies on what was read already. wishes: options of `spa.plan` for the other groups, which shrink if there is a ratio.

    depth: layers that go first.
    """
    if depth is not None:
        small, data, dropped = without_layers(analysis, depth, evidence, seed=seed, stage=stage)
        made = carried_out(small, wish, data, wishes, ratio=ratio, check=check, seed=seed, feeds=feeds, tolerance=tolerance, repair=repair,
                           stage=stage)  # fmt: skip
        return replace(made, plan=replace(made.plan, options={**made.plan.options, "depth": dropped.record}))
    kept = choose_ids(analysis.groups, wish.keep, evidence=evidence, tokenizer=wish.tokenizer, always=wish.special)
    beside = None
    if ratio is not None:
        own = f"/^{re.escape(vocabulary_group(analysis.groups).name)}$/"
        others = {**wishes, "exclude": (*wishes.get("exclude", ()), own)}
        beside = api.plan(analysis, ratio, calibration=evidence, seed=seed, stage=stage, **others)
    options = {} if evidence is None else {"calibration": evidence.name, "samples": evidence.samples}
    decided = plan_vocabulary(analysis, kept, options=options, beside=beside)
    mending = repair if beside is not None else "none"  # rows that are never asked for leave nothing to mend
    return api.apply(analysis, decided, check=check, seed=seed, feeds=feeds, tolerance=tolerance, repair=mending, calibration=evidence,
                     stage=stage)  # fmt: skip


# ---------------------------------------------------------------------- what goes with a model


def special_ids(model: Path) -> frozenset[int]:
    """Ids that the configurations beside a model name (bos_token_id and the like). Raises BadFile for one that can't be read."""
    found: set[int] = set()
    for data in configs(model).values():
        for value in _token_ids(data).values():
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return frozenset(found)


def configs(model: Path) -> dict[str, dict[str, Any]]:
    """The configurations that stand beside a model, by file name. Raises BadFile for one that can't be read."""
    found = {}
    for name in CONFIGS:
        path = model.with_name(name)
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadFile(f"{path}, which stands beside the model, can't be read as JSON: correct it or move it away.") from error
        if isinstance(data, dict):
            found[name] = data
    return found


def _token_ids(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k.endswith("_token_id") and v is not None}


def remapped(data: Mapping[str, Any], ids: Ids) -> dict[str, Any]:
    """A configuration with the new size of the vocabulary, and special ids under their new numbers; null for those that are gone."""

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new(i) for i in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        inside = 0 <= value < ids.promise.size and ids.new[value] >= 0
        return int(ids.new[value]) if inside else None

    changed = {k: new(v) for k, v in _token_ids(data).items()}
    size = {"vocab_size": len(ids.kept)} if "vocab_size" in data else {}
    return {**data, **changed, **size}


def tokenizer_name(model: Path) -> Path:
    """Where the tokenizer of a pruned model goes: small.onnx -> small.tokenizer.json."""
    return model.with_name(f"{model.stem if model.suffix else model.name}.tokenizer.json")


def tokenizer_beside(
    wish: Wish, result: api.Result, evidence: Evidence | None, output: Path
) -> tuple[list[tuple[Path, Pieces]], int | None]:
    """The tokenizer with the kept tokens, as a file to write, and on how many words of the calibration data it was compared.

    Raises SpaError where it divides kept text in another way than the old one.
    """
    if wish.tokenizer is None or result.ids is None:
        return [], None
    small = wish.tokenizer.filtered(result.ids.kept)
    rows = [np.asarray(row) for b in (evidence.batches if evidence is not None else ()) for n in result.ids.promise.inputs for row in b[n]]
    compared = verify(wish.tokenizer, small, result.ids.kept, rows)
    return [(tokenizer_name(output), [json.dumps(small, ensure_ascii=False, indent=1).encode()])], compared
