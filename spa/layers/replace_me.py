"""ReplaceMe (arXiv 2505.02819): a run of blocks replaced by a linear map, which is folded into the branch before the run.

Blocks i+1 … i+n go. With M_i the output of block i's last branch, X_i the sum behind it and X_{i+n} the sum behind the run, the map T is
the ridge regression of what the run adds,

    T = (A1ᵀA1 + αI)⁻¹ A1ᵀA2,    A1 = M_i,    A2 = X_{i+n} + M_i − X_i        so that  X_i − M_i + M_i T ≈ X_{i+n},

in float64, its statistics summed batch by batch; α is relative to the mean of A1ᵀA1's diagonal. M_i = h W + b becomes h (W T) + b T, so no
operator is added. The run is the one with the least mean cosine distance of X_i and X_{i+n}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption
from spa.graph.analysis import Analysis, analyze, evidence_for, moved
from spa.graph.parting import parted
from spa.graph.trace import NodeTrace, Traced, node_name
from spa.layers.gates import Observer, channel_axis, rows
from spa.plans.edits import Edit
from spa.proof.feeds import Feeds
from spa.signatures.arithmetic import REINTERPRETS
from spa.signatures.table import Dim, dims_of
from spa.stages import Stage, quiet

if TYPE_CHECKING:
    from spa.layers.depth import Candidate, Search

APART = ("part_sums", "drop_branches")  # edits by which layers go, from the first of which on values are not those that were fitted to
RIDGE = 1e-4  # α over the mean of the diagonal of A1ᵀA1
Array = NDArray[np.float64]


def replaced(search: Search) -> tuple[list[Candidate], dict[str, float], tuple[Edit, ...]]:
    """The run of blocks that goes, the distance of each run by its first block's name, and the edit that folds T in."""
    blocks, n = search.everything, search.count
    starts = [i for i in range(1, len(blocks) - n + 1) if blocks[i] in search.candidates and _one_trunk(search, blocks[i - 1 : i + n])]
    if not starts:
        raise BadOption(f"--layers replaceme needs a run of {n} blocks of one width behind another block; ask for fewer, or take llm-drop.")
    scores = distances(search, starts)
    best = min(starts, key=lambda i: scores[blocks[i].name])
    before = blocks[best - 1]
    maps = output_maps(search.analysis.groups.traced, before.layers[-1].branch)
    fit = {"branch": before.layers[-1].branch, "before": before.after, "after": blocks[best + n - 1].after}
    matrix = fitted(search.analysis, search.inputs(), **fit)
    fold = Edit("mix_outputs", {"maps": {node: {str(i): a for i, a in inputs.items()} for node, inputs in maps.items()}, "fit": fit},
                {"matrix": matrix})  # fmt: skip
    return list(blocks[best : best + n]), scores, (fold,)


def _one_trunk(search: Search, run: tuple[Candidate, ...]) -> bool:
    shapes = search.analysis.groups.traced.facts.shapes
    return len({shapes[c.after] for c in run}) == 1


def distances(search: Search, starts: list[int]) -> dict[str, float]:
    """Mean over positions of 1 − cos(X_i, X_{i+n}), by the name of the run's first block."""
    from spa.layers.depth import cosines  # which imports this module

    blocks, n = search.everything, search.count
    network = Observer(search.analysis.normal.model, [b.after for b in blocks])
    sums: dict[str, float] = dict.fromkeys((blocks[i].name for i in starts), 0.0)
    count = 0
    for feeds in search.inputs():
        found = network.run(feeds)
        for i in starts:
            x, y = (search.rows(found, blocks[at].after) for at in (i - 1, i + n - 1))
            sums[blocks[i].name] += float((1 - cosines(x, y)).sum())
        count += len(x)
    return {name: total / max(count, 1) for name, total in sums.items()}


def fitted(analysis: Analysis, inputs: Sequence[Feeds], *, branch: str, before: str, after: str) -> Array:
    """T (channels, channels) from M = branch, X_i = before and X_{i+n} = after."""
    network = Observer(analysis.normal.model, [branch, before, after])
    axes = [channel_axis(analysis.groups.traced, v) for v in (branch, before, after)]
    gram: Array | None = None
    cross: Array | None = None
    for feeds in inputs:
        found = network.run(feeds)
        m, x, y = (rows(found[v], axis) for v, axis in zip((branch, before, after), axes, strict=True))
        gram = m.T @ m + (0 if gram is None else gram)
        cross = m.T @ (y + m - x) + (0 if cross is None else cross)
    assert gram is not None
    assert cross is not None
    return np.asarray(np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), cross))


def refitted(analysis: Analysis, calibration: Any, *, seed: int = 0, stage: Stage = quiet) -> tuple[Analysis, Any]:
    """A model with the maps that its edits left out, fitted to data of the model as given, and the data as they are used on it.

    What has nothing to fit, or no data, comes back as it is.
    """
    open_ = [e for e in analysis.edits if e.kind == "mix_outputs" and not e.arrays and "fit" in e.arguments]
    evidence = evidence_for(analysis.dense, calibration, seed=seed, stage=stage) if open_ else None
    if evidence is None or not evidence.batches:
        return analysis, calibration
    before = tuple(takewhile(lambda e: e.kind not in APART, analysis.edits))
    dense = parted(analyze(analysis.given, **{**analysis.settings, "edits": before}, stage=stage), stage=stage)
    inputs = [{k: v for k, v in b.items() if k != evidence.labels} for b in evidence.batches]
    with stage("fitting linear maps"):
        made = {id(e): replace(e, arrays={"matrix": fitted(dense, inputs, **e.arguments["fit"])}) for e in open_}
    edits = tuple(made.get(id(e), e) for e in analysis.edits)
    small = analyze(analysis.given, **{**analysis.settings, "edits": edits}, stage=stage)
    return small, moved(evidence, small)


def output_maps(traced: Traced, value: str) -> Mapping[str, Mapping[int, int]]:
    """Node -> input -> axis of the stored operands that a value's channels are linear in: its last weight, and biases.

    Raises BadOption where something else than biases and reshapes lies between the last map and the value.
    """
    nodes = {t.name: n for n in traced.nodes for t in n.node.outputs if t.name}
    shape = traced.facts.shapes[value] or ()
    found: dict[str, dict[int, int]] = {}
    if channel_axis(traced, value) == len(shape) - 1:
        while value in nodes:
            node = nodes[value]
            last = _map(traced, node)
            if last is not None:
                return {**found, value: last}
            step = _passed(traced, node, shape[-1])
            if step is None:
                break
            value, bias = step
            if bias is not None:
                found[node.node.outputs[0].name] = {bias: len(node.node.inputs[bias].shape) - 1}
    where = node_name(nodes[value].node) if value in nodes else value
    raise BadOption(f"--layers replaceme folds a map into the last weight of the branch before the run, but {where} stands between: "
                    "take llm-drop or finercut.")  # fmt: skip


def _map(traced: Traced, node: NodeTrace) -> dict[int, int] | None:
    """Input -> axis of a linear node's stored weight and bias that runs along its output's last axis."""
    made = node.signature
    if made is None or not made.linear or not made.outputs[0]:
        return None
    last = made.outputs[0][-1]
    for linear in made.linear:
        weight = made.inputs[linear.weight] or ()
        data = {n for t in made.inputs[linear.data] or () for n in dims_of(t)}
        if node.node.inputs[linear.weight].name in traced.constants and isinstance(last, Dim) and last in weight and last.name not in data:
            found = {linear.weight: weight.index(last)}
            bias = made.inputs[linear.bias] if linear.bias is not None and linear.bias < len(node.node.inputs) else None
            if linear.bias is not None and bias:
                if node.node.inputs[linear.bias].name not in traced.constants or last not in bias:
                    return None
                found[linear.bias] = bias.index(last)
            return found
    return None


def _passed(traced: Traced, node: NodeTrace, width: int) -> tuple[str, int | None] | None:
    """The value that a node hands on with its last axis as it is, and the number of a stored bias that it adds."""
    made, inputs = node.signature, node.node.inputs
    if made is None:
        return None
    if made.sums == 0 and len(inputs) == 2:
        stored = [i for i, t in enumerate(inputs) if t.name in traced.constants]
        if len(stored) == 1 and tuple(traced.facts.shapes[inputs[stored[0]].name] or ()) == (width,):
            return inputs[1 - stored[0]].name, stored[0]
    if node.node.op in REINTERPRETS and (traced.facts.shapes[inputs[0].name] or (0,))[-1] == width:
        return inputs[0].name, None
    return None
