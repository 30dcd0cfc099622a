"""The child's side of `spa.engines.worker`: serves one model of one adapter, in any Python that has numpy and the adapter's runtime.

    python serve.py ADAPTER.py

The adapter is a file with two functions:

    version() -> str                             of the runtime; raises ImportError (or anything) where it cannot be used
    load(path, threads, options) -> opened       opened.meta: dict, the answer to "load" (nodes, fell_back, proven, and figures of its own)
                                                 opened.run(feeds) -> outputs, {name: array}
                                                 opened.bind(feeds) -> call   (may be absent) a call that runs once, for timing
                                                 opened.close()               (may be absent) called if opened.meta["closes"]

Whatever it prints goes to stderr: stdout belongs to the answers. It ends when stdin does.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]  # its neighbours are no packages

import importlib.util  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402


def dtype_of(name: str) -> Any:
    """A numpy type; bfloat16 and float8 need ml_dtypes, which onnxruntime's wheel does not bring."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def read(tensors: Any) -> dict[str, Any]:
    """Arrays from the files that the parent wrote."""
    return {n: np.fromfile(t["file"], dtype_of(t["dtype"])).reshape(t["shape"]) for n, t in tensors.items()}


def write(arrays: Any, folder: str) -> dict[str, Any]:
    """Files that the parent reads."""
    tensors = {}
    for i, (name, value) in enumerate(arrays.items()):
        array = np.asarray(value)
        if array.dtype.kind in "OUS":
            raise TypeError(f"output {name!r} holds text or a sequence, which cannot leave its process")
        file = os.path.join(folder, f"output{i}.bin")
        np.ascontiguousarray(array).tofile(file)
        tensors[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "file": file}
    return tensors


class Served:
    """One adapter and the model that it has loaded."""

    def __init__(self, adapter: Any) -> None:
        self.adapter: Any = adapter
        self.opened: Any = None
        self.call: Any = None

    def answer(self, asked: Any) -> dict[str, Any]:
        """What is answered to a question."""
        do = asked["do"]
        if do == "version":
            return {"version": self.adapter.version()}
        if do == "load":
            self.opened = self.adapter.load(asked["model"], asked["threads"], asked["options"])
            return dict(self.opened.meta)
        if do == "run":
            return {"outputs": write(self.opened.run(read(asked["feeds"])), asked["folder"])}
        if do == "bind":
            feeds = read(asked["feeds"])
            opened = self.opened
            self.call = opened.bind(feeds) if hasattr(opened, "bind") else lambda: opened.run(feeds)
            return {}
        if do == "call":
            wall, cpu = time.perf_counter(), time.thread_time()
            self.call()
            return {"seconds": time.perf_counter() - wall, "thread_seconds": time.thread_time() - cpu}
        if do == "close":
            self.opened.close()
            return {}
        raise ValueError(f"there is no {do!r}")


def adapter_of(path: str) -> Any:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location("adapter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answers questions until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    served = Served(adapter_of(sys.argv[1]))
    for line in sys.stdin:
        try:
            answer = served.answer(json.loads(line))
        except BaseException as error:  # foreign code: whatever it raises is the answer
            traceback.print_exc()
            answer = {"error": str(error) or type(error).__name__}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
