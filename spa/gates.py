"""Gates: one session in which any part of a network can be switched off, replaced by its mean, or by what it gives on other data.

Each gated value v becomes g·v + (1 − g)·o, where g and o are inputs of the instrumented graph (`passes.insert_gates`), so that thousands of
trials need one session. With all gates at 1 the network is the dense one. Modes: *zero* (o = 0), *mean* (o: mean over the data of each
channel), *swap* (o: what the value is on another batch).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from passes import Gate, insert_gates
from spa.check import run_session, session
from spa.errors import BadOption
from spa.feeds import Feeds
from spa.rewrite import copy_graph
from spa.store import Model, with_graph
from spa.trace import Traced

MODES = ("zero", "mean", "swap")


@dataclass(frozen=True)
class Unit:
    """What is switched as one: positions of one axis of a value, or all of it. axis, position: None for all of it."""

    name: str
    value: str
    axis: int | None = None
    position: int | None = None


class Gated:
    """An instrumented network in a session. All calls take feeds of the network itself; gates are open unless named."""

    def __init__(self, model: Model, traced: Traced, units: Sequence[Unit], *, mode: str = "zero", threads: int = 0) -> None:
        if mode not in MODES:
            raise BadOption(f"--mode is {mode!r}, but must be one of {', '.join(MODES)}.")
        self.mode = mode
        self.units = {u.name: u for u in units}
        self.shapes = {u.value: traced.facts.shapes[u.value] or () for u in units}
        self.axes = {u.value: u.axis for u in units}
        self.types = {v: np.dtype(helper.tensor_dtype_to_np_dtype(traced.facts.types[v])) for v in self.shapes}
        graph = copy_graph(model.graph)
        insert_gates(graph, {v: [self._gate(v)] for v in self.shapes})
        self.outputs = [t.name for t in model.graph.outputs]
        self.others: dict[str, NDArray[np.generic]] = {}
        self.session = session(with_graph(model, graph), threads=threads)

    def _gate(self, value: str) -> Gate:
        axis, rank = self.axes[value], len(self.shapes[value])
        shape = () if axis is None else (self.shapes[value][axis], *(1,) * (rank - 1 - axis))
        other = f"{value}/other" if self.mode != "zero" else ""
        return Gate(f"{value}/gate", shape, self.types[value], other, tuple(f"{value}.{i}" for i in range(rank)))

    def run(self, feeds: Feeds, closed: Iterable[str] = (), others: Mapping[str, NDArray[np.generic]] | None = None) -> Feeds:
        """All outputs by name, with some units switched off. others: value -> what stands in for it; by default `self.others`."""
        gates = {v: np.ones(self._gate(v).shape, self.types[v]) for v in self.shapes}
        for name in closed:
            unit = self.units[name]
            if unit.position is None:
                gates[unit.value][...] = 0
            else:
                gates[unit.value][unit.position] = 0
        given = {**feeds, **{f"{v}/gate": g for v, g in gates.items()}}
        if self.mode != "zero":
            stand_in = self.others if others is None else others
            nothing = {v: np.zeros((1,) * len(s), self.types[v]) for v, s in self.shapes.items()}
            given |= {f"{v}/other": stand_in.get(v, nothing[v]) for v in self.shapes}
        found = run_session(self.session, given)
        return {name: found[name] for name in self.outputs}




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
    """Mean of each value over batches and all axes but the channels', with axes of size one in their places."""
    opened = Observer(model, values, threads)
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    kinds: dict[str, np.dtype[np.generic]] = {}
    for feeds in batches:
        for name, value in opened.run(feeds).items():
            axes = tuple(a for a in range(value.ndim) if a != channel_axis(traced, name))
            sums[name] = sums.get(name, 0.0) + value.sum(axis=axes, keepdims=True, dtype=np.float64)
            counts[name] = counts.get(name, 0) + int(np.prod([value.shape[a] for a in axes]))
            kinds[name] = value.dtype
    return {name: (total / counts[name]).astype(kinds[name]) for name, total in sums.items()}
