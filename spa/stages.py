"""Stages: a long call tells what it does by entering a context manager that it was given, named by a word or two."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

Stage: TypeAlias = Callable[[str], Any]


@contextmanager
def quiet(_: str) -> Iterator[None]:
    """Tells nobody."""
    yield


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: graphs are many small objects that all stay, which the collector would visit over and over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
