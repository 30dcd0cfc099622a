"""What a person sees of a race: tables, profiles and the command. Nothing is said here about how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from bench_cases import (
    convnet,
    fakes,  # noqa: F401
    text,
)
from typer.testing import CliRunner

import spa
from spa.budgets.layout_proxy import Layout, Proxy
from spa.cli import app
from spa.engines import ENGINES, Placement
from spa.tables import race_report
from spa.timing.bench import Lap, Race
from spa.timing.profiling import NodeTime, Profile
from spa.timing.ratios import FASTER, FEW, Ratio
from tools import bench_widths


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
