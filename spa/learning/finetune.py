"""Fine-tuning of a model file, in torch, from labels or from a teacher; the weights come back under their names.

    found = spa.finetune("small.onnx", batches, teacher="model.onnx", training=Training(epochs=20))
    found.save("tuned.onnx")

After each epoch the model is judged on held-out data by ONNX Runtime, and the best one is kept; the model as it came takes part, so that
training never makes it worse by that metric. With a checkpoint file a training that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spa.budgets.metrics import find_metric
from spa.budgets.quality import Judge, automatic, judge, split
from spa.data.calibration import Calibration, calibration
from spa.data.evidence import MOMENTS, SYNTHETIC, Evidence, put
from spa.errors import BadFile, BadOption
from spa.graph.analysis import Analysis, Source, analyze, evidence_for, opened
from spa.graph.normalize import untied
from spa.learning.training import (
    FEW,
    Samples,
    Training,
    device_of,
    label_loss,
    learned,
    optimizer_of,
    packed,
    rate_at,
    running,
    teacher_loss,
)  # fmt: skip
from spa.plans.rewrite import copy_graph
from spa.proof.check import run_session, session
from spa.proof.feeds import Feeds
from spa.stages import Stage, quiet
from spa.statistics.torch_graph import TorchGraph
from spa.storage.files import write_files
from spa.storage.store import Model, save, with_graph
from spa.torch_ops import Tensor, torch

FORMAT = "spa-training-2"
KEPT = "the best model before it was kept; try a smaller --rate"
MOST = 1 << 60  # samples that are trained on
CLASSES = ("accuracy", "top5", "agreement", "kl", "perplexity")  # metrics of outputs that are classes


@dataclass(frozen=True)
class Epoch:
    """number: 0 is the model as it came, without a loss. loss: mean over the steps. value: of the metric on held-out data."""

    number: int
    loss: float | None
    value: float


@dataclass(frozen=True)
class Finetuned:
    """model: the best one. metric: its name; dense: the teacher's (or the first model's) figure. stopped: why before the end, or ""."""

    model: Model
    history: tuple[Epoch, ...]
    best: Epoch
    metric: str
    dense: float
    tensors: int
    stopped: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model, whole or not at all. Raises BadFile."""
        save(self.model, path)


def finetune(
    model: Source,
    data: Any,
    *,
    teacher: Source | None = None,
    evaluate: Any = None,
    metric: str | None = None,
    training: Training | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    tell: Callable[[Epoch], None] = lambda epoch: None,
    stage: Stage = quiet,
) -> Finetuned:
    """Trains the weights of a model.

    Parameters
    ----------
    model
        An ONNX file, or what `spa.load` gives.
    data
        Batches to train on, as `calibration` takes them, with labels or without.
    teacher
        The model whose outputs are the aim, on the same inputs: the one before pruning. Needed where there are no labels.
    evaluate
        Data to judge on; by default a quarter of `data` is held out.
    metric
        As in `spa.budgets.metrics`: by default accuracy where there are labels, else kl, against the teacher's outputs.
    training
        How to train.
    checkpoint
        A file that holds all that is needed to go on, written after each epoch.
    tell
        Is called after each epoch, and before the first.
    stage
        Is told what goes on.

    Raises
    ------
    BadOption
        If there is nothing to learn from, data do not fit, or torch is missing. UnsupportedModel for operators without gradients.
    BadFile
        For a checkpoint of another training, and one that can't be written.
    """
    how = training or Training()
    analysis = analyze(untied(opened(model)), stage=stage)
    evidence = _all_of(analysis, data, how.seed, stage)
    held = _all_of(analysis, evaluate, how.seed, stage)
    if evidence is None or not evidence.batches:
        raise BadOption("There are no data to train on: give some with --data.")
    if teacher is None and (evidence.noise or evidence.labels is None):
        raise BadOption("There is nothing to learn from: give labels with the data (--labels), or a --teacher.")
    if (evidence.labels if how.loss == "cross-entropy" else teacher) is None and how.loss != "auto":
        raise BadOption(f"--loss {how.loss} needs {'labels (--labels)' if how.loss == 'cross-entropy' else 'a --teacher'}.")
    if held is None:
        evidence, held = split(evidence)
    reference = analysis.given if teacher is None else opened(teacher)
    chosen = find_metric(metric) if metric else automatic(None, held.labels)
    with stage("evaluating"):
        judged = judge(reference, chosen, held)
    return _Run(analysis, reference if teacher is not None else None, evidence, judged, how, checkpoint, tell).run()


def _all_of(analysis: Analysis, data: Any, seed: int, stage: Stage) -> Evidence | None:
    """Data as `evidence_for` gives them, without the limit that calibration has."""
    if data is not None and not isinstance(data, Evidence | Calibration) and not (isinstance(data, str) and data in (SYNTHETIC, MOMENTS)):
        data = calibration(data, analysis.groups.traced, samples=MOST, seed=seed)
    return evidence_for(analysis, data, seed=seed, stage=stage)


@dataclass
class _State:
    """All that changes: what a checkpoint holds."""

    done: int = 0
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


class _Run:
    def __init__(
        self, analysis: Analysis, teacher: Model | None, evidence: Evidence, judged: Judge, how: Training,
        checkpoint: str | os.PathLike[str] | None, tell: Callable[[Epoch], None],
    ) -> None:  # fmt: skip
        self.given, self.judge, self.how, self.tell = analysis.given, judged, how, tell
        self.path = None if checkpoint is None else Path(checkpoint)
        self.device = device_of(how.device)
        self.network = TorchGraph(self.given.graph)
        names = learned(analysis)
        self.weights = {n: packed(p.detach().to(self.device)).requires_grad_(n in names) for n, p in self.network.parameters.items()}
        self.learned = {n: p for n, p in self.weights.items() if n in names}
        if not self.learned:
            raise BadOption("The model has no weights that training could change.")
        self.network.constants = {n: c.to(self.device) for n, c in self.network.constants.items()}
        self.labels = evidence.labels
        inputs = [t.name for t in self.given.graph.inputs]
        self.samples = Samples(evidence.batches, how, inputs)
        self.teacher = None if teacher is None else session(teacher)
        self.steps = how.epochs * len(self.samples)
        by_batch = how.norms == "batch" or (how.norms == "auto" and self.samples.size >= FEW)
        self.running = running(analysis) if by_batch else {}
        self.changing = self.learned | {n: self.weights[n] for n in self.running.values()}
        self.mixed = how.precision == "bfloat16" or (how.precision == "auto" and self.device.type == "cuda")
        self.optimizer = optimizer_of(self.learned, how)
        self.identity = hashlib.sha256(repr((self.given.sha256, asdict(how), sorted(names), len(self.samples.rows))).encode()).hexdigest()

    def run(self) -> Finetuned:
        """Trains to the end, from the beginning or from the checkpoint."""
        state = self._resumed() or self._begun()
        stopped = ""
        for number in range(state.done + 1, self.how.epochs + 1):
            loss = self._epoch(number)
            if not np.isfinite(loss):
                stopped = f"the loss became {loss} in epoch {number}: {KEPT}"
                break
            epoch = Epoch(number, loss, self.judge(self._model(self.changing)))
            if not np.isfinite(epoch.value):
                stopped = f"the {self.judge.metric.name} became {epoch.value} in epoch {number}: {KEPT}"
                break
            if self._better(epoch, state.history):
                state.best = self._copied()
            state.history.append(epoch)
            state.done = number
            self._keep(state)
            self.tell(epoch)
        best = min(state.history, key=lambda e: (self._cost(e), e.number))
        return Finetuned(self._model(state.best), tuple(state.history), best, self.judge.metric.name, self.judge.value, len(self.learned),
                         stopped)  # fmt: skip

    def _begun(self) -> _State:
        first = Epoch(0, None, self.judge(self.given))
        self.tell(first)
        return _State(0, [first], self._copied())

    def _copied(self) -> dict[str, Tensor]:
        return {n: p.detach().cpu().clone() for n, p in self.changing.items()}

    def _better(self, epoch: Epoch, history: Sequence[Epoch]) -> bool:
        return all(self._cost(epoch) < self._cost(e) for e in history)

    def _cost(self, epoch: Epoch) -> float:
        """Less is better; what is no number is worst."""
        return np.inf if np.isnan(epoch.value) else -epoch.value if self.judge.metric.higher_is_better else epoch.value

    # ------------------------------------------------------------------ one epoch

    def _epoch(self, number: int) -> float:
        """Mean loss; not finite if a step's was not."""
        losses = []
        step = (number - 1) * len(self.samples)
        for batch in self.samples.epoch(number):
            for group in self.optimizer.param_groups:
                group["lr"] = rate_at(step, self.steps, self.how)
            self.optimizer.zero_grad()
            moments: dict[str, Tensor] = {}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                loss = self._loss(batch, moments if self.running else None)
            if not bool(torch.isfinite(loss)):
                return float(loss.detach())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.learned.values(), self.how.clip)
            if not bool(torch.isfinite(norm)):
                return float("nan")
            self.optimizer.step()
            with torch.no_grad():
                for name, tensor in moments.items():
                    self.weights[self.running[name]].copy_(tensor)
            losses.append(float(loss.detach()))
            step += 1
        return float(np.mean(losses))

    def _loss(self, batch: Feeds, moments: dict[str, Tensor] | None) -> Tensor:
        inputs = {t.name: batch[t.name] for t in self.given.graph.inputs}
        fed = {n: packed(torch.as_tensor(np.array(v)).to(self.device)) for n, v in inputs.items()}
        output = self.network.run(fed, parameters=self.weights, moments=moments)[self.judge.output]
        output = output.float() if output.is_floating_point() else output
        parts = []
        if self.labels is not None and self.how.loss in ("auto", "cross-entropy"):
            labels = torch.as_tensor(np.array(batch[self.labels])).to(self.device)
            parts.append(label_loss(output, labels))
        if self.teacher is not None and self.how.loss != "cross-entropy":
            wanted = torch.as_tensor(run_session(self.teacher, inputs)[self.judge.output].astype(np.float32)).to(self.device)
            if wanted.shape != output.shape:
                raise BadOption(f"--teacher gives {self.judge.output!r} in the shape {tuple(wanted.shape)}, the model in "
                                f"{tuple(output.shape)}: it is not the model that this one was pruned from.")  # fmt: skip
            classes = self.judge.metric.name in CLASSES
            kind = self.how.loss if self.how.loss in ("kl", "mse") else "kl" if classes else "mse"
            parts.append(teacher_loss(output, wanted, kind, self.how.temperature))
        return parts[0] if len(parts) == 1 else (1 - self.how.teaching) * parts[0] + self.how.teaching * parts[1]

    # ------------------------------------------------------------------ what is kept

    def _model(self, weights: Mapping[str, Tensor]) -> Model:
        graph = copy_graph(self.given.graph)
        for name, tensor in weights.items():
            put(graph, name, tensor.detach().cpu().numpy())
        return with_graph(self.given, graph)

    def _keep(self, state: _State) -> None:
        if self.path is None:
            return
        held = {
            "format": FORMAT, "identity": self.identity, "done": state.done, "best": state.best,
            "history": [(e.number, e.loss, e.value) for e in state.history], "optimizer": self.optimizer.state_dict(),
            "weights": {n: p.detach().cpu() for n, p in self.changing.items()},
        }  # fmt: skip
        stream = io.BytesIO()
        torch.save(held, stream)
        write_files([(self.path, [stream.getvalue()])])

    def _resumed(self) -> _State | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            held = torch.load(self.path, weights_only=True, map_location="cpu")  # tensors and plain data only: a pickle could run anything
        except Exception as error:  # torch raises what its readers raise
            raise BadFile(f"--checkpoint {self.path} can't be read as one: give another name, or remove it.") from error
        if not isinstance(held, Mapping) or held.get("format") != FORMAT or held.get("identity") != self.identity:
            raise BadFile(f"--checkpoint {self.path} is of another model, other data or other settings: give another name, or remove it.")
        with torch.no_grad():
            for name, tensor in held["weights"].items():
                self.changing[name].copy_(tensor)
        self.optimizer.load_state_dict(held["optimizer"])
        history = [Epoch(*entry) for entry in held["history"]]
        for epoch in history:
            self.tell(epoch)
        return _State(held["done"], history, dict(held["best"]))
