"""Writing: sources stay, nothing is half written, and memory does not grow with the weights."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from store_cases import FLOAT, model_of, small_model, value, write

from passes.weights import Weight
from spa.errors import BadFile, BadOption
from spa.storage import files, store

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------------------- saving


def test_sources_are_not_overwritten(tmp_path):
    path = tmp_path / "m.onnx"
    write(small_model(), path, save_as_external_data=True, location="w.onnx.data", size_threshold=0)
    loaded = store.load(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "soft.onnx").symlink_to(path)
    os.link(path, tmp_path / "hard.onnx")
    for name in ("m.onnx", "soft.onnx", "hard.onnx", "w.onnx", "w.onnx.data"):
        with pytest.raises(BadOption, match="read from"):
            store.save(loaded, tmp_path / name)
    with pytest.raises(BadOption, match="ordinary"):
        store.save(loaded, tmp_path)
    with pytest.raises(BadOption, match="ordinary"):
        store.save(loaded, "/dev/null")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name in before} == before
    assert not list(tmp_path.glob(".spa-*"))


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace", "replace model"])
@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failed_save_leaves_no_trace(tmp_path, monkeypatch, step, cause):
    loaded = store.load(small_model())
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(cause, os.strerror(cause))

    real_replace, real_pieces = os.replace, Weight.pieces
    if step == "open":
        monkeypatch.setattr(files, "open", fail, raising=False)
    elif step == "write":
        monkeypatch.setattr(Weight, "pieces", lambda weight: fail() if weight.nbytes > 1024 else real_pieces(weight))
    elif step == "replace model":
        monkeypatch.setattr(os, "replace", lambda a, b: fail() if b == target else real_replace(a, b))
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(BadFile, match=r"out.onnx(.data)?: .*; ") as caught:
        store.save(loaded, target, external=True)
    assert os.strerror(cause) in str(caught.value)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert not list(tmp_path.glob(".spa-*"))
    assert (tmp_path / "out.onnx.data").exists() == (step == "replace model")


def test_a_missing_folder_and_an_interrupt(tmp_path, monkeypatch):
    loaded = store.load(small_model())
    with pytest.raises(BadFile, match="no folder"):
        store.save(loaded, tmp_path / "nowhere" / "out.onnx")
    with pytest.raises(BadFile):
        store.save(loaded, tmp_path / ("x" * 300))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(loaded, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_results_may_be_read_by_whom_the_umask_lets(tmp_path):
    old = os.umask(0o022)
    try:
        store.save(store.load(small_model()), tmp_path / "out.onnx")
    finally:
        os.umask(old)
    assert (tmp_path / "out.onnx").stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------------------------------------------------- memory


_MEASURE = """
import resource, sys
import numpy as np
from spa.storage import store
import onnx, onnx.inliner

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

source, target = sys.argv[1:]
before = peak()
model = store.load(source)
graph = model.graph.copy()
for constant in graph.tensors().values():
    if isinstance(constant, store.gs.Constant):
        constant.values = constant._values.take(np.arange(0, constant.shape[-1], 2), -1)
store.save(store.with_graph(model, graph), target)
model.sha256
print(peak() - before)
"""


@pytest.mark.parametrize("external", [True, False])
def test_memory_does_not_grow_with_the_weights(tmp_path, external):
    nodes, tensors = [], []
    shapes = [(5000, 5000), (20, 1_000_000), (1, 6_000_000)]  # 100, 80 and 24 MB
    for index, shape in enumerate(shapes):
        path = tmp_path / f"w{index}.bin"
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        tensor = TensorProto(name=f"w{index}", dims=shape, data_type=FLOAT, data_location=TensorProto.EXTERNAL)
        offset = path.stat().st_size - 4 * int(np.prod(shape))
        for key, text in (("location", path.name), ("offset", str(offset))):
            tensor.external_data.add(key=key, value=text)
        tensors.append(tensor)
        nodes.append(helper.make_node("Foo", [tensor.name], [f"y{index}"], domain="custom"))
    outputs = [value(f"y{index}", None) for index in range(len(shapes))]
    source = tmp_path / "m.onnx"
    source.write_bytes(model_of(nodes, tensors, outputs=outputs).SerializeToString())
    if not external:
        store.save(store.load(source), tmp_path / "one.onnx", external=False)
        source = tmp_path / "one.onnx"
    target = tmp_path / "out.onnx"
    command = [sys.executable, "-c", _MEASURE, str(source), str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert float(run.stdout) < 80
    size = sum(file.stat().st_size for file in tmp_path.glob("out.onnx*"))
    assert size == pytest.approx(102e6, rel=0.01)
    shutil.rmtree(tmp_path)
