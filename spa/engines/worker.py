"""Engines that live in another process: in a Python of their own, in Node, under an emulator, or one process a model.

A child is a program that reads one JSON object a line on stdin and answers each with one on stdout:

    {"do": "version"}                                             -> {"version": "onnxruntime 1.27.0"}
    {"do": "load", "model": PATH, "threads": 1, "options": {}}    -> {"nodes": {"X": 12}, "fell_back": {node: why}, "proven": true}
    {"do": "run", "feeds": TENSORS, "folder": PATH}               -> {"outputs": TENSORS}        files written into the folder
    {"do": "bind", "feeds": TENSORS}                              -> {}
    {"do": "call"}                                                -> {"seconds": wall, "thread_seconds": CPU time of the thread}
    {"do": "close"}                                               -> {}      only asked where the answer to load held "closes": true
    whatever failed                                               -> {"error": "why"}

The answer to "load" may hold "figures": {"context_bytes": 81920}, numbers that the engine has to tell of the model.

TENSORS is {name: {"dtype": "float32", "shape": [1, 3], "file": PATH}}; the files are raw bytes, little-endian, as numpy's `tofile` and a
JavaScript typed array have them. It ends when stdin ends. What it says on stderr is kept for the case that it dies without an answer.

A runtime with a Python package needs no program of its own, only an adapter of two functions: `children/serve.py` says which. Then

    command = python_child("adapter_file.py", variable="SPA_NCNN_PYTHON")      # the variable's Python, or this one
    missing = lambda: why_not(command(), "ncnn is not here: pip install ncnn") # "" where it can be used
    version = lambda: version_of(command())
    load    = lambda model, settings: Remote(command(), model, settings, name="ncnn")       # an `Opened`

A child in another language is a command of its own: `[node, str(child("serve.mjs"))]`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from spa.engines.table import Placement, Settings
from spa.errors import UnsupportedModel
from spa.proof.check import IN_MEMORY
from spa.proof.feeds import Feeds
from spa.storage.store import Model, save

TIMEOUT = 600.0  # seconds for one answer
LONGEST = 400  # characters of an error


def child(name: str) -> Path:
    """A file of the children's folder."""
    return Path(__file__).parent / "children" / name


def python_child(adapter: str, *, variable: str) -> Callable[[], tuple[str, ...]]:
    """What starts an adapter: the Python that an environment variable names, or this one."""
    return lambda: (_program(os.environ.get(variable) or sys.executable), os.fspath(child("serve.py")), os.fspath(child(adapter)))


def _program(name: str) -> str:
    """A program as children can start it, whose folder is another one: paths from here become whole, names on the path stay."""
    return os.path.abspath(name) if os.path.dirname(name) else name


class Worker:
    """A child process that answers questions, in a folder of its own; both are gone after `close`, or when nobody holds it any more.

    Parameters
    ----------
    command
        Program and arguments.
    environment
        Added to this process's.
    timeout
        Seconds that one answer may take.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float = TIMEOUT) -> None:
        self.command, self.timeout = tuple(command), timeout
        self.folder = Path(tempfile.mkdtemp(prefix="spa-"))
        self._errors = self.folder / "stderr.txt"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        try:
            with self._errors.open("wb") as errors:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=self.folder,
                    env={**os.environ, **(environment or {})}, text=True, encoding="utf-8", errors="replace", start_new_session=True)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UnsupportedModel(f"{self.command[0]} can't be started: {error.strerror or error}.") from error
        assert self.process.stdout is not None
        threading.Thread(target=_pump, args=(self.process.stdout, self._lines), daemon=True).start()
        self._finish = weakref.finalize(self, _end, self.process, self.folder)

    def ask(self, do: str, **data: Any) -> dict[str, Any]:
        """One question and its answer. Raises UnsupportedModel with the child's own words, after which it is closed if it can't go on."""
        assert self.process.stdin is not None
        self.check_open()
        try:
            self.process.stdin.write(json.dumps({"do": do, **data}) + "\n")
            self.process.stdin.flush()
            line = self._lines.get(timeout=self.timeout)
        except queue.Empty:
            self.close()
            raise UnsupportedModel(f"It gave no answer in {self.timeout:.0f} s.") from None
        except OSError:  # it died before it read
            line = ""
        except BaseException:  # an interrupt: nobody would read the answer
            self.close()
            raise
        try:
            answer = json.loads(line) if line else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UnsupportedModel(self._last_words())
        if "error" in answer:
            raise UnsupportedModel(_sentence(str(answer["error"])))
        return answer

    def check_open(self) -> None:
        """Raises UnsupportedModel if it is closed."""
        if not self._finish.alive:
            raise UnsupportedModel("Its process has ended.")

    def close(self) -> None:
        """Ends the process and all that it has started, and deletes the folder."""
        self._finish()

    def _last_words(self) -> str:
        try:
            code: int | None = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        texts = [t for t in self._errors.read_text("utf-8", "replace").splitlines() if t.strip()]
        said = f": {texts[-1]}" if texts else ""
        self.close()
        how = "gave an answer that can't be read" if code is None else _exit_of(code)
        return _sentence(f"Its process {how}{said}")


class Call:
    """Runs a bound model once; `seconds` and `thread_seconds` are what the child measured, without the way there and back."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.seconds = self.thread_seconds = 0.0

    def __call__(self) -> None:
        """One run."""
        answer = self._worker.ask("call")
        self.seconds, self.thread_seconds = float(answer.get("seconds", 0)), float(answer.get("thread_seconds", 0))


class Remote:
    """A model that is open in another process.

    name: begins the sentences of what goes wrong. meta: all that the child said when it had loaded the model; figures: numbers of it.
    """

    def __init__(
        self, command: Sequence[str], model: Model, settings: Settings, *, name: str = "", environment: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT
    ) -> None:
        self.name = name
        self.worker = Worker(command, environment=environment, timeout=timeout)
        try:
            path = self.worker.folder / "model.onnx"
            save(model, path, external=model.nbytes >= IN_MEMORY)
            start = time.perf_counter()
            with self._named("load"):
                self.meta = self.worker.ask("load", model=os.fspath(path), threads=settings.threads, options=dict(settings.options))
            self.meta.setdefault("load_seconds", time.perf_counter() - start)
            self.figures: dict[str, float] = dict(self.meta.get("figures", {}))
            self.placement = Placement(dict(self.meta.get("nodes", {})), dict(self.meta.get("fell_back", {})),
                                       bool(self.meta.get("proven", False)))  # fmt: skip
            self._inputs = {t.name for t in model.graph.inputs}
        except BaseException:
            self.worker.close()
            raise

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name. Raises UnsupportedModel if the engine fails."""
        with self._named("run"):
            answer = self.worker.ask("run", feeds=self._write(feeds), folder=os.fspath(self.worker.folder))
        return {n: np.fromfile(t["file"], _dtype(t["dtype"])).reshape(t["shape"]) for n, t in answer["outputs"].items()}

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        """A `Call`, whose feeds already lie in the child."""
        with self._named("run"):
            self.worker.ask("bind", feeds=self._write(feeds))
        return Call(self.worker)

    def close(self) -> None:
        """Ends the process."""
        if self.meta.get("closes"):
            with contextlib.suppress(UnsupportedModel):
                self.worker.ask("close")
        self.worker.close()

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except UnsupportedModel as error:
            if not self.name:
                raise
            raise UnsupportedModel(f"{self.name} does not {what} the model: {error}") from error

    def _write(self, feeds: Feeds) -> dict[str, dict[str, Any]]:
        self.worker.check_open()
        tensors = {}
        for i, (name, array) in enumerate(feeds.items()):
            if name not in self._inputs:
                continue
            if array.dtype.kind in "OUS":
                raise UnsupportedModel(f"Input {name!r} holds text, which can't be sent to another process.")
            file = self.worker.folder / f"input{i}.bin"
            np.ascontiguousarray(array).tofile(file)
            tensors[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "file": os.fspath(file)}
        return tensors


@lru_cache(maxsize=64)
def asked(command: tuple[str, ...], environment: tuple[tuple[str, str], ...] = (), timeout: float = 120.0) -> tuple[str, str]:
    """Version of the runtime behind a command, and why it can't be used; one of them is ""."""
    try:
        worker = Worker(command, environment=dict(environment), timeout=timeout)
        try:
            return str(worker.ask("version")["version"]), ""
        finally:
            worker.close()
    except UnsupportedModel as error:
        return "", str(error)


def version_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What the child says its version is; "" where it can't be used."""
    return asked(tuple(command), tuple(sorted((environment or {}).items())))[0]


def why_not(command: Sequence[str], install: str, environment: Mapping[str, str] | None = None) -> str:
    """"" where the child can be used, else what to install and what the child said."""
    error = asked(tuple(command), tuple(sorted((environment or {}).items())))[1]
    return f"{install.rstrip('.')} ({error.rstrip('.')})." if error else ""


def _pump(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    try:
        for line in stream:
            lines.put(line)
    except (OSError, ValueError):
        pass  # closed while it was read
    lines.put("")  # the end


def _end(process: subprocess.Popen[str], folder: Path) -> None:
    """Ends a process and its children: stdin is closed, which is the polite way; who stays is killed."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
    except (OSError, AttributeError):
        process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _exit_of(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


__all__ = ["Call", "Remote", "Worker", "asked", "child", "python_child", "version_of", "why_not"]
