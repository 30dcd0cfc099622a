"""Turning the residual stream onto its principal directions, without changing what the model computes.

SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024) turns the signal between blocks by orthogonal matrices, from the principal components of
what the norms give, so that its last positions carry least, and cuts these. Here one matrix Q serves all blocks: every writer takes Qᵀ,
every reader Q, and no product with QᵀQ' on the skip connection is needed. Norms become sums of squares over the *old* width D: with what
is cut counted as zeros, x / √(Σx²/D + ε) stays what it was, where a mean over the k kept positions would make every norm's result √(k/D)
times as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes import Turn, Weight, insert_biases, turn_stream
from spa.errors import BadOption, CheckFailed
from spa.exact.stream import NotTurnable, Reader, Stream, read_stream
from spa.graph.analysis import Analysis, Source, analyze, evidence_for
from spa.graph.groups import Group
from spa.graph.offsets import Missing, Offsets
from spa.plans.rewrite import copy_graph
from spa.proof import check as checking
from spa.proof.check import Check
from spa.proof.feeds import Feeds
from spa.proof.prove import runnable
from spa.stages import Stage, quiet
from spa.statistics.observe import stream as streamed
from spa.storage.store import Model, with_graph

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rotated:
    """A model that computes the same, with the stream's positions in falling order of energy.

    group: the stream's group in it. energies: (width,) share of the mean square of what the norms give that lies on each position.
    check: the proof that it computes the same, None where none was asked for.
    """

    model: Model
    group: str
    energies: Array
    check: Check | None


def rotated(
    model: Source | Analysis, calibration: Any, *, group: str | None = None, check: bool = True, feeds: Feeds | None = None,
    tolerance: float = checking.TOLERANCE, seed: int = 0, stage: Stage = quiet,
) -> Rotated:  # fmt: skip
    """Turns the residual stream of a model onto the principal directions of calibration data.

    group: name of the stream's group; by default the most costly one that can be turned. check, feeds, tolerance: whether to prove that
    nothing changed, on which inputs (drawn if None), and how far outputs may differ, relative to their scale.
    Raises BadOption where no group can be turned, with the reason for the most costly one, and CheckFailed if the outputs differ.

    >>> turned = rotated("model.onnx", batches)
    >>> small = spa.prune(turned.model, 0.2, criterion="position", include=[turned.group])
    """
    analysis = model if isinstance(model, Analysis) else analyze(model, stage=stage)
    evidence = evidence_for(analysis, calibration, seed=seed, stage=stage)
    if evidence is None or not evidence.batches:
        raise BadOption("The principal directions of the stream are those of data: give some with --calibration.")
    found = _found(analysis, group)
    _check_types(analysis, found)
    with stage("finding principal directions"):
        energies, turn = directions(analysis, found, evidence.batches)
    with stage("turning"):
        graph = copy_graph(analysis.normal.model.graph)
        _take_up_offsets(graph, analysis, found)
        turn_stream(graph, turn_of(found, turn))
        turned = with_graph(analysis.normal.model, graph)
    proof = None
    if check:
        with stage("proving"):
            given = runnable(analysis.normal.model, analysis.groups.traced, seed=seed) if feeds is None else feeds
            proof = checking.compare(analysis.normal.model, turned, given, tolerance=tolerance)
    if proof is not None and not proof.passed:
        raise CheckFailed(f"The turned model differs by {proof.worst:.1e} of its output's scale, where {tolerance:.0e} is allowed.")
    return Rotated(turned, _name(turned, found), energies, proof)


def _found(analysis: Analysis, name: str | None) -> Stream:
    groups = analysis.groups
    if name is not None:
        if name not in groups.by_name:
            raise BadOption(f"There is no group {name!r}; `spa inspect` lists the groups.")
        return _stream(analysis, groups.by_name[name])
    reasons = []
    for group in sorted(groups.free(), key=lambda g: -g.parameters * g.size):
        try:
            return _stream(analysis, group)
        except NotTurnable as error:
            reasons.append(error)
    raise reasons[0] if reasons else BadOption("The model has no group that may shrink, so there is no stream to turn.")


def _stream(analysis: Analysis, group: Group) -> Stream:
    if group.frozen is not None:
        raise NotTurnable(f"Group {group.name} can't be turned: {group.frozen}.")
    found = read_stream(analysis.groups, group)
    if not found.means and not found.norms:
        raise NotTurnable(f"Group {group.name} can't be turned: no norm reads it, so it is no residual stream.")
    tied = set(found.writers) & {r.held for r in found.readers}
    if tied and found.centred:
        raise NotTurnable(f"Group {group.name} can't be turned: {min(tied)} both writes and reads it (tied), and its norms take a "
                          "mean off; export the model untied.")  # fmt: skip
    for reader in found.readers:
        if reader.frame.offset is not None and (reader.layer.window is not None or reader.held in tied):
            raise NotTurnable(f"Group {group.name} can't be turned: {reader.layer.name} can't take up the bias of a norm.")
    _check_shared(found, tied)
    return found


def _check_shared(found: Stream, tied: set[str]) -> None:
    """Raises NotTurnable where a stored weight is read behind norms of different scales."""
    scales: dict[str, Array | None] = {}
    for reader in found.readers:
        if reader.held in tied:
            continue
        before = scales.setdefault(reader.held, reader.frame.scale)
        scale = reader.frame.scale
        if before is not scale and (before is None or scale is None or not np.array_equal(before, scale)):
            raise NotTurnable(f"Group {found.group.name} can't be turned: {reader.held} reads it behind norms of different scales.")


def _check_types(analysis: Analysis, found: Stream) -> None:
    constants = analysis.groups.traced.constants
    for name in {*found.writers, *(r.held for r in found.readers)}:
        if np.dtype(constants[name].dtype) not in (np.float32, np.float64):
            raise NotTurnable(f"Group {found.group.name} can't be turned: {name} holds {constants[name].dtype}; give the float32 model.")


def directions(analysis: Analysis, found: Stream, batches: Any) -> tuple[Array, Array]:
    """Share of the energy of each principal direction, falling, and Q (width, width), whose columns they are.

    Of what readers read, before scale and bias of the norm; each reader's value counts once.
    """
    frames = {r.layer.data: r.frame for r in found.readers}
    total = np.zeros((found.group.size,) * 2)
    axes = {v: next(a for w, a in found.group.sites if w == v) for v in frames}

    def add(_: int, values: Mapping[str, NDArray[Any]]) -> None:
        for name, frame in frames.items():
            rows = np.moveaxis(values[name], axes[name], -1).reshape(-1, found.group.size).astype(np.float32)
            if frame.offset is not None:
                rows = rows - frame.offset.astype(np.float32)
            if frame.scale is not None:
                rows = rows * np.where(frame.scale == 0, 0, 1 / np.where(frame.scale == 0, 1, frame.scale)).astype(np.float32)
            total[...] += rows.T @ rows

    streamed(analysis.normal.model, analysis.groups.traced.facts.types, batches, list(frames), add)
    energies, vectors = np.linalg.eigh(total)
    return energies[::-1] / max(energies.sum(), 1e-300), vectors[:, ::-1]


def turn_of(found: Stream, turn: Array) -> Turn:
    """What the pass is told: Q (width, width) into every reader, Qᵀ into every writer."""
    size = found.group.size
    centre = np.eye(size) - (1 / size if found.centred else 0)
    factors: dict[str, dict[int, Array]] = {name: {axis: turn.T @ centre} for name, axis in found.writers.items()}
    turned = {}
    for reader in found.readers:
        scale = np.ones(size) if reader.frame.scale is None else reader.frame.scale
        if reader.held in found.writers:  # the weight is turned already: the reader's data take up the scale
            if reader.frame.scale is not None:
                turned[reader.layer.node.outputs[0].name, reader.layer.linear.data] = turn.T @ (scale[:, None] * turn)
        else:
            factors[reader.held] = {reader.axis: turn.T * scale}
    norms = {name: (size, epsilon) for name, epsilon in found.norms.items()}
    return Turn(factors, dict(found.skipped), dict.fromkeys(found.means, size), norms, turned)


def _take_up_offsets(graph: Any, analysis: Analysis, found: Stream) -> None:
    """Biases of norms become a part of the biases of the maps that read them."""
    offsets = Offsets(analysis.groups)
    held = {t.name: t for t in graph.tensors().values() if hasattr(t, "_values")}
    fresh: dict[str, tuple[int | None, NDArray[np.generic]]] = {}
    for reader in found.readers:
        if reader.frame.offset is None:
            continue
        change = _carried(analysis, found, reader)
        place = offsets.of(reader.layer)
        if isinstance(place, Missing):
            fresh[reader.layer.node.outputs[0].name] = place.slot, change.reshape(place.shape).astype(np.float32)
            continue
        tensor = held[place.place.name]
        values = tensor._values
        stored = np.asarray(values.load() if isinstance(values, Weight) else tensor.values)
        changed = stored.astype(np.float64)
        place.add(changed, change)
        tensor._values = changed.astype(stored.dtype)
    insert_biases(graph, fresh)


def _carried(analysis: Analysis, found: Stream, reader: Reader) -> Array:
    """(parts, outputs) what a reader makes of the norm's bias."""
    layer = reader.layer
    tensor = analysis.groups.traced.constants[layer.place.name]
    values = np.asarray(tensor._values.load() if isinstance(tensor._values, Weight) else tensor.values)
    weight = layer.weight.canonical(layer.place.read(values, layer.weight_shape)).astype(np.float64)
    of = layer.coordinates(analysis.groups, found.group.start, found.group.start + found.group.size)
    assert reader.frame.offset is not None
    return np.asarray(np.einsum("poc,pc->po", weight, reader.frame.offset[of]))


def _name(model: Model, found: Stream) -> str:
    """The stream's group in the turned model."""
    value, axis = next(iter(found.writers.items()))
    again = analyze(model)
    return next(g.name for g in again.groups.groups if (value, axis) in g.sites)
