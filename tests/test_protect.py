"""Protect lists: what they name stays, whatever finds the widths; what they can't mean is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_choose import chain, chosen
from test_groups import attention
from test_trace import groups_of
from typer.testing import CliRunner

import spa
from spa.cli import app
from spa.errors import BadFile, BadOption
from spa.plans.choose import Options, find_space
from spa.plans.protect import parsed, read_protect


def kept_of(plan: spa.Plan, name: str, size: int) -> set[int]:
    return set(plan.groups[name]["kept"]) if name in plan.groups else set(range(size))


def test_lines() -> None:
    found = parsed(["# remark", "", "a.*", "w1:1: 3, 7-9  # why", "  /x#y/ :  0"])
    assert [(line.pattern, line.ranges) for line in found] == [("a.*", ()), ("w1:1", ((3, 3), (7, 9))), ("/x#y/", ((0, 0),))]
    assert found[1].where == "--protect, line 4 ('w1:1: 3, 7-9')"


@pytest.mark.parametrize("line, says", [
    ("w1:1: three", r"line 1 \('w1:1: three'\): after the colon come coordinates"),
    ("w1:1: 5-3", "5-3 ends before it begins"),
    ("w1:1: 32", "w1:1 has no coordinate 32; its 32 are 0 to 31"),
    ("nothing.*", "'nothing.*' matches no group, node or value"),
    ("nothing.*: 3", "'nothing.*' matches no group, node or value"),
    ("/[/", "is no regular expression"),
])  # fmt: skip
def test_what_names_nothing_is_said_with_its_line(line: str, says: str) -> None:
    with pytest.raises(BadOption, match=says):
        find_space(groups_of(chain()), Options(protect=(line,)))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_protected_coordinates_stay(scope: str) -> None:
    """The lowest scores of the first group are protected: others go in their place."""
    groups = groups_of(chain())
    kept, choice = chosen(groups, ratio=0.5, scope=scope, protect=("w1:1: 0-3, 8",))
    gone = choice.gone[groups.by_name["w1:1"].coordinates]
    assert not gone[[0, 1, 2, 3, 8]].any()
    assert gone.any()
    if scope == "local":
        assert kept["w1:1"] == 16


def test_more_protected_than_asked_for_keeps_them_all() -> None:
    groups = groups_of(chain())
    kept, choice = chosen(groups, ratio=0.9, protect=("w1:1: 0-19",))
    assert kept["w1:1"] == 20
    assert not choice.gone[groups.by_name["w1:1"].coordinates][:20].any()


def test_rounding_goes_up_from_what_is_protected() -> None:
    assert chosen(chain(), ratio=0.9, multiple_of=8, protect=("w1:1: 0-9",))[0]["w1:1"] == 16


def test_whole_groups() -> None:
    kept, choice = chosen(chain(), ratio=0.5, protect=("w1:1",))
    assert list(kept) == ["w2:1"]
    assert "protected" in choice.notes["w1:1"]
    assert list(chosen(chain(), ratio=0.5, protect=("two",))[0]) == []  # the node that reads one group and makes the other


def test_kinds_and_heads() -> None:
    model = attention()
    plan = spa.plan(model, 0.5, multiple_of=1, units=["head"], protect=["kind:head: 1, 3"])
    assert kept_of(plan, "wq:1#2", 4) == {1, 3}


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity", "solver"])
def test_allocations_keep_them(allocation: str) -> None:
    model = chain()
    wanted = [int(i) for i in np.argsort(np.linalg.norm(_weight(model, "w1"), axis=0))[:6]]  # what would go first
    line = "w1:1: " + ", ".join(map(str, wanted))
    plan = spa.plan(model, target=spa.Budget(("macs=0.3",), allocation), multiple_of=1, protect=[line])
    assert set(wanted) <= kept_of(plan, "w1:1", 32)
    assert len(kept_of(plan, "w1:1", 32)) < 32


def test_swaps_leave_them() -> None:
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((2, 4)).astype(np.float32)} for _ in range(20)]
    plan = spa.plan(chain(8, 8), 0.5, multiple_of=1, calibration=data, swaps=3, criterion="random", protect=["w1:1: 2, 5"])
    assert {2, 5} <= kept_of(plan, "w1:1", 8)


def _weight(model: onnx.ModelProto, name: str) -> Any:
    return next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def test_steps_take_groups_but_no_coordinates() -> None:
    with pytest.raises(BadOption, match="prune in one step, or name groups"):
        spa.prune(chain(), 0.5, multiple_of=1, steps=2, protect=["w1:1: 0"])
    result = spa.prune(chain(), 0.5, multiple_of=1, steps=2, protect=["w1:1"])
    assert list(result.plan.groups) == ["w2:1"]


def test_the_command_line(tmp_path: Path) -> None:
    onnx.save(chain(), tmp_path / "m.onnx")
    listed = tmp_path / "protect.txt"
    listed.write_text("# the first\nw1:1: 0-3\n")
    files = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "s.onnx"), "--protect", str(listed), "--multiple-of", "1", "--no-bench"]
    made = CliRunner().invoke(app, ["prune", *files])
    assert made.exit_code == 0, made.stderr
    assert set(range(4)) <= kept_of(spa.load_plan(tmp_path / "s.plan.json"), "w1:1", 32)
    data = tmp_path / "d.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
    swept = CliRunner().invoke(app, ["sweep", files[0], "-o", str(tmp_path / "f"), "-r", "0.5", "--calibration", str(data), *files[3:7]])
    assert swept.exit_code == 0, swept.stderr
    plans = list((tmp_path / "f" / "plans").glob("*.json"))
    assert plans
    assert all(set(range(4)) <= kept_of(spa.load_plan(p), "w1:1", 32) for p in plans)
    listed.write_text("# none\n")
    refused = CliRunner().invoke(app, ["prune", *files])
    assert refused.exit_code != 0
    assert "names nothing" in " ".join(refused.stderr.split())


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"protect file .* can't be read"):
        read_protect(tmp_path / "none.txt")
