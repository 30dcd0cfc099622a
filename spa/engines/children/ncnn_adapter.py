"""ncnn, through pnnx: the program in pnnx's wheel, whose Python side would import torch.

ncnn's values are of 4 bytes and keep the batch apart from the other axes; which axis that is, if any, is pnnx's choice, and stands in the
script that it writes beside the converted model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from typing import Any

import numpy as np

KINDS = {"float32": "f32", "float16": "f16", "float64": "f64", "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
         "bool": "u8"}  # fmt: skip
INPUT = re.compile(r'ex\.input\("(\w+)", ncnn\.Mat\(\w+\.numpy\(\)(?:, batch_index=(\d+))?\)')
OUTPUT = re.compile(r"torch\.from_numpy\((\w+)\.numpy\((?:batch_index=(\d+))?\)")
NO_BATCH = 233  # as ncnn spells it


def program() -> str:
    """Where pnnx is. Raises ImportError if it isn't."""
    found = importlib.util.find_spec("pnnx")  # finds it without importing it
    path = os.path.join(os.path.dirname(found.origin), "pnnx") if found is not None and found.origin else ""
    if not os.access(path, os.X_OK):
        raise ImportError("pnnx is not here")
    return path


def version() -> str:
    """Those of ncnn and pnnx."""
    import ncnn

    program()
    return f"ncnn {ncnn.__version__}, pnnx {importlib.metadata.version('pnnx')}"


def convert(path: str, inputs: list[Any]) -> tuple[str, str, dict[str, int], dict[str, int]]:
    """Paths of both files of ncnn's, and the batch axis of each input and output. Raises RuntimeError with pnnx's last line."""
    shapes = ",".join(f"[{','.join(map(str, shape))}]{KINDS.get(kind, kind)}" for _, kind, shape in inputs)
    done = subprocess.run([program(), path, f"inputshape={shapes}", "fp16=0"], capture_output=True, text=True, errors="replace",
                          cwd=os.path.dirname(path))  # fmt: skip
    stem = os.path.splitext(path)[0]
    parameters, weights, script = f"{stem}.ncnn.param", f"{stem}.ncnn.bin", f"{stem}_ncnn.py"
    said = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    if done.returncode or not all(map(os.path.exists, (parameters, weights, script))):
        end = f" (it ended with {done.returncode})" if done.returncode else ""
        raise RuntimeError(f"pnnx says: {said[-1] if said else 'nothing'}{end}")
    ignored = [line for line in said if line.startswith("ignore pnnx.Expression") or "not supported" in line]
    with open(script, encoding="utf-8") as file:
        text = file.read()
    fed = {name: int(axis or NO_BATCH) for name, axis in INPUT.findall(text)}
    given = {name: int(axis or NO_BATCH) for name, axis in OUTPUT.findall(text)}
    if not given:
        raise RuntimeError(f"pnnx left no output: {ignored[-1] if ignored else said[-1]}")
    return parameters, weights, fed, given


class Opened:
    """A converted network, all in float32 on the CPU."""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        import ncnn

        interface = json.loads(options["interface"])
        self.kinds = {name: kind for name, kind, _ in interface["outputs"]}
        parameters, weights, fed, given = convert(path, interface["inputs"])
        self.inputs = {f"in{k}": name for k, (name, _, _) in enumerate(interface["inputs"])}
        self.outputs = {f"out{k}": name for k, (name, _, _) in enumerate(interface["outputs"])}
        if set(fed) != set(self.inputs) or set(given) != set(self.outputs):
            raise RuntimeError(f"pnnx made a network of other inputs and outputs: {', '.join([*fed, *given])}")
        self.ncnn, self.fed, self.given = ncnn, fed, given
        self.net = ncnn.Net()
        option = self.net.opt
        option.num_threads = threads or 1
        option.use_vulkan_compute = False
        for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage", "use_int8_inference"):
            setattr(option, name, False)
        with open(parameters, encoding="utf-8") as file:
            layers = [line.split()[0] for line in file.read().splitlines()[2:] if line.strip()]
        unknown = sorted(kind for kind in set(layers) if ncnn.create_layer(kind) is None)
        if unknown:
            raise RuntimeError(f"pnnx left operators that ncnn has no layer for: {', '.join(unknown)}")
        if self.net.load_param(parameters) or self.net.load_model(weights):
            raise RuntimeError("ncnn does not load what pnnx made")
        count = sum(kind not in ("Input", "Split", "MemoryData", "Noop") for kind in layers)
        self.meta = {"nodes": {"ncnn CPU": count}, "proven": True}  # there is nothing else that could run a layer

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        found = self.bind(feeds)()
        arrays = {}
        for blob, mat in found.items():
            name = self.outputs[blob]
            arrays[name] = np.array(mat.numpy(format="f" if self.kinds[name].startswith("float") else "i", batch_index=self.given[blob]))
        return arrays

    def bind(self, feeds: dict[str, Any]) -> Any:
        """A call that runs once."""
        given = {blob: self._mat(feeds[name], self.fed[blob]) for blob, name in self.inputs.items()}

        def call() -> dict[str, Any]:
            found = {}
            with self.net.create_extractor() as extractor:
                for blob, mat in given.items():
                    extractor.input(blob, mat)
                for blob in self.outputs:
                    status, found[blob] = extractor.extract(blob)
                    if status:
                        raise RuntimeError(f"ncnn gives no {blob} (status {status})")
            return found

        return call

    def _mat(self, array: Any, batch: int) -> Any:
        kind = np.float32 if array.dtype.kind == "f" else np.int32
        return self.ncnn.Mat(np.ascontiguousarray(array, kind), batch_index=batch).clone()


def load(path: str, threads: int, options: dict[str, str]) -> Opened:
    """A model, converted."""
    return Opened(path, threads, options)
