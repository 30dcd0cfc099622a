"""Calibration data: every kind of source, batches that fit the model, and one sentence for whatever is wrong."""

from __future__ import annotations

import gzip
import importlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_trace import groups_of, net

from spa.calibration import Calibration, calibration
from spa.errors import BadFile, BadOption
from spa.feeds import Feeds
from spa.preprocess import PRESETS, Preprocess, prepare, read_preprocess
from spa.samples import layout_of
from spa.trace import Traced


def traced(values: str, body: str, **weights: Any) -> Traced:
    return groups_of(net(values, body, **weights)).traced


def vectors(batch: str = "n") -> Traced:
    return traced(f"float[{batch},4] x -> float[{batch},4] y", "y = Relu(x)")


def two() -> Traced:
    return traced("float[n,4] x, int64[n] k -> float[n,4] y, int64[n] j", "y = Relu(x) j = Abs(k)")


def image(shape: str = "n,3,8,8", kind: str = "float") -> Traced:
    return traced(f"{kind}[{shape}] x -> {kind}[{shape}] y", "y = Identity(x)")


def ids(inputs: str = "int64[n,s] input_ids", table: int = 50) -> Traced:
    return traced(f"{inputs} -> float[n,s,4] y", "y = Gather(t, input_ids)", t=(table, 4))


def rows(count: int, width: int = 4) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def same(one: list[Feeds], other: list[Feeds]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
        for a, b in zip(one, other, strict=True)
    )


def read(source: Any, model: Traced, **options: Any) -> list[Feeds]:
    """All batches, after a check that a second reading, and one after a reading that was left early, give the same."""
    found = calibration(source, model, **options)
    batches = list(found)
    next(iter(found), None)
    assert same(batches, list(found))
    return batches


def sizes(batches: list[Feeds], name: str = "x") -> list[int]:
    return [b[name].shape[0] for b in batches]


def together(batches: list[Feeds], name: str = "x") -> np.ndarray:
    return np.concatenate([b[name] for b in batches])


def refusal(kind: type[Exception], source: Any, model: Traced, **options: Any) -> str:
    """The sentence with which opening or reading ends."""
    with pytest.raises(kind) as caught:
        list(calibration(source, model, **options))
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert not re.search(r"[.!?] [A-Z]", text), f"more than one sentence: {text}"
    return text


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


# ---------------------------------------------------------------------- Python


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


# ---------------------------------------------------------------------- pictures


def picture(path: Path, height: int = 9, width: int = 12, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pytest.importorskip("PIL.Image").fromarray(pixels).save(path)
    return pixels


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    for i, name in enumerate(("a.png", "cats/b.bmp", "cats/c.webp", "d.JPEG")):
        picture(tmp_path / name, seed=i)
    (tmp_path / "README.md").write_text("cats")
    found = calibration(tmp_path, image(), batch=3)
    assert found.samples == 4
    assert "images in" in found.name
    assert "no --preprocess given, so ImageNet's mean and std" in found.name
    assert "nchw" in found.name
    batches = read(tmp_path, image(), batch=3)
    assert [b["x"].shape for b in batches] == [(3, 3, 8, 8), (1, 3, 8, 8)]
    assert batches[0]["x"].dtype == np.float32


def test_pictures_are_chosen_evenly(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"{i}.png", seed=i)
    everything = together(read(tmp_path, image()))
    assert np.array_equal(together(read(tmp_path, image(), samples=5)), everything[::2])


def test_presets_are_what_they_say(tmp_path: Path) -> None:
    grey = np.full((8, 8, 3), 128, np.uint8)
    pytest.importorskip("PIL.Image").fromarray(grey).save(tmp_path / "a.png")
    for name, size, expected in (
        ("imagenet", 8, (128 / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]),
        ("imagenet-inception", 8, [(128 / 255 - 0.5) / 0.5] * 3),
        ("lite0", 224, [1 / 128] * 3),
        ("cifar10", 32, (128 / 255 - np.array([0.4914, 0.4822, 0.4465])) / [0.2470, 0.2435, 0.2616]),
        ("raw", 8, [128 / 255] * 3),
    ):
        (batch,) = read(tmp_path, image(f"n,3,{size},{size}"), preprocess=name)
        assert batch["x"].shape == (1, 3, size, size)
        assert np.allclose(batch["x"][0].transpose(1, 2, 0), expected, atol=1e-5), name
        assert name in calibration(tmp_path, image(f"n,3,{size},{size}"), preprocess=name).name


@pytest.mark.parametrize("height, width", [(9, 12), (300, 231), (224, 224)])
def test_lite0_is_what_the_package_does(tmp_path: Path, height: int, width: int) -> None:
    pixels = picture(tmp_path / "a.png", height, width)
    packages = pytest.importorskip("models.packages")
    assert np.array_equal(prepare(tmp_path / "a.png", PRESETS["lite0"]), packages.lite0_inputs([pixels])[0])


@pytest.mark.parametrize("height, width", [(300, 231), (231, 300), (100, 90), (256, 256)])
def test_imagenet_is_what_torchvision_does(tmp_path: Path, height: int, width: int) -> None:
    extras = pytest.importorskip("models.extras")
    try:
        transforms = extras.need("torchvision.transforms")
    except ImportError:
        pytest.skip("torchvision is not installed")
    picture(tmp_path / "a.png", height, width)
    opened = pytest.importorskip("PIL.Image").open(tmp_path / "a.png")
    made = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])(opened)  # fmt: skip
    settings = read_preprocess("size=224")[0]
    assert np.allclose(prepare(tmp_path / "a.png", settings), made.numpy(), atol=1e-5)


def test_layout_order_and_channels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 8, 8)
    raw = read(tmp_path, image(), preprocess="raw")[0]["x"]
    assert np.array_equal(read(tmp_path, image("n,8,8,3"), preprocess="raw")[0]["x"], raw.transpose(0, 2, 3, 1))
    assert np.array_equal(read(tmp_path, image(), preprocess="preset=raw,order=bgr")[0]["x"], raw[:, ::-1])
    assert read(tmp_path, image("n,1,8,8"))[0]["x"].shape == (1, 1, 8, 8)
    assert read(tmp_path, image("3,8,8"))[0]["x"].shape == (3, 8, 8)
    assert read(tmp_path, image("n,3,h,w"))[0]["x"].shape == (1, 3, 224, 224)
    assert read(tmp_path, image("n,3,h,w"), preprocess="size=6x5")[0]["x"].shape == (1, 3, 6, 5)
    assert read(tmp_path, image(kind="float16"))[0]["x"].dtype == np.float16


def test_bytes_stay_pixels(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 8, 8)
    model = image("n,8,8,3", "uint8")
    assert "pixels as they are" in calibration(tmp_path, model).name
    (batch,) = read(tmp_path, model, preprocess="preset=raw,scale=1")
    assert np.array_equal(batch["x"][0], pixels)
    assert "takes pixels 0..255 of uint8" in refusal(BadOption, tmp_path, model, preprocess="imagenet")


def test_preprocess_from_files_and_settings(tmp_path: Path) -> None:
    wanted = Preprocess((20, 30), "stretch", 1.0, "bicubic", 1 / 255, (0.1, 0.2, 0.3), (0.5,), "nhwc", "bgr")
    inline = "size=20x30,resize=stretch,crop=1,interpolation=bicubic,scale=1/255,mean=0.1/0.2/0.3,std=0.5,layout=nhwc,order=bgr"
    assert read_preprocess(inline)[0] == wanted
    (tmp_path / "a.yaml").write_text(
        "size: [20, 30]\nresize: stretch\ncrop: 1\ninterpolation: bicubic\nscale: 1/255\nmean: [0.1, 0.2, 0.3]\n"
        "std: 0.5\nlayout: NHWC\norder: BGR\n"
    )
    assert read_preprocess(str(tmp_path / "a.yaml"))[0] == wanted
    (tmp_path / "a.toml").write_text('preset = "lite0"\nsize = 240\n')
    assert read_preprocess(str(tmp_path / "a.toml"))[0] == Preprocess((240, 240), "square", 1.0, "bicubic", 1.0, (127.0,), (128.0,))


@pytest.mark.parametrize("given, words", [
    ("imagnet", "did you mean imagenet?"), ("size=big", "a size such as 224"), ("size=0", "size"), ("std=0", "not 0"),
    ("mean=1/2", "one or three"), ("colour=red", "no setting"),
    ("size=224,8", "key=value"), ("crop=2", "crop=2"), ("order=gbr", "rgb, bgr"), ("layout=chw", "nchw or nhwc"),
    ("preset=no", "none of"), ("size=1,size=2", "twice"), ("scale=1/0", "1/255"), ("resize=fit", "shortest, square, stretch"),
])  # fmt: skip
def test_preprocess_that_means_nothing(given: str, words: str) -> None:
    with pytest.raises(BadOption) as caught:
        read_preprocess(given)
    assert words in str(caught.value)
    assert str(caught.value).startswith("--preprocess")


def test_preprocess_files_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="can't be read"):
        read_preprocess(str(tmp_path / "no.yaml"))
    (tmp_path / "a.toml").write_text("a: 1")
    with pytest.raises(BadOption, match="neither YAML nor TOML"):
        read_preprocess(str(tmp_path / "a.toml"))
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(BadOption, match="must map"):
        read_preprocess(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("size: true")
    with pytest.raises(BadOption, match="size=True"):
        read_preprocess(str(tmp_path / "a.yaml"))


def test_pictures_that_do_not_fit(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    text = refusal(BadOption, tmp_path, image(), preprocess="lite0")
    assert "224x224" in text
    assert "(?, 3, 8, 8)" in text
    assert "size=8x8" in text
    assert "inputs are x (?, 4)" in refusal(BadOption, tmp_path, vectors())
    assert "1 or 3 channels" in refusal(BadOption, tmp_path, image("n,7,8,8"))


def test_pictures_that_are_none(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "a.png").write_bytes(b"no picture")
    text = refusal(BadFile, tmp_path, image())
    assert "a.png can't be read" in text
    picture(tmp_path / "a.png", 60, 60)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    assert "a.png can't be read" in refusal(BadFile, tmp_path / "a.png", image())


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)


def test_pictures_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    without(monkeypatch, "PIL")
    text = refusal(BadOption, tmp_path, image())
    assert "pillow" in text
    assert "spa-prune[images]" in text


# ---------------------------------------------------------------------- text

WORDS = "the a cat dog sat ran on under mat tree".split()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    module = pytest.importorskip("tokenizers")
    made = module.Tokenizer(module.models.WordLevel({w: i for i, w in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = module.pre_tokenizers.Whitespace()
    made.enable_truncation(3)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    made.save(str(path))
    return path


def corpus(count: int, seed: int = 0) -> tuple[str, list[int]]:
    found = np.random.default_rng(seed).integers(1, 11, count)
    return "".join(WORDS[i - 1] + (" \n"[n % 7 == 0]) for n, i in enumerate(found)), found.tolist()


def test_text_is_cut_into_rows(tmp_path: Path, tokenizer: Path) -> None:
    text, wanted = corpus(103)
    (tmp_path / "a.txt").write_text(text)
    found = calibration(tmp_path / "a.txt", ids(), tokenizer=tokenizer, length=10, batch=4)
    assert found.samples is None
    assert "text in" in found.name
    batches = read(tmp_path / "a.txt", ids(), tokenizer=tokenizer, length=10, batch=4)
    assert sizes(batches, "input_ids") == [4, 4, 2]
    assert together(batches, "input_ids").ravel().tolist() == wanted[:100]
    assert batches[0]["input_ids"].dtype == np.int64
    assert sizes(read(tmp_path / "a.txt", ids(), tokenizer=tokenizer.parent, length=10, samples=3), "input_ids") == [3]


def test_text_in_folders_and_compressed(tmp_path: Path, tokenizer: Path) -> None:
    (one, first), (other, second) = corpus(33), corpus(40, 1)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text(one, encoding="utf-8-sig")
    (folder / "b.txt.gz").write_bytes(gzip.compress(other.encode()))
    batches = read(folder, ids(), tokenizer=tokenizer, length=10)
    assert together(batches, "input_ids").ravel().tolist() == (first + second)[:70]


def test_long_text_is_read_in_blocks(tmp_path: Path, tokenizer: Path) -> None:
    text, wanted = corpus(60_000)
    (tmp_path / "a.txt").write_text(text)
    batches = read(tmp_path / "a.txt", ids(), tokenizer=tokenizer, length=100, samples=10_000)
    assert together(batches, "input_ids").ravel().tolist() == wanted


LANGUAGE = """c = Cast<to=1>(attention_mask) p = Gather(pt, position_ids) g = Gather(st, token_type_ids) e = Gather(t, input_ids)
    a = Add(e, p) y = Add(a, g) z = Concat<axis=2>(past, past) m = Neg(c)"""


def test_the_other_inputs_of_a_language_model(tmp_path: Path, tokenizer: Path) -> None:
    inputs = """int32[n,s] input_ids, int64[n,t] attention_mask, int64[n,s] position_ids, int64[n,s] token_type_ids, float[n,2,p,8] past,
        bool[1] use_cache_branch"""
    model = traced(
        f"{inputs} -> float[n,s,4] y, float[n,2,q,8] z, float[n,t] m, bool[1] b", LANGUAGE + " b = Not(use_cache_branch)",
        t=(50, 4), pt=(24, 4), st=(2, 4),
    )  # fmt: skip
    (tmp_path / "a.txt").write_text(corpus(60)[0])
    (batch,) = read(tmp_path / "a.txt", model, tokenizer=tokenizer)
    assert batch["input_ids"].shape == (2, 24)  # as far as there are positions
    assert batch["input_ids"].dtype == np.int32
    assert batch["attention_mask"].tolist() == [[1] * 24] * 2
    assert batch["position_ids"].tolist() == [list(range(24))] * 2
    assert batch["token_type_ids"].tolist() == [[0] * 24] * 2
    assert batch["past"].shape == (2, 2, 0, 8)
    assert batch["use_cache_branch"].tolist() == [False]
    assert "24 positions" in refusal(BadOption, tmp_path / "a.txt", model, tokenizer=tokenizer, length=25)
    (drawn,) = read(None, model, samples=3, length=9)
    assert {n: v.shape for n, v in drawn.items() if n != "use_cache_branch"} == {
        "input_ids": (3, 9), "attention_mask": (3, 9), "position_ids": (3, 9), "token_type_ids": (3, 9), "past": (3, 2, 0, 8),
    }  # fmt: skip


def test_text_for_a_model_of_fixed_shape(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text(corpus(64)[0])
    model = traced("int64[3,5] input_ids -> float[3,5,4] y", "y = Gather(t, input_ids)", t=(50, 4))
    found = calibration(tmp_path / "a.txt", model, tokenizer=tokenizer)
    assert [b["input_ids"].shape for b in found] == [(3, 5)] * 4
    assert "--length 6 does not fit" in refusal(BadOption, tmp_path / "a.txt", model, tokenizer=tokenizer, length=6)
    flat = traced("int64[5] words -> float[5,4] y", "y = Gather(t, words)", t=(50, 4))
    assert [b["words"].shape for b in read(tmp_path / "a.txt", flat, tokenizer=tokenizer, samples=2)] == [(5,)] * 2


def test_a_directory_of_hugging_face(tmp_path: Path) -> None:
    """Without tokenizer.json: transformers reads what it finds."""
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    text, wanted = corpus(40)
    (tmp_path / "a.txt").write_text(text)
    batches = read(tmp_path / "a.txt", ids(), tokenizer=folder, length=10)
    assert together(batches, "input_ids").ravel().tolist() == [i + 4 for i in wanted]
    (tmp_path / "empty").mkdir()
    assert "can't be read" in refusal(BadFile, tmp_path / "a.txt", ids(), tokenizer=tmp_path / "empty")


def test_text_that_does_not_fit(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(corpus(30)[0])
    assert "--tokenizer tokenizer.json" in refusal(BadOption, path, ids())
    assert "gives 30 tokens" in refusal(BadOption, path, ids(), tokenizer=tokenizer)
    assert "no.json does not exist" in refusal(BadFile, path, ids(), tokenizer=tmp_path / "no.json")
    assert "no input of the model takes token ids" in refusal(BadOption, path, vectors(), tokenizer=tokenizer)
    assert "a table of 8" in refusal(BadOption, path, ids(table=8), tokenizer=tokenizer, length=5)
    other = ids("int64[n,s] input_ids, float[n,4] extra")
    assert "'extra' is no ids" in refusal(BadOption, path, other, tokenizer=tokenizer)
    past = ids("int64[n,s] input_ids, float[n,2,16,4] past")
    assert "past of fixed length" in refusal(BadOption, path, past, tokenizer=tokenizer)


def test_text_and_tokenizers_that_can_not_be_read(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("caffè".encode("latin1"))
    assert "not UTF-8" in refusal(BadFile, path, ids(), tokenizer=tokenizer, length=2)
    (tmp_path / "b.gz").write_bytes(b"no gzip")
    assert "b.gz can't be read" in refusal(BadFile, tmp_path / "b.gz", ids(), tokenizer=tokenizer)
    (tmp_path / "c.gz").write_bytes(gzip.compress(corpus(5000)[0].encode())[:200])
    assert "c.gz can't be read" in refusal(BadFile, tmp_path / "c.gz", ids(), tokenizer=tokenizer)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"a": 1}))
    path.write_text("the cat")
    assert "broken.json can't be read" in refusal(BadFile, path, ids(), tokenizer=broken)


def test_text_without_tokenizers(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    without(monkeypatch, "tokenizers")
    assert "spa-prune[text]" in refusal(BadOption, tmp_path / "a.txt", ids(), tokenizer=tokenizer)
