"""PyTorch: modules, exported programs, TorchScript, checkpoints and timm's networks, as `serve.py` asks for them.

A source becomes a `Subject` (`torch_subjects.py`), which `torch_export.py` exports, runs and listens to.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import lru_cache
from typing import Any


def sibling(name: str) -> Any:
    """A module that lies beside this one, also where this is no package."""
    full = f"spa_intake_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


@lru_cache(maxsize=1)
def _loaded(source: str, wish: str) -> Any:
    return sibling("torch_subjects").subject(source, json.loads(wish))


def opened(source: Any, wish: dict[str, Any]) -> Any:
    """The subject; what is read from files is read once."""
    sibling("torch_export")
    return _loaded(source, json.dumps(wish)) if isinstance(source, str) else sibling("torch_subjects").subject(source, wish)


def inputs(source: Any, wish: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each input."""
    found: list[dict[str, Any]] = sibling("torch_export").described(opened(source, wish), wish)
    return found


def convert(source: Any, target: str, wish: dict[str, Any]) -> list[str]:
    """Writes ONNX by torch.onnx."""
    return list(sibling("torch_export").export(opened(source, wish), target, wish))


def outputs(source: Any, feeds: dict[str, Any], wish: dict[str, Any]) -> list[Any]:
    """What torch gives."""
    return list(sibling("torch_export").run(opened(source, wish), feeds))


def layers(source: Any, feeds: dict[str, Any], wish: dict[str, Any]) -> dict[str, Any]:
    """What each module gives, in the order in which they end."""
    return dict(sibling("torch_export").listen(opened(source, wish), feeds))
