"""The proof of a pruned model: it gives what the masked original gives, and every shape is what is left of the old one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa import check as checking
from spa.check import Check
from spa.errors import CheckFailed, UnsupportedModel
from spa.feeds import Feeds, draw, shapes_to_try
from spa.groups import Groups, Kept
from spa.masking import masked
from spa.shapes import infer
from spa.stages import Stage, quiet
from spa.store import Model, with_graph
from spa.trace import Traced
from spa.vocabulary import ids_of
from spa.widen import widen


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
    kept = {
        t.name: {
            a: np.flatnonzero(k)
            for a in range(len(groups.traced.facts.shapes.get(t.name) or ()))
            if (k := groups.keep((t.name, a), gone)) is not None
        }
        for t in normal.graph.outputs
    }
    given = runnable(normal, groups.traced, seed=seed) if feeds is None else feeds
    ids = ids_of(groups, gone)
    if ids is not None:
        given = ids.drawn(given) if feeds is None else ids.check(given)
    own = given if ids is None else ids.renumbered(given)
    return Reference(with_graph(normal, masked(normal.graph, groups, gone)), given, kept, own)


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
    """Runs the masked original and the pruned model on the same inputs, in float32, and compares all outputs."""
    with stage("proving"):
        reference = reference_of(normal, groups, gone, feeds=feeds, seed=seed)
        wide_reference, wide_given = widen(reference.model, reference.feeds)
        wide_small, small_given = widen(small, reference.given)
        if wide_small is not small:
            _must_load(small, normal)
        return checking.compare(wide_reference, wide_small, wide_given, kept=reference.kept, tolerance=tolerance, small_feeds=small_given)


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
