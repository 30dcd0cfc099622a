"""Calibration data from arrays, batches that fit the model, noise; and one sentence for whatever is wrong."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_cases import ids, image, read, refusal, rows, same, sizes, together, traced, two, vectors

from spa.data.calibration import calibration
from spa.data.samples import layout_of
from spa.errors import BadFile, BadOption

# ---------------------------------------------------------------------- arrays


def test_npz_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=rows(10), k=np.arange(10))
    found = calibration(path, two(), batch=4)
    assert (found.name, found.noise, found.samples, found.labels) == (str(path), False, 10, None)
    batches = read(path, two(), batch=4)
    assert sizes(batches) == [4, 4, 2]
    assert np.array_equal(together(batches), rows(10))
    assert np.array_equal(together(batches, "k"), np.arange(10))
    assert sizes(read(path, two(), batch=4, samples=6)) == [4, 2]
    assert calibration(path, two(), samples=6).samples == 6


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_of_every_layout(tmp_path: Path, save: Any, order: Any) -> None:
    save(tmp_path / "a.npz", whatever=np.asarray(rows(9), order=order))
    assert np.array_equal(together(read(tmp_path / "a.npz", vectors(), batch=2)), rows(9))


def test_npz_is_streamed(tmp_path: Path) -> None:
    """Reading the first samples does not read the damaged end of the file."""
    path = tmp_path / "a.npz"
    np.savez(path, x=rows(100_000))
    raw = bytearray(path.read_bytes())
    raw[1_000_000] ^= 255
    path.write_bytes(raw)
    assert sizes(list(calibration(path, vectors(), samples=64))) == [32, 32]
    assert "can't be read" in refusal(BadFile, path, vectors(), samples=100_000)


def test_npy_is_mapped_for_a_sole_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(5))
    assert np.array_equal(together(read(tmp_path / "a.npy", vectors(), batch=2)), rows(5))
    assert "several inputs" in refusal(BadOption, tmp_path / "a.npy", two())


def test_labels_come_along(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(5), labels=np.arange(5))
    np.savez(tmp_path / "b.npz", x=rows(5), kind=np.arange(5), labels=np.arange(5))
    found = calibration(tmp_path / "a.npz", vectors(), batch=2)
    assert found.labels == "labels"
    assert [b["labels"].tolist() for b in found] == [[0, 1], [2, 3], [4]]
    np.savez(tmp_path / "c.npz", x=rows(5), kind=np.arange(5))
    assert calibration(tmp_path / "c.npz", vectors(), labels="kind").labels == "kind"
    text = refusal(BadOption, tmp_path / "b.npz", vectors(), labels="kind")
    assert "'labels'" in text
    assert "no input" in text
    assert "no entry 'class'" in refusal(BadOption, {"x": rows(5)}, vectors(), labels="class")
    assert "5 samples in 'x' but 4 in 'labels'" in refusal(BadOption, {"x": rows(5), "labels": np.arange(4)}, vectors())


def test_a_folder_of_batches_and_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(3))
    np.save(tmp_path / "b.npy", rows(1)[0])
    np.savez(tmp_path / "c.npz", x=rows(2))
    (tmp_path / "notes.txt").write_text("about the data")
    found = calibration(tmp_path, vectors(), batch=4)
    assert found.samples == 6
    batches = read(tmp_path, vectors(), batch=4)
    assert sizes(batches) == [4, 2]
    assert np.array_equal(together(batches), np.concatenate([rows(3), rows(1), rows(2)]))


def test_wrong_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(5), z=rows(5), k=np.arange(5))
    text = refusal(BadOption, tmp_path / "a.npz", two())
    assert "'z'" in text
    assert "x, k" in text
    assert "a.npz" in text
    text = refusal(BadOption, {"x": rows(5)}, two())
    assert "lacks input 'k'" in text
    assert "x, k" in text


def test_wrong_shape(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(5, 3))
    text = refusal(BadOption, tmp_path / "a.npy", vectors())
    assert "a.npy" in text
    assert "(5, 3)" in text
    assert "'x'" in text
    assert "(?, 4)" in text
    assert "(?, 3, 8, 8)" in refusal(BadOption, np.zeros((2, 3, 8, 9), np.float32), image())
    assert "3 samples in 'x' but 2 in 'k'" in refusal(BadOption, {"x": rows(3), "k": np.arange(2)}, two())
    assert "one sample for input 'k'" in refusal(BadOption, {"x": rows(3), "k": np.array(2)}, two())


@pytest.mark.parametrize("array, kind", [
    (rows(2).astype(np.float64), "float"), (rows(2).astype(np.uint8), "float"), (rows(2).astype(np.int64), "int32"),
    (rows(2).astype(np.int32), "int64"), (rows(2) > 3, "float"), (rows(2).astype(np.int64) % 2, "bool"), (rows(2), "float16"),
])  # fmt: skip
def test_types_are_converted_without_loss(array: np.ndarray, kind: str) -> None:
    model = image("n,4", kind)
    (batch,) = read(array, model)
    assert batch["x"].dtype == layout_of(model).inputs["x"].dtype
    assert np.array_equal(batch["x"].astype(array.dtype), array)


@pytest.mark.parametrize("array, kind, words", [
    (rows(2), "int64", "holds float32 for input 'x', which takes int64"),
    (np.full((2, 4), 2**40), "int32", "cannot hold"),
    (np.full((2, 4), 2**24 + 1), "float", "cannot hold"),
    (np.full((2, 4), 2), "bool", "cannot hold"),
    (np.full((2, 4), 1e300), "float", "cannot hold"),
    (np.full((2, 4), "a"), "float", "which takes float32"),
    (rows(2), "string", "which takes text"),
    (rows(2).astype(complex), "float", "complex128"),
])  # fmt: skip
def test_other_types_are_refused(array: np.ndarray, kind: str, words: str) -> None:
    assert words in refusal(BadOption, array, image("n,4", kind))


def test_text_inputs_take_text() -> None:
    (batch,) = read(np.array([["a", "bc"]]), image("n,2", "string"))
    assert batch["x"].tolist() == [["a", "bc"]]


@pytest.mark.parametrize("value, word", [(np.nan, "NaN"), (np.inf, "infinity")])
def test_nan_and_infinity(tmp_path: Path, value: float, word: str) -> None:
    data = rows(50)
    data[40, 2] = value
    np.savez(tmp_path / "a.npz", x=data)
    assert len(list(calibration(tmp_path / "a.npz", vectors(), samples=32))) == 1
    text = refusal(BadFile, tmp_path / "a.npz", vectors())
    assert word in text
    assert "a.npz" in text
    assert "'x'" in text


def test_no_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(0))
    assert "no samples" in refusal(BadOption, tmp_path / "a.npy", vectors())
    np.savez(tmp_path / "a.npz", x=rows(0))
    assert "no samples" in refusal(BadOption, tmp_path / "a.npz", vectors())
    assert "no samples" in refusal(BadOption, [], vectors())
    assert "no samples" in refusal(BadOption, lambda: iter(()), vectors())


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([{}], object))
    (tmp_path / "b.npy").write_bytes(pickle.dumps([1]))
    assert "pickled" in refusal(BadFile, tmp_path / "a.npy", vectors())
    assert "pickled" in refusal(BadFile, tmp_path / "a.npz", vectors())
    assert "b.npy can't be read" in refusal(BadFile, tmp_path / "b.npy", vectors())


def test_damaged_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(50))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-10])
    assert "ends early" in refusal(BadFile, tmp_path / "a.npy", vectors())
    (tmp_path / "a.npy").write_bytes(b"")
    assert "can't be read" in refusal(BadFile, tmp_path / "a.npy", vectors())
    (tmp_path / "a.npz").write_bytes(b"nothing")
    assert "can't be read" in refusal(BadFile, tmp_path / "a.npz", vectors())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", whole[:-10])
    text = refusal(BadFile, tmp_path / "a.npz", vectors())
    assert "Entry 'x'" in text
    assert "ends early" in text


def test_folders_without_data(tmp_path: Path) -> None:
    assert "no calibration data but nothing" in refusal(BadFile, tmp_path, vectors())
    (tmp_path / "a.csv").write_text("1")
    text = refusal(BadFile, tmp_path, vectors())
    assert "a.csv" in text
    assert ".npz" in text
    (tmp_path / "a.npy").touch()
    (tmp_path / "a.png").touch()
    assert "both arrays (a.npy) and pictures (a.png)" in refusal(BadOption, tmp_path, vectors())


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    assert "do not exist" in refusal(BadFile, str(tmp_path / "no"), vectors())
    (tmp_path / "a.csv").write_text("1")
    assert "no known kind" in refusal(BadOption, str(tmp_path / "a.csv"), vectors())
    assert "can't be a int" in refusal(BadOption, 3, vectors())
    assert "do not exist" in refusal(BadFile, "a\0b", vectors())


def test_options_that_do_not_fit() -> None:
    assert "--samples is 0" in refusal(BadOption, rows(2), vectors(), samples=0)
    assert "--batch is 0" in refusal(BadOption, rows(2), vectors(), batch=0)
    assert "--seed is -1" in refusal(BadOption, rows(2), vectors(), seed=-1)
    assert "--preprocess is for pictures" in refusal(BadOption, rows(2), vectors(), preprocess="raw")
    assert "--tokenizer is for text" in refusal(BadOption, rows(2), vectors(), tokenizer="t.json")
    assert "--length is for text or noise" in refusal(BadOption, rows(2), vectors(), length=4)
    assert "--labels is for arrays" in refusal(BadOption, None, vectors(), labels="kind")
    assert "--length is for models that take token ids" in refusal(BadOption, None, vectors(), length=4)


# ---------------------------------------------------------------------- batches


def test_a_fixed_batch_is_kept() -> None:
    found = calibration([rows(3), rows(2), rows(6)], vectors("4"), batch=7)
    batches = list(found)
    assert sizes(batches) == [4, 4]
    assert np.array_equal(together(batches), np.concatenate([rows(3), rows(2), rows(6)])[:8])
    assert (found.dropped, found.repeated) == (3, 0)
    assert calibration(rows(11), vectors("4")).samples == 8


def test_too_few_for_a_fixed_batch_are_repeated() -> None:
    found = calibration(rows(3), vectors("8"))
    (batch,) = list(found)
    assert np.array_equal(batch["x"], rows(3)[[0, 1, 2, 0, 1, 2, 0, 1]])
    assert (found.dropped, found.repeated, found.samples) == (0, 5, 8)


def test_a_batch_ends_where_shapes_change() -> None:
    model = image("n,w")
    assert [b["x"].shape for b in read([rows(3, 2), rows(2, 5), rows(2, 5)], model, batch=4)] == [(3, 2), (4, 5)]
    fixed = calibration([rows(3, 2), rows(2, 5), rows(2, 5)], image("2,w"))
    assert [b["x"].shape for b in fixed] == [(2, 2), (2, 5), (2, 5)]
    assert fixed.dropped == 1


@pytest.mark.parametrize("symbol", ["b", "?"])
def test_a_state_counts_samples_where_its_symbol_stands(symbol: str) -> None:
    """Silero's shape: a state (2, batch, 3), and a rate that is the same for all samples."""
    shapes = f"float[{symbol},4] x, float[2,{symbol},3] s, int64 r -> float[{symbol},4] y, float[2,{symbol},3] t, int64 q"
    model = traced(shapes, "y = Relu(x) t = Relu(s) q = Abs(r)")
    state = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    batches = read({"x": rows(5), "s": state, "r": np.array(16000)}, model, batch=3)
    assert [b["s"].shape for b in batches] == [(2, 3, 3), (2, 2, 3)]
    assert np.array_equal(np.concatenate([b["s"] for b in batches], 1), state)
    assert [b["r"].tolist() for b in batches] == [16000, 16000]
    drawn = read(None, model, samples=5, batch=3)
    assert [b["s"].shape for b in drawn] == [(2, 3, 3), (2, 2, 3)]


def test_a_model_without_batch_axis() -> None:
    model = image("3,8,8")
    data = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    batches = read(data, model)
    assert [b["x"].shape for b in batches] == [(3, 8, 8)] * 4
    assert np.array_equal(batches[2]["x"], data[2])
    assert [b["x"].shape for b in read(data[0], model)] == [(3, 8, 8)]
    assert [b["x"].shape for b in read(None, model, samples=2)] == [(3, 8, 8)] * 2


def test_two_inputs_with_batches_of_different_names() -> None:
    model = traced("float[a,4] x, float[b,4] z -> float[a,4] y", "y = Add(x, z)")
    assert sizes(read({"x": rows(5), "z": rows(5)}, model, batch=3), "z") == [3, 2]


# ---------------------------------------------------------------------- noise


@pytest.mark.parametrize("source", [None, "none"])
def test_noise(source: str | None) -> None:
    model = vectors()
    found = calibration(source, model, samples=1000)
    assert (found.name, found.noise, found.samples) == ("noise", True, 1000)
    batches = read(source, model, samples=1000)
    assert sizes(batches) == [32] * 31 + [8]
    everything = together(batches)
    assert abs(everything.mean()) < 0.05
    assert abs(everything.std() - 1) < 0.05
    assert not np.array_equal(batches[0]["x"], batches[1]["x"])
    assert same(batches, list(calibration(None, model, samples=1000, seed=0)))
    assert not any(same([b], [c]) for b in batches[:3] for c in list(calibration(None, model, samples=96, seed=1)))


def test_noise_of_a_fixed_batch_and_of_ids() -> None:
    assert sizes(read(None, vectors("4"), samples=10)) == [4, 4]
    assert calibration(None, vectors("4"), samples=10).samples == 8
    assert sizes(read(None, vectors("4"), samples=2)) == [4]
    (batch,) = read(None, ids(), samples=32, length=20)
    assert batch["input_ids"].shape == (32, 20)
    assert (batch["input_ids"].min(), batch["input_ids"].max()) == (0, 49)
    assert read(None, ids(), samples=3)[0]["input_ids"].shape == (3, 16)


def test_large_activations_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    text, data = ids("int64[n,s] input_ids"), np.ones((12, 16), np.int64)
    monkeypatch.setattr("spa.data.batches.BATCH_BYTES", 3 * 16 * 4 * 4)  # three rows of 16 positions, four float32 each
    assert sizes(read(data, text), "input_ids") == [3] * 4
    assert sizes(read(data, text, batch=2), "input_ids") == [2] * 6
    assert sizes(read(data[:, :8], text), "input_ids") == [6, 6]
    monkeypatch.setattr("spa.data.batches.BATCH_BYTES", 1)
    assert sizes(read(data[:2], text), "input_ids") == [1, 1]
