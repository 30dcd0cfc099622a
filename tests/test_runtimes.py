"""Runtimes that are no execution providers: each gives what ONNX Runtime gives, whatever shapes, names and layouts converters trip over.

What needs an environment of its own runs with `pytest -m engines`; what is not installed is skipped with the engine's own sentence.
"""

import json
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import spa
from spa import cli
from spa.engines import Settings, find
from spa.engines.pinned import fixed_shapes, pin
from spa.errors import BadOption, UnsupportedModel
from spa.proof.check import difference, run
from spa.storage.store import load, to_proto

HERE = ("openvino-native", "mnn", "ncnn", "tract")  # share this environment
ELSEWHERE = ("litert", "node", "node-wasm", "browser-wasm", "browser-webgpu")  # need one of their own
CONVERTED = ("openvino-native", "mnn", "ncnn", "tract")  # are given copies of fixed sizes
KINDS = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64, np.dtype(np.bool_): TensorProto.BOOL}


def ready(name):
    """The engine, or a skip with what it says."""
    try:
        return find(name, "runtime")
    except BadOption as error:
        pytest.skip(str(error))


@pytest.fixture(params=[*HERE, *(pytest.param(n, marks=pytest.mark.engines) for n in ELSEWHERE)])
def engine(request):
    return ready(request.param)


def model(nodes, inputs, outputs, weights=(), inside=()):
    """inputs, outputs, inside (values that the file tells the shape of): name -> (type, shape)."""
    def values(named):
        return [helper.make_tensor_value_info(n, KINDS[np.dtype(k)], s) for n, (k, s) in named.items()]

    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in dict(weights).items()]
    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), tensors, value_info=values(dict(inside)))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return load(proto)


def agrees(engine, given, feeds, **settings):
    """Runs it here and there; gives the outputs."""
    opened = engine.load(given, Settings(threads=1, options=settings))
    try:
        found = opened.run(feeds)
        expected = run(given, feeds)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].shape == value.shape, name
            assert found[name].dtype == value.dtype, name
            assert difference(name, value, found[name]).relative <= engine.tolerances["float32"], name
        return found
    finally:
        opened.close()


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def convnet(batch="n", size=(6, 8), channels=5):
    """Two convolutions; outputs the picture and, before it, what a linear layer makes of it."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "c1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], "r1"),
        helper.make_node("Conv", ["r", "w2"], ["picture"], "c2", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["picture"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w3"], ["scores"], "fc", transB=1),
    ]
    weights = {"w1": floats(rng, 7, 3, 3, 3), "b1": floats(rng, 7), "w2": floats(rng, channels, 7, 3, 3), "w3": floats(rng, 4, channels)}
    return model(nodes, {"x": (np.float32, [batch, 3, *size])},
                 {"scores": (np.float32, [batch, 4]), "picture": (np.float32, [batch, channels, *size])}, weights,
                 {"a": (np.float32, [batch, 7, *size])})


def test_a_pruned_network(engine, tmp_path):
    from test_cli import convnet as network

    result = spa.prune(network(shape=(1, 3, 8, 8)), ratio=0.5, multiple_of=1)
    result.save(tmp_path / "small.onnx")
    small = load(tmp_path / "small.onnx")
    agrees(engine, small, {"x": floats(np.random.default_rng(1), 1, 3, 8, 8)})


@pytest.mark.parametrize("batch", [1, 2])
def test_a_free_batch_takes_the_size_of_the_feeds(engine, batch):
    agrees(engine, convnet(), {"x": floats(np.random.default_rng(1), batch, 3, 6, 8)})


def test_feeds_of_other_sizes_later(engine):
    given, rng = convnet(), np.random.default_rng(1)
    opened = engine.load(given, Settings(threads=1))
    for batch in (1, 3, 1):
        feeds = {"x": floats(rng, batch, 3, 6, 8)}
        assert difference("picture", run(given, feeds)["picture"], opened.run(feeds)["picture"]).relative <= 1e-4
    opened.close()


def test_layouts_that_sizes_do_not_tell_apart(engine):
    """Channels, height and width are equal, so that only the order of the elements shows a transposition."""
    n = 6 if engine.name == "litert" else 3  # onnx2tf takes the axes of inputs of 3x3x3 for one another, and the comparison sees it
    agrees(engine, convnet(batch=1, size=(n, n), channels=n), {"x": floats(np.random.default_rng(1), 1, 3, n, n)})


def test_grouped_convolutions_with_two_outputs(engine):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "c1", group=2, pads=[1, 1, 1, 1]), helper.make_node("Relu", ["a"], ["late"], "r"),
        helper.make_node("Conv", ["late", "w2"], ["b"], "c2", group=2), helper.make_node("Tanh", ["b"], ["early"], "t"),
    ]
    given = model(nodes, {"x": (np.float32, [1, 4, 6, 7])}, {"early": (np.float32, [1, 6, 6, 7]), "late": (np.float32, [1, 6, 6, 7])},
                  {"w1": floats(rng, 6, 2, 3, 3), "w2": floats(rng, 6, 3, 1, 1)})
    agrees(engine, given, {"x": floats(rng, 1, 4, 6, 7)})


@pytest.mark.engines
def test_a_wrong_conversion_is_seen():
    opened = ready("litert").load(convnet(batch=1, size=(3, 3)), Settings())
    x = {"x": floats(np.random.default_rng(1), 1, 3, 3, 3)}
    assert difference("scores", run(convnet(batch=1, size=(3, 3)), x)["scores"], opened.run(x)["scores"]).relative > 0.1
    opened.close()


def test_odd_names_idle_inputs_and_the_order_of_outputs(engine):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Sub", ["serving/b:0", "a.1 x"], ["d"], "difference/of:two"),
        helper.make_node("MatMul", ["d", "w"], ["late/out:1"], "m"),
        helper.make_node("Tanh", ["d"], ["1early"], "t"),
    ]
    inputs = {n: (np.float32, [2, 5]) for n in ("idle", "a.1 x", "serving/b:0")}
    given = model(nodes, inputs, {"late/out:1": (np.float32, [2, 3]), "1early": (np.float32, [2, 5])}, {"w": floats(rng, 5, 3)})
    agrees(engine, given, {n: floats(rng, 2, 5) for n in inputs} | {"stranger": floats(rng, 1)})


def test_ids_of_64_bits(engine):
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["e"], "embed"), helper.make_node("MatMul", ["e", "w"], ["y"], "m")]
    given = model(nodes, {"ids": (np.int64, ["n", "t"])}, {"y": (np.float32, ["n", "t", 3])},
                  {"table": floats(rng, 11, 6), "w": floats(rng, 6, 3)})
    agrees(engine, given, {"ids": rng.integers(0, 11, (1, 7))})


def test_gelu_is_exact(engine):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"], "div"), helper.make_node("Erf", ["a"], ["b"], "erf"),
        helper.make_node("Add", ["b", "one"], ["c"], "add"), helper.make_node("Mul", ["x", "c"], ["d"], "mul"),
        helper.make_node("Mul", ["d", "half"], ["g"], "mul2"), helper.make_node("MatMul", ["g", "w"], ["y"], "m"),
    ]
    numbers = {n: np.float32(v) for n, v in (("root", 2**0.5), ("one", 1), ("half", 0.5))}
    given = model(nodes, {"x": (np.float32, [1, 8, 16])}, {"y": (np.float32, [1, 8, 16])}, numbers | {"w": np.eye(16, dtype=np.float32)})
    agrees(engine, given, {"x": floats(rng, 1, 8, 16)})


def test_an_output_that_is_an_input(engine):
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Relu", ["x"], ["y"], "r"), helper.make_node("MatMul", ["y", "w"], ["z"], "m")]
    given = model(nodes, {"x": (np.float32, [1, 4])}, {"z": (np.float32, [1, 2]), "x": (np.float32, [1, 4])}, {"w": floats(rng, 4, 2)})
    if engine.name == "ncnn":  # pnnx dies of it
        with pytest.raises(UnsupportedModel, match="pnnx says: .*ended with -11"):
            engine.load(given, Settings())
        return
    agrees(engine, given, {"x": floats(rng, 1, 4)})


def test_whole_numbers_come_back_as_the_model_says(engine):
    rng = np.random.default_rng(0)
    given = model([helper.make_node("ArgMax", ["x"], ["best"], "best", axis=1, keepdims=0)], {"x": (np.float32, [1, 9])},
                  {"best": (np.int64, [1])})
    if engine.name == "ncnn":
        with pytest.raises(UnsupportedModel, match="no layer for: ArgMax"):
            engine.load(given, Settings())
        return
    agrees(engine, given, {"x": floats(rng, 1, 9)})


def test_a_bound_call_runs(engine):
    given = convnet(batch=1)
    opened = engine.load(given, Settings(threads=1))
    call = opened.bound({"x": floats(np.random.default_rng(1), 1, 3, 6, 8)})
    call()
    assert call.seconds > 0
    opened.close()


def test_a_runtime_that_lacks_an_operator_says_so(engine):
    node = helper.make_node("Nonsense", ["x"], ["y"], "strange", domain="my.domain")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)]
    given = load(helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=8))
    with pytest.raises(UnsupportedModel, match=r"(can't take|does not (load|run)) the model: .") as caught:
        engine.load(given, Settings()).run({"x": np.zeros((1, 4), np.float32)})
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.engines
def test_nodes_that_webgpu_leaves_to_webassembly_are_listed():
    engine = ready("browser-webgpu")
    nodes = [helper.make_node("Det", ["x"], ["d"], "no shader for it"), helper.make_node("Relu", ["d"], ["y"], "relu")]
    given = model(nodes, {"x": (np.float32, [2, 3, 3])}, {"y": (np.float32, [2])})
    opened = engine.load(given, Settings())
    assert opened.placement.proven
    assert list(opened.placement.fell_back) == ["no shader for it"]
    assert "Det" in opened.placement.fell_back["no shader for it"]
    opened.close()
    opened = engine.load(convnet(batch=1), Settings())
    assert opened.placement.fell_back == {}
    assert set(opened.placement.nodes) == {"WebGpuExecutionProvider"}
    opened.close()


@pytest.mark.engines
def test_fixed_sizes_leave_no_arithmetic_on_sizes_behind():
    engine = ready("browser-webgpu")
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"), helper.make_node("Gather", ["s", "first"], ["n"], "gather"),
        helper.make_node("Mul", ["n", "two"], ["m"], "mul"), helper.make_node("Concat", ["m", "two"], ["t"], "concat", axis=0),
        helper.make_node("Reshape", ["x", "t"], ["r"], "reshape"), helper.make_node("Relu", ["r"], ["y"], "relu"),
    ]
    given = model(nodes, {"x": (np.float32, ["n", 4])}, {"y": (np.float32, ["m", 2]), "t": (np.int64, [2])},
                  {"first": np.array([0]), "two": np.array([2])})
    placed = []
    for options in ({}, {"sizes": "fixed"}):
        opened = engine.load(given, Settings(options=options))
        assert opened.run({"x": floats(np.random.default_rng(0), 2, 4)})["y"].shape == (4, 2)
        placed.append(list(opened.placement.fell_back))
        opened.close()
    assert placed[0]
    assert not placed[1]


@pytest.mark.engines
@pytest.mark.parametrize("name", ["node", "node-wasm", "browser-wasm"])
def test_weights_in_a_file_of_their_own(name, monkeypatch):
    monkeypatch.setattr("spa.engines.worker.IN_MEMORY", 1)
    agrees(ready(name), convnet(), {"x": floats(np.random.default_rng(1), 1, 3, 6, 8)})


@pytest.mark.parametrize("name", HERE)
def test_converters_get_one_file(name, monkeypatch):
    monkeypatch.setattr("spa.engines.worker.IN_MEMORY", 1)
    agrees(ready(name), convnet(channels=300), {"x": floats(np.random.default_rng(1), 1, 3, 6, 8)})


# ---------------------------------------------------------------------- what converters are given


def test_pinning_changes_names_and_sizes_alone():
    given = convnet()
    pinned = pin(given, {"x": (2, 3, 6, 8)})
    assert pinned.inputs == {"x": "tensor0in"}
    assert pinned.outputs == {"scores": "tensor0out", "picture": "tensor1out"}
    assert pinned.shapes == {"tensor0in": (2, 3, 6, 8), "tensor0out": (2, 4), "tensor1out": (2, 5, 6, 8)}
    proto = to_proto(pinned.model)
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.graph.value_info
    x = {"x": floats(np.random.default_rng(0), 2, 3, 6, 8)}
    found = run(load(proto), {"tensor0in": x["x"]})
    for name, value in run(given, x).items():
        assert np.array_equal(found[pinned.outputs[name]], value)
    assert [t.name for t in given.graph.inputs] == ["x"]  # the model itself is as it was


def test_flattening_keeps_the_order_of_elements():
    pinned = pin(convnet(), {"x": (1, 3, 6, 8)}, flat=True)
    proto = to_proto(pinned.model)
    onnx.checker.check_model(proto, full_check=True)
    assert json.loads(pinned.interface())["inputs"] == [["tensor0in", "float32", [144]]]
    x = floats(np.random.default_rng(0), 1, 3, 6, 8)
    found = run(load(proto), {"tensor0in": x.ravel()})
    assert np.array_equal(found["tensor1out"], run(convnet(), {"x": x})["picture"].ravel())


def test_plain_names_avoid_those_that_are_there():
    given = model([helper.make_node("Relu", ["tensor0out"], ["tensor0in"])], {"tensor0out": (np.float32, [2])},
                  {"tensor0in": (np.float32, [2])})
    pinned = pin(given, {"tensor0out": (2,)})
    assert pinned.inputs == {"tensor0out": "tensorx0in"}
    assert fixed_shapes(given) == {"tensor0out": (2,)}


@pytest.mark.parametrize("kind", [TensorProto.STRING])
def test_text_is_refused(kind):
    x, y = (helper.make_tensor_value_info(n, kind, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    given = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    with pytest.raises(UnsupportedModel, match="no tensor of numbers"):
        pin(given, {"x": (1,)})


# ---------------------------------------------------------------------- the command


def spoken(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.fixture
def pruned(tmp_path):
    """A model, its pruned form and the plan."""
    from test_cli import convnet as network

    onnx.save(network(), tmp_path / "m.onnx")
    spa.prune(tmp_path / "m.onnx", multiple_of=1).save(tmp_path / "small.onnx", plan=tmp_path / "small.plan.json")
    return [tmp_path / "m.onnx", tmp_path / "small.onnx", "--plan", tmp_path / "small.plan.json"]


def test_check_with_a_plan(engine, pruned):
    result = spoken("check", *pruned, "--runtime", engine.name, "--json", "--threads", "1")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert engine.version() in json.dumps(data)


def test_check_of_one_model(engine, pruned):
    result = spoken("check", pruned[1], "--runtime", engine.name)
    assert result.exit_code == 0, result.output
    assert engine.name in result.stdout


def test_check_finds_other_weights(pruned, tmp_path):
    ready("openvino-native")
    proto = onnx.load(pruned[1])
    weight = numpy_helper.to_array(proto.graph.initializer[0]) * 1.5
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, proto.graph.initializer[0].name))
    onnx.save(proto, tmp_path / "other.onnx")
    result = spoken("check", pruned[0], tmp_path / "other.onnx", *pruned[2:], "--runtime", "openvino-native")
    assert result.exit_code == 1, result.output


def test_provider_and_runtime_exclude_each_other(pruned):
    result = spoken("check", *pruned, "--runtime", "tract", "--provider", "cpu")
    assert result.exit_code == 2
    assert "one of --provider, --runtime" in result.stderr


def test_a_misspelt_runtime(pruned):
    result = spoken("check", *pruned, "--runtime", "trakt")
    assert result.exit_code == 2
    assert "tract" in result.stderr


# ---------------------------------------------------------------------- versions and what is missing


@pytest.mark.parametrize("name, variable", [("openvino-native", "SPA_OPENVINO_PYTHON"), ("mnn", "SPA_MNN_PYTHON"),
                                            ("ncnn", "SPA_NCNN_PYTHON"), ("tract", "SPA_TRACT_PYTHON")])
def test_a_missing_interpreter_is_said_with_the_way_out(name, variable, monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise SystemExit(3)'\n")
    bare.chmod(0o755)
    monkeypatch.setenv(variable, str(bare))
    with pytest.raises(BadOption, match=f"pip install .*{variable}.*ended with code 3") as caught:
        find(name, "runtime")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name, packages", [("node", "onnxruntime-node@1"), ("node-wasm", "onnxruntime-web@1"),
                                            ("browser-webgpu", "onnxruntime-web@.* puppeteer-core@")])
def test_missing_packages_are_said(name, packages, monkeypatch, tmp_path):
    monkeypatch.setenv("SPA_NODE_MODULES", str(tmp_path))
    with pytest.raises(BadOption, match=f"npm install --prefix DIR {packages}.*SPA_NODE_MODULES") as caught:
        find(name, "runtime")
    assert "\n" not in str(caught.value)


def test_its_version_has_a_number(engine):
    assert any(c.isdigit() for c in engine.version())
