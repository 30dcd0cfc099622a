"""The scripts that a person runs, on one small graph each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from test_trace import net

from models import inputs, weightless
from tools import zoo_report

ZOO = Path(__file__).parent.parent / "models" / "zoo"


def test_a_row_of_the_report() -> None:
    path = ZOO / "recurrent.script.onnx.xz"
    row = zoo_report.row_of(path, weightless.load(path), "none", 0.5, "l2", 1)
    assert row.outcome == "ok"
    assert row.graph == path.name
    assert 0 < row.macs_kept < 0.5
    assert 0 < row.parameters_kept < 0.6
    assert row.difference < 1e-4
    assert row.seconds > 0
    assert 0 <= row.channels_frozen < 1


def test_failures_are_rows_too() -> None:
    nothing = zoo_report.row_of(Path("a"), net("float[2,4] x -> float[2,5] y", "y = MatMul(x, w)", w=(4, 5)), "none", 0.5, "l2", 1)
    assert nothing.outcome == "nothing"
    assert "frozen" in nothing.most_costly_cause
    broken = zoo_report.row_of(Path("a"), onnx.ModelProto(), "none", 0.5, "l2", 1)
    assert broken.outcome.startswith("BadModel: ")


def test_models_are_found(tmp_path: Path) -> None:
    for name in ("b.onnx", "a.onnx.xz", "c.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in zoo_report.paths_of([tmp_path, Path("d.onnx")])] == ["a.onnx.xz", "b.onnx", "d.onnx"]


def model() -> onnx.ModelProto:
    made = net("float[batch,3] x, int64[batch,sequence] ids, bool[2] flag, int64[2] attention_mask, float[3] w -> float[batch,3] y",
               "y = Add(x, w)")
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "w"))
    return made


def test_example_inputs() -> None:
    feeds = inputs.example_inputs(model())
    assert {n: (v.shape, v.dtype.name) for n, v in feeds.items()} == {
        "x": ((2, 3), "float32"), "ids": ((2, 12), "int64"), "flag": ((2,), "bool"), "attention_mask": ((2,), "int64")}
    assert feeds["flag"].all()
    assert set(feeds["attention_mask"].tolist()) == {1}
    assert int(feeds["ids"].max()) <= 15
    assert all(np.array_equal(v, inputs.example_inputs(model())[n]) for n, v in feeds.items())
    assert not np.array_equal(feeds["x"], inputs.example_inputs(model(), seed=1)["x"])
    assert inputs.example_inputs(model(), dims={"batch": 5, "sequence": 1})["ids"].shape == (5, 1)


def test_example_inputs_that_can_not_be_made() -> None:
    with pytest.raises(ValueError, match="axis 1 of input ids is dynamic: give a size for 'sequence'"):
        inputs.example_inputs(model(), dims={"batch": 1})
    nameless = model()
    nameless.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    with pytest.raises(ValueError, match=r"give a size for 'x\.0'"):
        inputs.example_inputs(nameless)
    assert inputs.example_inputs(nameless, dims={**inputs.DIMS, "x.0": 4})["x"].shape == (4, 3)
    sequence = model()
    sequence.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1
    with pytest.raises(ValueError, match="input x is no tensor"):
        inputs.example_inputs(sequence)


def test_the_zoo_runs_with_its_example_inputs() -> None:
    import onnxruntime as ort

    made = weightless.load(ZOO / "recurrent.script.onnx.xz")
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    assert all(np.isfinite(o).all() for o in session.run(None, inputs.example_inputs(made)))
