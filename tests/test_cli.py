"""The command line: what it prints, writes and returns, and that whatever it refuses leaves everything as it was."""

import hashlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import spa
from spa import api, cli
from spa.commands.reading import plan_name
from spa.commands.terminal import verdict
from spa.proof.check import Check, Difference


def convnet(*, shape=(1, 3, 8, 8), seed=0, nan=False, width=32):
    """Two convolutions with a residual connection, pooling and a linear layer."""
    rng = np.random.default_rng(seed)

    def weight(name, *dims):
        values = rng.standard_normal(dims).astype(np.float32) * 0.2
        if nan:
            values.flat[0] = np.nan
        return numpy_helper.from_array(values, name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "c"], ["d"], "add"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "pool"),
        helper.make_node("Flatten", ["e"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "bias"], ["h"], "fc1", transB=1),
        helper.make_node("Relu", ["h"], ["i"], "relu2"),
        helper.make_node("Gemm", ["i", "w4"], ["y"], "fc2", transB=1),
    ]
    shapes = {"w1": (width, 3, 3, 3), "w2": (width, width, 3, 3), "w3": (64, width), "bias": (64,), "w4": (5, 64)}
    weights = [weight(name, *dims) for name, dims in shapes.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None if shape is None else [shape[0], 5])
    return helper.make_model(helper.make_graph(nodes, "net", [x], [y], weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def frozen_net():
    """One linear layer from input to output: nothing may go."""
    weight = numpy_helper.from_array(np.ones((5, 4), np.float32), "w")
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "fc", transB=1)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 4]), ("y", [1, 5])))
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, pruned."""
    folder = tmp_path_factory.mktemp("made")
    onnx.save(convnet(), folder / "m.onnx")
    spa.prune(folder / "m.onnx").save(folder / "small.onnx", plan=folder / "small.plan.json")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with models, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    onnx.save(convnet(), "m.onnx")
    return tmp_path


def run(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def state(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in folder.rglob("*")}


def refused(folder, *args, code=2, says=""):
    """The command ends in one sentence and changes nothing."""
    before = state(folder)
    result = run(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("spa: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.rstrip()[-1] in ".?"
    assert "internal error" not in result.stderr
    assert says in result.stderr
    assert state(folder) == before
    with_json = run(*args, "--json")
    assert with_json.exit_code == code
    assert json.loads(with_json.stdout)["error"]["exit_code"] == code
    assert state(folder) == before


# ---------------------------------------------------------------------- what works


def test_prune_writes_model_and_plan_and_shows_tables(folder):
    result = run("prune", "m.onnx", "-o", "small.onnx")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in folder.iterdir()) == ["m.onnx", "small.onnx", "small.plan.json"]
    numbers = ("parameters", "MACs", "file size", "peak activation memory", "latency")
    for part in (*numbers, "Pruned: 2 groups", "w1:0", "Frozen", "Proof: removing"):
        assert part in result.stdout
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    onnx.checker.check_model("small.onnx", full_check=True)


def test_prune_json_has_exact_numbers(folder):
    result = run("prune", "m.onnx", "-o", "small.onnx", "--plan-out", "p.json", "--json", "--ratio", "0.5", "--multiple-of", "1")
    data = json.loads(result.stdout)
    assert data["before"]["parameters"] == sum(numpy_helper.to_array(w).size for w in convnet().graph.initializer)
    assert data["after"]["parameters"] == sum(numpy_helper.to_array(w).size for w in onnx.load("small.onnx").graph.initializer)
    assert data["after"]["file_bytes"] == (folder / "small.onnx").stat().st_size
    assert {g["name"]: (g["from"], g["to"]) for g in data["groups"]} == {"w1:0": (32, 16), "w3:0": (64, 32)}
    assert data["proof"]["passed"]
    assert data["proof"]["largest_difference"] <= 1e-4
    assert [x["model"] for x in data["latency"]["laps"]] == ["before", "after"]
    assert (folder / "p.json").exists()
    assert not (folder / "small.plan.json").exists()


def test_plan_and_apply_give_what_prune_gives(folder):
    assert run("plan", "m.onnx", "-o", "p.json", "--ratio", "0.25", "--criterion", "l1").exit_code == 0
    assert run("apply", "m.onnx", "p.json", "-o", "one.onnx").exit_code == 0
    assert run("prune", "m.onnx", "-o", "two.onnx", "--ratio", "0.25", "--criterion", "l1", "--no-bench").exit_code == 0
    assert (folder / "one.onnx").read_bytes() == (folder / "two.onnx").read_bytes()
    assert (folder / "p.json").read_bytes() == (folder / "two.plan.json").read_bytes()


def test_no_check_and_no_bench_skip(folder):
    data = json.loads(run("prune", "m.onnx", "-o", "s.onnx", "--no-check", "--no-bench", "--json").stdout)
    assert data["proof"] is None
    assert data["latency"] is None


def test_check_proves_again(made):
    result = run("check", made / "m.onnx", made / "small.onnx", "--plan", made / "small.plan.json")
    assert result.exit_code == 0
    assert "hold exactly the kept elements" in result.stdout
    data = json.loads(run("check", made / "m.onnx", made / "small.onnx", "--plan", made / "small.plan.json", "--json").stdout)
    assert data["weights"] == {"exact": 5, "differing": [], "unknown": []}
    assert data["proof"]["passed"]


def test_check_of_another_model_differs(made, tmp_path):
    other = onnx.load(made / "small.onnx")
    weight = next(w for w in other.graph.initializer if w.name == "w3")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, "w3"))
    onnx.save(other, tmp_path / "other.onnx")
    result = run("check", made / "m.onnx", tmp_path / "other.onnx", "--plan", made / "small.plan.json", "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["weights"]["differing"] == ["w3"]
    assert not data["proof"]["passed"]
    shown = run("check", made / "m.onnx", tmp_path / "other.onnx", "--plan", made / "small.plan.json")
    assert "DIFFER" in shown.stdout


def test_bench_races(made):
    args = ["bench", made / "m.onnx", made / "small.onnx", made / "m.onnx", "--rounds", "3", "--threads", "1"]
    laps = json.loads(run(*args, "--json").stdout)["laps"]
    assert [x["model"] for x in laps] == [str(made / "m.onnx"), str(made / "small.onnx"), f"{made / 'm.onnx'} #2"]
    assert laps[0]["ratio_to_first"] == 1
    assert "median of 3 rounds" in " ".join(run(*args).stdout.split())


def test_version():
    data = json.loads(run("version", "--json").stdout)
    assert data["spa"] == spa.__version__
    assert "CPUExecutionProvider" in data["providers"]
    assert "onnxruntime" in run("version").stdout


def test_inspect_json_names_groups_sites_and_causes(made):
    data = json.loads(run("inspect", made / "m.onnx", "--json").stdout)
    groups = {g["name"]: g for g in data["groups"]}
    assert groups["w1:0"]["size"] == 32
    assert ["w2", 1] in groups["w1:0"]["sites"]
    assert groups["w4:0"]["frozen"]["value"] == "y"
    assert {c["cause"] for c in data["frozen"]} >= {"is a kernel's extent", "is an input of the graph"}


def test_inspect_reads_no_more_than_it_shows(made, monkeypatch):
    """The hash of a large file takes a minute; only JSON has it."""
    monkeypatch.setattr("spa.storage.origin.Origin._hashed", lambda self: pytest.fail("hashed"))
    assert run("inspect", made / "m.onnx").exit_code == 0


def test_inspect_one_group(made):
    assert "w1:0: 32 channels, kind: channel\n  may shrink\n" in run("inspect", made / "m.onnx", "--group", "w1:0").stdout
    data = json.loads(run("inspect", made / "m.onnx", "--group", "w?:0", "--json").stdout)
    assert [g["name"] for g in data["groups"]] == ["w1:0", "w3:0", "w4:0"]


def test_inspect_explains(made):
    assert "w4:0" in run("inspect", made / "m.onnx", "--explain", "w4:0").stdout
    result = run("inspect", made / "m.onnx", "--explain", "w1:0", "--explain", "w3:1")
    assert "w1:0 and w3:1 are coupled" in result.stdout
    assert "—Flatten flatten" in result.stdout
    assert "are not coupled" in run("inspect", made / "m.onnx", "--explain", "w1:0", "--explain", "w4:1").stdout
    data = json.loads(run("inspect", made / "m.onnx", "--explain", "w1", "--json").stdout)
    assert [e["axis"] for e in data["explanations"]] == [0, 1, 2, 3]
    assert data["explanations"][1]["groups"][0]["path"]["steps"][-1]["site"] == ["x", 1]


def test_inspect_exports_graphs(folder):
    assert run("inspect", "m.onnx", "--graphml", "g.xml", "--dot", "g.dot").exit_code == 0
    assert (folder / "g.xml").read_text().startswith("<graphml")
    assert (folder / "g.dot").read_text().startswith("graph")


@pytest.mark.parametrize(("name", "text"), [("r.yaml", "w3:0: 0.75\n'fc2': 0.5\n"), ("r.toml", '"w3:0" = 0.75\n')])
def test_ratios_file(folder, name, text):
    (folder / name).write_text(text)
    data = json.loads(run("plan", "m.onnx", "-o", "p.json", "--ratios", name, "--multiple-of", "1", "--json").stdout)
    assert {g["name"]: g["to"] for g in data["groups"]} == {"w1:0": 16, "w3:0": 16}


def test_include_and_exclude(folder):
    patterns = ["--include", "fc*", "--include", "/^w1/", "--exclude", "conv?"]
    data = json.loads(run("plan", "m.onnx", "-o", "p.json", *patterns, "--json").stdout)
    assert [g["name"] for g in data["groups"]] == ["w3:0"]


def test_an_unknown_rank_asks_for_the_shape(folder):
    onnx.save(convnet(shape=None), "open.onnx")
    refused(folder, "prune", "open.onnx", "-o", "s.onnx", says="--input x:1x3x224x224")
    for text in ("x:1x3x8x8", "1x3x8x8"):
        assert run("prune", "open.onnx", "-o", "s.onnx", "--input", text, "--no-bench").exit_code == 0


def test_feeds_are_used(folder):
    onnx.save(convnet(shape=("n", 3, "h", "w")), "open.onnx")
    np.savez("f.npz", x=np.ones((2, 3, 12, 10), np.float32))
    result = run("prune", "open.onnx", "-o", "s.onnx", "--feeds", "f.npz", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "s.plan.json").read_text())["trace"]["inputs"] == {"x": [2, 3, 12, 10]}


def test_external_data_counts(folder):
    onnx.save(convnet(), "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    data = json.loads(run("prune", "e.onnx", "-o", "s.onnx", "--no-bench", "--json").stdout)
    assert data["before"]["file_bytes"] == sum((folder / n).stat().st_size for n in ("e.onnx", "e.bin"))
    assert data["after"]["file_bytes"] == sum((folder / n).stat().st_size for n in ("s.onnx", "s.onnx.data"))
    refused(folder, "prune", "e.onnx", "-o", "e.bin", says="read from")


def test_verbose_logs_to_stderr(folder):
    result = run("plan", "m.onnx", "-o", "p.json", "-v", "--json")
    json.loads(result.stdout)
    assert "tracing: " in result.stderr


def test_the_plan_is_named_after_the_model(tmp_path):
    for name, plan in (("small.onnx", "small.plan.json"), ("a.b.onnx", "a.b.plan.json"), ("small", "small.plan.json")):
        assert plan_name(tmp_path / name) == tmp_path / plan


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("args", "says"), [
    (["--ratio", "0"], "between 0 and 1"), (["--ratio", "1"], "between 0 and 1"), (["--ratio", "nan"], "between 0 and 1"),
    (["--ratio", "-0.5"], "between 0 and 1"), (["--ratio", "half"], "--ratio"), (["--scope", "world"], "isomorphic"),
    (["--criterion", "l7"], "l2"), (["--multiple-of", "0"], "--multiple-of"), (["--multiple-of", "some"], "--multiple-of"),
    (["--keep-at-least", "0"], "--keep-at-least"), (["--include", "nothing*"], "matches no group"), (["--exclude", "/(/"], "expression"),
    (["--input", "x:1xx3"], "form"), (["--input", "z:1x3x8x8"], "not an input"), (["--input", "x:1x3"], "axes"),
    (["--input", "x:0x3x8x8"], "size 0"),
    (["--ratios", "none.yaml"], "none.yaml"), (["--seed", "-1"], "--seed"), (["--colour"], "--colour"),
])
@pytest.mark.parametrize("command", ["plan", "prune"])
def test_bad_options(folder, command, args, says):
    refused(folder, command, "m.onnx", "-o", "out", *args, says=says)


@pytest.mark.parametrize(("text", "says"), [
    ("a: b: c", "YAML"), ("[]", "map patterns"), ("", "map patterns"), ("w1*: half", "no number"), ("w1*: true", "no number"),
    ("w1*: 1.5", "between 0 and 1"), ("zzz: 0.5", "matches no group"), ("\x00", "YAML"),
])
def test_bad_ratios_files(folder, text, says):
    (folder / "r.yaml").write_text(text)
    refused(folder, "plan", "m.onnx", "-o", "p.json", "--ratios", "r.yaml", says=says)


@pytest.mark.parametrize("content", [b"", b"\x00\x01garbage" * 9, b"not onnx at all", None])
def test_bad_models(folder, content):
    data = (folder / "m.onnx").read_bytes()
    (folder / "bad.onnx").write_bytes(data[: len(data) // 2] if content is None else content)
    for args in (["inspect"], ["plan", "-o", "p.json"], ["prune", "-o", "s.onnx"], ["bench"]):
        refused(folder, args[0], "bad.onnx", *args[1:], says="bad.onnx")


def test_missing_and_impossible_files(folder):
    (folder / "sub").mkdir()
    refused(folder, "prune", "none.onnx", "-o", "s.onnx", says="no such file")
    refused(folder, "prune", "sub", "-o", "s.onnx", says="folder")
    refused(folder, "prune", "m.onnx", "-o", "sub", says="is a folder")
    refused(folder, "prune", "m.onnx", "-o", "nowhere/s.onnx", says="there is no folder nowhere")
    refused(folder, "inspect", "m.onnx", "--dot", "nowhere/g.dot", says="there is no folder")
    refused(folder, "apply", "m.onnx", "none.json", "-o", "s.onnx", says="no plan file")
    refused(folder, "prune", "m.onnx", says="--output")
    refused(folder, "prune", "m.onnx", "-o", "s" * 300, says="can't be written")


def test_an_output_never_destroys_an_input(folder):
    (folder / "link.onnx").symlink_to("m.onnx")
    (folder / "hard.onnx").hardlink_to("m.onnx")
    for name in ("m.onnx", "./m.onnx", "link.onnx", "hard.onnx"):
        refused(folder, "prune", "m.onnx", "-o", name, says="read from")
        refused(folder, "plan", "m.onnx", "-o", name, says="read from")
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", "--plan-out", "m.onnx", says="read from")
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", "--plan-out", "./s.onnx", says="two names")
    assert run("plan", "m.onnx", "-o", "p.json").exit_code == 0
    refused(folder, "apply", "m.onnx", "p.json", "-o", "p.json", says="read from")


def test_a_folder_that_may_not_be_changed(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda _, mode: not mode & os.W_OK)
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", says="may not be changed")


def test_nothing_to_prune_is_no_failure_but_1(folder):
    onnx.save(frozen_net(), "f.onnx")
    refused(folder, "prune", "f.onnx", "-o", "s.onnx", code=1, says="Nothing to prune")
    refused(folder, "plan", "f.onnx", "-o", "p.json", code=1, says="Nothing to prune")
    assert run("inspect", "f.onnx").exit_code == 0


def test_nan_weights(folder):
    onnx.save(convnet(nan=True), "n.onnx")
    refused(folder, "prune", "n.onnx", "-o", "s.onnx", says="NaN")


def test_plans_of_other_models(folder):
    assert run("plan", "m.onnx", "-o", "p.json").exit_code == 0
    onnx.save(convnet(seed=1), "weights.onnx")
    onnx.save(convnet(width=48), "graph.onnx")
    says = "its tensor 'w1' has the shape (32, 3, 3, 3), that of this model is (48, 3, 3, 3)"
    refused(folder, "apply", "graph.onnx", "p.json", "-o", "s.onnx", says=says)
    refused(folder, "apply", "graph.onnx", "p.json", "-o", "s.onnx", "--other-weights", says=says)
    refused(folder, "apply", "weights.onnx", "p.json", "-o", "s.onnx", says="--other-weights")
    assert run("apply", "weights.onnx", "p.json", "-o", "s.onnx", "--other-weights").exit_code == 0
    refused(folder, "check", "weights.onnx", "s.onnx", "--plan", "p.json", says="--other-weights")
    assert run("check", "weights.onnx", "s.onnx", "--plan", "p.json", "--other-weights").exit_code == 0
    for text in ("{}", "nonsense", '{"format": "spa-plan", "version": 99}', '{"format": "spa-plan", "version": 1}'):
        (folder / "bad.json").write_text(text)
        refused(folder, "apply", "m.onnx", "bad.json", "-o", "t.onnx", says="bad.json")


def test_check_of_models_that_do_not_go_together(folder):
    assert run("plan", "m.onnx", "-o", "p.json").exit_code == 0
    model = convnet()
    model.graph.output[0].name = model.graph.node[-1].output[0] = "z"
    onnx.save(model, "z.onnx")
    refused(folder, "check", "m.onnx", "z.onnx", "--plan", "p.json", says="different outputs")


@pytest.mark.parametrize(("arrays", "says"), [
    ({"z": np.zeros((1, 3, 8, 8), np.float32)}, "lacks input 'x'"), ({"x": np.zeros((1, 3, 8, 8))}, "float64"),
    ({"x": np.zeros((1, 3, 8), np.float32)}, "shape"), ({"x": np.zeros((1, 4, 8, 8), np.float32)}, "shape"),
])
def test_bad_feeds(folder, arrays, says):
    np.savez("f.npz", **arrays)
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", "--feeds", "f.npz", says=says)


def test_feeds_that_are_no_npz(folder):
    (folder / "f.npz").write_bytes(b"no zip")
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", "--feeds", "f.npz", says="f.npz")
    np.save("one.npy", np.zeros(3))
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", "--feeds", "one.npy", says="no .npz")


def test_inspect_refuses_unknown_names(folder):
    refused(folder, "inspect", "m.onnx", "--explain", "w11:0", says="near it are: w1")
    refused(folder, "inspect", "m.onnx", "--explain", "w1:7", says="4 axes")
    refused(folder, "inspect", "m.onnx", "--group", "w1", says="near it are: w1:")
    refused(folder, "inspect", "m.onnx", *["--explain", "w1"] * 3, says="one value, or two")


def test_usage_errors_are_sentences(folder):
    refused(folder, "pruen", "m.onnx", says="Did you mean 'prune'?")
    refused(folder, "prune", says="MODEL")
    refused(folder, "check", "m.onnx", "m.onnx", says="--plan")


# ---------------------------------------------------------------------- what goes wrong


def test_a_failed_proof_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(api, "prove", lambda *_, **__: Check((Difference("y", 1.0, 0.5),), 1e-4))
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", code=1, says="nothing was written")


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan", "inf"])
def test_bad_tolerance(folder, tolerance):
    refused(folder, "prune", "m.onnx", "-o", "s.onnx", "--tolerance", tolerance, says="--tolerance")


@pytest.mark.parametrize(("error", "code", "says"), [
    (KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 2, "memory"),
    (OSError(28, "No space left on device", "s.onnx"), 2, "No space left"),
    (ZeroDivisionError("by\nzero"), 2, "internal error (ZeroDivisionError: by zero"),
])
def test_every_error_is_one_sentence(folder, monkeypatch, error, code, says):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(api, "analyze", fails)
    result = run("prune", "m.onnx", "-o", "s.onnx")
    assert result.exit_code == code
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert ("Traceback" in run("prune", "m.onnx", "-o", "s.onnx", "-v").stderr) == (code == 2)


def test_a_timing_that_fails_is_a_word_on_stderr(folder, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no time")

    monkeypatch.setattr("spa.commands.prune.race", fails)
    result = run("prune", "m.onnx", "-o", "s.onnx", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["latency"] is None
    assert "latency was not measured: no time" in result.stderr


def test_verdicts_of_what_typer_raises():
    assert verdict(SystemExit(3)) == (3, "")
    assert verdict(spa.NothingToPrune("none")) == (1, "none")


def test_as_a_program(made, tmp_path):
    command = [sys.executable, "-m", "spa"]
    prune = ["prune", made / "m.onnx", "-o", tmp_path / "s.onnx", "--json", "--no-bench"]
    done = subprocess.run([*command, *prune], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["proof"]["passed"]
    assert done.stderr == ""
    failed = subprocess.run([*command, "prune", "none.onnx", "-o", tmp_path / "t.onnx"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("spa: none.onnx: there is no such file")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_is_no_error(made, options):
    command = [sys.executable, "-m", "spa", "inspect", made / "m.onnx", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_output_survives_a_poor_encoding(made):
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "spa", "inspect", made / "m.onnx"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert io.BytesIO(done.stdout).read().decode("ascii")
