"""Races: laps are there for every model. Nothing is said about how long they take."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from test_trace import net

import spa
from spa.errors import UnsupportedModel


def models() -> dict[str, spa.Model]:
    made = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", w1=(4, 8), w2=(8, 5))
    return {"dense": spa.load(made), "small": spa.prune(made, 0.5, multiple_of=1).model}


X = {"x": np.ones((2, 4), np.float32), "unknown": np.ones(1)}


@pytest.mark.parametrize("rounds, seconds, expected", [(5, 60, 5), (1, 60, 1), (50, 0, 3)])
def test_every_model_gets_a_lap(rounds: int, seconds: float, expected: int) -> None:
    race = spa.race(models(), X, rounds=rounds, seconds=seconds, threads=1)
    assert [lap.name for lap in race.laps] == ["dense", "small"]
    assert race.rounds == expected
    assert (race.threads, race.provider, race.version) == (1, "CPUExecutionProvider", ort.__version__)
    assert race.laps[0].ratio == 1
    for lap in race.laps:
        assert 0 < lap.low <= lap.median <= lap.high
        assert lap.ratio > 0


def test_feeds_of_their_own() -> None:
    other = net("float[3,4] z -> float[3,4] y", "y = Relu(z)")
    race = spa.race({**models(), "other": spa.load(other)}, [X, X, {"z": np.ones((3, 4), np.float32)}], rounds=1)
    assert len(race.laps) == 3
    with pytest.raises(ValueError):
        spa.race(models(), [X], rounds=1)


def test_a_model_that_does_not_load() -> None:
    with pytest.raises(UnsupportedModel):
        spa.race({"bad": spa.load(net("float[2,4] x -> float[2,4] y", "y = my.Strange(x)"))}, X)
