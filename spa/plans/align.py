"""What widths an engine likes: the numbers behind `--multiple-of auto`, through the `block` of each engine in `spa.engines`.

ONNX Runtime's CPU kernels lay channels out in blocks of 16 with AVX-512 and of 8 without, so that time is a staircase; a dense convolution
whose input width 4 does not divide leaves that layout: 63 channels take 1.25 (AMD) to 1.6 times (Intel) as long as 64. Matrix products
have a gentler staircase and no such cliff. `python -m tools.bench_widths` measures it again (docs/widths.md). A block is what is liked
best: where rounding to it would lead too far from what was asked for, `spa.choose` halves it, down to 4 for the inputs of dense
convolutions.

| engine | block | why |
|---|---|---|
| cpu, node, ncnn, mnn, tract | 16, 8 without AVX-512 | a vector of float32 (cpu: measured here; the others pack channels likewise) |
| openvino, openvino-native | 32 with AMX, else as cpu | tiles of bfloat16 want multiples of 32, float32 is a staircase of 16 (measured) |
| litert, xnnpack | 32 | steps of 32 with AVX-512 (measured) |
| qnn | 32 | Qualcomm: round channels up to a multiple of 32; activations are stored so (context binary: measured) |
| cuda, tensorrt | 64 | NVIDIA: multiples of 8 for float16 and 4 for TF32 at the least, 64 for whole tiles (documents) |
| arm64, webgpu | 8 | vectors of 4, two at a time; arm64 has no blocks of channels |
| node-wasm, browser-wasm, browser-webgpu | 4 | vectors of 4; times grow without steps (wasm: measured) |
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

_FIXED = {"litert": 32, "xnnpack": 32, "qnn": 32, "cuda": 64, "tensorrt": 64, "arm64": 8, "webgpu": 8, "node-wasm": 4,
          "browser-wasm": 4, "browser-webgpu": 4}  # fmt: skip


@lru_cache(maxsize=1)
def _flags() -> str:
    """What an x86-64 processor can do, each between spaces; empty for others, and where nobody says."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((f" {line.partition(':')[2]} " for line in lines if line.startswith("flags")), "")


def block_of(name: str) -> int:
    """Channels in a block on an engine, by its name; unknown ones are taken to compute as the CPU provider does."""
    if name.startswith("openvino") and " amx_bf16 " in _flags():
        return 32
    return _FIXED.get(name, 16 if " avx512f " in _flags() else 8)
