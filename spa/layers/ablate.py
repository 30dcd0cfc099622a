"""Ablation: how much worse a network gets by a metric without one unit, for every head, MLP or layer.

    score(u) = drop of the metric with the gate of u closed (`spa.layers.gates`: zero, mean or swapped activations), all others open

It is the causal score of the interpretability literature (Michel et al. 2019, arXiv 1905.10650: zeroed heads; Wang et al. 2022, arXiv
2211.00593: means and swaps), and needs no gradient. A head is a position of the axis along which a contraction of two operands of data
runs in an attention, at the value that the last of them makes; in an operator that holds a whole attention, of its head dims.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import numpy as np

from spa.budgets.metrics import Metric, find_metric, measure
from spa.budgets.quality import first as some_of
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.graph.analysis import Analysis
from spa.graph.parting import parted
from spa.graph.trace import NodeTrace
from spa.layers.gates import Gated, Observer, Unit, means
from spa.layers.sublayers import ATTENTION, MLP, SubLayer, SubLayers, sub_layers
from spa.proof.feeds import Feeds
from spa.signatures.table import Dim, Product, Signature, Term, dims_of
from spa.stages import Stage, quiet
from spa.storage.files import write_files

HEADS, LAYERS = "heads", "layers"
UNITS = (HEADS, LAYERS, ATTENTION, MLP)
PARTS = 8  # that the network is cut into


@dataclass(frozen=True)
class Score:
    """One unit. value: the metric without it; drop: how much worse that is than the dense network's; positive is worse.

    coordinates: (group, coordinate) that a head consists of, for lists of what stays; none for layers.
    """

    unit: str
    layer: str
    kind: str
    block: int
    head: int | None
    value: float
    drop: float
    coordinates: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Ablation:
    """All scores. dense: the metric of the whole network."""

    scores: tuple[Score, ...]
    metric: str
    mode: str
    dense: float
    data: str

    def to_csv(self) -> str:
        """A line a unit, in the order of the graph."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["unit", "layer", "kind", "block", "head", "mode", "metric", "dense", "without", "drop"])
        for s in self.scores:
            head = "" if s.head is None else s.head
            writer.writerow([s.unit, s.layer, s.kind, s.block, head, self.mode, self.metric, f"{self.dense:.9g}", f"{s.value:.9g}",
                             f"{s.drop:.9g}"])  # fmt: skip
        return out.getvalue()

    def protect(self, top: float) -> str:
        """Lines for `--protect` that keep this share of the heads, those that are missed most; a head may need others of its group.

        Raises BadOption for a share that is none, and where units are no heads of groups.
        """
        if not 0 < top <= 1:
            raise BadOption(f"--keep-top is {top:g}, but must be a share of the heads above 0, and 1 at most.")
        heads = sorted((s for s in self.scores if s.coordinates), key=lambda s: -s.drop)
        if not heads:
            raise BadOption("--protect-out lists heads, by the groups that they are in: there are none of them here; take --unit heads.")
        kept: dict[str, set[int]] = {}
        for score in heads[: max(1, round(top * len(heads)))]:
            for group, coordinate in score.coordinates:
                kept.setdefault(group, set()).add(coordinate)
        said = f"# {sum(map(len, kept.values()))} coordinates of the {max(1, round(top * len(heads)))} of {len(heads)} heads missed most"
        lines = [f"{escape(group)}: {', '.join(map(str, sorted(found)))}" for group, found in kept.items()]
        return "\n".join([f"{said} by {self.metric}, {self.mode}", *lines, ""])

    def save(self, path: str | Path, protect: str | Path | None = None, top: float = 0.2) -> None:
        """Writes the table, and the list of what stays if its name is given, whole or not at all. Raises BadFile, BadOption."""
        listed = [] if protect is None else [(Path(protect), [self.protect(top).encode()])]
        write_files([(Path(path), [self.to_csv().encode()]), *listed])


def ablate(
    analysis: Analysis, evidence: Evidence, *, unit: str = HEADS, mode: str = "zero", metric: str = "kl", output: str | None = None,
    samples: int | None = None, threads: int = 0, tell: Callable[[int, int], None] | None = None, stage: Stage = quiet,
) -> Ablation:  # fmt: skip
    """Measures every unit of a kind.

    unit: heads, layers (all sub-layers), attention or mlp. mode: zero, mean or swap. metric: a name of `spa.budgets.metrics`. output: which
    one is looked at, by default the first. samples: of the data. tell: is told how many of how many units are done.
    Raises BadOption where the model has no such units, or data are missing.
    """
    if unit not in UNITS:
        raise BadOption(f"--unit is {unit!r}, but must be one of {', '.join(UNITS)}.")
    judged = find_metric(metric)
    if not evidence.batches:
        raise BadOption("spa ablate looks at what units do to data: give some with --data.")
    data = evidence if samples is None else some_of(evidence, samples)
    whole, analysis = analysis, parted(analysis, stage=stage)
    units, layers = _units(analysis, unit)
    batches = list(data.batches)
    with stage("measuring units"):
        network = Gated(analysis.normal.model, analysis.groups.traced, units, mode=mode, parts=min(PARTS, len(units)), threads=threads)
        trial = _Trial(network, [{k: v for k, v in b.items() if k != data.labels} for b in batches], analysis, mode, threads)
        chosen = _output(network, output)
        dense = [{chosen: trial.settled(i)[chosen]} for i in range(len(batches))]
        base = measure(judged, trial.without(()), dense, batches, chosen, data.labels)
        scores = []
        for number, (gate, layer) in enumerate(zip(units, layers, strict=True)):
            value = measure(judged, trial.without((gate.name,)), dense, batches, chosen, data.labels)
            scores.append(_score(gate, layer, value, judged, base, _coordinates(analysis, whole, gate)))
            if tell is not None:
                tell(number + 1, len(units))
    return Ablation(tuple(scores), judged.name, mode, base, data.name)


def _output(network: Gated, output: str | None) -> str:
    if output is not None and output not in network.outputs:
        raise BadOption(f"--output-name: the model has no output {output!r}; it has: {', '.join(network.outputs)}.")
    return output or network.outputs[0]


def _score(gate: Unit, layer: SubLayer, value: float, metric: Metric, base: float, found: tuple[tuple[str, int], ...]) -> Score:
    head = int(gate.name.rpartition(" ")[2]) if gate.positions is not None else None
    return Score(gate.name, layer.name, layer.kind, layer.block, head, value, metric.drop(base, value), found)


def _coordinates(analysis: Analysis, whole: Analysis, gate: Unit) -> tuple[tuple[str, int], ...]:
    """Coordinates that all positions of a head hang on, by groups of the model as it is."""
    if gate.positions is None or gate.axis is None:
        return ()
    groups = analysis.groups
    labels = groups.labels.get((gate.value, gate.axis))
    if labels is None:
        return ()
    rows = [set(labels[p].tolist()) - {0} for p in gate.positions]
    of = groups.of_coordinate()
    found = []
    for number in sorted(set.intersection(*rows)):
        group = groups.groups[int(of[number - 1])]
        same = whole.groups.by_name.get(group.name)
        if same is not None and same.frozen is None and same.size == group.size:
            found.append((group.name, number - 1 - group.start))
    return tuple(found)


class _Trial:
    """A network with some units off, as metrics want it: run on the batches in their order."""

    def __init__(self, network: Gated, inputs: Sequence[Feeds], analysis: Analysis, mode: str, threads: int) -> None:
        self.network, self.inputs = network, inputs
        self.closed: tuple[str, ...] = ()
        self.next = 0
        self.others: list[Feeds] | None = None
        values = list(network.shapes)
        model = analysis.normal.model
        if mode == "mean":
            network.others = means(model, analysis.groups.traced, values, inputs, threads=threads)
        elif mode == "swap":
            self.others = _swapped(Observer(model, values, threads), inputs)

    def settled(self, number: int) -> Feeds:
        """The dense network's outputs on a batch."""
        return self.network.settle(number, self.inputs[number])

    def without(self, closed: Iterable[str]) -> _Trial:
        """The same with other units off, from the first batch on."""
        self.closed, self.next = tuple(closed), 0
        return self

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name."""
        number, self.next = self.next, self.next + 1
        known = number < len(self.inputs) and feeds.keys() == self.inputs[number].keys() and all(
            v is self.inputs[number][k] for k, v in feeds.items())  # fmt: skip
        if self.others is not None and not known:
            raise BadOption("--mode swap needs a metric that looks at outputs, not one that runs the network on data of its own.")
        if self.others is not None:
            return self.network.run(feeds, self.closed, self.others[number] if self.closed else None)
        return self.network.run(feeds, self.closed, batch=number if known else None)


def _swapped(observer: Observer, inputs: Sequence[Feeds]) -> list[Feeds]:
    """For each batch what values are on other samples: the one before in the batch, or another batch of the same shape."""
    seen = [observer.run(feeds) for feeds in inputs]
    found = []
    for number, values in enumerate(seen):
        if all(len(v) > 1 for v in inputs[number].values() if v.ndim):
            found.append({n: np.roll(v, 1, axis=0) for n, v in values.items()})
            continue
        others = [s for k, s in enumerate(seen) if k != number and all(s[n].shape == v.shape for n, v in values.items())]
        if not others:
            raise BadOption("--mode swap needs a second sample of the same shape for each: give more, or texts of one --length.")
        found.append(others[number % len(others)])
    return found


# ---------------------------------------------------------------------- units


def _units(analysis: Analysis, unit: str) -> tuple[list[Unit], list[SubLayer]]:
    """Units in the order of the graph, each with its layer. Raises BadOption where there are none."""
    found = sub_layers(analysis.groups)
    pairs = [pair for layer in found.layers for pair in _of_layer(analysis, found, layer, unit)]
    if not pairs:
        kinds = sorted({s.kind for s in found.layers}) or ["none"]
        raise BadOption(f"The model has no {unit} to measure; its layers are of the kinds: {', '.join(kinds)} (`spa inspect --layers`).")
    return [gate for gate, _ in pairs], [layer for _, layer in pairs]


def _of_layer(analysis: Analysis, found: SubLayers, layer: SubLayer, unit: str) -> list[tuple[Unit, SubLayer]]:
    if unit != HEADS:
        return [(Unit(layer.name, layer.branch), layer)] if unit in (LAYERS, layer.kind) else []
    if layer.kind != ATTENTION:
        return []
    for index in sorted(layer.nodes, reverse=True):
        heads = heads_of(analysis.groups.traced.nodes[index], set(found.stored))
        if heads is not None:
            value, axis, positions = heads
            return [(Unit(f"{layer.name} head {h}", value, axis, p), layer) for h, p in enumerate(positions)]
    return []


def heads_of(node: NodeTrace, stored: set[str]) -> tuple[str, int, list[tuple[int, ...]]] | None:
    """The value that an attention's last contraction of data gives, the axis of its heads, and the positions of each head there."""
    made = node.signature
    if made is None or not made.macs or not made.outputs or made.outputs[0] is None:
        return None
    names = _head_dims(node, made, stored)
    for axis, term in enumerate(made.outputs[0]):
        factors = _factors(term)
        if factors is not None and names & {f.name for f in factors}:
            return node.node.outputs[0].name, axis, _positions(node, factors, names)
    return None


def _factors(term: Term) -> list[Dim] | None:
    """The dims of a product, outer ones first; None for anything else than a product of dims."""
    if isinstance(term, Dim):
        return [term]
    parts = [_factors(p) for p in term.parts] if isinstance(term, Product) else [None]
    return None if any(p is None for p in parts) else [f for p in parts for f in p or ()]


def _head_dims(node: NodeTrace, made: Signature, stored: set[str]) -> set[str]:
    """Dims of heads: as the table says, or those that both operands of data and the result share, if weights make them."""
    if made.roles:
        return {n for n, role in made.roles.items() if role in ("head", "query", "key-value")}
    operands = [{n for t in o for n in dims_of(t)}
                for i, o in zip(node.node.inputs, made.inputs, strict=False) if o and i.name not in stored]  # fmt: skip
    if len(operands) < 2:
        return set()
    shared = set.intersection(*operands) & {n for t in made.outputs[0] or () for n in dims_of(t)}
    return {n for n in shared if node.dims[n].labels is not None}


def _positions(node: NodeTrace, factors: Sequence[Dim], names: set[str]) -> list[tuple[int, ...]]:
    """Positions of an axis by head, the axis being the product of these dims."""
    sizes = [node.dims[f.name].length for f in factors]
    index = np.stack(np.unravel_index(np.arange(int(np.prod(sizes))), sizes))
    mine = [i for i, f in enumerate(factors) if f.name in names]
    head = np.ravel_multi_index(tuple(index[i] for i in mine), [sizes[i] for i in mine])
    return [tuple(np.flatnonzero(head == h).tolist()) for h in range(int(head.max()) + 1)]
