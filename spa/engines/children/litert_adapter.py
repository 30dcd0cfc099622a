"""LiteRT with XNNPACK, through onnx2tf: in an environment of its own, which TensorFlow makes large.

onnx2tf turns pictures and their tensors from channels first to channels last; here inputs and outputs are flat, so that nobody sees it.
Flat inputs also keep it from fetching a picture to calibrate with.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np

CONVERTER = "from onnx2tf.onnx2tf import main; main()"
FLAGS = ("-n", "-nuo", "-rtpo", "Erf")  # quiet; without onnxsim, whose work is done; Erf by a formula good to 2e-7, as LiteRT has none


def version() -> str:
    """Those of LiteRT and onnx2tf."""
    from ai_edge_litert import interpreter  # noqa: F401

    return f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}, onnx2tf {importlib.metadata.version('onnx2tf')}"


def convert(path: str) -> str:
    """From .onnx to .tflite. Raises RuntimeError with the converter's last line that tells of an error."""
    folder = f"{os.path.splitext(path)[0]}.tf"
    done = subprocess.run([sys.executable, "-c", CONVERTER, "-i", path, "-o", folder, *FLAGS], capture_output=True, text=True,
                          errors="replace", cwd=os.path.dirname(path))  # fmt: skip
    made = glob.glob(os.path.join(folder, "*_float32.tflite"))
    if done.returncode or not made:
        said = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
        errors = [line for line in said if re.search(r"(Error|ERROR|Exception)\b", line)] or [line for line in said if line]
        raise RuntimeError(f"onnx2tf says: {errors[-1] if errors else f'nothing, and ends with {done.returncode}'}")
    return made[0]


def ends(interpreter: Any, outputs: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of inputs and outputs by plain name. Without a signature (some grouped convolutions) outputs are Identity, Identity_1, …"""
    if interpreter.get_signature_list():
        signature = interpreter.get_signature_runner()
        return signature.get_input_details(), signature.get_output_details()
    order = {"Identity" if k == 0 else f"Identity_{k}": name for k, name in enumerate(outputs)}
    return ({d["name"]: d for d in interpreter.get_input_details()},
            {order.get(d["name"], d["name"]): d for d in interpreter.get_output_details()})  # fmt: skip


class Opened:
    """A converted model. LiteRT does not say which operators XNNPACK took."""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        from ai_edge_litert.interpreter import Interpreter

        interface = json.loads(options["interface"])
        self.interpreter = Interpreter(convert(path), num_threads=threads or None)
        self.interpreter.allocate_tensors()
        self.inputs, self.outputs = ends(self.interpreter, [name for name, _, _ in interface["outputs"]])
        names = {name for name, _, _ in (*interface["inputs"], *interface["outputs"])}
        if names != {*self.inputs, *self.outputs}:
            raise RuntimeError(f"onnx2tf made a model of other inputs and outputs: {', '.join([*self.inputs, *self.outputs])}")
        self.meta = {"proven": False}

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        self.bind(feeds)()
        return {name: self.interpreter.get_tensor(detail["index"]) for name, detail in self.outputs.items()}

    def bind(self, feeds: dict[str, Any]) -> Any:
        """A call that runs once."""
        for name, detail in self.inputs.items():
            self.interpreter.set_tensor(detail["index"], np.ascontiguousarray(feeds[name], detail["dtype"]).reshape(detail["shape"]))
        return self.interpreter.invoke


def load(path: str, threads: int, options: dict[str, str]) -> Opened:
    """A model, converted."""
    return Opened(path, threads, options)
