"""Inputs made up so that the network finds in them what it remembers of its training data: the moments before every norm.

    min over x of   mean over norms of |mean(x) - μ|² / σ² + |std(x) - σ|² / σ²     μ, σ² as the norm stores them, mean over channels
                  + |mean of x|² + |std of x - 1|²                                  of each channel of the input
                  + SMOOTH · mean (difference of neighbours)²                       of pictures
                  + classes · cross-entropy with classes drawn evenly               of classifiers, if asked for

from a standard normal start, by Adam, the rate cut on a plateau. The first two lines are ZeroQ (Cai et al. 2020, arXiv 2001.00281), the
others DeepInversion (Yin et al. 2020, arXiv 1912.08795). Inputs are taken to be normalised: mean 0, variance 1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa.data.calibration import calibration
from spa.data.evidence import stored_norms, values
from spa.data.samples import layout_of
from spa.errors import BadOption, SpaError, UnsupportedModel
from spa.graph.groups import Groups
from spa.graph.view import FLOATS
from spa.proof.feeds import Feeds
from spa.statistics.torch_graph import TorchGraph
from spa.torch_ops import WAY_OUT, Tensor, torch

INSTEAD = "calibrate with noise or with data"
SMOOTH = 0.05
PATIENCE = 20  # steps without a gain before the rate is halved


def synthesize(
    graph: gs.Graph,
    groups: Groups,
    *,
    samples: int = 64,
    batch: int = 32,
    steps: int = 200,
    rate: float = 0.1,
    seed: int = 0,
    classes: float = 0.0,
) -> list[Feeds]:
    """Inputs on which the network has the statistics that its norms store.

    Parameters
    ----------
    graph, groups
        The graph of a normalised model and its groups; left as they are.
    samples, batch
        How many inputs, and how many are fitted together (where the model does not fix that); moments are those of a batch.
    steps, rate
        Of Adam. What was best on the way is given.
    seed
        Of the start and of the classes; the same one gives the same inputs on the same number of threads.
    classes
        Weight of the predictions' cross-entropy with classes that are drawn evenly, for a first output (n, classes) of logits or
        probabilities.

    Returns
    -------
    list
        Batches, in the model's types and under the shapes that tracing assumed. Inputs of whole numbers are drawn and stay.

    Raises
    ------
    BadOption
        If torch is missing, if the model has no norm with stored moments behind an input of floats, or if there are no classes.
    UnsupportedModel
        If the graph does not run in torch.
    """
    if not steps >= 0 or not rate > 0 or not classes >= 0:
        raise BadOption(f"{steps} steps of {rate} with classes weighing {classes} can't be taken: give numbers that are not negative.")
    remembered = _Memory(graph, groups)
    if not remembered.norms:
        raise BadOption(f"The model has no norm that stores mean and variance, so no inputs can be made from them: {INSTEAD}.")
    free = [t.name for t in graph.inputs if groups.traced.facts.types.get(t.name) in FLOATS]
    if not free:
        raise BadOption(f"The model has no input of floats, and only such can be fitted to the norms' statistics: {INSTEAD}.")
    starts = list(calibration(None, groups.traced, samples=samples, batch=batch, seed=seed))
    axis = layout_of(groups.traced).axes
    targets = _targets(graph, groups, starts, axis, seed) if classes else [None] * len(starts)
    work = _Work(remembered, free, axis, steps, rate, classes)
    return [work.fitted(start, target) for start, target in zip(starts, targets, strict=True)]


def mismatch(graph: gs.Graph, groups: Groups, batches: Iterable[Feeds]) -> float:
    """How far the statistics of batches are from those that the norms store, as in the module's first line; mean over the batches.

    Raises as `synthesize` does.
    """
    remembered = _Memory(graph, groups)
    if not remembered.norms:
        raise BadOption(f"The model has no norm that stores mean and variance, so there is nothing to compare with: {INSTEAD}.")
    with torch.no_grad():
        found = [float(remembered.distance(remembered.run(b))) for b in batches]
    return float(np.mean(found))


class _Memory:
    """The network in torch, and what its norms remember: the value before each, and (c,) mean and deviation."""

    def __init__(self, graph: gs.Graph, groups: Groups) -> None:
        if importlib.util.find_spec("torch") is None:
            raise BadOption(f"Making up inputs from the norms' statistics needs torch: pip install 'spa-prune[torch]', or {INSTEAD}.")
        self.norms: dict[str, tuple[Tensor, Tensor]] = {}
        for norm in stored_norms(groups):
            assert norm.signature is not None
            assert norm.signature.moments is not None
            mean, variance = (values(graph, norm.node.inputs[i].name) for i in norm.signature.moments)
            deviation = np.sqrt(np.maximum(variance, 1e-10))
            self.norms.setdefault(norm.node.inputs[0].name, (torch.tensor(mean).float(), torch.tensor(deviation).float()))
        with _OwnWords():
            self.network = TorchGraph(graph)
        for tensor in self.network.parameters.values():
            tensor.requires_grad_(False)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        """Outputs and the values before norms."""
        with _OwnWords():
            return self.network.run(feeds, list(self.norms))

    def distance(self, found: Mapping[str, Tensor]) -> Tensor:
        """Squared distance of means and deviations in units of the deviation; mean over channels and norms."""
        terms = []
        for name, (mean, deviation) in self.norms.items():
            now, spread = _moments(found[name], 1)
            terms.append((((now - mean) / deviation) ** 2 + ((spread - deviation) / deviation) ** 2).mean())
        return torch.stack(terms).mean()


class _OwnWords:
    """Errors of the executor speak of criteria; here they name another way out."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SpaError) and WAY_OUT in str(error):
            raise type(error)(str(error).replace(WAY_OUT, INSTEAD)) from error


def _moments(value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(c,) mean and deviation of the positions of an axis over all others; the deviation has a gradient at 0, too."""
    cube = value.movedim(axis, 0).flatten(1)
    mean = cube.mean(1)
    return mean, ((cube - mean[:, None]) ** 2).mean(1).add(1e-12).sqrt()


@dataclass(frozen=True)
class _Work:
    memory: _Memory
    free: Sequence[str]
    axis: Mapping[str, int | None]
    steps: int
    rate: float
    classes: float

    def fitted(self, start: Feeds, target: Any) -> Feeds:
        """A batch, from its start."""
        fixed = {n: v for n, v in start.items() if n not in self.free}
        moving = {n: torch.tensor(np.asarray(start[n], np.float32), requires_grad=True) for n in self.free if n in start}
        adam = torch.optim.Adam(list(moving.values()), lr=self.rate)
        slower = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5, patience=PATIENCE, min_lr=self.rate / 100)
        best, kept = np.inf, {n: t.detach().clone() for n, t in moving.items()}
        for _ in range(self.steps):
            loss = self._loss(moving, self.memory.run({**fixed, **moving}), target)
            now = float(loss.detach())
            if not np.isfinite(now):
                break
            if now < best:
                best, kept = now, {n: t.detach().clone() for n, t in moving.items()}
            adam.zero_grad()
            loss.backward()
            adam.step()
            slower.step(now)
        if self.steps and not np.isfinite(best):
            raise UnsupportedModel(f"The statistics before the norms are not finite for made-up inputs: {INSTEAD}.")
        return {n: kept[n].numpy().astype(v.dtype) if n in kept else v for n, v in start.items()}

    def _loss(self, inputs: Mapping[str, Tensor], found: Mapping[str, Tensor], target: Any) -> Tensor:
        loss = self.memory.distance(found)
        if not loss.requires_grad:
            raise BadOption(f"No norm that stores mean and variance lies behind an input of floats: {INSTEAD}.")
        for name, value in inputs.items():
            if value.dim() and value.numel() > 1:
                channel = 1 if value.dim() > 1 and self.axis.get(name) in (0, None) else 0
                mean, spread = _moments(value, channel)
                loss = loss + (mean**2 + (spread - 1) ** 2).mean()
            if value.dim() == 4:
                loss = loss + SMOOTH * ((value.diff(dim=2) ** 2).mean() + (value.diff(dim=3) ** 2).mean())
        if target is not None:
            loss = loss + self.classes * _cross_entropy(found[self.memory.network.graph.outputs[0].name], target)
        return loss


def _targets(graph: gs.Graph, groups: Groups, starts: Sequence[Feeds], axis: Mapping[str, int | None], seed: int) -> list[Any]:
    """Classes for every batch, each as often as any other."""
    output = graph.outputs[0].name
    shape = groups.traced.facts.shapes.get(output)
    if shape is None or len(shape) != 2 or shape[1] < 2 or groups.traced.facts.types.get(output) not in FLOATS:
        raise BadOption(f"The first output {output!r} is no table (samples, classes), so the classes can't weigh in: leave them out.")
    name = next((n for n, a in axis.items() if a == 0), None)
    sizes = [start[name].shape[0] if name is not None else 1 for start in starts]
    drawn = np.random.default_rng([seed, 1]).permutation(np.arange(sum(sizes)) % shape[1])
    return [torch.tensor(part) for part in np.split(drawn, np.cumsum(sizes)[:-1])]


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch; of the logarithm where the output is a distribution already."""
    seen = output.detach()
    if bool((seen >= 0).all()) and bool(((seen.sum(-1) - 1).abs() < 1e-3).all()):
        output = output.clamp_min(1e-12).log()
    return torch.nn.functional.cross_entropy(output, target)


__all__ = ["mismatch", "synthesize"]
