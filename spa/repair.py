"""Repair: what removed channels told the layers that read them is taken over by the channels that stay, in closed form.

    dense graph, plan, calibration --repair--> the dense graph with other weights --rewrite--> the pruned graph

Only weights that lose columns, their constants, and the statistics of norms behind them change; the deletion itself is that of the
plan. The repaired dense graph is a model of its own: another tool, or `spa apply --other-weights`, can cut it.

Every layer is fitted in graph order (`spa.solve`). Its inputs are those of the network as pruned and repaired up to there, its target
what the dense layer gave on the same data (`inputs="pruned"`, `target="dense"`; Kwon et al. 2022, OSSCAR's `fullseq`), so that a
layer also makes good what its predecessors could not. `inputs="dense"` fits each layer alone, in one stream over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from passes import Weight, insert_biases
from spa import solve
from spa.errors import BadOption
from spa.evidence import channel_moments, put, stored_norms
from spa.feeds import Feeds
from spa.groups import Groups, Kept, find_groups
from spa.linear import Layer, find_layers
from spa.observe import Gram, Part, draw_rows, observe, parts_of
from spa.offsets import Missing, Offset, Offsets
from spa.rewrite import copy_graph, plan_removal, rewrite
from spa.rows import rows
from spa.shapes import with_new_constants
from spa.stepper import Stepper
from spa.store import Model, with_graph
from spa.trace import NodeTrace, node_name, trace
from spa.widen import widen

Array = NDArray[np.float64]

METHODS = ("none", "bias", "affine", "obspa")
DAMPING = 0.01


@dataclass(frozen=True)
class RepairOptions:
    """How to repair.

    method: what may change: nothing, the constant (bias), one scale a channel too (affine), all weights (obspa).
    inputs: "pruned" (as they are after the layers before were pruned and repaired) or "dense". target: "dense" (the dense layer's
    output) or "pruned" (the dense layer's weights on the inputs as they are). damping: λ over the mean variance of a layer's inputs.
    norms: whether stored means and variances behind repaired layers are measured again, as changes of what the dense network
    gives on the same data (so noise does no harm).
    """

    method: str = "obspa"
    inputs: str = "pruned"
    target: str = "dense"
    damping: float = DAMPING
    norms: bool = True

    def __post_init__(self) -> None:
        for name, value, choice in (("--repair", self.method, METHODS), ("--repair-inputs", self.inputs, ("pruned", "dense")),
                                    ("--repair-target", self.target, ("dense", "pruned"))):  # fmt: skip
            if value not in choice:
                raise BadOption(f"{name} is {value!r}; the choice is: {', '.join(choice)}.")
        if not self.damping >= 0:
            raise BadOption(f"--damping is {self.damping}, but must be 0 or more: 0.01 is one percent of the mean variance.")


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer: columns removed of how many, and the mean squared error of its output over the output's variance,
    without and with repair, on the calibration data.
    """

    name: str
    removed: int
    columns: int
    before: float
    after: float


@dataclass(frozen=True)
class Repaired:
    """The dense model with repaired weights, its groups and the plan's mask over them (new biases are places too), and what was done.

    skipped: layers that lose channels and could not be repaired, with the reason. norms: how many norms were measured again.
    changed: stored tensors that hold other values now.
    """

    model: Model
    groups: Groups
    gone: NDArray[np.bool_]
    layers: tuple[LayerRepair, ...]
    skipped: Mapping[str, str]
    norms: int
    changed: frozenset[str] = frozenset()


def repair(
    model: Model, groups: Groups, gone: NDArray[np.bool_], batches: Sequence[Feeds], options: RepairOptions | None = None, *, seed: int = 0
) -> Repaired:
    """Repairs the normalised model for the removal of `gone`. Mutates nothing.

    Raises BadOption for data that a layer cannot be fitted on, UnsupportedModel where the runtime fails.
    """
    chosen = options or RepairOptions()
    work = _Work(model, groups, gone, chosen, seed)
    if chosen.method != "none":
        if chosen.inputs == "dense":
            work.fit_dense(batches)
        if chosen.inputs == "pruned" or (chosen.norms and work.norms):
            work.walk(batches)
    return work.result()


class _Work:
    def __init__(self, model: Model, groups: Groups, gone: NDArray[np.bool_], options: RepairOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self.model, self.groups, self.gone, self.offsets = _with_biases(model, groups, gone, options)
        self.kept = Kept(self.groups, self.gone)
        self.layers: list[Layer] = []
        self.skipped: dict[str, str] = {}
        shared: dict[str, int] = {}
        for layer in find_layers(self.groups):
            if layer.removed(self.kept).any():
                self.layers.append(layer)
                shared[layer.place.name] = shared.get(layer.place.name, 0) + 1
        self.shared = {n for n, count in shared.items() if count > 1}
        self.norms = _norms(self.groups, self.kept, self.layers) if options.norms else []
        self.stored: dict[str, Array] = {}
        self.reports: dict[str, LayerRepair] = {}
        self.measured = 0
        self._note_skipped()

    def _note_skipped(self) -> None:
        """Sums over removed channels that are not among the layers."""
        seen = {id(layer.node) for layer in self.layers}
        for node in self.groups.traced.nodes:
            signature = node.signature
            if signature is None or id(node.node) in seen or not signature.linear:
                continue
            stored = [t for t in node.node.inputs if t.name in self.groups.traced.constants]
            lost = any(self.kept.dim(a) is not None for n, a in node.dims.items() if signature.kinds.get(n.split(".")[0]) is not None
                       and signature.kinds[n.split(".")[0]].name == "SUM")  # fmt: skip
            if stored and lost:
                self.skipped[node_name(node.node)] = "its weights are computed from others in a way that can't be inverted"

    # ------------------------------------------------------------------ reading and writing weights

    def array(self, name: str) -> Array:
        """A stored tensor, in float64, as it is now; changes to it are written by `result`."""
        if name not in self.stored:
            held = self.groups.traced.constants[name]
            values = held._values.load() if isinstance(held._values, Weight) else held.values
            self.stored[name] = np.array(values, np.float64)
        return self.stored[name]

    def matrices(self, layer: Layer) -> Array:
        """(parts, outputs, columns) the layer's weight as it is now."""
        return np.asarray(layer.weight.canonical(layer.place.read(self.array(layer.place.name), layer.weight_shape)), np.float64)

    def put(self, layer: Layer, weight: Array, change: Array) -> None:
        """Stores a layer's new weight, and the change (parts, outputs) of its constant."""
        layer.place.write(self.array(layer.place.name), layer.weight.back(weight).reshape(layer.weight_shape))
        offset = self.offsets.of(layer)
        if isinstance(offset, Offset):
            offset.add(self.array(offset.place.name), change)

    # ------------------------------------------------------------------ each layer alone, on dense inputs

    def fit_dense(self, batches: Sequence[Feeds], only: set[str] | None = None) -> None:
        """Fits layers (of weights in `only`) to their dense outputs on dense inputs; weights that are shared, to all readers at once."""
        wanted = [layer for layer in self.layers if only is None or layer.place.name in only]
        waiting: dict[str, list[tuple[Layer, list[tuple[Part, solve.Moments]]]]] = {}
        count = {n: sum(1 for x in wanted if x.place.name == n) for n in {x.place.name for x in wanted}}
        for layer, moments in observe(self.model, self.groups, wanted, batches, count=len(batches), seed=self.seed):
            waiting.setdefault(layer.place.name, []).append((layer, moments))
            if len(waiting[layer.place.name]) == count[layer.place.name]:
                self._fit_together(waiting.pop(layer.place.name))

    def _fit_together(self, same: list[tuple[Layer, list[tuple[Part, solve.Moments]]]]) -> None:
        layer = same[0][0]
        removed, old = layer.removed(self.kept), self.matrices(layer)
        new, changes = old.copy(), [np.zeros(old.shape[:2]) for _ in same]
        left = np.zeros((len(same), 3))
        for number, (part, _) in enumerate(same[0][1]):
            at, lost = part.columns, removed[part.part][part.columns]
            weight = old[part.part][:, at]
            every = [m[number][1] for _, m in same]
            total = sum(m.count for m in every)
            pooled = solve.Moments(total, every[0].mean, np.asarray(sum(m.count / total * m.covariance for m in every)))
            fitted, _ = self._solved(weight, pooled, lost, layer.channels[part.part][at])
            new[part.part][:, at] = fitted
            for i, moments in enumerate(every):
                shift = (weight - fitted) @ moments.mean
                changes[i][part.part] += shift
                nothing = np.zeros(len(weight))
                left[i] += (solve.residual(weight, nothing, solve.drop(weight, lost), nothing, moments),
                            solve.residual(weight, nothing, fitted, shift, moments), _energy(weight, moments))  # fmt: skip
        for i, (each, _) in enumerate(same):
            if i == 0:
                self.put(each, new, changes[0])
            elif isinstance(offset := self.offsets.of(each), Offset):
                offset.add(self.array(offset.place.name), changes[i])
            self._report(each, removed, *left[i])

    def _solved(self, weight: Array, moments: solve.Moments, lost: NDArray[np.bool_], of: NDArray[np.int64]) -> tuple[Array, Array]:
        nothing = np.zeros(len(weight))
        if self.options.method == "bias":
            return solve.bias(weight, nothing, moments, lost)
        if self.options.method == "affine":
            return solve.affine(weight, nothing, moments, lost, np.unique(of, return_inverse=True)[1], self.options.damping)
        return solve.obspa(weight, nothing, moments, lost, self.options.damping)

    def _report(self, layer: Layer, removed: NDArray[np.bool_], before: float, after: float, energy: float) -> None:
        scale = energy or 1.0
        self.reports[layer.name] = LayerRepair(layer.name, int(removed.sum()), int(removed.size), before / scale, after / scale)

    # ------------------------------------------------------------------ all layers in order, on the inputs as they have become

    def walk(self, batches: Sequence[Feeds]) -> None:
        """Runs the dense and the pruned network side by side, layer by layer, and fits each layer (and norm) on the way."""
        if self.options.inputs == "pruned" and self.shared:
            self.fit_dense(batches, self.shared)  # a weight that is read in several places can't wait for the last of them
        small = with_graph(self.model, rewrite(self.model.graph, self.groups, self.gone))
        wide, fed = _wide(self.model, batches)
        thin, _ = _wide(small, batches)
        if wide is self.model:
            wide = with_graph(wide, copy_graph(wide.graph))
        types = {n: 1 if t in (10, 16) else t for n, t in self.groups.traced.facts.types.items()}
        self.cuts = plan_removal(self.groups, self.gone).cuts
        self.thin = thin.graph
        for name in list(self.stored):
            self._push(name)
        layers = {id(layer.node): layer for layer in self.layers}
        norms = {id(node.node): node for node in self.norms}
        with Stepper(wide, types, fed) as dense, Stepper(thin, types, fed) as pruned:
            for node in self.groups.traced.nodes:
                layer, norm = layers.get(id(node.node)), norms.get(id(node.node))
                if layer is not None and self.options.inputs == "pruned" and layer.place.name not in self.shared:
                    self._fit_here(layer, dense.step([layer.data]), pruned.step([layer.data]))
                if norm is not None:
                    value = norm.node.inputs[0].name
                    self._measure(norm, dense.step([value]), pruned.step([value]))

    def _push(self, name: str) -> None:
        """Gives the pruned graph what a stored tensor holds now."""
        values = self.array(name)
        for axis, keep in self.cuts.get(name, {}).items():
            values = np.take(values, keep, axis=axis)
        put(self.thin, name, values)

    def _fit_here(self, layer: Layer, dense: Sequence[Mapping[str, NDArray[Any]]], pruned: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        removed, old = layer.removed(self.kept), self.matrices(layer)
        parts = parts_of(layer)
        grams = [Gram() for _ in parts]
        narrow = old.astype(np.float32)
        for number, (was, now) in enumerate(zip(dense, pruned, strict=True)):
            chosen = draw_rows(layer, was[layer.data].shape, number, 1 / len(dense), self.seed)
            x, thin = rows(layer, was[layer.data], chosen), rows(layer, now[layer.data], chosen)
            for part, gram in zip(parts, grams, strict=True):
                keep = ~removed[part.part]
                whole = np.zeros(layer.columns, np.int64)
                whole[keep] = np.arange(int(keep.sum()))
                here = whole[part.columns[keep[part.columns]]]
                inputs = thin[part.part][:, here]
                weight = narrow[part.part][:, part.columns]
                seen = x[part.part][:, part.columns]
                if self.options.target == "pruned":
                    seen = seen.copy()
                    seen[:, keep[part.columns]] = inputs
                gram.add(inputs, seen @ weight.T)
        new, change = old.copy(), np.zeros(old.shape[:2])
        left = np.zeros(3)
        for part, gram in zip(parts, grams, strict=True):
            lost = removed[part.part][part.columns]
            weight = old[part.part][:, part.columns]
            moments = gram.moments()
            cross, target, variance = gram.target()
            fitted, offset = self._refitted(weight, moments, cross, target, lost, layer.channels[part.part][part.columns])
            new[part.part][:, part.columns] = fitted
            change[part.part] += offset
            left += (_left(solve.drop(weight, lost)[:, ~lost], np.zeros(len(weight)), moments, cross, target, variance),
                     _left(fitted[:, ~lost], offset, moments, cross, target, variance), variance)  # fmt: skip
        self.put(layer, new, change)
        self._push(layer.place.name)
        offset_of = self.offsets.of(layer)
        if isinstance(offset_of, Offset):
            self._push(offset_of.place.name)
        self._report(layer, removed, *left)

    def _refitted(
        self, weight: Array, moments: solve.Moments, cross: Array, target: Array, lost: NDArray[np.bool_], of: NDArray[np.int64]
    ) -> tuple[Array, Array]:
        nothing = np.zeros(len(weight))
        if self.options.method == "obspa":
            return solve.refit(weight, nothing, moments, cross, target, lost, self.options.damping)
        new = solve.drop(weight, lost)
        if self.options.method == "affine":
            new = new.copy()
            new[:, ~lost] = _rescaled(weight[:, ~lost], moments, cross, of[~lost], self.options.damping)
        return new, target - new[:, ~lost] @ moments.mean

    # ------------------------------------------------------------------ norms

    def _measure(self, node: NodeTrace, dense: Sequence[Mapping[str, NDArray[Any]]], pruned: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """New mean and variance: the stored ones, changed as the data's changed from the dense network to the pruned one."""
        assert node.signature is not None
        assert node.signature.moments is not None
        value = node.node.inputs[0].name
        keep = self.kept.site((value, 1))
        was, now = channel_moments([b[value] for b in dense]), channel_moments([b[value] for b in pruned])
        keep = np.ones(len(was[0]), bool) if keep is None else keep
        places = [node.node.inputs[i].name for i in node.signature.moments]
        mean, variance = self.array(places[0]), self.array(places[1])
        mean[keep] += now[0] - was[0][keep]
        dead = was[1][keep] <= 1e-12 * max(float(was[1].mean()), 1e-30)
        variance[keep] *= np.where(dead, 1.0, now[1] / np.where(dead, 1.0, was[1][keep]))
        for name in places:
            self._push(name)
        self.measured += 1

    # ------------------------------------------------------------------ the result

    def result(self) -> Repaired:
        """The dense graph with the new values, in the types of the old ones."""
        graph = copy_graph(self.model.graph)
        for name, values in self.stored.items():
            put(graph, name, values)
        reports = tuple(self.reports.values())
        return Repaired(with_graph(self.model, graph), self.groups, self.gone, reports, self.skipped, self.measured, frozenset(self.stored))


def _with_biases(
    model: Model, groups: Groups, gone: NDArray[np.bool_], options: RepairOptions
) -> tuple[Model, Groups, NDArray[np.bool_], Offsets]:
    """The model with a place for a constant in every layer that will need one, traced again if any were added."""
    offsets, kept = Offsets(groups), Kept(groups, gone)
    missing: dict[str, tuple[int | None, NDArray[Any]]] = {}
    kinds = groups.traced.facts.types
    for layer in find_layers(groups) if options.method != "none" else ():
        found = offsets.of(layer) if layer.removed(kept).any() else None
        if isinstance(found, Missing):
            out = layer.node.outputs[0].name
            missing[out] = found.slot, np.zeros(found.shape, helper.tensor_dtype_to_np_dtype(kinds.get(out) or 1))
    if not missing:
        return model, groups, gone, offsets
    graph = copy_graph(model.graph)
    insert_biases(graph, missing)
    facts = with_new_constants(groups.traced.facts, graph)
    for node in graph.nodes:  # an Add takes over the name of the output before it
        for tensor in node.outputs:
            if tensor.name not in facts.shapes:
                after = node.outputs[0].outputs[0].outputs[0].name
                shapes, types = {**facts.shapes, tensor.name: facts.shapes[after]}, {**facts.types, tensor.name: facts.types[after]}
                dynamic = {**facts.dynamic, tensor.name: facts.dynamic.get(after, ())}
                facts = replace(facts, shapes=shapes, types=types, dynamic=dynamic)
    again = _traced_again(graph, facts, groups)
    moved = _carried(groups, gone, again)
    return with_graph(model, graph), again, moved, Offsets(again)


def _traced_again(graph: gs.Graph, facts: Any, groups: Groups) -> Groups:
    protect = any("--no-protect-outputs" in r.cause for r in groups.traced.reasons)
    stat = not any("--no-stat" in r.cause for r in groups.traced.reasons)
    return find_groups(trace(graph, facts, protect_outputs=protect, stat=stat))


def _carried(groups: Groups, gone: NDArray[np.bool_], again: Groups) -> NDArray[np.bool_]:
    """The same removal in groups that were traced again: they are told by the sites that both have."""
    places = {site: g for g in again.groups for site in g.sites}
    found = np.zeros(again.total, bool)
    for group in groups.groups:
        here = gone[group.coordinates]
        if not here.any():
            continue
        match = next(g for s in group.sites if (g := places.get(s)) is not None and g.size == group.size and g.name == group.name)
        found[match.coordinates] = here
    return found


def _norms(groups: Groups, kept: Kept, layers: Sequence[Layer]) -> list[NodeTrace]:
    """Norms with stored statistics that lose channels, or stand right behind a layer that does."""
    behind = {layer.node.outputs[0].name for layer in layers}
    return [n for n in stored_norms(groups) if n.node.inputs[0].name in behind or kept.site((n.node.inputs[0].name, 1)) is not None]


def _rescaled(weight: Array, moments: solve.Moments, cross: Array, of: NDArray[np.int64], damping: float) -> Array:
    """The weight times one scale a channel, fitted to the target, with ridge towards one."""
    channels, inverse = np.unique(of, return_inverse=True)
    system = (weight.T @ weight) * moments.covariance
    pick = np.zeros((len(inverse), len(channels)))
    pick[np.arange(len(inverse)), inverse] = 1
    matrix = pick.T @ system @ pick
    right = pick.T @ (weight * cross).sum(axis=0)
    step = damping * np.trace(matrix) / len(matrix)
    matrix[np.diag_indices_from(matrix)] += step or 1.0
    scale = 1 + np.linalg.solve(matrix, right - (matrix @ np.ones(len(matrix)) - step))
    return np.asarray(weight * scale[inverse])


def _energy(weight: Array, moments: solve.Moments) -> float:
    return float(((weight @ moments.covariance) * weight).sum())


def _left(weight: Array, offset: Array, moments: solve.Moments, cross: Array, target: Array, variance: float) -> float:
    """Mean of ‖target − W x − b‖² over the rows."""
    shift = target - weight @ moments.mean - offset
    return float(max(variance - 2 * (weight * cross).sum() + ((weight @ moments.covariance) * weight).sum(), 0.0) + shift @ shift)


def _wide(model: Model, batches: Sequence[Feeds]) -> tuple[Model, list[Feeds]]:
    wide = widen(model, {})[0]
    return wide, [{k: v.astype(np.float32) if v.dtype.name in ("float16", "bfloat16") else v for k, v in b.items()} for b in batches]


__all__ = ["DAMPING", "METHODS", "LayerRepair", "RepairOptions", "Repaired", "repair"]
