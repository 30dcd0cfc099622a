"""Metrics: how good a pruned network is, on labels or against what the dense network gives.

Each is a function of one batch that returns a sum and a count, so that data stream; `finish` makes the figure of the mean.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption, SpaError
from spa.graph.explain import near
from spa.proof.feeds import Feeds

Array = NDArray[np.float64]
Batch = Callable[[Array, Array, NDArray[np.generic] | None], tuple[float, float]]


class Runs(Protocol):
    """What runs a network."""

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name."""


@dataclass(frozen=True)
class Metric:
    """name: as options have it. batch: of (pruned output, dense output, labels) -> sum and count. unit: for people.

    higher_is_better: drop is dense minus pruned if so, else pruned minus dense. labels: whether it needs them. whole: in place of `batch`,
    a figure of a function that runs the network (a user's own metric).
    """

    name: str
    batch: Batch | None
    higher_is_better: bool
    unit: str = ""
    labels: bool = False
    finish: Callable[[float], float] = float
    whole: Callable[[Callable[[Feeds], Feeds]], Any] | None = None

    def drop(self, dense: float, small: float) -> float:
        """How much worse the pruned network is; negative where it is better."""
        return dense - small if self.higher_is_better else small - dense


def _classes(logits: Array, labels: NDArray[np.generic]) -> Array:
    """Logits with the classes on the last axis: (…, classes) where labels are (…)."""
    shape = logits.shape
    axes = [a for a in ([1, logits.ndim - 1] if logits.ndim > 3 else [logits.ndim - 1, 1]) if a < logits.ndim]
    for axis in axes:
        if shape[:axis] + shape[axis + 1 :] == labels.shape:
            return np.moveaxis(logits, axis, -1)
    if labels.size == logits.shape[0]:
        return logits.reshape(len(labels), -1)
    raise BadOption(f"Labels of shape {labels.shape} do not fit an output of shape {shape}: give one a sample, or one a position.")


def top(k: int) -> Batch:
    """Share of labels among the k largest outputs, in percent."""

    def measure(found: Array, _: Array, labels: NDArray[np.generic] | None) -> tuple[float, float]:
        assert labels is not None
        rows = _classes(found, labels).reshape(labels.size, -1)
        best = np.argpartition(-rows, min(k, rows.shape[1]) - 1, axis=1)[:, :k] if k > 1 else rows.argmax(1)[:, None]
        return 100.0 * float((best == labels.reshape(-1, 1)).any(axis=1).sum()), labels.size

    return measure


def _agreement(found: Array, dense: Array, _: NDArray[np.generic] | None) -> tuple[float, float]:
    one, other = class_rows(found), class_rows(dense)
    return 100.0 * float((one.argmax(1) == other.argmax(1)).sum()), len(one)


def _cosine(found: Array, dense: Array, _: NDArray[np.generic] | None) -> tuple[float, float]:
    one, other = found.reshape(len(found), -1), dense.reshape(len(dense), -1)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / np.maximum(norms, 1e-30)).sum()), len(one)


def _error(found: Array, dense: Array, _: NDArray[np.generic] | None) -> tuple[float, float]:
    return float(((found - dense) ** 2).sum()), float((dense**2).sum())


def _kl(found: Array, dense: Array, _: NDArray[np.generic] | None) -> tuple[float, float]:
    p, q = log_probabilities(class_rows(dense)), log_probabilities(class_rows(found))
    return float((np.exp(p) * (p - q)).sum()), len(p)


def _entropy(found: Array, _: Array, labels: NDArray[np.generic] | None) -> tuple[float, float]:
    assert labels is not None
    rows = log_probabilities(_classes(found, labels).reshape(labels.size, -1))
    wanted = labels.reshape(-1).astype(np.int64)
    real = wanted >= 0  # -100 marks positions that do not count
    return -float(rows[np.flatnonzero(real), wanted[real]].sum()), int(real.sum())


def class_rows(output: Array) -> Array:
    """(rows, classes): maps of classes (n, c, h, w) by pixel, everything else along the last axis."""
    moved = np.moveaxis(output, 1, -1) if output.ndim == 4 else output
    return moved.reshape(-1, moved.shape[-1]) if output.ndim > 1 else output.reshape(-1, 1)


def log_probabilities(rows: Array) -> Array:
    """Log of the softmax over the last axis, or of the rows themselves where they are probabilities already."""
    if rows.size and rows.min() >= 0 and np.allclose(rows.sum(axis=-1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(rows, 1e-12)))
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


METRICS: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("accuracy", top(1), True, "points", labels=True),
        Metric("top5", top(5), True, "points", labels=True),
        Metric("agreement", _agreement, True, "points"),
        Metric("cosine", _cosine, True),
        Metric("kl", _kl, False, "nats"),
        Metric("error", _error, False),
        Metric("perplexity", _entropy, False, labels=True, finish=lambda mean: math.exp(min(mean, 700.0))),
    )
}


def find_metric(name: str) -> Metric:
    """A metric by name, or `module:function` of a user's own. Raises BadOption.

    The function takes a function that runs the network on feeds and returns its outputs by name; its number is the better the higher.
    """
    if name in METRICS:
        return METRICS[name]
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise BadOption(f"--metric: there is no metric {name!r}{near(name, METRICS)}; the choice is: {', '.join(METRICS)} "
                        "or module:function.")  # fmt: skip
    module, _, function = name.partition(":")
    try:
        sys.path.insert(0, str(Path.cwd()))
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadOption(f"--metric {name}: {error}; give a function of a module that Python finds from here.") from error
    finally:
        sys.path.pop(0)
    return Metric(name, None, True, whole=found)


def measure(metric: Metric, small: Runs, dense: Iterable[Feeds], batches: Iterable[Feeds], output: str, labels: str | None) -> float:
    """The metric of a network that runs. `dense`: the dense network's outputs, batch by batch.

    Raises BadOption for NaN and missing labels.
    """
    if metric.whole is not None:
        return _own(metric, small)
    assert metric.batch is not None
    if metric.labels and labels is None:
        raise BadOption(f"--metric {metric.name} needs labels: name the entry of the data that holds them with --labels, "
                        "or take one without: agreement, cosine, kl.")  # fmt: skip
    total = count = 0.0
    for wanted, feeds in zip(dense, batches, strict=True):
        given = {n: v for n, v in feeds.items() if n != labels}
        truth = feeds[labels] if metric.labels and labels is not None else None
        found = small.run(given)[output]
        part, rows = metric.batch(found.astype(np.float64), wanted[output].astype(np.float64), truth)
        total, count = total + part, count + rows
    value = metric.finish(total / count) if count else math.nan
    if math.isnan(value):
        raise BadOption(f"--metric {metric.name} is NaN on these data: the network gives NaN or infinity on them, or there are none.")
    return value


def _own(metric: Metric, small: Runs) -> float:
    assert metric.whole is not None
    try:
        value = metric.whole(small.run)
        number = float(value)
    except SpaError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise BadOption(f"--metric {metric.name} failed with {type(error).__name__}: {error}.") from error
    if not math.isfinite(number):
        raise BadOption(f"--metric {metric.name} returned {value!r}, but must return a finite number.")
    return number
