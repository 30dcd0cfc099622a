"""The tasks that pruning quality is measured on: splitting, metrics and unpacking here; what needs the network or the cache is slow."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from models import language, tasks
from models.extras import MissingExtra
from models.packages import Unavailable


def session(text: str = "y = Identity(x)", **weights: np.ndarray) -> onnxruntime.InferenceSession:
    """(n, 4) -> (n, k) classes."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> agraph (float[n, 4] x) => (float[n, k] y) {{ {text} }}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------- texts


def test_only_clear_ratings_are_kept_and_each_text_once() -> None:
    found = language.rated(['1\t2.5\tIt "works', "2\t-1.0\tbad ", "3\t0.9\tso so", '4\t-3\tIt "works', "5\t-0.99\tmeh", "6\t1\tfine"])
    assert found.texts == ('It "works', "bad", "fine")
    assert found.labels.tolist() == [1, 0, 1]


def test_the_parts_share_no_text_and_stay_the_same() -> None:
    whole = language.Snippets(tuple(f"t{i}" for i in range(50)), np.arange(50) % 2)
    parts = language.split(whole, test=20, calibration=10)
    assert {name: len(part.texts) for name, part in parts.items()} == {"test": 20, "calibration": 10, "train": 20}
    assert sorted(text for part in parts.values() for text in part.texts) == sorted(whole.texts)
    assert all(int(text[1:]) % 2 == label for part in parts.values() for text, label in zip(part.texts, part.labels, strict=True))
    assert language.split(whole, test=20, calibration=10)["test"].texts == parts["test"].texts
    assert language.split(whole, test=20, calibration=10, seed=1)["test"].texts != parts["test"].texts


def test_batches_hold_equal_lengths_and_every_row_once() -> None:
    rows = [[1, 2], [3], [4, 5], [6, 7], [8]]
    batches = language.unpadded(rows, batch=2)
    assert [ids.shape for ids, _ in batches] == [(2, 1), (2, 2), (1, 2)]
    assert sorted(np.concatenate([places for _, places in batches])) == list(range(5))
    assert all(ids[k].tolist() == rows[i] for ids, places in batches for k, i in enumerate(places))


def test_pieces_are_stretches_of_the_text() -> None:
    text = " ".join(f"w{i}" for i in range(300))
    found = tasks.pieces(text, 20)
    assert all(piece in text and 5 <= len(piece.split()) <= 40 for piece in found)
    assert found[:7] == tasks.pieces(text, 7)
    assert tasks.pieces("one two", 1) == ["one two"]


# ---------------------------------------------------------------------- perplexity


def table(vocabulary: int, chance: float) -> Callable[[np.ndarray], np.ndarray]:
    """A model that expects the next number with a chance of `chance`, the others evenly."""
    rest = math.log((1 - chance) / (vocabulary - 1))

    def logits(ids: np.ndarray) -> np.ndarray:
        made = np.full((*ids.shape, vocabulary), rest, np.float32)
        np.put_along_axis(made, ((ids + 1) % vocabulary)[..., None], math.log(chance), -1)
        return made + 100  # a constant changes nothing

    return logits


def test_perplexity_of_models_whose_perplexity_is_known() -> None:
    counting = np.arange(40) % 7
    assert language.perplexity(table(7, 0.5), counting, context=8) == pytest.approx(2, rel=1e-5)
    assert language.perplexity(table(7, 1 / 7), counting, context=8) == pytest.approx(7, rel=1e-5)
    assert language.perplexity(table(7, 0.5), counting[::-1].copy(), context=8) == pytest.approx(12, rel=1e-5)
    mixed = np.array([0, 1, 2, 2])  # two expected, one not
    assert language.perplexity(table(7, 0.5), mixed) == pytest.approx(math.exp((2 * math.log(2) + math.log(12)) / 3), rel=1e-5)


def test_windows_do_not_overlap_and_predict_each_token_once() -> None:
    seen: list[list[int]] = []

    def logits(ids: np.ndarray) -> np.ndarray:
        seen.append(ids[0].tolist())
        return table(100, 0.5)(ids)

    language.perplexity(logits, np.arange(30), context=8, limit=20)
    assert seen == [list(range(0, 8)), list(range(8, 16)), list(range(16, 20))]
    assert [(a.tolist(), b.tolist()) for a, b in language.windows(np.arange(5), context=4)] == [([0, 1, 2, 3], [1, 2, 3, 4])]


def test_perplexity_has_limits() -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        language.perplexity(table(7, 0.5), np.arange(1))
    assert language.perplexity(lambda ids: np.full((*ids.shape, 7), np.nan), np.arange(5)) == math.inf
    steep = np.zeros((1, 2), np.float32)
    steep[0, 0] = 5000
    assert language.cross_entropy(steep, np.array([1])) == pytest.approx(5000)
    assert language.perplexity(lambda ids: np.where(np.arange(7) == 6, 5000.0, 0.0) * np.ones((*ids.shape, 1)), np.arange(5)) == math.inf


# ---------------------------------------------------------------------- images and metrics


def test_crops_take_turns_and_begin_the_same() -> None:
    pytest.importorskip("PIL")
    images = [np.full((40, 60, 3), 10, np.uint8), np.full((90, 50, 3), 200, np.uint8)]
    made, sources = tasks.crops(images, 5, 16)
    assert made.shape == (5, 16, 16, 3)
    assert sources.tolist() == [0, 1, 0, 1, 0]
    assert [int(square[0, 0, 0]) for square in made] == [10, 200, 10, 200, 10]
    draw = [np.random.default_rng(3).integers(0, 256, (50, 50, 3), np.uint8)]
    assert np.array_equal(tasks.crops(draw, 2, 16)[0], tasks.crops(draw, 4, 16)[0][:2])
    assert not np.array_equal(*tasks.crops(draw, 2, 16)[0])


def test_similarities() -> None:
    a = np.array([[1.0, 2, 3], [1, 2, 3], [0, 0, 0], [1, 1, 1]], np.float32)
    b = np.array([[2.0, 4, 6], [3, 2, 1], [1, 2, 3], [1, 2, 3]], np.float32)
    assert tasks.cosine(a, b) == pytest.approx([1, 10 / 14, 0, 6 / math.sqrt(42)])
    assert tasks.correlation(a, b) == pytest.approx([1, -1, 0, 0])
    assert tasks.correlation(a[:, None], b[:, None] + 5)[:2] == pytest.approx([1, -1])
    assert tasks.top1(a, b).tolist() == [100, 0, 0, 0]
    assert tasks.cosine(np.array([[np.nan, 1]]), np.array([[1, 1]])).tolist() == [0]


def test_accuracy_and_agreement_of_sessions() -> None:
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
    batches = tasks._batches("x", x, np.array([0, 1, 2, 3, 1, 0]), size=4)
    assert [len(feeds["x"]) for feeds in batches] == [4, 2]
    same = session()
    assert tasks.accuracy(same, batches) == pytest.approx(100 * 4 / 6)
    half = session("y = MatMul(x, w)", w=np.diag([1, 1, 0, 0]).astype(np.float32))
    assert tasks.agreement(half, same, batches, tasks.cosine) == pytest.approx(4 / 6)
    assert tasks.agreement(same, same, batches, tasks.top1) == 100


def test_agreement_needs_something_to_agree_with() -> None:
    with pytest.raises(ValueError, match="dense"):
        tasks._needed(None)


# ---------------------------------------------------------------------- files


def test_unpacked_once_under_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "tiny.onnx.xz"
    packed.write_bytes(lzma.compress(b"first"))
    first = tasks.unpacked(packed)
    assert first.read_bytes() == b"first"
    assert first.name.startswith("tiny-")
    assert first.suffix == ".onnx"
    stamp = first.stat().st_mtime_ns
    assert tasks.unpacked(packed) == first
    assert first.stat().st_mtime_ns == stamp
    packed.write_bytes(lzma.compress(b"second"))
    assert tasks.unpacked(packed).read_bytes() == b"second"
    assert first.read_bytes() == b"first"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_network_that_is_not_trained_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CIFAR_FOLDER", tmp_path)
    with pytest.raises(Unavailable, match=r"python -m models\.cifar\.train resnet20"):
        tasks.TASKS["resnet20"].model()


def test_built_files_come_whole_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_CACHE", str(tmp_path))

    def build(path: Path) -> None:
        path.write_bytes(b"network")
        path.with_suffix(".json").write_text("{}")
        assert not (tmp_path / path.name).exists()

    assert language._built("a.onnx", build).read_bytes() == b"network"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.onnx"]

    def broken(path: Path) -> None:
        path.write_bytes(b"half")
        raise Unavailable("no")

    assert language._built("a.onnx", broken).read_bytes() == b"network"  # there already
    with pytest.raises(Unavailable):
        language._built("b.onnx", broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.onnx"]


def test_the_table_of_tasks() -> None:
    assert [*tasks.TASKS][:2] == ["minilm", "smollm2"]
    assert set(tasks.CIFAR_NAMES) < set(tasks.TASKS)
    assert all(task.name == name for name, task in tasks.TASKS.items())
    assert [name for name, task in tasks.TASKS.items() if not task.higher_is_better] == ["smollm2"]


# ---------------------------------------------------------------------- with the network


def or_skip(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (Unavailable, MissingExtra) as error:
        pytest.skip(str(error))


SMALLEST = {"minilm": 100, "smollm2": 64, "efficientnet-lite0": 4, "efficientnet-lite0-top1": 4, "focus": 2}
AT_LEAST = {"accuracy %": 75, "cosine of logits": 0.9999, "top-1 agreement %": 100, "correlation of maps": 0.9999}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_a_task_with_its_own_network(name: str) -> None:
    """The dense network takes every batch of both kinds of data, and does what it is for."""
    task = tasks.TASKS[name]
    made = onnxruntime.InferenceSession(str(or_skip(task.model)), providers=["CPUExecutionProvider"])
    names = {value.name for value in made.get_inputs()}
    kinds = [or_skip(draw, 3) for draw in (task.calibration, task.other)]
    for batches in kinds:
        assert sum(len(next(iter(feeds.values()))) for feeds in batches) == 3
        assert all(set(feeds) - {"labels"} == names for feeds in batches)
        outputs = [made.run(None, {name: feeds[name] for name in names})[0] for feeds in batches]
        assert all(np.isfinite(output).all() for output in outputs)
    assert all("labels" not in feeds for feeds in kinds[1])
    longer = or_skip(task.calibration, 4)
    assert sum(len(next(iter(feeds.values()))) for feeds in longer) == 4
    measured = or_skip(lambda: task.evaluate(made, made, limit=SMALLEST.get(name, 200)))
    if task.higher_is_better:
        assert measured >= AT_LEAST[task.metric]
    else:
        assert 1 < measured < 60


@pytest.mark.slow
def test_calibration_snippets_are_never_evaluated() -> None:
    parts = or_skip(language.film_snippets)
    assert {name: len(part.texts) for name, part in parts.items()} == {"test": 2000, "calibration": 512, "train": 6659}
    assert len({text for part in parts.values() for text in part.texts}) == 9171


@pytest.mark.slow
def test_the_texts_differ() -> None:
    evaluation, calibration = (or_skip(language.anarchism_text, part) for part in ("evaluation", "calibration"))
    assert len(evaluation) > 600_000 < len(calibration)
    assert evaluation[5000:5200] not in calibration
    assert len(language.foreign_text()) > 100_000
