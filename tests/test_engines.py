"""Where models run: that a run is "on X" only if it was, and what is said where it was not."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from engine_cases import X, small
from test_trace import net

import spa
from spa.engines import ENGINES, Placement, Settings, find
from spa.engines.children import ort
from spa.engines.cuda import CUDA
from spa.engines.providers import here
from spa.engines.webgpu import drivers
from spa.errors import BadOption, UnsupportedModel
from spa.proof import check as checking

PROVIDERS = ("cpu", "cuda", "tensorrt", "openvino", "qnn", "webgpu", "arm64")


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
    session = ort.Session(spa.storage.store.to_bytes(small()), ort.CPU)
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
