"""MNN, through its own converter.

The converter is called as a function: `python -m MNN.tools.mnnconvert` would install a logging package with pip and report to its makers.
GELU stays exact (`--useGeluApproximation 0`), which by default MNN replaces: 1e-4 off a layer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np

CONVERTER = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def version() -> str:
    """That of MNN."""
    import MNN

    return f"MNN {MNN.version()}"


def convert(path: str) -> str:
    """From .onnx to .mnn. Raises RuntimeError with the converter's last line."""
    target = f"{os.path.splitext(path)[0]}.mnn"
    arguments = ["-f", "ONNX", "--modelFile", path, "--MNNModel", target, "--bizCode", "spa", "--useGeluApproximation", "0"]
    done = subprocess.run([sys.executable, "-c", CONVERTER, *arguments], capture_output=True, text=True, errors="replace")
    said = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    if done.returncode or not os.path.exists(target) or "Converted Success!" not in said:
        said = [re.sub(r"^\[[\d:]+\] :\d+: ", "", line) for line in said if line != "Converted Failed!"]
        raise RuntimeError(f"its converter says: {said[-1] if said else f'nothing, and ends with {done.returncode}'}")
    return target


class Opened:
    """A converted model. MNN does not say where its operators ran."""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        from MNN import expr, nn

        interface = json.loads(options.pop("interface"))
        self.inputs = [name for name, _, _ in interface["inputs"]]
        self.outputs = [name for name, _, _ in interface["outputs"]]
        settings = {"backend": "CPU", "numThread": threads or 1, "precision": "high"} | options
        self.expr = expr
        self.manager = nn.create_runtime_manager((settings,))
        self.module = nn.load_module_from_file(convert(path), self.inputs, self.outputs, runtime_manager=self.manager)
        if self.module is None:
            raise RuntimeError("it does not load what its converter made")
        self.meta = {"proven": False}

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        found = self.bind(feeds)()
        return {name: _array(value) for name, value in zip(self.outputs, found, strict=True)}

    def bind(self, feeds: dict[str, Any]) -> Any:
        """A call that runs once and waits for the outputs: MNN computes when they are read."""
        given = [self._variable(feeds[name]) for name in self.inputs]

        def call() -> list[Any]:
            found = self.module.onForward(given)
            for value in found:
                value.read()
            return list(found)

        return call

    def _variable(self, array: Any) -> Any:
        kind, of = (np.float32, self.expr.float) if array.dtype.kind == "f" else (np.int32, self.expr.int)  # its only types for inputs
        variable = self.expr.placeholder(list(array.shape), self.expr.NCHW, of)
        variable.write(np.ascontiguousarray(array, kind))
        return variable


def _array(variable: Any) -> Any:
    values = np.array(variable.read())
    return values.reshape(variable.shape)


def load(path: str, threads: int, options: dict[str, str]) -> Opened:
    """A model, converted. Options are those of MNN's runtime: backend, precision, …"""
    return Opened(path, threads, options)
