"""MNN: Alibaba's runtime for phones, from ONNX through its own converter."""

from __future__ import annotations

from spa.engines.pinned import converted
from spa.engines.table import Engine, engine
from spa.engines.worker import python_child, version_of, why_not

_COMMAND = python_child("mnn_adapter.py", variable="SPA_MNN_PYTHON")
_INSTALL = "MNN is not here: pip install 'spa-prune[mnn]', or name a Python that has it in SPA_MNN_PYTHON"

MNN = engine(Engine("mnn", "runtime", converted(_COMMAND, label="MNN"), lambda: why_not(_COMMAND(), _INSTALL),
                    lambda: version_of(_COMMAND()), thread_time=True))  # fmt: skip
