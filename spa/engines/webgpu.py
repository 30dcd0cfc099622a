"""WebGPU through onnxruntime-webgpu, which needs an environment of its own; without a GPU, on SwiftShader, which computes on the CPU."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from spa.engines.providers import elsewhere, provider_child
from spa.engines.table import Engine, engine
from spa.engines.worker import version_of, why_not
from spa.plans.align import block_of

SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")  # of Debian's chromium
EMULATED = "it is the time of SwiftShader, which computes on the CPU, not of a GPU"
_COMMAND = provider_child("WebGpuExecutionProvider", variable="SPA_WEBGPU_PYTHON")
_INSTALL = ("ONNX Runtime's WebGPU provider is not here: install onnxruntime-webgpu into an environment of its own and name its Python in "
            "SPA_WEBGPU_PYTHON; without a GPU also apt install chromium libvulkan1")  # fmt: skip


def drivers() -> dict[str, str]:
    """The environment: Vulkan's driver, SwiftShader where the machine has no GPU and the user has chosen none."""
    if "VK_DRIVER_FILES" in os.environ or glob.glob("/dev/dri/render*") or not SWIFTSHADER.exists():
        return {}
    return {"VK_DRIVER_FILES": os.fspath(SWIFTSHADER)}


def emulated() -> str:
    """Why times mean nothing, "" if they do."""
    return EMULATED if "swiftshader" in drivers().get("VK_DRIVER_FILES", os.environ.get("VK_DRIVER_FILES", "")) else ""


WEBGPU = engine(Engine("webgpu", "provider", elsewhere(_COMMAND, "WebGPU", defaults={}, environment=drivers),
                       lambda: why_not(_COMMAND(), _INSTALL), lambda: version_of(_COMMAND()), timed=emulated(),
                       block=lambda: block_of("webgpu")))  # fmt: skip
