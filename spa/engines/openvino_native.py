"""OpenVINO without ONNX Runtime: it reads ONNX by itself."""

from __future__ import annotations

from spa.engines.pinned import converted
from spa.engines.table import Engine, engine
from spa.engines.worker import python_child, version_of, why_not

_COMMAND = python_child("openvino_adapter.py", variable="SPA_OPENVINO_PYTHON")
_INSTALL = "OpenVINO is not here: pip install 'spa-prune[openvino-native]', or name a Python that has it in SPA_OPENVINO_PYTHON"

OPENVINO = engine(Engine("openvino-native", "runtime", converted(_COMMAND, label="OpenVINO"), lambda: why_not(_COMMAND(), _INSTALL),
                         lambda: version_of(_COMMAND()), thread_time=True))  # fmt: skip
