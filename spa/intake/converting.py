"""Conversion: recognised, converted by the framework's own converter, frozen as asked, normalised, compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from spa.errors import BadOption, CheckFailed, UnsupportedModel
from spa.graph.normalize import Normal, normalize
from spa.intake.fitting import fitted
from spa.intake.frameworks import Framework, of_object, recognise
from spa.intake.parity import Parity, parity, sentence
from spa.intake.remote import Here, Reader, Remote
from spa.proof.check import TOLERANCE
from spa.proof.feeds import Feeds
from spa.stages import Stage, quiet
from spa.storage.store import LARGEST_FILE, Model, load, save, to_proto

DYNAMIC = ("batch", "none", "keep")
Shape = Sequence[int | str | None]


@dataclass(frozen=True)
class Converted:
    """A converted model: where it came from, how well it agrees with the framework (None if not asked), and what the converter said."""

    model: Model
    framework: Framework
    parity: Parity | None
    notes: tuple[str, ...]
    folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)  # where a large model's weights wait

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model; whole or not at all."""
        save(self.model, path)


def convert(
    source: Any,
    *,
    framework: str = "auto",
    inputs: Mapping[str, Shape] | Sequence[Shape] = (),
    dtypes: Mapping[str, str] | None = None,
    dynamic: str | None = None,
    opset: int = 0,
    entry: str = "",
    trust: bool = False,
    cache: bool = True,
    feeds: Feeds | Callable[[Model], Feeds | None] | None = None,
    check: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    stage: Stage = quiet,
) -> Converted:
    """A model of any framework as ONNX, compared with what the framework itself gives.

    Parameters
    ----------
    source
        A path, `file.py:factory`, `package.module:factory`, `timm:name`, or a live object: a module of torch or of flax.nnx, an
        estimator of scikit-learn; with `framework="jax"` also a function, or (module of linen, variables).
    framework
        A row of `spa.intake.frameworks`, or "auto".
    inputs
        Shapes by name, or in order; a size that is a name or None is free. What the model says itself need not be given.
    dtypes
        Of inputs, where the framework does not know: {"ids": "int64"}.
    dynamic
        Which sizes of inputs stay free: "batch" (the first axis), "none", or "keep" for all that are free in the framework. None is "keep"
        where `inputs` names free sizes, or gives none and the framework's models are of no use with fixed ones; else "batch".
    opset
        Of ONNX; 0 is the converter's choice.
    entry
        The class or function that makes the network which a checkpoint fits, a signature, or the like.
    trust
        Whether code that lies in the file may run (pickles).
    cache
        Whether a language model has its key-value cache as inputs and outputs.
    feeds
        Inputs for the comparison, or what gives them for the converted model; drawn without any.
    check, tolerance, seed
        Whether to compare, what is allowed of each output's scale, and the seed of the draw.
    stage
        Is told what goes on.

    Raises
    ------
    BadFile, BadOption
        If it is not there, damaged, not to be trusted, of no known framework, or the framework is not installed.
    UnsupportedModel
        If the converter can't convert it.
    CheckFailed
        If it does not give what the framework gives.
    """
    named = inputs if isinstance(inputs, Mapping) else {str(k): shape for k, shape in enumerate(inputs)}
    wish = {
        "inputs": {name: list(shape) for name, shape in named.items()}, "dtypes": dict(dtypes or {}), "opset": opset, "entry": entry,
        "dynamic": _dynamic(dynamic, named, "batch"), "trust": trust, "cache": cache, "folder": os.getcwd(), "seed": seed,
    }  # fmt: skip
    with stage("opening the framework"):
        reader, row = _reader(source, framework, wish, dynamic)
    folder = tempfile.TemporaryDirectory(prefix="spa-")
    try:
        target = Path(folder.name) / "model.onnx"
        wish["inputs"] = fitted(reader, named)
        with stage("converting"):
            notes = reader.convert(target)
        with stage("normalising"):
            normal = _normalised(target, row, wish)
        found = None
        if check:
            with stage("comparing with the framework"):
                fed = feeds(normal.model) if callable(feeds) else feeds
                found = parity(reader, normal, feeds=fed, tolerance=tolerance, seed=seed)
            if not found.passed:
                raise CheckFailed(sentence(found, row.title))
        if normal.model.nbytes > LARGEST_FILE:
            return Converted(normal.model, row, found, tuple(notes), folder)
        return Converted(load(to_proto(normal.model)), row, found, tuple(notes))
    finally:
        if isinstance(reader, Remote):
            reader.close()


def _dynamic(asked: str | None, inputs: Mapping[str, Any], usual: str) -> str:
    if asked is None and inputs:
        return "keep" if any(not isinstance(size, int) for shape in inputs.values() for size in shape) else "batch"
    if asked is None:
        return usual
    if asked not in DYNAMIC:
        raise BadOption(f"--dynamic is {asked!r}, but must be one of: {', '.join(DYNAMIC)}.")
    return asked


def _reader(source: Any, framework: str, wish: dict[str, Any], dynamic: str | None) -> tuple[Reader, Framework]:
    if not isinstance(source, str | os.PathLike):
        row = of_object(source, framework)
        return Here(row, source, wish), row
    origin = recognise(os.fspath(source), framework)
    if origin.framework.trust and not wish["trust"]:
        raise BadOption(f"{origin.place} is not opened: {origin.framework.trust}; if you trust where it comes from, say so with --trust.")
    wish["entry"] = wish["entry"] or origin.entry
    wish["dynamic"] = _dynamic(dynamic, wish["inputs"], origin.framework.dynamic)
    return Remote(origin, wish), origin.framework


def _normalised(path: Path, row: Framework, wish: Mapping[str, Any]) -> Normal:
    """What a converter has written, with sizes frozen as asked, and the normalising passes over it."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UnsupportedModel(f"{row.title}'s converter has written no ONNX file.") from error
    frozen = _freeze(proto, wish)
    if frozen:
        path.write_bytes(proto.SerializeToString())
    return normalize(load(path))


def _freeze(proto: onnx.ModelProto, wish: Mapping[str, Any]) -> bool:
    """Fixes sizes that inputs leave free and that should not be: those given, 1 for a batch and for what nothing is known of."""
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed, make_input_shape_fixed  # this imports torch, where there is one

    dynamic, given = wish["dynamic"], wish["inputs"]
    if dynamic == "keep":
        return False
    weights = {t.name for t in proto.graph.initializer}
    changed = False
    for tensor in [t for t in proto.graph.input if t.name not in weights]:
        dims = tensor.type.tensor_type.shape.dim
        asked = given.get(tensor.name, [])
        for axis, dim in enumerate(dims):
            if dim.HasField("dim_value") or (axis == 0 and dynamic == "batch"):
                continue
            size = asked[axis] if axis < len(asked) and isinstance(asked[axis], int) else 1
            if dim.dim_param:
                make_dim_param_fixed(proto.graph, dim.dim_param, size)
            else:
                shape = [d.dim_value if d.HasField("dim_value") else (size if k == axis else 0) for k, d in enumerate(dims)]
                if all(shape):
                    make_input_shape_fixed(proto.graph, tensor.name, shape)
                else:
                    dim.dim_value = size
            changed = True
    return changed

