"""The table of frameworks that models come from: what their files look like, who reads them, and what that takes.

A new framework is a row here and a file in `workers/` (`workers/serve.py` says what it holds).
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spa.errors import BadFile, BadOption
from spa.intake.looks import Looks, all_of, any_of, archive, document, folder, read_json, scheme, script, settings, starts, suffix

TORCH = "pip install 'spa-prune[torch]'"
_TORCH_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch's own pickles begin with


@dataclass(frozen=True)
class Framework:
    """One row.

    Attributes
    ----------
    name
        What --from takes.
    title
        What messages call it.
    looks
        Whether a path looks like it: by its name, its first bytes and a folder's contents.
    worker
        File in `workers/`, without its ending; "" where spa cannot convert.
    modules
        Modules that the worker imports.
    install
        The line that installs them.
    environment
        Variable that may name another Python which has them.
    trust
        Why loading a file may run code that lies in it; "" where it cannot. Such a file is refused unless the user trusts it.
    instead
        Where spa cannot convert: how to get an ONNX file.
    live
        Package of the objects that can be converted without a file.
    dynamic
        Which sizes stay free where nobody says so, as `--dynamic` has it.
    """

    name: str
    title: str
    looks: Looks
    worker: str = ""
    modules: tuple[str, ...] = ()
    install: str = ""
    environment: str = ""
    trust: str = ""
    instead: str = ""
    live: str = ""
    dynamic: str = "batch"


_PICKLE = "it is a pickle, and loading a pickle runs whatever code lies in it"
_OWN = "python -m venv converter && converter/bin/pip install"
"""For converters that need another onnx than spa's: their Python goes into the row's variable."""
TENSORFLOW = "pip install 'spa-prune[tensorflow]'"
_PIR = ("base_code", "program")  # what PaddlePaddle 3 writes
_TENSORFLOW = ("tensorflow", "keras", "tf2onnx")
_PADDLE = any_of(suffix(".pdmodel", ".pdiparams"), folder("*.pdiparams"), folder("*.pdmodel"), document(*_PIR),
                 settings(*_PIR, name="inference.json"))
_TFJS = ("modelTopology", "weightsManifest")
_NOT_FOUND: Looks = lambda path: False  # noqa: E731  a row that is asked for by name alone

FRAMEWORKS: tuple[Framework, ...] = (
    Framework("timm", "timm", any_of(scheme("timm"), settings("architecture", "pretrained_cfg")), "torch_worker",
              ("torch", "onnxscript", "timm"), "pip install 'spa-prune[timm]'", "SPA_TORCH_PYTHON"),
    Framework("huggingface", "Hugging Face", settings("model_type"), "huggingface_worker",
              ("torch", "onnxscript", "transformers"), "pip install 'spa-prune[huggingface]'", "SPA_TORCH_PYTHON", dynamic="keep"),
    Framework("exported", "torch.export", any_of(archive("archive_format"), suffix(".pt2")), "torch_worker", ("torch", "onnxscript"), TORCH,
              "SPA_TORCH_PYTHON"),
    Framework("torchscript", "TorchScript", any_of(archive("constants.pkl", r"code/.*\.py"), suffix(".torchscript", ".ts")), "torch_worker",
              ("torch", "onnxscript"), TORCH, "SPA_TORCH_PYTHON"),
    Framework("pickle", "PyTorch", any_of(archive(r"data\.pkl", without=r"code/.*"), starts(_TORCH_PICKLE)), "torch_worker",
              ("torch", "onnxscript"), TORCH, "SPA_TORCH_PYTHON", trust=_PICKLE),
    Framework("safetensors", "PyTorch", suffix(".safetensors"), "torch_worker", ("torch", "onnxscript", "safetensors"), TORCH,
              "SPA_TORCH_PYTHON"),
    Framework("torch", "PyTorch", script("torch", "torchvision", "timm", "transformers"), "torch_worker", ("torch", "onnxscript"), TORCH,
              "SPA_TORCH_PYTHON", live="torch"),
    Framework("jax", "JAX", script("jax", "flax", "equinox", "haiku"), "jax_worker", ("jax", "jax2onnx"), "pip install 'spa-prune[jax]'",
              "SPA_JAX_PYTHON", live="flax"),
    Framework("paddle", "PaddlePaddle", _PADDLE, "paddle_worker",
              ("paddle", "paddle2onnx"), f"{_OWN} paddlepaddle==3.3.1 paddle2onnx==2.1.0 packaging", "SPA_PADDLE_PYTHON"),
    Framework("tensorflow", "TensorFlow", any_of(folder("saved_model.pb"), suffix(".pb")), "tensorflow_worker", _TENSORFLOW, TENSORFLOW,
              "SPA_TENSORFLOW_PYTHON"),
    Framework("keras", "Keras", any_of(suffix(".keras", ".h5", ".hdf5"), archive(r"model\.weights\.h5")), "keras_worker", _TENSORFLOW,
              TENSORFLOW, "SPA_TENSORFLOW_PYTHON", live="keras"),
    Framework("tflite", "TFLite", any_of(suffix(".tflite"), starts(b"TFL3", at=4)), "tflite_worker", _TENSORFLOW, TENSORFLOW,
              "SPA_TENSORFLOW_PYTHON"),
    Framework("tfjs", "TensorFlow.js", any_of(document(*_TFJS), settings(*_TFJS, name="model.json")), "tfjs_worker", _TENSORFLOW,
              TENSORFLOW, "SPA_TENSORFLOW_PYTHON"),
    Framework("skops", "scikit-learn", suffix(".skops"), "sklearn_worker", ("sklearn", "skl2onnx", "skops"),
              "pip install 'spa-prune[sklearn]'", "SPA_SKLEARN_PYTHON"),
    Framework("sklearn", "scikit-learn", suffix(".joblib", ".pkl", ".pickle"), "sklearn_worker", ("sklearn", "skl2onnx"),
              "pip install 'spa-prune[sklearn]'", "SPA_SKLEARN_PYTHON", trust=_PICKLE, live="sklearn"),
    Framework("openvino", "OpenVINO", all_of(suffix(".xml"), starts(b"<?xml", b"<net")), "openvino_worker", ("openvino", "openvino2onnx"),
              f"{_OWN} openvino==2026.4.1 openvino2onnx==1.1.0 onnx==1.17.0", "SPA_OPENVINO_PYTHON"),
    Framework("coreml", "Core ML", any_of(suffix(".mlmodel", ".mlpackage"), folder("Manifest.json", "Data")),
              instead="no converter that is kept up reads ML programs, and what it gives could be compared on macOS alone; export the "
              "model to ONNX from the framework that it was trained in"),
)  # fmt: skip

SUFFIXES = ".pt2, TorchScript, PyTorch checkpoints, .safetensors, Hugging Face folders, timm:NAME, file.py:factory of torch or JAX, " \
    "TensorFlow SavedModels and frozen .pb, .keras, .h5, .tflite, TensorFlow.js' model.json, PaddlePaddle inference folders, .skops and " \
    "trusted .joblib, OpenVINO's .xml"
"""What a sentence lists."""


@dataclass(frozen=True)
class Origin:
    """What is to be converted. place: a path, or another name; entry: the callable that was named behind a colon, or ""."""

    framework: Framework
    place: str
    entry: str = ""


def find(name: str) -> Framework:
    """A row by its name. Raises BadOption."""
    for row in FRAMEWORKS:
        if row.name == name:
            return row
    raise BadOption(f"--from {name!r} is no framework; the choice is: auto, {', '.join(row.name for row in FRAMEWORKS)}.")


def of_object(thing: object, asked: str = "auto") -> Framework:
    """The row of a live object, by the packages of its classes; PyTorch's where none is known. Raises BadOption for a wrong --from."""
    packages = {kind.__module__.partition(".")[0] for kind in type(thing).__mro__}
    return find(asked) if asked != "auto" else next((r for r in FRAMEWORKS if r.live in packages), find("torch"))


def recognise(text: str, asked: str = "auto", *, rows: Mapping[str, Framework] | None = None) -> Origin:
    """Which framework a source comes from. Raises BadFile if it is not there or nothing reads it, BadOption for a wrong --from."""
    place, entry = split(text)
    row = find(asked) if asked != "auto" else next((r for r in FRAMEWORKS if r.looks(Path(place))), None)
    if row is None and not os.path.exists(place) and not entry:
        raise BadFile(f"{place}: there is no such file or folder.")
    if row is None and entry:
        row = find("torch")
    if row is None:
        raise BadFile(f"{place}: {_why_unknown(Path(place))}")
    if not row.worker:
        raise BadFile(f"{place} is a {row.title} model, which spa does not convert: {row.instead}.")
    return Origin(row, place, entry)


def split(text: str) -> tuple[str, str]:
    """The place, and the entry behind a colon: net.py:make, package.module:Net. A path that is there is one, whatever is in its name."""
    if os.path.exists(text) or (re.match(r"\w+:", text) is None and ":" not in text):
        return text, ""
    head, _, tail = text.rpartition(":")
    module = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", head) is not None
    there = os.path.exists(head) or head.endswith(".py") or (module and head != "timm")
    if there and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", tail):
        return head, tail
    return text, ""


def _why_unknown(path: Path) -> str:
    if path.suffix == ".onnx":
        return "it is an ONNX file already: spa prune and all other commands read it as it is."
    if starts(b"PK\x03\x04")(path) and not zipfile.is_zipfile(path):
        return "it begins as a zip archive, which PyTorch and Keras write, but its end is missing: copy or download it again."
    if path.suffix == ".py":
        return f"a Python file is read as {path.name}:NAME, with the name of the class or function that makes the network."
    if path.is_dir() and read_json(path / "config.json") is not None:
        return "its config.json tells neither a model_type (Hugging Face) nor an architecture (timm)."
    return f"it is none of what can be converted: {SUFFIXES}; say what it is with --from."
