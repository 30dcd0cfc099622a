"""TraceNAS (2026): how well a network without some layers still learns as the dense one would, from the gradients of what stays.

    Φ(S) = Σ_{l ∉ S} r_l ρ_l,    ρ_l = Pearson(g_sub^l, g_base^l)

g_base^l: the gradient of the loss, mean over the data, by all weight matrices of sub-layer l of the dense network; g_sub^l: the same with
the branches of S masked in place, at the same weights. r_l is the share of a layer's weights that stays: here all of them do or none.
The network runs in torch, gated (`passes.insert_gates`), so that one graph serves all masks. The authors search layers and widths together
by evolution and take gradients in LoRA's subspace, to save memory; here the search is FinerCut's, greedy, and gradients are whole.
The loss is that of the labels, or of the dense network's own predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from passes import Gate, insert_gates
from spa.errors import UnsupportedModel
from spa.layers.sublayers import NEST, SubLayer
from spa.plans.edits import Edit
from spa.plans.rewrite import copy_graph
from spa.proof.feeds import Feeds
from spa.statistics.gradients import batch_size, differentiate
from spa.statistics.losses import Goal
from spa.statistics.torch_graph import TorchGraph
from spa.torch_ops import WAY_OUT, Tensor, torch

if TYPE_CHECKING:
    from spa.layers.depth import Candidate, Search

PREDICTED = "predictions of the dense network"  # entry of the feeds; no input of a graph has that name


def traced_away(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """Greedily, the candidate goes without which Φ is largest; a score is what Φ loses by it, after those before it."""
    traces = Traces(search)
    chosen: list[Candidate] = []
    rest = list(search.candidates)
    scores: dict[str, float] = {}
    for _ in range(search.count):
        closed = [s for c in chosen for s in c.layers]
        here = traces.fitness(closed)
        for candidate in rest:
            scores[candidate.name] = here - traces.fitness([*closed, *candidate.layers])
        best = min(rest, key=lambda c: scores[c.name])
        chosen.append(best)
        rest.remove(best)
    return chosen, scores, ()


class Traces:
    """Gradients by the matrices of sub-layers. What is held is as large as these matrices are, for the dense network and one trial.

    Raises UnsupportedModel where the network does not run in torch or no sub-layer has a matrix of floats of its own.
    """

    def __init__(self, search: Search) -> None:
        traced = search.analysis.groups.traced
        layers = [s for s in search.found.layers if s.kind != NEST]
        graph = copy_graph(search.analysis.normal.model.graph)
        kinds = {s.branch: helper.tensor_dtype_to_np_dtype(traced.facts.types[s.branch]) for s in layers}
        insert_gates(graph, {s.branch: [Gate(f"{s.branch}/gate", (), kinds[s.branch])] for s in layers})
        self.network = TorchGraph(graph)
        self.layers = layers
        read = {s.branch: {t.name for i in s.nodes for t in traced.nodes[i].node.inputs} for s in layers}
        self.matrices = {b: sorted(n for n in names if self._is_matrix(n)) for b, names in read.items()}
        if not any(self.matrices.values()):
            raise UnsupportedModel(f"--layers tracenas compares gradients of matrices, but no layer has one of floats: {WAY_OUT}.")
        self.batches, labels = list(search.batches), search.labels
        self.goal = Goal(self.network, "auto", labels or PREDICTED, 1.0)
        if labels is None:
            self.batches = [{**b, PREDICTED: self._predicted(b)} for b in self.batches]
        self.base = self._gradients(())

    def _is_matrix(self, name: str) -> bool:
        return name in self.network.parameters and self.network.parameters[name].dim() > 1

    def _gates(self, closed: Sequence[SubLayer]) -> Feeds:
        off = {s.branch for s in closed}
        return {f"{s.branch}/gate": np.array(s.branch not in off, np.float32) for s in self.layers}

    def _predicted(self, batch: Feeds) -> NDArray[np.int64]:
        with torch.no_grad():
            return self.goal.predictions(self.network.run({**batch, **self._gates(())}))

    def fitness(self, closed: Sequence[SubLayer]) -> float:
        """Φ of the network without these sub-layers."""
        found = self._gradients(closed)
        return sum(pearson(found[s.branch], self.base[s.branch]) for s in self.layers if s.branch in found)

    def _gradients(self, closed: Sequence[SubLayer]) -> dict[str, Tensor]:
        """(weights,) gradient of each sub-layer that stays, by its branch."""
        off = {s.branch for s in closed}
        kept = {b: names for b, names in self.matrices.items() if names and b not in off}
        names = list(dict.fromkeys(n for held in kept.values() for n in held))
        sums: dict[str, Tensor] = {}
        for batch in self.batches:
            loss = self.goal(self.network.run({**batch, **self._gates(closed)}), batch)
            size = batch_size(self.network.graph, batch)  # a loss is the mean over its batch
            found = differentiate(loss, [self.network.parameters[n] for n in names], names)
            for name, g in zip(names, found, strict=True):
                sums[name] = sums[name] + size * g if name in sums else size * g
        return {b: torch.cat([sums[n].reshape(-1) for n in held]) for b, held in kept.items()}


def pearson(one: Tensor, other: Tensor) -> float:
    """Correlation of two vectors, in float64; 0 where one is constant."""
    a, b = (v.double() - v.double().mean() for v in (one, other))
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else 0.0
