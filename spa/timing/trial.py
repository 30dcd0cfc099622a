"""A model on an engine, against ONNX Runtime's CPU provider in float32: does it give the same there, and did it really run there?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from spa.engines.table import TOLERANCES, Engine, Placement, Settings
from spa.graph.state import feeds_for
from spa.graph.trace import constant_values
from spa.proof import check as checking
from spa.proof.check import Check
from spa.proof.feeds import Feeds
from spa.proof.widen import widen
from spa.stages import Stage, quiet
from spa.storage.store import Model

QUANTISED = frozenset({"int8", "uint8", "int4", "uint4", "int2", "uint2"})
PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Trial:
    """How a model did on an engine.

    name, version: of the engine. element_type: what its tolerance went by. figures: numbers that the engine tells of the model. timed: ""
    if its times mean something. check: the comparison of its outputs.
    """

    name: str
    version: str
    placement: Placement
    element_type: str
    check: Check
    figures: Mapping[str, float] = field(default_factory=dict)
    timed: str = ""

    @property
    def stayed(self) -> bool:
        """Whether no node fell back to another provider."""
        return not self.placement.fell_back


def element_type(model: Model, settings: Settings | None = None) -> str:
    """What a model computes in, the coarsest that it holds: int8 (anything quantised), bfloat16, float16 or float32.

    Weights tell, and zero points: an image of bytes alone makes no quantised network. `precision` of the settings counts like float32's
    type.
    """
    held = {name_of(t.dtype) for t in constant_values(model.graph).values()} | {name_of(t.dtype) for t in model.graph.inputs} - QUANTISED
    asked = PRECISIONS.get((settings or Settings()).options.get("precision", ""), "float32")
    if held & QUANTISED or any(name.startswith("float8") for name in held):
        return "int8"
    return next((name for name in ("bfloat16", "float16") if name in held or name == asked), "float32")


def name_of(kind: object) -> str:
    """A type's name, as numpy and ml_dtypes say it; "" for what is no type."""
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind).name)  # type: ignore[call-overload]
    except (TypeError, KeyError):
        return ""


def tolerance_of(engine: Engine, kind: str) -> float:
    """What an engine's results may differ by, over an output's scale."""
    return engine.tolerances.get(kind, TOLERANCES[kind])


def expected(model: Model, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
    """What a model gives on the CPU provider in float32."""
    wide, given = widen(model, feeds)
    return checking.run(wide, given)


def try_on(
    engine: Engine,
    model: Model,
    feeds: Feeds,
    reference: Mapping[str, NDArray[np.generic]],
    *,
    settings: Settings | None = None,
    kept: Mapping[str, Mapping[int, NDArray[np.int64]]] | None = None,
    tolerance: float | None = None,
    stage: Stage = quiet,
) -> Trial:
    """Runs a model on an engine, in its own element type, and compares all outputs with a reference.

    tolerance: None for the engine's. Raises UnsupportedModel if the engine refuses it, or runs none of it itself.
    """
    given = settings or Settings()
    kind = element_type(model, given)
    allowed = tolerance_of(engine, kind) if tolerance is None else tolerance
    with stage(f"running on {engine.name}"):
        opened = engine.load(model, given)
        try:
            found = opened.run(feeds_for(model.narrowed, feeds))
            placement, figures = opened.placement, dict(getattr(opened, "figures", {}))  # known only when sizes are
        finally:
            opened.close()
    check = checking.compare_results(reference, found, kept=kept, tolerance=allowed)
    return Trial(engine.name, engine.version(), placement, kind, check, figures, engine.timed)
