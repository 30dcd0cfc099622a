"""A process's share of the machine: how many threads each of its sessions may have where nobody says.

Workers that run side by side set it, so that workers times threads are no more than there are cores. ONNX Runtime takes neither the
process's affinity nor OMP_NUM_THREADS for an answer. In the same way a process is told how much memory it may fill with what could also
wait in files or be worked through in pieces.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_share = 0
_memory = 0
_PARTS = 4  # of the memory: matrices, values between layers, calibration data, the part of a model that runs


def keep_to(threads: int) -> None:
    """From now on sessions of this process have so many threads by default; 0: as many as the runtime likes."""
    global _share
    _share = threads


def own_threads() -> int:
    """Threads of a session that nobody gave a number; 0 leaves it to the runtime."""
    return _share


def limit_memory(nbytes: int) -> None:
    """From now on what this process holds of matrices, values and running models stays below so many bytes in all; 0: the usual limits."""
    global _memory
    _memory = nbytes


def memory_each(jobs: int) -> int:
    """The limit for each of so many processes; 0 without one."""
    return _memory // max(jobs, 1)


def room(usual: int) -> int:
    """Bytes for one of the things that memory is shared among: the usual number, or less where memory is limited."""
    return min(usual, _memory // _PARTS) if _memory else usual


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(jobs: int) -> int:
    """Threads for each of so many processes, at least one."""
    return max(cores() // max(jobs, 1), 1)


def in_background(function: Callable[[], T]) -> Future[T]:
    """The result to come of a function that runs beside what is done next, in a thread that does not keep the process from ending."""
    found: Future[T] = Future()

    def work() -> None:
        try:
            found.set_result(function())
        except BaseException as error:  # whoever asks for the result gets it
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return found
