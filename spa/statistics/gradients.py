"""Saliencies that need gradients: of every weight, and of every channel of an activation. The graph runs in torch.

With w a weight, L the loss, g = ∂L/∂w and H the Hessian, all of the mean loss over the batches:

    taylor, snip   w g             Molchanov et al. 2019, arXiv 1906.10771; Lee et al. 2019, arXiv 1810.02340
    fisher         w² E[g_n²]      LeCun et al. 1990 (OBD) with the empirical Fisher diagonal, g_n of single samples
    grasp          w (Hg)          Wang et al. 2020, arXiv 2002.07376, high = keep, outputs divided by 200 before the softmax
    crop           w (Hg)          Rachwan et al. 2022, arXiv 2206.10451, without a temperature
    loraprune      w (g AᵀA)       Zhang et al. 2023, arXiv 2305.18403, at the start: B = 0, A (8, inputs) drawn from N(0, 1/8)
    synflow        |w| g           Tanaka et al. 2020, arXiv 2006.05467: weights |w|, inputs one, L = sum of the outputs

Hg comes from a second backward pass, of z = Σ stopgrad(g) g.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.errors import BadOption, UnsupportedModel
from spa.graph.linear import Layer
from spa.proof.feeds import Feeds
from spa.statistics.losses import Goal, Loss
from spa.statistics.torch_graph import TorchGraph
from spa.torch_ops import WAY_OUT, Tensor, torch

Saliency: TypeAlias = dict[str, NDArray[np.float32]]

METHODS = ("crop", "fisher", "grasp", "loraprune", "snip", "synflow", "taylor")
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
    layers: Sequence[Layer] = (),
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
    layers
        The linear maps that have adapters ("loraprune"); other tensors keep their own gradient.

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
    goal = Goal(network, loss, labels, TEMPERATURE if method == "grasp" else 1.0)
    if method == "fisher":
        samples = [s for batch in batches for s in _samples(graph, batch)][:most]
        squares = _mean((_squares(_gradient(network, goal, s)) for s in samples), len(samples))
        return _alive(network, _result(network, {n: network.parameters[n].detach() * g for n, g in squares.items()}))
    sizes = [batch_size(graph, batch) for batch in batches]  # losses are means over their batch
    parts = zip(sizes, batches, strict=True)
    gradient = _mean((_times(_gradient(network, goal, batch), size) for size, batch in parts), sum(sizes))
    if method in ("grasp", "crop"):
        curved = (_times(_curved(network, goal, batch, gradient), size) for size, batch in zip(sizes, batches, strict=True))
        gradient = _mean(curved, sum(sizes))
    return _alive(network, _result(network, _through_adapters(gradient, layers) if method == "loraprune" else gradient))


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
    goal = Goal(network, loss, labels, 1.0)
    names = list(dict.fromkeys(name for name, _ in values))
    totals: dict[tuple[str, int], NDArray[np.float64]] = {}
    count = 0
    for batch in feeds:
        outputs = network.run(_tracked(batch), names)
        size = batch_size(graph, batch)
        count += size
        grads = differentiate(goal(outputs, batch) * size, [outputs[n] for n in names], names)
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


def differentiate(loss: Tensor, of: Sequence[Tensor], names: Sequence[str], *, graph: bool = False) -> list[Tensor]:
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


def _gradient(network: TorchGraph, goal: Goal, batch: Feeds, *, graph: bool = False) -> dict[str, Tensor]:
    """Gradient of the loss of a batch by every parameter."""
    names, tensors = list(network.parameters), list(network.parameters.values())
    return dict(zip(names, differentiate(goal(network.run(batch), batch), tensors, names, graph=graph), strict=True))


def _curved(network: TorchGraph, goal: Goal, batch: Feeds, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hg of a batch, with g the gradient given: the gradient of Σ stopgrad(g) g."""
    names, tensors = list(network.parameters), list(network.parameters.values())
    here = _gradient(network, goal, batch, graph=True)
    product = sum((gradient[n].detach() * here[n]).sum() for n in names)
    if not product.requires_grad:  # the loss is linear in all weights
        return {n: torch.zeros_like(t) for n, t in network.parameters.items()}
    return dict(zip(names, differentiate(product, tensors, names), strict=True))


def _through_adapters(gradient: Mapping[str, Tensor], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """What low-rank adapters see of gradients: ĝ = g_B A + B g_A − g_B g_A with W + BA, g_B = g Aᵀ, and B = 0, so that g_A = Bᵀ g = 0.

    W is (outputs, inputs) however it is stored, and A is drawn for its number of inputs alone: one network has one score.
    """
    found = dict(gradient)
    for layer in {x.place.name: x for x in layers if x.place.name in gradient}.values():
        held = gradient[layer.place.name].detach().cpu().numpy().copy()
        g = layer.weight.canonical(layer.place.read(held, layer.weight_shape))  # (parts, outputs, columns)
        a = np.random.default_rng(layer.columns).standard_normal((RANK, layer.columns)) / np.sqrt(RANK)
        layer.place.write(held, layer.weight.back(g @ a.T @ a))
        found[layer.place.name] = torch.as_tensor(held)
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
    goal = Goal(network, lambda outputs, _: sum(o.sum() for o in outputs.values() if o.is_floating_point()), None, 1.0)
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


def batch_size(graph: gs.Graph, batch: Feeds) -> int:
    """Length of the inputs' first axis, where all inputs have the same; 1 otherwise."""
    sizes = {np.asarray(batch[t.name]).shape[:1] for t in graph.inputs if t.name in batch}
    found = sizes.pop() if len(sizes) == 1 else ()
    return int(found[0]) if found else 1


def _samples(graph: gs.Graph, batch: Feeds) -> Iterator[Feeds]:
    """The samples of a batch; the batch itself where an input declares a size for its first axis."""
    size = batch_size(graph, batch)
    if size == 1 or any(isinstance((t.shape or [None])[0], int) and t.shape[0] > 0 for t in graph.inputs if t.name in batch):
        yield batch
        return
    for i in range(size):
        yield {n: v[i : i + 1] if np.asarray(v).shape[:1] == (size,) else v for n, v in batch.items()}
