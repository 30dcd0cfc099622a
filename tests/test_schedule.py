"""Schedules of pruning between trainings: how much is cut when, and that tickets begin with their first weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from test_brought import chain

import spa
from spa.data.evidence import values
from tools.schedule import Work, gradual, left_at, lottery


def work(folder: Path, log: list[tuple[str, float]]) -> Work:
    """Training is adding one to all weights."""

    def train(name: str, model: Path, epochs: int, rate: float, seed: int) -> Path:
        made = onnx.load(model)
        for tensor in made.graph.initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(1), tensor.name))
        onnx.save(made, folder / f"{name}.onnx")
        log.append((name, rate))
        return folder / f"{name}.onnx"

    def cut(name: str, model: Path, share: float) -> Path:
        spa.prune(model, target=f"params={share}", multiple_of=1).save(folder / f"{name}.onnx", plan=folder / f"{name}.plan.json")
        log.append((name, share))
        return folder / f"{name}.onnx"

    return Work(folder, train, cut)


def test_what_is_left_falls_along_a_cube() -> None:
    assert [left_at(t, 0.2) for t in (0, 0.5, 1)] == pytest.approx([1, 1 - 0.8 * 0.875, 0.2])


def test_gradual_cuts_lead_to_the_share(tmp_path: Path) -> None:
    onnx.save(chain(), tmp_path / "fresh.onnx")
    log: list[tuple[str, float]] = []
    made = gradual(work(tmp_path, log), tmp_path / "fresh.onnx", share=0.5, epochs=3)
    assert [name for name, _ in log] == ["cubic1", "cubic1.cut", "cubic2", "cubic2.cut", "cubic3"]
    assert np.prod([x for name, x in log if name.endswith("cut")]) == pytest.approx(0.5)
    assert [x for name, x in log if not name.endswith("cut")] == pytest.approx([1, 0.75, 0.25])
    assert made.name == "cubic3.onnx"


def test_tickets_begin_with_their_first_weights(tmp_path: Path) -> None:
    onnx.save(chain(), tmp_path / "fresh.onnx")
    log: list[tuple[str, float]] = []
    made = lottery(work(tmp_path, log), tmp_path / "fresh.onnx", share=0.49, rounds=2, epochs=1)
    assert [name for name, _ in log] == ["fresh.trained", "ticket1", "ticket1.trained", "ticket2", "ticket2.trained"]
    assert [x for name, x in log if name in ("ticket1", "ticket2")] == pytest.approx([0.7, 0.7])
    left = values(spa.load(made).graph, "w1").reshape(-1, 3)
    first = values(spa.load(tmp_path / "fresh.onnx").graph, "w1").reshape(-1, 3) + 1  # once trained, not three times
    assert len(left) < len(first)
    assert all(np.isclose(first, row).all(axis=1).any() for row in left)
