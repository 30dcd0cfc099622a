"""Other tools' simplifiers, to see that the same network keeps the same groups however it was cleaned up."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from models import weightless


def load(path: Path, way: str = "none") -> onnx.ModelProto:
    """A model, filled with weights if it has none, after `way`: none, onnxslim, onnxsim or ort (extended optimisation)."""
    model = weightless.load(path) if path.name.endswith(".xz") else onnx.load(path)
    if way == "onnxslim":
        import onnxslim

        return onnxslim.slim(model)
    if way == "onnxsim":
        import onnxsim

        return onnxsim.simplify(model)[0]
    if way == "ort":
        return _ort(model)
    return model


def _ort(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)
