"""Qualcomm's QNN, its HTP backend: on x86-64 the simulator of the NPU that comes with onnxruntime-qnn.

Its numbers, the padding of channels and the size of the context binary are those of the NPU of the SoC that the options `soc_model` and
`htp_arch` name. Without them floats would be computed nearly exactly, which no device does. They are global to a process.
"""

from __future__ import annotations

from spa.engines.providers import elsewhere, provider_child
from spa.engines.table import TOLERANCES, Engine, Settings, engine
from spa.engines.worker import version_of, why_not
from spa.plans.align import block_of
from spa.proof.feeds import Feeds
from spa.storage.store import Model

SNAPDRAGON_8_GEN_3 = {"backend_type": "htp", "soc_model": "57", "htp_arch": "75"}
SIMULATED = "it is the time of a simulator on this processor, not of an NPU"
_COMMAND = provider_child("QNNExecutionProvider", variable="SPA_QNN_PYTHON")
_INSTALL = "ONNX Runtime's QNN provider is not here: pip install 'spa-prune[qnn]', or name a Python that has it in SPA_QNN_PYTHON"

QNN = engine(Engine("qnn", "provider", elsewhere(_COMMAND, "QNN", defaults=SNAPDRAGON_8_GEN_3), lambda: why_not(_COMMAND(), _INSTALL),
                    lambda: version_of(_COMMAND()), {**TOLERANCES, "float32": TOLERANCES["float16"]}, timed=SIMULATED,
                    block=lambda: block_of("qnn")))  # fmt: skip


def context_bytes(model: Model, feeds: Feeds, settings: Settings | None = None) -> int:
    """Size of the context binary, which holds the weights as the NPU wants them, channels padded: a figure of the real thing."""
    opened = QNN.load(model, settings or Settings())
    try:
        opened.bound(feeds)
        return int(getattr(opened, "figures", {}).get("context_bytes", 0))
    finally:
        opened.close()
