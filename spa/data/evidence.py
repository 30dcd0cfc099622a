"""What is known of a model's data: batches to run it on, and the model to run, which noise makes differ from the one that is pruned.

Noise does not look like data, but a network that was trained with BatchNorm remembers what its data looked like: mean and variance of
every channel before each norm. Where the norms' stored statistics are replaced by those of the noise, everything behind a norm has
the moments that it had in training, and that is the network on which noise is put to use (`adapted`; the matching of
moments is that of DeepInversion, arXiv 1912.08795, and ZeroQ, 2001.00281, turned around: the network is fitted instead of the input).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from passes import Weight
from spa.data.calibration import Calibration, calibration
from spa.graph.groups import Groups
from spa.graph.moved import place_of
from spa.graph.trace import NodeTrace
from spa.plans.rewrite import copy_graph
from spa.proof.feeds import Feeds
from spa.proof.widen import widen
from spa.statistics.stepper import LIMIT, Stepper
from spa.storage.spill import Spill
from spa.storage.store import Model, with_graph
from spa.timing.share import room

Array = NDArray[np.float64]


SYNTHETIC, MOMENTS = "synthetic", "moments"  # sources that are no files
SAMPLES = 256


@dataclass(frozen=True)
class Evidence:
    """name: for reports. batches: inputs, with labels under `labels` if there are any. model: what to run on them. noise: made up."""

    name: str
    batches: Sequence[Feeds]
    model: Model
    noise: bool
    labels: str | None = None
    spill: Spill | None = field(default=None, repr=False, compare=False)  # the files of batches that do not fit into memory

    @property
    def samples(self) -> int:
        """How many samples there are."""
        first = [next(iter(b.values())) for b in self.batches if b]
        return sum(int(v.shape[0]) if v.ndim else 1 for v in first)


def gather(model: Model, groups: Groups, source: Any, *, samples: int = SAMPLES, seed: int = 0) -> Evidence:
    """Reads calibration data for a normalised model: a `Calibration`, or what `spa.calibration` takes; or makes them up.

    "synthetic": `samples` inputs that agree with what the network's norms remember (`spa.data.synthesis`, the extra torch).
    "moments": no inputs at all; channel means come from the norms in closed form (`spa.statistics.closed_form`), for repairs of constants.
    """
    if isinstance(source, str) and source == SYNTHETIC:
        from spa.data.synthesis import synthesize  # torch is an extra

        made = synthesize(model.graph, groups, samples=samples, batch=min(samples, 128), seed=seed)
        return Evidence("inputs made up to agree with the norms' statistics", made, model, True)
    if isinstance(source, str) and source == MOMENTS:
        return Evidence("the norms' moments", (), model, True)
    opened = source if isinstance(source, Calibration) else calibration(source, groups.traced, seed=seed)
    spill = Spill(room(LIMIT))
    batches = [{name: spill.keep(value) for name, value in batch.items()} for batch in opened]
    run = adapted(model, groups, [{k: v for k, v in b.items() if k != opened.labels} for b in batches]) if opened.noise else model
    labelled = opened.labels is not None and all(opened.labels in b for b in batches)  # functions may give labels, or not
    return Evidence(opened.name, batches, run, opened.noise, opened.labels if labelled else None, spill)


def stored_norms(groups: Groups) -> list[NodeTrace]:
    """Norms whose mean and variance are stored tensors of their own."""
    makers = {t.name: n.node for n in groups.traced.nodes for t in n.node.outputs}
    found = []
    for node in groups.traced.nodes:
        if node.signature is None or node.signature.moments is None:
            continue
        places = [place_of(groups.traced, node.node.inputs[i].name, makers) for i in node.signature.moments]
        if all(p is not None and p.index is None for p in places):
            found.append(node)
    return found


def adapted(model: Model, groups: Groups, batches: Iterable[Feeds]) -> Model:
    """The model with its norms' statistics as they are on these batches, norm after norm; the same model if it has none."""
    norms = stored_norms(groups)
    if not norms:
        return model
    graph = copy_graph(model.graph)
    wide, _ = widen(with_graph(model, graph), {})
    types = {n: 1 if t in (10, 16) else t for n, t in groups.traced.facts.types.items()}
    fed = [{k: v.astype(np.float32) if v.dtype.name in ("float16", "bfloat16") else v for k, v in b.items()} for b in batches]
    with Stepper(wide, types, fed) as stepper:
        for node in norms:
            value = node.node.inputs[0].name
            assert node.signature is not None
            assert node.signature.moments is not None
            mean, variance = channel_moments([b[value] for b in stepper.step([value])])
            names = [node.node.inputs[i].name for i in node.signature.moments]
            for name, found in zip(names, (mean, np.maximum(variance, 1e-10)), strict=True):
                put(graph, name, found)
                put(wide.graph, name, found)
    return with_graph(model, graph)


def transplanted(repaired: Model, source: Model, original: Model, groups: Groups) -> Model:
    """A repair of `source` (the adapted model) as one of the original: norms change by as much as they changed there."""
    if source is original:
        return repaired
    graph = copy_graph(repaired.graph)
    for node in stored_norms(groups):
        assert node.signature is not None
        assert node.signature.moments is not None
        mean, variance = (node.node.inputs[i].name for i in node.signature.moments)
        was, now, own = (values(m.graph, mean) for m in (source, repaired, original))
        put(graph, mean, own + now - was)
        was, now, own = (values(m.graph, variance) for m in (source, repaired, original))
        put(graph, variance, own * np.where(was > 0, now / np.where(was > 0, was, 1), 1))
    return with_graph(repaired, graph)


def values(graph: gs.Graph, name: str) -> Array:
    """A stored tensor in float64."""
    for tensor in _stored(graph, name):
        held = tensor._values
        return np.array(held.load() if isinstance(held, Weight) else tensor.values, np.float64)
    raise KeyError(name)


def put(graph: gs.Graph, name: str, array: NDArray[Any]) -> None:
    """Gives a stored tensor new values, in its own type."""
    for tensor in _stored(graph, name):
        tensor._values = np.asarray(array).astype(np.dtype(tensor.dtype))


def _stored(graph: gs.Graph, name: str) -> Iterable[gs.Constant]:
    seen: set[int] = set()
    for node in graph.nodes:
        held = node.attrs.get("value") if node.op == "Constant" and node.outputs[0].name == name else None
        for tensor in (*node.inputs, held):
            if isinstance(tensor, gs.Constant) and (tensor is held or tensor.name == name) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def channel_moments(found: Iterable[NDArray[Any]]) -> tuple[Array, Array]:
    """Mean and variance of axis 1 over all batches (Chan's parallel update)."""
    count = 0.0
    mean = square = np.zeros(0)
    for value in found:
        cube = value.reshape(value.shape[0], value.shape[1], -1)
        new = cube.shape[0] * cube.shape[2]
        m, v = cube.mean(axis=(0, 2), dtype=np.float64), cube.var(axis=(0, 2), dtype=np.float64)
        if not count:
            mean, square = np.zeros_like(m), np.zeros_like(m)
        step = m - mean
        square = square + v * new + step**2 * (count * new / (count + new))
        mean = mean + step * (new / (count + new))
        count += new
    return mean, square / max(count, 1)


__all__ = ["Evidence", "adapted", "gather", "transplanted"]
