"""What the tests of the intake need: whether a framework is there, in this Python or in the one that its variable names."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from models.intake import weights as drawn
from spa.intake.frameworks import FRAMEWORKS, Framework

ROOT = Path(__file__).parent.parent


def row_of(name: str) -> Framework:
    """A row of the table; skips where there is none."""
    found = next((r for r in FRAMEWORKS if r.name == name), None)
    if found is None:
        pytest.skip(f"{name} is not read yet")
    return found


def needed(name: str, *more: str) -> str:
    """The Python that has a framework and its converter; skips where there is none, with the line that installs it."""
    row = row_of(name)
    python = os.environ.get(row.environment) or sys.executable
    missing = _missing(python, (*row.modules, *more))
    if missing:
        pytest.skip(f"{missing} is not installed ({row.install}; or set {row.environment})")
    return python


@lru_cache
def _missing(python: str, modules: tuple[str, ...]) -> str:
    code = f"import importlib.util as u; print(' '.join(m for m in {modules!r} if u.find_spec(m) is None))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def saved(framework: str, name: str, folder: Path) -> str:
    """A network of `models.intake` with the weights of seed 0, as `spa convert` is told of it."""
    weights = {"resnet": drawn.resnet, "mlp": drawn.mlp}[name]()
    if framework in ("jax", "keras-jax"):  # these write Python files, and need nothing for that
        from models.intake import flax_nets, keras_nets

        return (flax_nets.save if framework == "jax" else keras_nets.save_for_jax)(name, weights, folder)
    np.savez(folder / "weights.npz", **weights)
    module = {"exported": "torch_nets", "keras": "keras_nets", "paddle": "paddle_nets"}[framework]
    command = [needed(framework), "-m", f"models.intake.{module}", name, str(folder / "weights.npz"), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()[-1]
