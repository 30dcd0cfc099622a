"""Parity: what was converted gives what the framework gives, on the same inputs; and where it first does not.

Inputs are drawn as for any proof (`spa.proof.feeds`), three times, and where the batch is free once with another one: a branch that depends
on values and was frozen by an exporter, or a batch size that it has written into the graph, show. A framework that knows better what its
model meets gives examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spa.errors import CheckFailed, UnsupportedModel
from spa.graph.normalize import Normal
from spa.graph.trace import Traced, trace
from spa.intake.bisect import Place, first_difference
from spa.intake.remote import Named, Reader
from spa.proof.check import TOLERANCE, Check, compare_results, run_session, session
from spa.proof.feeds import Feeds, draw
from spa.proof.prove import both, runnable

DRAWS = 3
OTHER_BATCH = 3


@dataclass(frozen=True)
class Parity:
    """check: the largest difference of each output over all draws. draws: the shapes of the inputs of each. place: where results part."""

    check: Check
    draws: tuple[Mapping[str, tuple[int, ...]], ...]
    place: Place | None = None

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance."""
        return self.check.passed


def parity(reader: Reader, normal: Normal, *, feeds: Feeds | None = None, tolerance: float = TOLERANCE, seed: int = 0) -> Parity:
    """Compares the framework with ONNX Runtime.

    Parameters
    ----------
    reader
        The framework and its model.
    normal
        What was converted.
    feeds
        Inputs by name; drawn without any.
    tolerance
        Of each output's scale.
    seed
        Of the draw.

    Raises
    ------
    UnsupportedModel
        If the framework or ONNX Runtime does not run, or both have other numbers of outputs.
    CheckFailed
        If an output has other sizes in both, or nothing but NaN can be compared.
    """
    model = normal.model
    opened = session(model, lean=True)
    total: Check | None = None
    shapes = []
    for fed in [feeds] if feeds is not None else _examples(normal, reader) or _draws(normal, seed):
        found = run_session(opened, fed)
        expected = _by_output(reader.outputs(fed), found)
        shapes.append({name: tuple(array.shape) for name, array in fed.items()})
        try:
            check = compare_results(expected, found, tolerance=tolerance)
        except CheckFailed as error:
            raise CheckFailed("The framework gives NaN or infinity alone on the inputs that were drawn, so nothing can be compared: give "
                              "inputs that suit it with --feeds.") from error
        total = check if total is None else both(total, check)
        if not check.passed:
            layers = reader.layers(fed)
            wrong = [d.output for d in check.differences if not d.relative <= tolerance]
            return Parity(total, tuple(shapes), first_difference(normal, fed, layers, wrong[0], tolerance) if layers else None)
    assert total is not None
    return Parity(total, tuple(shapes))


def _examples(normal: Normal, reader: Reader) -> Sequence[Feeds]:
    """The framework's own, of the sizes that the model takes."""
    declared = {t.name: list(t.shape or []) for t in normal.model.graph.inputs}

    def fits(fed: Feeds) -> bool:
        return set(declared) == set(fed) and all(
            len(sizes) == fed[name].ndim and all(not isinstance(s, int) or s == n for s, n in zip(sizes, fed[name].shape, strict=True))
            for name, sizes in declared.items())

    return [fed for fed in reader.examples() if fits(fed)]


def _draws(normal: Normal, seed: int) -> Sequence[Feeds]:
    traced = trace(normal.model.graph, normal.facts)
    first = runnable(normal.model, traced, seed=seed)
    shapes = {name: tuple(array.shape) for name, array in first.items()}
    drawn = [first, *(draw(traced, seed=seed + k, shapes=shapes) for k in range(1, DRAWS))]
    other = _other_batch(traced, shapes)
    return [*drawn, draw(traced, seed=seed, shapes=other)] if other else drawn


def _other_batch(traced: Traced, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes with another batch, where all inputs leave their first axis free under one name; else none."""
    first = {str((t.shape or [0])[0]) if not isinstance((t.shape or [0])[0], int) else 0 for t in traced.graph.inputs}
    if len(first) != 1 or 0 in first:
        return {}
    return {name: (OTHER_BATCH, *shape[1:]) for name, shape in shapes.items()}


def _by_output(results: Named, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """The framework's results under the names of ONNX's outputs: by name if these are the same, else in order.

    Raises UnsupportedModel if there are more of one than of the other, CheckFailed if two that belong together differ in shape.
    """
    outputs = list(found)
    paired = _paired(results, outputs)
    for name, value in paired.items():
        if value.shape != found[name].shape:
            raise CheckFailed(f"The converted model does not give what the framework gives: output {name} is {_sizes(found[name])} in ONNX "
                              f"and {_sizes(value)} in the framework; convert it in the framework, or write to the converter's "
                              "authors.")  # fmt: skip
    return paired


def _sizes(value: np.ndarray) -> str:  # type: ignore[type-arg]
    return "x".join(map(str, value.shape)) or "a single number"


def _paired(results: Named, outputs: Sequence[str]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    names = [name for name, _ in results]
    if len(results) != len(outputs):
        raise UnsupportedModel(f"The framework gives {len(results)} outputs and the converted model {len(outputs)}.")
    if set(names) == set(outputs):
        named = {str(name): value for name, value in results}
        return {name: named[name] for name in outputs}
    return {output: value for output, (_, value) in zip(outputs, results, strict=True)}


def sentence(found: Parity, title: str) -> str:
    """Why a conversion is refused: the output that is worst, by how much, and where results part."""
    worst = max(found.check.differences, key=lambda d: d.relative)
    where = ""
    if found.place is not None:
        first = f"first at layer {found.place.layer}" if found.place.layer else "after the framework's last layer"
        where = f"; they part {first} (in ONNX from {found.place.node}, on)"
    return (f"The converted model does not give what {title} gives: output {worst.output} differs by {worst.relative:.1e} of its scale, "
            f"where {found.check.tolerance:.0e} is allowed{where}.")  # fmt: skip
