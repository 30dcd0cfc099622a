"""ncnn: Tencent's runtime for phones, from ONNX through pnnx."""

from __future__ import annotations

from spa.engines.pinned import converted
from spa.engines.table import Engine, engine
from spa.engines.worker import python_child, version_of, why_not

_COMMAND = python_child("ncnn_adapter.py", variable="SPA_NCNN_PYTHON")
_INSTALL = ("ncnn is not here: pip install 'spa-prune[ncnn]' && pip install --no-deps pnnx==20261020, or name a Python that has both in "
            "SPA_NCNN_PYTHON")  # fmt: skip

NCNN = engine(Engine("ncnn", "runtime", converted(_COMMAND, label="ncnn"), lambda: why_not(_COMMAND(), _INSTALL),
                     lambda: version_of(_COMMAND()), thread_time=True))  # fmt: skip
