"""An engine for tests that wants a process of its own for each model. It runs Relu in numpy, wherever it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from spa.engines import Engine, Placement, Settings, engine
from spa.proof.feeds import Feeds
from spa.storage.store import Model


class Here:
    """A model that says which process it is in; with the option `only`, it refuses to be in another one."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.only = settings.options.get("only", str(os.getpid()))
        self.placement = Placement({f"process {os.getpid()}": 1}, proven=False)

    def run(self, feeds: Feeds) -> Feeds:
        return {"y": np.maximum(feeds["x"], 0)}

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        if self.only != str(os.getpid()):
            raise RuntimeError("no such luck")

        def call() -> None:
            time.sleep(1e-4)
            self.run(feeds)

        return call

    def close(self) -> None: ...


APART = Engine("test-apart", "runtime", Here, lambda: "", lambda: "apart 1", apart=True, thread_time=True)
if "PYTEST_CURRENT_TEST" in os.environ:  # a test has started this process: it imports this module to find the engine
    engine(APART)
