"""Engines in another process: what goes there and back, and every way in which it can fail."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import onnx
import pytest
from ml_dtypes import bfloat16
from test_trace import net

import spa
from spa.engines.table import Settings
from spa.engines.worker import Call, Remote, Worker, asked, child, python_child, version_of, why_not
from spa.errors import UnsupportedModel

ADAPTER = """
import os, sys, time
import numpy as np

def version():
    print("this goes to stderr")
    return "fake 1.2"

class Opened:
    def __init__(self, path, threads, options):
        self.meta = {"nodes": {"Fake": 3}, "fell_back": {"n": "why"}, "proven": True, "size": os.path.getsize(path), "threads": threads}
        self.options = options

    def run(self, feeds):
        what = self.options.get("what")
        if what == "raise":
            raise RuntimeError("the fake says\\nno")
        if what == "die":
            print("something before", file=sys.stderr)
            print("the last words", file=sys.stderr)
            os._exit(3)
        if what == "crash":
            os.abort()
        if what == "hang":
            time.sleep(60)
        if what == "text":
            return {"y": np.array(["a"])}
        print("noise on stdout")
        return {n + "_out": v for n, v in feeds.items()}

def load(path, threads, options):
    if options.get("what") == "refuse":
        raise ValueError("node 'conv' is not supported")
    return Opened(path, threads, options)
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "adapter.py").write_text(ADAPTER)
    return (sys.executable, str(child("serve.py")), str(tmp_path / "adapter.py"))


def model():
    return spa.load(net("float[2,4] x -> float[2,5] y", "y = MatMul(x, w1)", w1=(4, 5)))


def opened(command, what="", **more):
    return Remote(command, model(), Settings(2, {"what": what}), **more)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_there_and_back(command):
    remote = opened(command)
    assert (dict(remote.placement.nodes), dict(remote.placement.fell_back), remote.placement.proven) == ({"Fake": 3}, {"n": "why"}, True)
    assert remote.meta["threads"] == 2
    assert remote.meta["size"] == len(onnx.load(remote.worker.folder / "model.onnx").SerializeToString())
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for array in (x, x.T, x.astype(np.int64), x > 3, np.float32(3), x[:0], x.astype(np.float16), x.astype(bfloat16)):
        found = remote.run({"x": np.asarray(array), "no input": x})
        assert list(found) == ["x_out"]
        assert found["x_out"].dtype == np.asarray(array).dtype
        assert np.array_equal(found["x_out"], array)
    call = remote.bound({"x": x})
    call()
    assert isinstance(call, Call)
    assert 0 < call.seconds < 1
    folder, process = remote.worker.folder, remote.worker.process
    remote.close()
    remote.close()
    assert not folder.exists()
    assert process.poll() is not None
    with pytest.raises(UnsupportedModel, match="has ended"):
        remote.run({"x": x})


@pytest.mark.parametrize(("what", "says", "lives"), [
    ("raise", "the fake says no", True), ("die", "ended with code 3: the last words", False), ("crash", "was ended by SIGABRT", False),
    ("text", "output 'y' holds text", True),
])
def test_what_goes_wrong_is_said(command, what, says, lives):
    remote = opened(command, what)
    with pytest.raises(UnsupportedModel, match=says):
        remote.run({"x": np.ones((2, 4), np.float32)})
    assert remote.worker.folder.exists() == lives
    remote.close()
    assert not remote.worker.folder.exists()


def test_a_refused_model_leaves_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UnsupportedModel, match="node 'conv' is not supported"):
        opened(command, "refuse")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_child_that_hangs_is_ended(command):
    remote = opened(command, "hang", timeout=1.5)
    start = time.perf_counter()
    with pytest.raises(UnsupportedModel, match="no answer in 2 s"):
        remote.run({"x": np.ones((2, 4), np.float32)})
    assert time.perf_counter() - start < 10
    assert remote.worker.process.poll() is not None
    assert not remote.worker.folder.exists()


def test_children_of_the_child_end_too(tmp_path):
    pid = tmp_path / "pid"
    worker = Worker(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"])
    for _ in range(100):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.02)
    worker.close()
    for _ in range(100):
        if gone(int(pid.read_text())):
            break
        time.sleep(0.02)
    assert gone(int(pid.read_text()))


def test_nobody_holds_it(command):
    worker = Worker(command)
    folder, process = worker.folder, worker.process
    del worker
    assert process.poll() is not None
    assert not folder.exists()


def test_programs_that_are_none(tmp_path):
    with pytest.raises(UnsupportedModel, match="/nowhere/python can't be started: No such file"):
        Worker(["/nowhere/python"])
    with pytest.raises(UnsupportedModel, match="ended with code 0"):
        Worker(["true"]).ask("version")
    with pytest.raises(UnsupportedModel, match="can't be read|ended with"):
        Worker(["sh", "-c", "read x; echo nonsense"]).ask("version")


def test_versions_and_reasons(command, tmp_path, monkeypatch):
    asked.cache_clear()
    assert version_of(command) == "fake 1.2"
    assert why_not(command, "Install it.") == ""
    (tmp_path / "broken.py").write_text("import no_such_runtime")
    monkeypatch.setenv("SPA_FAKE_PYTHON", sys.executable)
    broken = python_child(str(tmp_path / "broken.py"), variable="SPA_FAKE_PYTHON")()
    assert broken[0] == sys.executable
    assert why_not(broken, "pip install fake.").startswith("pip install fake (Its process ended with code 1: ModuleNotFoundError: ")
    monkeypatch.setenv("SPA_FAKE_PYTHON", "/nowhere/python")
    assert "can't be started" in why_not(python_child("x.py", variable="SPA_FAKE_PYTHON")(), "pip install fake.")
    assert version_of(broken) == ""


def test_text_cannot_go_there(command):
    remote = opened(command)
    with pytest.raises(UnsupportedModel, match="Input 'x' holds text"):
        remote.run({"x": np.array(["a"], object)})
    remote.close()


def test_a_relative_path_means_this_folder(command, tmp_path, monkeypatch):
    """The child's own folder is another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("SPA_FAKE_PYTHON", "./python")
    assert version_of(python_child(str(tmp_path / "adapter.py"), variable="SPA_FAKE_PYTHON")()) == "fake 1.2"
    monkeypatch.setenv("SPA_FAKE_PYTHON", "python3-of-nowhere")
    assert python_child("x.py", variable="SPA_FAKE_PYTHON")()[0] == "python3-of-nowhere"
