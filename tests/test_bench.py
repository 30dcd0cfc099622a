"""Races, what is said about them, profiles and what is counted beside the clock. Nothing is said about how long anything takes."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from apart_engine import APART
from rich.console import Console
from test_trace import net
from typer.testing import CliRunner

import spa
from spa import race_report
from spa.bench import Lap, Race
from spa.cli import app
from spa.engines import ENGINES, Engine, Placement, Settings, engine
from spa.errors import BadOption, UnsupportedModel
from spa.feeds import Feeds
from spa.layout_proxy import Layout, Proxy, layout_of, padded_macs, proxy
from spa.plan import mask_of
from spa.profiling import NodeTime, Profile, parsed, profiles
from spa.ratios import FASTER, FEW, LEAST, SAME, SLOWER, Ratio, paired, verdict
from tools import bench_widths

REASON = "only the x86-64 builds of ONNX Runtime lay channels out in blocks"
blocked = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason=REASON)


def models() -> dict[str, spa.Model]:
    made = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", w1=(4, 8), w2=(8, 5))
    return {"dense": spa.load(made), "small": spa.prune(made, 0.5, multiple_of=1).model}


def one() -> spa.Model:
    return models()["dense"]


X = {"x": np.ones((2, 4), np.float32), "unknown": np.ones(1)}


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


class Fake:
    """Runs nothing. It notes who ran, and tells times as another process would: those that were given for its model."""

    log: ClassVar[list[str]] = []
    loads: ClassVar[list[str]] = []
    seconds: ClassVar[dict[str, Any]] = {}
    open = 0

    def __init__(self, model: spa.Model, settings: Settings) -> None:
        self.name = model.graph.outputs[0].name
        Fake.loads.append(self.name)
        self.number = Fake.loads.count(self.name)
        self.placement = Placement({"Fake": 3, "CPUExecutionProvider": 1}, {"y": "it does not know Relu"})
        Fake.open += 1

    def run(self, feeds: Feeds) -> Feeds:
        return {self.name: feeds["x"]}

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        if Fake.seconds.get(self.name) == "breaks":
            raise RuntimeError("\nout of luck\nat line 3")

        def call() -> None:
            Fake.log.append(f"{self.name}{self.number}")
            told = Fake.seconds.get(f"{self.name}{self.number}", Fake.seconds.get(self.name, 1.0))
            call.seconds = call.thread_seconds = told() if callable(told) else told  # type: ignore[attr-defined]

        call.seconds = call.thread_seconds = 0.0  # type: ignore[attr-defined]
        return call

    def close(self) -> None:
        Fake.open -= 1


@pytest.fixture(autouse=True)
def _fakes() -> Iterator[None]:
    Fake.log, Fake.loads, Fake.seconds, Fake.open = [], [], {}, 0
    engine(Engine("fake", "runtime", Fake, lambda: "", lambda: "fake 1", thread_time=True, block=lambda: 32))
    engine(Engine("slow-clock", "provider", Fake, lambda: "", lambda: "fake 1"))
    engine(Engine("simulator", "provider", Fake, lambda: "", lambda: "", timed="it is a simulator's time, not the chip's"))
    engine(APART)
    yield
    for name in ("fake", "slow-clock", "simulator", APART.name):
        del ENGINES[name]
    assert Fake.open == 0  # whatever was opened is closed


def named(name: str) -> spa.Model:
    return spa.load(net(f"float[2,4] x -> float[2,4] {name}", f"{name} = Relu(x)"))


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
    monkeypatch.setattr("spa.bench.TWICE", 10)
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


# ---------------------------------------------------------------------- counted beside the clock


def convnet(width: int, *, group: int = 1) -> onnx.ModelProto:
    body = f"""a = Conv <pads=[1,1,1,1]> (x, w1) r = Relu(a) b = Conv <pads=[1,1,1,1], group={group}> (r, w2) s = Relu(b)
               c = Conv <pads=[1,1,1,1]> (s, w3) t = Relu(c) g = GlobalAveragePool(t) f = Flatten(g) y = MatMul(f, w4)"""
    return net("float[1,3,8,8] x -> float[1,10] y", body, w1=(width, 3, 3, 3), w2=(width, width // group, 3, 3), w3=(width, width, 3, 3),
               w4=(width, 10))


@blocked
def test_a_width_that_4_does_not_divide_leaves_the_blocks() -> None:
    whole, odd = (layout_of(spa.load(convnet(w))) for w in (64, 63))
    assert (whole.convolutions, whole.blocked_convolutions) == (3, 3)
    assert (odd.convolutions, odd.blocked_convolutions) == (3, 1)  # the one that reads the picture stays
    assert whole.blocked > odd.blocked
    assert whole.reorders >= 1
    assert whole.nodes >= whole.blocked + whole.reorders


def test_padded_macs_of_convolutions() -> None:
    def counted(width: int, group: int = 1) -> tuple[int, int]:
        return padded_macs(spa.analyze(convnet(width, group=group)).groups, 16)

    pixels = 64 * 9
    for width, up in ((64, 64), (63, 64), (65, 80)):
        exact = pixels * (3 * width + 2 * width * width) + 10 * width
        assert counted(width) == (exact, pixels * (3 * up + 2 * up * up) + 16 * up)  # 10 classes count as 16, the picture's 3 as 3
    width, up = 40, 48
    depthwise = pixels * (3 * width + width + width * width) + 10 * width
    assert counted(width, group=width) == (depthwise, pixels * (3 * up + up + up * up) + 16 * up)
    grouped = pixels * (3 * width + width * 5 + width * width) + 10 * width  # 8 groups of 5: (g c) and (g o) are both 40 wide
    assert counted(width, group=8) == (grouped, pixels * (3 * up + width * 5 * 48 * 48 // 1600 + up * up) + 16 * up)


def test_padded_macs_of_products() -> None:
    body = "q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose <perm=[0,2,1]> (k) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, q)"
    groups = spa.analyze(net("float[1,5,12] x -> float[1,5,20] y", body, wq=(12, 20), wk=(12, 20))).groups
    products = 5 * 5 * 20 * 2  # of two activations: as they are
    assert padded_macs(groups, 16) == (5 * 12 * 20 * 2 + products, 5 * 12 * 32 * 2 + products)  # what is given is 12 wide
    assert padded_macs(groups, 1)[0] == padded_macs(groups, 1)[1]
    many = spa.analyze(net("float[3,5,12] x -> float[3,5,20] y", "r = Relu(x) y = MatMul(r, w)", w=(3, 12, 20))).groups
    assert padded_macs(many, 16) == (3 * 5 * 12 * 20, 3 * 5 * 16 * 32)  # three products, each of them padded, not 16 products


def test_padded_macs_of_recurrence() -> None:
    model = net("float[7,1,6] x -> float[7,1,1,20] y", "y = LSTM <hidden_size=20> (x, w, r)", w=(1, 80, 6), r=(1, 80, 20))
    assert padded_macs(spa.analyze(model).groups, 16) == (7 * 4 * (20 * 6 + 20 * 20), 7 * 4 * (32 * 6 + 32 * 32))


def test_macs_of_a_removal_are_those_of_the_pruned_model() -> None:
    result = spa.prune(convnet(64), 0.3, multiple_of=1)
    groups = result.analysis.groups
    exact, padded = padded_macs(groups, 16, mask_of(result.plan, groups))
    assert exact == result.after.macs
    assert (exact, padded) == padded_macs(spa.analyze(result.model).groups, 16)
    assert padded > exact


def test_the_layout_is_counted_where_it_matters() -> None:
    model = spa.load(convnet(64))
    groups = spa.analyze(model).groups
    assert proxy(model, groups, 32, layout=False) == Proxy(*padded_macs(groups, 32), 32, None)
    assert proxy(model, groups, 16).layout is not None


# ---------------------------------------------------------------------- profiles


def event(name: str, op: str, microseconds: int, provider: str = "CPUExecutionProvider") -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": op, "provider": provider}}


def test_profiles_are_read() -> None:
    run = {"cat": "Session", "name": "model_run", "dur": 9, "args": {}}
    graph = spa.load(convnet(8)).graph
    lap = [event("ReorderInput", "ReorderInput", 1), event("r_nchwc", "Conv", 10), event("b", "FusedConv", 20),
           event("ReorderOutput_token_7", "ReorderOutput", 2), event("ReorderOutput", "ReorderOutput", 3), event("X_0", "X", 4, "Other")]
    cold = [event("r_nchwc", "Conv", 1000), run]
    warm = [*lap, run, *lap[:1], event("r_nchwc", "Conv", 30), run]
    found = parsed("m", graph, [{"cat": "Session", "name": "load", "dur": 1}, *cold * 3, *warm])
    assert found.runs == 2
    keys = {n.key: (n.op, n.provider, n.blocked, round(1e6 * n.seconds, 1)) for n in found.nodes}
    assert keys == {
        "ReorderInput (added by the runtime)": ("ReorderInput", "CPUExecutionProvider", False, 1.0),
        "a": ("Conv", "CPUExecutionProvider", True, 20.0),  # it is named after its ReLU, r
        "b": ("FusedConv", "CPUExecutionProvider", False, 10.0),
        "ReorderOutput (added by the runtime)": ("ReorderOutput", "CPUExecutionProvider", False, 2.5),
        "X_0": ("X", "Other", False, 2.0),
    }
    assert found.total == pytest.approx(35.5e-6)
    assert found.by_op()["Conv"] == pytest.approx(20e-6)


def test_profile_of_a_real_run() -> None:
    made = convnet(64)
    for node in made.graph.node:
        node.name = f"/{node.op_type} of {node.output[0]}"
    dense, small = spa.load(made), spa.prune(made, 0.5).model
    before, after = profiles({"dense": dense, "small": small}, {"x": np.ones((1, 3, 8, 8), np.float32)}, runs=3)
    for profile in (before, after):
        assert profile.runs == 3
        assert {"a", "b", "c", "y"} <= set(profile.by_key())
        assert profile.by_key()["a"].node == "/Conv of a"
        assert {n.provider for n in profile.nodes} == {"CPUExecutionProvider"}
        assert {"Conv", "MatMul"} <= set(profile.by_op()) or "Gemm" in profile.by_op()
        assert 0 < profile.total == pytest.approx(sum(profile.by_op().values()))
    found = race_report.changes(before, after)
    assert [abs(c["change"]) for c in found] == sorted((abs(c["change"]) for c in found), reverse=True)
    assert {c["node"] for c in found} >= {"/Conv of a", "/Conv of b", "/Conv of c", "/MatMul of y"}


def test_an_engine_without_profile_says_so() -> None:
    with pytest.raises(BadOption, match="fake writes no profile"):
        profiles({"A": named("a")}, X, engine="fake")


# ---------------------------------------------------------------------- what a person sees


def text(shown: Any, width: int = 140) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(shown)
    return file.getvalue()


def race_of(**more: Any) -> Race:
    elsewhere = Placement({"OpenVINOExecutionProvider": 1, "CPUExecutionProvider": 2}, {"n": "it has no kernel"})
    return Race((Lap("a.onnx", 0.0123, 0.012, 0.013, 1.0, 1.0, 1.0, wall=0.015, cpu=0.0123, load=0.1, first=0.02, memory=3_000_000,
                     placement=Placement({"CPUExecutionProvider": 5})),
                 Lap("b.onnx", 0.0045, 0.0044, 0.005, 0.37, 0.36, 0.38, FASTER, wall=0.006, cpu=0.0045, load=0.1, first=0.02,
                     placement=elsewhere)), 50, 1, "cpu", "1.32", **more)


def test_tables_of_a_race() -> None:
    shown = text(race_report.laps(race_of(primary="cpu", itself=Ratio(1.0, 0.99, 1.01)), {
        "a.onnx": Proxy(4_000_000, 5_000_000, 16, Layout(30, 20, 2, 12, 11))}))
    for part in ("12.3 ms", "15.0 ms", "37.0 %", "36.0 – 38.0", FASTER, "3.00 MB", "CPU time", "wall time", "1 thread", "50 rounds",
                 "4.00 M", "5.00 M", "padded to 16", "11 of 12", "20 of 30", "1 node on OpenVINO", "2 nodes on CPU", "it has no kernel",
                 "against itself, loaded twice: 100.0 % (99.0 – 101.0)"):
        assert part in shown, part
    assert "too noisy" not in shown
    assert "upper quartile" in text(race_report.laps(race_of()))


def test_a_runtime_that_does_not_say_where() -> None:
    lap = Lap("m", 1, 1, 1, 1, placement=Placement({}, proven=False))
    assert "m: it does not say where nodes ran" in text(race_report.laps(Race((lap,), 9, 0, "x", "1")))


def test_tables_of_profiles() -> None:
    def conv(key: str, seconds: float, op: str = "Conv", blocked: bool = True) -> NodeTime:
        return NodeTime(key, f"/{key}", op, "CPU", seconds, blocked)

    before = Profile("dense", 20, (conv("a", 2e-3), conv("b", 1e-3)))
    after = Profile("small", 20, (conv("a", 5e-4, "FusedConv", False), conv("b", 9e-4), NodeTime("R", "R", "Reorder", "CPU", 1e-4)))
    shown = " ".join(text(race_report.profile_tables([before, after])).split())
    for part in ("Conv 3.00 ms 900 µs 30.0 %", "all 3.00 ms 1.50 ms 50.0 %", "FusedConv – 500 µs –", "1: dense", "2: small",
                 "/a Conv in blocks → FusedConv 2.00 ms 500 µs -1.50 ms", "R Reorder – 100 µs +100 µs"):
        assert part in shown, part


def test_the_measurement_behind_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_widths, "OFFSETS", (-4, 0, 1))
    rows, race = bench_widths.measure("ffn", 16, ENGINES["cpu"], rounds=3, seconds=9, seed=0)
    assert [r.width for r in rows] == [12, 16, 17]
    assert [r.macs for r in rows] == [12 / 16, 1, 17 / 16]
    assert [r.padded for r in rows] == [1, 1, 2]
    assert race.laps[0].name == "16"
    shown = bench_widths.markdown(rows, "a machine")
    assert "| **16** |" in shown
    assert "| 1.00 – 1.00 | 1.00 | 1.00 | – |" in shown
    conv = spa.analyze(bench_widths.network("conv", 20)).groups
    assert spa.count(conv).macs == 28 * 28 * 9 * (3 * 20 + 3 * 400)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    onnx.save(convnet(32), tmp_path / "dense.onnx")
    spa.prune(convnet(32), 0.5).save(tmp_path / "small.onnx")
    return [str(tmp_path / "dense.onnx"), str(tmp_path / "small.onnx")]


def command(*args: Any) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_the_command_gives_exact_numbers(files: list[str]) -> None:
    result = command(*files, "--rounds", 3, "--profile", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["provider"], data["kind"], data["compared"], data["threads"], data["seed"]) == ("cpu", "provider", "cpu", 1, 0)
    assert set(data["self_check"]) == {"ratio", "interval", "too_noisy"}
    lap = data["laps"][1]
    assert lap["verdict"] == FEW
    assert lap["ratio_interval"][0] <= lap["ratio_to_first"] <= lap["ratio_interval"][1]
    assert {"cpu_seconds", "wall_seconds", "load_seconds", "first_run_seconds", "memory_bytes", "low_quartile"} <= set(lap)
    assert set(lap["placement"]["nodes"]) == {"CPUExecutionProvider"}
    assert data["proxies"][files[1]]["macs"] < data["proxies"][files[1]]["padded_macs"] < data["proxies"][files[0]]["padded_macs"]
    assert data["proxies"][files[0]]["layout"]["convolutions"] == 3
    assert [p["model"] for p in data["profiles"]] == files
    assert {n["value"] for n in data["profiles"][0]["nodes"]} >= {"a", "b", "c"}
    assert {c["node"] for c in data["changes"][files[1]]} >= {"a", "b", "c"}


def test_the_command_shows_tables(files: list[str]) -> None:
    shown = " ".join(command(*files, "--rounds", 3, "--profile").stdout.split())
    for part in ("One run on provider cpu", "median of 3 rounds", "Beside the clock", "padded to", "self-check", "Where the time goes",
                 "Nodes that changed most"):  # fmt: skip
        assert part in shown, part


@pytest.mark.parametrize("args, says", [
    (["--provider", "cpuu"], "There is no provider 'cpuu'; near it are: cpu"),
    (["--runtime", "cpu"], "There is no runtime 'cpu'"),
    (["--provider", "cpu", "--runtime", "fake"], "give one of them"),
    (["--provider", "simulator"], "Models can't be timed with simulator: it is a simulator's time, not the chip's."),
    (["--rounds", "0"], "--rounds"),
    (["--threads", "-1"], "--threads"),
    (["--seconds", "-1"], "--seconds"),
])
def test_bad_options_are_sentences(files: list[str], args: list[str], says: str) -> None:
    result = command(*files, *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_an_untimed_engine_is_refused_before_anything_is_read() -> None:
    result = command("no such file", "--provider", "simulator")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "not the chip's" in result.stderr


def test_another_runtime_and_profile_that_it_has_not(files: list[str]) -> None:
    data = json.loads(command(*files, "--runtime", "fake", "--rounds", 3, "--json").stdout)
    assert (data["provider"], data["kind"]) == ("fake", "runtime")
    assert data["proxies"][files[0]]["block"] == 32
    result = command(*files, "--runtime", "fake", "--profile")
    assert result.exit_code == 2
    assert "writes no profile" in result.stderr
