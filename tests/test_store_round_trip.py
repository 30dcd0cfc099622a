"""Reading and writing: nothing is lost, and equal models give equal files."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from store_cases import FLOAT, RNG, model_of, rich_model, small_model, value, write

from passes.weights import Weight
from spa.errors import BadModel, UnsupportedModel
from spa.storage import store


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


def saved(model, path, **options):
    store.save(store.load(model), path, **options)
    return onnx.load(path)


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
