"""ONNX Runtime's CPU provider for arm64, emulated by qemu: its numbers are those of the arm64 kernels, its time means nothing.

`tools/arm64_root.sh` builds the folder that it runs in. Of the processor, neoverse-n1 is emulated: newer ones have SVE, which is ten times
slower to emulate; SPA_ARM64_CPU names another.
"""

from __future__ import annotations

import os
from pathlib import Path

from spa.engines.table import Engine, Opened, Settings, engine
from spa.engines.worker import Remote, child, version_of, why_not
from spa.plans.align import block_of
from spa.storage.store import Model

EMULATED = "it is the time of an emulator (qemu), not of an arm64 processor"
_INSTALL = ("arm64 is emulated by qemu, which is not ready: apt install qemu-user-static, then run tools/arm64_root.sh FOLDER and name "
            "that folder in SPA_ARM64_ROOT")  # fmt: skip


def root() -> Path:
    """The folder with a Python for arm64."""
    return Path(os.environ.get("SPA_ARM64_ROOT") or Path.home() / ".cache" / "spa" / "arm64").absolute()


def command() -> tuple[str, ...]:
    """The child under emulation. The system's root is under `root`, where qemu looks first for every absolute path."""
    system, site = root() / "root", root() / "site"
    libraries = ":".join(f"{system}/{folder}" for folder in ("lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu"))
    inside = {"PYTHONHOME": f"{system}/usr", "PYTHONPATH": f"{site}", "LD_LIBRARY_PATH": libraries}
    settings = [word for name, value in inside.items() for word in ("-E", f"{name}={value}")]
    python = f"{system}/usr/bin/python3.11"
    processor = os.environ.get("SPA_ARM64_CPU", "neoverse-n1")
    return ("qemu-aarch64-static", "-cpu", processor, "-L", f"{system}", *settings, python, os.fspath(child("serve.py")),
            os.fspath(child("ort.py")), "CPUExecutionProvider")  # fmt: skip


def missing() -> str:
    """"" if it can be used."""
    if not (root() / "root" / "usr" / "bin" / "python3.11").exists():
        return f"{_INSTALL}."
    return why_not(command(), _INSTALL)


def load(model: Model, settings: Settings) -> Opened:
    """A model under emulation."""
    return Remote(command(), model, settings, name="ONNX Runtime for arm64")


ARM64 = engine(Engine("arm64", "provider", load, missing, lambda: f"{version_of(command())}, qemu", timed=EMULATED,
                      block=lambda: block_of("arm64")))  # fmt: skip
