"""Sweeps over layers: dropped alone and before channels, by several methods, in one trade-off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_cli import refused, run
from test_depth import analysed, data, decoder

import spa
from spa.errors import BadOption
from spa.layers import depth as depth_module
from spa.layers.depth import Depth, choose_layers
from spa.sweeps.points import Setting, grid
from spa.tables.sweep_report import csv_text, sweep_data

DATA = ("--calibration", "d.npz", "--evaluate", "d.npz", "--multiple-of", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder of three blocks and data, in the current folder."""
    monkeypatch.chdir(tmp_path)
    onnx.save(decoder(3), "m.onnx")
    np.savez("d.npz", x=np.concatenate([b["x"] for b in data()]))
    return tmp_path


def swept(*args: Any, code: int = 0) -> dict[str, Any]:
    result = run("sweep", "m.onnx", "-o", "s", *DATA, *args, "--json")
    assert result.exit_code == code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_combinations() -> None:
    plain = (("l2",), ("none",), ("local",), ("auto",))
    found = grid((0, 0.25), (), *plain, (0, 2), ("finercut", "llm-drop"))
    assert [(s.criterion, s.ratio, s.drop_layers, s.layers) for s in found] == [
        ("l2", 0.25, 0, ""), ("l2", 0.25, 2, "finercut"), ("", None, 2, "finercut"), ("l2", 0.25, 2, "llm-drop"), ("", None, 2, "llm-drop"),
    ]  # fmt: skip
    assert [s.name for s in found[1:3]] == ["layers-2-ratio-0.25_finercut-local_l2_none", "layers-2_finercut"]
    assert len(grid((), (), ("l2", "l1"), ("none",), ("local",), ("auto",), (1, 2))) == 2  # layers alone, whatever the criterion
    assert len(grid((), ("macs=0.5",), *plain, (0, 0.2), (), ("attention", "mlp"))) == 3
    assert found[1].series != found[2].series
    assert grid((), (), *plain, (1,))[0].series == grid((), (), *plain, (2,))[0].series  # one line over numbers
    assert Setting("l2", "none", 0.5, "local").depth is None
    with pytest.raises(BadOption, match="--drop-layers is -1"):
        grid((), (), *plain, (-1,))


def test_points_are_what_prune_gives(folder: Path) -> None:
    found = swept("--drop-layers", "0,2", "--layers", "finercut,llm-drop", "--ratio", "0,0.25", "--repair", "none")
    assert len(found["points"]) == 5
    assert not any(p["failed"] for p in found["points"])
    for point in found["points"]:
        applied = run("apply", "m.onnx", f"s/{point['plan']}", "-o", "a.onnx")
        assert applied.exit_code == 0, applied.stderr
        if point["drop_layers"]:
            ratio = [] if point["ratio"] is None else ["--ratio", point["ratio"]]
            how = ("--drop-layers", 2, "--layers", point["layers"], *ratio, "--repair", "none")
            pruned = run("prune", "m.onnx", "-o", "p.onnx", *DATA[:2], "--multiple-of", 1, "--no-bench", *(how if ratio else how[:-2]))
            assert pruned.exit_code == 0, pruned.stderr
            assert Path("p.onnx").read_bytes() == Path("a.onnx").read_bytes()
            assert point["costs"]["params"] == spa.count(spa.analyze("p.onnx").groups).parameters
    by_name = {p["name"]: p for p in found["points"]}
    alone, more = by_name["layers-2_finercut"], by_name["layers-2-ratio-0.25_finercut-local_l2_none"]
    assert more["shares"]["params"] < alone["shares"]["params"] < 1
    assert alone["quality"] != more["quality"]


def test_a_target_is_a_share_of_the_model_as_given(folder: Path) -> None:
    found = swept("--drop-layers", "2", "--target", "params=0.5,0.95", "--repair", "obspa", "--allocation", "uniform,solver")
    assert [p["failed"] for p in found["points"]] == [None] * 4
    for point in found["points"]:
        assert point["shares"]["params"] <= float(point["target"].split("=")[1])
        plan = json.loads(Path(f"s/{point['plan']}").read_text())
        assert len(plan["options"]["depth"]["dropped"]) == 2
        assert bool(plan["groups"]) == (point["target"] == "params=0.5")  # the layers alone meet the other


def test_more_join_and_nothing_is_done_twice(folder: Path) -> None:
    swept("--drop-layers", "1", "--layers", "llm-drop")
    before = {p: p.stat().st_mtime_ns for p in Path("s/points").glob("*.json")}
    found = swept("--drop-layers", "1,2,0.34", "--layers", "llm-drop", "--layer-kind", "any,mlp")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    failed = {p["name"]: p["failed"] for p in found["points"] if p["failed"]}
    assert len(found["points"]) == 6
    assert failed == {}


def test_what_is_impossible_stops_no_other(folder: Path) -> None:
    found = swept("--drop-layers", "2,9", "--ratio", "0,0.25", "--repair", "none")
    failed = [p for p in found["points"] if p["failed"]]
    assert [p["drop_layers"] for p in failed] == [9, 9]
    assert all("--drop-layers asks for 9 of 6" in p["failed"] for p in failed)
    assert len(found["points"]) == 4


def test_a_search_is_done_once_for_all_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    analysis, evidence = analysed(decoder(3))
    asked: list[int] = []
    finercut = depth_module.METHODS["finercut"]

    def counted(search: depth_module.Search) -> Any:
        asked.append(search.count)
        return finercut(search)

    alone = {n: choose_layers(analysis, Depth(n), evidence) for n in (1, 2, 3)}
    monkeypatch.setitem(depth_module.METHODS, "finercut", counted)  # type: ignore[arg-type]
    found = spa.sweep(analysis, tmp_path / "s", drop_layers=[1, 2, 3], calibration=evidence, evaluate=evidence)
    assert asked == [3]
    for point in found.points:
        plan = json.loads((tmp_path / "s" / point.plan).read_text())
        assert plan["options"]["depth"]["order"] == list(alone[int(point.setting.drop_layers)].order)
    assert "layers-3_finercut" in csv_text(found, "macs")
    assert {p["drop_layers"] for p in sweep_data(found)["points"]} == {1, 2, 3}


def test_timed_and_plotted(folder: Path) -> None:
    pytest.importorskip("plotly", reason="plots are an extra")
    found = swept("--drop-layers", "2", "--ratio", "0,0.25", "--repair", "none", "--bench", "--seconds", "0.05")
    assert all(p["timing"] for p in found["points"])
    page = Path("s/plot.html").read_text(encoding="utf-8")
    assert "2 layers by finercut" in page
    assert "layers=2 ratio=0.25" in page


def test_workers_choose_the_same(folder: Path) -> None:
    one = swept("--drop-layers", "1,2", "--ratio", "0,0.25", "--criterion", "l2,l1", "--repair", "none")
    Path("s").rename("one")
    two = swept("--drop-layers", "1,2", "--ratio", "0,0.25", "--criterion", "l2,l1", "--repair", "none", "--jobs", "2")
    assert [p["costs"] for p in one["points"]] == [p["costs"] for p in two["points"]]


@pytest.mark.parametrize(("args", "says"), [
    (("--layers", "finercut"), "say how many go with --drop-layers"), (("--layer-kind", "mlp", "--drop-layers", "0"), "--drop-layers"),
    (("--drop-layers", "two"), "no list of numbers"), (("--drop-layers", "2", "--layers", "best"), "no method 'best'"),
    (("--drop-layers", "2", "--layer-kind", "head"), "--layer-kind is 'head'"), (("--ratio", "0"), "between 0 and 1"),
    (("--drop-layers", "1.5"), "--drop-layers is 1.5"),
])  # fmt: skip
def test_bad_options(folder: Path, args: tuple[str, ...], says: str) -> None:
    refused(folder, "sweep", "m.onnx", "-o", "s", *DATA, *args, says=says)
