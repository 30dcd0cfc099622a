"""TensorFlow, Keras, TFLite and TensorFlow.js: one network in all their formats gives one plan; and what is refused, and how."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from intake_cases import ROOT, needed
from test_intake_rows import converted, pruned, refused
from test_intake_same import decided, expected

import spa
from models.intake import weights as drawn
from spa.intake import frameworks
from spa.intake.frameworks import recognise
from spa.proof.check import run

TFJS = ROOT / "models" / "intake" / "tfjs"
FORMATS = {"keras": "resnet.keras", "h5": "resnet.h5", "saved": "resnet_saved", "pb": "resnet.pb", "tflite": "resnet.tflite"}

OTHERS = """
import keras, tensorflow as tf, zipfile, json, sys

class Odd(keras.layers.Layer):
    def call(self, x):
        return x + 1

start = keras.Input((6,), name="x")
keras.Model(start, Odd()(start)).save("custom.keras")
keras.Model(start, keras.layers.Lambda(lambda x: x * 2)(start)).save("lambda.keras")
keras.Model(start, keras.layers.Dense(2)(start)).save_weights("only.weights.h5")

class Two(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 6], name="x")])
    def twice(self, x):
        return {"y": 2 * x}

    @tf.function(input_signature=[tf.TensorSpec([None, 6], name="x")])
    def odd(self, x):
        return {"y": tf.math.igamma(tf.nn.relu(x) + 1, tf.nn.relu(x) + 2)}

two = Two()
tf.saved_model.save(two, "two", signatures={"twice": two.twice, "odd": two.odd})

a, b = keras.Input((16, 16, 8), name="a"), keras.Input((5,), name="b")
x = keras.layers.Conv2D(8, 3, groups=2, activation="gelu", name="groups")(a)
x = keras.layers.Dense(12, activation="celu", name="wide")(keras.layers.GlobalAveragePooling2D()(x))
x = keras.layers.Concatenate()([x, keras.layers.Dense(4)(b)])
ends = {"one": keras.layers.Dense(3, name="first")(x), "two": keras.layers.Dense(2, name="second")(x)}
keras.Model({"b": b, "a": a}, ends).save("many.keras")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the residual network in all formats, and the small ones of OTHERS."""
    python, folder = needed("tensorflow"), tmp_path_factory.mktemp("tensorflow")
    np.savez(folder / "weights.npz", **drawn.resnet())
    for command in (["-m", "models.intake.tensorflow_nets", "resnet", str(folder / "weights.npz"), str(folder)], ["-c", OTHERS]):
        done = subprocess.run([python, *command], cwd=folder, capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_one_plan_for_all_formats(kind: str, made: Path) -> None:
    found = spa.convert(made / FORMATS[kind])
    assert found.parity is not None
    assert found.parity.passed
    assert [t.shape[0] for t in (*found.model.graph.inputs, *found.model.graph.outputs)] == ["batch", "batch"]
    (groups, before, after), result = decided(found.model, "l2")
    kept, macs = expected("resnet", "l2")
    assert sorted(k for _, _, k in groups) == kept
    assert (before, after) == macs
    assert result.check is not None
    assert result.check.passed


def test_names_are_those_of_the_layers(made: Path) -> None:
    model = spa.convert(made / "resnet.keras").model
    names = {t.name for node in model.graph.nodes for t in node.inputs}
    assert "head/kernel" in names
    assert not any("PartitionedCall" in name or name.endswith(":0") for name in names)


def test_a_quantised_network_stays_quantised(made: Path) -> None:
    found = spa.convert(made / "resnet_int8.tflite")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op for node in found.model.graph.nodes}
    result = spa.prune(found.model, 0.5, multiple_of=1)
    assert (result.before.macs, result.after.macs) == expected("resnet", "l2")[1]


def test_many_inputs_grouped_convolutions_and_what_tf2onnx_lacks(made: Path) -> None:
    found = spa.convert(made / "many.keras")
    assert {t.name for t in found.model.graph.inputs} == {"a", "b"}
    assert {t.name for t in found.model.graph.outputs} == {"first", "second"}
    assert [n.attrs["group"] for n in found.model.graph.nodes if n.op == "Conv"] == [2]


@pytest.mark.parametrize("kind", ["layers", "graph"])
def test_tensorflow_js(kind: str, tmp_path: Path) -> None:
    needed("tfjs")
    out = converted(TFJS / kind / "model.json", "-o", tmp_path / "net.onnx")
    assert "the same as TensorFlow.js gives" in out
    image = ((np.arange(2 * 8 * 8 * 3) * 37) % 101 / 50 - 1).astype(np.float32).reshape(2, 8, 8, 3)
    found = next(iter(run(spa.load(tmp_path / "net.onnx"), {"image": image}).values()))
    gives = np.reshape(json.loads((TFJS / kind / "gives.json").read_text()), (2, 5))  # in JavaScript
    np.testing.assert_allclose(found, gives, atol=1e-5)
    pruned(tmp_path / "net.onnx")
    assert recognise(str(TFJS / kind)).framework.name == "tfjs"


def test_a_network_is_recognised_by_what_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"\x1c\0\0\0TFL3" + bytes(20))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    (tmp_path / "net.h5").write_bytes(b"")
    assert [recognise(str(tmp_path / name)).framework.name for name in ("blob", "saved", "net.h5")] == ["tflite", "tensorflow", "keras"]


# -------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("source", "said"), [
    (["two"], "say which of its signatures with --entry NAME; it has: odd, twice"),
    (["two", "--entry", "thrice"], "it has no signature thrice; it has: odd, twice"),
    (["two", "--entry", "odd"], "tf2onnx has no ONNX for Igamma"),
    (["custom.keras"], "its class Odd is none of Keras' own"),
    (["lambda.keras"], "it holds Python code (a Lambda layer), which loading would run; --trust allows it"),
    (["only.weights.h5"], "it holds weights alone, not the network"),
])  # fmt: skip
def test_what_cannot_be_converted(source: list[str], said: str, made: Path, tmp_path: Path) -> None:
    assert said in refused(tmp_path, made / source[0], *source[1:])


def test_a_lambda_that_is_trusted(made: Path, tmp_path: Path) -> None:
    assert "the same as Keras gives" in converted(made / "lambda.keras", "--trust", "-o", tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["resnet.keras", "resnet.h5", "resnet.pb", "resnet.tflite", "resnet_saved/saved_model.pb",
                                  "resnet_saved/variables/variables.index"])  # fmt: skip
def test_damaged_files(name: str, made: Path, tmp_path: Path) -> None:
    top = name.split("/")[0]
    copy = tmp_path / top
    (shutil.copytree if (made / top).is_dir() else shutil.copy)(made / top, copy)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert str(copy) in refused(tmp_path, copy)


@pytest.mark.parametrize("kind", ["layers", "graph"])
def test_a_shard_that_is_cut(kind: str, tmp_path: Path) -> None:
    needed("tfjs")
    shutil.copytree(TFJS / kind, tmp_path / kind)
    shard = tmp_path / kind / "group1-shard1of1.bin"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "it is damaged, or no model of TensorFlow.js" in refused(tmp_path, tmp_path / kind)
    shard.unlink()
    assert "group1-shard1of1.bin" in refused(tmp_path, tmp_path / kind)


def test_without_tensorflow_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(row, modules=(*row.modules, "tensorflow_of_nobody")) for row in frameworks.FRAMEWORKS]
    monkeypatch.setattr(frameworks, "FRAMEWORKS", tuple(rows))
    monkeypatch.delenv("SPA_TENSORFLOW_PYTHON", raising=False)
    (tmp_path / "net.tflite").write_bytes(b"\x1c\0\0\0TFL3")
    said = refused(tmp_path, tmp_path / "net.tflite")
    assert "pip install 'spa-prune[tensorflow]', or name a Python that has it in SPA_TENSORFLOW_PYTHON" in said
