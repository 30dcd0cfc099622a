"""Real networks on the engines that are here.

Engines that are not there are skipped with their own sentence. QNN and OpenVINO are tested wherever they are installed; those that need
an environment of their own with `pytest -m engines`.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from engine_cases import X, quantised, small
from onnx import TensorProto, helper, numpy_helper
from test_cli import convnet, folder, made, run  # noqa: F401
from test_trace import net

import spa
from models import weightless
from spa.engines import Settings, find
from spa.errors import BadOption, UnsupportedModel
from spa.timing.trial import expected, try_on


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
