"""Races and what may be said about them. Nothing is said here about how long anything takes."""

from __future__ import annotations

import gc
import math
import os
import time

import numpy as np
import onnxruntime as ort
import pytest
from bench_cases import (
    Fake,
    X,
    fakes,  # noqa: F401
    named,
    text,
)
from test_trace import net

import spa
from spa.errors import BadOption, UnsupportedModel
from spa.tables import race_report
from spa.timing.bench import Race
from spa.timing.profiling import profiles
from spa.timing.ratios import FASTER, FEW, LEAST, SAME, SLOWER, Ratio, paired, verdict


def models() -> dict[str, spa.Model]:
    made = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", w1=(4, 8), w2=(8, 5))
    return {"dense": spa.load(made), "small": spa.prune(made, 0.5, multiple_of=1).model}


def one() -> spa.Model:
    return models()["dense"]


# ---------------------------------------------------------------------- what may be said


def timings(truth: float, *, rounds: int = 50, seed: int = 0, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Times of two models that share what disturbs a round, and have noise of their own; truth: the ratio of the undisturbed ones."""
    rng = np.random.default_rng(seed)
    shared = rng.lognormal(0, 0.5, rounds)  # rounds differ by far more than the models do
    first, other = (0.01 * factor * shared * rng.lognormal(0, noise, rounds) for factor in (1.0, truth))
    return first, other


@pytest.mark.parametrize("truth", [0.26, 0.7, 1.0, 1.43])
def test_a_known_ratio_is_found_where_rounds_differ_by_more(truth: float) -> None:
    first, other = timings(truth)
    found = paired(other, first)
    assert found.low <= found.middle <= found.high
    assert found.middle == pytest.approx(truth, rel=0.05)
    assert (found.high - found.low) / truth < 0.1
    by_medians = np.median(other) / np.median(first)  # what forgets the pairs is further off, on average
    assert abs(found.middle / truth - 1) < abs(by_medians / truth - 1) + 0.02


@pytest.mark.parametrize("rounds", [10, 50])
def test_intervals_cover_the_truth_as_often_as_they_say(rounds: int) -> None:
    found = [paired(*reversed(timings(0.8, rounds=rounds, seed=s)), seed=s) for s in range(200)]
    share = np.mean([r.low <= 0.8 <= r.high for r in found])
    assert 0.90 <= share <= 0.99, share


def test_a_heavy_tail_does_not_move_the_ratio() -> None:
    first, other = timings(0.8)
    other[::10] *= 50
    assert paired(other, first).middle == pytest.approx(0.8, rel=0.06)


def test_intervals_are_seeded_and_bounded_in_memory() -> None:
    first, other = timings(0.9, rounds=20)
    drawn = [paired(other, first, seed=s) for s in range(20)]
    assert len(set(drawn)) > 1
    assert drawn == [paired(other, first, seed=s) for s in range(20)]
    many = paired(np.tile(other, 100), np.tile(first, 100))
    assert many.high - many.low < paired(other, first).high - paired(other, first).low


def test_a_clock_that_stands_still_says_nothing() -> None:
    found = paired(np.array([1.0, 0.0]), np.ones(2))
    assert math.isnan(found.middle)
    assert verdict(found, 50) == SAME


@pytest.mark.parametrize("low, high, rounds, offset, says", [
    (0.90, 0.99, 50, 0.0, FASTER), (0.90, 1.00, 50, 0.0, SAME), (0.99, 1.01, 50, 0.0, SAME), (1.001, 1.1, 50, 0.0, SLOWER),
    (1.0, 1.1, 50, 0.0, SAME), (0.2, 0.3, LEAST, 0.0, FASTER), (0.2, 0.3, LEAST - 1, 0.0, FEW), (0.2, 0.3, 50, 0.05, FASTER),
    (0.93, 0.97, 50, 0.05, SAME), (1.02, 1.04, 50, 0.05, SAME), (1.06, 1.1, 50, 0.05, SLOWER),
])
def test_only_the_interval_says_faster(low: float, high: float, rounds: int, offset: float, says: str) -> None:
    assert verdict(Ratio((low + high) / 2, low, high), rounds, offset=offset) == says


def test_offset_of_a_model_against_itself() -> None:
    assert Ratio(1.0, 0.99, 1.01).offset == 0
    assert Ratio(1.02, 1.01, 1.03).offset == pytest.approx(0.03)
    assert Ratio(0.95, 0.92, 0.97).offset == pytest.approx(0.08)


# ---------------------------------------------------------------------- a race


@pytest.mark.parametrize("rounds, seconds, expected", [(5, 60, 5), (1, 60, 1), (50, 0, 3)])
def test_every_model_gets_a_lap(rounds: int, seconds: float, expected: int) -> None:
    race = spa.race(models(), X, rounds=rounds, seconds=seconds, threads=1)
    assert [lap.name for lap in race.laps] == ["dense", "small"]
    assert race.rounds == expected
    assert (race.threads, race.provider, race.kind, race.version) == (1, "cpu", "provider", f"onnxruntime {ort.__version__}")
    assert race.laps[0].ratio == 1
    for lap in race.laps:
        assert 0 < lap.low <= lap.median <= lap.high
        assert 0 < lap.ratio_low <= lap.ratio <= lap.ratio_high
        assert lap.cpu == lap.median
        assert min(lap.wall, lap.wall_ratio, lap.load, lap.first) > 0
        assert lap.memory is None or lap.memory >= 0
        assert lap.placement is not None
    assert (race.laps[0].verdict, race.laps[1].verdict) == ("", FEW)


def test_feeds_of_their_own() -> None:
    other = net("float[3,4] z -> float[3,4] y", "y = Relu(z)")
    race = spa.race({**models(), "other": spa.load(other)}, [X, X, {"z": np.ones((3, 4), np.float32)}], rounds=1)
    assert len(race.laps) == 3
    with pytest.raises(ValueError):
        spa.race(models(), [X], rounds=1)


def test_an_engine_that_tells_its_own_times_is_in_another_process() -> None:
    Fake.seconds = {"a": 7.0}
    race = spa.race({"A": named("a")}, X, engine="fake", rounds=3)
    assert (race.laps[0].median, race.laps[0].first, race.laps[0].memory) == (7.0, 7.0, None)


def test_a_model_that_does_not_load_or_run() -> None:
    with pytest.raises(UnsupportedModel):
        spa.race({"bad": spa.load(net("float[2,4] x -> float[2,4] y", "y = my.Strange(x)"))}, X)
    with pytest.raises(UnsupportedModel, match="dense does not run: .*invalid dimensions for input: x"):
        spa.race({"dense": one()}, {"x": np.ones((2, 7), np.float32)})


def test_what_was_opened_before_a_failure_is_closed() -> None:
    Fake.seconds = {"b": "breaks"}
    with pytest.raises(UnsupportedModel, match="^B does not load: out of luck$"):
        spa.race({"A": named("a"), "B": named("b")}, X, engine="fake")
    assert (len(Fake.loads), Fake.open) == (3, 0)


def test_no_models() -> None:
    with pytest.raises(BadOption, match="give one or more"):
        spa.race({}, X)


def test_rounds_are_interleaved_in_an_order_that_is_drawn_and_seeded() -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        Fake.log, Fake.loads = [], []
        spa.race({"A": named("a"), "B": named("b")}, X, engine="fake", rounds=30, seed=seed)
        assert Fake.loads == ["a", "a", "b"]  # the first model is loaded twice
        start = len(Fake.log) - 3 * 30
        assert start == 3 * 6  # once when loaded, and five times more
        return [tuple(Fake.log[i : i + 3]) for i in range(start, len(Fake.log), 3)]

    rounds = order(0)
    assert all(set(lap) == {"a1", "a2", "b1"} for lap in rounds)
    assert len(set(rounds)) == 6  # every order occurs
    assert order(0) == rounds
    assert order(1) != rounds


def test_a_long_run_is_warmed_up_less() -> None:
    def slow() -> float:
        time.sleep(0.02)
        return 1.0

    Fake.seconds = {"a": slow}
    spa.race({"A": named("a")}, X, engine="fake", rounds=1, seconds=0.05)
    assert len(Fake.log) == 2 + 2 + 2  # loaded, one more each, one round


@pytest.mark.parametrize("name, threads, primary", [
    ("fake", 1, "cpu"), ("fake", 2, "wall"), ("fake", 0, "wall"), ("slow-clock", 1, "wall")])
def test_cpu_time_counts_where_one_thread_does_all_the_work(name: str, threads: int, primary: str) -> None:
    race = spa.race({"A": named("a"), "B": named("b")}, X, engine=name, threads=threads, rounds=3)
    assert race.primary == primary
    assert all((lap.cpu is None) == (primary == "wall") for lap in race.laps)


def test_a_clock_without_cpu_time_leaves_the_wall() -> None:
    Fake.seconds = {"a": 0.0}
    assert spa.race({"A": named("a")}, X, engine="fake", rounds=3).primary == "wall"


def test_known_times_give_known_verdicts() -> None:
    Fake.seconds = {"a": 1.0, "b": 0.5, "c": 2.0, "d": 1.0}
    race = spa.race({n: named(n) for n in "abcd"}, X, engine="fake", rounds=20)
    assert [lap.verdict for lap in race.laps] == ["", FASTER, SLOWER, SAME]
    assert [lap.ratio for lap in race.laps] == [1, 0.5, 2, 1]
    assert not race.noisy


def noisy() -> Race:
    """The first model, loaded again, takes 10 % longer; so b's 5 % and c's 30 % are not worth the same."""
    Fake.seconds = {"a1": 1.1, "a2": 1.0, "b": 0.95, "c": 0.7}
    return spa.race({n: named(n) for n in "abc"}, X, engine="fake", rounds=20)


def test_a_model_that_differs_from_itself_is_an_alarm() -> None:
    race = noisy()
    assert race.noisy
    assert race.itself is not None
    assert race.itself.offset == pytest.approx(0.1)
    assert [lap.verdict for lap in race.laps] == ["", SAME, FASTER]
    shown = text(race_report.laps(race))
    assert "The machine is too noisy: the first model against itself, loaded twice: 110.0 % (110.0 – 110.0)" in shown
    assert "differences below 10.0 % say nothing" in shown


def test_few_rounds_are_no_alarm() -> None:
    Fake.seconds = {"a1": 1.1, "a2": 1.0}
    assert not spa.race({"A": named("a")}, X, engine="fake", rounds=LEAST - 1).noisy
    assert spa.race({"A": named("a")}, X, engine="fake", rounds=LEAST).noisy is False  # the names count on: a3 and a4 are alike
    Fake.loads = []
    assert spa.race({"A": named("a")}, X, engine="fake", rounds=LEAST).noisy


def test_the_self_check_can_be_left_out() -> None:
    race = spa.race({"A": named("a")}, X, engine="fake", rounds=3, self_check=False)
    assert race.itself is None
    assert Fake.loads == ["a"]
    assert "itself" not in text(race_report.laps(race))


def test_a_large_model_is_not_loaded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa.timing.bench.TWICE", 10)
    race = spa.race({"A": named("a")}, X, engine="fake", rounds=3)
    assert Fake.loads == ["a"]
    assert race.itself is not None


def test_untimed_engines_are_refused_with_their_sentence() -> None:
    with pytest.raises(BadOption, match="not the chip's"):
        spa.race(models(), X, engine="simulator")
    with pytest.raises(BadOption, match="not the chip's"):
        profiles(models(), X, engine="simulator")
    assert Fake.loads == []


def test_the_collector_is_as_it_was() -> None:
    spa.race(models(), X, rounds=1)
    assert gc.isenabled()


# ---------------------------------------------------------------------- processes of their own


def test_engines_apart_get_a_process_each() -> None:
    race = spa.race({"A": named("y"), "B": named("y")}, X, engine="test-apart", rounds=6)
    homes = [next(iter(lap.placement.nodes)) for lap in race.laps if lap.placement]
    assert len(set(homes)) == 2
    assert f"process {os.getpid()}" not in homes
    assert race.version == "apart 1"
    for lap in race.laps:
        assert 0 < lap.low <= lap.median
        assert lap.wall >= 1e-4  # it sleeps that long: the time is that of the process itself
        assert lap.load > 0
        assert lap.memory is None or lap.memory >= 0
    homes = [lap.placement for lap in race.laps if lap.placement]
    assert not any(p.proven for p in homes)


def test_what_fails_apart_is_a_sentence() -> None:
    with pytest.raises(UnsupportedModel, match="no such luck"):
        spa.race({"A": named("y")}, X, engine="test-apart", rounds=1, options={"only": str(os.getpid())})
