"""Calibration data from Python: iterables, generators and functions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from calibration_cases import read, refusal, rows, same, sizes, together, two, vectors

from spa.data.calibration import Calibration, calibration
from spa.errors import BadOption


def test_iterables_of_dicts_and_arrays() -> None:
    data = [{"x": rows(3), "k": np.arange(3)}, {"x": rows(2), "k": np.arange(2)}, {"x": rows(1)[0], "k": np.array(7)}]
    batches = read(data, two(), batch=4)
    assert sizes(batches) == [4, 2]
    assert together(batches, "k").tolist() == [0, 1, 2, 0, 1, 7]
    found = calibration(data, two())
    assert (found.name, found.samples, found.noise) == ("list", None, False)
    assert np.array_equal(together(read([rows(3), rows(2)], vectors())), np.concatenate([rows(3), rows(2)]))
    assert sizes(read([rows(9)], vectors(), batch=2, samples=5)) == [2, 2, 1]


def test_a_generator_is_kept_up_to_what_is_used() -> None:
    asked = []

    def endless() -> Iterator[np.ndarray]:
        buffer = np.empty((2, 4), np.float32)
        while True:
            asked.append(len(asked))
            buffer[:] = len(asked)  # the same memory again, as fast loaders do
            yield buffer

    found = calibration(endless(), vectors(), samples=6, batch=4)
    one, other = list(found), list(found)
    assert same(one, other)
    assert together(one)[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert len(asked) == 3


def test_functions() -> None:
    assert sizes(read(lambda: (rows(2) for _ in range(3)), vectors(), batch=4)) == [4, 2]
    assert sizes(read(lambda: rows(5), vectors(), batch=4)) == [4, 1]
    assert sizes(read(lambda: {"x": rows(5)}, vectors(), batch=4)) == [4, 1]
    once = iter([rows(2), rows(3)])
    assert sizes(read(lambda: once, vectors())) == [5]
    assert isinstance(calibration(calibration(None, vectors()), vectors()), Calibration)


def test_data_that_change_between_readings() -> None:
    rng = np.random.default_rng(0)
    found = calibration(lambda: [rng.standard_normal((2, 4))], vectors())
    list(found)
    with pytest.raises(BadOption, match="another batch 0 when read again"):
        list(found)
    lengths = iter([3, 2, 4])
    found = calibration(lambda: [rows(1)] * next(lengths), vectors(), batch=1)
    list(found)
    for batch in (2, 3):
        with pytest.raises(BadOption, match=f"another batch {batch} when read again"):
            list(found)


def test_functions_that_fail() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield rows(2)
        raise KeyError("no picture 7")

    def broken_at_once() -> None:
        raise OSError("the disk is gone")

    found = calibration(broken(), vectors())
    for _ in range(2):
        with pytest.raises(BadOption, match="fail at item 1: KeyError: 'no picture 7'"):
            list(found)
    assert "fails: the disk is gone" in refusal(BadOption, broken_at_once, vectors())
    assert "gives a int" in refusal(BadOption, lambda: 3, vectors())
    assert "is a tuple" in refusal(BadOption, [(rows(2), np.arange(2))], vectors())
    assert "Item 0" in refusal(BadOption, [rows(2, 5)], vectors())
    assert "no input" in refusal(BadOption, [{"z": rows(2)}], vectors())
    assert "several inputs" in refusal(BadOption, [rows(2)], two())


def test_a_function_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_calibration_module.py").write_text(
        "import numpy as np\n\ndef load():\n    for i in range(3):\n        yield np.full((2, 4), i, np.float32)\n\nrest = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/"])
    importlib.invalidate_caches()
    found = calibration("my_calibration_module:load", vectors())
    assert found.name == "my_calibration_module:load"
    assert together(read("my_calibration_module:load", vectors()))[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert "has no attribute 'other'" in refusal(BadOption, "my_calibration_module:other", vectors())
    assert "No module named 'no_such_module'" in refusal(BadOption, "no_such_module:load", vectors())
    assert "are a int" in refusal(BadOption, "my_calibration_module:rest", vectors())
