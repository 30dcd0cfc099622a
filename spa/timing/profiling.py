"""Where the time goes: what each node of a model takes, from the profile that ONNX Runtime writes.

A profile is made apart from the timing, which it slows down. The runtime's own nodes carry the names of what they were made of; the model
that is profiled is a copy in which each node is named after its first output, which pruning keeps, so that the nodes of two models can be
told to be the same one.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from spa.engines.table import Engine, Settings, find
from spa.errors import BadOption
from spa.graph.trace import node_name
from spa.plans.rewrite import copy_graph
from spa.proof.feeds import Feeds
from spa.storage.store import Model, with_graph
from spa.timing.bench import check_timed
from spa.timing.racers import Racer

COLD = 3  # runs that are left out
_SUFFIX = "_kernel_time"
_BLOCKED = "_nchwc"  # what the CPU provider adds to the name of a node whose channels it lays out in blocks
_NEAR = 4  # nodes from one that was fused into another


@dataclass(frozen=True)
class NodeTime:
    """Seconds that a node takes in one run.

    key: the same in a model and in what was pruned from it; the runtime's own additions of one kind share one. node: its name in the model.
    op: the operator that ran, which may be a fused one. blocked: whether it worked on blocks of channels (NCHWc).
    """

    key: str
    node: str
    op: str
    provider: str
    seconds: float
    blocked: bool = False


@dataclass(frozen=True)
class Profile:
    """Medians over `runs` runs of one model, the nodes in the order in which they ran."""

    name: str
    runs: int
    nodes: tuple[NodeTime, ...]

    @property
    def total(self) -> float:
        """Seconds of all nodes in one run."""
        return sum(n.seconds for n in self.nodes)

    def by_op(self) -> dict[str, float]:
        """Seconds by operator."""
        found: dict[str, float] = {}
        for node in self.nodes:
            found[node.op] = found.get(node.op, 0.0) + node.seconds
        return found

    def by_key(self) -> dict[str, NodeTime]:
        """Nodes by what tells them apart in all models."""
        return {n.key: n for n in self.nodes}


def profiles(
    models: Mapping[str, Model],
    feeds: Feeds | Sequence[Feeds],
    *,
    runs: int = 20,
    seconds: float = 5.0,
    threads: int = 1,
    engine: Engine | str = "cpu",
    options: Mapping[str, str] | None = None,
) -> tuple[Profile, ...]:
    """Profiles each model: `runs` runs, or about `seconds` seconds, but no less than 2 runs, after 3 that do not count.

    Raises BadOption if the engine is not there or writes no profile, UnsupportedModel if it does not run a model.
    """
    chosen = find(engine) if isinstance(engine, str) else engine
    check_timed(chosen)
    each = list(feeds) if isinstance(feeds, Sequence) else [feeds] * len(models)
    found = []
    for (name, model), fed in zip(models.items(), each, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(threads, options or {}, profile=str(Path(folder) / "profile"))
            _run(Racer(name, _named(model), fed, chosen, settings), runs, seconds)
            files = sorted(Path(folder).glob("profile*.json"))
            if not files:
                raise BadOption(f"{chosen.name} writes no profile that could be read: leave --profile out, or use --provider cpu.")
            found.append(parsed(name, model.graph, json.loads(files[0].read_text(encoding="utf-8"))))
    return tuple(found)


def _run(racer: Racer, runs: int, seconds: float) -> None:
    try:
        done, start = 1, time.perf_counter()  # loading runs once
        while done < COLD + 2 or (done < COLD + runs and time.perf_counter() - start < seconds):
            racer.lap()
            done += 1
    finally:
        racer.close()


def _named(model: Model) -> Model:
    """A copy in which nodes are named after their first outputs."""
    graph = copy_graph(model.graph)
    for node in graph.nodes:
        if node.outputs:
            node.name = node.outputs[0].name
    return with_graph(model, graph)


def parsed(name: str, graph: gs.Graph, events: Sequence[Mapping[str, Any]]) -> Profile:
    """A profile from ONNX Runtime's events (Chrome trace format) of a model whose nodes were named after their first outputs."""
    laps = list(_laps(events))
    laps = laps[COLD:] or laps[-1:]
    makers = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
    merged: dict[str, tuple[NodeTime, list[float]]] = {}
    for number, lap in enumerate(laps):
        for event in lap:
            node = _node_of(event, makers)
            times = merged.setdefault(node.key, (node, [0.0] * len(laps)))[1]
            times[number] += float(event["dur"]) / 1e6
    nodes = (NodeTime(n.key, n.node, n.op, n.provider, statistics.median(times), n.blocked) for n, times in merged.values())
    return Profile(name, len(laps), tuple(nodes))


def _laps(events: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Events of nodes, run by run: the event of a run comes after those of its nodes."""
    lap: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_SUFFIX):
            lap.append(event)
        elif event.get("name") == "model_run":
            yield lap
            lap = []


def _node_of(event: Mapping[str, Any], makers: Mapping[str, gs.Node]) -> NodeTime:
    """The node that an event is about, in terms of the model's own nodes where it was made of one."""
    told, label = event.get("args", {}), str(event["name"]).removesuffix(_SUFFIX)
    op, provider = str(told.get("op_name", "?")), str(told.get("provider", "?"))
    blocked = label.endswith(_BLOCKED)
    maker = makers.get(label.removesuffix(_BLOCKED))
    if maker is not None:
        found = _same_op(maker, op.removeprefix("Fused"), makers)
        return NodeTime(found.outputs[0].name, node_name(found), op, provider, 0.0, blocked)
    added = op == label.split("_token_")[0]  # such as ReorderOutput_token_3: numbered as they come, so no two models agree on them
    key = f"{op} (added by the runtime)" if added else label
    return NodeTime(key, key, op, provider, 0.0, blocked)


def _same_op(node: gs.Node, op: str, makers: Mapping[str, gs.Node]) -> gs.Node:
    """The nearest node of that operator before one that it was fused with (a convolution takes the name of its ReLU), else the node."""
    near, seen = [node], 0
    while near and seen < _NEAR:
        seen += 1
        one = near.pop(0)
        if one.op == op:
            return one
        near += [makers[t.name] for t in one.inputs if t.name in makers]
    return node
