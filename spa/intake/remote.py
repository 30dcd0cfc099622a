"""A framework's worker: in a process of its own, so that no converter's crash or version takes spa down; or in this one, for live objects.

The process runs this Python, or the one that the framework's variable names, and stays as long as questions come, so that a network is
loaded once. What a worker prints is logged (`-v`) when it fails.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spa.engines.worker import Worker
from spa.errors import BadFile, BadOption, UnsupportedModel
from spa.intake.frameworks import Framework, Origin
from spa.proof.feeds import Feeds

TIMEOUT = 4 * 3600.0  # seconds; a large network takes its time
LOG = logging.getLogger(__name__)
Named = list[tuple[str | None, np.ndarray[Any, Any]]]
"""Arrays in order, with their names where they have any."""


class Reader(Protocol):
    """What a framework can be asked about one model."""

    def inputs(self) -> list[dict[str, Any]]:
        """Name, dtype and shape of each input."""

    def convert(self, target: Path) -> list[str]:
        """Writes ONNX, and says what the user should know."""

    def outputs(self, feeds: Feeds) -> Named:
        """The framework's own outputs."""

    def layers(self, feeds: Feeds) -> Named:
        """Intermediate results in order of execution; none where it cannot tell."""

    def examples(self) -> list[Feeds]:
        """Inputs that suit the model, where any that are drawn would not; else none."""


class Remote:
    """A model that another process reads. Raises BadOption, BadFile or UnsupportedModel, as the worker says whose fault it is."""

    def __init__(self, origin: Origin, wish: Mapping[str, Any]) -> None:
        self.origin, self.wish = origin, dict(wish)
        self.row = origin.framework
        folder = Path(__file__).parent / "workers"
        python = os.environ.get(self.row.environment or "_") or sys.executable
        program = os.path.abspath(python) if os.path.dirname(python) else python
        self.worker = Worker((program, str(folder / "serve.py"), str(folder / f"{self.row.worker}.py")), timeout=TIMEOUT)
        self._log = self.worker.folder / "stderr.txt"
        missing = self._ask("missing", modules=list(self.row.modules))["missing"]
        if missing:
            self.close()
            raise BadOption(not_here(self.row, missing[0]))

    def inputs(self) -> list[dict[str, Any]]:
        """Name, dtype and shape of each input."""
        return list(self._model("inputs")["inputs"])

    def convert(self, target: Path) -> list[str]:
        """Writes ONNX, and says what the user should know."""
        return list(self._model("convert", target=os.fspath(target))["notes"])

    def outputs(self, feeds: Feeds) -> Named:
        """The framework's own outputs."""
        return self._arrays("outputs", feeds)

    def layers(self, feeds: Feeds) -> Named:
        """Intermediate results in order of execution; none where it cannot tell."""
        return self._arrays("layers", feeds)

    def examples(self) -> list[Feeds]:
        """Inputs that suit the model, where any that are drawn would not; else none."""
        found: list[Feeds] = []
        for k in range(self._model("examples", results=os.fspath(self.worker.folder))["count"]):
            with np.load(self.worker.folder / f"{k}.npz", allow_pickle=False) as loaded:
                found.append({name: loaded[name] for name in loaded.files})
        return found

    def close(self) -> None:
        """Ends the process."""
        self.worker.close()

    def _arrays(self, do: str, feeds: Feeds) -> Named:
        asked, results = (self.worker.folder / f"{name}.npz" for name in ("feeds", "results"))
        np.savez(asked, allow_pickle=False, **{n: a.astype(str) if a.dtype == object else a for n, a in feeds.items()})  # type: ignore[arg-type]
        names = self._model(do, feeds=os.fspath(asked), results=os.fspath(results))["names"]
        if not names:
            return []
        with np.load(results, allow_pickle=False) as loaded:
            return [(name, loaded[str(k)]) for k, name in enumerate(names)]

    def _model(self, do: str, **data: Any) -> dict[str, Any]:
        place, wish = self.origin.place, {**self.wish, "framework": self.row.name}
        return self._ask(do, source=os.path.abspath(place) if os.path.exists(place) else place, wish=wish, **data)

    def _ask(self, do: str, **data: Any) -> dict[str, Any]:
        try:
            answer = self.worker.ask(do, **data)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self.row.title}'s converter does not get through {self.origin.place}: {error}") from error
        if "failed" not in answer:
            return answer
        LOG.info("%s", self._log.read_text("utf-8", "replace"))
        raise _refused(self.row, self.origin.place, str(answer["failed"]), str(answer["kind"]))


class Here:
    """A live object, which can't leave this process."""

    def __init__(self, row: Framework, source: Any, wish: Mapping[str, Any]) -> None:
        self.row, self.source, self.wish = row, source, {**wish, "framework": row.name}
        self.place = source if isinstance(source, str) else type(source).__name__
        self.worker: Any = importlib.import_module(f"spa.intake.workers.{row.worker}")

    def inputs(self) -> list[dict[str, Any]]:
        """Name, dtype and shape of each input."""
        return list(self._call("inputs"))

    def convert(self, target: Path) -> list[str]:
        """Writes ONNX, and says what the user should know."""
        return list(self._call("convert", os.fspath(target)) or ())

    def outputs(self, feeds: Feeds) -> Named:
        """The framework's own outputs."""
        return _pairs(self._call("outputs", feeds))

    def layers(self, feeds: Feeds) -> Named:
        """Intermediate results in order of execution; none where it cannot tell."""
        return _pairs(self._call("layers", feeds)) if hasattr(self.worker, "layers") else []

    def examples(self) -> list[Feeds]:
        """Inputs that suit the model, where any that are drawn would not; else none."""
        return list(self._call("examples")) if hasattr(self.worker, "examples") else []

    def _call(self, do: str, *data: Any) -> Any:
        from spa.intake.workers.serve import failure

        try:
            with _silent():
                return getattr(self.worker, do)(self.source, *data, self.wish)
        except Exception as error:  # foreign code: whatever it raises is the answer
            said = failure(error)
            raise _refused(self.row, self.place, said["failed"], said["kind"]) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Frameworks print, from Python and from C; it all goes into a file."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        kept = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in kept:
                os.dup2(said.fileno(), number)
            yield
        finally:
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)


def not_here(row: Framework, module: str) -> str:
    """What to do where a module is missing."""
    other = f", or name a Python that has it in {row.environment}" if row.environment else ""
    return f"Reading {row.title} models needs {module}, which is not here: {row.install}{other}."


def _pairs(results: Any) -> Named:
    pairs = list(results.items()) if isinstance(results, dict) else [(None, value) for value in results]
    return [(name, np.asarray(value)) for name, value in pairs]


def _refused(row: Framework, place: str, text: str, kind: str) -> Exception:
    text = text.rstrip(".")
    if kind == "missing":
        return BadOption(f"Reading {place} needs a module that is not here ({text}): {row.install}.")
    if kind == "wish":
        return BadOption(f"{place}: {text}.")
    if kind == "file":
        return BadFile(f"{place} can't be read as a {row.title} model: {text}.")
    return UnsupportedModel(f"{row.title}'s converter can't convert {place}: {text}.")
