"""Trials of models on engines, by element type, and `spa check` on them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from engine_cases import X, quantised, small
from onnx import TensorProto, helper, numpy_helper
from test_cli import folder, made, refused, run  # noqa: F401

import spa
from spa.engines import ENGINES, Engine, Placement, Settings, find
from spa.engines.children import ort
from spa.errors import UnsupportedModel
from spa.proof import check as checking
from spa.tables.trial_report import trial_data, trial_shown
from spa.timing.trial import Trial, element_type, expected, tolerance_of, try_on
from tools import provider_report


def typed(kind):
    """A product with weights of a type."""
    weight = numpy_helper.from_array(np.ones((4, 5)).astype(helper.tensor_dtype_to_np_dtype(kind)), "w")
    x, y = helper.make_tensor_value_info("x", kind, [2, 4]), helper.make_tensor_value_info("y", kind, [2, 5])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return spa.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_tolerances_go_by_element_type():
    kinds = {"float32": typed(TensorProto.FLOAT), "float16": typed(TensorProto.FLOAT16), "bfloat16": typed(TensorProto.BFLOAT16),
             "int8": quantised()}  # fmt: skip
    for name, model in kinds.items():
        assert element_type(model) == name
    cpu, qnn = find("cpu"), ENGINES["qnn"]
    allowed = [tolerance_of(cpu, n) for n in ("float32", "float16", "bfloat16")]
    assert allowed == sorted(allowed)
    assert tolerance_of(cpu, "float32") == 1e-4
    assert tolerance_of(qnn, "float32") == tolerance_of(qnn, "float16")  # it computes in float16
    assert element_type(kinds["float32"], Settings(options={"precision": "bf16"})) == "bfloat16"
    assert element_type(quantised(), Settings(options={"precision": "bf16"})) == "int8"
    poor = Engine("poor", "runtime", cpu.load, str, str, {"float32": 0.5})
    assert (tolerance_of(poor, "float32"), tolerance_of(poor, "int8")) == (0.5, 5e-2)


def test_half_precision_is_compared_with_float32():
    model = typed(TensorProto.FLOAT16)
    x = {"x": np.full((2, 4), 1.001, np.float16)}
    reference = expected(model, x)
    assert reference["y"].dtype == np.float32
    trial = try_on(find("cpu"), model, x, reference)
    assert trial.check.tolerance == 2e-2
    assert trial.check.passed


class Fake:
    """An engine's model: runs on the CPU, with an error, and says it ran wherever it was told."""

    def __init__(self, model, error, placement):
        self.inner, self.error, self.placement, self.closed = find("cpu").load(model, Settings()), error, placement, False
        self.figures = {"context_bytes": 81920}

    def run(self, feeds):
        if self.error is None:
            raise UnsupportedModel("Fake does not run the model: no")
        return {n: v * (1 + self.error) for n, v in self.inner.run(feeds).items()}

    def close(self):
        self.closed = True


@pytest.fixture
def fake(monkeypatch):
    """Registers engines that behave in a given way."""
    def register(error=0.0, fell_back=None, proven=True, timed="it is fake"):
        others = {"CPUExecutionProvider": len(fell_back)} if fell_back else {}
        placement = Placement({"FakeProvider": 3, **others}, fell_back or {}, proven)
        find("cpu")
        monkeypatch.setitem(ENGINES, "fake", Engine("fake", "provider", lambda m, s: Fake(m, error, placement), str, lambda: "fake 1.0",
                                                    timed=timed))  # fmt: skip
        return ENGINES["fake"]

    return register


def test_a_trial_tells_what_differs(fake):
    engine = fake(error=0.01)
    trial = try_on(engine, small(), X, expected(small(), X))
    assert not trial.check.passed
    assert trial.check.worst == pytest.approx(0.01, rel=1e-3)
    assert try_on(engine, small(), X, expected(small(), X), tolerance=0.02).check.passed


def test_check_on_a_provider(made, fake):  # noqa: F811
    pair = ["check", made / "m.onnx", made / "small.onnx", "--plan", made / "small.plan.json", "--provider", "fake"]
    alone = ["check", made / "m.onnx", "--provider", "fake"]
    fake()
    for args in (pair, alone):
        result = run(*args)
        assert result.exit_code == 0, result.output
        assert "Ran on fake: fake 1.0" in result.stdout
        assert "all of it ran there: 3 nodes on FakeProvider" in result.stdout
        assert "context binary: 81.92 kB" in result.stdout
        assert "its time is not reported: it is fake" in result.stdout
        data = json.loads(run(*args, "--json").stdout)
        assert data["placement"] == {"nodes": {"FakeProvider": 3}, "fell_back": {}, "proven": True}
        assert (data["engine"], data["version"], data["element_type"]) == ("fake", "fake 1.0", "float32")
        assert data["proof"]["passed"]
        assert data["figures"] == {"context_bytes": 81920}
    assert "weights" in json.loads(run(*pair, "--json").stdout)
    fake(error=0.01)
    for args in (pair, alone):
        result = run(*args)
        assert result.exit_code == 1
        assert "DIFFERS" in result.stdout
        assert "--tolerance 1.1e-02 would pass" in " ".join(result.stdout.split())
        assert run(*args, "--tolerance", "0.02").exit_code == 0
    fake(error=None)
    assert run(*alone).exit_code == 2


def test_check_where_nodes_fall_back(made, fake):  # noqa: F811
    fake(fell_back={"conv1": "too large", "fc2": "too small"})
    args = ["check", made / "m.onnx", "--provider", "fake"]
    result = run(*args)
    assert result.exit_code == 1
    for part in ("Fell back: 2 nodes (3 nodes on FakeProvider, 2 nodes on CPUExecutionProvider)", "conv1", "too large", "Proof: it gives"):
        assert part in result.stdout
    assert json.loads(run(*args, "--json").stdout)["placement"]["fell_back"] == {"conv1": "too large", "fc2": "too small"}
    allowed = run(*args, "--allow-fallback")
    assert allowed.exit_code == 0
    assert "Fell back: 2 nodes" in allowed.stdout
    fake(proven=False)
    assert "does not say where" in run(*args).stdout


def test_check_proves_what_was_pruned(made, tmp_path, fake):  # noqa: F811
    """A wrong weight in B is found on any engine: the reference is the masked A, not B itself."""
    fake()
    other = onnx.load(made / "small.onnx")
    weight = next(w for w in other.graph.initializer if w.name == "w3")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, "w3"))
    onnx.save(other, tmp_path / "other.onnx")
    result = run("check", made / "m.onnx", tmp_path / "other.onnx", "--plan", made / "small.plan.json", "--provider", "fake", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["weights"]["differing"] == ["w3"]
    assert run("check", tmp_path / "other.onnx", "--provider", "fake").exit_code == 0


def test_check_in_ort_format(made, monkeypatch):  # noqa: F811
    args = ["check", made / "small.onnx", "--format", "ort", "--json"]
    data = json.loads(run(*args).stdout)
    assert data["engine"] == "cpu"
    assert data["proof"]["passed"]
    assert data["figures"]["ort_bytes"] > 1000
    right = ort.to_ort

    def tampered(source, path):
        model = onnx.load_from_string(source)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.1, tensor.name))
        return right(model.SerializeToString(), path)

    monkeypatch.setattr(ort, "to_ort", tampered)  # what is compared is the converted file
    assert run(*args).exit_code == 1


@pytest.mark.parametrize(("args", "says"), [
    (["m.onnx"], "--provider"), (["m.onnx", "--plan", "p.json"], "give the pruned model too"), (["m.onnx", "m.onnx"], "--plan"),
    (["m.onnx", "--provider", "gpu"], "There is no provider 'gpu'"), (["m.onnx", "--provider", "cpu", "--set", "precision"], "NAME=VALUE"),
    (["m.onnx", "--provider", "cpu", "--set", "x=1"], "no option 'x'"), (["m.onnx", "--set", "x=1"], "--provider"),
    (["m.onnx", "--allow-fallback"], "--provider"), (["m.onnx", "--format", "tflite"], "must be onnx or ort"),
    (["m.onnx", "--provider", "cpu", "--tolerance", "0"], "--tolerance"), (["none.onnx", "--provider", "cpu"], "no such file"),
    (["m.onnx", "--provider", "cpu", "--input", "x:1x3"], "axes"),
])  # fmt: skip
def test_bad_options_of_check(folder, args, says):  # noqa: F811
    refused(folder, "check", *args, says=says)


def test_a_missing_provider_is_a_sentence(folder, monkeypatch):  # noqa: F811
    for variable in ("SPA_QNN_PYTHON", "SPA_WEBGPU_PYTHON", "SPA_OPENVINO_EP_PYTHON"):
        monkeypatch.setenv(variable, "/nowhere/python")
    monkeypatch.setenv("SPA_ARM64_ROOT", "/nowhere")
    for name in ("qnn", "webgpu", "openvino", "arm64"):
        refused(folder, "check", "m.onnx", "--provider", name, says="install")


def test_trials_without_outputs_or_numbers():
    trial = Trial("x", "x 1", Placement({}), "float32", checking.Check((), 1e-4))
    assert trial_data(trial)["proof"]["outputs"] == {}
    assert trial_shown(trial, "y") is not None


def test_the_report_on_providers(made, monkeypatch, capsys, fake):  # noqa: F811
    fake(fell_back={"conv1": "too large"})
    arguments = ["provider_report", str(made / "m.onnx"), "--engine", "cpu", "cpu:format=ort", "cpu:x=1", "fake", "gpu"]
    monkeypatch.setattr("sys.argv", arguments)
    provider_report.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    for row, part in zip(rows, ("9 CPU", "ort_bytes", "no option 'x'", "conv1: too large", "no engine 'gpu'"), strict=True):
        assert part in row
    monkeypatch.setattr("sys.argv", [*arguments[:4], "--as-is"])
    provider_report.main()
    assert "9 CPU" in capsys.readouterr().out
