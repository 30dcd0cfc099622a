"""LiteRT (once TensorFlow Lite) with XNNPACK, from ONNX through onnx2tf."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime as ort

from spa.engines.pinned import Converted
from spa.engines.table import Engine, Opened, Settings, engine
from spa.engines.worker import Remote, python_child, version_of, why_not
from spa.errors import UnsupportedModel
from spa.storage.store import Model, load, save

_COMMAND = python_child("litert_adapter.py", variable="SPA_LITERT_PYTHON")
_INSTALL = ("LiteRT is not here: make an environment of its own (python3.11 -m venv DIR && DIR/bin/pip install onnx2tf==1.29.24 "
            "ai-edge-litert==2.1.0; 2.6 GB) and name DIR/bin/python in SPA_LITERT_PYTHON")  # fmt: skip


def folded(model: Model) -> Model:
    """A model after ONNX Runtime's basic passes: arithmetic on constants and sizes, on which onnx2tf fails, is done.

    Raises UnsupportedModel with the runtime's own words.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # no operators of Microsoft's own
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "folded.onnx"
        save(model, given)
        options.optimized_model_filepath = str(made)
        try:
            ort.InferenceSession(str(given), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own for each status
            raise UnsupportedModel(f"ONNX Runtime does not load the model: {str(error).splitlines()[0]}") from error
        return load(made.read_bytes())


def start(model: Model, settings: Settings) -> Opened:
    """Opens a model in the other environment."""
    def remote(pinned: Model, given: Settings) -> Opened:
        return Remote(_COMMAND(), folded(pinned), given)

    return Converted(model, settings, remote, label="LiteRT", flat=True)


LITERT = engine(Engine("litert", "runtime", start, lambda: why_not(_COMMAND(), _INSTALL), lambda: version_of(_COMMAND()), thread_time=True,
                       block=lambda: 32))  # fmt: skip
