"""Costs as functions of widths: what a graph costs when each group keeps so many coordinates, without looking at which.

Rows of an axis whose labels name the groups g, h, … are all pairs of their coordinates, so an axis keeps n · Π w_g / size_g of its n rows
of that kind, and every cost is a sum of products of such lengths: exact and quadratic where both sides of a layer shrink. One call takes
many candidates at once, which is what a search over widths needs; `spa.count` counts one given removal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.graph.atoms import Labels
from spa.graph.count import itemsize, macs_terms
from spa.graph.groups import Groups
from spa.graph.trace import NodeTrace
from spa.proof.feeds import free_batch

Array = NDArray[np.float64]


class Lengths:
    """Lengths of axes, as polynomials of the groups' widths; axes are added, then all are evaluated at once."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.sizes = np.array([g.size for g in groups.groups], np.float64)
        self._of = np.concatenate([[-1], groups.of_coordinate()])
        self._monomials: dict[tuple[int, ...], int] = {(): 0}
        self._forms: list[dict[int, float]] = []
        self._known: dict[object, int] = {}
        self.exact = True  # whether all rows of a kind are there equally often, so that it does not matter which coordinates go

    def constant(self, length: float) -> int:
        """An axis that never shrinks; returns its number."""
        return self._add(("constant", length), {0: length})

    def axis(self, labels: Labels | None, length: int) -> int:
        """An axis with these labels (coordinates + 1); returns its number."""
        if labels is None or not labels.shape[1]:
            return self.constant(length)
        key = id(labels)
        return self._known[key] if key in self._known else self._add(key, self._polynomial(labels))

    def value(self, name: str) -> list[int]:
        """Axes of a value; empty for a scalar or an unknown shape."""
        shape = self.groups.traced.facts.shapes.get(name) or ()
        return [self.axis(self.groups.labels.get((name, i)), n) for i, n in enumerate(shape)]

    def dims(self, node: NodeTrace, names: Iterable[str]) -> list[int]:
        """Dims of a node."""
        found = [node.dims[n] for n in names if n in node.dims]
        return [self.axis(None if a.labels is None else self.groups.dim_labels(a), a.length) for a in found]

    def _add(self, key: object, form: dict[int, float]) -> int:
        if key not in self._known:
            self._known[key] = len(self._forms)
            self._forms.append(form)
        return self._known[key]

    def _polynomial(self, labels: Labels) -> dict[int, float]:
        rows = np.sort(self._of[labels], axis=1)
        self.exact = self.exact and self._even(labels, rows)
        kinds, counts = np.unique(rows, axis=0, return_counts=True)
        form: dict[int, float] = {}
        for kind, rows_of_kind in zip(kinds, counts, strict=True):
            monomial = tuple(int(g) for g in kind if g >= 0)
            number = self._monomials.setdefault(monomial, len(self._monomials))
            form[number] = form.get(number, 0.0) + float(rows_of_kind)
        return form

    def _even(self, labels: Labels, rows: NDArray[np.int64]) -> bool:
        """Whether the coordinates of each kind of row occur in all combinations, and all equally often."""
        whole = np.sort(labels, axis=1)
        combinations, index, counts = np.unique(whole, axis=0, return_index=True, return_counts=True)
        kinds, of = np.unique(rows[index], axis=0, return_inverse=True)
        of = of.ravel()
        for number, kind in enumerate(kinds):
            here = counts[of == number]
            if len(here) != math.prod(int(self.sizes[g]) for g in kind if g >= 0) or here.min() != here.max():
                return False
        return bool(len(combinations))

    def evaluate(self, widths: Array) -> Array:
        """(candidates, axes) lengths for (candidates, groups) widths."""
        share = np.concatenate([widths / self.sizes, np.ones((len(widths), 1))], axis=1)
        most = max((len(m) for m in self._monomials), default=0)
        index = np.full((len(self._monomials), most), len(self.sizes))
        for monomial, number in self._monomials.items():
            index[number, : len(monomial)] = monomial
        values = share[:, index].prod(axis=2) if most else np.ones((len(widths), len(index)))
        matrix = np.zeros((len(self._forms), len(index)))
        for number, form in enumerate(self._forms):
            matrix[number, list(form)] = list(form.values())
        return np.asarray(np.round(values @ matrix.T, 6))  # whole for whole widths: shares of thirds leave dust


@dataclass(frozen=True)
class Term:
    """factor × the product of some axes' lengths."""

    factor: float
    axes: Sequence[int]


class Products:
    """Many terms, evaluated at once."""

    def __init__(self, terms: Sequence[Term], one: int) -> None:
        most = max((len(t.axes) for t in terms), default=0)
        self.factors = np.array([t.factor for t in terms], np.float64)
        self.index = np.full((len(terms), most), one)
        for number, term in enumerate(terms):
            self.index[number, : len(term.axes)] = term.axes

    def evaluate(self, lengths: Array) -> Array:
        """(candidates, terms)."""
        return np.asarray(self.factors * lengths[:, self.index].prod(axis=2))


class CostModel:
    """MACs, parameters, bytes of weights and the largest set of live activations, for many candidate widths at once.

    The figures are those of `spa.graph.count.count`: of one sample where the batch is free. exact: whether that holds for every removal;
    else, where a flattened or sliced axis holds some coordinates more often than others, they are those of an average one.
    """

    def __init__(self, groups: Groups) -> None:
        traced = groups.traced
        self.groups, self.batch = groups, free_batch(traced)
        self.lengths = lengths = Lengths(groups)
        one = lengths.constant(1)
        self._macs = Products([Term(f, lengths.dims(n, d)) for n in traced.nodes for f, d in macs_terms(n)], one)
        self._parameters = Products([Term(1, lengths.value(name)) for name in traced.weights], one)
        kinds = traced.facts.types
        self._bytes = Products([Term(itemsize(kinds.get(n, 1)), lengths.value(n)) for n in traced.constants], one)
        born, died, values = self._lives()
        self._born, self._died = born, died
        self._live = Products([Term(itemsize(kinds.get(n, 1)), lengths.value(n)) for n in values], one)

    @property
    def exact(self) -> bool:
        """Whether costs depend on widths alone."""
        return self.lengths.exact

    @property
    def dense(self) -> Array:
        """(groups,) widths of the model as it is."""
        return self.lengths.sizes.copy()

    def costs(self, widths: Array) -> Mapping[str, Array]:
        """{kind: (candidates,)} for (candidates, groups) widths: macs, params, size (bytes of weights), memory (bytes)."""
        found: dict[str, list[Array]] = {}
        for start in range(0, len(widths), 64):  # bounds memory
            lengths = self.lengths.evaluate(np.asarray(widths[start : start + 64], np.float64))
            found.setdefault("macs", []).append(self._macs.evaluate(lengths).sum(axis=1) // self.batch)
            found.setdefault("params", []).append(self._parameters.evaluate(lengths).sum(axis=1))
            found.setdefault("size", []).append(self._bytes.evaluate(lengths).sum(axis=1))
            found.setdefault("memory", []).append(self._peak(lengths) // self.batch)
        return {kind: np.concatenate(parts) for kind, parts in found.items()}

    def _lives(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
        """Steps at which each activation is made and freed; inputs are there from the start, outputs stay."""
        traced = self.groups.traced
        last = {t.name: len(traced.nodes) for t in traced.graph.outputs}
        for i, node in enumerate(traced.nodes):
            for tensor in node.node.inputs:
                last[tensor.name] = max(last.get(tensor.name, 0), i)
        born = {t.name: 0 for t in traced.graph.inputs}
        for i, node in enumerate(traced.nodes):
            born.update({t.name: i for t in node.node.outputs if t.name and t.name not in traced.constants})
        known = [n for n in born if traced.facts.shapes.get(n) is not None]
        ends = [max(last.get(n, born[n]), born[n]) for n in known]
        return np.array([born[n] for n in known], np.int64), np.array(ends, np.int64), known

    def _peak(self, lengths: Array) -> Array:
        sizes = self._live.evaluate(lengths)
        change = np.zeros((len(sizes), len(self.groups.traced.nodes) + 2))
        rows = np.arange(len(sizes))[:, None]
        np.add.at(change, (rows, self._born), sizes)
        np.add.at(change, (rows, self._died + 1), -sizes)
        return np.asarray(change.cumsum(axis=1).max(axis=1, initial=0.0))
