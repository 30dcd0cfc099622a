"""Moments of activations without running anything: what norms remember, carried on through the operators behind them.

A norm with a stored mean and variance tells what its input was like in training; taken as Gaussian, channel by channel, every
element-wise operator behind it is a function of one number. So a value is held as that function's values at fixed nodes of the
standard normal distribution, and an operator is evaluated on (nodes, channels) numbers alone:

    norm with stored moments            its input is N(mean, variance); its output is N(bias, scale²), up to epsilon
    element-wise                        evaluated at the nodes, if its operands are functions of the same number, or stored
    Add of values of different origin   N(sum of means, sum of variances), as if they were independent
    averages over space                 N(mean, variance); the true variance is smaller
    reshapes, transposes, concatenation the same channels in another place

Everything else is unknown and left out. With x ~ N(β, γ²): E relu(x) = βΦ(β/|γ|) + |γ|φ(β/|γ|), E relu(x)² = (β² + γ²)Φ + β|γ|φ; an
ordinary rule at equal steps comes to within 2e-5 of |γ| of these, which a Gauss-Hermite rule of as many nodes does not, for the kink.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from passes import Weight
from spa.data.evidence import stored_norms
from spa.graph.alone import evaluated
from spa.graph.groups import Groups
from spa.graph.linear import Layer
from spa.graph.moved import place_of
from spa.graph.trace import NodeTrace
from spa.graph.view import FLOATS
from spa.signatures.arithmetic import ADDS, MOVES, NEVER_FOLDED, READS_SHAPE, REINTERPRETS
from spa.signatures.elementwise import BROADCAST, UNARY
from spa.signatures.sizes import term_size
from spa.signatures.table import Dim, One, Pick, Product, Sum, Term

Array = NDArray[np.float64]

ELEMENTWISE = frozenset({*UNARY, *BROADCAST, "Clip", "Trunc"}) - NEVER_FOLDED
LAYOUT = (MOVES - READS_SHAPE) | REINTERPRETS
AVERAGES = frozenset({"GlobalAveragePool", "AveragePool", "ReduceMean"})

REACH, STEP = 8.0, 1 / 32
NODES = np.arange(-REACH, REACH + STEP / 2, STEP)
WEIGHTS = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()


class Channels(NamedTuple):
    """(c,) mean and variance of the channels of a value, which lie on `axis`."""

    mean: Array
    variance: Array
    axis: int


@dataclass(frozen=True)
class _Spread:
    """A value's channels (on `axis`) at the nodes: `at` (nodes, c). Values of one source are functions of the same numbers."""

    source: int
    axis: int
    at: NDArray[Any]

    @property
    def channels(self) -> Channels:
        return Channels(*_moments(self.at, WEIGHTS), self.axis)

    @property
    def settled(self) -> bool:
        """Whether half of the nodes tell about the same, which they do not of what has no moments, such as a reciprocal."""
        if not np.isfinite(self.at).all():
            return False
        (mean, variance), half = _moments(self.at, WEIGHTS), _moments(self.at[::2], WEIGHTS[::2] / WEIGHTS[::2].sum())
        small = 1e-5 * float((mean**2 + variance).max())
        return bool((np.abs(half[1] - variance) <= 0.25 * variance + small).all())


def _moments(at: NDArray[Any], weights: Array) -> tuple[Array, Array]:
    mean = weights @ at.astype(np.float64)
    return mean, weights @ (at - mean) ** 2


def closed_form(groups: Groups) -> dict[str, Channels]:
    """Mean and variance of the channels of every value that can be followed from a norm with stored moments.

    Parameters
    ----------
    groups
        The groups of a normalised model. Nothing is run but single operators, on a few hundred numbers a channel.

    Returns
    -------
    dict
        By value: (c,) mean and variance, float64, and the axis that they belong to. Empty for a model without such norms.
    """
    return _Walk(groups).run()


def bias_moments(groups: Groups, layer: Layer, found: Mapping[str, Channels] | None = None) -> tuple[Array, Array] | None:
    """Mean and variance of the columns of a linear map's data; every position of a kernel is as its channel is (padding apart).

    Parameters
    ----------
    groups, layer
        The groups, and one of their layers.
    found
        What `closed_form` gives, for many questions about one model.

    Returns
    -------
    tuple or None
        (parts, columns) mean and variance; None where nothing is known of the data.
    """
    known = (closed_form(groups) if found is None else found).get(layer.data)
    places = None if known is None else layer.positions.get(known.axis)
    return None if known is None or places is None else (known.mean[places], known.variance[places])


class _Walk:
    def __init__(self, groups: Groups) -> None:
        self.traced = groups.traced
        self.makers = {t.name: n.node for n in self.traced.nodes for t in n.node.outputs}
        self.readers = Counter(t.name for n in self.traced.nodes for t in n.node.inputs)
        self.opsets = {d.domain: d.version for d in self.traced.graph.import_domains or ()} or {"": self.traced.graph.opset}
        self.live: dict[str, _Spread] = {}
        self.sources = itertools.count()
        self.norms = stored_norms(groups)
        self.given: dict[str, Channels] = {}
        for norm in self.norms:
            assert norm.signature is not None
            assert norm.signature.moments is not None
            mean, variance = (self._stored(norm.node.inputs[i].name) for i in norm.signature.moments)
            if mean is not None and variance is not None:
                moments = Channels(mean.astype(np.float64), np.maximum(variance.astype(np.float64), 0), 1)
                self.given.setdefault(norm.node.inputs[0].name, moments)

    def run(self) -> dict[str, Channels]:
        found = dict(self.given)
        self._known(t.name for t in self.traced.graph.inputs)
        for node in self.traced.nodes:
            outputs = [t.name for t in node.node.outputs]
            if any(t.name in self.live for t in node.node.inputs) and any(n not in self.given for n in outputs):
                for name, spread in zip(outputs, self._visit(node), strict=False):
                    if name and spread is not None and spread.settled:
                        self.live[name] = spread
                        if self.traced.facts.types.get(name) in FLOATS:
                            found.setdefault(name, spread.channels)
            self._known(outputs)
            for tensor in node.node.inputs:
                self.readers[tensor.name] -= 1
                if not self.readers[tensor.name]:
                    self.live.pop(tensor.name, None)
        return found

    def _known(self, names: Iterable[str]) -> None:
        """What a norm remembers of a value is better than what was carried there."""
        for name in names:
            if name in self.given:
                self.live[name] = self._gaussian(self.given[name])

    def _gaussian(self, moments: Channels) -> _Spread:
        at = moments.mean + np.sqrt(moments.variance) * NODES[:, None]
        return _Spread(next(self.sources), moments.axis, at.astype(np.float32))

    def _stored(self, name: str) -> NDArray[Any] | None:
        """A stored tensor; floats of any type as float32."""
        place = place_of(self.traced, name, self.makers)
        shape = self.traced.facts.shapes.get(name)
        if place is None or shape is None:
            return None
        tensor = self.traced.constants[place.name]
        held = tensor._values.load() if isinstance(tensor._values, Weight) else tensor.values
        found = place.read(np.asarray(held), shape)
        return found.astype(np.float32) if self.traced.facts.types.get(name) in FLOATS else found

    # ------------------------------------------------------------------ operators

    def _visit(self, node: NodeTrace) -> Sequence[_Spread | None]:
        if node.signature is None or node.node.domain not in (None, "", "ai.onnx"):
            return ()
        if node.node.op in ELEMENTWISE or node.signature.moments is not None:
            return [self._elementwise(node)]
        if node.node.op in LAYOUT:
            return self._laid_out(node)
        if node.node.op in AVERAGES and not (node.node.attrs.get("count_include_pad") and any(node.node.attrs.get("pads", ()))):
            return [None if s is None else self._gaussian(s.channels) for s in self._laid_out(node)]
        return ()

    def _elementwise(self, node: NodeTrace) -> _Spread | None:
        spreads = [self.live[t.name] for t in node.node.inputs if t.name in self.live]
        shape = self.traced.facts.shapes.get(node.node.outputs[0].name)
        axis, width = spreads[0].axis, spreads[0].at.shape[1]
        ranks = {len(self.traced.facts.shapes.get(t.name) or ()) for t in node.node.inputs if t.name in self.live}
        if shape is None or ranks != {len(shape)} or any(s.axis != axis or s.at.shape[1] != width for s in spreads):
            return None
        if len({s.source for s in spreads}) > 1:
            if node.node.op not in ADDS or len(spreads) != len(node.node.inputs):
                return None
            every = [s.channels for s in spreads]
            mean, variance = sum(c.mean for c in every), sum(c.variance for c in every)
            return self._gaussian(Channels(np.asarray(mean), np.asarray(variance), axis))
        whole = [1] * len(shape)
        whole[0], whole[axis] = len(NODES), width
        feeds = {}
        for tensor in node.node.inputs:
            if tensor.name:
                value = self.live[tensor.name].at.reshape(whole) if tensor.name in self.live else self._stored(tensor.name)
                if value is None:
                    return None
                feeds[tensor.name] = value
        result = evaluated(node.node, feeds, self.opsets)
        return None if result is None or list(result.shape) != whole else _Spread(spreads[0].source, axis, result.reshape(-1, width))

    def _laid_out(self, node: NodeTrace) -> list[_Spread | None]:
        """Outputs whose channels are those of the inputs in another place, whatever happened along other axes."""
        signature = node.signature
        assert signature is not None
        sizes = {n: a.length for n, a in node.dims.items()}
        dims: dict[str, NDArray[Any]] = {}
        spreads = []
        for tensor, operand in zip(node.node.inputs, signature.inputs, strict=False):
            spread = self.live.get(tensor.name)
            if operand is None or (spread is None and self.traced.facts.types.get(tensor.name) not in FLOATS):
                continue  # a setting, or positions
            if spread is None:
                return []
            spreads.append(spread)
            if not _take_apart(operand[spread.axis], spread.at, sizes, dims):
                return []
        for left, right in signature.equations:
            moved = _put_together(right, sizes, dims)
            if moved is not None and not _take_apart(left, moved, sizes, dims):
                return []
        outputs: list[_Spread | None] = []
        for operand in signature.outputs:
            axes = [(i, _put_together(t, sizes, dims)) for i, t in enumerate(operand or ())]
            there = [(i, at) for i, at in axes if at is not None and i]
            if len(there) != 1:
                outputs.append(None)
                continue
            axis, at = there[0]
            same = node.node.op in REINTERPRETS and at is spreads[0].at
            outputs.append(_Spread(spreads[0].source if same else next(self.sources), axis, at))
        return outputs


def _take_apart(term: Term, at: NDArray[Any], sizes: Mapping[str, int], dims: dict[str, NDArray[Any]]) -> bool:
    """Notes the channels (nodes, length) of the dims of an axis; whether that could be done without contradiction."""
    if isinstance(term, Dim):
        return dims.setdefault(term.name, at) is at
    if isinstance(term, Sum):
        lengths = [term_size(p, sizes) or 0 for p in term.parts]
        parts = np.split(at, np.cumsum(lengths)[:-1], axis=1)
        return all(_take_apart(p, part, sizes, dims) for p, part in zip(term.parts, parts, strict=True))
    return isinstance(term, Product) and len(term.parts) == 1 and _take_apart(term.parts[0], at, sizes, dims)


def _put_together(term: Term, sizes: Mapping[str, int], dims: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """(nodes, length) the channels along an axis; None if not all of it is known."""
    if isinstance(term, Dim):
        return dims.get(term.name)
    if isinstance(term, Pick):
        part = dims.get(term.part.name)
        return None if part is None else part[:, np.asarray(term.index, np.int64)]
    if isinstance(term, One):
        return None
    parts = [_put_together(p, sizes, dims) for p in term.parts]
    if isinstance(term, Sum):
        known = [p for p in parts if p is not None]
        return np.concatenate(known, axis=1) if len(known) == len(parts) else None
    there = [i for i, p in enumerate(parts) if p is not None]
    if not isinstance(term, Product) or len(there) != 1:
        return None
    lengths = [term_size(p, sizes) or 0 for p in term.parts]
    found = parts[there[0]]
    assert found is not None
    return np.tile(np.repeat(found, math.prod(lengths[there[0] + 1 :]), axis=1), (1, math.prod(lengths[: there[0]])))


__all__ = ["Channels", "bias_moments", "closed_form"]
