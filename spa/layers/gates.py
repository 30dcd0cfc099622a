"""Gates: one session in which any part of a network can be switched off, replaced by its mean, or by what it gives on other data.

Each gated value v becomes g·v + (1 − g)·o, where g and o are inputs of the instrumented graph (`passes.insert_gates`), so that thousands of
trials need one session. With all gates at 1 the network is the dense one. Modes: *zero* (o = 0), *mean* (o: mean over the data of each
channel), *swap* (o: what the value is on another batch).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from passes import Gate, insert_gates
from spa.errors import BadOption
from spa.graph.trace import Traced
from spa.plans.rewrite import copy_graph
from spa.proof.check import run_session, session
from spa.proof.feeds import Feeds
from spa.statistics.stepper import reads, tapped
from spa.storage.store import Model, with_graph

MODES = ("zero", "mean", "swap")


@dataclass(frozen=True)
class Unit:
    """What is switched as one: positions of one axis of a value, or all of it (None). Units of one value have the same axis."""

    name: str
    value: str
    axis: int | None = None
    positions: tuple[int, ...] | None = None


class Gated:
    """An instrumented network. All calls take feeds of the network itself; gates are open unless named.

    parts: sessions that the network is cut into, behind some of the units. A trial starts with the part that holds the first unit in which
    it differs from what was settled (`settle`); so with many parts half of the work is saved, and with one part everything is fused.
    """

    def __init__(
        self, model: Model, traced: Traced, units: Sequence[Unit], *, mode: str = "zero", parts: int = 1, threads: int = 0
    ) -> None:
        if mode not in MODES:
            raise BadOption(f"--mode is {mode!r}, but must be one of {', '.join(MODES)}.")
        self.mode = mode
        self.units = {u.name: u for u in units}
        self.shapes = {u.value: traced.facts.shapes[u.value] or () for u in units}
        self.axes = {u.value: u.axis for u in units}
        self.types = {v: np.dtype(helper.tensor_dtype_to_np_dtype(traced.facts.types[v])) for v in self.shapes}
        self.outputs = [t.name for t in model.graph.outputs]
        self.others: dict[str, NDArray[np.generic]] = {}
        self.settled: dict[int, tuple[frozenset[str], list[Feeds]]] = {}
        graph = copy_graph(model.graph)
        insert_gates(graph, {v: [self._gate(v)] for v in self.shapes})
        pieces = _pieces(with_graph(model, graph), _cuts(graph, self.shapes, parts), traced.facts.types)
        self.parts = [_Part(piece, threads) for piece in pieces]
        self.handed = {n for p in self.parts for n in p.outputs}
        self.place = {v: next(i for i, p in enumerate(self.parts) if f"{v}/gate" in p.inputs) for v in self.shapes}

    def _gate(self, value: str) -> Gate:
        axis, rank = self.axes[value], len(self.shapes[value])
        shape = () if axis is None else (self.shapes[value][axis], *(1,) * (rank - 1 - axis))
        other = f"{value}/other" if self.mode != "zero" else ""
        return Gate(f"{value}/gate", shape, self.types[value], other, tuple(f"{value}.{i}" for i in range(rank)))

    def settle(self, batch: int, feeds: Feeds, closed: Iterable[str] = ()) -> Feeds:
        """Runs a batch with these units off, and keeps what parts hand on; later runs of the batch begin where they differ."""
        names = frozenset(closed)
        between: list[Feeds] = []
        found = self._run({**feeds, **self._given(names, None)}, 0, between)
        self.settled[batch] = names, between
        return found

    def run(
        self, feeds: Feeds, closed: Iterable[str] = (), others: Mapping[str, NDArray[np.generic]] | None = None, batch: int | None = None
    ) -> Feeds:
        """All outputs by name, with some units off. others: value -> what stands in for it, by default `self.others`; batch: as settled."""
        names = frozenset(closed)
        given = {**feeds, **self._given(names, others)}
        if batch is None or others is not None or batch not in self.settled:
            return self._run(given, 0)
        before, between = self.settled[batch]
        first = min((self.place[self.units[n].value] for n in names ^ before), default=len(self.parts) - 1)
        return self._run({**given, **(between[first - 1] if first else {})}, first)

    def _run(self, values: Feeds, first: int, between: list[Feeds] | None = None) -> Feeds:
        for part in self.parts[first:]:
            values = {**values, **part.run(values)}
            if between is not None:
                between.append({n: v for n, v in values.items() if n in self.handed})
        return {name: values[name] for name in self.outputs}

    def _given(self, closed: frozenset[str], others: Mapping[str, NDArray[np.generic]] | None) -> Feeds:
        """The gates, and what stands in for closed values."""
        gates: Feeds = {f"{v}/gate": np.ones(self._gate(v).shape, self.types[v]) for v in self.shapes}
        for name in closed:
            unit = self.units[name]
            gates[f"{unit.value}/gate"][... if unit.positions is None else list(unit.positions)] = 0
        if self.mode == "zero":
            return gates
        stand_in = self.others if others is None else others
        nothing = {v: np.zeros((1,) * len(s), self.types[v]) for v, s in self.shapes.items()}
        return {**gates, **{f"{v}/other": stand_in.get(v, nothing[v]) for v in self.shapes}}


class _Part:
    """A session of a part."""

    def __init__(self, model: Model, threads: int) -> None:
        self.inputs = [t.name for t in model.graph.inputs]
        self.outputs = [t.name for t in model.graph.outputs]
        self.session = session(model, threads=threads)

    def run(self, values: Feeds) -> Feeds:
        return run_session(self.session, values)


def _cuts(graph: gs.Graph, values: Iterable[str], parts: int) -> list[int]:
    """Where parts end, as numbers of nodes: behind gates, evenly among them; the last one at the end."""
    made = {t.name: i for i, n in enumerate(graph.nodes) for t in n.outputs}
    places = sorted(made[v] + 1 for v in values)
    chosen = sorted({places[len(places) * k // parts] for k in range(1, parts)}) if parts > 1 else []
    return [*(c for c in chosen if c < len(graph.nodes)), len(graph.nodes)]


def _pieces(model: Model, cuts: Sequence[int], types: Mapping[str, int]) -> Iterator[Model]:
    """The parts between cuts, each a model of its own; constants that several read are shared."""
    if len(cuts) == 1:
        yield model
        return
    graph = model.graph
    ends = {t.name for t in graph.outputs}
    for start, stop in itertools.pairwise([0, *cuts]):
        mine = graph.nodes[start:stop]
        made = {t.name for n in mine for t in n.outputs if t.name}
        inputs = dict.fromkeys(name for n in mine for name in reads(n) if name not in made)
        after = {name for n in graph.nodes[stop:] for name in reads(n)} | ends
        yield tapped(model, graph, [n for n in inputs if not isinstance(graph.tensors()[n], gs.Constant)], sorted(made & after), types)


class Observer:
    """A network whose inner values are outputs as well."""

    def __init__(self, model: Model, values: Sequence[str], threads: int = 0) -> None:
        graph = copy_graph(model.graph)
        tensors = graph.tensors()
        there = {t.name for t in graph.outputs}
        graph.outputs += [tensors[v] for v in dict.fromkeys(values) if v not in there and isinstance(tensors[v], gs.Variable)]
        self.values = list(dict.fromkeys(values))
        self.inputs = {t.name for t in model.graph.inputs}
        self.session = session(with_graph(model, graph), threads=threads)

    def run(self, feeds: Feeds) -> Feeds:
        """The values by name; an input of the graph is what was fed."""
        found = self.session.run([v for v in self.values if v not in self.inputs], {k: v for k, v in feeds.items() if k in self.inputs})
        named = dict(zip([v for v in self.values if v not in self.inputs], found, strict=True))
        return {v: named[v] if v in named else feeds[v] for v in self.values}


def channel_axis(traced: Traced, value: str) -> int:
    """The axis of a value's channels: the last one that weights make; the last one where none is."""
    axes = traced.axes.get(value) or ()
    made = [i for i, axis in enumerate(axes) if axis.labels is not None and axis.length > 1]
    return made[-1] if made else len(axes) - 1


def rows(value: NDArray[np.generic], axis: int) -> NDArray[np.float64]:
    """(positions, channels), in float64."""
    moved = np.moveaxis(value, axis, -1)
    return moved.reshape(-1, moved.shape[-1]).astype(np.float64)


def means(
    model: Model, traced: Traced, values: Sequence[str], batches: Iterable[Feeds], *, threads: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Mean of each value over batches and all axes that weights do not make, of which one position is left."""
    opened = Observer(model, values, threads)
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    kinds: dict[str, np.dtype[np.generic]] = {}
    for feeds in batches:
        for name, value in opened.run(feeds).items():
            made = {a for a, x in enumerate(traced.axes.get(name) or ()) if x.labels is not None} or {channel_axis(traced, name)}
            axes = tuple(a for a in range(value.ndim) if a not in made)
            sums[name] = sums.get(name, 0.0) + value.sum(axis=axes, keepdims=True, dtype=np.float64)
            counts[name] = counts.get(name, 0) + int(np.prod([value.shape[a] for a in axes]))
            kinds[name] = value.dtype
    return {name: (total / counts[name]).astype(kinds[name]) for name, total in sums.items()}
