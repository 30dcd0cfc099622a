"""A plan carried over to a framework's arrays: `apply_to_arrays(tree, plan, model="model.onnx")`.

A tree is what frameworks keep weights in: nested dicts, lists and tuples of arrays (Flax's variables, `nnx.to_pure_dict` of a state,
Keras' `get_weights()` or {weight.path: array}, Paddle's and torch's state dicts). Arrays are found in the file by what they hold
(`spa.frameworks.arrays`), and the same positions go from them. Of an array that the file does not hold as it is,

    a norm multiplied into its layer: γ and σ² are those with (γ / s)² - σ² the same number (the norm's ε) in all channels, s the factors
    by which the layer's rows in the file were multiplied; β and μ lie beside them

    any other vector (zeros, equal to others): goes with what lies nearest to it in the tree and has an axis of its length
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa import api
from spa.data.evidence import values
from spa.errors import BadOption
from spa.frameworks.arrays import Array, Found, locate
from spa.graph.analysis import Analysis, Source, analyzed_for
from spa.graph.trace import constant_values
from spa.graph.view import dtype_holds_weights
from spa.plans.plan import Plan, load_plan
from spa.stages import collector_paused
from spa.storage.store import Model

Keeps = list[NDArray[np.int64]]
Path = tuple[Any, ...]
STEADY = 1e-3  # how far ε may differ from channel to channel, over the largest variance


@collector_paused()
def apply_to_arrays(
    tree: Any, plan: Plan | str | Mapping[str, Any], model: Source | Analysis, *, pruned: Source | None = None
) -> Any:  # fmt: skip
    """The tree with smaller arrays, of the same kind and nesting; arrays that lose nothing are passed on as they are.

    Parameters
    ----------
    tree
        Nested dicts, lists and tuples of arrays: the weights that `model` was exported with.
    plan
        What was removed from `model`.
    model
        The ONNX file as it was before pruning.
    pruned
        The pruned file, where its weights were repaired or trained: they are taken over. By default the tree's own are cut.

    Raises
    ------
    BadOption
        If the file does not tell what an array loses, or `pruned` holds weights that the tree has no place for.
    """
    decided = load_plan(plan)
    analysis = model if isinstance(model, Analysis) else analyzed_for(model, decided)
    leaves = {path: leaf for path, leaf in _leaves(tree, ()) if np.ndim(leaf)}
    names = {"/".join(map(str, path)): path for path in leaves}
    state = _State({n: np.asarray(leaves[p]) for n, p in names.items()})
    state.place(analysis, decided)
    state.norms()
    state.neighbours(analysis, decided)
    small = None if pruned is None else api.opened(pruned)
    made: dict[Path, Array] = {}
    for name, path in names.items():
        new = state.cut(name, decided, small)
        if new is not None:
            made[path] = new.astype(state.arrays[name].dtype, copy=False)
    if small is not None:
        state.check_taken(small)
    return _with(tree, (), made)


@dataclass
class _State:
    """Arrays by name in the order of the tree, where they are in the file, and what of each axis stays."""

    arrays: Mapping[str, Array]
    found: dict[str, Found] = field(default_factory=dict)
    keeps: dict[str, Keeps] = field(default_factory=dict)

    def place(self, analysis: Analysis, plan: Plan) -> None:
        """Finds arrays, and what stays of them, by what they hold."""
        stored = constant_values(analysis.given.graph)
        tensors = {n: values(analysis.given.graph, n) if dtype_holds_weights(c.dtype) else np.asarray(c.values) for n, c in stored.items()}
        split = set(plan.copies.values())  # one tensor that several layers read, each cut in its own way
        for name, where in locate(self.arrays, tensors).items():
            if where.tensor in split:
                continue
            keeps = where.keeps(self.arrays[name].shape, plan.removed)
            if keeps is None:
                raise BadOption(f"What the plan leaves of {where.tensor} is no block of {name}, which stores it in another form.")
            self.found[name], self.keeps[name] = where, keeps

    def norms(self) -> None:
        """What stays of norms that were multiplied into a layer."""
        for name, where in list(self.found.items()):
            if where.scale is None:
                continue
            vectors = [n for n, a in self.arrays.items() if n not in self.keeps and a.shape == where.scale.shape]
            pair = next(((g, v) for g in vectors for v in vectors if g != v and self._norm(g, v, where.scale)), None)
            if pair is None:
                continue
            for vector in vectors:
                if all(_near(vector, one) or self._distance(vector, one) <= 3 for one in pair):
                    self.keeps[vector] = [self.keeps[name][where.rows]]

    def _norm(self, gain: str, variance: str, scale: NDArray[np.float64]) -> bool:
        g, v = (np.asarray(self.arrays[n], np.float64) for n in (gain, variance))
        if not (np.abs(scale) > 0).all() or v.min(initial=0) < 0:
            return False
        epsilon = (g / scale) ** 2 - v
        return bool(np.ptp(epsilon) <= STEADY * max(float(v.max()), 1e-30) and np.isfinite(epsilon).all())

    def neighbours(self, analysis: Analysis, plan: Plan) -> None:
        """What stays of other arrays. Raises BadOption where that can't be told."""
        unknown = []
        cut = {n for name, keeps in self.keeps.items() for k, n in zip(keeps, self.arrays[name].shape, strict=True) if len(k) < n}
        read = _read_together(analysis)
        for name, array in self.arrays.items():
            if name in self.keeps or array.dtype.kind not in "fV" or not cut.intersection(array.shape):
                continue
            keep = self._of_neighbour(name, array, plan, read) if array.ndim == 1 else None
            if keep is None:
                unknown.append(name)
            else:
                self.keeps[name] = [keep]
        if unknown:
            raise BadOption(f"The file does not tell what these arrays lose: {', '.join(unknown)}. Is it an export of the network with "
                            "these weights?")  # fmt: skip

    def _of_neighbour(self, name: str, array: Array, plan: Plan, read: Mapping[str, Mapping[str, Array]]) -> NDArray[np.int64] | None:
        """What stays of a vector: as of the stored one of its elements that is read with the nearest array; else as of that one's axis."""
        around = sorted(self.found, key=lambda n: (not _near(n, name), self._distance(n, name)))
        for leader in around:
            axes = [k for k, n in zip(self.keeps[leader], self.arrays[leader].shape, strict=True) if n == array.size]
            if not axes:
                continue
            same = [t for t, held in read.get(self.found[leader].tensor, {}).items() if np.array_equal(held.reshape(-1), array)]
            if same:
                gone = list(plan.removed.get(same[0], {}).values())
                return np.delete(np.arange(array.size), gone[0] if gone else [])
            return axes[0] if all(np.array_equal(k, axes[0]) for k in axes) else None
        return None

    def _distance(self, one: str, other: str) -> int:
        order = list(self.arrays)
        return abs(order.index(one) - order.index(other))

    def cut(self, name: str, plan: Plan, small: Model | None) -> Array | None:
        """The smaller array; None if it stays as it is."""
        array, keeps, where = self.arrays[name], self.keeps.get(name), self.found.get(name)
        if keeps is None or (small is None and all(len(k) == n for k, n in zip(keeps, array.shape, strict=True))):
            return None
        if small is not None and where is not None and where.scale is None:
            return where.values(values(small.graph, where.tensor), array.shape, keeps, plan.removed)
        return np.asarray(array[np.ix_(*keeps)])

    def check_taken(self, small: Model) -> None:
        """Raises BadOption if the pruned file holds float tensors that no array took over."""
        taken = {w.tensor for w in self.found.values() if w.scale is None}
        left = [n for n, c in constant_values(small.graph).items() if dtype_holds_weights(c.dtype) and len(c.shape) and n not in taken]
        if left:
            raise BadOption(f"The pruned file holds weights that none of the arrays takes over ({', '.join(left[:3])}): repair added them, "
                            "or the exporter folded others into them. Cut the arrays alone, without pruned=, and train them.")  # fmt: skip


def _near(one: str, other: str) -> bool:
    """Whether two arrays lie in one container, or would but for its topmost name: params/norm/scale, batch_stats/norm/mean."""
    a, b = (n.rpartition("/")[0] for n in (one, other))
    return bool(a) and (a == b or a.partition("/")[2] == b.partition("/")[2] != "")


def _read_together(analysis: Analysis) -> dict[str, dict[str, Array]]:
    """Stored tensor -> the stored vectors that the node which reads it, or the one behind that, reads too."""
    graph = analysis.given.graph
    stored = {n: c for n, c in constant_values(graph).items() if int(np.prod(c.shape)) == max([*c.shape, 1])}
    found: dict[str, dict[str, Array]] = {}
    for node in graph.nodes:
        behind = [reader for t in node.outputs for reader in t.outputs]
        vectors = {t.name: np.asarray(stored[t.name].values) for n in (node, *behind) for t in n.inputs if t.name in stored}
        for tensor in node.inputs:
            found.setdefault(tensor.name, {}).update(vectors)
    return found


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from _leaves(value, (*path, key))
    elif hasattr(tree, "shape"):
        yield path, tree


def _with(tree: Any, path: Path, made: Mapping[Path, Array]) -> Any:
    if isinstance(tree, Mapping):
        return type(tree)({key: _with(value, (*path, key), made) for key, value in tree.items()})  # type: ignore[call-arg]
    if isinstance(tree, list | tuple):
        found = [_with(value, (*path, key), made) for key, value in enumerate(tree)]
        return type(tree)(*found) if hasattr(tree, "_fields") else type(tree)(found)
    return made.get(path, tree)
