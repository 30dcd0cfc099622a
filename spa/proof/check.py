"""The proof: the pruned graph gives what the masked original gives, on ONNX Runtime and with the same inputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from spa.errors import CheckFailed, SpaError, UnsupportedModel
from spa.graph.state import feeds_for
from spa.proof.feeds import Feeds
from spa.storage.store import Model, save, to_bytes
from spa.timing.share import own_threads

IN_MEMORY = 64 << 20  # bytes; a larger model goes to the runtime through files, whose weights it maps instead of copying
TOLERANCE = 1e-4  # of the output's scale, float32


@dataclass(frozen=True)
class Difference:
    """Largest difference of one output: absolute, and over the output's scale (its largest absolute value)."""

    output: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class Check:
    """Result of a comparison. `tolerance` is what was allowed, relative to each output's scale."""

    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """Largest relative difference; infinity where the results are not comparable."""
        return max((d.relative for d in self.differences), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance."""
        return bool(self.worst <= self.tolerance)


def session(
    model: Model, *, threads: int = 0, optimize: bool = True, lean: bool = False, profile: str = "", optimized: Path | None = None
) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU provider; `lean` saves memory at the cost of speed.

    profile: prefix of the file that `end_profiling` writes. optimized: where the graph that will run is written, its weights beside it.
    Raises UnsupportedModel with the runtime's own words.
    """
    options = ort.SessionOptions()
    if lean and model.nbytes >= IN_MEMORY:
        options.add_session_config_entry("session.disable_prepacking", "1")  # else each weight is held twice
    options.enable_cpu_mem_arena = not lean  # a result that is kept would keep all that was allocated with it
    options.log_severity_level = 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimized.name}.data")
    options.intra_op_num_threads = threads or own_threads()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        if model.nbytes < IN_MEMORY:
            return ort.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save(model, path, external=True)
            return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except SpaError:  # no room for the files
        raise
    except Exception as error:  # onnxruntime raises classes of its own for each status
        text = str(error).splitlines()[0]
        raise UnsupportedModel(f"ONNX Runtime does not load the model: {text}") from error


def run(model: Model, feeds: Feeds, *, optimize: bool = True) -> dict[str, NDArray[np.generic]]:
    """Outputs by name. Raises UnsupportedModel if the runtime fails."""
    return run_session(session(model, optimize=optimize, lean=True), feeds_for(model.narrowed, feeds))


def run_session(opened: ort.InferenceSession, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
    """Outputs by name of an open session. Raises UnsupportedModel if the runtime fails."""
    names = [o.name for o in opened.get_outputs()]
    try:
        wanted = {i.name for i in opened.get_inputs()}
        results = opened.run(names, {k: v for k, v in feeds.items() if k in wanted})
    except Exception as error:  # as above
        raise UnsupportedModel(f"ONNX Runtime does not run the model: {str(error).splitlines()[0]}") from error
    return dict(zip(names, results, strict=True))


def compare(
    masked: Model,
    small: Model,
    feeds: Feeds,
    *,
    kept: Mapping[str, Mapping[int, NDArray[np.int64]]] | None = None,
    tolerance: float = TOLERANCE,
    small_feeds: Feeds | None = None,
) -> Check:
    """Runs both and compares all outputs; `kept` picks the positions of outputs that the small model still has.

    small_feeds: for the small model, where it takes others (new ids).
    """
    given = feeds if small_feeds is None else small_feeds
    return compare_results(run(masked, feeds), run(small, given), kept=kept, tolerance=tolerance)


def compare_results(
    expected: Mapping[str, NDArray[np.generic]],
    found: Mapping[str, NDArray[np.generic]],
    *,
    kept: Mapping[str, Mapping[int, NDArray[np.int64]]] | None = None,
    tolerance: float = TOLERANCE,
) -> Check:
    """Compares outputs by name; `kept` picks the positions that those found still have. Raises CheckFailed if nothing could be seen."""
    differences = []
    for name, value in expected.items():
        for axis, positions in (kept or {}).get(name, {}).items():
            value = np.take(value, positions, axis=axis)
        differences.append(difference(name, value, found[name]) if name in found else Difference(name, np.inf, np.inf))
    if expected and not any(_tells(v) for v in expected.values()):
        raise CheckFailed("The masked model gives NaN or infinity alone, so nothing can be proven: give inputs that suit it with --feeds.")
    return Check(tuple(differences), tolerance)


def _tells(value: object) -> bool:
    """Whether a result holds any element that is worth comparing."""
    array = np.asarray(value) if not isinstance(value, Sequence | Mapping) else None
    return array is None or array.dtype.kind not in "fc" or not array.size or bool(np.isfinite(array).any())


def difference(name: str, expected: object, found: object) -> Difference:
    """Largest difference of two results; NaN and infinities must stand in the same places."""
    if isinstance(expected, Sequence | Mapping) and not isinstance(expected, str):
        same = repr(expected) == repr(found)
        return Difference(name, 0.0 if same else np.inf, 0.0 if same else np.inf)
    a, b = np.asarray(expected), np.asarray(found)
    if a.shape != b.shape:
        return Difference(name, np.inf, np.inf)
    if a.dtype.kind not in "fiub" and a.dtype.name != "bfloat16":
        same = bool(np.array_equal(a, b))
        return Difference(name, 0.0 if same else np.inf, 0.0 if same else np.inf)
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return Difference(name, np.inf, np.inf)
    if not finite.any():
        return Difference(name, 0.0, 0.0)
    absolute = float(np.abs(x[finite] - y[finite]).max())
    scale = float(np.abs(x[finite]).max())
    return Difference(name, absolute, absolute / scale if scale else (0.0 if not absolute else np.inf))
