"""Reading and writing: nothing is lost, nothing is half written, and no input makes anything but a clear sentence."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from passes.weights import Weight
from spa import errors, files, store, wire
from spa.errors import BadFile, BadModel, BadOption, SpaError, UnsupportedModel

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
FLOAT = TensorProto.FLOAT


def value(name, shape=("n", 64), kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes, tensors=(), *, inputs=None, outputs=None, opset=17, **rest):
    graph = helper.make_graph(nodes, "g", inputs or [value("x")], outputs or [value("y")], list(tensors))
    opsets = rest.pop("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, **{"opset_imports": opsets, "ir_version": 10, **rest})


def small_model():
    weight = RNG.random((64, 64), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b"], ["y"], name="second"),
    ]
    return model_of(nodes, [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight[0], "b")])


def tensor_types():
    """Tensors of all kinds of storage, each above and below the size from which data is lifted out."""
    tensors = []
    for count in (8, 4096):
        numbers = RNG.integers(0, 2, count)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.bool_, ml_dtypes.int4, np.int64, np.complex64):
            tensors.append(numpy_helper.from_array(numbers.astype(dtype), f"raw_{np.dtype(dtype).name}_{count}"))
        for kind in (
            FLOAT,
            TensorProto.FLOAT16,
            TensorProto.BFLOAT16,
            TensorProto.BOOL,
            TensorProto.INT4,
            TensorProto.UINT8,
            TensorProto.INT64,
            TensorProto.DOUBLE,
            TensorProto.UINT64,
            TensorProto.COMPLEX64,
            TensorProto.FLOAT8E4M3FNUZ,
        ):
            name = f"typed_{TensorProto.DataType.Name(kind)}_{count}"
            tensors.append(helper.make_tensor(name, kind, [count // 4, 4], numbers.tolist()))
        tensors.append(
            helper.make_tensor(f"text_{count}", TensorProto.STRING, [count], [f"é{i}" for i in range(count)])
        )
    tensors.append(numpy_helper.from_array(np.zeros((0, 3), np.float32), "empty"))
    tensors.append(helper.make_tensor("empty_typed", FLOAT, [4, 0], []))
    tensors.append(numpy_helper.from_array(np.float32(3), "scalar"))
    return tensors


def rich_model():
    """Everything that is to survive a round trip."""
    tensors = tensor_types()
    nodes = [
        helper.make_node(
            "Foo", ["x", *(t.name for t in tensors)], ["f"], name="foo", domain="custom", doc_string="doc"
        ),
        helper.make_node("Constant", [], ["big"], value=numpy_helper.from_array(np.arange(1000, dtype=np.float32))),
        helper.make_node("Constant", [], ["few"], value_ints=[1, 2]),
        helper.make_node("Bar", ["f", "", "big"], ["", "bar"], "bar", domain="custom", a=1.5, b="text", c=["s", "t"]),
        helper.make_node("If", ["cond"], ["y"], name="if"),
        helper.make_node("Sink", ["few", "outer"], ["s"], domain="custom"),
    ]
    nodes[3].attribute.add(name="none", type=onnx.AttributeProto.FLOATS)
    nodes[3].attribute.add(name="nothing", type=onnx.AttributeProto.STRINGS)
    nodes[0].metadata_props.add(key="scope", value="a.b")
    for branch, factor in (("then_branch", 1), ("else_branch", 2)):
        inner = numpy_helper.from_array(np.full(600, factor, np.float32), f"inner{factor}")
        body = [helper.make_node("Add", ["outer", inner.name], [f"o{factor}"], doc_string="in the branch")]
        graph = helper.make_graph(body, branch, [], [value(f"o{factor}", [600])], [inner])
        nodes[4].attribute.append(helper.make_attribute(branch, graph))
    tensors.append(numpy_helper.from_array(np.arange(600, dtype=np.float32), "outer"))
    tensors.append(numpy_helper.from_array(np.arange(700, dtype=np.float32), "constant_output"))
    tensors[0].doc_string = "a tensor"
    tensors[0].metadata_props.add(key="k", value="v")
    model = model_of(
        nodes,
        tensors,
        inputs=[value("x"), value("cond", [], TensorProto.BOOL)],
        outputs=[value("y", [600]), value("s", None), value("constant_output", [700])],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("custom", 3)],
        producer_name="p",
        producer_version="1",
        model_version=4,
        doc_string="model doc",
        domain="d",
    )
    model.graph.doc_string = "graph doc"
    model.graph.value_info.append(value("bar", ["n", 3], TensorProto.BFLOAT16))
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("f", FLOAT, ["n"]))
    model.graph.input[0].doc_string = "the input"
    model.graph.input[0].type.tensor_type.shape.dim[0].denotation = "BATCH"
    model.graph.metadata_props.add(key="g", value="h")
    model.graph.quantization_annotation.add(tensor_name="big").quant_parameter_tensor_names.add(key="S", value="scalar")
    helper.set_model_props(model, {"names": "{0: 'cat'}"})
    return model


def all_tensors(model):
    """Every tensor of a model by name, those in attributes by their node's output; shape, type and bytes."""
    found = {}

    def visit(graph):
        for tensor in graph.initializer:
            found[tensor.name] = tensor
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    found[f"{node.output[0]}.{attribute.name}"] = attribute.t
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(model.graph)
    return {name: (list(t.dims), t.data_type, numpy_helper.to_array(t).tolist()) for name, t in found.items()}


def raw_form(model):
    """A model with all tensors in raw layout, in which form equal models compare equal."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)

    def visit(graph):
        tensors = list(graph.initializer)
        for attribute in (a for node in graph.node for a in node.attribute):
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensors.append(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                visit(attribute.g)
        for tensor in tensors:
            if tensor.data_type != TensorProto.STRING:
                raw = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
                for field in ("external_data", "data_location", "float_data", "int32_data", "int64_data"):
                    tensor.ClearField(field)
                tensor.ClearField("double_data")
                tensor.ClearField("uint64_data")
                tensor.raw_data = raw

    visit(plain.graph)
    return plain


def write(model, path, **options):
    """As onnx.save, which turns the model that it is given into one with external data."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, **options)


def saved(model, path, **options):
    store.save(store.load(model), path, **options)
    return onnx.load(path)


# ---------------------------------------------------------------------------------------------- what comes through


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("given_as", ["path", "bytes", "proto", "external path"])
def test_nothing_is_lost(tmp_path, given_as, external):
    model = rich_model()
    path = tmp_path / "in.onnx"
    if given_as == "external path":
        write(model, path, save_as_external_data=True, location="w.bin", size_threshold=0, convert_attribute=True)
    else:
        write(model, path)
    source = {"bytes": path.read_bytes(), "proto": model}.get(given_as, path)
    result = saved(source, tmp_path / "out.onnx", external=external)
    assert all_tensors(result) == all_tensors(model)
    assert raw_form(result) == raw_form(model)
    assert (tmp_path / "out.onnx.data").exists() == external


@pytest.mark.parametrize("given_as", ["path", "bytes", "proto"])
def test_a_file_as_protobuf_writes_it_comes_out_byte_for_byte(tmp_path, given_as):
    model = small_model()
    path = tmp_path / "in.onnx"
    write(model, path)
    loaded = store.load({"bytes": path.read_bytes(), "proto": model}.get(given_as, path))
    store.save(loaded, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes() == store.to_bytes(loaded)
    assert store.to_proto(loaded) == model
    assert loaded.nbytes == path.stat().st_size
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_saving_is_deterministic_and_going_external_is_reversible(tmp_path):
    write(rich_model(), tmp_path / "in.onnx")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        store.save(store.load(tmp_path / "in.onnx"), tmp_path / name / "m.onnx", external=True)
    for file in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    again = store.load(tmp_path / "a" / "m.onnx")
    assert again.external
    assert store.to_bytes(again) == store.to_bytes(store.load(tmp_path / "in.onnx"))
    assert again.nbytes == sum((tmp_path / "a" / file).stat().st_size for file in ("m.onnx", "m.onnx.data"))
    onnx.external_data_helper.load_external_data_for_model(proto := onnx.load(again.path), str(tmp_path / "a"))
    assert raw_form(proto) == raw_form(onnx.load(tmp_path / "in.onnx"))


def test_external_offsets_are_on_pages_and_lengths_given(tmp_path):
    store.save(store.load(rich_model()), tmp_path / "m.onnx", external=True)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data]
    assert entries
    assert all(int(entry["offset"]) % 4096 == 0 and entry["location"] == "m.onnx.data" for entry in entries)


def test_external_is_kept_by_default_and_forced_when_too_large(tmp_path, monkeypatch):
    write(small_model(), tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0)
    store.save(store.load(tmp_path / "in.onnx"), tmp_path / "kept.onnx")
    assert (tmp_path / "kept.onnx.data").exists()
    monkeypatch.setattr(store, "LARGEST_FILE", 10_000)
    store.save(store.load(small_model()), tmp_path / "forced.onnx", external=False)
    assert (tmp_path / "forced.onnx.data").exists()
    with pytest.raises(UnsupportedModel, match="2 GiB"):
        store.to_bytes(store.load(small_model()))


def test_hash_is_over_all_files_and_not_over_times(tmp_path):
    write(small_model(), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    both = (tmp_path / "m.onnx").read_bytes() + (tmp_path / "w.bin").read_bytes()
    os.utime(tmp_path / "m.onnx", (1, 1))
    loaded = store.load(tmp_path / "m.onnx")
    assert "sha256" not in vars(loaded.origin)  # nothing is hashed before it is asked for
    assert loaded.sha256 == hashlib.sha256(both).hexdigest()
    assert store.with_graph(loaded, loaded.graph.copy()).sha256 == loaded.sha256


def test_result_runs_and_cwd_does_not_matter(tmp_path, monkeypatch):
    write(small_model(), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    x = RNG.random((2, 64), dtype=np.float32)
    expected = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x})[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = store.load("m.onnx")
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.save(loaded, "out.onnx")
    monkeypatch.chdir(tmp_path)
    result = ort.InferenceSession("elsewhere/out.onnx").run(None, {"x": x})[0]
    np.testing.assert_array_equal(result, expected)


def test_constants_hold_weights_and_selections_are_carried_out_when_saved(tmp_path):
    model = rich_model()
    write(model, tmp_path / "in.onnx")
    loaded = store.load(tmp_path / "in.onnx")
    graph = loaded.graph.copy()
    tensors = graph.tensors()
    assert isinstance(tensors["raw_float32_4096"]._values, Weight)
    for name in ("raw_float32_4096", "raw_int4_4096", "typed_BFLOAT16_4096", "text_4096"):
        tensors[name].values = tensors[name]._values.take(np.arange(0, tensors[name].shape[0], 2), 0)
    tensors["raw_float16_8"].values = np.asarray(tensors["raw_int4_8"].values)  # read, and another type
    store.save(store.with_graph(loaded, graph), tmp_path / "out.onnx", external=True)
    old, new = all_tensors(model), all_tensors(onnx.load(tmp_path / "out.onnx"))
    for name in ("raw_float32_4096", "raw_int4_4096", "typed_BFLOAT16_4096", "text_4096"):
        assert new[name][2] == old[name][2][::2]
    assert new["raw_float16_8"] == old["raw_int4_8"]
    untouched = old.keys() - {"raw_float32_4096", "raw_int4_4096", "typed_BFLOAT16_4096", "text_4096", "raw_float16_8"}
    assert all(new[name] == old[name] for name in untouched)
    assert raw_form(store.to_proto(loaded)) == raw_form(model)  # the copy was changed, not the model


def test_a_skeleton_is_small_and_shapes_can_be_inferred_on_it():
    skeleton = store.to_proto(store.load(small_model()), data=False)
    assert skeleton.ByteSize() < 1500
    inferred = onnx.shape_inference.infer_shapes(skeleton, strict_mode=True)
    assert inferred.graph.value_info[0].name == "h"


def test_local_functions_are_inlined(tmp_path):
    big = numpy_helper.from_array(np.arange(640, dtype=np.float32).reshape(10, 64))
    body = [helper.make_node("Constant", [], ["k"], value=big), helper.make_node("Add", ["a", "k"], ["b"])]
    function = helper.make_function("f", "Shift", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Shift", ["x"], ["h"], domain="f"), helper.make_node("Shift", ["h"], ["y"], domain="f")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    model = model_of(nodes, functions=[function], opset_imports=opsets)
    write(model, tmp_path / "in.onnx")
    for source in (tmp_path / "in.onnx", model):
        loaded = store.load(source)
        assert [node.op for node in loaded.graph.nodes] == ["Constant", "Add"] * 2
        result = saved(source, tmp_path / "out.onnx")
        assert not result.functions
        x = RNG.random((10, 64), dtype=np.float32)
        ran = ort.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x})[0]
        np.testing.assert_allclose(ran, x + 2 * numpy_helper.to_array(big), rtol=1e-6)


def test_sparse_initializers_and_maps_pass(tmp_path):
    model = small_model()
    sparse = model.graph.sparse_initializer.add(dims=[64])
    sparse.values.CopyFrom(helper.make_tensor("sp", FLOAT, [2], [1.0, 2.0]))
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [2], [3, 7]))
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))
    model.graph.output.append(helper.make_value_info("m", kind))
    model.graph.node.append(helper.make_node("ZipMap", ["h", "sp"], ["m"], domain="ai.onnx.ml"))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    assert saved(model, tmp_path / "out.onnx") == model


def test_types_that_say_little_pass(tmp_path):
    model = small_model()
    model.graph.input.append(helper.make_tensor_value_info("no_type", 0, None))
    model.graph.input.append(onnx.ValueInfoProto(name="nothing"))
    model.graph.input.add(name="only_remark").type.denotation = "IMAGE"
    model.graph.value_info.add(name="h").type.tensor_type.shape.dim.add()
    model.graph.input.append(helper.make_tensor_value_info("scalar", FLOAT, []))
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, [2]))
    model.graph.input.append(helper.make_value_info("optional", optional))
    assert saved(model, tmp_path / "out.onnx") == model
    copied = store.with_graph(loaded := store.load(model), loaded.graph.copy())
    assert store.to_proto(copied) == model


def test_initializers_that_are_inputs_stay_inputs(tmp_path):
    for version in (3, 8):
        model = small_model()
        model.ir_version = version
        model.graph.input.append(value("w", [64, 64]))
        model.graph.input.append(value("b", [64]))
        result = saved(model, tmp_path / "out.onnx")
        assert [i.name for i in result.graph.input] == ["x", "w", "b"]
        onnx.checker.check_model(result)
        loaded = store.load(model)
        assert [tensor.name for tensor in loaded.graph.inputs] == ["x"]
        w = loaded.graph.tensors()["w"]
        w.values = w._values.take(range(32), 1)
        shape = store.to_proto(loaded).graph.input[1].type.tensor_type.shape
        assert [d.dim_value for d in shape.dim] == [64, 32]


def test_constants_new_and_empty_and_shared_with_a_nested_graph_are_written_once():
    loaded = store.load(rich_model())
    graph = loaded.graph.copy()  # copying gives nested graphs copies of the outer constants
    foo = graph.nodes[0]
    foo.inputs.append(gs.Constant("new", np.array([1, 2], np.int64)))
    graph.nodes.append(gs.Node("Squeeze", attrs={"axes": []}, inputs=foo.outputs[:1], outputs=[gs.Variable("sq")]))
    graph.nodes.append(gs.Node("Other", domain="fresh", inputs=foo.outputs[:1], outputs=[gs.Variable("ot")]))
    proto = store.to_proto(store.with_graph(loaded, graph))
    names = [tensor.name for tensor in proto.graph.initializer]
    assert names[-1] == "new"
    assert names.count("outer") == 1
    branch = proto.graph.node[4].attribute[0].g
    assert [tensor.name for tensor in branch.initializer] == ["inner1"]
    assert proto.graph.node[-2].attribute[0].type == onnx.AttributeProto.INTS
    assert {o.domain: o.version for o in proto.opset_import} == {"": 17, "custom": 3, "fresh": 1}
    foo.inputs.append(gs.Constant("new", np.array([3], np.int64)))
    with pytest.raises(BadModel, match="'new'"):
        store.to_proto(store.with_graph(loaded, graph))


# ------------------------------------------------------------------------------------------------------- bad input


def refused(source, kind, *words):
    with pytest.raises(kind) as caught:
        store.load(source)
    text = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in text
    assert "; " in text, "no way out is given"
    for word in (Path(source).name if isinstance(source, str | os.PathLike) else "", *words):
        assert word in text
    return text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"hello, this is no model at all\n" * 5, "no ONNX model"),
        (b'{"format": "json"}', "no ONNX model"),
        (b"<html><body>404</body></html>", "no ONNX model"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "picture"),
        (b"\xfd7zXZ\0" + bytes(100), "xz -d"),
        (b"\x1f\x8b" + bytes(100), "gunzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (np.random.default_rng(1).bytes(5000), "no ONNX model"),
        (bytes(1000), "no ONNX model"),
    ],
)
def test_other_files(tmp_path, content, word):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, BadFile, word)


def test_missing_folder_unreadable_and_pipe(tmp_path, monkeypatch):
    refused(tmp_path / "nowhere.onnx", BadFile, "no such file")
    refused(tmp_path, BadFile, "folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", BadFile, "ordinary file")
    with pytest.raises(BadFile, match="null byte"):
        store.load("nul\0.onnx")
    (tmp_path / "m.onnx").write_bytes(b"x")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    refused(tmp_path / "m.onnx", BadFile, "chmod")
    with pytest.raises(BadOption):
        store.load(3)


def damaged(change):
    model = small_model()
    change(model)
    return model


def clear(*names):
    def change(model):
        for name in names:
            model.ClearField(name)

    return change


def set_node(index, **fields):
    def change(model):
        for name, content in fields.items():
            if isinstance(content, list):
                del getattr(model.graph.node[index], name)[:]
                getattr(model.graph.node[index], name).extend(content)
            else:
                setattr(model.graph.node[index], name, content)

    return change


def set_dims(*dims):
    def change(model):
        model.graph.initializer[0].dims[:] = dims

    return change


def add_attribute(**fields):
    def change(model):
        model.graph.node[0].attribute.append(onnx.AttributeProto(name="a", **fields))

    return change


def swap_nodes(model):
    nodes = list(model.graph.node)[::-1]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


def close_circle(model):
    """Let the first node read what is made from its own output."""
    model.graph.node[0].input[0] = "k"
    model.graph.node.append(onnx.helper.make_node("Relu", ["h"], ["k"], "back"))


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        (clear("graph"), BadModel, "graph"),
        (clear("opset_import"), BadModel, "opset"),
        (clear("ir_version"), BadModel, "IR version"),
        (lambda m: setattr(m, "ir_version", 99), UnsupportedModel, "IR version 99"),
        (lambda m: setattr(m.opset_import[0], "version", 999), UnsupportedModel, "opset 999"),
        (lambda m: setattr(m.opset_import[0], "version", 0), BadModel, "opset 0"),
        (set_dims(64, 63), BadModel, "'w'"),
        (set_dims(-64, -64), BadModel, "negative"),
        (set_dims(2**40, 2**40), BadModel, "'w'"),
        (set_dims(2**62, 2**62, 0), BadModel, "'w'"),
        (set_dims(*[1] * 63, 64, 64), BadModel, "'w'"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 0), BadModel, "'w'"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 77), BadModel, "77"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 8), BadModel, "'w'"),
        (lambda m: m.graph.initializer[0].segment.SetInParent(), UnsupportedModel, "'w'"),
        (lambda m: m.graph.initializer[0].ClearField("raw_data"), BadModel, "'w'"),
        (lambda m: setattr(m.graph.initializer[1], "raw_data", b"123"), BadModel, "'b'"),
        (lambda m: setattr(m.graph.initializer[1], "name", "w"), BadModel, "'w'"),
        (lambda m: setattr(m.graph.initializer[1], "name", ""), BadModel, "name"),
        (lambda m: m.graph.input.append(value("x")), BadModel, "'x'"),
        (lambda m: m.graph.output.append(value("y")), BadModel, "outputs"),
        (lambda m: m.graph.output.append(value("z")), BadModel, "'z'"),
        (close_circle, BadModel, "node 'first' (MatMul) reads 'k', which in the end is made from that"),
        (set_node(1, input=["h", "q"]), BadModel, "node 'second' (Add) reads 'q', which nothing makes"),
        (set_node(1, output=["h"]), BadModel, "node 'second' (Add) makes 'h'"),
        (set_node(1, output=["x"]), BadModel, "node 'second' (Add) makes 'x'"),
        (set_node(0, op_type=""), BadModel, "node 'first'"),
        (add_attribute(type=onnx.AttributeProto.TYPE_PROTO), UnsupportedModel, "'first'"),
        (add_attribute(type=onnx.AttributeProto.SPARSE_TENSOR), UnsupportedModel, "'first'"),
        (add_attribute(type=onnx.AttributeProto.TENSORS), UnsupportedModel, "'first'"),
        (add_attribute(type=onnx.AttributeProto.STRING, s=b"\xff"), UnsupportedModel, "UTF-8"),
        (add_attribute(type=onnx.AttributeProto.INT, ref_attr_name="r"), BadModel, "'a'"),
        (lambda m: [add_attribute(type=onnx.AttributeProto.INT)(m) for _ in range(2)], BadModel, "twice"),
    ],
)
def test_broken_models(tmp_path, change, kind, word):
    model = damaged(change)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, kind, word)
    refused(model, kind, word)


def names_of(model):
    return [node.name for node in model.graph.node]


@pytest.mark.parametrize("as_file", [False, True])
def test_nodes_out_of_order_are_sorted(tmp_path, as_file):
    model = damaged(swap_nodes)
    assert names_of(model) == ["second", "first"]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = store.load(path if as_file else model)
    written = store.to_proto(loaded)
    assert names_of(written) == ["first", "second"]
    assert names_of(model) == ["second", "first"]
    onnx.checker.check_model(written, full_check=True)
    feeds = {"x": np.ones((2, 64), np.float32)}
    session = ort.InferenceSession(store.to_bytes(loaded), providers=["CPUExecutionProvider"])
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert np.allclose(session.run(None, feeds)[0], feeds["x"] @ weights["w"] + weights["b"], rtol=1e-5)
    assert store.to_bytes(store.load(store.to_bytes(loaded))) == store.to_bytes(loaded)


def test_only_nodes_that_must_are_moved():
    """c reads what b makes; a and d have no part in it and stay where they are."""
    nodes = [
        helper.make_node("Relu", ["vb"], ["vc"], "c"),
        helper.make_node("Relu", ["x"], ["va"], "a"),
        helper.make_node("Relu", ["x"], ["vb"], "b"),
        helper.make_node("Relu", ["x"], ["vd"], "d"),
        helper.make_node("Sum", ["va", "vc", "vd"], ["y"], "sum"),
    ]
    model = model_of(nodes, [])
    assert names_of(store.to_proto(store.load(model))) == ["a", "b", "c", "d", "sum"]
    ordered = model_of([nodes[i] for i in (3, 2, 1, 0, 4)], [])
    assert names_of(store.to_proto(store.load(ordered))) == ["d", "b", "a", "c", "sum"]


def test_nodes_in_bodies_are_sorted_and_count_as_readers():
    def body(name):
        late = helper.make_node("Neg", [f"{name}1"], [f"{name}2"], f"{name}late")
        inner = [late, helper.make_node("Abs", ["h"], [f"{name}1"], f"{name}early")]
        return helper.make_graph(inner, name, [], [helper.make_tensor_value_info(f"{name}2", FLOAT, None)])

    nodes = [
        helper.make_node("If", ["c"], ["y"], "if", then_branch=body("t"), else_branch=body("e")),
        helper.make_node("Relu", ["x"], ["h"], "before"),
        helper.make_node("Constant", [], ["c"], "condition", value=numpy_helper.from_array(np.array(True))),
    ]
    model = model_of(nodes, [])
    loaded = store.load(model)
    written = store.to_proto(loaded)
    assert names_of(written) == ["before", "condition", "if"]
    for attribute in written.graph.node[2].attribute:
        assert [node.op_type for node in attribute.g.node] == ["Abs", "Neg"]
    x = np.ones((2, 64), np.float32)
    session = ort.InferenceSession(store.to_bytes(loaded), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": x})[0], -x)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circles_are_refused(length):
    names = ["x", *(f"v{i}" for i in range(length))]
    nodes = [helper.make_node("Add", [names[i], f"v{length - 1}" if not i else names[i]], [names[i + 1]], f"n{i}") for i in range(length)]
    nodes.append(helper.make_node("Relu", [names[-1]], ["y"], "last"))
    for order in (nodes, nodes[::-1]):
        with pytest.raises(BadModel, match="which in the end is made from that"):
            store.load(model_of(order, []))


@pytest.mark.parametrize(
    "name", [b"first", b"MatMul", b"QQvalue", b"QQaxis", b"QQdoc", b"QQdomain", b"QQprop", b"QQdim"]
)
def test_text_that_is_not_utf8(name):
    model = small_model()
    node = model.graph.node[0]
    node.attribute.append(helper.make_attribute("QQaxis", 1))
    node.doc_string, node.domain, node.output[0] = "QQdoc", "QQdomain", "QQvalue"
    model.graph.node[1].input[0] = "QQvalue"
    model.metadata_props.add(key="QQprop", value="v")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "QQdim"
    content = model.SerializeToString()
    assert name in content
    refused(content.replace(name, b"\xff" + name[1:]), BadModel, "UTF-8")


def test_messages_are_one_printable_line():
    model = damaged(set_node(1, input=["h", "a\nb\x1b[31m"]))
    refused(model, BadModel, r"reads 'a\nb\x1b[31m'")


def test_functions_that_cannot_be_inlined():
    def model(functions, opset=17):
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        made = [
            helper.make_function("f", name, ["a"], ["b"], nodes, [helper.make_opsetid("", opset), opsets[1]])
            for name, nodes in functions.items()
        ]
        return model_of([helper.make_node("F0", ["x"], ["y"], domain="f")], functions=made, opset_imports=opsets)

    refused(model({"F0": [helper.make_node("F0", ["a"], ["b"], domain="f")]}), BadModel, "calls itself")
    refused(model({"F0": [helper.make_node("Relu", ["a"], ["b"])]}, opset=12), UnsupportedModel, "another opset")
    bomb = {}
    for level in range(40):
        callee, domain = (f"F{level + 1}", "f") if level < 39 else ("Relu", "")
        nodes = [helper.make_node(callee, [a], [b], domain=domain) for a, b in (("a", "c"), ("c", "b"))]
        bomb[f"F{level}"] = nodes
    refused(model(bomb), UnsupportedModel, "too many")


# -------------------------------------------------------------------------------------------------- external files


@pytest.fixture
def outside(tmp_path):
    """A model with external data in a folder, and a way to change how it refers to it."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "m.onnx"
    write(small_model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)

    def refer(**entries):
        proto = onnx.load(path, load_external_data=False)
        known = {entry.key: entry.value for entry in proto.graph.initializer[0].external_data} | entries
        del proto.graph.initializer[0].external_data[:]
        for key, text in known.items():
            if text is not None:
                proto.graph.initializer[0].external_data.add(key=key, value=text)
        path.write_bytes(proto.SerializeToString())
        return path

    return refer


def test_external_data_without_length_or_offset_is_read(outside):
    path = outside(length=None, offset=None, location="./w.bin")
    assert store.load(path).graph.tensors()["w"].values.shape == (64, 64)


@pytest.mark.parametrize(
    ("entries", "kind", "word"),
    [
        ({"location": "/etc/passwd"}, BadModel, "outside"),
        ({"location": "../m/w.bin"}, BadModel, "outside"),
        ({"location": "a/../../w.bin"}, BadModel, "outside"),
        ({"location": "a\\..\\..\\w.bin"}, BadModel, "outside"),
        ({"location": "C:\\w.bin"}, BadModel, "outside"),
        ({"location": "nul\0byte"}, BadModel, "'w'"),
        ({"location": None}, BadModel, "'w'"),
        ({"location": "other.bin"}, BadFile, "'other.bin' is missing"),
        ({"location": "spa:lazy"}, BadFile, "missing"),
        ({"location": "x" * 5000}, BadFile, "cannot be opened"),
        ({"location": "."}, BadFile, "ordinary"),
        ({"offset": "-4"}, BadModel, "'-4'"),
        ({"offset": "99999999"}, BadFile, "'w'"),
        ({"offset": "9" * 50}, BadModel, "'w'"),
        ({"length": "12"}, BadModel, "'w'"),
        ({"length": "many"}, BadModel, "'many'"),
    ],
)
def test_bad_references(outside, entries, kind, word):
    refused(outside(**entries), kind, word)


def test_bad_external_files(outside):
    path = outside()
    data = path.parent / "w.bin"
    content = data.read_bytes()
    elsewhere = path.parent.parent / "elsewhere.bin"
    elsewhere.write_bytes(content)

    data.write_bytes(content[:-1])
    refused(path, BadFile, "w.bin")
    data.write_bytes(b"")
    refused(path, BadFile, "empty")
    data.unlink()
    data.symlink_to(elsewhere)
    refused(path, BadFile, "symbolic link")
    data.unlink()
    os.link(elsewhere, data)
    refused(path, BadFile, "hard link")
    data.unlink()
    os.mkfifo(data)
    refused(path, BadFile, "ordinary")
    data.unlink()
    refused(path, BadFile, "missing")
    (path.parent / "linked").symlink_to(path.parent.parent)
    refused(outside(location="linked/elsewhere.bin"), BadFile, "symbolic link")
    refused(path.read_bytes(), BadModel, "load it from its path")
    refused(onnx.load(path, load_external_data=False), BadModel, "load it from its path")


# ---------------------------------------------------------------------------------------------------------- saving


def test_sources_are_not_overwritten(tmp_path):
    path = tmp_path / "m.onnx"
    write(small_model(), path, save_as_external_data=True, location="w.onnx.data", size_threshold=0)
    loaded = store.load(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "soft.onnx").symlink_to(path)
    os.link(path, tmp_path / "hard.onnx")
    for name in ("m.onnx", "soft.onnx", "hard.onnx", "w.onnx", "w.onnx.data"):
        with pytest.raises(BadOption, match="read from"):
            store.save(loaded, tmp_path / name)
    with pytest.raises(BadOption, match="ordinary"):
        store.save(loaded, tmp_path)
    with pytest.raises(BadOption, match="ordinary"):
        store.save(loaded, "/dev/null")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name in before} == before
    assert not list(tmp_path.glob(".spa-*"))


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace", "replace model"])
@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failed_save_leaves_no_trace(tmp_path, monkeypatch, step, cause):
    loaded = store.load(small_model())
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(cause, os.strerror(cause))

    real_replace, real_pieces = os.replace, Weight.pieces
    if step == "open":
        monkeypatch.setattr(files, "open", fail, raising=False)
    elif step == "write":
        monkeypatch.setattr(Weight, "pieces", lambda weight: fail() if weight.nbytes > 1024 else real_pieces(weight))
    elif step == "replace model":
        monkeypatch.setattr(os, "replace", lambda a, b: fail() if b == target else real_replace(a, b))
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(BadFile, match="out.onnx: .*; ") as caught:
        store.save(loaded, target, external=True)
    assert os.strerror(cause) in str(caught.value)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert not list(tmp_path.glob(".spa-*"))
    assert (tmp_path / "out.onnx.data").exists() == (step == "replace model")


def test_a_missing_folder_and_an_interrupt(tmp_path, monkeypatch):
    loaded = store.load(small_model())
    with pytest.raises(BadFile, match="no folder"):
        store.save(loaded, tmp_path / "nowhere" / "out.onnx")
    with pytest.raises(BadFile):
        store.save(loaded, tmp_path / ("x" * 300))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(loaded, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_results_may_be_read_by_whom_the_umask_lets(tmp_path):
    old = os.umask(0o022)
    try:
        store.save(store.load(small_model()), tmp_path / "out.onnx")
    finally:
        os.umask(old)
    assert (tmp_path / "out.onnx").stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------------------------------------------------- memory

_MEASURE = """
import resource, sys
import numpy as np
from spa import store
import onnx, onnx.inliner

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

source, target = sys.argv[1:]
before = peak()
model = store.load(source)
graph = model.graph.copy()
for constant in graph.tensors().values():
    if isinstance(constant, store.gs.Constant):
        constant.values = constant._values.take(np.arange(0, constant.shape[-1], 2), -1)
store.save(store.with_graph(model, graph), target)
model.sha256
print(peak() - before)
"""


@pytest.mark.parametrize("external", [True, False])
def test_memory_does_not_grow_with_the_weights(tmp_path, external):
    nodes, tensors = [], []
    shapes = [(5000, 5000), (20, 1_000_000), (1, 6_000_000)]  # 100, 80 and 24 MB
    for index, shape in enumerate(shapes):
        path = tmp_path / f"w{index}.bin"
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        tensor = TensorProto(name=f"w{index}", dims=shape, data_type=FLOAT, data_location=TensorProto.EXTERNAL)
        offset = path.stat().st_size - 4 * int(np.prod(shape))
        for key, text in (("location", path.name), ("offset", str(offset))):
            tensor.external_data.add(key=key, value=text)
        tensors.append(tensor)
        nodes.append(helper.make_node("Foo", [tensor.name], [f"y{index}"], domain="custom"))
    outputs = [value(f"y{index}", None) for index in range(len(shapes))]
    source = tmp_path / "m.onnx"
    source.write_bytes(model_of(nodes, tensors, outputs=outputs).SerializeToString())
    if not external:
        store.save(store.load(source), tmp_path / "one.onnx", external=False)
        source = tmp_path / "one.onnx"
    target = tmp_path / "out.onnx"
    command = [sys.executable, "-c", _MEASURE, str(source), str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert float(run.stdout) < 80
    size = sum(file.stat().st_size for file in tmp_path.glob("out.onnx*"))
    assert size == pytest.approx(102e6, rel=0.01)
    shutil.rmtree(tmp_path)


# ------------------------------------------------------------------------------------------------------------ fuzz


def fuzzed_model():
    """Small, but with each kind of thing that the reader looks into."""
    model = rich_model()
    keep = [t for t in model.graph.initializer if "4096" not in t.name]
    dropped = {t.name for t in model.graph.initializer} - {t.name for t in keep}
    inputs = [name for name in model.graph.node[0].input if name not in dropped]
    model.graph.node[0].input[:] = inputs
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(keep)
    return model.SerializeToString()


FUZZED = fuzzed_model()


def survives(content):
    try:
        loaded = store.load(content)
        store.to_bytes(loaded)
    except SpaError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [small_model().SerializeToString(), FUZZED], ids=["small", "rich"])
def test_truncated_anywhere(content):
    for stop in range(0, len(content), max(1, len(content) // 400)):
        survives(content[:stop])


@settings(max_examples=1500, deadline=2000, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(FUZZED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_flipped(flips):
    content = bytearray(FUZZED)
    for position, byte in flips:
        content[position] = byte
    survives(bytes(content))


@settings(max_examples=300, deadline=2000)
@given(st.binary(max_size=200))
def test_random_bytes(content):
    survives(content)


def test_wire_numbers():
    for number in (0, 1, 127, 128, 300, 2**31, 2**63):
        assert wire.read_varint(wire.varint(number), 0, 20) == (number, len(wire.varint(number)))
    for broken in (b"\x80", b"\xff" * 11):
        with pytest.raises(wire.WireError):
            wire.read_varint(broken, 0, len(broken))
    for broken in (b"\x00\x00", b"\x0b", b"\x0a\x05a", b"\x0d\x00", b"\x0a\xff\xff\xff\xff\x0f"):
        with pytest.raises(wire.WireError):
            list(wire.fields(broken, 0, len(broken)))


def test_error_family():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SpaError)]
    assert len(kinds) == 8
    assert {kind.__name__ for kind in kinds if kind.exit_code == 1} == {"NothingToPrune", "CheckFailed"}
    assert all(kind.__doc__ for kind in kinds)


def test_references_as_long_as_their_placeholders(tmp_path):
    """A reference to the data file that happens to be as long as the placeholder must still replace it."""
    names = [f"w{i}" for i in range(200)]
    weights = [numpy_helper.from_array(np.full((300 + 7 * i,), i, np.float32), n) for i, n in enumerate(names)]
    nodes = [helper.make_node("Identity", [n], [f"y{i}"]) for i, n in enumerate(names)]
    outputs = [helper.make_tensor_value_info(f"y{i}", 1, None) for i in range(200)]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs, weights))
    for length in range(1, 60):
        path = tmp_path / f"{'m' * length}.onnx"
        store.save(store.load(model), path, external=True)
        graph = onnx.load(path, load_external_data=False).graph
        assert {i.external_data[0].value for i in graph.initializer} == {f"{path.name}.data"}
    found = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    assert all(np.array_equal(found[w.name], numpy_helper.to_array(w)) for w in weights)
