"""Reports: numbers with units, names that fit, and golden `inspect` output.

Golden files hold what `spa inspect` prints for graphs of models/zoo. After a wanted change of the groups or of the tables,

    SPA_UPDATE_GOLDEN=1 pytest tests/test_report.py

writes them anew; read the difference before you commit it.
"""

import io
import json
import math
import os
from pathlib import Path

import onnx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from models import weightless
from spa.cli import app
from spa.graph.count import Counts
from spa.graph.explain import Cause
from spa.plans.plan import Plan
from spa.proof.check import Check, Difference
from spa.tables import report
from spa.timing.bench import Lap, Race

GOLDEN = Path(__file__).parent / "golden"
GRAPHS = [
    "convnext.script", "densenet.script", "gpt2.script", "llama.dynamo", "mixer.script", "mobilenetv3.dynamo", "recurrent.script",
    "resnext.script", "shufflenet.dynamo", "squeezenet.script", "swin.dynamo", "unet.dynamo", "vit.dynamo", "vit.script",
]


def text(shown, width=120, **options):
    file = io.StringIO()
    Console(file=file, width=width, **options).print(shown)
    return file.getvalue()


@pytest.mark.parametrize("name", GRAPHS)
def test_golden_inspect(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    onnx.save(weightless.load(f"models/zoo/{name}.onnx.xz"), tmp_path / "m.onnx")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.onnx")])
    assert result.exit_code == 0, result.stderr
    found = "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("SPA_UPDATE_GOLDEN"):
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8"), f"inspect changed; if that is wanted: {__doc__.splitlines()[4].strip()}"


@pytest.mark.parametrize(("number", "shown"), [
    (0, "0"), (7, "7"), (7.5, "7.5"), (999, "999"), (999.9, "1.00 k"), (1000, "1.00 k"), (12_345, "12.35 k"), (11_191_242, "11.19 M"),
    (296_101_888, "296.1 M"), (4.1e9, "4.10 G"), (2e12, "2.00 T"),
])
def test_amounts(number, shown):
    assert report.amount(number) == shown
    assert report.amount(number, "B") == (f"{shown}B" if shown[-1].isalpha() else f"{shown} B")


@pytest.mark.parametrize(("seconds", "shown"), [
    (0, "0 µs"), (85e-6, "85 µs"),
    (1e-3, "1.00 ms"), (0.0123, "12.3 ms"), (0.999, "999 ms"), (1.2, "1.20 s"), (75, "75.0 s"), (750, "750 s"),
])
def test_durations(seconds, shown):
    assert report.duration(seconds) == shown


def test_names_are_shortened_in_the_middle_and_made_harmless():
    name = "layer4." + "x" * 80 + ".weight:0"
    short = report.shorten(name, 40)
    assert len(short) == 40
    assert short.startswith("layer4.")
    assert short.endswith(".weight:0")
    assert report.shorten("a\x1b[31m\nb") == "a\\x1b[31m\\nb"


def test_markup_in_names_is_text():
    shown = text(report.notes({"[bold]a[/bold]": "[red]b[/]"}))
    assert "[bold]a[/bold]" in shown
    assert "[red]b[/]" in shown


def test_long_lists_are_cut_and_counted():
    shown = text(report.table("T", ("a", ">b"), [(str(i), str(i)) for i in range(38)]))
    assert "… and 23 more (--json lists all)" in shown
    assert len(shown.splitlines()) < 25
    assert "more" not in text(report.table("T", ("a",), [("1",)] * 15))


def test_numbers_stand_right():
    lines = text(report.table("T", ("a", ">number"), [("x", "1"), ("y", "1000")])).splitlines()
    ends = [line.rstrip() for line in lines if line.strip().startswith(("x", "y"))]
    assert len(ends[0]) == len(ends[1])


def test_comparison_shows_all_five():
    race = Race((Lap("before", 0.0123, 0.01, 0.02, 1.0), Lap("after", 0.0045, 0.004, 0.005, 0.37)), 20, 0, "CPUExecutionProvider", "1.22")
    shown = text(report.comparison(Counts(100, 2_000_000, 4000, 400), Counts(25, 500_000, 2000, 100), sizes=(1000, 250), race=race))
    for part in ("parameters", "100", "25.0 %", "2.00 M", "500.0 k", "1.00 kB", "250 B", "peak activation", "4.00 kB", "12.3 ms", "37.0 %"):
        assert part in shown


def test_no_colours_without_a_terminal():
    causes = [
        Cause("is an input of the graph", "", 1, 3, "x:1", "", 5.0, 7.0, 2.0),
        Cause("is read as a setting", "Reshape", 4, 9, "v:0", "n", 0, 0, 0),
    ]
    shown = text(report.frozen(causes, Counts(10, 10, 0, 0)))
    assert "\x1b" not in shown
    assert "50.0 %" in shown
    assert "20.0 %" in shown
    assert "4 groups of shapes and settings" in shown


def test_the_proof_says_whether_it_holds():
    passed = Check((Difference("y", 1e-7, 2e-7),), 1e-4)
    failed = Check((Difference("y", 1.0, 0.5), Difference("z", 0, 0)), 1e-4)
    assert "at most 2.0e-07 of their scale, 1e-04 is allowed" in text(report.proof(passed))
    assert "DIFFER, output y by 5.0e-01" in text(report.proof(failed))
    assert "not run" in text(report.proof(None))


def test_pruned_groups_are_listed_with_their_sizes():
    plan = Plan("", "", {"w:0": {"size": 64, "kept": list(range(48))}}, {}, {})
    shown = text(report.pruned(plan, {}))
    assert "Pruned: 1 group\n" in shown
    assert shown.splitlines()[-2].split() == ["w:0", "64", "→", "48", "75.0", "%"]


def test_weights():
    assert "all 3 float tensors" in text(report.weights(3, (), ()))
    assert "1 differ" in text(report.weights(3, ("w",), ()))


def test_json_is_valid_where_numbers_are_not():
    data = report.plain(report.check_data(Check((Difference("y", math.inf, math.nan),), 1e-4)))
    assert json.loads(json.dumps(data, allow_nan=False))["outputs"]["y"] == {"absolute": "inf", "relative": "nan"}
