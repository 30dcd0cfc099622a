"""Layers of real architectures: what is found, the same whichever exporter a model came through, and dropped without harm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import spa
from models import weightless
from spa.graph.parting import parted
from spa.layers.depth import Depth
from spa.layers.sublayers import SubLayer, sub_layers

ZOO = Path(__file__).parent.parent / "models" / "zoo"
FILES = sorted(p.name for p in ZOO.glob("*.onnx.xz"))
WANTED = {
    "convnext": {"branch": 5}, "densenet": {}, "gpt2": {"attention": 2, "mlp": 2}, "llama": {"attention": 2, "mlp": 2}, "mixer": {"mlp": 4},
    "mobilenetv3": {"branch": 7}, "recurrent": {}, "resnet18_shared": {"branch": 5}, "resnext": {"branch": 2}, "shufflenet": {},
    "squeezenet": {}, "swin": {"attention": 4, "mlp": 4}, "unet": {}, "vit": {"attention": 2, "mlp": 2},
}  # fmt: skip


def layers(name: str) -> tuple[SubLayer, ...]:
    return sub_layers(parted(spa.analyze(weightless.load(ZOO / name))).groups).layers


@pytest.mark.parametrize("name", FILES)
def test_what_is_found(name: str) -> None:
    """Exporters of one network agree, as all are held to the same counts."""
    assert Counter(s.kind for s in layers(name)) == WANTED[name.split(".")[0]]


@pytest.mark.parametrize("name", [n for n in FILES if WANTED[n.split(".")[0]]])
def test_dropped_without_harm(name: str) -> None:
    found = layers(name)
    picked = [next(s for s in found if s.kind == kind).branch for kind in {s.kind for s in found}]
    result = spa.prune(weightless.load(ZOO / name), drop_layers=Depth(sorted(picked)))
    assert result.check is not None
    assert result.check.worst < 1e-5
    assert result.after.parameters < result.before.parameters
