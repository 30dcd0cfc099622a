"""ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime as ort

from spa.align import block_of
from spa.check import run_session, session
from spa.engines.table import Engine, Placement, Settings, engine
from spa.feeds import Feeds
from spa.store import Model


class Session:
    """An open session."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.session = session(model, threads=settings.threads, profile=settings.profile)
        self.profiled = bool(settings.profile)
        self.placement = Placement({"CPUExecutionProvider": len(model.graph.nodes)})

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name."""
        return run_session(self.session, feeds)

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        """A call that runs once."""
        wanted = {i.name for i in self.session.get_inputs()}
        given = {k: v for k, v in feeds.items() if k in wanted}

        def call() -> None:
            self.session.run(None, given)

        return call

    def close(self) -> None:
        """Nothing to give back; a profile is written."""
        if self.profiled:
            self.session.end_profiling()


CPU = engine(Engine("cpu", "provider", Session, lambda: "", lambda: f"onnxruntime {ort.__version__}", thread_time=True,
                    block=lambda: block_of("cpu")))  # fmt: skip
