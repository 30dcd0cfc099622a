"""`spa check`: proofs, made again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_graphsurgeon as gs
import typer

from passes import Weight
from spa import api, report
from spa.check import TOLERANCE
from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import opened_model
from spa.commands.terminal import Terminal
from spa.errors import BadOption
from spa.plan import Plan, check_belongs, load_plan, mask_of
from spa.store import Model
from spa.trace import constant_values
from spa.view import dtype_is_float


@app.command()
def check(
    original: Annotated[Path, typer.Argument(metavar="A", help="The model as it was.", show_default=False)],
    small: Annotated[Path, typer.Argument(metavar="B", help="The pruned model.", show_default=False)],
    plan_file: Annotated[Path, typer.Option("--plan", metavar="PLAN", help="The plan that leads from A to B.", show_default=False)],
    other_weights: given.OtherWeights = False, tolerance: given.Tolerance = TOLERANCE, seed: given.Seed = 0,
    feeds: given.FeedsFile = None, as_json: given.Json = False, verbose: given.Verbose = False,
) -> int:
    """Prove again that B is A without what the plan removes."""
    term = Terminal(as_json, verbose)
    reading.check_tolerance(tolerance)
    decided = load_plan(plan_file)
    opened, pruned = opened_model(term, original, {}), opened_model(term, small, {})
    check_belongs(decided, opened, other_weights=other_weights)
    check_interfaces(opened, pruned)
    settings = decided.trace
    analysis = api.analyze(opened, inputs=settings.get("inputs"), protect_outputs=bool(settings.get("protect_outputs", True)),
                           stat=bool(settings.get("stat", True)), stage=term.stage)
    groups = analysis.groups
    proof = api.prove(analysis.normal.model, groups, mask_of(decided, groups), pruned, feeds=reading.read_feeds(feeds, opened), seed=seed,
                      tolerance=tolerance, stage=term.stage)
    with term.stage("comparing weights"):
        kept = kept_weights(opened, pruned, decided)
    data = {"proof": report.check_data(proof), "weights": {"exact": len(kept.exact), "differing": list(kept.differing),
                                                           "unknown": list(kept.unknown)}}
    term.show(data, report.proof(proof), report.weights(len(kept.exact), kept.differing, kept.unknown))
    return 0 if proof.passed else 1


@dataclass(frozen=True)
class KeptWeights:
    """Whether the float tensors of a pruned model hold exactly the kept elements of the original.

    exact, differing, unknown: names of those that do, that do not, and that the original has no tensor for.
    """

    exact: tuple[str, ...]
    differing: tuple[str, ...]
    unknown: tuple[str, ...]


def kept_weights(given: Model, small: Model, plan: Plan) -> KeptWeights:
    """Compares bytes, tensor by tensor and in bounded memory."""
    before, after = constant_values(given.graph), constant_values(small.graph)
    found: dict[str, list[str]] = {"exact": [], "differing": [], "unknown": []}
    for name, tensor in after.items():
        if not dtype_is_float(tensor.dtype):
            continue  # whole numbers restate sizes
        origin = before.get(plan.copies.get(name, name))
        if origin is None:
            found["unknown"].append(name)
            continue
        wanted = _weight(origin)
        removed = plan.removed.get(name, {})
        try:
            for axis, gone in removed.items():
                keep = np.ones(wanted.shape[int(axis)], bool)
                keep[gone] = False
                wanted = wanted.take(np.flatnonzero(keep), int(axis))
        except IndexError:
            found["differing"].append(name)
            continue
        found["exact" if _digest(wanted) == _digest(_weight(tensor)) else "differing"].append(name)
    return KeptWeights(*(tuple(found[k]) for k in ("exact", "differing", "unknown")))


def _weight(constant: gs.Constant) -> Weight:
    values = constant._values
    return values if isinstance(values, Weight) else Weight.of_array(np.asarray(constant.values))


def _digest(weight: Weight) -> tuple[tuple[int, ...], int, bytes]:
    digest = hashlib.sha256()
    for piece in weight.pieces():
        digest.update(piece)
    return tuple(weight.shape), int(weight.data_type), digest.digest()


def check_interfaces(given: Model, small: Model) -> None:
    """Raises BadOption unless both models have the same inputs and outputs by name."""
    for what, one, other in (("input", given.graph.inputs, small.graph.inputs), ("output", given.graph.outputs, small.graph.outputs)):
        names, found = {t.name for t in one}, {t.name for t in other}
        missing = sorted(names ^ found)
        if missing:
            raise BadOption(f"The models have different {what}s ({', '.join(missing[:3])}), so that one can't be the other pruned.")
