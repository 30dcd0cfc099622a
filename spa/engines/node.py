"""ONNX Runtime in JavaScript: onnxruntime-node and onnxruntime-web in Node, and onnxruntime-web in headless Chromium.

The packages are looked for in the folder that SPA_NODE_MODULES names, or ./node_modules; Node and Chromium in SPA_NODE and SPA_CHROMIUM, or
on the path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from spa.engines.pinned import Converted
from spa.engines.table import Engine, Opened, Settings, engine
from spa.engines.worker import Remote, child, version_of, why_not
from spa.storage.store import Model

_PACKAGES = {"onnxruntime-node": "1.30.0", "onnxruntime-web": "1.30.0", "puppeteer-core": "25.16.0"}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _modules() -> str:
    return os.environ.get("SPA_NODE_MODULES") or os.path.abspath("node_modules")


def _command(adapter: str, *arguments: str) -> tuple[str, ...]:
    node = os.environ.get("SPA_NODE") or "node"
    return (node, os.fspath(child("serve.mjs")), os.fspath(child(adapter)), _modules(), *arguments)


def _browser() -> str:
    return os.environ.get("SPA_CHROMIUM") or next((found for b in _BROWSERS if (found := shutil.which(b))), "chromium")


def _install(what: str, *packages: str) -> str:
    """What to do where a package is missing."""
    exact = " ".join(f"{p}@{_PACKAGES[p]}" for p in packages)
    skip = "ONNXRUNTIME_NODE_INSTALL=skip " if "onnxruntime-node" in packages else ""  # else it downloads CUDA's libraries
    return f"{what} is not here: {skip}npm install --prefix DIR {exact}, and name DIR/node_modules in SPA_NODE_MODULES"


def _entry(name: str, label: str, install: str, command: Callable[[], tuple[str, ...]], *, timed: str = "", block: int = 4) -> Engine:
    def load(model: Model, settings: Settings) -> Opened:
        if settings.options.get("sizes") == "fixed":  # as freeDimensionOverrides does it: arithmetic on sizes is folded
            return Converted(model, settings, lambda m, s: Remote(command(), m, s), label=label)
        return Remote(command(), model, settings, name=label)

    return engine(Engine(name, "runtime", load, lambda: why_not(command(), install), lambda: version_of(command()), timed=timed,
                         block=lambda: block))  # fmt: skip


NODE = _entry("node", "onnxruntime-node", _install("onnxruntime-node", "onnxruntime-node"),
              lambda: _command("node_adapter.mjs", "onnxruntime-node"), block=16)  # fmt: skip
NODE_WASM = _entry("node-wasm", "onnxruntime-web", _install("onnxruntime-web", "onnxruntime-web"),
                   lambda: _command("node_adapter.mjs", "onnxruntime-web"))  # fmt: skip
_IN_CHROMIUM = _install("onnxruntime-web in Chromium", "onnxruntime-web", "puppeteer-core") + ", and apt install chromium"
BROWSER_WASM = _entry("browser-wasm", "onnxruntime-web in Chromium", _IN_CHROMIUM,
                      lambda: _command("chromium_adapter.mjs", "wasm", _browser()))  # fmt: skip
BROWSER_WEBGPU = _entry("browser-webgpu", "onnxruntime-web on WebGPU", _IN_CHROMIUM,
                        lambda: _command("chromium_adapter.mjs", "webgpu", _browser()),
                        timed="it is the time of SwiftShader, which emulates a GPU on the CPU, not of a GPU")  # fmt: skip
