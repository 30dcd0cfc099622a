"""JAX, PaddlePaddle, scikit-learn, OpenVINO and Core ML: converted and pruned, or refused in a sentence."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from intake_cases import ROOT, needed, saved
from test_cli import run

import spa

FLAX = "models.intake.flax_nets"


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the repository, in the workers too."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def made_by(name: str, code: str, folder: Path) -> None:
    """Runs code in a framework's Python, in a folder."""
    done = subprocess.run([needed(name), "-c", code], cwd=folder, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]


def pruned(path: Path) -> spa.Result:
    result = spa.prune(path, 0.5, multiple_of=1)
    assert result.check is not None
    assert result.check.passed
    assert result.after.macs < result.before.macs
    return result


SKLEARN = """
import warnings, numpy as np, joblib, skops.io
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
warnings.simplefilter("ignore")
x = np.random.default_rng(0).normal(size=(200, 6))
made = make_pipeline(StandardScaler(), MLPClassifier(hidden_layer_sizes=(16, 12), max_iter=20, random_state=0)).fit(x, x[:, 0] > x[:, 1])
skops.io.dump(made, "net.skops")
joblib.dump(made, "net.joblib")
"""


def converted(*args: object) -> str:
    """What the command line says of a conversion."""
    result = run("convert", *args)
    assert result.exit_code == 0, result.output
    return result.output.replace("\n", " ")


def refused(folder: Path, *args: object) -> str:
    """The one sentence that a conversion ends in; nothing is written."""
    result = run("convert", *args, "-o", folder / "out.onnx")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("spa: ")
    assert result.stderr.rstrip().count("\n") == 0
    assert not (folder / "out.onnx").exists()
    return str(result.stderr)


# ---------------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(("entry", "size"), [("linen_resnet", "2x16x16x3"), ("linen_mlp", "2x12"), ("nnx_network", "2x12")])
def test_flax(entry: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("jax", "flax")
    monkeypatch.chdir(ROOT)
    out = converted(f"{FLAX}:{entry}", "--input", f"x:{size}", "-o", tmp_path / "net.onnx", "--from", "jax")
    assert "the same as JAX gives" in out
    assert pruned(tmp_path / "net.onnx").model.graph.inputs[0].shape[0] == "batch"


def test_a_function_of_jax(tmp_path: Path) -> None:
    needed("jax")
    (tmp_path / "net.py").write_text(
        "import jax, jax.numpy as jnp\nW = jax.random.normal(jax.random.key(0), (6, 16))\n"
        "V = jax.random.normal(jax.random.key(1), (16, 3))\n\n"
        "def network(features, scale):\n    return {'b': jnp.tanh(features @ W) @ V, 'a': scale * 2}\n")
    found = spa.convert(f"{tmp_path / 'net.py'}:network", inputs={"scale": (4, 1), "features": (4, 6)})
    assert [t.name for t in found.model.graph.inputs] == ["features", "scale"]
    assert [len(t.shape) for t in found.model.graph.outputs] == [2, 2]
    assert found.parity is not None
    assert found.parity.passed


def test_a_function_that_wants_a_fixed_batch_gets_one(tmp_path: Path) -> None:
    needed("jax")
    (tmp_path / "net.py").write_text(
        "import jax.numpy as jnp\nW = jnp.arange(30.0).reshape(6, 5)\n\ndef network(x):\n    return x.reshape(int(x.shape[0]), 6) @ W\n")
    found = spa.convert(f"{tmp_path / 'net.py'}:network", inputs={"x": (4, 2, 3)})
    assert found.model.graph.inputs[0].shape == [4, 2, 3]
    assert found.notes[0].startswith("The batch is fixed at 4")


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_paddle(name: str, tmp_path: Path) -> None:
    source = saved("paddle", name, tmp_path)
    out = converted(source, "-o", tmp_path / "net.onnx")
    assert "the same as PaddlePaddle gives" in out
    pruned(tmp_path / "net.onnx")
    one = spa.convert(next(Path(source).glob("*.pdiparams")), dynamic="none")
    assert one.model.graph.inputs[0].shape[0] == 1


def test_scikit_learn(tmp_path: Path) -> None:
    needed("skops")
    made_by("skops", SKLEARN, tmp_path)
    for options in (["net.skops"], ["net.joblib", "--trust"]):
        converted(tmp_path / options[0], *options[1:], "-o", tmp_path / "net.onnx")
        assert [t.name for t in spa.load(tmp_path / "net.onnx").graph.outputs] == ["label", "probabilities"]
        pruned(tmp_path / "net.onnx")


def test_a_live_estimator() -> None:
    pytest.importorskip("skl2onnx", reason="skl2onnx is not installed (pip install 'spa-prune[sklearn]')")
    import numpy as np
    from sklearn.neural_network import MLPRegressor

    x = np.random.default_rng(0).normal(size=(100, 4))
    found = spa.convert(MLPRegressor(hidden_layer_sizes=(8,), max_iter=5).fit(x, x[:, 0]))
    assert found.framework.name == "sklearn"
    assert found.parity is not None
    assert found.parity.passed


@pytest.mark.parametrize("half", [False, True])
def test_openvino(half: bool, tmp_path: Path) -> None:
    needed("openvino")
    from test_acting import apart

    (tmp_path / "before.onnx").write_bytes(apart().SerializeToString())
    code = f"import openvino as ov; ov.save_model(ov.convert_model('before.onnx'), 'net.xml', compress_to_fp16={half})"
    made_by("openvino", code, tmp_path)
    out = converted(tmp_path / "net.xml", "-o", tmp_path / "net.onnx")
    assert "the same as OpenVINO gives" in out
    pruned(tmp_path / "net.onnx")


# ------------------------------------------------------------------------------------------------------------- what is refused


def test_core_ml_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "net.mlpackage").mkdir()
    text = refused(tmp_path, tmp_path / "net.mlpackage")
    assert "is a Core ML model, which spa does not convert" in text
    assert "export the model to ONNX from the framework that it was trained in" in text


def test_pickles_stay_closed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "net.joblib").write_bytes(pickle.dumps(Trap()))
    text = refused(tmp_path, tmp_path / "net.joblib")
    assert "is not opened: it is a pickle" in text
    assert "--trust" in text
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("name", "file", "line"), [
    ("paddle", "inference.pdmodel", "paddlepaddle==3.3.1 paddle2onnx==2.1.0"), ("skops", "net.skops", "pip install 'spa-prune[sklearn]'"),
    ("openvino", "net.xml", "openvino2onnx==1.1.0"), ("jax", "net.py:network", "pip install 'spa-prune[jax]'"),
])  # fmt: skip
def test_a_missing_framework(name: str, file: str, line: str, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A Python without any packages but numpy stands in for one that lacks the framework."""
    (tmp_path / file.partition(":")[0]).write_text("<net>" if name == "openvino" else "import jax")
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -c \"import sys; sys.meta_path.insert(0, type('No', (), "
                    "{'find_spec': staticmethod(lambda n, *a: (_ for _ in ()).throw(ImportError(n)) if n.split('.')[0] in "
                    "('jax', 'paddle', 'sklearn', 'openvino') else None)})); "
                    "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\" \"$@\"\n")  # fmt: skip
    bare.chmod(0o755)
    monkeypatch.setenv({"paddle": "SPA_PADDLE_PYTHON", "skops": "SPA_SKLEARN_PYTHON", "openvino": "SPA_OPENVINO_PYTHON",
                        "jax": "SPA_JAX_PYTHON"}[name], str(bare))  # fmt: skip
    text = refused(tmp_path, tmp_path / file, "--input", "x:1x3")
    assert line in text
    assert "which is not here" in text


def test_damaged_files(tmp_path: Path) -> None:
    seen = 0
    for name, file, content in (("skops", "net.skops", b"nothing"), ("openvino", "net.xml", b"<?xml version='1.0'?><net>"),
                                ("paddle", "net.pdiparams", b"\0" * 64)):  # fmt: skip
        try:
            needed(name)
        except pytest.skip.Exception:
            continue
        (tmp_path / file).write_bytes(content)
        (tmp_path / "net.json").write_text("{}")
        text = refused(tmp_path, tmp_path / file)
        assert "can't be read as" in text
        seen += 1
    if not seen:
        pytest.skip("no framework is installed")


def test_jax_without_shapes_and_with_wrong_names(tmp_path: Path) -> None:
    needed("jax")
    (tmp_path / "net.py").write_text("import jax\n\ndef network(image):\n    return jax.nn.relu(image)\n")
    source = f"{tmp_path / 'net.py'}:network"
    assert "give that of each input with --input, such as --input image:1x16" in refused(tmp_path, source)
    text = refused(tmp_path, source, "--input", "x:1x3")
    assert "the inputs that are given are x, but the function's are image" in text
    text = refused(tmp_path, f"{tmp_path / 'net.py'}:other", "--input", "x:1x3")
    assert "has no 'other'" in text


def test_an_operator_that_the_converter_lacks(tmp_path: Path) -> None:
    needed("jax")
    (tmp_path / "net.py").write_text("import jax.numpy as jnp\n\ndef network(x):\n    return jnp.linalg.eigh(x @ x.T)[1]\n")
    text = refused(tmp_path, f"{tmp_path / 'net.py'}:network", "--input", "x:3x3", "--dynamic", "none")
    assert "JAX's converter can't convert" in text
    assert "eigh" in text


def test_paddle_folders_that_are_not_whole(tmp_path: Path) -> None:
    needed("paddle")
    (tmp_path / "net.pdiparams").write_bytes(b"")
    assert "with NAME.json or NAME.pdmodel beside it" in refused(tmp_path, tmp_path)
    shutil.copy(tmp_path / "net.pdiparams", tmp_path / "other.pdiparams")
    (tmp_path / "net.json").write_text("{}")
    assert "several networks (net, other)" in refused(tmp_path, tmp_path)
