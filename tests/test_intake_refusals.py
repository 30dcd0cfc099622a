"""What the intake is given and cannot take: a sentence that names it and the way out, and nothing written."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from intake_cases import needed, saved
from test_intake_rows import converted, made_by, pruned, refused
from test_intake_rows import found as found  # modules of the repository, in the workers too

import spa
from spa.errors import BadOption, CheckFailed, UnsupportedModel
from spa.intake.fitting import fitted
from spa.intake.parity import _by_output

FILE = Path(__file__).parent / "intake_nets.py"


class Takes:
    """A reader that has these inputs and no more."""

    def inputs(self) -> list[dict[str, object]]:
        return [{"name": "ids", "shape": ["batch", None]}, {"name": "mask", "shape": ["batch", 8]}, {"name": "any", "shape": None}]


# ------------------------------------------------------------------------------------------------------------- inputs, anywhere


def test_shapes_that_fit_get_the_names_of_the_model() -> None:
    given = {"0": [4, 7], "mask": ["n", "length"], "any": [1, 2, 3]}
    assert fitted(Takes(), given) == {"ids": [4, 7], "mask": ["n", "length"], "any": [1, 2, 3]}  # type: ignore[arg-type]
    assert fitted(Takes(), {"mask": []}) == {"mask": []}  # type: ignore[arg-type]  of a type alone


@pytest.mark.parametrize(("name", "shape", "says"), [
    ("nope", [1, 8], r"--input nope: the model has no such input; it has: ids \(batchx\?\), mask \(batchx8\), any \(any shape\)\."),
    ("3", [1, 8], "--input 3: the model has no such input"), ("mask", [1, 9], "--input mask is 1x9, but the model takes batchx8: give one"),
    ("1", [1], "--input mask is 1, but the model takes batchx8"),
])  # fmt: skip
def test_what_does_not_fit(name: str, shape: list[int], says: str) -> None:
    with pytest.raises(BadOption, match=says):
        fitted(Takes(), {name: shape})  # type: ignore[arg-type]


def test_outputs_that_do_not_belong_together() -> None:
    found = {"a": np.zeros((2, 3)), "b": np.zeros((2, 1))}
    assert list(_by_output([("b", found["b"]), ("a", found["a"])], found)) == ["a", "b"]
    with pytest.raises(CheckFailed, match="output a is 2x3 in ONNX and 2x1 in the framework"):
        _by_output([(None, found["b"]), (None, found["a"])], found)
    with pytest.raises(UnsupportedModel, match="gives 1 outputs and the converted model 2"):
        _by_output([(None, found["b"])], found)


# ------------------------------------------------------------------------------------------------------- files that say what they are


def test_onnx_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08")
    assert "it is an ONNX file already: spa prune and all other commands read it" in refused(tmp_path, tmp_path / "net.onnx")


def test_an_archive_without_its_end(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"PK\x03\x04 and no more")
    assert "its end is missing: copy or download it again" in refused(tmp_path, tmp_path / "net.pt", "--trust")


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    from test_cli import run

    (tmp_path / "folder").mkdir()
    (tmp_path / "net.tflite").write_bytes(b"\x1c\0\0\0TFL3")
    for target, says in ((tmp_path / "folder", "is a folder"), (tmp_path / "gone" / "out.onnx", "there is no folder"),
                         (tmp_path / "net.tflite", "net.tflite")):  # fmt: skip
        result = run("convert", tmp_path / "net.tflite", "-o", target)
        assert result.exit_code == 2
        assert says in result.stderr
        assert result.stderr.rstrip().count("\n") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "net.tflite"]


# ------------------------------------------------------------------------------------------------------------------------ torch


@pytest.fixture
def torch_files(tmp_path: Path) -> Path:
    """net.pt2, net.ts and sorts.ts."""
    needed("exported")
    import intake_nets as nets
    import torch

    example = torch.zeros(2, 3, 8, 8)
    program = torch.export.export(nets.seeded(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "net.pt2")
    torch.jit.trace(nets.seeded(), example).save(tmp_path / "net.ts")
    torch.jit.script(nets.Sorts()).save(tmp_path / "sorts.ts")
    return tmp_path


def test_what_torch_files_refuse(torch_files: Path) -> None:
    for words, says in (
        (["net.pt2", "--input", "nope:1x3x8x8"], "--input nope: the model has no such input; it has: image ("),
        (["net.pt2", "--input", "1x3x9"], "--input image is 1x3x9, but the model takes "),
        (["net.ts"], "give shapes with --input image:"),
        (["net.ts", "--input", "image:1x4x8x8"], "it does not run on image:1x4x8x8 (RuntimeError: Given groups=1"),
        (["sorts.ts", "--input", "x:4x4"], "'aten::linalg_eigvals' to ONNX opset version 17 is not supported"),
    ):
        assert says in refused(torch_files, torch_files / words[0], *words[1:])


def edited(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The archive beside it with other contents."""
    target = path.with_name("edited.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_a_program_of_another_torch(torch_files: Path) -> None:
    def later(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        return json.dumps({**json.loads(data), "schema_version": {"major": 99, "minor": 0}, "torch_version": "9.9.0"}).encode()

    text = refused(torch_files, edited(torch_files / "net.pt2", later))
    assert "it is damaged, or torch 9.9.0 wrote it: convert it with that one, or export it again" in text
    text = refused(torch_files, edited(torch_files / "net.pt2", lambda name, data: b"99" if name.endswith("archive_version") else data))
    assert "Saved archive version 99 does not match" in text
    text = refused(torch_files, edited(torch_files / "net.pt2", lambda name, data: data[:40] if name.endswith("model.json") else data))
    assert "can't be read as a torch.export model" in text
    assert "or torch of another version wrote it" in text


@pytest.mark.parametrize("name", ["net.pt2", "net.ts"])
def test_torch_files_that_are_cut(name: str, torch_files: Path) -> None:
    data = (torch_files / name).read_bytes()
    (torch_files / name).write_bytes(data[: len(data) // 2])
    assert "can't be read as a" in refused(torch_files, torch_files / name, "--input", "image:1x3x8x8")


# ----------------------------------------------------------------------------------------------------------------- scikit-learn

ESTIMATORS = """
import warnings, numpy as np, joblib
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
warnings.simplefilter("ignore")
x = np.random.default_rng(0).normal(size=(100, 6))
network = MLPRegressor(hidden_layer_sizes=(16, 12), max_iter=5, random_state=0)
joblib.dump(make_pipeline(StandardScaler(), network).fit(x, x[:, :3]), "several.joblib")
words = np.where(x[:, :1] > 0, "yes", "no")
joblib.dump(make_pipeline(OneHotEncoder(handle_unknown="ignore"), network).fit(words, x[:, 0]), "words.joblib")
"""


def test_scikit_learn_estimators(tmp_path: Path) -> None:
    needed("sklearn")
    made_by("sklearn", ESTIMATORS, tmp_path)
    several, words = tmp_path / "several.joblib", tmp_path / "words.joblib"
    assert "it reads 6 columns, but --input x is 1x5: give x:1x6" in refused(tmp_path, several, "--trust", "--input", "1x5")
    assert "it reads one matrix, but --input names a, b" in refused(tmp_path, several, "--trust", "--input", "a:1x6", "--input", "b:1x6")
    assert "if a column holds text, say so, such as --input x:1x1:string" in refused(tmp_path, words, "--trust")
    for source, options in ((several, ()), (words, ("--input", "x:1x1:string"))):
        out = converted(source, "--trust", *options, "-o", tmp_path / "net.onnx")
        assert "the same as scikit-learn gives" in out
        assert spa.load(tmp_path / "net.onnx").graph.outputs[0].shape[1] == (3 if source == several else 1)
    converted(several, "--trust", "-o", tmp_path / "net.onnx")
    pruned(tmp_path / "net.onnx")
    several.write_bytes(several.read_bytes()[:2000])
    assert "it is no pickle of scikit-learn" in refused(tmp_path, several, "--trust")


# -------------------------------------------------------------------------------------------------------- PaddlePaddle, TensorFlow


def test_paddle_without_its_parameters_and_with_wrong_inputs(tmp_path: Path) -> None:
    folder = Path(saved("paddle", "mlp", tmp_path))
    assert "--input nope: the model has no such input; it has: x (" in refused(tmp_path, folder, "--input", "nope:1x12")
    assert "--input x is 1x3x4, but the model takes ?x12" in refused(tmp_path, folder, "--input", "1x3x4")
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "inference.pdiparams").write_bytes(b"\0" * 50)
    assert "PaddlePaddle can't load it" in refused(tmp_path, cut)
    (folder / "inference.pdiparams").unlink()
    assert "it holds no NAME.pdiparams with NAME.json or NAME.pdmodel beside it" in refused(tmp_path, folder)
    assert "there is no inference.pdiparams beside inference.json" in refused(tmp_path, folder / "inference.json")


NETWORKS = """
import keras, tensorflow as tf
start = keras.Input((8, 8, 3), name="image")
end = keras.layers.Dense(5, name="head")(keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3)(start)))
network = keras.Model(start, end)
network.save("net.keras")
network.export("net")
open("net.tflite", "wb").write(tf.lite.TFLiteConverter.from_saved_model("net").convert())

class Plain(tf.Module):
    @tf.function
    def call(self, x):
        return x + 1

plain = Plain()
plain.call(tf.zeros([1, 2]))
tf.saved_model.save(plain, "plain")

class Odd(keras.layers.Layer):
    def call(self, x):
        return x + 1

keras.Model(start, Odd()(end)).save("odd.keras")
"""


def test_what_tensorflow_files_refuse(tmp_path: Path) -> None:
    needed("tensorflow")
    made_by("tensorflow", NETWORKS, tmp_path)
    for name in ("net.keras", "net", "net.tflite"):
        for sizes, says in (("nope:1x8x8x3", "--input nope: the model has no such input; it has: image (?x8x8x3)"),
                            ("1x8x3", "--input image is 1x8x3, but the model takes ?x8x8x3"),
                            ("image:1x9x8x3", "--input image is 1x9x8x3, but the model takes ?x8x8x3")):  # fmt: skip
            assert says in refused(tmp_path, tmp_path / name, "--input", sizes)
    assert "it has no signature that says what goes in and comes out; save it with one" in refused(tmp_path, tmp_path / "plain")
    for trust in ((), ("--trust",)):  # the code of a class is not in the file, whoever trusts it
        assert "its class Odd is none of Keras' own" in refused(tmp_path, tmp_path / "odd.keras", *trust)
