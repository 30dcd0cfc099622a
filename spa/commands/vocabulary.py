"""The options --vocab … of `spa prune`, and what is written and told of a pruned vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from spa.api import Result
from spa.budgets.budget import Budget
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.plans.companions import Companions, Written
from spa.storage.files import Pieces
from spa.vocabularies.tokenizer_file import read_tokenizer
from spa.vocabularies.vocabulary import map_name
from spa.vocabularies.vocabulary_choice import read_keep
from spa.vocabularies.vocabulary_prune import Wish, configs, remapped, special_ids, tokenizer_beside, tokenizer_name


@dataclass(frozen=True)
class Beside:
    """What is written beside a model, and what is said of it."""

    files: Sequence[tuple[Path, Pieces]] = ()
    data: dict[str, Any] = field(default_factory=dict)
    shown: Sequence[Text] = ()


def wish_of(keep: str | None, side: str, place: str, inputs: list[str] | None, tokenizer: str | None, model: Path) -> Wish | None:
    """What the options ask for; None without --vocab. Raises BadOption or BadFile."""
    if keep is None:
        for option, given in {"--vocab-side": side != "both", "--vocab-map": place != "file", "--vocab-input": inputs is not None}.items():
            if given:
                raise BadOption(f"{option} says how a vocabulary is pruned: say what it keeps with --vocab.")
        return None
    read = None if tokenizer is None else read_tokenizer(Path(tokenizer))
    return Wish(read_keep(keep), side, place, None if inputs is None else tuple(inputs), read, special_ids(model))


def check(wish: Wish | None, budget: Budget, steps: int) -> None:
    """Raises BadOption for what does not go together with --vocab: data with ids that are gone can't be measured on."""
    if wish is not None and (budget.asks or budget.judges or steps > 1):
        raise BadOption("--vocab goes with --ratio, --drop-layers or alone, as --target, --metric and --steps run pruned models on data "
                        "that hold ids that went: prune the vocabulary first, then its result with these.")  # fmt: skip


def targets(wish: Wish | None, output: Path, model: Path) -> dict[str, Path]:
    """Files that will be written beside the model, by what they are."""
    if wish is None:
        return {}
    found = {"the map of ids": map_name(output)}
    if wish.tokenizer is not None:
        found["the tokenizer"] = tokenizer_name(output)
    return found | {f"the new {name}": _config_name(output, name) for name in configs(model)}


def _config_name(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem if output.suffix else output.name}.{name}")


def beside(wish: Wish | None, result: Result, evidence: Evidence | None, output: Path, model: Path) -> Beside:
    """Tokenizer and configurations for the kept ids, and a sentence on what is left of the vocabulary. The map is the result's own."""
    ids = result.ids
    if wish is None or ids is None:
        return Beside()
    files, compared = tokenizer_beside(wish, result, evidence, output)
    files += [(_config_name(output, n), [json.dumps(remapped(d, ids), indent=2).encode()]) for n, d in configs(model).items()]
    takes = "old ids" if ids.promise.place == "graph" else "new ids"
    gives = f", {' and '.join(ids.outputs)} {'has' if len(ids.outputs) == 1 else 'have'} a column for each new id" if ids.outputs else ""
    said = f"vocabulary: {len(ids.kept):,} of {ids.promise.size:,} ids stay; {', '.join(ids.fed) or 'no input'} takes {takes}{gives}"
    told = {"ids": len(ids.kept), "of": ids.promise.size, "inputs": list(ids.fed), "inputs_hold": takes, "outputs": dict(ids.outputs),
            "tokenizer_compared_on": compared}  # fmt: skip
    lines = [Text(said)]
    if wish.tokenizer is not None:
        how = "not compared with the old one" if not compared else f"encodes all {compared:,} words compared as the old one does"
        lines.append(Text(f"tokenizer: {how}"))
    return Beside(files, {"vocabulary": told}, lines)


def companions(result: Result, found: Companions | None, model: Path, output: Path) -> Written:
    """The configurations beside the model as they belong beside the result, with new ids if any went and the model takes new ones."""
    ids = result.ids
    remap = None if ids is None or ids.promise.place == "graph" else lambda data: remapped(data, ids)
    return result.companions(found, model, output, remap=remap)
