"""Norms after pruning: stored means and variances, and scales behind layer norms, brought back to what they did in the dense network.

Both are measured as changes, on the same data through both networks: where nothing changed nothing moves, whatever the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.data.evidence import channel_moments, stored_norms, values
from spa.graph.groups import Groups, Kept
from spa.graph.linear import Layer
from spa.graph.trace import NodeTrace
from spa.proof.check import session
from spa.statistics.stepper import tapped

if TYPE_CHECKING:
    from spa.repairs.mending import Work

Array = NDArray[np.float64]
Batches: TypeAlias = Sequence[Mapping[str, NDArray[Any]]]


class Norms:
    """Measures norms of a work in progress. norms: those with stored statistics; scales: normalisations over channels with a scale."""

    def __init__(self, work: Work, layers: Sequence[Layer], wanted: bool) -> None:
        self.work = work
        self.norms = {id(n.node): n for n in _norms(work.groups, work.kept, layers)} if wanted else {}
        self.scales = {id(n.node): n for n in _scales(work.groups, work.kept)} if wanted else {}
        self.measured = 0
        self.sessions: dict[tuple[int, str], Any] = {}

    def __bool__(self) -> bool:
        return bool(self.norms or self.scales)

    def measure(self, node: NodeTrace, dense: Batches, pruned: Batches) -> None:
        """New mean and variance: the stored ones, changed as the data's changed from the dense network to the pruned one."""
        assert node.signature is not None
        assert node.signature.moments is not None
        value = node.node.inputs[0].name
        keep = self.work.kept.site((value, 1))
        was, now = channel_moments([b[value] for b in dense]), channel_moments([b[value] for b in pruned])
        keep = np.ones(len(was[0]), bool) if keep is None else keep
        places = [node.node.inputs[i].name for i in node.signature.moments]
        mean, variance = self.work.array(places[0]), self.work.array(places[1])
        mean[keep] = values(self.work.model.graph, places[0])[keep] + now[0] - was[0][keep]  # a constant put here is not in `now`
        dead = was[1][keep] <= 1e-12 * max(float(was[1].mean()), 1e-30)
        variance[keep] *= np.where(dead, 1.0, now[1] / np.where(dead, 1.0, was[1][keep]))
        for name in places:
            self.work.push(name)
        self.measured += 1

    def rescale(self, node: NodeTrace, dense: Batches, pruned: Batches) -> None:
        """New scale and bias of a normalisation over channels, some of which went: each channel gets its old mean and deviation back.

        out <- (out - mean of pruned) · deviation of dense / deviation of pruned + mean of dense (OBC's statistics correction, spa.md §5.1).
        Without a bias (RMSNorm) the root mean squares are matched.
        """
        assert node.signature is not None
        assert node.signature.affine is not None
        out = node.node.outputs[0].name
        keep = self.work.kept.site((out, len(self.work.groups.traced.facts.shapes[out] or ()) - 1))
        was = _last_moments(self._alone(self.work.wide, node, b) for b in dense)
        now = _last_moments(self._alone(self.work.thin, node, b) for b in pruned)
        keep = np.ones(len(was[0]), bool) if keep is None else keep
        mean, deviation = was[0][keep], np.sqrt(was[1][keep])
        places = [node.node.inputs[i].name for i in node.signature.affine if i is not None]
        if len(places) == 1:
            ratio = np.sqrt((was[1][keep] + mean**2) / np.maximum(now[1] + now[0] ** 2, 1e-30))
        else:
            ratio = deviation / np.sqrt(np.maximum(now[1], 1e-30))
        ratio = np.where(np.isfinite(ratio) & (now[1] > 1e-12 * max(float(now[1].mean()), 1e-30)), ratio, 1.0)
        self.work.array(places[0])[keep] *= ratio
        if len(places) == 2:
            bias = self.work.array(places[1])
            bias[keep] = (bias[keep] - now[0]) * ratio + mean
        for name in places:
            self.work.push(name)
        self.measured += 1

    def _alone(self, graph: gs.Graph, node: NodeTrace, values_: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The output of one node."""
        out = node.node.outputs[0].name
        key = id(graph), out
        if key not in self.sessions:
            self.sessions[key] = session(tapped(self.work.model, graph, sorted(values_), [out], self.work.types), threads=1)
        return np.asarray(self.sessions[key].run([out], dict(values_))[0])


def _norms(groups: Groups, kept: Kept, layers: Sequence[Layer]) -> list[NodeTrace]:
    """Norms with stored statistics that lose channels, or stand right behind a layer that does."""
    behind = {layer.node.outputs[0].name for layer in layers}
    return [n for n in stored_norms(groups) if n.node.inputs[0].name in behind or kept.site((n.node.inputs[0].name, 1)) is not None]


def _scales(groups: Groups, kept: Kept) -> list[NodeTrace]:
    """Normalisations over the last axis that loses channels, with a stored scale."""
    found = []
    for node in groups.traced.nodes:
        if node.signature is None or node.signature.affine is None:
            continue
        shape = groups.traced.facts.shapes.get(node.node.outputs[0].name) or ()
        places = [node.node.inputs[i].name for i in node.signature.affine if i is not None]
        stored = all(p in groups.traced.constants and groups.traced.facts.shapes.get(p) == shape[-1:] for p in places)
        if stored and kept.site((node.node.outputs[0].name, len(shape) - 1)) is not None:
            found.append(node)
    return found


def _last_moments(found: Iterable[NDArray[Any]]) -> tuple[Array, Array]:
    """Mean and variance of the last axis."""
    return channel_moments(f.reshape(-1, f.shape[-1], 1) for f in found)
