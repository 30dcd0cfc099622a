"""ONNX Runtime's CPU provider."""

from __future__ import annotations

import onnxruntime as ort

from spa.engines.providers import Here
from spa.engines.table import Engine, Opened, Settings, engine
from spa.errors import BadOption
from spa.plans.align import block_of
from spa.storage.store import Model

OPTIONS = {"format"}  # of spa's own; the provider has none


def load(model: Model, settings: Settings) -> Opened:
    """A session in this process."""
    unknown = sorted(set(settings.options) - OPTIONS)
    if unknown:
        raise BadOption(f"The CPU provider has no option {unknown[0]!r}.")
    return Here(model, settings, provider="CPUExecutionProvider", label="ONNX Runtime")


CPU = engine(Engine("cpu", "provider", load, lambda: "", lambda: f"onnxruntime {ort.__version__}", thread_time=True,
                    block=lambda: block_of("cpu")))  # fmt: skip
