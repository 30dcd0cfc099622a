"""An engine of the table in a process of its own: what `spa.engines.worker` starts for engines that are `apart`.

`spa/engines/children/serve.py` loads this file as its adapter. The module that registers the engine and the engine's name come among the
options, since a process that has just been started knows no engines but those of the table's modules.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import spa
from spa.engines.table import ENGINES, Settings
from spa.proof.feeds import Feeds
from spa.storage.store import load as load_model
from spa.timing.racers import resident


class Loaded:
    """A loaded model as `serve.py` wants it."""

    def __init__(self, path: str, threads: int, options: Mapping[str, str]) -> None:
        own = {k: v for k, v in options.items() if not k.startswith("spa.")}
        importlib.import_module(options["spa.module"])
        model = load_model(path)
        before, start = resident(), time.perf_counter()
        self.opened = ENGINES[options["spa.engine"]].load(model, Settings(threads, own))
        took, placement = time.perf_counter() - start, self.opened.placement
        self.meta: dict[str, Any] = {
            "nodes": dict(placement.nodes), "fell_back": dict(placement.fell_back), "proven": placement.proven, "load_seconds": took,
            "resident": before,
        }

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name."""
        return self.opened.run(feeds)

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """A call that runs once."""
        return self.opened.bound(feeds)


def version() -> str:
    """Of spa, which is what this process runs first."""
    return spa.__version__


def load(path: str, threads: int, options: Mapping[str, str]) -> Loaded:
    """A model on an engine."""
    return Loaded(path, threads, options)
