"""A model run in steps: each step computes some values for all batches, from what the steps before have left behind.

What a step computes is never computed again, so a walk over all layers costs one run of the model; and the weights of what was
not run yet may still change, which is what layer-wise repair needs. What is held between two steps are the values that later
nodes read; above a limit they wait in files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, helper

from spa.errors import UnsupportedModel
from spa.graph.state import feeds_for
from spa.graph.trace import outer_values
from spa.graph.view import type_of
from spa.proof.check import session
from spa.proof.feeds import Feeds
from spa.storage.spill import Spill
from spa.storage.store import Model, with_graph
from spa.timing.share import room

LIMIT = 2 << 30  # bytes of values that are held in memory


def tapped(model: Model, graph: gs.Graph, inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, int]) -> Model:
    """The part of a model between some of its values, as a model of its own; constants are shared with `graph`."""
    header = ModelProto()
    header.CopyFrom(model.header)
    for field in ("input", "output", "value_info", "quantization_annotation"):
        header.graph.ClearField(field)
    wanted, given = set(outputs), set(inputs)
    nodes: list[gs.Node] = []
    need = wanted - given
    for node in reversed(graph.nodes):
        if any(t.name in need for t in node.outputs if t.name):
            nodes.append(node)
            need |= {n for n in reads(node) if n not in given}
    fresh: dict[str, gs.Tensor] = {}

    there = graph.tensors()

    def variable(name: str) -> gs.Variable:
        if name not in fresh:
            kind = types.get(name) or type_of(there[name].dtype if name in there else None)  # passes have made some since
            fresh[name] = gs.Variable(name, dtype=helper.tensor_dtype_to_np_dtype(kind) if kind else None)
        found = fresh[name]
        assert isinstance(found, gs.Variable)
        return found

    def tensor(old: gs.Tensor) -> gs.Tensor:
        if not old.name:
            return gs.Variable.empty()
        if isinstance(old, gs.Constant):
            if old.name not in fresh:
                fresh[old.name] = gs.Constant(old.name, old._values, old.data_location)
            return fresh[old.name]
        return variable(old.name)

    copies = [
        gs.Node(n.op, n.name, dict(n.attrs), [tensor(t) for t in n.inputs], [tensor(t) for t in n.outputs], n.domain)
        for n in reversed(nodes)
    ]
    used = {n for node in copies for n in reads(node)} | wanted
    part = gs.Graph(
        copies, [variable(n) for n in inputs if n in used], [variable(n) for n in outputs], name=graph.name, opset=graph.opset,
        import_domains=graph.import_domains,
    )  # fmt: skip
    part.ir_version = graph.ir_version
    size = sum(getattr(c._values, "nbytes", 0) for c in fresh.values() if isinstance(c, gs.Constant))
    return replace(with_graph(model, part), header=header, nbytes=int(size))


def reads(node: gs.Node) -> set[str]:
    """Values that a node reads, those that its nested graphs take from outside among them."""
    return {t.name for t in node.inputs if t.name and not isinstance(t, gs.Constant)} | set(outer_values(node))


class Stepper:
    """Runs a graph over batches, step by step. Use as a context manager: files that hold values go at the end.

    Parameters
    ----------
    model, types
        The model, and the type of each of its values (`Facts.types`). Constants may be replaced in its graph between steps.
    batches
        Inputs. They are held.
    limit
        Bytes of values that are held in memory; by default `LIMIT`, or this process's share if that is less.
    lean
        Whether sessions save memory at the cost of speed; they don't optimise then, as folded constants are copies.
    """

    def __init__(
        self, model: Model, types: Mapping[str, int], batches: Iterable[Feeds], *, limit: int | None = None, threads: int = 0,
        lean: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.types, self.threads, self.lean = model, types, threads, lean
        names = {t.name for t in model.graph.inputs}
        self._held: list[dict[str, NDArray[Any]]] = [
            feeds_for(model.narrowed, {k: v for k, v in b.items() if k in names}) for b in batches
        ]
        self._left = list(model.graph.nodes)
        self._spill = Spill(room(LIMIT) if limit is None else limit)
        self._spill.used = sum(v.nbytes for held in self._held for v in held.values())

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.clear()
        self._spill.close()

    def step(self, values: Sequence[str]) -> list[dict[str, NDArray[Any]]]:
        """Values of every batch; nodes that only served them are done with."""
        there = self._held[0] if self._held else {}
        missing = [v for v in values if v not in there]
        if missing:
            self._run(missing)
        found = [{v: held[v] for v in values} for held in self._held]
        self._forget()
        return found

    def _run(self, missing: Sequence[str]) -> None:
        there = set(self._held[0]) if self._held else set()
        need, done = set(missing), []
        for node in reversed(self._left):
            if any(t.name in need for t in node.outputs if t.name):
                done.append(node)
                need |= reads(node) - there
        ran = {id(n) for n in done}
        rest = [n for n in self._left if id(n) not in ran]
        later = {n for node in rest for n in reads(node)}
        made = [t.name for n in reversed(done) for t in n.outputs if t.name]
        outputs = list(dict.fromkeys([*missing, *(n for n in made if n in later)]))
        part = tapped(self.model, self.model.graph, sorted(there), outputs, self.types)
        opened = session(part, threads=self.threads, lean=self.lean, optimize=not self.lean)
        inputs = [i.name for i in opened.get_inputs()]
        for held in self._held:
            try:
                results = opened.run(outputs, {n: held[n] for n in inputs})
            except Exception as error:  # onnxruntime raises classes of its own for each status
                words = str(error).splitlines()[0]
                raise UnsupportedModel(f"ONNX Runtime does not run the model on the data: {words}") from error
            for name, value in zip(outputs, results, strict=True):
                held[name] = self._spill.keep(value)
            del results
        self._left = rest

    def _forget(self) -> None:
        later = {n for node in self._left for n in reads(node)}
        for held in self._held:
            for name in [n for n in held if n not in later]:
                self._spill.drop(held.pop(name))
