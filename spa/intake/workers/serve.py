"""The child's side of `spa.intake.remote`: serves one worker, in any Python that has numpy and the worker's framework.

    python serve.py WORKER.py

A worker is a file with functions:

    inputs(source, wish) -> [{"name", "dtype", "shape"}]     sizes are whole numbers, or a name or None where they are free
    convert(source, target, wish) -> notes or None           writes ONNX at `target`; notes: sentences that the user should see
    outputs(source, feeds, wish) -> arrays                   of the framework itself, in the order of ONNX's outputs, or {name: array}
    layers(source, feeds, wish) -> {name: array}             (may be absent) intermediate results in order of execution
    examples(source, wish) -> [{name: array}]                (may be absent) inputs to compare with, where drawn ones would not do

`source` is a path or another name, `feeds` {input: array}, and `wish` what the user asked for: "framework" (the row of the table), "inputs"
({name: shape}), "dtypes" ({name: dtype}), "opset" (0: the converter's own choice), "dynamic" ("batch", "none", "keep"), "entry", "trust",
"cache", "folder" (the user's). What they raise says whose fault it is: ImportError, something is not installed; ValueError, the user asked
for something that does not go; OSError, the file is damaged or not what it seems; anything else, the converter cannot do it.

Questions come on stdin, a line of JSON each, and are answered on stdout; what workers print goes to stderr.

    {"do": "missing", "modules": ["torch"]}                          -> {"missing": []}
    {"do": "inputs" | "convert" | "outputs" | "layers", "source": …, "wish": {…}, "target": …, "feeds": FILE.npz, "results": FILE.npz}
        -> {"inputs": […]} | {"notes": […]} | {"names": [… of the arrays in the results, or None], "layers": whether there are any}
    {"do": "examples", "source": …, "wish": {…}, "results": FOLDER}  -> {"count": of the files 0.npz, 1.npz, …}
    whatever failed  -> {"failed": one sentence, "kind": "missing", "wish", "file" or "converter"}
"""

from __future__ import annotations

import json
import os
import sys
import traceback

sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]  # its neighbours are no packages

import importlib.util  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

LONGEST = 300  # characters of a sentence
KINDS = ((ImportError, "missing"), (ValueError, "wish"), (OSError, "file"))


def answer(worker: Any, asked: Any) -> dict[str, Any]:
    """What is answered to a question."""
    do = asked["do"]
    if do == "missing":
        return {"missing": [m for m in asked["modules"] if not found(m)]}
    source, wish = asked["source"], asked["wish"]
    if do == "inputs":
        return {"inputs": worker.inputs(source, wish)}
    if do == "convert":
        return {"notes": list(worker.convert(source, asked["target"], wish) or ())}
    if do == "examples":
        drawn = worker.examples(source, wish) if hasattr(worker, "examples") else []
        for k, feeds in enumerate(drawn):
            np.savez(os.path.join(asked["results"], f"{k}.npz"), **feeds)
        return {"count": len(drawn)}
    if do == "layers" and not hasattr(worker, "layers"):
        return {"names": [], "layers": False}
    with np.load(asked["feeds"], allow_pickle=False) as loaded:
        feeds = {name: loaded[name] for name in loaded.files}
    return {"names": write(getattr(worker, do)(source, feeds, wish), asked["results"]), "layers": True}


def found(module: str) -> bool:
    """Whether a module could be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def write(results: Any, path: str) -> list[str | None]:
    """Arrays into an .npz file, under numbers; their names, None where they have none."""
    pairs = list(results.items()) if isinstance(results, dict) else [(None, value) for value in results]
    np.savez(path, **{str(k): plain(value) for k, (_, value) in enumerate(pairs)})
    return [name for name, _ in pairs]


def plain(value: Any) -> Any:
    """An array that numpy can write: bfloat16 and float8 become float32."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def failure(error: BaseException) -> dict[str, str]:
    """The sentence and the kind of whatever went wrong."""
    text = " ".join(str(error).split())
    kind = next((k for of, k in KINDS if isinstance(error, of)), "converter")
    if not text or (kind == "converter" and not isinstance(error, NotImplementedError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return {"failed": text if len(text) <= LONGEST else f"{text[:LONGEST]} …", "kind": kind}


def loaded(path: str) -> Any:
    """The module in a file."""
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(f"spa_intake_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answers questions until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if asked["do"] != "missing":
                worker = worker or loaded(sys.argv[1])
            said = answer(worker, asked)
        except BaseException as error:  # foreign code: whatever it raises is the answer
            traceback.print_exc()
            said = failure(error)
        out.write(json.dumps(said) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
