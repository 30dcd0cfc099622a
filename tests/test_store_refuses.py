"""Reading: no model and no external file makes anything but a clear sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from store_cases import FLOAT, model_of, small_model, value, write

from spa.errors import BadFile, BadModel, BadOption, UnsupportedModel
from spa.storage import store

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
