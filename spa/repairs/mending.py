"""A repair in progress: layers fitted alone or in graph order, norms measured, weights read and written in their stored form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.data.evidence import put, values
from spa.errors import BadOption
from spa.graph.groups import Groups, Kept
from spa.graph.linear import Layer, find_layers
from spa.graph.moved import FOLLOWED
from spa.graph.offsets import Offset, Offsets
from spa.graph.trace import node_name
from spa.plans.rewrite import copy_graph, narrowed_inputs, plan_removal, rewrite
from spa.proof.feeds import Feeds
from spa.proof.widen import widen
from spa.repairs import solve
from spa.repairs.renorm import Batches, Norms
from spa.repairs.repair_options import LayerRepair, Repaired, RepairOptions
from spa.repairs.room import with_room
from spa.signatures import SUM
from spa.signatures.table import dims_of, kind_of
from spa.statistics.closed_form import bias_moments, closed_form
from spa.statistics.observe import Gram, Part, draw_rows, observe, parts_of
from spa.statistics.rows import rows
from spa.statistics.stepper import Stepper
from spa.storage.store import Model, with_graph

Array = NDArray[np.float64]

COMPUTED = "its weights are computed from others in a way that can't be inverted"
UNSEEN = "what these weights are multiplied with is not a value of the graph (a hidden state, a sampled window)"


class Work:
    """A repair in progress: the dense weights as they become, and the pruned graph that is run with them."""

    def __init__(self, model: Model, groups: Groups, gone: NDArray[np.bool_], options: RepairOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self.fits = options.method not in ("none", "fold")
        self.model, self.groups, self.gone = with_room(model, groups, gone) if self.fits else (model, groups, gone)
        self.offsets = Offsets(self.groups)
        self.start = self.model  # the weights to begin with: the dense ones, unless something was done to them before
        self.kept = Kept(self.groups, self.gone)
        self.layers: list[Layer] = []
        self.skipped: dict[str, str] = {}
        shared: dict[tuple[str, bytes], int] = {}
        self.every = list(find_layers(self.groups))
        for layer in self.every:
            if layer.removed(self.kept).any():
                self.layers.append(layer)
                shared[_elements(layer)] = shared.get(_elements(layer), 0) + 1
        self.shared = {n for n, count in shared.items() if count > 1}
        self.tied = _tied(self.groups, {layer.place.name for layer in self.layers}) if self.fits else {}
        self.norms = Norms(self, self.layers, options.norms)
        self.stored: dict[str, Array] = {}
        self.reports: dict[str, LayerRepair] = {}
        self.few: dict[str, None] = {}
        self._note_skipped()

    def _note_skipped(self) -> None:
        """Sums over removed channels with stored weights that no layer stands for: they were only cut, and it is said why."""
        covered = {id(layer.node): {n for t in layer.data_terms or () for n in dims_of(t)} for layer in self.every}
        known = set(self.groups.traced.constants)
        for node in self.groups.traced.nodes:
            reads = [t.name for t in node.node.inputs if t.name]
            if reads and known.issuperset(reads):
                known.update(t.name for t in node.node.outputs)
                continue
            signature = node.signature
            if signature is None:
                continue
            lost = {n for n, a in node.dims.items() if kind_of(signature, n) is SUM and self.kept.dim(a) is not None}
            operands = [o for t, o in zip(node.node.inputs, signature.inputs, strict=False) if t.name in known]
            weights = {n for o in operands for x in o or () for n in dims_of(x)}
            if (lost & weights) - covered.get(id(node.node), set()):
                hidden = id(node.node) in covered or not signature.linear
                self.skipped[node_name(node.node)] = UNSEEN if hidden else COMPUTED

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
        if layer.place.name not in self.tied:
            layer.place.write(self.array(layer.place.name), layer.weight.back(weight).reshape(layer.weight_shape))
        offset = self.offsets.of(layer)
        if isinstance(offset, Offset):
            offset.add(self.array(offset.place.name), change)

    # ------------------------------------------------------------------ without data

    def fit_closed(self) -> None:
        """Gives constants what removed channels had in the mean, as far as the norms before them tell it (`spa.statistics.closed_form`)."""
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
            if pooled.count < len(at):
                self.few[layer.name] = None
            fitted, _ = self._solved(self._method(layer), weight, pooled, lost, layer.channels[part.part][at])
            new[part.part][:, at] = fitted
            for i, moments in enumerate(every):
                shift = (weight - fitted) @ moments.mean
                changes[i][part.part] += shift
                nothing = np.zeros(len(weight))
                left[i] += (solve.residual(weight, nothing, solve.drop(weight, lost), nothing, moments),
                            solve.residual(weight, nothing, fitted, shift, moments), solve.energy(weight, moments))  # fmt: skip
        for i, (each, _) in enumerate(same):
            if i == 0:
                self.put(each, new, changes[0])
            elif isinstance(offset := self.offsets.of(each), Offset):
                offset.add(self.array(offset.place.name), changes[i])
            self._report(each, removed, *left[i])

    def _method(self, layer: Layer) -> str:
        """How a layer is fitted: a weight that something else reads too stays as it is, and the constant takes what it can."""
        if layer.place.name not in self.tied:
            return self.options.method
        self.skipped[layer.name] = f"{self.tied[layer.place.name]} reads its weight too: only its constant was fitted"
        return "bias"

    def _solved(
        self, method: str, weight: Array, moments: solve.Moments, lost: NDArray[np.bool_], of: NDArray[np.int64]
    ) -> tuple[Array, Array]:
        nothing = np.zeros(len(weight))
        if method == "bias":
            return solve.bias(weight, nothing, moments, lost)
        if method == "affine":
            return solve.affine(weight, nothing, moments, lost, np.unique(of, return_inverse=True)[1], self.options.damping)
        return solve.obspa(weight, nothing, moments, lost, self.options.damping)

    def _report(self, layer: Layer, removed: NDArray[np.bool_], before: float, after: float, energy: float) -> None:
        scale = energy or 1.0
        self.reports[layer.name] = LayerRepair(layer.name, int(removed.sum()), int(removed.size), before / scale, after / scale)

    # ------------------------------------------------------------------ all layers in order, on the inputs as they have become

    def walk(self, batches: Sequence[Feeds]) -> None:
        """Runs the dense and the pruned network side by side, layer by layer, and fits each layer (and norm) on the way."""
        if self.fits and self.options.inputs == "pruned" and self.shared:
            self.fit_dense(batches, self.shared)  # a weight that is read in several places can't wait for the last of them
        small = with_graph(self.start, rewrite(self.start.graph, self.groups, self.gone))
        small = replace(small, narrowed=narrowed_inputs(self.groups, self.gone))
        wide, fed = _wide(self.model, batches)
        thin, _ = _wide(small, batches)
        if wide is self.model:
            wide = with_graph(wide, copy_graph(wide.graph))
        types = {n: 1 if t in (10, 16) else t for n, t in self.groups.traced.facts.types.items()}
        self.cuts = plan_removal(self.groups, self.gone).cuts
        self.wide, self.thin, self.types = wide.graph, thin.graph, types
        for name in list(self.stored):
            self.push(name)
        layers = {id(layer.node): layer for layer in self.layers}
        with Stepper(wide, types, fed) as dense, Stepper(thin, types, fed) as pruned:
            for node in self.groups.traced.nodes:
                layer, norm = layers.get(id(node.node)), self.norms.norms.get(id(node.node))
                if layer is not None and self.fits and self.options.inputs == "pruned" and _elements(layer) not in self.shared:
                    self._fit_here(layer, dense.step([layer.data]), pruned.step([layer.data]))
                if norm is not None:
                    value = norm.node.inputs[0].name
                    self.norms.measure(norm, dense.step([value]), pruned.step([value]))
                if id(node.node) in self.norms.scales:
                    read = [t.name for t in node.node.inputs if t.name and t.name not in self.groups.traced.constants]
                    self.norms.rescale(node, dense.step(read), pruned.step(read))

    def push(self, name: str) -> None:
        """Gives the pruned graph what a stored tensor holds now."""
        kept = self.array(name)
        for axis, keep in self.cuts.get(name, {}).items():
            kept = np.take(kept, keep, axis=axis)
        put(self.thin, name, kept)

    def _fit_here(self, layer: Layer, dense: Batches, pruned: Batches) -> None:
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
            if moments.count < len(moments.mean):
                self.few[layer.name] = None
            of = layer.channels[part.part][part.columns]
            fitted, offset = self._refitted(self._method(layer), weight, moments, cross, target, lost, of)
            new[part.part][:, part.columns] = fitted
            change[part.part] += offset
            left += (solve.left(solve.drop(weight, lost)[:, ~lost], np.zeros(len(weight)), moments, cross, target, variance),
                     solve.left(fitted[:, ~lost], offset, moments, cross, target, variance), variance)  # fmt: skip
        self.put(layer, new, change)
        if layer.place.name not in self.tied:
            self.push(layer.place.name)
        offset_of = self.offsets.of(layer)
        if isinstance(offset_of, Offset):
            self.push(offset_of.place.name)
        self._report(layer, removed, *left)

    def _refitted(
        self, method: str, weight: Array, moments: solve.Moments, cross: Array, target: Array, lost: NDArray[np.bool_],
        of: NDArray[np.int64],
    ) -> tuple[Array, Array]:
        nothing = np.zeros(len(weight))
        if method == "obspa":
            return solve.refit(weight, nothing, moments, cross, target, lost, self.options.damping)
        new = solve.drop(weight, lost)
        if method == "affine":
            new = new.copy()
            new[:, ~lost] = solve.rescale(weight[:, ~lost], moments, cross, of[~lost], self.options.damping)
        return new, target - new[:, ~lost] @ moments.mean

    # ------------------------------------------------------------------ the result

    def result(self) -> Repaired:
        """The dense graph with the new values, in the types of the old ones."""
        graph = copy_graph(self.start.graph)
        for name, array in self.stored.items():
            put(graph, name, array)
        model, reports = with_graph(self.model, graph), tuple(self.reports.values())
        return Repaired(model, self.groups, self.gone, reports, self.skipped, self.norms.measured, frozenset(self.stored), tuple(self.few))


def _elements(layer: Layer) -> tuple[str, bytes]:
    """Equal for layers that read the same elements of a stored tensor."""
    return layer.place.name, b"" if layer.place.index is None else layer.place.index.tobytes()


def _wide(model: Model, batches: Sequence[Feeds]) -> tuple[Model, list[Feeds]]:
    wide = widen(model, {})[0]
    return wide, [{k: v.astype(np.float32) if v.dtype.name in ("float16", "bfloat16") else v for k, v in b.items()} for b in batches]


def _tied(groups: Groups, names: set[str]) -> dict[str, str]:
    """Stored weights of layers that other nodes read as well, each with one of these: a table of embeddings that is the head too."""
    layers = {(id(x.node), x.place.name) for x in find_layers(groups)}
    holds = {name: name for name in names}
    found: dict[str, str] = {}
    for node in groups.traced.nodes:
        for tensor in node.node.inputs:
            source = holds.get(tensor.name)
            if source is None or (id(node.node), source) in layers:
                continue
            if node.node.op in FOLLOWED and not node.node.domain and tensor.name == node.node.inputs[0].name and _moves(groups, node.node):
                holds.update({t.name: source for t in node.node.outputs})
            else:
                found.setdefault(source, node_name(node.node))
    return found


def _moves(groups: Groups, node: gs.Node) -> bool:
    """Whether a node only moves its first operand's elements in a way that is known beforehand."""
    return all(not t.name or t.name in groups.traced.facts.values for t in node.inputs[1:])
