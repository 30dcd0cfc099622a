"""What the user says of inputs (`--input`) against what the model takes, before anything is converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spa.errors import BadOption
from spa.intake.remote import Reader

Sizes = Sequence[int | str | None]


def fitted(reader: Reader, given: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """The shapes given, by the names that the model has; those without a name are in its order. Raises BadOption where one does not fit.

    A size fits if the model leaves it free, if the user does, or if both say the same. Where a network takes whatever comes, as a torch
    module does, its inputs are what the user says, and all fits.
    """
    if not given:
        return {}
    own = {str(entry["name"]): entry["shape"] for entry in reader.inputs()}
    return {_fitting(name, shape, own): shape for name, shape in given.items()}


def _fitting(name: str, shape: Sizes, own: Mapping[str, Any]) -> str:
    called = list(own)[int(name)] if name.isdigit() and name not in own and int(name) < len(own) else name
    if called not in own:
        listed = ", ".join(f"{n} ({_shown(sizes)})" for n, sizes in own.items())
        raise BadOption(f"--input {name}: the model has no such input; it has: {listed}.")
    takes = own[called]
    if takes is None or not shape:
        return called
    if len(shape) != len(takes) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(shape, takes, strict=True)):
        raise BadOption(f"--input {called} is {_shown(shape)}, but the model takes {_shown(takes)}: give one that fits, or leave it out.")
    return called


def _shown(shape: Sizes | None) -> str:
    """1x3x224x224; ? for a free size without a name."""
    if shape is None:
        return "any shape"
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"
