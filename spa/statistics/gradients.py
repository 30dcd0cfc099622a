"""Saliencies that need gradients: of every weight, and of every channel of an activation. The graph runs in torch.

With w a weight, L the loss, g = ∂L/∂w and H the Hessian, all of the mean loss over the batches:

    taylor, snip   w g             Molchanov et al. 2019, arXiv 1906.10771; Lee et al. 2019, arXiv 1810.02340
    fisher         w² E[g_n²]      LeCun et al. 1990 (OBD) with the empirical Fisher diagonal, g_n of single samples
    grasp          w (Hg)          Wang et al. 2020, arXiv 2002.07376, high = keep, outputs divided by 200 before the softmax
    crop           w (Hg)          Rachwan et al. 2022, arXiv 2206.10451, without a temperature
    loraprune      w (g AᵀA)       Zhang et al. 2023, arXiv 2305.18403, at the start: B = 0, A (8, n) drawn from N(0, 1/8)
    synflow        |w| g           Tanaka et al. 2020, arXiv 2006.05467: weights |w|, inputs one, L = sum of the outputs

Hg comes from a second backward pass, of z = Σ stopgrad(g) g.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.errors import BadOption, SpaError, UnsupportedModel
from spa.proof.feeds import Feeds
from spa.statistics.torch_graph import TorchGraph
from spa.torch_ops import WAY_OUT, Tensor, torch

Loss: TypeAlias = str | Callable[[Mapping[str, Tensor], Feeds], Tensor]
Saliency: TypeAlias = dict[str, NDArray[np.float32]]

METHODS = ("crop", "fisher", "grasp", "loraprune", "snip", "synflow", "taylor")
LOSSES = ("auto", "cross-entropy", "entropy")
TEMPERATURE = 200.0  # of GraSP's reference code
RANK = 8  # of LoRAPrune's adapters
LARGEST_WEIGHT = 1e4  # a tensor with a larger element, such as a mask of -1e9, is a setting to SynFlow


def weight_saliency(
    graph: gs.Graph,
    feeds: Iterable[Feeds],
    method: str,
    *,
    loss: Loss = "auto",
    labels: str | None = None,
    most: int = 256,
) -> Saliency:
    """Signed saliency of every element of every stored float tensor, as the module says for each method.

    Parameters
    ----------
    graph
        A graph, left as it is.
    feeds
        Batches: arrays by the name of an input. Entries of other names, such as labels, are only there for the loss.
    method
        One of `METHODS`.
    loss
        "cross-entropy" of the first float output with the labels, or with the network's own predictions if there are none;
        "auto", the same; "entropy", the mean entropy of the softmax of the first float output; "module:function" or a
        function of (outputs by name, feeds) that gives a scalar, the mean over the batch. An output that is a
        probability distribution already is taken as it is. "synflow" has a loss of its own.
    labels
        Name of the feeds' entry with the labels: class numbers, negative ones ignored, or distributions. By default "labels",
        if there is such an entry and it is no input of the graph.
    most
        At most so many samples are looked at one by one ("fisher").

    Returns
    -------
    dict
        float32, of the shape of the tensor as it is stored, by the name of its value; zero where the loss does not depend on
        it, and where the tensor holds infinity.

    Raises
    ------
    UnsupportedModel
        If the graph does not run in torch, if nothing of the loss depends on the weights, or if all gradients vanish
        (of "synflow", those of half of the tensors, as with bounded activations such as ReLU6).
    BadOption
        If a method, loss or labels entry does not exist, or torch is missing.
    """
    if method not in METHODS:
        raise BadOption(f"There is no saliency {method!r}; the choice is: {', '.join(METHODS)}.")
    batches = list(feeds)
    if not batches:
        raise BadOption("There are no batches to take gradients of: give at least one.")
    if method == "synflow":
        return _synflow(graph, batches[0])
    network = TorchGraph(graph)
    goal = _Goal(network, loss, labels, TEMPERATURE if method == "grasp" else 1.0)
    if method == "fisher":
        samples = [s for batch in batches for s in _samples(graph, batch)][:most]
        squares = _mean((_squares(_gradient(network, goal, s)) for s in samples), len(samples))
        return _alive(network, _result(network, {n: network.parameters[n].detach() * g for n, g in squares.items()}))
    sizes = [_batch_size(graph, batch) for batch in batches]  # losses are means over their batch
    parts = zip(sizes, batches, strict=True)
    gradient = _mean((_times(_gradient(network, goal, batch), size) for size, batch in parts), sum(sizes))
    if method in ("grasp", "crop"):
        curved = (_times(_curved(network, goal, batch, gradient), size) for size, batch in zip(sizes, batches, strict=True))
        gradient = _mean(curved, sum(sizes))
    return _alive(network, _result(network, _through_adapters(gradient) if method == "loraprune" else gradient))


def activation_saliency(
    graph: gs.Graph,
    feeds: Iterable[Feeds],
    values: Sequence[tuple[str, int]],
    *,
    loss: Loss = "entropy",
    labels: str | None = None,
) -> dict[tuple[str, int], NDArray[np.float64]]:
    """Saliency of the positions of axes of activations: mean over samples n of |Σ a ∂L_n/∂a| over all other axes.

    With the entropy of the predictions as the loss this is the label-free Taylor score of Adaptive MLP Pruning (2026). The sum
    over the other axes comes before the absolute value, as in Molchanov et al. 2017, arXiv 1611.06440.

    Parameters
    ----------
    graph, feeds, loss, labels
        As in `weight_saliency`.
    values
        Pairs of the name of a float value and an axis of it. Axis 0 of a value is samples, or samples times something (windows):
        the outer factor; where the batch size does not divide it, each of its positions counts as a sample. If axis 0 is
        the one that is asked for, a batch counts as one sample.

    Returns
    -------
    dict
        (length of the axis,) float64 for every pair.

    Raises
    ------
    UnsupportedModel, BadOption
        As in `weight_saliency`; also if a value does not exist, has no such axis or is not of a float type.
    """
    network = TorchGraph(graph)
    goal = _Goal(network, loss, labels, 1.0)
    names = list(dict.fromkeys(name for name, _ in values))
    totals: dict[tuple[str, int], NDArray[np.float64]] = {}
    count = 0
    for batch in feeds:
        outputs = network.run(_tracked(batch), names)
        size = _batch_size(graph, batch)
        count += size
        grads = _differentiate(goal(outputs, batch) * size, [outputs[n] for n in names], names)
        terms = {n: (outputs[n] * g).detach() for n, g in zip(names, grads, strict=True)}
        for name, axis in values:
            found = _along(terms[name], name, axis, size).double().cpu().numpy()
            totals[name, axis] = totals.get((name, axis), np.zeros(len(found))) + found
    if not count:
        raise BadOption("There are no batches to take gradients of: give at least one.")
    return {key: total / count for key, total in totals.items()}


def _along(term: Tensor, name: str, axis: int, size: int) -> Tensor:
    """(length,) sum over the samples of a batch of |sum over all other axes|."""
    if not -term.dim() <= axis < term.dim():
        raise BadOption(f"The value {name!r} has {term.dim()} axes, so there is no axis {axis}: give one below {term.dim()}.")
    axis %= term.dim()
    if axis == 0:
        return term.reshape(term.shape[0], -1).sum(1).abs() * size
    rows = size if term.shape[0] % size == 0 else term.shape[0]
    cube = term.reshape(rows, -1, term.shape[axis], int(np.prod(term.shape[axis + 1 :])))
    return cube.sum((1, 3)).abs().sum(0) * (size / rows)


# ------------------------------------------------------------------ gradients


def _differentiate(loss: Tensor, of: Sequence[Tensor], names: Sequence[str], *, graph: bool = False) -> list[Tensor]:
    """Gradients of a scalar; zero where it does not depend on a value."""
    for tensor, name in zip(of, names, strict=True):
        if not tensor.is_floating_point():
            raise BadOption(f"The value {name!r} is of whole numbers and has no gradient: ask for a float value.")
    if not loss.requires_grad:
        raise UnsupportedModel(f"The loss does not depend on anything that has a gradient: {WAY_OUT}.")
    wanted = [t for t in of if t.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, create_graph=graph, allow_unused=True))
    every = [next(found) if t.requires_grad else None for t in of]
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, every, strict=True)]


def _gradient(network: TorchGraph, goal: _Goal, batch: Feeds, *, graph: bool = False) -> dict[str, Tensor]:
    """Gradient of the loss of a batch by every parameter."""
    names, tensors = list(network.parameters), list(network.parameters.values())
    return dict(zip(names, _differentiate(goal(network.run(batch), batch), tensors, names, graph=graph), strict=True))


def _curved(network: TorchGraph, goal: _Goal, batch: Feeds, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hg of a batch, with g the gradient given: the gradient of Σ stopgrad(g) g."""
    names, tensors = list(network.parameters), list(network.parameters.values())
    here = _gradient(network, goal, batch, graph=True)
    product = sum((gradient[n].detach() * here[n]).sum() for n in names)
    if not product.requires_grad:  # the loss is linear in all weights
        return {n: torch.zeros_like(t) for n, t in network.parameters.items()}
    return dict(zip(names, _differentiate(product, tensors, names), strict=True))


def _through_adapters(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What low-rank adapters see of gradients: ĝ = g_B A + B g_A − g_B g_A with W + BA, g_B = g Aᵀ, and B = 0, so that g_A = Bᵀ g = 0."""
    found = {}
    for name, g in gradient.items():
        if g.dim() < 2:
            found[name] = g
            continue
        flat = g.reshape(g.shape[0], -1)
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal((RANK, flat.shape[1])) / np.sqrt(RANK)
        a = torch.as_tensor(drawn, dtype=g.dtype)
        found[name] = (flat @ a.T @ a).reshape(g.shape)
    return found


def _squares(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: g * g for n, g in gradient.items()}


def _times(gradient: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {n: g * factor for n, g in gradient.items()}


def _mean(parts: Iterator[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Sum of gradients over `count`; two are in memory at a time."""
    total: dict[str, Tensor] = {}
    for part in parts:
        total = {n: total[n] + g if n in total else g for n, g in part.items()}
    return {n: g / count for n, g in total.items()}


def _result(network: TorchGraph, gradient: Mapping[str, Tensor]) -> Saliency:
    """Weights times gradients."""
    found: Saliency = {}
    for name, weight in network.parameters.items():
        finite = torch.isfinite(weight.detach())
        product = torch.where(finite, weight.detach() * gradient[name], torch.zeros_like(weight))
        if not bool(torch.isfinite(product).all()):
            raise UnsupportedModel(f"The gradient of {name!r} holds NaN or infinity: give other inputs, or {WAY_OUT}.")
        found[name] = product.to(torch.float32).cpu().numpy()
    return found


def _alive(
    network: TorchGraph, found: Saliency, most: float = 1.0, why: str = "the loss is flat where the predictions are certain"
) -> Saliency:
    """The saliency; refused if so many of the tensors that hold something have none that it would only break ties."""
    holding = [n for n, w in network.parameters.items() if w.numel() > 1 and bool((w != 0).any())]
    dead = sum(not found[n].any() for n in holding)
    if holding and dead >= most * len(holding):
        raise UnsupportedModel(
            f"The gradients of {dead} of {len(holding)} tensors are zero, since {why}: give other inputs or labels, or {WAY_OUT}."
        )
    return found


def _synflow(graph: gs.Graph, batch: Feeds) -> Saliency:
    """In double precision, since products of sums over all paths leave float32's range; then scaled into it if need be."""
    network = TorchGraph(graph, dtype=torch.float64)
    for name, weight in network.parameters.items():
        if weight.numel() > 1 and bool((weight.detach().abs() < LARGEST_WEIGHT).all()):  # single numbers are settings
            network.parameters[name] = weight.detach().abs().requires_grad_()
    ones = {n: np.ones_like(v) if np.asarray(v).dtype.kind == "f" else v for n, v in batch.items()}
    goal = _Goal(network, lambda outputs, _: sum(o.sum() for o in outputs.values() if o.is_floating_point()), None, 1.0)
    gradient = _gradient(network, goal, ones)
    products = [w.detach() * gradient[n] for n, w in network.parameters.items() if w.numel()]
    largest = max((float(p.abs().nan_to_num().max()) for p in products), default=0.0)
    if largest > float(np.finfo(np.float32).max):
        gradient = {n: g / largest for n, g in gradient.items()}
    return _alive(network, _result(network, gradient), 0.5, "SynFlow's positive weights drive its activations into saturation")


# ------------------------------------------------------------------ batches and samples


def _tracked(batch: Feeds) -> dict[str, Any]:
    """Float feeds as tensors with gradients, so that values that depend on no weight have one too."""
    return {n: torch.tensor(v, dtype=torch.float32, requires_grad=True) if np.asarray(v).dtype.kind == "f" else v for n, v in batch.items()}


def _batch_size(graph: gs.Graph, batch: Feeds) -> int:
    """Length of the inputs' first axis, where all inputs have the same; 1 otherwise."""
    sizes = {np.asarray(batch[t.name]).shape[:1] for t in graph.inputs if t.name in batch}
    found = sizes.pop() if len(sizes) == 1 else ()
    return int(found[0]) if found else 1


def _samples(graph: gs.Graph, batch: Feeds) -> Iterator[Feeds]:
    """The samples of a batch; the batch itself where an input declares a size for its first axis."""
    size = _batch_size(graph, batch)
    if size == 1 or any(isinstance((t.shape or [None])[0], int) and t.shape[0] > 0 for t in graph.inputs if t.name in batch):
        yield batch
        return
    for i in range(size):
        yield {n: v[i : i + 1] if np.asarray(v).shape[:1] == (size,) else v for n, v in batch.items()}


# ------------------------------------------------------------------ losses


@dataclass
class _Goal:
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
