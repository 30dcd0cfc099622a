"""Losses, as scalars that torch takes gradients of: of outputs and of the batch that they were computed from."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption, SpaError, UnsupportedModel
from spa.proof.feeds import Feeds
from spa.statistics.torch_graph import TorchGraph
from spa.torch_ops import WAY_OUT, Tensor, torch

Loss: TypeAlias = str | Callable[[Mapping[str, Tensor], Feeds], Tensor]

LOSSES = ("auto", "cross-entropy", "entropy")


@dataclass
class Goal:
    """A loss, as a function of outputs and feeds."""

    network: TorchGraph
    loss: Loss
    labels: str | None
    temperature: float

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            self.loss = _imported(self.loss)

    def __call__(self, outputs: Mapping[str, Tensor], feeds: Feeds) -> Tensor:
        """The scalar."""
        if callable(self.loss):
            given = {t.name for t in self.network.graph.outputs}
            scaled = {n: o / self.temperature if o.is_floating_point() else o for n, o in outputs.items() if n in given}
            try:
                found = self.loss(scaled, feeds)
            except SpaError:
                raise
            except Exception as error:  # a user's function may raise anything
                raise BadOption(f"The loss function fails ({type(error).__name__}: {error}): repair it or choose another.") from error
            if not isinstance(found, torch.Tensor) or found.numel() != 1:
                raise BadOption("The loss function does not give a scalar tensor: return the mean over the batch.")
            return found.reshape(())
        target = None if self.loss == "entropy" else self._target(feeds)
        output = self._first(outputs)
        axis = _class_axis(output, target)
        logp = _log_probabilities(output.movedim(axis, -1), self.temperature)
        if self.loss == "entropy":
            return -(logp.exp() * logp).sum(-1).mean()
        return _cross_entropy(logp, logp.detach().argmax(-1) if target is None else target, axis)

    def predictions(self, outputs: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """The likeliest class everywhere, as labels: they stay the same when the network changes."""
        output = self._first(outputs).detach()
        logp = _log_probabilities(output.movedim(_class_axis(output, None), -1), 1.0)
        return np.asarray(logp.argmax(-1).cpu().numpy(), np.int64)

    def _first(self, outputs: Mapping[str, Tensor]) -> Tensor:
        for tensor in self.network.graph.outputs:
            found = outputs[tensor.name]
            if found.is_floating_point() and found.dim():
                return found
        raise UnsupportedModel(f"The model has no output of floats that a loss could be taken of: {WAY_OUT}.")

    def _target(self, feeds: Feeds) -> Tensor | None:
        inputs = {t.name for t in self.network.graph.inputs}
        name = self.labels if self.labels is not None else "labels" if "labels" in feeds and "labels" not in inputs else None
        if name is None:
            return None
        if name not in feeds:
            raise BadOption(f"The feeds have no entry {name!r} with labels: name one that they have.")
        found = np.asarray(feeds[name])
        return torch.tensor(found.astype(np.float64 if found.dtype.kind == "f" else np.int64))


def _imported(text: str) -> Callable[[Mapping[str, Tensor], Feeds], Tensor]:
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except SpaError:
        raise
    except Exception as error:  # a user's module may raise anything
        choice = f"{', '.join(LOSSES)} or module:function"
        raise BadOption(f"The loss {text!r} can't be imported ({error}); the choice is: {choice}.") from error
    if not callable(found):
        raise BadOption(f"The loss {text!r} is no function: give module:function.")
    return found  # type: ignore[no-any-return]


def _class_axis(output: Tensor, target: Tensor | None) -> int:
    """Where the classes lie: what is left of the output's shape without the labels'; else last, or axis 1 for pictures (n, c, h, w)."""
    if target is not None and not target.is_floating_point():
        shape = tuple(output.shape)
        fitting = [a for a in reversed(range(output.dim())) if shape[:a] + shape[a + 1 :] == tuple(target.shape)]
        if fitting:
            return fitting[0]
    return 1 if output.dim() >= 4 else output.dim() - 1


def _log_probabilities(output: Tensor, temperature: float) -> Tensor:
    """(…, classes) log softmax, of the logarithm where the output is a distribution already; one class alone is a sigmoid."""
    if output.shape[-1] == 1:
        output = torch.cat([torch.zeros_like(output), output], -1)
    seen = output.detach()
    if bool((seen >= 0).all()) and bool(((seen.sum(-1) - 1).abs() < 1e-3).all()):
        output = output.clamp_min(1e-12).log()
    return torch.log_softmax(output / temperature, -1)


def _cross_entropy(logp: Tensor, target: Tensor, axis: int) -> Tensor:
    """Mean over all places that are not ignored. logp (…, classes); target (…) numbers, or as logp before its axis was moved."""
    if target.is_floating_point():
        if target.dim() != logp.dim() or target.movedim(axis, -1).shape != logp.shape:
            raise BadOption(
                f"Labels of shape {tuple(target.shape)} do not fit the output: give class numbers, or one distribution a place."
            )
        return -(target.movedim(axis, -1).to(logp.dtype) * logp).sum(-1).mean()
    if target.numel() != logp[..., 0].numel():
        raise BadOption(f"Labels of shape {tuple(target.shape)} do not fit the output: give a class number for each of its places.")
    target = target.reshape(logp.shape[:-1])
    if bool((target >= logp.shape[-1]).any()):
        raise BadOption(f"Labels go up to {int(target.max())}, but the output has {logp.shape[-1]} classes: give the model's own numbers.")
    there = target >= 0
    chosen = logp.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(chosen * there).sum() / there.sum().clamp_min(1)
