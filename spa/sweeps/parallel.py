"""Many independent tasks, on the cores of this machine or on a Ray cluster: joblib does it.

A task is a function of an experiment and of what differs; the function must be found by its module's name, as workers are other processes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spa.errors import BadOption, SpaError
from spa.timing.share import cores, keep_to, limit_memory, memory_each, threads_each

BACKENDS = ("loky", "ray")
WATCH = "spa-watch"  # a worker's thread
Task = tuple[Any, ...]


def check_jobs(jobs: int, backend: str) -> None:
    """Raises BadOption for a backend that is not there, and for more workers than cores."""
    if backend not in BACKENDS:
        raise BadOption(f"--backend is {backend!r}; the choice is: {', '.join(BACKENDS)} (loky: processes on this machine).")
    if jobs < 0:
        raise BadOption(f"--jobs is {jobs}, but must be 0 (one for each core) or more.")
    if backend == "loky" and jobs > cores():
        raise BadOption(f"--jobs is {jobs}, but this machine has {cores()} cores: give at most that, or 0 for one job each.")
    if backend == "ray":
        _ray()


def run(
    function: Callable[..., Any], common: Any, tasks: Sequence[Task], *, jobs: int = 1, backend: str = "loky"
) -> Iterator[tuple[int, Any]]:
    """(task's number, result) of `function(common, *task)` as they become ready.

    common: what all tasks get; it travels once to each worker. jobs: workers, each with its share of the cores; 0: one for each core.
    Raises SpaError if a worker dies; what the function raises, it raises.
    """
    if backend == "loky" and jobs == 1:
        for number, task in enumerate(tasks):
            yield number, function(common, *task)
        return
    if not tasks:
        return
    from joblib import Parallel, delayed  # takes a while to import
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    if backend == "ray":
        yield from _on_ray(function, common, tasks, jobs)
        return
    count = jobs or cores()
    threads = threads_each(count)
    share = threads, memory_each(count)
    workers = Parallel(n_jobs=count, backend="loky", return_as="generator_unordered", batch_size=1, inner_max_num_threads=threads)
    try:
        yield from workers(delayed(_beside)(os.getpid(), i, share, function, common, task) for i, task in enumerate(tasks))
    except TerminatedWorkerError as error:
        raise SpaError("A worker died, probably for want of memory: give fewer --jobs; what is finished is kept.") from error


def _beside(parent: int, number: int, share: tuple[int, int], function: Callable[..., Any], common: Any, task: Task) -> tuple[int, Any]:
    """Runs in a worker of this machine."""
    if not any(t.name == WATCH for t in threading.enumerate()):
        threading.Thread(target=_end_with, args=(parent,), name=WATCH, daemon=True).start()
    return _numbered(number, share, function, common, task)


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: killed, it could not say so, and its workers would work on for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _numbered(number: int, share: tuple[int, int], function: Callable[..., Any], common: Any, task: Task) -> tuple[int, Any]:
    """Runs in a worker, with its threads and its memory."""
    threads, memory = share
    keep_to(threads)
    limit_memory(memory)
    return number, function(_taken(common), *task)


# ---------------------------------------------------------------------- Ray


class _There:
    """A place in Ray's object store: it travels as a reference, and each node fetches what it stands for once."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference


def _taken(common: Any) -> Any:
    if not isinstance(common, _There):
        return common
    import ray

    return ray.get(common.reference)


def _ray() -> Any:
    """Ray, connected: to the cluster at $RAY_ADDRESS, or one that runs on this machine, or one that it starts here."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise BadOption("--backend ray needs Ray, which is not installed: pip install 'spa-prune[ray]'.") from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises classes of its own, and some of Python's
            raise BadOption(f"--backend ray finds no cluster: {str(error).splitlines()[0]}; see $RAY_ADDRESS.") from error
    register_ray()
    return ray


def _on_ray(function: Callable[..., Any], common: Any, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Any]]:
    """In rounds, as joblib gives Ray's results only when all are there: what a round gave is safe before the next begins."""
    from joblib import Parallel, delayed

    ray = _ray()
    there = _There(ray.put(common))
    count = jobs or max(int(ray.cluster_resources().get("CPU", 1)), 1)
    try:
        with Parallel(n_jobs=count, backend="ray", batch_size=1) as workers:
            for start in range(0, len(tasks), 2 * count):
                part = enumerate(tasks[start : start + 2 * count], start)
                yield from workers(delayed(_numbered)(i, (1, memory_each(count)), function, there, task) for i, task in part)
    except ray.exceptions.RayError as error:
        raise SpaError(f"A worker of the Ray cluster died: {str(error).splitlines()[0]}; what is finished is kept.") from error
