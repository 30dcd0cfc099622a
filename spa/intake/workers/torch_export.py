"""Exporting a torch subject by PyTorch's exporters, running it, and listening to its layers. Stands alone, like all workers."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LARGE = 1_500_000_000  # bytes of weights; above, they go beside the file
TRIED = 48  # a size that is free and that nobody gave, but for the batch
BATCH = 2
OPSETS = {"dynamo": 20, "script": 17}


@dataclass
class Subject:
    """A network with what it takes.

    call: module, ScriptModule or ExportedProgram. names, example: of its inputs, in order. axes: {input: {axis: name}} of all that can be
    free. outputs: names, if it gives them. keyword: inputs go in by name. loose: of no use with sizes that nobody has fixed. notes: for the
    user.
    """

    call: Any
    names: list[str]
    example: tuple[Any, ...]
    axes: dict[str, dict[int, str]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    keyword: bool = False
    kind: str = "module"
    loose: bool = False
    notes: list[str] = field(default_factory=list)


def described(subject: Subject, wish: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each input, with a name for a free size."""
    free = chosen_axes(subject, wish["dynamic"])
    return [
        {"name": n, "dtype": str(t.dtype).removeprefix("torch."), "shape": [free.get(n, {}).get(k, s) for k, s in enumerate(t.shape)]}
        for n, t in zip(subject.names, subject.example, strict=True)
    ]


def chosen_axes(subject: Subject, dynamic: str) -> dict[str, dict[int, str]]:
    """Those free axes that the user wants free."""
    if dynamic == "none":
        return {}
    wanted = {n: {k: s for k, s in axes.items() if dynamic == "keep" or k == 0} for n, axes in subject.axes.items()}
    return {n: axes for n, axes in wanted.items() if axes}


def export(subject: Subject, target: str, wish: dict[str, Any]) -> list[str]:
    """Writes ONNX: by torch.export's exporter, then, saying why, by it with fixed sizes, or by tracing."""
    free = chosen_axes(subject, wish["dynamic"])
    subject.outputs = subject.outputs or output_names(subject)
    ways = [("dynamo", free), ("script", free)] if subject.kind == "module" else [(_only(subject.kind), free)]
    if free and subject.kind == "module":
        ways.insert(1, ("dynamo", {}))
    failures: list[BaseException] = []
    for exporter, axes in ways:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (_dynamo if exporter == "dynamo" else _script)(subject, target, wish["opset"] or OPSETS[exporter], axes)
        except Exception as error:  # each exporter has its own
            failures.append(error)
            continue
        if subject.loose and free and not axes:
            sizes = "x".join(map(str, subject.example[0].shape))
            raise ValueError(f"its sizes can't be left free: fix them, such as --input {subject.names[0]}:{sizes} --dynamic none; "
                             f"torch.export says {cause(failures[0])}")  # fmt: skip
        return [*subject.notes, *_noted(exporter, axes, free, failures)]
    raise NotImplementedError(cause(failures[0])) from failures[0]


def _only(kind: str) -> str:
    return "script" if kind == "script" else "dynamo"


def _noted(exporter: str, axes: Any, free: Any, failures: list[BaseException]) -> list[str]:
    if not failures:
        return []
    if exporter == "dynamo":
        return [f"Sizes are fixed, as they could not be left free: {cause(failures[0])}"]
    return [f"Converted by tracing one run (torch.onnx without dynamo), as torch.export could not: {cause(failures[-1])}"]


def widened(subject: Subject, axes: dict[str, dict[int, str]]) -> tuple[Any, ...]:
    """The example, in which a free batch of one becomes two: exporters take 1 for a constant."""
    import torch

    free = [t for n, t in zip(subject.names, subject.example, strict=True) if 0 in axes.get(n, {})]
    if any(t.shape[0] != 1 for t in free):
        return subject.example
    pairs = zip(subject.names, subject.example, strict=True)
    return tuple(torch.cat([t] * BATCH) if 0 in axes.get(n, {}) else t for n, t in pairs)


def _dynamo(subject: Subject, target: str, opset: int, axes: dict[str, dict[int, str]]) -> None:
    import torch

    example = widened(subject, axes)
    more: dict[str, Any] = {"output_names": subject.outputs} if subject.outputs else {}
    if subject.kind == "exported":
        program = torch.onnx.export(subject.call, dynamo=True, opset_version=opset, verbose=False, input_names=subject.names, **more)
    else:
        shapes = [dict(axes.get(n, {})) for n in subject.names]
        arguments, named = ((), dict(zip(subject.names, example, strict=True))) if subject.keyword else (example, None)
        given: Any = dict(zip(subject.names, shapes, strict=True)) if subject.keyword else _nested(subject, shapes)
        with torch.no_grad():
            program = torch.onnx.export(subject.call, arguments, kwargs=named, dynamo=True, opset_version=opset, verbose=False,
                                        input_names=subject.names, dynamic_shapes=given if axes else None, **more)  # fmt: skip
    assert program is not None
    program.save(target, external_data=_bytes(subject.call) > LARGE)


def _nested(subject: Subject, shapes: list[dict[int, str]]) -> Any:
    """Sizes as torch.export wants them: those of *args in a tuple of their own."""
    import inspect

    parameters = list(inspect.signature(subject.call.forward).parameters.values())
    plain = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    if len(plain) == len(parameters):
        return tuple(shapes)
    return (*shapes[: len(plain)], tuple(shapes[len(plain) :]))


def _script(subject: Subject, target: str, opset: int, axes: dict[str, dict[int, str]]) -> None:
    import torch

    call, example = subject.call, widened(subject, axes)
    if subject.keyword:
        call = torch.jit.trace(call, example_kwarg_inputs=dict(zip(subject.names, example, strict=True)), strict=False, check_trace=False)
    with torch.no_grad():
        torch.onnx.export(call, example, target, dynamo=False, opset_version=opset, input_names=subject.names,
                          output_names=subject.outputs or None, dynamic_axes=axes or None,
                          external_data=_bytes(call) > LARGE)  # fmt: skip


def _bytes(call: Any) -> int:
    tensors = call.state_dict if isinstance(call.state_dict, dict) else call.state_dict()  # that of an exported program is no method
    return sum(t.numel() * t.element_size() for t in tensors.values() if hasattr(t, "numel"))


def cause(error: BaseException) -> str:
    """What an exporter complains about, in a line: its own cause, without colours, advice and traces."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    return f"{type(error).__name__}: {found}"[:240]


def flat(results: Any) -> list[Any]:
    """All tensors of a result, in order."""
    import torch
    from torch.utils import _pytree

    leaves, _ = _pytree.tree_flatten(results)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def output_names(subject: Subject) -> list[str]:
    """Keys where the network gives a mapping, else output, or output_0, output_1, …; never the name of an input.

    Raises ValueError where the network does not run on its example.
    """
    import torch

    with torch.no_grad():
        module = subject.call.module() if subject.kind == "exported" else subject.call
        named = dict(zip(subject.names, subject.example, strict=True))
        try:
            found = module(**named) if subject.keyword else module(*subject.example)
        except Exception as error:  # networks raise what they like
            sizes = ", ".join(f"{n}:{'x'.join(map(str, t.shape))}" for n, t in named.items())
            raise ValueError(f"it does not run on {sizes} ({_complaint(error)}); give shapes that fit with --input") from error
    keys: list[str] = []
    if isinstance(found, Mapping):
        for key, value in found.items():
            count = len(flat(value))
            keys += [str(key)] if count == 1 else [f"{key}_{k}" for k in range(count)]
    else:
        count = len(flat(found))
        keys = ["output"] if count == 1 else [f"output_{k}" for k in range(count)]
    return [f"{key}_out" if key in subject.names else key for key in keys]


def _complaint(error: BaseException) -> str:
    """What an error of torch's says: of TorchScript's, which hold traces, the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    traced = lines and "TorchScript" in lines[0]
    return f"{lines[-1] if traced else lines[0]}"[:160] if lines else type(error).__name__


def array(tensor: Any) -> Any:
    """A numpy array; bfloat16 in float32."""
    import torch

    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())


def call(subject: Subject, feeds: dict[str, Any]) -> Any:
    """What the network gives."""
    import torch

    tensors = [torch.from_numpy(np.array(feeds[n])) for n in subject.names]
    module = subject.call.module() if subject.kind == "exported" else subject.call
    with torch.no_grad():
        return module(**dict(zip(subject.names, tensors, strict=True))) if subject.keyword else module(*tensors)


def run(subject: Subject, feeds: dict[str, Any]) -> list[Any]:
    """Its outputs."""
    return [array(t) for t in flat(call(subject, feeds))]


def listen(subject: Subject, feeds: dict[str, Any]) -> dict[str, Any]:
    """What each module gives, in the order in which they end; of an exported program each operator; of TorchScript nothing."""
    import torch

    found: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        for k, tensor in enumerate(flat(value)):
            key = name if k == 0 else f"{name}.{k}"
            while key in found:
                key += "'"
            found[key] = array(tensor)

    if subject.kind == "script":
        return {}
    if subject.kind == "exported":
        graph = subject.call.module()

        class Listener(torch.fx.Interpreter):  # type: ignore[misc]
            def run_node(self, n: Any) -> Any:
                value = super().run_node(n)
                if n.op in ("call_function", "call_module"):
                    keep(n.name, value)
                return value

        with torch.no_grad():
            Listener(graph).run(*(torch.from_numpy(np.array(feeds[n])) for n in subject.names))
        return found
    hooks = [m.register_forward_hook(lambda _, __, value, name=name: keep(name, value)) for name, m in subject.call.named_modules() if name]
    try:
        call(subject, feeds)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def folder_of(wish: dict[str, Any]) -> str:
    """Where relative names begin."""
    return str(wish.get("folder") or os.getcwd())
