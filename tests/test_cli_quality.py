"""The command line on calibration data: criteria that look at them, repair, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from repair_cases import drawn, network
from test_cli import convnet, refused, run

import spa

QUICK = ("--no-bench", "--multiple-of", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models and data, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    onnx.save(convnet(shape=("n", 3, 8, 8), width=16), "m.onnx")
    onnx.save(network("residual")[0], "norms.onnx")
    np.savez("d.npz", x=drawn((60, 3, 8, 8), 0))
    return tmp_path


def done(*args: Any) -> dict[str, Any]:
    """What a command says in JSON."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found.get("proof") is None or found["proof"]["passed"]
    return found


def outputs(path: str, shape: tuple[int, ...] = (7, 3, 8, 8), seed: int = 7) -> np.ndarray:
    found: np.ndarray = spa.proof.check.session(spa.load(path), threads=1).run(None, {"x": drawn(shape, seed)})[0]
    return found


def off(path: str, dense: str = "m.onnx") -> float:
    """Mean squared error on data not fitted."""
    return float(((outputs(path, (50, 3, 8, 8)) - outputs(dense, (50, 3, 8, 8))) ** 2).mean())


def tensors(path: str) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in onnx.load(path).graph.initializer}


# ---------------------------------------------------------------------- repair


def test_data_ask_for_a_repair(folder: Path) -> None:
    """With --calibration and nothing else said, kept weights are fitted."""
    repaired = done("prune", "m.onnx", "-o", "s.onnx", *QUICK, "--calibration", "d.npz")["repair"]
    assert {x["name"] for x in repaired["layers"]} == {"conv2", "fc1", "fc2"}
    for layer in repaired["layers"]:
        assert 0 <= layer["after"] < layer["before"]
        assert 0 < layer["removed"] < layer["columns"]
    assert repaired["skipped"] == {}
    same = done("prune", "m.onnx", "-o", "t.onnx", *QUICK, "--calibration", "d.npz", "--repair", "obspa")["repair"]
    assert same == repaired
    assert (folder / "s.onnx").read_bytes() == (folder / "t.onnx").read_bytes()
    shown = run("prune", "m.onnx", "-o", "s.onnx", *QUICK, "--calibration", "d.npz")
    assert shown.exit_code == 0
    assert "Repaired: 3 layers" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120
    onnx.checker.check_model("s.onnx", full_check=True)


def test_each_repair_is_better_than_less(folder: Path) -> None:
    errors = {}
    for method in ("none", "bias", "affine", "obspa", "fold"):
        data = done("prune", "m.onnx", "-o", f"{method}.onnx", *QUICK, "--calibration", "d.npz", "--repair", method)
        assert (data["repair"] is None) == (method == "none")
        errors[method] = off(f"{method}.onnx")
        kept = {n: e["kept"] for n, e in json.loads((folder / f"{method}.plan.json").read_text())["groups"].items()}
        assert kept == {n: e["kept"] for n, e in json.loads((folder / "none.plan.json").read_text())["groups"].items()}
        if method in ("bias", "affine"):
            assert all(x["after"] < x["before"] for x in data["repair"]["layers"])
    assert errors["obspa"] < errors["affine"] < errors["bias"] < errors["none"]
    assert errors["fold"] != errors["none"]
    without = done("prune", "m.onnx", "-o", "plain.onnx", *QUICK)
    assert without["repair"] is None
    assert (folder / "plain.onnx").read_bytes() == (folder / "none.onnx").read_bytes()


def test_fold_needs_no_data(folder: Path) -> None:
    assert done("prune", "m.onnx", "-o", "s.onnx", *QUICK, "--repair", "fold", "--criterion", "fold")["repair"] is not None
    assert tensors("s.onnx") != tensors("m.onnx")


def test_options_of_the_repair(folder: Path) -> None:
    made = set()
    for i, options in enumerate(([], ["--repair-inputs", "dense"], ["--repair-target", "pruned"], ["--damping", "0.5"])):
        done("prune", "m.onnx", "-o", f"{i}.onnx", *QUICK, "--calibration", "d.npz", *options)
        made.add((folder / f"{i}.onnx").read_bytes())
    assert len(made) == 4


def test_moments_of_norms(folder: Path) -> None:
    """No inputs at all: means come from what the norms remember."""
    repaired = done("prune", "norms.onnx", "-o", "s.onnx", *QUICK, "--calibration", "moments", "--repair", "bias")["repair"]
    assert len(repaired["layers"]) == 3
    assert all(x["after"] < x["before"] for x in repaired["layers"])
    done("prune", "norms.onnx", "-o", "plain.onnx", *QUICK)
    one, other = tensors("s.onnx"), tensors("plain.onnx")
    assert one != other
    assert all(one[n] == other[n] for n in ("w1", "w2", "w3", "w4"))  # constants alone change
    skipped = done("prune", "m.onnx", "-o", "t.onnx", *QUICK, "--calibration", "moments", "--repair", "bias")["repair"]
    assert set(skipped["skipped"]) == {"conv2", "fc1", "fc2"}
    done("prune", "m.onnx", "-o", "u.onnx", *QUICK)
    one, other = tensors("t.onnx"), tensors("u.onnx")
    assert other.items() <= one.items()
    assert not any(one[n].strip(b"\0") for n in one.keys() - other.keys())  # biases that stay zero


def test_norms_are_measured_unless_told_not_to(folder: Path) -> None:
    arguments = ("norms.onnx", *QUICK, "--calibration", "d.npz", "--repair", "bias")
    measured, left = (done("prune", *arguments, "-o", f"{n}.onnx", *more)["repair"] for n, more in (("a", ()), ("b", ("--no-norms",))))
    assert measured["norms"] > 0
    assert left["norms"] == 0
    assert tensors("a.onnx") != tensors("b.onnx")


def test_the_repaired_model_before_the_deletion(folder: Path) -> None:
    done("prune", "m.onnx", "-o", "s.onnx", *QUICK, "--calibration", "d.npz", "--repaired-out", "r.onnx")
    assert sorted(p.name for p in folder.glob("*.json")) == ["r.plan.json", "s.plan.json"]
    assert outputs("r.onnx").shape == outputs("m.onnx").shape
    assert {t.name: t.dims for t in onnx.load("m.onnx").graph.initializer}.items() <= {
        t.name: t.dims for t in onnx.load("r.onnx").graph.initializer}.items()
    assert done("apply", "r.onnx", "r.plan.json", "-o", "again.onnx")["repair"] is None
    assert outputs("again.onnx").tobytes() == outputs("s.onnx").tobytes()
    assert tensors("again.onnx") == tensors("s.onnx")
    found = json.loads(run("check", "r.onnx", "s.onnx", "--plan", "r.plan.json", "--json").stdout)
    assert found["proof"]["passed"]
    assert found["weights"]["differing"] == []


def test_apply_repairs(folder: Path) -> None:
    done("prune", "m.onnx", "-o", "s.onnx", *QUICK, "--calibration", "d.npz")
    applied = done("apply", "m.onnx", "s.plan.json", "-o", "t.onnx", "--repair", "obspa", "--calibration", "d.npz")["repair"]
    assert all(x["after"] < x["before"] for x in applied["layers"])
    assert (folder / "t.onnx").read_bytes() == (folder / "s.onnx").read_bytes()
    assert done("apply", "m.onnx", "s.plan.json", "-o", "u.onnx", "--repair", "none", "--calibration", "d.npz")["repair"] is None
    assert off("t.onnx") < off("u.onnx")
    done("apply", "m.onnx", "s.plan.json", "-o", "v.onnx", "--calibration", "d.npz", "--repaired-out", "r.onnx")
    done("apply", "r.onnx", "r.plan.json", "-o", "w.onnx")
    assert outputs("w.onnx").tobytes() == outputs("v.onnx").tobytes()


# ---------------------------------------------------------------------- criteria


def test_a_plan_by_what_channels_carry(folder: Path) -> None:
    done("plan", "m.onnx", "-o", "p.json", "--criterion", "flap", "--calibration", "d.npz", "--multiple-of", "1")
    options = json.loads((folder / "p.json").read_text())["options"]
    assert (options["criterion"], options["calibration"], options["samples"]) == ("flap", "d.npz", 60)
    done("plan", "m.onnx", "-o", "few.json", "--criterion", "flap", "--calibration", "d.npz", "--multiple-of", "1", "--samples", "8")
    assert json.loads((folder / "few.json").read_text())["options"]["samples"] == 8
    plan = spa.plan("m.onnx", criterion="flap", multiple_of=1, calibration="d.npz")
    assert {n: list(e["kept"]) for n, e in plan.groups.items()} == {
        n: e["kept"] for n, e in json.loads((folder / "p.json").read_text())["groups"].items()}
    done("apply", "m.onnx", "p.json", "-o", "s.onnx")


def test_greedy_on_noise(folder: Path) -> None:
    arguments = ("m.onnx", *QUICK, "--criterion", "obspa-greedy", "--calibration", "none")
    repaired = done("prune", *arguments, "-o", "s.onnx")["repair"]
    assert all(x["after"] < x["before"] for x in repaired["layers"])
    assert json.loads((folder / "s.plan.json").read_text())["options"]["criterion"] == "obspa-greedy"
    done("prune", *arguments, "-o", "t.onnx", "--swaps", "3")
    done("prune", *arguments, "-o", "u.onnx", "--damping", "0.5", "--normalize", "energy", "--scope", "global")
    assert json.loads((folder / "u.plan.json").read_text())["options"]["damping"] == 0.5


@pytest.mark.parametrize("criterion", ["obspa-greedy", "random", "fold"])
def test_groups_that_are_scored_as_one_are_not_aggregated(folder: Path, criterion: str) -> None:
    refused(folder, "prune", "m.onnx", *QUICK, "--criterion", criterion, "--calibration", "none", "-o", "s.onnx", "--aggregate", "median",
            says="scores a group as one")


@pytest.mark.parametrize("options", [
    ["--calibration", "d.npz"], ["--calibration", "none", "--criterion", "obspa", "--swaps", "2"],
    ["--calibration", "d.npz", "--criterion", "random", "--seed", "3", "--repair", "bias"], ["--repair", "fold", "--criterion", "fold"],
])  # fmt: skip
def test_the_same_comes_out_again(folder: Path, options: list[str]) -> None:
    for name in ("one", "two"):
        done("prune", "norms.onnx", "-o", f"{name}.onnx", *QUICK, *options, "--repaired-out", f"{name}r.onnx")
    for end in (".onnx", ".plan.json", "r.onnx", "r.plan.json"):
        assert (folder / f"one{end}").read_bytes() == (folder / f"two{end}").read_bytes()


def test_another_seed_is_another_noise(folder: Path) -> None:
    for seed in "01":
        done("prune", "m.onnx", "-o", f"{seed}.onnx", *QUICK, "--calibration", "none", "--seed", seed)
    assert tensors("0.onnx") != tensors("1.onnx")


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("args", "says"), [
    (["--repair", "obspa"], "--repair obspa fits layers to data: give some with --calibration"),
    (["--repair", "bias"], "--calibration"), (["--repair", "affine"], "--calibration"),
    (["--repair", "best"], "--repair is 'best'; the choice is: none, bias, affine, obspa, fold"),
    (["--repair", "best", "--calibration", "d.npz"], "--repair is 'best'"),
    (["--calibration", "d.npz", "--damping", "-1"], "--damping is -1.0"),
    (["--calibration", "d.npz", "--damping", "nan"], "--damping"),
    (["--calibration", "d.npz", "--repair-inputs", "wet"], "--repair-inputs is 'wet'"),
    (["--calibration", "d.npz", "--repair-target", "wet"], "--repair-target is 'wet'"),
    (["--calibration", "names.npz"], "names.npz"), (["--calibration", "nan.npz"], "holds NaN"),
    (["--calibration", "inf.npz"], "infinity"), (["--calibration", "shape.npz"], "shape.npz"),
    (["--calibration", "empty.npz"], "no samples"), (["--calibration", "text.npz"], "text.npz"),
    (["--calibration", "nowhere.npz"], "do not exist"), (["--calibration", "d.npz", "--samples", "0"], "--samples"),
    (["--calibration", "d.npz", "--samples", "1"], "fewer than two rows"),
    (["--calibration", "d.npz", "--preprocess", "imagenet"], "--preprocess is for pictures"),
    (["--calibration", "d.npz", "--labels", "y"], "'y'"),
])  # fmt: skip
def test_bad_options_of_repairs(folder: Path, args: list[str], says: str) -> None:
    bad(folder)
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", *args, says=says)
    (folder / "p.json").write_text(spa.plan("m.onnx").to_json())
    refused(folder, "apply", "m.onnx", "p.json", "-o", "s.onnx", *args, says=says)


def bad(folder: Path) -> None:
    good = drawn((4, 3, 8, 8), 1)
    nan, infinite = good.copy(), good.copy()
    nan[1, 0, 0, 0], infinite[1, 0, 0, 0] = np.nan, np.inf
    np.savez("names.npz", z=good, mask=np.ones(4, np.float32))
    np.savez("nan.npz", x=nan)
    np.savez("inf.npz", x=infinite)
    np.savez("shape.npz", x=good[:, :2])
    np.savez("empty.npz", x=good[:0])
    (folder / "text.npz").write_text("no archive")


@pytest.mark.parametrize(("args", "says"), [
    (["--swaps", "2"], "--swaps compares errors on data"), (["--swaps", "-1"], "--swaps"),
    (["--criterion", "flap"], "--calibration"), (["--criterion", "obspa"], "--calibration"), (["--criterion", "taylor"], "--calibration"),
    (["--aggregate", "most"], "--aggregate is 'most'; the choice is: sum, mean, median, max, prod"),
    (["--normalize", "most"], "--normalize is 'most'"), (["--normalize", "energy"], "--normalize energy goes with"),
    (["--normalize", "energy", "--criterion", "flap", "--calibration", "d.npz"], "--normalize energy goes with"),
    (["--criterion", "flap", "--calibration", "nan.npz"], "holds NaN"), (["--criterion", "flop", "--calibration", "d.npz"], "flap"),
    (["--criterion", "flap", "--calibration", "names.npz"], "names.npz"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "prune"])
def test_bad_options_of_criteria(folder: Path, command: str, args: list[str], says: str) -> None:
    bad(folder)
    refused(folder, command, "m.onnx", "-o", "out", *args, says=says)


@pytest.mark.parametrize("loss", ["nope", "json:none", "math:pi"])
def test_bad_losses(folder: Path, loss: str) -> None:
    pytest.importorskip("torch")
    refused(folder, "plan", "m.onnx", "-o", "p.json", "--criterion", "taylor", "--calibration", "d.npz", "--loss", loss, says=repr(loss))


@pytest.mark.parametrize("method", ["obspa", "affine", None])
def test_moments_are_for_constants(folder: Path, method: str | None) -> None:
    extra = [] if method is None else ["--repair", method]
    refused(folder, "prune", "norms.onnx", "-o", "s.onnx", "--calibration", "moments", *extra, says="are for --repair bias")


@pytest.mark.parametrize("criterion", ["obspa", "taylor", "flap", "amp"])
def test_moments_are_not_for_criteria(folder: Path, criterion: str) -> None:
    if criterion == "taylor":
        pytest.importorskip("torch")
    refused(folder, "prune", "norms.onnx", "-o", "s.onnx", "--calibration", "moments", "--repair", "bias", "--criterion", criterion)


def test_repaired_out_keeps_inputs_and_outputs(folder: Path) -> None:
    arguments = ["prune", "m.onnx", "-o", "s.onnx", "--calibration", "d.npz", "--repaired-out"]
    refused(folder, *arguments, "m.onnx", says="read from")
    refused(folder, *arguments, "s.onnx", says="two names")
    refused(folder, *arguments, "s.plan.json", says="two names")
    refused(folder, *arguments, "nowhere/r.onnx", says="there is no folder")


@pytest.mark.parametrize("options", [[], ["--calibration", "d.npz", "--repair", "none"]])
def test_nothing_repaired_is_nothing_to_write(folder: Path, options: list[str]) -> None:
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", *QUICK, *options, "--repaired-out", "r.onnx", says="Nothing was repaired")


@pytest.mark.parametrize("option", [["-o", "d.npz"], ["-o", "s.onnx", "--repaired-out", "d.npz"]])
def test_an_output_never_destroys_calibration_data(folder: Path, option: list[str]) -> None:
    refused(folder, "prune", "m.onnx", *QUICK, "--calibration", "d.npz", *option, says="read from")


@pytest.mark.parametrize("option", [["--tokenizer", "t.json"], ["--preprocess", "imagenet"], ["--labels", "y"]])
def test_options_of_data_without_data(folder: Path, option: list[str]) -> None:
    refused(folder, "prune", "m.onnx", *QUICK, "-o", "s.onnx", *option, says="--calibration")
