"""Repair: what removed channels told the layers that read them is taken over by the channels that stay, in closed form.

    dense graph, plan, calibration --repair--> the dense graph with other weights --rewrite--> the pruned graph

Only weights that lose columns, their constants, and the statistics of norms behind them change; the deletion itself is that of the
plan. The repaired dense graph is a model of its own: another tool, or `spa apply --other-weights`, can cut it.

Every layer is fitted in graph order (`spa.solve`). Its inputs are those of the network as pruned and repaired up to there, its target
what the dense layer gave on the same data (`inputs="pruned"`, `target="dense"`; Kwon et al. 2022, OSSCAR's `fullseq`), so that a
layer also makes good what its predecessors could not. `inputs="dense"` fits each layer alone, in one stream over the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from passes import insert_biases
from spa import solve
from spa.check import session
from spa.closed_form import bias_moments, closed_form
from spa.errors import BadOption
from spa.evidence import channel_moments, put, stored_norms, values
from spa.feeds import Feeds
from spa.fold import fold
from spa.groups import Group, Groups, Kept, find_groups
from spa.linear import Layer, find_layers
from spa.observe import Gram, Part, draw_rows, observe, parts_of
from spa.offsets import Missing, Offset, Offsets
from spa.rewrite import copy_graph, plan_removal, rewrite
from spa.rows import rows
from spa.shapes import with_new_constants
from spa.stepper import Stepper, tapped
from spa.store import Model, with_graph
from spa.trace import NodeTrace, node_name, trace
from spa.widen import widen

Array = NDArray[np.float64]

METHODS = ("none", "bias", "affine", "obspa", "fold")
DAMPING = 0.01


@dataclass(frozen=True)
class RepairOptions:
    """How to repair.

    method: what may change: nothing, the constant (bias), one scale a channel too (affine), all weights (obspa). "fold" needs no data:
    removed channels are merged into the kept ones that are most like them (`spa.fold`), and data only serve to measure norms again.
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
    if chosen.method == "fold":
        return _folded(model, groups, gone, batches, chosen, seed)
    work = _Work(model, groups, gone, chosen, seed)
    if not batches and chosen.method != "none":
        work.fit_closed()
    elif chosen.method != "none":
        if chosen.inputs == "dense":
            work.fit_dense(batches)
        if chosen.inputs == "pruned" or work.norms or work.scales:
            work.walk(batches)
    return work.result()


def _folded(
    model: Model, groups: Groups, gone: NDArray[np.bool_], batches: Sequence[Feeds], options: RepairOptions, seed: int
) -> Repaired:
    """Merges instead of dropping; with data, the norms are measured again, else corrected from the weights alone."""
    measure = bool(batches) and options.norms
    found = fold(model, groups, gone, variance=not measure)
    if not measure:
        return Repaired(found.model, groups, gone, (), found.skipped, found.variances, found.changed)
    work = _Work(model, groups, gone, options, seed)
    work.start = found.model
    work.walk(batches)
    done = work.result()
    return replace(done, skipped=found.skipped, changed=done.changed | found.changed)


class _Work:
    def __init__(self, model: Model, groups: Groups, gone: NDArray[np.bool_], options: RepairOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self.model, self.groups, self.gone, self.offsets = _with_biases(model, groups, gone, options)
        self.start = self.model  # the weights to begin with: the dense ones, unless something was done to them before
        self.kept = Kept(self.groups, self.gone)
        self.layers: list[Layer] = []
        self.skipped: dict[str, str] = {}
        shared: dict[tuple[str, bytes], int] = {}
        for layer in find_layers(self.groups):
            if layer.removed(self.kept).any():
                self.layers.append(layer)
                shared[_elements(layer)] = shared.get(_elements(layer), 0) + 1
        self.shared = {n for n, count in shared.items() if count > 1}
        self.norms = _norms(self.groups, self.kept, self.layers) if options.norms else []
        self.scales = _scales(self.groups, self.kept) if options.norms else []
        self.stored: dict[str, Array] = {}
        self.reports: dict[str, LayerRepair] = {}
        self.measured = 0
        self._note_skipped()

    def _note_skipped(self) -> None:
        """Sums over removed channels that are not among the layers."""
        seen = {id(layer.node) for layer in self.layers}
        known = set(self.groups.traced.constants)
        for node in self.groups.traced.nodes:
            reads = [t.name for t in node.node.inputs if t.name]
            if reads and known.issuperset(reads):
                known.update(t.name for t in node.node.outputs)
        for node in self.groups.traced.nodes:
            signature = node.signature
            if signature is None or id(node.node) in seen or not signature.linear:
                continue
            stored = [t for t in node.node.inputs if t.name in known]
            lost = any(self.kept.dim(a) is not None for n, a in node.dims.items() if signature.kinds.get(n.split(".")[0]) is not None
                       and signature.kinds[n.split(".")[0]].name == "SUM")  # fmt: skip
            if stored and lost:
                self.skipped[node_name(node.node)] = "its weights are computed from others in a way that can't be inverted"

    # ------------------------------------------------------------------ reading and writing weights

    def array(self, name: str) -> Array:
        """A stored tensor, in float64, as it is now; changes to it are written by `result`."""
        if name not in self.stored:
            self.stored[name] = values(self.start.graph, name)
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

    # ------------------------------------------------------------------ without data

    def fit_closed(self) -> None:
        """Gives constants what removed channels had in the mean, as far as the norms before them tell it (`spa.closed_form`)."""
        if self.options.method != "bias":
            raise BadOption(f"--repair {self.options.method} needs data; means alone, as the norms tell them, are for --repair bias.")
        found = closed_form(self.groups)
        for layer in self.layers:
            told = bias_moments(self.groups, layer, found)
            if told is None:
                self.skipped[layer.name] = "no norm tells the mean of its inputs"
                continue
            removed, weight = layer.removed(self.kept), self.matrices(layer)
            mean, variance = (np.where(removed, m, 0.0) for m in told)
            change = np.einsum("pod,pd->po", weight, mean)
            lost = float((weight**2 * variance[:, None]).sum())
            energy = float((weight**2 * told[1][:, None]).sum())
            self.put(layer, np.where(removed[:, None], 0.0, weight), change)
            self._report(layer, removed, lost + float((change**2).sum()), lost, energy)

    # ------------------------------------------------------------------ each layer alone, on dense inputs

    def fit_dense(self, batches: Sequence[Feeds], only: set[tuple[str, bytes]] | None = None) -> None:
        """Fits layers (of weights in `only`) to their dense outputs on dense inputs; weights that are shared, to all readers at once."""
        wanted = [layer for layer in self.layers if only is None or _elements(layer) in only]
        waiting: dict[tuple[str, bytes], list[tuple[Layer, list[tuple[Part, solve.Moments]]]]] = {}
        count = Counter(map(_elements, wanted))
        for layer, moments in observe(self.model, self.groups, wanted, batches, count=len(batches), seed=self.seed):
            key = _elements(layer)
            waiting.setdefault(key, []).append((layer, moments))
            if len(waiting[key]) == count[key]:
                self._fit_together(waiting.pop(key))

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
        self.fits = self.options.method != "fold"
        if self.fits and self.options.inputs == "pruned" and self.shared:
            self.fit_dense(batches, self.shared)  # a weight that is read in several places can't wait for the last of them
        small = with_graph(self.start, rewrite(self.start.graph, self.groups, self.gone))
        wide, fed = _wide(self.model, batches)
        thin, _ = _wide(small, batches)
        if wide is self.model:
            wide = with_graph(wide, copy_graph(wide.graph))
        types = {n: 1 if t in (10, 16) else t for n, t in self.groups.traced.facts.types.items()}
        self.cuts = plan_removal(self.groups, self.gone).cuts
        self.wide, self.thin, self.types = wide.graph, thin.graph, types
        self.sessions: dict[tuple[int, str], Any] = {}
        for name in list(self.stored):
            self._push(name)
        layers = {id(layer.node): layer for layer in self.layers}
        norms = {id(node.node): node for node in self.norms}
        scales = {id(node.node): node for node in self.scales}
        with Stepper(wide, types, fed) as dense, Stepper(thin, types, fed) as pruned:
            for node in self.groups.traced.nodes:
                layer, norm = layers.get(id(node.node)), norms.get(id(node.node))
                if layer is not None and self.fits and self.options.inputs == "pruned" and _elements(layer) not in self.shared:
                    self._fit_here(layer, dense.step([layer.data]), pruned.step([layer.data]))
                if norm is not None:
                    value = norm.node.inputs[0].name
                    self._measure(norm, dense.step([value]), pruned.step([value]))
                if id(node.node) in scales:
                    read = [t.name for t in node.node.inputs if t.name and t.name not in self.groups.traced.constants]
                    self._rescale(node, dense.step(read), pruned.step(read))

    def _push(self, name: str) -> None:
        """Gives the pruned graph what a stored tensor holds now."""
        kept = self.array(name)
        for axis, keep in self.cuts.get(name, {}).items():
            kept = np.take(kept, keep, axis=axis)
        put(self.thin, name, kept)

    def _fit_here(self, layer: Layer, dense: Sequence[Mapping[str, NDArray[Any]]], pruned: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        removed, old = layer.removed(self.kept), self.matrices(layer)
        there = ~layer.parts_gone(self.kept)
        at = np.cumsum(there) - 1
        parts = [p for p in parts_of(layer) if there[p.part]]
        grams = [Gram() for _ in parts]
        narrow = old.astype(np.float32)
        for number, (was, now) in enumerate(zip(dense, pruned, strict=True)):
            chosen = draw_rows(layer, was[layer.data].shape, number, 1 / len(dense), self.seed)
            x, thin = rows(layer, was[layer.data], chosen), rows(layer, now[layer.data], chosen, int(there.sum()))
            for part, gram in zip(parts, grams, strict=True):
                keep = ~removed[part.part]
                whole = np.zeros(layer.columns, np.int64)
                whole[keep] = np.arange(int(keep.sum()))
                here = whole[part.columns[keep[part.columns]]]
                inputs = thin[at[part.part]][:, here]
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
        mean[keep] = values(self.model.graph, places[0])[keep] + now[0] - was[0][keep]  # a constant put here is not in `now`
        dead = was[1][keep] <= 1e-12 * max(float(was[1].mean()), 1e-30)
        variance[keep] *= np.where(dead, 1.0, now[1] / np.where(dead, 1.0, was[1][keep]))
        for name in places:
            self._push(name)
        self.measured += 1

    def _rescale(self, node: NodeTrace, dense: Sequence[Mapping[str, NDArray[Any]]], pruned: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """New scale and bias of a normalisation over channels, some of which went: each channel gets its old mean and deviation back.

        out <- (out - mean of pruned) · deviation of dense / deviation of pruned + mean of dense (OBC's statistics correction, spa.md §5.1).
        Without a bias (RMSNorm) the root mean squares are matched.
        """
        assert node.signature is not None
        assert node.signature.affine is not None
        out = node.node.outputs[0].name
        keep = self.kept.site((out, len(self.groups.traced.facts.shapes[out] or ()) - 1))
        was = _last_moments(self._alone(self.wide, node, b) for b in dense)
        now = _last_moments(self._alone(self.thin, node, b) for b in pruned)
        keep = np.ones(len(was[0]), bool) if keep is None else keep
        mean, deviation = was[0][keep], np.sqrt(was[1][keep])
        places = [node.node.inputs[i].name for i in node.signature.affine if i is not None]
        if len(places) == 1:
            ratio = np.sqrt((was[1][keep] + mean**2) / np.maximum(now[1] + now[0] ** 2, 1e-30))
        else:
            ratio = deviation / np.sqrt(np.maximum(now[1], 1e-30))
        ratio = np.where(np.isfinite(ratio) & (now[1] > 1e-12 * max(float(now[1].mean()), 1e-30)), ratio, 1.0)
        self.array(places[0])[keep] *= ratio
        if len(places) == 2:
            bias = self.array(places[1])
            bias[keep] = (bias[keep] - now[0]) * ratio + mean
        for name in places:
            self._push(name)
        self.measured += 1

    def _alone(self, graph: gs.Graph, node: NodeTrace, values_: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The output of one node."""
        out = node.node.outputs[0].name
        key = id(graph), out
        if key not in self.sessions:
            self.sessions[key] = session(tapped(self.model, graph, sorted(values_), [out], self.types), threads=1)
        return np.asarray(self.sessions[key].run([out], dict(values_))[0])

    # ------------------------------------------------------------------ the result

    def result(self) -> Repaired:
        """The dense graph with the new values, in the types of the old ones."""
        graph = copy_graph(self.start.graph)
        for name, array in self.stored.items():
            put(graph, name, array)
        reports = tuple(self.reports.values())
        return Repaired(with_graph(self.model, graph), self.groups, self.gone, reports, self.skipped, self.measured, frozenset(self.stored))


def _with_biases(
    model: Model, groups: Groups, gone: NDArray[np.bool_], options: RepairOptions
) -> tuple[Model, Groups, NDArray[np.bool_], Offsets]:
    """The model with a place for a constant in every layer that will need one, traced again if any were added."""
    offsets, kept = Offsets(groups), Kept(groups, gone)
    missing: dict[str, tuple[int | None, NDArray[Any]]] = {}
    kinds = groups.traced.facts.types
    for layer in find_layers(groups) if options.method not in ("none", "fold") else ():
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
    places: dict[tuple[str, int], list[Group]] = {}
    for g in again.groups:
        for site in g.sites:
            places.setdefault(site, []).append(g)
    found = np.zeros(again.total, bool)
    for group in groups.groups:
        here = gone[group.coordinates]
        if not here.any():
            continue
        match = next(g for s in group.sites for g in places.get(s, ()) if g.size == group.size and g.name == group.name)
        found[match.coordinates] = here
    return found


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


def _elements(layer: Layer) -> tuple[str, bytes]:
    """Equal for layers that read the same elements of a stored tensor."""
    return layer.place.name, b"" if layer.place.index is None else layer.place.index.tobytes()


def _rescaled(weight: Array, moments: solve.Moments, cross: Array, of: NDArray[np.int64], damping: float) -> Array:
    """The weight times one scale a channel, fitted to the target, with ridge towards one."""
    channels, inverse = np.unique(of, return_inverse=True)
    system = (weight.T @ weight) * moments.covariance
    pick = np.zeros((len(inverse), len(channels)))
    pick[np.arange(len(inverse)), inverse] = 1
    matrix = pick.T @ system @ pick
    right = pick.T @ (weight * cross).sum(axis=0)
    lower, _ = solve.factor(matrix, damping)
    wanted = np.where(solve.dead(matrix), 0.0, right - matrix.sum(axis=1))
    scale = 1 + solve.backward(lower, solve.forward(lower, wanted[:, None]))[:, 0]
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
