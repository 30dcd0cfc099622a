"""Runs one-operator models through the real machinery: trace, mask, rewrite; on ONNX Runtime and on onnx's reference evaluator.

Inputs become initializers, whose axes are free, and nothing protects the outputs; so every axis that a signature leaves free
really loses positions. Two statements are compared with numbers:

* removing = masking: the rewritten model gives what the masked one gives at the kept positions;
* where only MAP dims shrink: the rewritten model gives what the *original* gives at the kept positions (no masking involved).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from spa.graph.demands import ANY, demands_of
from spa.graph.groups import Groups, find_groups
from spa.graph.normalize import normalize
from spa.graph.shapes import infer
from spa.graph.trace import trace
from spa.plans.rewrite import rewrite
from spa.proof.check import difference
from spa.proof.masking import masked
from spa.signatures import MAP
from spa.signatures.table import kind_of
from spa.storage.store import Model, load, to_proto, with_graph

Arrays = dict[str, Any]

RANDOM = frozenset({"Bernoulli", "RandomNormalLike", "RandomUniformLike", "Dropout"})
"""Operators that draw numbers (Dropout in training mode): only the shapes of their results are compared."""

READS_SIZES = frozenset({"Shape", "Size"})
"""Operators whose result restates sizes: once positions are gone it is another one, as it must be."""

REFERENCE_WRONG = {
    "LRN": "counts channels along axis 0",
    "GlobalMaxPool": "takes two axes as space, whatever the rank",
    "BatchNormalization 9": "is always in training mode",
}
"""Operators that the reference evaluator computes wrongly, and how; with an opset where it is that version's defect."""

COARSE = {"float16": 1e-2, "bfloat16": 5e-2, "uint8": 2e-2, "int8": 2e-2}
"""Tolerances by the type of an output, relative to its scale; 1e-4 for all other floats."""


@dataclass(frozen=True)
class Case:
    """A model whose inputs are known, maybe with its expected outputs."""

    name: str
    model: ModelProto
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...] | None = None

    @property
    def op(self) -> str:
        """The operator under test."""
        return self.model.graph.node[0].op_type if len(self.model.graph.node) == 1 else "expanded"


@dataclass
class Outcome:
    """What came of a case: groups that shrank, what failed, or why nothing could be run; engines that agreed."""

    groups: int = 0
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    engines: list[str] = field(default_factory=list)
    signature: str = ""


@cache
def onnx_cases() -> tuple[Case, ...]:
    """All operator cases of the onnx package."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return tuple(Case(c.name, c.model, tuple(c.data_sets[0][0]), tuple(c.data_sets[0][1])) for c in found)


def by_operator(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases by operator; those with several nodes stand under the operator that was expanded."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        name = case.name.removeprefix("test_").split("_expanded")[0].split("_")[0] + " expanded" if case.op == "expanded" else case.op
        found.setdefault(name, []).append(case)
    return found


# ---------------------------------------------------------------------- models


def unusable(case: Case) -> str:
    """Why a case can't be turned into one with initializers; empty if it can."""
    for value, array in zip(case.model.graph.input, case.inputs, strict=False):
        if not value.type.HasField("tensor_type"):
            return "an input is a sequence or optional"
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            return "an input holds strings"
        if not isinstance(array, np.ndarray | np.generic | onnx.TensorProto):
            return "an input is a sequence or optional"
    for value in case.model.graph.output:
        if not value.type.HasField("tensor_type"):
            return "an output is a sequence or optional"
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            return "an output holds strings"
    return ""


def with_initializers(case: Case, *, whole_numbers: bool = True) -> tuple[ModelProto, Arrays]:
    """The model with its inputs as initializers; without `whole_numbers` integer inputs stay inputs, and are the feeds."""
    model = ModelProto()
    model.CopyFrom(case.model)
    feeds: Arrays = {}
    del model.graph.input[:]
    for value, given in zip(case.model.graph.input, case.inputs, strict=False):
        array = numpy_helper.to_array(given) if isinstance(given, onnx.TensorProto) else np.asarray(given)
        if not whole_numbers and array.dtype.kind in "iub" and value.type.tensor_type.elem_type != onnx.TensorProto.BFLOAT16:
            model.graph.input.append(value)
            feeds[value.name] = array
            continue
        stored = numpy_helper.from_array(array, value.name)
        if stored.data_type != value.type.tensor_type.elem_type:  # types that numpy has no name for
            stored = helper.make_tensor(value.name, value.type.tensor_type.elem_type, array.shape, array.tobytes(), raw=True)
        model.graph.initializer.append(stored)
    return model, feeds


def trace_case(model: Model) -> tuple[Model, Groups]:
    """Groups of a model whose outputs may shrink, and whose inputs may not; one of several nodes is normalised first, as everywhere."""
    if len(model.graph.nodes) == 1:
        return model, find_groups(trace(model.graph, infer(model.graph), protect_outputs=False, keep_state=True))
    normal = normalize(model)
    return normal.model, find_groups(trace(normal.model.graph, normal.facts, protect_outputs=False, keep_state=True))


def shrinkable(groups: Groups) -> list[slice]:
    """Coordinates of the groups that may lose some; those without weights too, since here it is the signature that is tested."""
    found = [g.coordinates for g in groups.groups
             if g.size > 1 and (g.frozen is None or g.frozen.cause.startswith("has no weights"))]
    return [where for where in found if _widths(groups, where)]


def _widths(groups: Groups, where: slice) -> list[int]:
    """Numbers of coordinates below all that the group at `where` may be left with."""
    index = next(g.index for g in groups.groups if g.start == where.start)
    allowed = demands_of(groups).get(index, ANY)
    return [n for n in range(allowed.least, where.stop - where.start) if n % allowed.multiple == 0]


def removals(groups: Groups, seed: int, most: int = 6) -> Iterator[NDArray[np.bool_]]:
    """Random proper parts, of the sizes that the kernels take: of each group alone, then of all groups together."""
    rng = np.random.default_rng(seed)
    ranges = shrinkable(groups)
    joint = np.zeros(groups.total, bool)
    for i, where in enumerate(ranges):
        size = where.stop - where.start
        gone = np.zeros(groups.total, bool)
        gone[where.start + rng.choice(size, size - rng.choice(_widths(groups, where)), replace=False)] = True
        joint |= gone
        if len(ranges) > 1 and i < most:
            yield gone
    if ranges:
        yield joint


# ---------------------------------------------------------------------- engines


def on_runtime(model: ModelProto, feeds: Arrays) -> list[Any]:
    """Outputs on ONNX Runtime, without its optimizer."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def on_reference(model: ModelProto, feeds: Arrays, *, new_ops: Sequence[Any] = ()) -> list[Any]:
    """Outputs on onnx's reference evaluator, which `new_ops` are added to."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(ReferenceEvaluator(model, new_ops=list(new_ops)).run(None, feeds))


ENGINES = {"onnxruntime": on_runtime, "reference": on_reference}


def same(name: str, expected: Any, found: Any, tolerance: float) -> str:
    """What differs between two results; empty if nothing does."""
    a, b = np.asarray(expected), np.asarray(found)
    if a.shape != b.shape:
        return f"{name} has shape {b.shape}, expected {a.shape}"
    tolerance = max(tolerance, COARSE.get(a.dtype.name, 0.0) if tolerance else 0.0)
    if a.dtype.name.startswith(("float8", "float4", "int4", "uint4", "int2", "uint2", "bfloat16", "float6")):
        a, b = a.astype(np.float32), b.astype(np.float32)
    worst = difference(name, a, b)
    return f"{name} differs by {worst.relative:.1e} of its scale" if worst.relative > tolerance else ""


# ---------------------------------------------------------------------- the test of one case


def examine(case: Case, *, whole_numbers: bool = True, seed: int = 0, engines: Sequence[str] = tuple(ENGINES)) -> Outcome:
    """Traces a case, removes random parts of all its free groups, and compares with masking and with selecting."""
    why = unusable(case)
    if why:
        return Outcome(skipped=why)
    proto, feeds = with_initializers(case, whole_numbers=whole_numbers)
    model, groups = trace_case(load(proto))
    found = Outcome(groups=len(shrinkable(groups)))
    if case.op != "expanded":
        found.signature = str(groups.traced.nodes[0].signature or groups.traced.nodes[0].refusal)
    if not found.groups:
        return found
    originals: dict[str, list[Any]] = {}
    for engine in engines:
        if engine == "reference" and not {case.op, f"{case.op} {case.model.opset_import[0].version}"}.isdisjoint(REFERENCE_WRONG):
            continue
        try:
            originals[engine] = ENGINES[engine](proto, feeds)
        except Exception as error:  # an engine that lacks the operator
            found.skipped = f"{engine}: {str(error).splitlines()[0][:100]}"
    if not originals:
        return found
    found.skipped, found.engines = "", list(originals)
    for gone in removals(groups, seed):
        for problem in _compare(model, groups, gone, originals, feeds):
            found.problems.append(f"{case.name} [{found.signature}] removing {np.flatnonzero(gone).tolist()}: {problem}")
    return found


def _compare(model: Model, groups: Groups, gone: NDArray[np.bool_], originals: dict[str, list[Any]], feeds: Arrays) -> Iterator[str]:
    reference = to_proto(with_graph(model, masked(model.graph, groups, gone)))
    small = to_proto(with_graph(model, rewrite(model.graph, groups, gone)))
    complaint = checked(small)
    if complaint and not checked(to_proto(model)):
        yield f"the checker says {complaint}"
    moved_only = all(
        node.signature is not None and kind_of(node.signature, name) is MAP
        for node in groups.traced.nodes for name, axis in node.dims.items() if groups.dim_keep(axis, gone) is not None
    )
    incomparable = any(n.op_type in RANDOM | READS_SIZES for n in small.graph.node)
    for engine, original in originals.items():
        try:
            expected, result = ENGINES[engine](reference, feeds), ENGINES[engine](small, feeds)
        except Exception as error:  # whatever an engine raises is a finding here
            yield f"{engine} fails on it: {str(error).splitlines()[0][:300]}"
            continue
        for k, value in enumerate(model.graph.outputs):
            before, after, now = original[k], expected[k], result[k]
            if before is None or now is None:
                continue
            for axis in range(np.ndim(before)):
                keep = groups.keep((value.name, axis), gone)
                if keep is not None:
                    before, after = np.compress(keep, before, axis), np.compress(keep, after, axis)
            if incomparable and np.shape(before) == np.shape(now):
                before = after = now
            problem = same(value.name, after, now, 1e-4)
            if problem:
                yield f"{engine}: removing is not masking: {problem}"
            problem = same(value.name, before, now, 2e-6) if moved_only else ""
            if problem:
                yield f"{engine}: removing is not selecting: {problem}"


def checked(model: ModelProto) -> str:
    """What onnx's checker, with strict shape inference, says against a model; empty if nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker raises several kinds
        return str(error).splitlines()[0]
    return ""
