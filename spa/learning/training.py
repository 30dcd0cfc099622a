"""Training of a model file: which of its tensors are learned, the loss, the batches, and the rate of each step. torch is an extra.

Losses, means over the batch:

    labels     cross-entropy −log p_label (float labels: the mean square of the difference)
    teacher    kl   T² Σ_c q_c (log q_c − log p_c) of softmaxes at temperature T (Hinton et al. 2015, arXiv 1503.02531)
               mse  mean (y − y_teacher)² / Var y_teacher, for outputs that are no classes

The rate rises linearly over the first steps and falls along a half cosine to zero (Loshchilov & Hutter 2017, arXiv 1608.03983).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption
from spa.graph.analysis import Analysis
from spa.graph.kinds import KINDS
from spa.graph.moved import Place, place_of
from spa.proof.feeds import Feeds
from spa.torch_ops import Tensor, torch

LEARNED = frozenset(KINDS) - {"position", "other"}  # kinds of groups whose tensors are weights: masks and tables of angles have none
LOSSES = ("auto", "cross-entropy", "kl", "mse")
OPTIMIZERS = ("adamw", "sgd")
NORMS = ("auto", "batch", "stored")
PRECISIONS = ("auto", "float32", "bfloat16")
FEW = 16  # samples in a step below which a batch's own statistics are too noisy to train by


@dataclass(frozen=True)
class Training:
    """How to train.

    epochs: passes over the data. rate: the optimizer's at its highest. optimizer: "adamw", or "sgd" with Nesterov's momentum. decay: of
    weights with two axes or more. batch: samples in one, mixed anew in each epoch where all have one shape; None: as the data come. norms:
    what BatchNormalization goes by: "batch" as in a first training, the stored statistics running along; "stored" leaves these as they are;
    "auto" is batch from 16 samples in a step on. precision: "bfloat16" is mixed precision, "auto" that where there is a GPU. warmup: share
    of the steps in which the rate rises. temperature: of both softmaxes of `kl`. teaching: weight of the teacher's loss where there are
    labels too. loss: "auto" takes labels where there are any, and kl or mse for a teacher by whether the metric is about classes. augment:
    "none", or "images": mirrored, and moved by up to an eighth. clip: largest norm of a gradient.
    """

    epochs: int = 10
    rate: float = 1e-3
    optimizer: str = "adamw"
    momentum: float = 0.9
    decay: float = 1e-4
    batch: int | None = None
    norms: str = "auto"
    precision: str = "auto"
    warmup: float = 0.05
    temperature: float = 2.0
    teaching: float = 0.5
    loss: str = "auto"
    augment: str = "none"
    clip: float = 1.0
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "--epochs": (self.epochs, self.epochs >= 1, "1 or more"),
            "--rate": (self.rate, 0 < self.rate < math.inf, "a number above 0"),
            "--decay": (self.decay, 0 <= self.decay < math.inf, "0 or more"),
            "--batch": (self.batch, self.batch is None or self.batch >= 1, "1 or more"),
            "--temperature": (self.temperature, 0 < self.temperature < math.inf, "a number above 0"),
            "--teaching": (self.teaching, 0 <= self.teaching <= 1, "between 0 and 1"),
            "--loss": (self.loss, self.loss in LOSSES, " or ".join(LOSSES)),
            "--augment": (self.augment, self.augment in ("none", "images"), "none or images"),
            "--optimizer": (self.optimizer, self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
            "--norms": (self.norms, self.norms in NORMS, " or ".join(NORMS)),
            "--precision": (self.precision, self.precision in PRECISIONS, " or ".join(PRECISIONS)),
            "--clip": (self.clip, 0 < self.clip < math.inf, "a number above 0"),
            "--momentum": (self.momentum, 0 < self.momentum < 1, "between 0 and 1"),
        }  # fmt: skip
        for option, (value, right, wanted) in rules.items():
            if not right:
                raise BadOption(f"{option} is {value}, but must be {wanted}.")


def rate_at(step: int, steps: int, training: Training) -> float:
    """The rate of one of so many steps."""
    rising = max(1, round(training.warmup * steps))
    if step < rising:
        return training.rate * (step + 1) / rising
    return training.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def learned(analysis: Analysis) -> frozenset[str]:
    """Stored tensors that training changes: those along whose axes channels, heads, neurons, ids or outputs lie.

    Stored means and variances of norms are none of them, nor single numbers.
    """
    groups, copies = analysis.groups, analysis.normal.copies
    moments = {n.node.inputs[i].name for n in groups.traced.nodes if n.signature is not None for i in n.signature.moments or ()}
    found = {value for group in groups.groups if group.kind in LEARNED for value, _ in group.sites} & set(groups.traced.weights)
    return frozenset(copies.get(v, v) for v in found - moments)


def running(analysis: Analysis) -> Mapping[str, str]:
    """Operand of a norm -> the stored tensor that holds that mean or variance; empty if any norm's are not stored as they are read."""
    traced = analysis.groups.traced
    makers = {t.name: n.node for n in traced.nodes for t in n.node.outputs}
    found: dict[str, str] = {}
    for node in traced.nodes:
        for i in (node.signature.moments if node.signature is not None else None) or ():
            place = place_of(traced, node.node.inputs[i].name, makers)
            if place is None or not _as_stored(place):
                return {}
            found[node.node.inputs[i].name] = place.name
    return found


def _as_stored(place: Place) -> bool:
    return place.index is None or np.array_equal(place.index.reshape(-1), np.arange(place.index.size))


def optimizer_of(parameters: Mapping[str, Tensor], training: Training) -> Any:
    """The torch optimizer that is meant."""
    grouped = decayed(parameters, training.decay)
    if training.optimizer == "sgd":
        return torch.optim.SGD(grouped, lr=training.rate, momentum=training.momentum, nesterov=True)
    return torch.optim.AdamW(grouped, lr=training.rate)


def packed(tensor: Tensor) -> Tensor:
    """A tensor of four axes, (n, c, h, w), with its channels next to each other in memory, which convolutions are faster on."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def device_of(name: str) -> Any:
    """The torch device that is meant. Raises BadOption for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise BadOption(f"--device {name} is not there ({str(error).splitlines()[0]}): use cpu.") from error


class Samples:
    """Samples of all batches, dealt out anew in each epoch."""

    def __init__(self, batches: Sequence[Feeds], training: Training, inputs: Sequence[str]) -> None:
        """`inputs`: names that are pictures where they have four axes (for `Training.augment`)."""
        self.batches, self.training, self.inputs = batches, training, inputs
        sizes = [{len(v) for v in b.values() if v.ndim} for b in batches]
        alike = len({tuple((n, v.shape[1:]) for n, v in sorted(b.items())) for b in batches}) == 1
        self.rows = [(i, r) for i, s in enumerate(sizes) for r in range(min(s, default=0))]
        self.mixes = training.batch is not None and alike and all(len(s) == 1 for s in sizes)

    @property
    def size(self) -> int:
        """Samples in the smallest of the whole steps."""
        if self.mixes:
            return min(self.training.batch or 1, len(self.rows))
        return min((min((len(v) for v in b.values() if v.ndim), default=1) for b in self.batches), default=1)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.rows) / (self.training.batch or 1)) if self.mixes else len(self.batches)

    def epoch(self, number: int) -> Iterator[Feeds]:
        """Batches of an epoch; the same for the same number and seed."""
        rng = np.random.default_rng([self.training.seed, number])
        if self.mixes:
            size = self.training.batch or 1
            order = rng.permutation(len(self.rows))
            chosen = (order[i : i + size] for i in range(0, len(order), size))
            made: Iterator[Feeds] = (self._together(c) for c in chosen)
        else:
            made = (self.batches[i] for i in rng.permutation(len(self.batches)))
        for batch in made:
            if self.training.augment == "images":
                batch = {n: moved(v, rng) if n in self.inputs and v.ndim == 4 else v for n, v in batch.items()}
            yield batch

    def _together(self, chosen: NDArray[np.int64]) -> Feeds:
        rows = [self.rows[i] for i in chosen]
        return {name: np.stack([self.batches[b][name][r] for b, r in rows]) for name in self.batches[0]}


def moved(images: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Pictures (n, c, h, w), half of them mirrored, each moved by up to an eighth of its size, edges repeated."""
    n, _, height, width = images.shape
    down, right = height // 8, width // 8
    padded = np.pad(images, ((0, 0), (0, 0), (down, down), (right, right)), mode="edge")
    tops, lefts, flips = rng.integers(0, 2 * down + 1, n), rng.integers(0, 2 * right + 1, n), rng.random(n) < 0.5
    made = np.stack([x[:, t : t + height, s : s + width] for x, t, s in zip(padded, tops, lefts, strict=True)])
    made[flips] = made[flips][..., ::-1]
    return made


def label_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of class numbers, the classes on the output's last axis or on axis 1; the mean square for float labels."""
    if labels.is_floating_point():
        return torch.nn.functional.mse_loss(output, labels.reshape(output.shape))
    if output.shape[:-1] != labels.shape and output.ndim > 2:
        output = output.movedim(1, -1)
    if output.shape[:-1] != labels.shape:
        raise BadOption(f"Labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(output.shape)}.")
    flat, classes = labels.reshape(-1), output.shape[-1]
    if bool((flat >= classes).any()):
        raise BadOption(f"Labels go up to {int(flat.max())}, but the output has {classes} classes: give the model's own numbers.")
    return torch.nn.functional.cross_entropy(output.reshape(-1, classes), flat.long().clamp_min(-1), ignore_index=-1)


def teacher_loss(output: Tensor, wanted: Tensor, kind: str, temperature: float) -> Tensor:
    """What the outputs lack of a teacher's; kind: kl or mse."""
    if kind == "mse":
        return torch.nn.functional.mse_loss(output, wanted) / wanted.var().clamp_min(1e-12)
    p, q = (torch.log_softmax(x.float() / temperature, -1) for x in (output, wanted))
    return temperature**2 * torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1).mean()


def decayed(parameters: Mapping[str, Tensor], decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: matrices and kernels decay, biases and norms do not."""
    wide = [p for p in parameters.values() if p.ndim > 1]
    return [{"params": wide, "weight_decay": decay}, {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0}]
