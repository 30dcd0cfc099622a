"""An experiment: what many prunings of one model on the same data have in common, so that other processes can make them too.

    Experiment  --opened-->  Lab, with the analysis, the data and the judge

An experiment travels, a lab is opened once in a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spa import criteria
from spa.budgets.budget import TIME_LIMIT
from spa.budgets.metrics import find_metric
from spa.budgets.quality import Judge, automatic, judge, split
from spa.criteria.brought import Brought
from spa.data.evidence import Evidence, adapted
from spa.errors import BadOption, UnsupportedModel
from spa.graph.analysis import Analysis, analyze, evidence_for, moved
from spa.graph.count import Counts, count
from spa.layers.depth import Dropped, left_by
from spa.proof.check import TOLERANCE
from spa.proof.feeds import Feeds
from spa.repairs.repair_options import RepairOptions
from spa.stages import Stage, quiet
from spa.storage.store import Model, load, save

BUILT_IN = frozenset(criteria.names())  # what every process knows; others travel with the experiment


@dataclass(frozen=True)
class Packed:
    """Data that travel: `Evidence` without its model. adapted: whether norms are measured anew on these batches, which are noise."""

    name: str
    batches: Sequence[Feeds] = field(repr=False)
    labels: str | None
    noise: bool
    adapted: bool

    @cached_property
    def sha256(self) -> str:
        """Hash of all that is in it."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for batch in self.batches:
            for name in sorted(batch):
                value = batch[name]
                digest.update(repr((name, value.dtype.str, value.shape)).encode())
                digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Experiment:
    """All that prunings of one model have in common.

    model: its path, or its bytes. trace: how it is analysed. fit: what criteria look at and repairs are fitted on, held: what quality is
    judged on. wishes: options of `spa.plan`. mending: options of repairs, but for the method. provider, threads: what latency means.
    entries: criteria of the user's own.
    """

    model: str | bytes = field(repr=False)
    sha256: str
    trace: Mapping[str, Any]
    fit: Packed | None
    held: Packed | None
    wishes: Mapping[str, Any]
    mending: RepairOptions
    metric: str | None
    output: str | None
    provider: str
    threads: int
    time_limit: float
    seed: int
    check: bool
    tolerance: float = TOLERANCE
    entries: tuple[criteria.Criterion, ...] = ()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What determines its results, as plain data."""
        mending = {k: v for k, v in vars(self.mending).items() if k != "method"}
        data = {"calibration": self.fit, "evaluate": self.held}
        wishes = {k: v.sha256 if isinstance(v, Brought) else v for k, v in self.wishes.items()}
        return {
            "model_sha256": self.sha256, **self.trace, **wishes, **{f"repair_{k}": v for k, v in mending.items()},
            "metric": self.metric, "output_name": self.output, "provider": self.provider, "threads": self.threads,
            "time_limit": self.time_limit, "seed": self.seed, "check": self.check, "tolerance": self.tolerance,
            **{k: None if v is None else v.sha256 for k, v in data.items()},
        }  # fmt: skip

    @cached_property
    def key(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode()).hexdigest()


class Lab:
    """An experiment, opened."""

    def __init__(self, experiment: Experiment, analysis: Analysis, fit: Evidence | None, held: Evidence | None) -> None:
        self.experiment, self.analysis, self.fit, self.held = experiment, analysis, fit, held
        self._smaller: tuple[tuple[Any, ...], Lab] | None = None

    def without(self, dropped: Dropped | None) -> Lab:
        """The same for the model without these layers; quality is still judged on the model as it is. The last one is kept."""
        if dropped is None:
            return self
        key = dropped.depth.method, dropped.depth.kind, dropped.order
        if self._smaller is None or self._smaller[0] != key:
            small, fit = left_by(self.analysis, dropped, self.fit)
            self._smaller = key, Lab(self.experiment, small, fit, moved(self.held, small))
        return self._smaller[1]

    @cached_property
    def judge(self) -> Judge:
        """What evaluates pruned models. Raises BadOption where the model itself has no figure."""
        held = self.held or Evidence("nothing", (), self.analysis.normal.model, False)
        metric = find_metric(self.experiment.metric) if self.experiment.metric else automatic(None, held.labels)
        return judge(self.analysis.normal.model, metric, held, output=self.experiment.output)

    @cached_property
    def dense(self) -> dict[str, float]:
        """Costs of the model as it is."""
        return costs_of(count(self.analysis.dense.groups), self.analysis.given.nbytes)


def costs_of(counts: Counts, nbytes: int) -> dict[str, float]:
    """Costs by the names that budgets have for them."""
    return {"macs": counts.macs, "params": counts.parameters, "size": nbytes, "memory": counts.peak_bytes}


def saved_bytes(model: Model) -> int:
    """Bytes of the files that a model would be written to."""
    with tempfile.TemporaryDirectory(prefix="spa-size-") as folder:
        save(model, Path(folder) / "model.onnx")
        return sum(p.stat().st_size for p in Path(folder).iterdir())


def prepare(
    model: Any, *, calibration: Any, evaluate: Any, wishes: Mapping[str, Any], mending: RepairOptions, metric: str | None = None,
    output: str | None = None, provider: str = "cpu", threads: int = 1, time_limit: float = TIME_LIMIT, seed: int = 0, check: bool = True,
    tolerance: float = TOLERANCE, inputs: Mapping[str, Sequence[int]] | None = None, protect_outputs: bool = True, stat: bool = True,
    keep_state: bool = False, travels: bool = False, used: Sequence[str] = (), stage: Stage = quiet,
) -> Lab:  # fmt: skip
    """Reads the model and the data. A quarter of the calibration data is held out where there are no others to judge on.

    model: a source or an `Analysis`. travels: whether the experiment goes to machines that may not see the model's file. used: criteria.
    Raises BadOption where there is nothing to judge on.
    """
    if metric is not None:
        find_metric(metric)
    read = model if isinstance(model, Analysis) else analyze(
        model, inputs=inputs, protect_outputs=protect_outputs, stat=stat, keep_state=keep_state, stage=stage)  # fmt: skip
    fit = evidence_for(read, calibration, seed=seed, stage=stage)
    held = evidence_for(read, evaluate, seed=seed, stage=stage)
    whole = metric is not None and find_metric(metric).whole is not None
    if held is None and fit is not None and not fit.noise and not whole:
        fit, held = split(fit)
    if not whole and (held is None or held.noise):
        made_up = held or fit
        why = "there are no data" if made_up is None else f"the data are made up ({made_up.name})"
        raise BadOption(f"Quality can't be judged, as {why}: give real ones with --calibration or --evaluate, or a --metric of your own.")
    own = tuple(criteria.get(n) for n in used if n not in BUILT_IN)
    experiment = Experiment(
        _portable(read.given, travels), read.given.sha256, dict(read.settings), _packed(fit, read), _packed(held, read), dict(wishes),
        mending, metric, output, provider, threads, time_limit, seed, check, tolerance, own,
    )  # fmt: skip
    lab = Lab(experiment, read, fit, held)
    _opened[experiment.key] = lab
    return lab


_opened: dict[str, Lab] = {}  # of this process


def opened(experiment: Experiment) -> Lab:
    """The lab of an experiment; only the first time takes long. Raises SpaError if the model has changed meanwhile."""
    if experiment.key not in _opened:
        _opened.clear()  # one is as much as memory should hold
        for entry in experiment.entries:
            criteria.criterion(entry.name, per=entry.per, needs=entry.needs, aggregate=entry.aggregate)(entry.function)
        analysis = analyze(load(experiment.model), **{**experiment.trace, "inputs": experiment.trace.get("inputs") or None})
        if analysis.given.sha256 != experiment.sha256:
            raise BadOption("The model's file has changed since the sweep began: start again, in another folder.")
        _opened[experiment.key] = Lab(experiment, analysis, _unpacked(experiment.fit, analysis), _unpacked(experiment.held, analysis))
    return _opened[experiment.key]


def forget() -> None:
    """Closes what is open in this process."""
    _opened.clear()


def _portable(model: Model, travels: bool) -> str | bytes:
    """The model's path, or its bytes where no path leads to it."""
    if model.path is not None and (model.external or not travels):
        return os.path.abspath(model.path)
    if model.external:
        raise UnsupportedModel("A model in memory with external data can't be given to other processes: save it to a file first.")
    return b"".join(bytes(piece) for piece in model.origin.read())


def _packed(evidence: Evidence | None, analysis: Analysis) -> Packed | None:
    if evidence is None:
        return None
    return Packed(evidence.name, list(evidence.batches), evidence.labels, evidence.noise, evidence.model is not analysis.normal.model)


def _unpacked(packed: Packed | None, analysis: Analysis) -> Evidence | None:
    if packed is None:
        return None
    model = analysis.normal.model
    if packed.adapted:
        model = adapted(model, analysis.groups, [{k: v for k, v in b.items() if k != packed.labels} for b in packed.batches])
    return Evidence(packed.name, packed.batches, model, packed.noise, packed.labels)


def repair_of(experiment: Experiment, method: str) -> RepairOptions:
    """The repair of this method."""
    return replace(experiment.mending, method=method)
