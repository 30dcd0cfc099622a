"""Models to calibrate, and readings of their data that are checked as they are made."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest
from test_trace import groups_of, net

from spa.data.calibration import calibration
from spa.graph.trace import Traced
from spa.proof.feeds import Feeds


def traced(values: str, body: str, **weights: Any) -> Traced:
    return groups_of(net(values, body, **weights)).traced


def vectors(batch: str = "n") -> Traced:
    return traced(f"float[{batch},4] x -> float[{batch},4] y", "y = Relu(x)")


def two() -> Traced:
    return traced("float[n,4] x, int64[n] k -> float[n,4] y, int64[n] j", "y = Relu(x) j = Abs(k)")


def image(shape: str = "n,3,8,8", kind: str = "float") -> Traced:
    return traced(f"{kind}[{shape}] x -> {kind}[{shape}] y", "y = Identity(x)")


def ids(inputs: str = "int64[n,s] input_ids", table: int = 50) -> Traced:
    return traced(f"{inputs} -> float[n,s,4] y", "y = Gather(t, input_ids)", t=(table, 4))


def rows(count: int, width: int = 4) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def same(one: list[Feeds], other: list[Feeds]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
        for a, b in zip(one, other, strict=True)
    )


def read(source: Any, model: Traced, **options: Any) -> list[Feeds]:
    """All batches, after a check that a second reading, and one after a reading that was left early, give the same."""
    found = calibration(source, model, **options)
    batches = list(found)
    next(iter(found), None)
    assert same(batches, list(found))
    return batches


def sizes(batches: list[Feeds], name: str = "x") -> list[int]:
    return [b[name].shape[0] for b in batches]


def together(batches: list[Feeds], name: str = "x") -> np.ndarray:
    return np.concatenate([b[name] for b in batches])


def refusal(kind: type[Exception], source: Any, model: Traced, **options: Any) -> str:
    """The sentence with which opening or reading ends."""
    with pytest.raises(kind) as caught:
        list(calibration(source, model, **options))
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert not re.search(r"[.!?] [A-Z]", text), f"more than one sentence: {text}"
    return text


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
