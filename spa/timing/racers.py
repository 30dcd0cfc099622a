"""A model in a race: loaded on an engine, in this process or in one of its own, and timed run by run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spa.engines.table import Engine, Opened, Settings
from spa.engines.worker import Remote, child
from spa.errors import SpaError, UnsupportedModel
from spa.graph.state import feeds_for
from spa.proof.feeds import Feeds
from spa.storage.store import Model


def resident(process: int | None = None) -> int | None:
    """Bytes of memory that a process holds, this one after giving back what is free; None where the system does not say (Linux does)."""
    if process is None:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which the next model would use without any growth
    try:
        pages = Path(f"/proc/{process or 'self'}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def growth(before: int | None, process: int | None = None) -> int | None:
    """Bytes by which a process has grown since."""
    after = resident(process)
    return None if before is None or after is None else max(after - before, 0)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class Racer:
    """One model, ready to run.

    Attributes
    ----------
    load
        Seconds from the model in memory to one that is ready for these feeds; with a runtime that converts models, or that is in a process
        of its own, that is part of it.
    first
        Seconds of the first run.
    memory
        Bytes by which the process that runs the model had grown after its first run: weights as the runtime packs them, and its buffers.
        None where that is not known.
    placement
        Where the nodes run.
    """

    def __init__(self, name: str, model: Model, feeds: Feeds, engine: Engine, settings: Settings) -> None:
        """Loads and runs once. Raises UnsupportedModel with the engine's own words."""
        self.name = name
        before, start = resident(), time.perf_counter()
        with self._named("load"):
            self.opened, self._call = _ready(model, feeds, engine, settings)
        self.load = time.perf_counter() - start
        try:
            self.first = self.lap()[0]
            self.placement = self.opened.placement
        except BaseException:
            self.close()
            raise
        self.memory = self._growth(before)

    def lap(self) -> tuple[float, float]:
        """Seconds of one run: by the clock on the wall, and of the CPU in the thread that calls."""
        call = self._call
        with self._named("run"):
            cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
            call()
            wall, cpu = time.perf_counter_ns() - wall, time.thread_time_ns() - cpu
        if _is_elsewhere(call):  # it measured itself, without the way there and back
            return float(getattr(call, "seconds", 0.0)), float(getattr(call, "thread_seconds", 0.0))
        return wall / 1e9, cpu / 1e9

    def close(self) -> None:
        """Gives back what it holds."""
        self.opened.close()

    def _growth(self, before: int | None) -> int | None:
        if isinstance(self.opened, Remote) and "resident" in self.opened.meta:
            return growth(self.opened.meta["resident"], self.opened.worker.process.pid)
        return None if _is_elsewhere(self._call) else growth(before)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except SpaError:
            raise
        except Exception as error:  # each runtime raises classes of its own
            raise UnsupportedModel(f"{self.name} does not {what}: {first_line(error)}") from error


def _is_elsewhere(call: Callable[[], None]) -> bool:
    """Whether a bound call runs in another process, and tells its times."""
    return hasattr(call, "seconds")


def _ready(model: Model, feeds: Feeds, engine: Engine, settings: Settings) -> tuple[Opened, Callable[[], None]]:
    """A loaded model and a call that runs it, in a process of its own where the engine wants that."""
    opened = _apart(engine, model, settings) if engine.apart else engine.load(model, settings)
    try:
        return opened, opened.bound(feeds_for(model.narrowed, feeds))
    except BaseException:
        opened.close()
        raise


def _apart(engine: Engine, model: Model, settings: Settings) -> Remote:
    """The model in a process of its own, which looks the engine up in the table again."""
    command = sys.executable, os.fspath(child("serve.py")), os.fspath(Path(__file__).with_name("apart.py"))
    options = {**settings.options, "spa.engine": engine.name, "spa.module": engine.load.__module__}
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return Remote(command, model, Settings(settings.threads, options), environment=path)
