"""OpenVINO through ONNX Runtime: as a plugin beside onnxruntime, or in a Python that has onnxruntime-openvino.

It computes float32 models in bfloat16 where the processor can (AMX, AVX512-BF16), and says nothing. Here it is told float32, unless the
option `precision=bf16` asks for what it would do by itself. The plugin offers devices by Intel alone; onnxruntime-openvino takes them all.
"""

from __future__ import annotations

from spa.engines.providers import elsewhere, provider_child
from spa.engines.table import Engine, engine
from spa.engines.worker import version_of, why_not
from spa.plans.align import block_of

_COMMAND = provider_child("OpenVINOExecutionProvider", variable="SPA_OPENVINO_EP_PYTHON")
_INSTALL = ("ONNX Runtime's OpenVINO provider can't be used here: pip install 'spa-prune[openvino]' on a machine by Intel, or install "
            "onnxruntime-openvino into an environment of its own and name its Python in SPA_OPENVINO_EP_PYTHON")  # fmt: skip

OPENVINO = engine(Engine("openvino", "provider", elsewhere(_COMMAND, "OpenVINO", defaults={"precision": "f32"}),
                         lambda: why_not(_COMMAND(), _INSTALL), lambda: version_of(_COMMAND()), thread_time=True,
                         block=lambda: block_of("openvino")))  # fmt: skip
