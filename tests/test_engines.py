"""Where models run: that a run is "on X" only if it was, what is said where it was not, and `spa check` on engines.

Engines that are not there are skipped with their own sentence. QNN and OpenVINO are tested wherever they are installed; those that need
an environment of their own with `pytest -m engines`.
"""

from __future__ import annotations

import contextlib
import json
import os
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_cli import convnet, folder, made, refused, run  # noqa: F401
from test_trace import net

import spa
from models import weightless
from spa import check as checking
from spa.engines import ENGINES, Engine, Placement, Settings, find
from spa.engines.children import ort
from spa.engines.cuda import CUDA
from spa.engines.providers import here
from spa.engines.webgpu import drivers
from spa.errors import BadOption, UnsupportedModel
from spa.trial import Trial, element_type, expected, tolerance_of, try_on
from spa.trial_report import trial_data, trial_shown
from tools import provider_report

PROVIDERS = ("cpu", "cuda", "tensorrt", "openvino", "qnn", "webgpu", "arm64")


def ready(name):
    """The engine, or a skip with what it says."""
    try:
        return find(name, "provider")
    except BadOption as error:
        pytest.skip(str(error))


def split_net():
    """Conv, Relu, Det, Sigmoid, NonZero: nobody but the CPU has kernels for two of them."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32) * 0.2, "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv"), helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Det", ["b"], ["c"], "determinant"), helper.make_node("Sigmoid", ["c"], ["y"], "gate"),
        helper.make_node("NonZero", ["y"], ["z"], "where"),
    ]  # fmt: skip
    x, y, z = (helper.make_tensor_value_info(n, t, s) for n, t, s in (
        ("x", TensorProto.FLOAT, [1, 3, 10, 10]), ("y", TensorProto.FLOAT, [1, 8]), ("z", TensorProto.INT64, [2, "n"])))  # fmt: skip
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y, z], [weight]), opset_imports=[helper.make_opsetid("", 17)],
                             ir_version=8)  # fmt: skip


def small():
    return spa.load(net("float[2,4] x -> float[2,5] y", "y = MatMul(x, w1)", w1=(4, 5)))


X = {"x": np.ones((2, 4), np.float32)}


# ---------------------------------------------------------------------- the table


def test_providers_are_found_or_say_in_a_sentence_what_to_install():
    for name in PROVIDERS:
        try:
            assert find(name, "provider").version().startswith("onnxruntime ")
        except BadOption as error:
            assert "install" in str(error)
            assert str(error).endswith((".", ")."))
            assert len(str(error).splitlines()) == 1
    with pytest.raises(BadOption, match="There is no provider 'qnm'; near it are: qnn; the choice is: .*arm64"):
        find("qnm", "provider")
    assert find("cpu").missing() == ""


@pytest.mark.parametrize("name", PROVIDERS)
def test_entries_are_whole(name):
    find("cpu")
    entry = ENGINES[name]
    assert entry.kind == "provider"
    assert 4 <= entry.block() <= 64
    assert {"float32", "float16", "bfloat16", "int8"} <= set(entry.tolerances)
    assert bool(entry.timed) == (name in ("qnn", "arm64") or (name == "webgpu" and "VK_DRIVER_FILES" in {**drivers(), **os.environ}))


def test_a_variable_names_the_python(monkeypatch):
    monkeypatch.setenv("SPA_QNN_PYTHON", "/nowhere/python")
    with pytest.raises(BadOption, match=r"onnxruntime|QNN provider is not here.*/nowhere/python can't be started"):
        find("qnn")


# ---------------------------------------------------------------------- the CPU provider


def test_the_cpu_says_what_it_took():
    model = spa.load(net("float[2,4] x -> float[2,5] y", "i = Identity(x) h = MatMul(i, w1) y = Relu(h)", w1=(4, 5)))
    opened = find("cpu").load(model, Settings(1))
    assert opened.placement == Placement({"CPUExecutionProvider": 2})  # of three, as onnxruntime recorded it
    x = {**X, "no input": np.ones(3)}
    assert np.array_equal(opened.run(x)["y"], checking.run(model, x)["y"])
    opened.bound(x)()
    opened.close()


def test_the_cpu_refuses_in_one_line():
    with pytest.raises(UnsupportedModel, match="ONNX Runtime does not load the model: .*Strange"):
        find("cpu").load(spa.load(net("float[2,4] x -> float[2,4] y", "y = my.Strange(x)")), Settings())
    with pytest.raises(UnsupportedModel, match="ONNX Runtime does not run the model: .*dimension"):
        find("cpu").load(small(), Settings()).run({"x": np.ones((2, 3), np.float32)})
    with pytest.raises(BadOption, match="no option 'precision'"):
        find("cpu").load(small(), Settings(options={"precision": "bf16"}))


def test_inputs_and_outputs_may_lie_on_the_device():
    """The binding of CUDA's, on the device that is here."""
    session = ort.Session(spa.store.to_bytes(small()), ort.CPU)
    run_once = session.bind({**X, "no input": X["x"]}, "cpu")
    run_once()
    opened = here("CPUExecutionProvider", "CPU", defaults={}, device="cpu")(small(), Settings())
    opened.bound(X)()


def test_models_of_any_size_go_through_files(monkeypatch):
    monkeypatch.setattr("spa.engines.providers.IN_MEMORY", 0)
    assert np.allclose(find("cpu").load(small(), Settings()).run(X)["y"], checking.run(small(), X)["y"])


def test_a_profile_is_written(tmp_path):
    opened = find("cpu").load(small(), Settings(profile=str(tmp_path / "p")))
    opened.run(X)
    opened.close()
    assert [p.name[0] for p in tmp_path.iterdir()] == ["p"]


# ---------------------------------------------------------------------- nothing falls back unseen


def test_a_provider_that_this_onnxruntime_lacks_is_no_cpu_session():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UnsupportedModel, match="has no CUDAExecutionProvider"):
        CUDA.load(small(), Settings())


class Pretender:
    """onnxruntime as it is where a provider is compiled in: the session that each call gets is told by `gives`."""

    made: list  # what sessions were made with

    def __init__(self, monkeypatch, gives, provider="CUDAExecutionProvider"):
        self.made, self.gives = [], gives
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, ort.CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", self)

    def __call__(self, source, options, **keywords):
        strict = False
        with contextlib.suppress(RuntimeError):  # not set
            strict = options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        self.made.append({"strict": strict, **keywords})
        return self.gives(strict)


def session(providers, assigned, log=""):
    """A session of these providers, whose nodes are {provider: names}."""
    os.write(2, log.encode())

    def part(name, nodes):
        return SimpleNamespace(ep_name=name, get_nodes=lambda: [SimpleNamespace(name=n, op_type="Op") for n in nodes])

    return SimpleNamespace(
        disable_fallback=lambda: None, get_providers=lambda: providers, get_outputs=list, get_inputs=list,
        get_provider_graph_assignment_info=lambda: [part(*x) for x in assigned.items()])  # fmt: skip


def test_a_provider_whose_library_does_not_load_is_no_cpu_session(monkeypatch):
    """onnxruntime leaves it out with a warning, and runs everything on the CPU, to a perfect difference of 0."""
    log = "2026 [E:onnxruntime:Default, provider_bridge.cc:1 Create] Failed to load library with error: libcublasLt.so.13: no such file\n"
    Pretender(monkeypatch, lambda strict: session([ort.CPU], {ort.CPU: ["n"]}, log))
    with pytest.raises(UnsupportedModel, match="CUDAExecutionProvider did not start: Failed to load library .* libcublasLt.so.13: no such"):
        CUDA.load(small(), Settings())


def test_the_wrapper_may_not_fall_back(monkeypatch):
    pretender = Pretender(monkeypatch, lambda strict: session(["CUDAExecutionProvider"], {"CUDAExecutionProvider": ["a", "b"]}))
    opened = CUDA.load(small(), Settings(options={"cudnn_conv_algo_search": "DEFAULT"}))
    assert opened.placement == Placement({"CUDAExecutionProvider": 2})
    [asked] = pretender.made
    assert asked["strict"]
    assert asked["enable_fallback"] == 0
    [(name, options)] = asked["providers"]  # the CPU is not among them
    assert (name, options) == ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"})


def test_nodes_that_fall_back_are_listed_with_the_reason(monkeypatch):
    log = ("x [I:onnxruntime:, cuda.cc:635 GetCapability] webgpu kernel not found in registries for Op type: Det node name: b\n"
           "x [I:onnxruntime:, fallback_cpu.cc:1] Force fallback to CPU execution for node: d because it is small.\n"
           "x [V:onnxruntime:, session_state.cc:1]  Node(s) placed on [CUDAExecutionProvider]. Number of nodes: 7\n")  # fmt: skip

    def gives(strict):
        if strict:
            raise RuntimeError("This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been "
                               "explicitly disabled by the user.")  # fmt: skip
        return session(["CUDAExecutionProvider", ort.CPU], {"CUDAExecutionProvider": ["a"], ort.CPU: ["b", "c", "d"]}, log)

    pretender = Pretender(monkeypatch, gives)
    placement = CUDA.load(small(), Settings()).placement
    assert [m["strict"] for m in pretender.made] == [True, False]
    assert all(m["enable_fallback"] == 0 for m in pretender.made)
    assert placement.nodes == {"CUDAExecutionProvider": 7, ort.CPU: 3}
    assert placement.fell_back == {
        "b": "it has no kernel for this Det", "c": "CUDAExecutionProvider left this Op to CPUExecutionProvider and gave no reason",
        "d": "it is small",
    }  # fmt: skip


def test_openvino_as_a_plugin_gets_one_device_and_float32(monkeypatch):
    """What its plugin is told where it offers devices (those of Intel), which this machine need not have."""
    told = []

    class Options:
        """Of a session; takes devices that are none."""

        def add_session_config_entry(self, key, value):
            told.append((key, value))

        def get_session_config_entry(self, key):
            return next((v for k, v in told if k == key), "")

        def add_provider_for_devices(self, devices, options):
            told.append((devices, options))

    found = [SimpleNamespace(ep_metadata={"ov_device": name}) for name in ("GPU", "CPU", "NPU")]
    Pretender(monkeypatch, lambda strict: session([ort.OPENVINO], {ort.OPENVINO: ["a"]}), provider="")
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(ort, "devices", lambda provider: found)
    config = '{"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}}'
    assert ort.Session(b"", ort.OPENVINO, 1).nodes == {ort.OPENVINO: 1}
    assert ([found[1]], {"load_config": config}) in told
    ort.Session(b"", ort.OPENVINO, 0, {"precision": "bf16", "device_type": "GPU"})
    assert ([found[0]], {"load_config": '{"GPU": {"INFERENCE_PRECISION_HINT": "bf16"}}'}) in told
    with pytest.raises(ValueError, match="no device TPU here, only GPU, CPU, NPU"):
        ort.Session(b"", ort.OPENVINO, 0, {"device_type": "TPU"})


def test_a_provider_that_takes_nothing_refuses_the_model(monkeypatch):
    def gives(strict):
        if strict:
            raise RuntimeError("…, but fallback to CPU EP has been explicitly disabled by the user.")
        return session(["CUDAExecutionProvider", ort.CPU], {ort.CPU: ["a", "b"]})

    Pretender(monkeypatch, gives)
    with pytest.raises(UnsupportedModel, match="took none of the model's 2 nodes; the first: .* gave no reason"):
        CUDA.load(small(), Settings())


def test_other_errors_are_no_reason_to_fall_back(monkeypatch):
    def gives(strict):
        raise RuntimeError("the device is on fire\nand more")

    pretender = Pretender(monkeypatch, gives)
    with pytest.raises(UnsupportedModel, match="CUDA can't take the model: the device is on fire$"):
        CUDA.load(small(), Settings())
    assert len(pretender.made) == 1


def test_reasons_of_qnn_are_read():
    log = ("2026 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation FAILED for 1 nodes in OrtNodeUnit (NonZero) :\n"
           "\tOperator type: NonZero Node name: nz Node index: 4\n\tREASON : NonZero output shape must be static.\n"
           "2026 [V:onnxruntime:, session_state.cc:1] All nodes placed on [X]. Number of nodes: 44\n")  # fmt: skip
    assert ort.reasons_in(log) == {"nz": "NonZero output shape must be static"}
    assert [m["count"] for m in ort.PLACED.finditer(log)] == ["44"]


def test_what_is_captured_comes_back(capfd):
    with ort.captured() as read:
        os.write(2, b"inside")
        assert read() == "inside"
    os.write(2, b"outside")
    assert capfd.readouterr().err == "outside"


# ---------------------------------------------------------------------- trials


def typed(kind):
    """A product with weights of a type."""
    weight = numpy_helper.from_array(np.ones((4, 5)).astype(helper.tensor_dtype_to_np_dtype(kind)), "w")
    x, y = helper.make_tensor_value_info("x", kind, [2, 4]), helper.make_tensor_value_info("y", kind, [2, 5])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return spa.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def quantised():
    """x -> quantise -> dequantise -> product with a dequantised weight."""
    tensors = {"s": np.float32(0.1), "z": np.uint8(128), "w": np.ones((4, 5), np.int8), "ws": np.float32(0.01)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["v"]), helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("y", [2, 5])))
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()])
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


# ---------------------------------------------------------------------- the real ones


@pytest.fixture(params=["openvino", "qnn", *(pytest.param(n, marks=pytest.mark.engines) for n in ("cuda", "tensorrt", "webgpu", "arm64"))])
def real(request):
    """An engine that is here."""
    return ready(request.param)


def zoo(name):
    return weightless.load(f"models/zoo/{name}.onnx.xz")


def test_a_pruned_network_runs_there(real, made):  # noqa: F811
    result = run("check", made / "m.onnx", made / "small.onnx", "--plan", made / "small.plan.json", "--provider", real.name, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["placement"]["proven"]
    assert not data["placement"]["fell_back"]
    assert sum(data["placement"]["nodes"].values()) >= 5
    assert 0 < data["proof"]["largest_difference"] <= data["proof"]["tolerance"]  # 0 would be the CPU against itself


def test_a_transformer_runs_there(real):
    result = spa.prune(zoo("vit.script"), 0.5, multiple_of=1)
    model, analysis = result.model, result.analysis
    feeds = spa.api.runnable(analysis.normal.model, analysis.groups.traced)
    feeds = {n: v[:1] for n, v in feeds.items()}
    trial = try_on(real, model, feeds, expected(model, feeds), settings=Settings(1))
    assert trial.check.passed, trial.check
    assert trial.stayed


def test_what_it_can_not_take_is_listed(real):
    model = spa.load(split_net())
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 10, 10)).astype(np.float32)}
    trial = try_on(real, model, feeds, expected(model, feeds))
    assert trial.check.passed
    if real.name == "arm64":  # a CPU, which has all kernels
        assert trial.stayed
    else:
        assert {"determinant", "where"} <= set(trial.placement.fell_back)
        assert trial.placement.nodes["CPUExecutionProvider"] >= 2
        assert len(trial.placement.nodes) == 2


def test_a_call_is_timed_where_it_runs(real):
    opened = real.load(spa.load(convnet()), Settings(1))
    call = opened.bound({"x": np.ones((1, 3, 8, 8), np.float32)})
    call()
    assert getattr(call, "seconds", 1.0) > 0
    opened.close()


def test_it_refuses_in_one_sentence(real, folder):  # noqa: F811
    onnx.save(net("float[2,4] x -> float[2,4] y", "y = my.Strange(x)"), "strange.onnx")
    np.savez("f.npz", x=np.ones((2, 4), np.float32))
    result = run("check", "strange.onnx", "--provider", real.name, "--feeds", "f.npz")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_openvino_computes_in_what_it_is_told():
    engine = ready("openvino")
    rng = np.random.default_rng(0)
    model, x = spa.load(convnet(width=64)), {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}
    reference = expected(model, x)
    exact = try_on(engine, model, x, reference, settings=Settings(1))
    assert exact.check.worst < 1e-5
    rough = try_on(engine, model, x, reference, settings=Settings(1, {"precision": "bf16"}))
    assert rough.element_type == "bfloat16"
    assert rough.check.tolerance == 5e-2
    assert rough.check.passed  # by how much it differs is the processor's: without bfloat16 it computes in float32


def test_an_openvino_that_does_not_start_is_no_cpu_session():
    with pytest.raises(UnsupportedModel, match="OpenVINO can't take the model"):
        ready("openvino").load(small(), Settings(options={"load_config": "no json"})).run(X)


def test_qnn_rounds_as_the_device_does_and_tells_the_size_of_its_binary():
    from spa.engines.qnn import context_bytes

    engine = ready("qnn")
    sizes = {}
    for width in (32, 64, 128):
        model, x = spa.load(convnet(width=width)), {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
        sizes[width] = context_bytes(model, x)
        trial = try_on(engine, model, x, expected(model, x))
        assert 1e-5 < trial.check.worst < 2e-2  # float16, which it would not be without a SoC
        assert trial.figures == {"context_bytes": sizes[width]}
    assert 0 < sizes[32] < sizes[64] < sizes[128]


def test_a_qnn_backend_that_is_not_there_is_no_cpu_session():
    with pytest.raises(UnsupportedModel, match="QNN can't take the model"):
        ready("qnn").load(small(), Settings(options={"backend_type": "cpu"})).run(X)


def test_quantised_networks_run_there():
    for name in ("qnn", "openvino"):
        try:
            engine = find(name)
        except BadOption:
            continue
        trial = try_on(engine, quantised(), X, expected(quantised(), X))
        assert trial.element_type == "int8"
        assert trial.check.passed
