"""Sweeps: what is on the front, that nothing is lost or done twice, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from repair_cases import drawn
from test_cli import convnet, refused, run

import spa
from spa.commands.sweep import listed, targets_of
from spa.storage import files
from spa.sweeps import parallel
from spa.sweeps.pareto import pareto
from spa.sweeps.points import Point, Setting, Sweep, grid
from spa.sweeps.sweep_folder import LOCK
from spa.tables.sweep_report import csv_text, sweep_data, tables
from spa.timing import share

DATA = ("--calibration", "d.npz", "--multiple-of", "1")
GRID = ("--ratio", "0.25,0.5", "--target", "macs=0.3,0.5", "--criterion", "l2,flap", "--repair", "none,obspa", "--allocation",
        "uniform,solver")  # fmt: skip
POINTS = 2 * 2 * (2 + 2 * 2)
SLOW = """
import time
def judge(run):
    with open("judged.txt", "a") as file:
        file.write("x")
    time.sleep(0.1)
    import numpy
    return float(run({"x": numpy.ones((2, 3, 8, 8), "float32")})["y"].sum())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and data, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    onnx.save(convnet(shape=("n", 3, 8, 8), width=16), "m.onnx")
    np.savez("d.npz", x=drawn((60, 3, 8, 8), 0))
    return tmp_path


def swept(*args: Any, output: str = "s", code: int = 0) -> dict[str, Any]:
    """What a sweep says in JSON."""
    result = run("sweep", "m.onnx", "-o", output, *args, "--json")
    assert result.exit_code == code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def times(root: str) -> dict[str, int]:
    """When each file of plans, points and what was learned was written."""
    return {str(p): p.stat().st_mtime_ns for p in sorted(Path(root).rglob("*")) if p.is_file() and p.parent != Path(root)}


# ---------------------------------------------------------------------- the front


@given(st.lists(st.tuples(*[st.one_of(st.integers(0, 5), st.just(float("nan")))] * 2), max_size=30))
def test_the_front_is_what_nothing_beats(rows: list[tuple[float, float]]) -> None:
    front = pareto(np.array(rows, float).reshape(-1, 2))

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    known = [not (np.isnan(r[0]) or np.isnan(r[1])) for r in rows]
    for i, row in enumerate(rows):
        assert front[i] == (known[i] and not any(known[j] and beats(other, row) for j, other in enumerate(rows)))
        if known[i] and not front[i]:
            assert any(front[j] and beats(rows[j], row) for j in range(len(rows)))


def made(*points: tuple[float, float], higher: bool = True, dense: float = 90.0) -> Sweep:
    settings = [Setting("l2", "none", ratio=(i + 1) / 100, scope="local") for i in range(len(points))]
    found = [Point(s, {"macs": c}, {"macs": c / 100}, q) for s, (c, q) in zip(settings, points, strict=True)]
    return Sweep("s", "m", "accuracy" if higher else "kl", higher, dense, {"macs": 100.0}, tuple(found))


def test_more_is_better_or_less() -> None:
    assert [p.costs["macs"] for p in made((50, 80), (60, 70), (70, 85)).front()] == [50, 70]
    assert [p.costs["macs"] for p in made((50, 8), (60, 7), (70, 8.5), higher=False, dense=0).front()] == [50, 60]


def test_the_model_as_it_is_keeps_points_off() -> None:
    assert [p.costs["macs"] for p in made((110, 80), (50, 70)).front()] == [50]
    assert [p.costs["macs"] for p in made((110, 95), (50, 70)).front()] == [50, 110]


def test_an_unknown_cost_says_what_there_is() -> None:
    with pytest.raises(spa.BadOption, match="--bench"):
        made((50, 80)).front("latency")
    with pytest.raises(spa.BadOption, match="the choice is: macs"):
        made((50, 80)).front("mac")


def test_combinations_come_once() -> None:
    found = grid((0.5, 0.50), ("macs=0.5",), ("l2", "l1"), ("none",), ("local", "global"), ("auto",))
    assert len(found) == len({s.name for s in found}) == 2 * (2 + 1)
    assert len(grid((), (), ("l2",), ("none",), ("local",), ("auto",))) == 7


def test_lists_on_the_command_line() -> None:
    assert listed(["a, b", "b,c", ""]) == ("a", "b", "c")
    assert targets_of(["macs=0.3,0.5", "size=8MB,params=0.5,0.25"]) == ("macs=0.3", "macs=0.5", "size=8MB", "params=0.5", "params=0.25")


# ---------------------------------------------------------------------- what comes out


def test_a_sweep_gives_points_and_plans_that_apply(folder: Path) -> None:
    data = swept(*GRID, *DATA)
    assert len(data["points"]) == POINTS
    assert not any(p["failed"] for p in data["points"])
    for point in [p for p in data["points"] if p["repair"] == "none"][:8]:
        result = run("apply", "m.onnx", f"s/{point['plan']}", "-o", "small.onnx", "--json")
        assert result.exit_code == 0, result.stderr
        applied = json.loads(result.stdout)
        assert applied["after"]["macs"] == point["costs"]["macs"]
        assert applied["after"]["parameters"] == point["costs"]["params"]
        assert applied["after"]["peak_activation_bytes"] == point["costs"]["memory"]
        assert (folder / "small.onnx").stat().st_size == point["costs"]["size"]
    front = data["front"]["macs"]
    assert front
    qualities = [next(p["quality"] for p in data["points"] if p["name"] == n) for n in front]
    assert qualities == sorted(qualities, reverse=True)  # dearer and better: kl falls
    assert data["metric"] == {"name": "kl", "higher_is_better": False}
    assert {"points.csv", "points.json"} <= {p.name for p in (folder / "s").iterdir()}


def test_two_sweeps_do_not_share_a_folder(folder: Path) -> None:
    swept(*DATA, "--ratio", "0.5", "--repair", "none")
    with FileLock(folder / "s" / LOCK):
        refused(folder, "sweep", "m.onnx", "-o", "s", *DATA, "--ratio", "0.25", "--repair", "none", says="in use by another sweep")
    assert len(swept(*DATA, "--ratio", "0.25", "--repair", "none")["points"]) == 2


def test_a_repaired_point_is_what_apply_repairs(folder: Path) -> None:
    np.savez("held.npz", x=drawn((40, 3, 8, 8), 1))
    point = swept("--ratio", "0.5", *DATA, "--evaluate", "held.npz")["points"][0]
    assert point["repair"] == "obspa"  # as there are data
    result = run("apply", "m.onnx", f"s/{point['plan']}", "-o", "small.onnx", "--repair", "obspa", "--calibration", "d.npz", "--json")
    assert result.exit_code == 0, result.stderr
    assert (folder / "small.onnx").stat().st_size == point["costs"]["size"]
    plain, repaired = (swept("--ratio", "0.5", *DATA, "--repair", r, output=r)["points"][0]["quality"] for r in ("none", "obspa"))
    assert repaired < plain


def test_a_part_of_the_data_is_held_out(folder: Path) -> None:
    point = swept("--ratio", "0.5", *DATA, "--criterion", "flap")["points"][0]
    assert json.loads((folder / "s" / point["plan"]).read_text())["options"]["samples"] == 32  # the first batch
    assert json.loads((folder / "s/settings.json").read_text())["dense"]["samples"] == 28


def test_plans_are_those_of_spa_plan(folder: Path) -> None:
    """Scores and losses that points share change nothing."""
    points = swept(*GRID, *DATA, "--evaluate", "d.npz")["points"]
    for point in points[::5]:
        by_target = ("--target", point["target"], "--allocation", point["allocation"])
        asked = ("--ratio", point["ratio"]) if point["target"] is None else by_target
        result = run("plan", "m.onnx", "-o", "p.json", *asked, "--criterion", point["criterion"], *DATA, "--evaluate", "d.npz", "--repair",
                     point["repair"])  # fmt: skip
        assert result.exit_code == 0, result.stderr
        one, other = (json.loads(Path(f).read_text()) for f in ("p.json", f"s/{point['plan']}"))
        assert one["groups"] == other["groups"]
        assert one["removed"] == other["removed"]
        if point["target"] is not None:
            assert one["options"]["budget"]["losses"] == other["options"]["budget"]["losses"]
            assert ("measured at" in other["options"]["budget"]["losses"]) == (point["allocation"] == "solver")


def test_tables_and_csv(folder: Path) -> None:
    result = run("sweep", "m.onnx", "-o", "s", *GRID, *DATA)
    assert result.exit_code == 0, result.stderr
    assert "Pareto front of MACs and kl" in result.stdout
    assert "Beaten: " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    lines = (folder / "s/points.csv").read_text().splitlines()
    assert len(lines) == POINTS + 2
    assert lines[0].startswith("name,asked,by,criterion,repair,front,macs,")
    again = json.loads((folder / "s/points.json").read_text())
    assert {p["name"] for p in again["points"]} == {line.split(",")[0] for line in lines[2:]}


def test_plots(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    data = swept("--ratio", "0.25,0.5", *DATA, "--bench", "--seconds", "0.05")
    assert [Path(f).name for f in data["files"]] == ["points.csv", "points.json", "plot.png", "plot.html"]
    assert data["against"] == "latency"
    assert all(p["timing"]["share"] > 0 for p in data["points"])
    assert (folder / "s/plot.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "s/plot.html").read_text()
    assert data["points"][0]["plan"] in page.replace(r"\u002f", "/")
    assert 'src="http' not in page
    assert "<link" not in page.split("<script", 1)[0]
    before = times("s")
    swept("--ratio", "0.25,0.5", *DATA, "--bench", "--seconds", "0.05")
    assert times("s") == before


def test_without_plot_packages_the_rest_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("sweep", "m.onnx", "-o", "s", "--ratio", "0.5", *DATA, "--json")
    assert result.exit_code == 0
    assert "spa-prune[plot]" in result.stderr
    assert [Path(f).name for f in json.loads(result.stdout)["files"]] == ["points.csv", "points.json"]


def test_from_python(folder: Path) -> None:
    steps: list[Any] = []
    found = spa.sweep(spa.analyze("m.onnx"), "s", ratio=0.5, calibration=[{"x": drawn((40, 3, 8, 8), 0)}], tell=steps.append)
    assert [p.name for p in found.made] == ["ratio-0.5_local_l2_obspa"]
    assert [(s.done, s.total) for s in steps] == [(0, 2), (1, 2), (2, 2)]
    assert sweep_data(found)["points"][0]["quality"] == found.points[0].quality
    assert csv_text(found, "macs").count("\n") == 3
    assert tables(found, "macs")


# ---------------------------------------------------------------------- going on


def test_a_killed_sweep_goes_on_and_does_nothing_twice(folder: Path) -> None:
    (folder / "slow.py").write_text(SLOW)
    args = ["sweep", "m.onnx", "-o", "s", *GRID, *DATA, "--metric", "slow:judge", "--time-limit", "0"]
    running = subprocess.Popen([sys.executable, "-m", "spa", *args], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    began = time.monotonic()
    while len(list(folder.glob("s/points/*.json"))) < 3:
        assert running.poll() is None, running.stderr and running.stderr.read()
        assert time.monotonic() - began < 120
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done, judged = times("s"), len((folder / "judged.txt").read_text())
    points = [p for p in done if "/points/" in p]
    assert 3 <= len(points) < POINTS
    assert {Path(p).name for p in done if "learned" in p} >= {"l2.npz", "flap.npz"}
    assert judged - 1 - len(points) in (0, 1)  # the model as it is, finished points, and perhaps the one that was killed
    (folder / "judged.txt").unlink()
    one = swept(*args[4:])
    after = times("s")
    assert {p: after[p] for p in points} == {p: done[p] for p in points}
    assert {p: t for p, t in after.items() if "learned" in p} == {p: t for p, t in done.items() if "learned" in p}
    assert len((folder / "judged.txt").read_text()) == 1 + POINTS - len(points)  # again the model as it is, to compare with
    other = swept(*args[4:], output="whole")
    assert one["points"] == other["points"]
    assert (folder / "s/points.csv").read_bytes() == (folder / "whole/points.csv").read_bytes()
    assert swept(*args[4:])["points"] == one["points"]
    assert times("s") == after


def test_more_points_join_those_that_are_there(folder: Path) -> None:
    swept("--ratio", "0.5", *DATA)
    before = times("s")
    data = swept("--ratio", "0.25", *DATA)
    assert [p["name"] for p in data["points"]] == ["ratio-0.25_local_l2_obspa", "ratio-0.5_local_l2_obspa"]
    assert before.items() <= times("s").items()


def test_a_point_that_fails_is_recorded_and_not_tried_again_unless_asked(folder: Path) -> None:
    (folder / "fussy.py").write_text("""
import os
def judge(run):
    import numpy
    value = float(run({"x": numpy.ones((2, 3, 8, 8), "float32")})["y"].sum())
    open("judged.txt", "a").write("x")
    first = not os.path.exists("dense")
    if first:
        open("dense", "w").write(repr(value))
    return float("nan") if not first and not os.path.exists("good") else value
""")
    args = ("--ratio", "0.25,0.5", *DATA, "--metric", "fussy:judge")
    result = run("sweep", "m.onnx", "-o", "s", *args)
    assert result.exit_code == 2
    assert "None of the 2 points could be made" in result.stderr
    assert "must return a finite number" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    (folder / "good").touch()
    swept(*args, code=2)
    assert len((folder / "judged.txt").read_text()) == 3
    data = swept(*args, "--retry")
    assert not any(p["failed"] for p in data["points"])
    assert len((folder / "judged.txt").read_text()) == 6


def test_what_is_impossible_at_one_point_stops_no_other(folder: Path) -> None:
    data = swept("--target", "macs=0.001,0.5", *DATA)
    assert [bool(p["failed"]) for p in data["points"]] == [True, False]
    assert "impossible" in data["points"][0]["failed"]
    assert data["points"][0]["plan"] is None
    assert not (folder / "s/plans/macs-0.001_auto_l2_obspa.plan.json").exists()
    shown = run("sweep", "m.onnx", "-o", "s", "--target", "macs=0.001,0.5", *DATA)
    assert "Failed: 1 point" in shown.stdout


def test_a_full_disk_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = files._write, [0]

    def full(path: Path, pieces: Any) -> None:
        count[0] += path.parent.name == "points"
        write(path, pieces if count[0] < 3 else [b"half"])
        if count[0] >= 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    result = run("sweep", "m.onnx", "-o", "s", "--ratio", "0.2,0.3,0.4,0.5", *DATA)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(folder.rglob(".spa-*"))
    assert len(list(folder.glob("s/points/*"))) == 2
    before = times("s")
    monkeypatch.undo()
    os.chdir(folder)
    assert len(swept("--ratio", "0.2,0.3,0.4,0.5", *DATA)["points"]) == 4
    assert before.items() <= times("s").items()


# ---------------------------------------------------------------------- what is refused


def test_folders_of_something_else(folder: Path) -> None:
    args = ("--ratio", "0.5", *DATA)
    swept(*args)
    onnx.save(convnet(shape=("n", 3, 8, 8), width=16, seed=1), "other.onnx")
    refused(folder, "sweep", "other.onnx", "-o", "s", *args, says="another model")
    refused(folder, "sweep", "m.onnx", "-o", "s", *args, "--seed", "1", says="--seed 0 there, 1 here")
    refused(folder, "sweep", "m.onnx", "-o", "s", *args, "--samples", "20", says="other data")
    refused(folder, "sweep", "m.onnx", "-o", "s", *args, "--metric", "cosine", says='--metric null there, "cosine" here')
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("years of work")
    refused(folder, "sweep", "m.onnx", "-o", "mine", *args, says="holds no sweep but thesis.txt")
    refused(folder, "sweep", "m.onnx", "-o", "d.npz", *args, says="is a file")
    refused(folder, "sweep", "m.onnx", "-o", "d.npz/s", *args, says="can't be")
    settings = json.loads((folder / "s/settings.json").read_text())
    settings["settings"]["spa"] = "0.0.1"
    (folder / "s/settings.json").write_text(json.dumps(settings))
    refused(folder, "sweep", "m.onnx", "-o", "s", *args, says="spa 0.0.1 there")
    (folder / "s/settings.json").write_text("{")
    refused(folder, "sweep", "m.onnx", "-o", "s", *args, says="settings.json can't be read")


def test_a_damaged_point_is_named(folder: Path) -> None:
    swept("--ratio", "0.5", *DATA)
    (folder / "s/points/ratio-0.5_local_l2_obspa.json").write_text('{"setting": 1}')
    refused(folder, "sweep", "m.onnx", "-o", "s", "--ratio", "0.5", *DATA, says="delete it")


@pytest.mark.parametrize(("args", "says"), [
    (("--criterion", "l2,l7"), "no criterion 'l7'"), (("--repair", "glue"), "--repair is 'glue'"),
    (("--scope", "world"), "--scope is 'world'"),
    (("--ratio", "0.5,1"), "between 0 and 1"), (("--ratio", "half"), "no list of numbers"), (("--target", "macs=2x"), "--target"),
    (("--target", "speed=2"), "speed"), (("--allocation", "magic", "--target", "macs=0.5"), "--allocation is 'magic'"),
    (("--allocation", "solver"), "give some with --target"), (("--scope", "global", "--target", "macs=0.5"), "give some with --ratio"),
    (("--against", "beauty"), "--against"), (("--against", "latency"), "--bench"), (("--jobs", "-1"), "--jobs"),
    (("--jobs", "1000"), "cores"),
    (("--backend", "magic"), "--backend"), (("--provider", "magic"), "magic"), (("--seconds", "0", "--bench"), "--seconds"),
    (("--metric", "beauty"), "beauty"), (("--multiple-of", "0"), "--multiple-of"), (("--output-name", "z"), "no output 'z'"),
    (("--include", "zzz"), "zzz"), (("--normalize", "magic"), "--normalize"), (("--target", "latency=0.5x", "--jobs", "0"), "side by side"),
])  # fmt: skip
def test_bad_options(folder: Path, args: tuple[str, ...], says: str) -> None:
    if "--jobs" in args and share.cores() == 1 and "0" in args:
        pytest.skip("one core is no more than one job")
    if "--include" in args:
        result = run("sweep", "m.onnx", "-o", "s", *DATA, *args)
        assert result.exit_code == 2
        assert says in result.stderr
        return
    refused(folder, "sweep", "m.onnx", "-o", "s", *DATA, *args, says=says)


def test_quality_needs_data(folder: Path) -> None:
    refused(folder, "sweep", "m.onnx", "-o", "s", says="there are no data")
    refused(folder, "sweep", "m.onnx", "-o", "s", "--calibration", "none", says="made up")
    refused(folder, "sweep", "m.onnx", "-o", "s", "--calibration", "d.npz", "--evaluate", "none", says="made up")
    refused(folder, "sweep", "m.onnx", "-o", "s", "--repair", "obspa", "--evaluate", "d.npz", says="--calibration")
    refused(folder, "sweep", "m.onnx", "-o", "s", *DATA, "--metric", "accuracy", says="--labels")
    assert swept("--ratio", "0.5", "--evaluate", "d.npz", "--multiple-of", "1")["points"][0]["repair"] == "none"
    assert swept("--ratio", "0.5", "--evaluate", "d.npz", "--calibration", "none", output="noise")["points"][0]["repair"] == "obspa"


def test_a_metric_that_is_nan(folder: Path) -> None:
    (folder / "broken.py").write_text("def judge(run):\n    return float('nan')\n")
    refused_but_cache(folder, "--metric", "broken:judge", says="must return a finite number")
    onnx.save(convnet(shape=("n", 3, 8, 8), width=16, nan=True), "m.onnx")
    refused_but_cache(folder, says="NaN")


def refused_but_cache(folder: Path, *args: str, says: str) -> None:
    """As `refused`, but for the bytecode of the user's metric."""
    sys.dont_write_bytecode = True
    try:
        refused(folder, "sweep", "m.onnx", "-o", "s", *DATA, *args, says=says)
    finally:
        sys.dont_write_bytecode = False
    assert not (folder / "s").exists()


def test_a_folder_among_the_data(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "d.npz").rename(folder / "data/d.npz")
    refused(folder, "sweep", "m.onnx", "-o", "data/s", "--calibration", "data", says="lies in the data")


# ---------------------------------------------------------------------- side by side


@pytest.mark.skipif(share.cores() < 2, reason="one core")
def test_workers_give_the_same(folder: Path) -> None:
    one = swept("--ratio", "0.25,0.5", "--target", "macs=0.5", *DATA, output="one")
    two = swept("--ratio", "0.25,0.5", "--target", "macs=0.5", *DATA, "--jobs", "2", output="two")
    assert [(p["name"], p["costs"]) for p in two["points"]] == [(p["name"], p["costs"]) for p in one["points"]]
    np.testing.assert_allclose([p["quality"] for p in two["points"]], [p["quality"] for p in one["points"]], rtol=1e-4)


def _threads(_: Any) -> int:
    return spa.timing.share.own_threads()


@pytest.mark.skipif(share.cores() < 2, reason="one core")
def test_workers_share_the_cores() -> None:
    jobs = 2
    found = [threads for _, threads in parallel.run(_threads, None, [()] * 4, jobs=jobs)]
    assert all(1 <= threads <= share.cores() // jobs for threads in found)
    assert share.own_threads() == 0  # this process keeps them all


@pytest.mark.skipif(share.cores() < 2, reason="one core")
def test_workers_go_when_a_sweep_is_killed(folder: Path) -> None:
    (folder / "slow.py").write_text(SLOW.replace("0.1", "1000 if os.path.exists('dense') else open('dense', 'w').close() or 0").replace(
        "import time", "import os, time"))  # fmt: skip
    args = ["sweep", "m.onnx", "-o", "s", "--ratio", "0.25,0.5", *DATA, "--metric", "slow:judge", "--jobs", "2"]
    running = subprocess.Popen([sys.executable, "-m", "spa", *args], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    psutil = pytest.importorskip("psutil")
    began = time.monotonic()
    while not (folder / "judged.txt").exists() or len((folder / "judged.txt").read_text()) < 2:
        assert running.poll() is None
        assert time.monotonic() - began < 120
        time.sleep(0.05)
    workers = [p for p in psutil.Process(running.pid).children(recursive=True) if "popen_loky" in " ".join(p.cmdline())]
    assert workers
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_without_ray_it_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(folder, "sweep", "m.onnx", "-o", "s", *DATA, "--backend", "ray", says="pip install 'spa-prune[ray]'")


@pytest.mark.engines
def test_a_ray_cluster_of_two_nodes(folder: Path) -> None:
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len(ray.nodes()) == 2
        there = swept(*GRID, *DATA, "--backend", "ray", "--jobs", "0", output="there")
        here = swept(*GRID, *DATA, output="here")
        one, other = ([(p["name"], p["costs"], p["failed"]) for p in x["points"]] for x in (there, here))
        assert one == other
        np.testing.assert_allclose([p["quality"] for p in there["points"]], [p["quality"] for p in here["points"]], rtol=1e-4)
    finally:
        ray.shutdown()
        cluster.shutdown()
