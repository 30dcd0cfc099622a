"""A Keras model made as small as its exported graph: `apply_to_keras(model, plan, onnx="model.onnx")`.

The weights are cut as any arrays (`spa.frameworks.trees`). Keras makes its layers from a configuration: the numbers in it that say how
wide a layer is are set to what is left of its kernels, a new model is made of it, and it is given the weights that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from spa import api
from spa.errors import CheckFailed
from spa.frameworks.trees import apply_to_arrays
from spa.graph.analysis import Analysis, Source, analyzed_for
from spa.plans.plan import Plan, load_plan
from spa.proof.check import run
from spa.proof.prove import runnable
from spa.stages import collector_paused
from spa.storage.store import Model

TOLERANCE = 1e-4
Shape = tuple[int, ...]
WIDTHS: Mapping[str, Callable[[Mapping[str, Shape]], int | None]] = {
    "filters": lambda w: w["kernel"][-2 if "transposed" in w else -1] if "kernel" in w else w.get("pointwise_kernel", (None,))[-1],
    "units": lambda w: w["recurrent_kernel"][0] if "recurrent_kernel" in w else w["kernel"][-1] if "kernel" in w else None,
    "output_dim": lambda w: w["embeddings"][1] if "embeddings" in w else None,
}
"""Number of a layer's configuration -> what it is, from the shapes of its weights by their names."""


@collector_paused()
def apply_to_keras(
    model: Any, plan: Plan | str | Mapping[str, Any], onnx: Source | Analysis, *, pruned: Source | None = None, check: bool = True,
    tolerance: float = TOLERANCE,
) -> Any:  # fmt: skip
    """A Keras 3 model with smaller layers, which gives what the pruned file gives; the one given is left alone.

    Parameters
    ----------
    model
        The model that `onnx` was exported from, with the same weights: sequential, functional, or of a class with `get_config`.
    plan
        What was removed from `onnx`.
    onnx
        The ONNX file as it was before pruning.
    pruned
        The pruned file, where its weights were repaired or trained: they are taken over. By default the model's own are cut.
    check
        Compare all outputs with those of the pruned file, on drawn inputs.
    tolerance
        Of the outputs' scale.

    Raises
    ------
    BadOption
        If the file does not tell what a weight loses.
    CheckFailed
        If no model of these sizes can be made of the configuration, or it gives other outputs.
    """
    decided = load_plan(plan)
    analysis = onnx if isinstance(onnx, Analysis) else analyzed_for(onnx, decided)
    arrays = {w.path: np.asarray(w.numpy() if hasattr(w, "numpy") else w) for w in model.weights}
    small = apply_to_arrays(arrays, decided, analysis, pruned=pruned)
    try:
        made = type(model).from_config(_narrower(model, small))
        made.set_weights([small[w.path] for w in model.weights])
    except (ValueError, TypeError) as error:
        raise CheckFailed(f"Keras makes no model of the smaller sizes from this configuration ({' '.join(str(error).split())[:200]}); "
                          "spa.apply_to_arrays gives the smaller weights alone.") from error  # fmt: skip
    if check:
        _compare(made, analysis, api.opened(pruned) if pruned is not None else api.apply(analysis, decided, check=False).model, tolerance)
    return made


def _narrower(model: Any, small: Mapping[str, Any]) -> dict[str, Any]:
    """The model's configuration with the widths that are left."""
    config = copy.deepcopy(model.get_config())
    layers = {layer.name: layer for layer in _layers(model)}
    for entry in _entries(config):
        inner = entry["config"]
        layer = layers.get(str(inner.get("name", "")))
        entry.pop("build_config", None)
        if layer is None:
            continue
        shapes = {w.name: tuple(np.shape(small[w.path])) for w in layer.weights if w.path in small}
        if "Transpose" in type(layer).__name__:
            shapes["transposed"] = ()
        for name, width in WIDTHS.items():
            found = width(shapes) if name in inner else None
            if found is not None:
                inner[name] = int(found)
    return dict(config)


def _layers(model: Any) -> Iterator[Any]:
    """Layers, and those of models in them."""
    for layer in getattr(model, "layers", ()):
        yield layer
        yield from _layers(layer)


def _entries(config: Any) -> Iterator[dict[str, Any]]:
    """The serialised objects in a configuration, inner ones too."""
    if isinstance(config, dict):
        if isinstance(config.get("config"), dict) and "class_name" in config:
            yield config
        for value in config.values():
            yield from _entries(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _entries(value)


def _compare(made: Any, analysis: Analysis, small: Model, tolerance: float) -> None:
    fed = runnable(analysis.normal.model, analysis.groups.traced)
    wanted = run(small, dict(fed))
    given = [np.asarray(fed[t.name]) for t in analysis.given.graph.inputs]
    raw = made(given[0] if len(given) == 1 else given, training=False)
    for (name, expected), value in zip(wanted.items(), raw if isinstance(raw, list | tuple) else [raw], strict=False):
        ours = np.asarray(value.detach() if hasattr(value, "detach") else value)
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-6)
        off = float(np.abs(ours - expected).max(initial=0.0)) / scale if ours.shape == expected.shape else np.inf
        if not off <= tolerance:
            raise CheckFailed(f"The smaller Keras model's output {name!r}, {tuple(ours.shape)}, differs by {off:.1e} of its scale from the "
                              f"pruned file's, {expected.shape}. Does a layer compute something from a size that shrank?")  # fmt: skip

