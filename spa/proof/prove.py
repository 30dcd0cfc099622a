"""The proof of a pruned model: it gives what the masked original gives, and every shape is what is left of the old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa.errors import CheckFailed, UnsupportedModel
from spa.graph.groups import Groups, Kept
from spa.graph.shapes import infer
from spa.graph.trace import Traced
from spa.plans.edits import Edit, edited
from spa.plans.rewrite import copy_graph
from spa.proof import check as checking
from spa.proof.check import Check
from spa.proof.feeds import Feeds, draw, shapes_to_try
from spa.proof.masking import masked
from spa.proof.pieces import in_pieces, is_large
from spa.proof.widen import widen
from spa.stages import Stage, quiet
from spa.storage.store import Model, with_graph
from spa.vocabularies.vocabulary import ids_of


@dataclass(frozen=True)
class Reference:
    """What a pruned model must give. model: the masked original. feeds: inputs for it. kept: output -> axis -> positions that are left.

    given: inputs for the pruned model: the same, but for ids that were numbered anew.
    """

    model: Model
    feeds: Feeds
    kept: Mapping[str, Mapping[int, NDArray[np.int64]]]
    given: Feeds


def reference_of(normal: Model, groups: Groups, gone: NDArray[np.bool_], *, feeds: Feeds | None = None, seed: int = 0) -> Reference:
    """The masked original, with inputs that are drawn if none are given."""
    if feeds is None:
        return _reference(normal, groups, gone, runnable(normal, groups.traced, seed=seed), drawn=True)
    return _reference(normal, groups, gone, feeds, drawn=False)


def _reference(normal: Model, groups: Groups, gone: NDArray[np.bool_], feeds: Feeds, *, drawn: bool) -> Reference:
    """drawn: whether the inputs are made up, so that ids of removed rows may be replaced; those that a user gave are refused instead."""
    kept = {
        t.name: {
            a: np.flatnonzero(k)
            for a in range(len(groups.traced.facts.shapes.get(t.name) or ()))
            if (k := groups.keep((t.name, a), gone)) is not None
        }
        for t in normal.graph.outputs
    }
    ids = ids_of(groups, gone)
    if ids is not None:
        feeds = ids.drawn(feeds) if drawn else ids.check(feeds)
    own = feeds if ids is None else ids.renumbered(feeds)
    return Reference(with_graph(normal, masked(normal.graph, groups, gone)), feeds, kept, own)


def prove(
    normal: Model,
    groups: Groups,
    gone: NDArray[np.bool_],
    small: Model,
    *,
    feeds: Feeds | None = None,
    seed: int = 0,
    tolerance: float = checking.TOLERANCE,
    stage: Stage = quiet,
) -> Check:
    """Runs the masked original and the pruned model on the same inputs, in float32, and compares all outputs.

    Models whose weights would fill more memory than `spa.proof.pieces.WHOLE`, or this process's share, run in pieces.
    """
    with stage("proving"):
        if is_large(normal):
            return _proven_in_pieces(normal, groups, gone, small, feeds, seed, tolerance)
        reference = reference_of(normal, groups, gone, feeds=feeds, seed=seed)
        wide_reference, wide_given = widen(reference.model, reference.feeds)
        wide_small, small_given = widen(small, reference.given)
        if wide_small is not small:
            _must_load(small, normal)
        return checking.compare(wide_reference, wide_small, wide_given, kept=reference.kept, tolerance=tolerance, small_feeds=small_given)


def _proven_in_pieces(
    normal: Model, groups: Groups, gone: NDArray[np.bool_], small: Model, feeds: Feeds | None, seed: int, tolerance: float
) -> Check:
    """The proof in bounded memory: one model after the other, each piece by piece, on inputs that the masked original runs with."""
    tries = [feeds] if feeds is not None else (draw(groups.traced, seed=seed, shapes=shapes) for shapes in shapes_to_try(groups.traced))
    first: UnsupportedModel | None = None
    types = groups.traced.facts.types
    for given in tries:
        reference = _reference(normal, groups, gone, given, drawn=feeds is None)
        try:
            expected = _run_in_pieces(reference.model, types, reference.feeds)
        except UnsupportedModel as error:
            first = first or error
            continue
        found = _run_in_pieces(small, types, reference.given)
        return checking.compare_results(expected, found, kept=reference.kept, tolerance=tolerance)
    assert first is not None
    raise UnsupportedModel(f"{first} (give sizes that fit with --input, inputs with --feeds, or --no-check)") from first


def _run_in_pieces(model: Model, types: Mapping[str, int], feeds: Feeds) -> dict[str, NDArray[np.generic]]:
    """Outputs by name."""
    outputs = [t.name for t in model.graph.outputs]
    found: dict[str, NDArray[np.generic]] = {}
    for made in in_pieces(model, types, [feeds], outputs):
        found |= made[0]
    return found


def prove_edits(
    given: Model, edits: Sequence[Edit], small: Model, types: Mapping[str, int], feeds: Feeds, *, tolerance: float = checking.TOLERANCE,
    stage: Stage = quiet,
) -> Check:  # fmt: skip
    """Compares a model after its edits with the model as given, edited the other way (zeros where branches go), in float32.

    types: of the values of the model as given. feeds: for it. Outputs that the edits take away are not compared.
    """
    with stage("proving the edits"):
        other = edited(given, edits, otherwise=True).model
        there = {t.name for t in small.graph.outputs}
        graph = copy_graph(other.graph)
        graph.outputs[:] = [t for t in graph.outputs if t.name in there]
        if is_large(given):
            wanted, found = (_run_in_pieces(m, types, feeds) for m in (with_graph(other, graph), small))
            return checking.compare_results(wanted, found, tolerance=tolerance)
        wide_other, wide_given = widen(with_graph(other, graph), feeds)
        return checking.compare(wide_other, widen(small, {})[0], wide_given, tolerance=tolerance)


def inputs_for(model: Model, traced: Traced, *, seed: int = 0) -> Feeds:
    """Drawn inputs; of a large model the first that come, as trying them would take its whole memory."""
    return draw(traced, seed=seed) if is_large(model) else runnable(model, traced, seed=seed)


def both(one: Check, other: Check) -> Check:
    """Two checks as one: of each output, the larger difference."""
    worst = {d.output: d for d in one.differences}
    for d in other.differences:
        if d.output not in worst or not d.relative <= worst[d.output].relative:
            worst[d.output] = d
    return Check(tuple(worst.values()), one.tolerance)


def _must_load(small: Model, original: Model) -> None:
    """The pruned model loads in its own type, unless the runtime lacks kernels for the original too (bfloat16)."""
    try:
        checking.session(small, lean=True)
    except UnsupportedModel:
        try:
            checking.session(original, lean=True)
        except UnsupportedModel:
            return
        raise


def runnable(model: Model, traced: Traced, *, seed: int = 0) -> Feeds:
    """Drawn inputs that the model runs with on ONNX Runtime. Raises UnsupportedModel that asks for `--input` if none are found."""
    try:
        opened = checking.session(model, lean=True)
    except UnsupportedModel:
        opened = checking.session(widen(model, {})[0], lean=True)  # no kernels for this type: the proof runs in float32 anyway
    first: UnsupportedModel | None = None
    wide = {i.name: np.float32 for i in opened.get_inputs() if i.type == "tensor(float)"}
    for shapes in shapes_to_try(traced):
        feeds = draw(traced, seed=seed, shapes=shapes)
        try:
            checking.run_session(opened, {n: v.astype(wide[n]) if n in wide else v for n, v in feeds.items()})
            return feeds
        except UnsupportedModel as error:
            first = first or error
    assert first is not None
    tried = " ".join(f"--input {t.name}:{'x'.join(map(str, traced.facts.shapes.get(t.name) or ()))}" for t in traced.graph.inputs)
    raise UnsupportedModel(f"{first} (with {tried}: give sizes that fit with --input, inputs with --feeds, or --no-check)") from first


def check_shapes(groups: Groups, gone: NDArray[np.bool_], small: Model) -> None:
    """Without the proof: shape inference of the pruned graph must give what is left of every shape. Raises CheckFailed."""
    facts = groups.traced.facts
    kept = Kept(groups, gone)
    found = infer(small.graph, {name: kept.shape(name) or shape for name, shape in facts.feeds.items()})
    for tensor in groups.traced.graph.outputs:
        shape = facts.shapes.get(tensor.name)
        if shape is None:
            continue
        left = kept.shape(tensor.name)
        if found.shapes.get(tensor.name) != left:
            raise CheckFailed(
                f"Output {tensor.name!r} of the pruned graph would have shape {found.shapes.get(tensor.name)} instead of {left}."
            )
    broken = sorted(set(found.unknown) - set(facts.unknown))
    if broken:
        raise CheckFailed(
            f"The pruned graph breaks at {broken[0]!r}: {found.unknown[broken[0]]}. This is a defect of spa, please report it."
        )


def failure(proof: Check) -> str:
    """One sentence on a proof that failed."""
    worst = max(proof.differences, key=lambda d: d.relative)
    return (
        f"Removing and masking differ: output {worst.output!r} by {worst.relative:.1e} of its scale, where {proof.tolerance:.0e} is "
        f"allowed; nothing was written. This is a defect of spa, please report it (--tolerance {worst.relative * 1.1:.1e} would pass)."
    )
