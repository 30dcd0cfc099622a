"""JAX functions and modules of Flax, by jax2onnx.

`file.py:name` or `package.module:name` names one of

    a function of arrays whose parameters lie in it
    a module of flax.nnx, or anything else that can be called with arrays
    (module of flax.linen, variables)
    a function or class without arguments that makes one of these

JAX itself knows no shapes of inputs: they come from the wish.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

OPSET = 18  # the least in which all reductions take their axes as an input, which is how jax2onnx writes them
MODES = {"train": False, "training": False, "is_training": False, "deterministic": True, "use_running_average": True}
"""Arguments by which networks of Flax are told that they are not trained."""


def inputs(source: Any, wish: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each input: those of the wish, in the order of the function's arguments."""
    asked = {name: list(shape) for name, shape in wish["inputs"].items()}
    names = _arguments(_function(source, wish))
    if not asked:
        raise ValueError(f"a JAX function says no shapes: give that of each input with --input, such as --input {(names or ['x'])[0]}:1x16")
    if all(name in names for name in asked):
        asked = {name: asked[name] for name in names if name in asked}
    elif set(asked) == {str(k) for k in range(len(asked))}:
        asked = dict(zip(names or asked, asked.values(), strict=False))
    elif names:
        raise ValueError(f"the inputs that are given are {', '.join(asked)}, but the function's are {', '.join(names)}")
    free = wish["dynamic"] == "batch"
    types = wish.get("dtypes", {})
    return [{"name": name, "dtype": types.get(name, "float32"), "shape": ["batch", *shape[1:]] if free and shape else shape}
            for name, shape in asked.items()]  # fmt: skip


def convert(source: Any, target: str, wish: Mapping[str, Any]) -> list[str]:
    """Writes the ONNX file."""
    import onnx
    from jax2onnx import to_onnx

    function, known = _function(source, wish), inputs(source, wish)
    notes = []

    def write(shapes: list[list[Any]]) -> None:
        import jax

        # jax2onnx takes free sizes as plain shapes, and dtypes as arrays' descriptions
        plain = [tuple(s) if any(isinstance(n, str) for n in s) or t["dtype"] == "float32" else jax.ShapeDtypeStruct(s, t["dtype"])
                 for s, t in zip(shapes, known, strict=True)]  # fmt: skip
        to_onnx(function, plain, opset=wish.get("opset") or OPSET, return_mode="file", output_path=target,
                input_names=[t["name"] for t in known])  # fmt: skip

    shapes = [t["shape"] for t in known]
    asked = list(wish["inputs"].values())
    if all(isinstance(n, int) for shape in shapes for n in shape):
        write(shapes)
    else:
        try:
            write([[n if n is not None else f"free{a}" for a, n in enumerate(shape)] for shape in shapes])
        except Exception as error:  # whatever JAX raises where the code needs a number
            if any(not isinstance(n, int) for shape in asked for n in shape):
                raise
            write(asked)
            notes.append(f"The batch is fixed at {asked[0][0]}: the function does not take a free one ({_first(error)}).")
    proto = onnx.load(target, load_external_data=False)
    del proto.graph.value_info[:]  # jax2onnx moves transposes and leaves the shapes as they were before
    Path(target).write_bytes(proto.SerializeToString())
    return notes


def outputs(source: Any, feeds: Mapping[str, Any], wish: Mapping[str, Any]) -> list[Any]:
    """Leaves of what the function gives, in JAX's order of a tree."""
    import jax

    function = _function(source, wish)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(function(*_ordered(source, feeds, wish)))]


def layers(source: Any, feeds: Mapping[str, Any], wish: Mapping[str, Any]) -> dict[str, Any]:
    """What each of JAX's primitives gives, in order."""
    import jax
    from jax.extend.core import jaxpr_as_fun

    arguments = _ordered(source, feeds, wish)
    with jax.disable_jit():  # what is compiled apart would be one step
        closed = jax.make_jaxpr(_function(source, wish))(*arguments)
    steps = [(e.primitive.name, v) for e in closed.jaxpr.eqns for v in e.outvars if type(v).__name__ != "DropVar"]
    values = jaxpr_as_fun(closed.replace(jaxpr=closed.jaxpr.replace(outvars=[v for _, v in steps])))(*arguments)
    return {f"{name} {k}": np.asarray(value) for k, ((name, _), value) in enumerate(zip(steps, values, strict=True))
            if np.ndim(value) and np.asarray(value).dtype.kind == "f"}  # fmt: skip


def _ordered(source: Any, feeds: Mapping[str, Any], wish: Mapping[str, Any]) -> list[Any]:
    return [feeds[t["name"]] for t in inputs(source, wish)]


def _arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments by position; none where it takes any number."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [] if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in found) else [p.name for p in found if p.kind in kinds]


@functools.lru_cache(maxsize=1)
def _made(source: str, entry: str, folder: str) -> Any:
    """What a source names, made if it has to be."""
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    if source.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(source)))
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    if not entry:
        raise ValueError(f"a Python file is read as {source}:NAME, with the name of the function or module in it")
    if not hasattr(module, entry):
        raise ValueError(f"{source} has no {entry!r}")
    return _live(getattr(module, entry))


def _live(thing: Any) -> Any:
    """The thing itself, or what it makes if it is a function or class that needs no arguments."""
    if inspect.isfunction(thing) or inspect.isclass(thing):
        needed = [p for p in inspect.signature(thing).parameters.values()
                  if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
        if not needed and (inspect.isclass(thing) or not inspect.signature(thing).parameters):
            return thing()
    return thing


def _function(source: Any, wish: Mapping[str, Any]) -> Callable[..., Any]:
    """A function of the inputs alone, for a network that is not trained."""
    made = _made(source, wish["entry"], wish.get("folder", "")) if isinstance(source, str) else _live(source)
    if isinstance(made, tuple) and len(made) == 2 and hasattr(made[0], "apply"):
        module, variables = made
        call = functools.partial(module.apply, variables)
        return _inferring(call, module.__call__)
    if not callable(made):
        raise ValueError(f"{wish['entry'] or 'it'} is a {type(made).__name__}: give a function of arrays, a module of nnx, or "
                         "(module of linen, variables)")  # fmt: skip
    if hasattr(made, "eval") and hasattr(made, "train"):
        made.eval()
    return _inferring(made, made if inspect.isfunction(made) else made.__call__)


def _inferring(call: Callable[..., Any], signature: Callable[..., Any]) -> Callable[..., Any]:
    """The call with the arguments that say that nothing is trained, under the signature without them."""
    shown = inspect.signature(signature)
    modes = {name: MODES[name] for name in shown.parameters if name in MODES}
    left = [p for p in shown.parameters.values() if p.name not in MODES and (p.default is p.empty or p.kind is p.VAR_POSITIONAL)
            and p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]  # fmt: skip

    def function(*arrays: Any) -> Any:
        return call(*arrays, **modes)

    function.__signature__ = shown.replace(parameters=left, return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
    return function


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
