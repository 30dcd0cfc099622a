"""Damaged models give a pruned model or one SpaError, never anything else."""

from __future__ import annotations

import lzma
import random
import time
from pathlib import Path

import onnx
import pytest

from models import weightless
from tools.fuzz import attempt, damage

ZOO = Path(__file__).parent.parent / "models" / "zoo"
GRAPHS = ["recurrent.script", "resnext.script", "mixer.script"]
MANY = 100  # a graph; three to five seconds, bounded by the clock for slow machines
SECONDS = 8.0
OUTCOMES = {"pruned", "NothingToPrune", "BadModel", "UnsupportedModel", "BadFile", "CheckFailed"}


def outcomes(graph: str, seed: int, count: int, seconds: float) -> set[str]:
    source = weightless.load(ZOO / f"{graph}.onnx.xz").SerializeToString()
    found = set()
    start = time.monotonic()
    for number in range(count):
        if time.monotonic() - start > seconds:
            break
        rng = random.Random(seed * 1_000_000 + number)
        model = onnx.load_from_string(source)
        how = damage(model, rng)
        try:
            found.add(attempt(model.SerializeToString(), number))
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {how}: {type(error).__name__}: {error}") from error
    return found


@pytest.mark.parametrize("graph", GRAPHS)
def test_damaged_models(graph: str) -> None:
    found = outcomes(graph, 1, MANY, SECONDS)
    assert "pruned" in found or "NothingToPrune" in found
    assert len(found) > 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("graph", GRAPHS)
def test_damaged_models_at_length(graph: str, seed: int) -> None:
    outcomes(graph, seed, 600, 120.0)


def test_the_same_seed_damages_alike() -> None:
    models = [weightless.load(ZOO / "recurrent.script.onnx.xz") for _ in range(2)]
    ways = [damage(m, random.Random(5)) for m in models]
    assert ways[0] == ways[1]
    assert models[0].SerializeToString() == models[1].SerializeToString()


def test_bytes_that_are_no_model() -> None:
    source = weightless.load(ZOO / "recurrent.script.onnx.xz").SerializeToString()
    rng = random.Random(0)
    for number in range(20):
        data = bytearray(source[: rng.randrange(len(source))])
        for _ in range(3):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        attempt(bytes(data), number)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "crashers").glob("*.xz")), ids=lambda p: p.name)
def test_what_crashed_once(path: Path) -> None:
    """Damaged models that tools.fuzz found, named by the error and the place; large weights are zeros now."""
    assert attempt(lzma.decompress(path.read_bytes()), 0) in OUTCOMES
