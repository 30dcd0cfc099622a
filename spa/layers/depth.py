"""Depth: which sub-layers or blocks go. Each method scores or searches; the removal itself is an edit (`spa.plans.edits`).

    analysis --sub_layers--> candidates --METHODS[method]--> Dropped: edits, and what each candidate scored

A candidate is one sub-layer, or with `kind="block"` all sub-layers of a block. Scores are importances: the least important go first.
Data that a method looks at are the calibration data; labels only where it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.budgets.metrics import METRICS, class_rows, log_probabilities
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.graph.analysis import Analysis, analyze, moved
from spa.graph.explain import near
from spa.graph.parting import edits_for, parted
from spa.layers.gates import Gated, Observer, Unit, channel_axis, rows
from spa.layers.sublayers import ATTENTION, BRANCH, MLP, NEST, SubLayer, SubLayers, sub_layers
from spa.plans.choose import matches
from spa.plans.edits import Edit
from spa.proof.feeds import Feeds
from spa.stages import Stage, quiet

Array = NDArray[np.float64]
BLOCK, ANY = "block", "any"
BALANCE = "balance"  # how many go follows from the budget, see `spa.layers.depth_budget.balanced`
PARTS = 16  # that a network is cut into for a greedy search
CHOICES = (ANY, ATTENTION, MLP, BRANCH, BLOCK)


@dataclass(frozen=True)
class Depth:
    """What is asked for.

    drop: how many go: a number, a share between 0 and 1, `BALANCE`, or names and globs of sub-layers, which need no method. method: one
    of `METHODS`. kind: which candidates there are: attention, mlp, branch, any (ranked together), or block. spare: share of the candidates,
    from the first on, that stay (FinerCut's recipe for large models spares 0.4). distance: of outputs, for finercut: js or error.
    """

    drop: float | Sequence[str]
    method: str = "finercut"
    kind: str = ANY
    spare: float = 0.0
    distance: str = "js"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            choice = ", ".join(METHODS)
            raise BadOption(f"--layers: there is no method {self.method!r}{near(self.method, METHODS)}; the choice is: {choice}.")
        if self.kind not in CHOICES:
            raise BadOption(f"--layer-kind is {self.kind!r}, but must be one of {', '.join(CHOICES)}.")
        if self.distance not in DISTANCES:
            raise BadOption(f"The distance of outputs is {self.distance!r}, but must be one of {', '.join(DISTANCES)}.")
        if not 0 <= self.spare < 1:
            raise BadOption(f"The share of layers that are spared is {self.spare}, but must be 0 or more and below 1.")
        if isinstance(self.drop, int | float) and not (self.drop > 0 and (self.drop < 1 or self.drop == int(self.drop))):
            raise BadOption(f"--drop-layers is {self.drop:g}, but must be a number of layers, a share between 0 and 1, or names.")

    def count(self, candidates: int) -> int:
        """How many of the candidates go. Raises BadOption where there are too few."""
        assert isinstance(self.drop, int | float)
        wanted = max(1, round(self.drop * candidates)) if self.drop < 1 else int(self.drop)
        if wanted >= candidates + (self.kind in (ATTENTION, MLP)):
            raise BadOption(f"--drop-layers asks for {wanted} of {candidates} candidates of the kind {self.kind!r}; ask for fewer.")
        return wanted


@dataclass(frozen=True)
class Candidate:
    """What goes as one: a sub-layer, or those of a block."""

    name: str
    layers: tuple[SubLayer, ...]

    @property
    def before(self) -> str:
        """The value that flows past it."""
        return self.layers[0].trunk

    @property
    def after(self) -> str:
        """The sum behind it."""
        return self.layers[-1].total


@dataclass(frozen=True)
class Dropped:
    """What goes. scores: candidate -> importance, as the method saw it when it dropped the candidate, or at the end.

    layers: in order of the graph. order: names of the candidates, in the order in which they went.
    """

    layers: tuple[SubLayer, ...]
    order: tuple[str, ...]
    scores: Mapping[str, float]
    edits: tuple[Edit, ...]
    depth: Depth

    @property
    def record(self) -> dict[str, Any]:
        """As a plan holds it."""
        gone = [{"name": s.name, "kind": s.kind, "block": s.block, "parameters": s.parameters, "macs": s.macs} for s in self.layers]
        asked = {"drop": self.depth.drop, "method": self.depth.method, "kind": self.depth.kind, "spare": self.depth.spare}
        return {**asked, "dropped": gone, "order": list(self.order), "scores": dict(self.scores)}


@dataclass(frozen=True)
class Search:
    """What a method is told. candidates: in order of the graph, spared ones left out. everything: spared ones too."""

    analysis: Analysis
    found: SubLayers
    candidates: tuple[Candidate, ...]
    everything: tuple[Candidate, ...]
    count: int
    depth: Depth
    batches: Sequence[Feeds]
    labels: str | None
    seed: int

    def inputs(self) -> list[Feeds]:
        """The batches without labels."""
        return [{k: v for k, v in b.items() if k != self.labels} for b in self.batches]

    def rows(self, found: Feeds, value: str) -> Array:
        """A value that was observed as (positions, channels)."""
        return rows(found[value], channel_axis(self.analysis.groups.traced, value))


Method = Callable[[Search], tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]]
"""What goes, the scores, and edits that come before the removal."""


def candidates_of(found: SubLayers, kind: str) -> tuple[Candidate, ...]:
    """Candidates of a kind. Raises BadOption where there are none."""
    if kind == BLOCK:
        made = [Candidate(f"block {blocks[0].block}", blocks) for blocks in found.blocks() if blocks[0].kind != NEST]
    else:
        made = [Candidate(s.name, (s,)) for s in found.layers if s.kind != NEST and kind in (ANY, s.kind)]
    if not made:
        kinds = sorted({s.kind for s in found.layers})
        nothing = "it has no residual sum of equal shapes with weights in a branch"
        has = f"it has those of the kinds {', '.join(kinds)}" if kinds else nothing
        raise BadOption(f"There are no layers of the kind {kind!r} to drop in this model: {has}.")
    return tuple(made)


def choose_layers(
    analysis: Analysis, depth: Depth, evidence: Evidence | None, *, seed: int = 0, more: Dropped | None = None, stage: Stage = quiet
) -> Dropped:
    """Decides which layers go. more: what went when the same was asked for a larger number, which spares the search.

    Raises BadOption for what can't be had: too many layers, names that do not exist, methods without data.
    """
    analysis = parted(analysis, stage=stage)
    found = sub_layers(analysis.groups)
    if not isinstance(depth.drop, int | float):
        return _named(analysis, found, depth)
    everything = candidates_of(found, BLOCK if depth.method in OF_BLOCKS else depth.kind)
    candidates = everything[round(depth.spare * len(everything)) :]
    search = Search(analysis, found, candidates, everything, depth.count(len(candidates)), depth, evidence.batches if evidence else (),
                    evidence.labels if evidence else None, seed)  # fmt: skip
    if not search.batches and depth.method not in WITHOUT_DATA:
        raise BadOption(f"--layers {depth.method} looks at what the layers do to data: give some with --calibration, or take random.")
    edits: tuple[Edit, ...] = ()
    if more is not None and depth.method not in WHOLE and len(more.order) >= search.count:
        named = {c.name: c for c in candidates}
        chosen, scores = [named[n] for n in more.order[: search.count]], dict(more.scores)
    else:
        with stage("choosing layers"):
            chosen, scores, edits = METHODS[depth.method](search)
    layers = tuple(s for s in found.layers if any(s in c.layers for c in chosen))
    return Dropped(layers, tuple(c.name for c in chosen), scores, (*edits_for(analysis, found, layers, whole=bool(edits)), *edits), depth)


def _named(analysis: Analysis, found: SubLayers, depth: Depth) -> Dropped:
    patterns = list(depth.drop) if isinstance(depth.drop, Sequence) else []
    for pattern in patterns:
        if not any(matches([pattern], [s.name, s.branch]) for s in found.layers):
            names = [s.name for s in found.layers]
            raise BadOption(f"--drop-layers: there is no layer {pattern!r}{near(pattern, names)}; `spa inspect --layers` lists them.")
    layers = tuple(s for s in found.layers if matches(patterns, [s.name, s.branch]))
    return Dropped(layers, tuple(s.name for s in layers), {}, edits_for(analysis, found, layers), depth)


def without_layers(
    analysis: Analysis, depth: Depth, evidence: Evidence | None, *, seed: int = 0, stage: Stage = quiet
) -> tuple[Analysis, Evidence | None, Dropped]:
    """The model without the layers that go, and the data as they are used on it."""
    dropped = choose_layers(analysis, depth, evidence, seed=seed, stage=stage)
    return *left_by(analysis, dropped, evidence, stage=stage), dropped


def left_by(
    analysis: Analysis, dropped: Dropped, evidence: Evidence | None, *, stage: Stage = quiet
) -> tuple[Analysis, Evidence | None]:
    """The model without layers that were chosen, and the data as they are used on it."""
    small = analyze(analysis.given, **{**analysis.settings, "edits": (*analysis.edits, *dropped.edits)}, stage=stage)
    return small, moved(evidence, small)


# ---------------------------------------------------------------------- methods


def js_divergence(dense: Array) -> Callable[[Array], float]:
    """Of logits (rows, classes) from the dense ones: mean over rows of ½[KL(M‖P) + KL(M‖Q)], M = (P + Q) / 2.

    FinerCut (arXiv 2405.18218), as its code has it; log P and P are kept, and Q costs one exponential.
    """
    log_p = log_probabilities(dense)
    p = np.exp(log_p)

    def distance(found: Array) -> float:
        log_q = log_probabilities(found)
        middle = (p + np.exp(log_q)) / 2
        terms = middle * (np.log(np.maximum(middle, 1e-30)) - (log_p + log_q) / 2)
        return float(terms.sum(dtype=np.float64) / len(p))

    return distance


def squared_error(dense: Array) -> Callable[[Array], float]:
    """Squared distance from the dense outputs over their squared norm."""
    return lambda found: float(((found - dense) ** 2).sum() / max(float((dense**2).sum()), 1e-30))


DISTANCES: Mapping[str, Callable[[Array], Callable[[Array], float]]] = {"js": js_divergence, "error": squared_error}


def finercut(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """FinerCut (arXiv 2405.18218): greedily, the sub-layer goes without which the outputs are nearest to the dense network's.

    l* = argmin_l D(f(x), f_{−(S ∪ l)}(x)), S ← S ∪ {l*}, with D the Jensen–Shannon divergence of the predicted distributions.
    """
    inputs = search.inputs()
    distance = DISTANCES[search.depth.distance]
    network = _network(search)
    output = network.outputs[0]
    dense = [class_rows(network.run(b)[output].astype(np.float32)) for b in inputs]
    weights = [len(d) for d in dense]
    measures = [distance(d) for d in dense]

    def cost(outputs: Sequence[Feeds]) -> float:
        found = [m(class_rows(o[output].astype(np.float32))) for m, o in zip(measures, outputs, strict=True)]
        return float(np.average(found, weights=weights))

    return _greedy(search, network, cost)


def two_ssp(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """Second stage of 2SSP (arXiv 2501.17771): greedily, the layer goes without which the loss on the data is least; needs labels."""
    if search.labels is None:
        raise BadOption("--layers 2ssp goes by the loss: name the entry of the data that holds labels with --labels, or take finercut.")
    batch = METRICS["perplexity"].batch
    assert batch is not None
    network, loss = _network(search), batch
    output = network.outputs[0]

    def cost(outputs: Sequence[Feeds]) -> float:
        parts = []
        for found, full in zip(outputs, search.batches, strict=True):
            logits = found[output].astype(np.float64)
            parts.append(loss(logits, logits, full[str(search.labels)]))
        return float(sum(p for p, _ in parts) / sum(n for _, n in parts))

    return _greedy(search, network, cost)


def _network(search: Search) -> Gated:
    """One gate a branch."""
    units = [Unit(s.branch, s.branch) for c in search.candidates for s in c.layers]
    parts = max(1, min(PARTS, len(units) // 2))
    return Gated(search.analysis.normal.model, search.analysis.groups.traced, units, parts=parts)


def _greedy(
    search: Search, network: Gated, cost: Callable[[Sequence[Feeds]], float]
) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """Drops the candidate of the least cost, again and again; a score is the cost of dropping a candidate after those before it."""
    chosen: list[Candidate] = []
    rest = list(search.candidates)
    scores: dict[str, float] = {}
    inputs = search.inputs()
    for _ in range(search.count):
        closed = [s.branch for c in chosen for s in c.layers]
        for number, feeds in enumerate(inputs):
            network.settle(number, feeds, closed)
        for candidate in rest:
            without = [*closed, *(s.branch for s in candidate.layers)]
            scores[candidate.name] = cost([network.run(feeds, without, batch=number) for number, feeds in enumerate(inputs)])
        best = min(rest, key=lambda c: scores[c.name])
        chosen.append(best)
        rest.remove(best)
    return chosen, scores, ()


def cosines(one: Array, other: Array) -> Array:
    """Cosine of the angle between rows, 0 where one is zero."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(axis=1) / np.maximum(norms, 1e-30))


def cosine_importance(search: Search) -> dict[str, float]:
    """1 − mean over positions of cos(x, x + F(x)), of each candidate, in one pass over the data."""
    values = [v for c in search.candidates for v in (c.before, c.after)]
    network = Observer(search.analysis.normal.model, values)
    sums = np.zeros(len(search.candidates))
    counts = np.zeros(len(search.candidates))
    for feeds in search.inputs():
        found = network.run(feeds)
        for i, candidate in enumerate(search.candidates):
            x, y = (search.rows(found, v) for v in (candidate.before, candidate.after))
            sums[i] += float(cosines(x, y).sum())
            counts[i] += len(x)
    return {c.name: float(1 - sums[i] / max(counts[i], 1)) for i, c in enumerate(search.candidates)}


def llm_drop(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """LLM-Drop (arXiv 2406.15786): S = 1 − mean cos(x, x + F(x)); the sub-layers of least S go at once, of all kinds ranked together."""
    return _least(search, cosine_importance(search))


def shortgpt(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """ShortGPT (arXiv 2403.03853): block influence BI = 1 − mean cos(X_i, X_{i+1}); the blocks of least BI go at once."""
    return _least(search, cosine_importance(search))


def random_layers(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """A score drawn for each candidate: what any method has to beat."""
    drawn = np.random.default_rng(search.seed).random(len(search.candidates))
    return _least(search, {c.name: float(s) for c, s in zip(search.candidates, drawn, strict=True)})


def _least(search: Search, scores: dict[str, float]) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    return sorted(search.candidates, key=lambda c: scores[c.name])[: search.count], scores, ()


def replace_me(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """ReplaceMe: see `spa.layers.replace_me`."""
    from spa.layers.replace_me import replaced  # it is told what it works on by this module

    return replaced(search)


def tracenas(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """TraceNAS: see `spa.layers.gradient_trace`."""
    from spa.layers.gradient_trace import traced_away  # as above, and torch is an extra

    return traced_away(search)


METHODS: Mapping[str, Method] = {
    "finercut": finercut, "llm-drop": llm_drop, "shortgpt": shortgpt, "replaceme": replace_me, "2ssp": two_ssp, "tracenas": tracenas,
    "random": random_layers,
}  # fmt: skip
OF_BLOCKS = frozenset({"shortgpt", "replaceme"})  # these drop whole blocks, whatever the kind
WHOLE = frozenset({"replaceme"})  # what goes of a larger number says nothing of a smaller one; elsewhere layers go one after the other
WITHOUT_DATA = frozenset({"random"})
