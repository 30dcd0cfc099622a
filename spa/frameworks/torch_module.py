"""A torch module made as small as its exported graph: `apply_to_torch(module, plan, model="model.onnx")`.

Parameters and buffers are found in the file by what they hold (`spa.frameworks.arrays`), cut where the file's tensors were cut, and the
numbers that modules keep of their sizes (channels, groups, heads) are set to the new ones. What no rule tells is listed in the error.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa import api
from spa.data.evidence import values
from spa.errors import BadOption, CheckFailed
from spa.frameworks.arrays import Array, Found, locate
from spa.frameworks.attention_scale import Narrowed, narrowed_heads
from spa.frameworks.torch_sizes import set_sizes
from spa.graph.analysis import Analysis, Source, analyzed_for
from spa.graph.trace import constant_values
from spa.plans.plan import Plan, load_plan, mask_of
from spa.stages import collector_paused
from spa.storage.store import Model
from spa.torch_ops import torch

Keeps = list[NDArray[np.int64]]
GroupKeeps = Mapping[str, Sequence[tuple[int, NDArray[np.int64]]]]
Call = Callable[[Any, Mapping[str, Any]], Any]
TOLERANCE = 1e-4


@dataclass
class _State:
    """Arrays of a module by name, where they are in the file, and what of each axis stays."""

    arrays: Mapping[str, Array]
    found: Mapping[str, Found]
    keeps: dict[str, Keeps] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@collector_paused()
def apply_to_torch(
    module: Any,
    plan: Plan | str | Mapping[str, Any],
    model: Source | Analysis,
    *,
    pruned: Source | None = None,
    call: Call | None = None,
    check: bool = True,
    tolerance: float = TOLERANCE,
    inplace: bool = False,
) -> Any:
    """The module with smaller layers, which gives what the pruned file gives.

    Parameters
    ----------
    module
        The `torch.nn.Module` that `model` was exported from, with the same weights.
    plan
        What was removed from `model`.
    model
        The ONNX file as it was before pruning.
    pruned
        The pruned file, where its weights were repaired or trained: they are taken over. By default the module's own weights are cut.
    call
        (module, {input: tensor}) -> output or outputs, in the order of the file's; by default the module is called with the file's
        inputs in their order.
    check
        Compare all outputs with those of the pruned file, on drawn inputs. Where heads became narrower and the module differs, it is
        compared again with queries for a scale that its code works out from the width of a head (`spa.frameworks.attention_scale`).
    tolerance
        Of the outputs' scale.
    inplace
        Change `module` itself instead of a copy of it.

    Raises
    ------
    BadOption
        If parameters that shrink are not in the file. The text lists them.
    CheckFailed
        If the result does not run, or gives other outputs; the text lists what the module stores and no rule could set.
    """
    decided = load_plan(plan)
    analysis = model if isinstance(model, Analysis) else analyzed_for(model, decided)
    small = api.opened(pruned) if pruned is not None else None
    state = _matched(module, analysis, decided)
    _norms_folded_away(module, state, analysis, small, decided)
    sizes = _group_sizes(analysis, decided, state)
    _followers(module, state, sizes, guess=check)
    if state.unknown:
        raise BadOption(f"The file does not hold these parameters of the module, so their new sizes are not known: "
                        f"{', '.join(state.unknown)}. Is it an export of this module with these weights?")  # fmt: skip
    made = module if inplace else copy.deepcopy(module)
    before = {n: tuple(a.shape) for n, a in state.arrays.items()}
    _shrink(made, state, small, decided)
    if small is not None:
        _biases(made, state, small)
    counts = {n: [(size, len(keep)) for size, keep in on] for n, on in sizes.items()}
    unsure = set_sizes(made, before, state.keeps, counts)
    if check:
        wanted = small or api.apply(analysis, decided, check=False).model
        _checked(made, state, analysis, decided, partial(_compare, made, analysis, wanted, call, tolerance, unsure))
    return made


def _checked(module: Any, state: _State, analysis: Analysis, plan: Plan, compare: Callable[[Narrowed | None], None]) -> None:
    """Compares the module; if its heads are narrower and it differs, again with queries for a scale that it works out from their width."""
    heads = narrowed_heads(analysis, mask_of(plan, analysis.groups))
    try:
        compare(heads)
    except CheckFailed:
        if heads is None or not _scale_queries(module, state, heads):
            raise
        try:
            compare(heads)
        except CheckFailed:
            _scale_queries(module, state, heads, back=True)
        else:
            return
        raise


def _scale_queries(module: Any, state: _State, heads: Narrowed, *, back: bool = False) -> bool:
    """Multiplies queries in place, or divides them again; False if there are none among the module's parameters."""
    named = dict(module.named_parameters())
    done = False
    for name, where in state.found.items():
        factor = heads.of(state.arrays[name], where, state.keeps[name]) if name in named else None
        if factor is not None:
            with torch.no_grad():
                named[name].mul_(torch.as_tensor(1 / factor if back else factor).to(named[name]))
            done = True
    return done


def arrays_of(module: Any) -> dict[str, Array]:
    """Parameters and buffers of a module with at least one axis, by name; tied ones under each of their names."""
    pairs = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {n: t.detach().cpu().float().numpy() if t.is_floating_point() else t.detach().cpu().numpy() for n, t in pairs if t.ndim}


def tensors_of(model: Model) -> dict[str, Array]:
    """Stored tensors of a file by name."""
    return {n: values(model.graph, n) if c.dtype is not None and np.dtype(c.dtype).kind == "f" else np.asarray(c.values)
            for n, c in constant_values(model.graph).items()}  # fmt: skip


def _matched(module: Any, analysis: Analysis, plan: Plan) -> _State:
    arrays = arrays_of(module)
    found = locate(arrays, tensors_of(analysis.given))
    split = set(plan.copies.values())  # one tensor of the file that several layers read, each cut in its own way: the layers tell
    whole = analysis.groups.traced.constants  # others were folded into something else
    state = _State(arrays, {n: f for n, f in found.items() if f.tensor in whole and f.tensor not in split})
    for name, where in state.found.items():
        keeps = where.keeps(arrays[name].shape, plan.removed)
        if keeps is None:
            raise BadOption(f"What the plan leaves of {where.tensor} is no block of the module's {name}, which stores it in another form.")
        state.keeps[name] = keeps
    return state


def _norms_folded_away(module: Any, state: _State, analysis: Analysis, small: Model | None, plan: Plan) -> None:
    """Normalisations that the exporter multiplied into the layer before: told by the scale of that layer's rows."""
    norms = {n: m for n, m in module.named_modules() if getattr(m, "running_var", None) is not None}
    norms = {n: m for n, m in norms.items() if f"{n}.running_var" not in state.found}
    for name, where in state.found.items():
        if where.scale is None:
            continue
        owner = name.rpartition(".")[0]
        for norm, layer in norms.items():
            variance = state.arrays[f"{norm}.running_var"].astype(np.float64)
            gain = state.arrays.get(f"{norm}.weight", np.ones_like(variance)) / np.sqrt(variance + layer.eps)
            if gain.shape == where.scale.shape and np.allclose(gain, where.scale, rtol=1e-3, atol=1e-6):
                keep = state.keeps[name][0]
                for part in ("weight", "bias", "running_mean", "running_var"):
                    if f"{norm}.{part}" in state.arrays:
                        state.keeps[f"{norm}.{part}"] = [keep]
                if f"{owner}.bias" in state.arrays:
                    state.keeps[f"{owner}.bias"] = [keep]
                if small is not None:
                    _unfold(state, name, norm, keep, analysis, small, plan)
                norms.pop(norm)
                break


def _unfold(state: _State, name: str, norm: str, keep: NDArray[np.int64], analysis: Analysis, small: Model, plan: Plan) -> None:
    """Weights of a layer and its folded normalisation from the pruned file: γ/σ stays, the rest goes to the weight and to β."""
    where, owner = state.found[name], name.rpartition(".")[0]
    assert where.scale is not None
    stored, scale = constant_values(small.graph), where.scale[keep]
    array = where.values(values(small.graph, where.tensor), state.arrays[name].shape, state.keeps[name], plan.removed)
    state.values[name] = array / scale.reshape(-1, *[1] * (array.ndim - 1))
    reader = next(n for n in small.graph.nodes if any(t.name == where.tensor for t in n.inputs))
    biases = [t.name for t in reader.inputs if t.name in stored and t.name != where.tensor and stored[t.name].shape == (len(keep),)]
    if biases and f"{norm}.bias" in state.arrays:
        mean = state.arrays[f"{norm}.running_mean"][keep]
        own = state.arrays[f"{owner}.bias"][keep] if f"{owner}.bias" in state.arrays else 0.0
        state.values[f"{norm}.bias"] = values(small.graph, biases[0]) + scale * (mean - own)


def _followers(module: Any, state: _State, groups: GroupKeeps, *, guess: bool) -> None:
    """What the file does not hold as it is, or not apart from others (zeros, ones, one copy for several): as what stands beside it.

    A bias goes with the rows of its weight. What is folded into something else (a token that was added to a position) is guessed, axis
    by axis, from axes of the same length around it: only where the result is compared with the file.
    """
    learned = dict(module.named_parameters(remove_duplicate=False))
    for name, array in state.arrays.items():
        if name in state.keeps:
            continue
        owner, _, leaf = name.rpartition(".")
        beside = (f"{owner}.{n}".lstrip(".") for n in (leaf.replace("bias", "weight"), "weight", "running_var", "running_mean"))
        leader = next((n for n in beside if n in state.keeps and len(state.arrays[n]) == len(array)), None)
        if leader is not None and array.ndim == 1:
            state.keeps[name] = [state.keeps[leader][0]]
        elif array.size > 1 and name in learned and guess:
            state.keeps[name] = [_alike(state, groups, owner, n) for n in array.shape]
        elif array.size > 1 and name in learned:
            state.unknown.append(name)


def _alike(state: _State, groups: GroupKeeps, owner: str, length: int) -> NDArray[np.int64]:
    """What most often stays of an axis or a group of that length, in the module or else in the next one around it that has any."""
    while True:
        seen: Counter[tuple[int, ...]] = Counter()
        for name, keeps in state.keeps.items():
            if name.startswith(f"{owner}." if owner else ""):
                seen.update(tuple(k.tolist()) for n, k in zip(state.arrays[name].shape, keeps, strict=True) if n == length)
                seen.update(tuple(k.tolist()) for n, k in groups.get(name, ()) if n == length)
        if seen:
            return np.array(seen.most_common(1)[0][0], np.int64)
        if not owner:
            return np.arange(length)
        owner = owner.rpartition(".")[0]


def _biases(module: Any, state: _State, small: Model) -> None:
    """Biases that the file's tensors do not tell by what they hold (zeros before repair), or that repair gave to layers that had none."""
    stored, known = constant_values(small.graph), {f.tensor for f in state.found.values()}
    readers = {t.name: n for n in small.graph.nodes for t in n.inputs}
    for name, where in state.found.items():
        owner, layer, leaf = _owner(module, name), name.rpartition(".")[0], name.rpartition(".")[2]
        if leaf != "weight" or where.scale is not None or where.tensor not in readers or f"{layer}.bias".lstrip(".") in state.found:
            continue
        weight, node = owner.weight, readers[where.tensor]
        rows = weight.shape[1] * getattr(owner, "groups", 1) if getattr(owner, "transposed", False) else weight.shape[0]
        after = [t.name for n in (node, *(n for o in node.outputs for n in o.outputs)) for t in n.inputs]
        new = [t for t in after if t in stored and t not in known and int(np.prod(stored[t].shape)) == rows]
        if new and hasattr(owner, "bias"):
            owner.bias = torch.nn.Parameter(torch.as_tensor(values(small.graph, new[0]).reshape(-1)).to(weight))


def _owner(module: Any, name: str) -> Any:
    return module.get_submodule(name.rpartition(".")[0])


def _shrink(module: Any, state: _State, small: Model | None, plan: Plan) -> None:
    made: dict[int, Any] = {}
    named = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    for name, keeps in state.keeps.items():
        old, where = named[name], state.found.get(name)
        if id(old) not in made:
            array: Any = state.values.get(name)
            if array is None and small is not None and where is not None and where.scale is None:
                array = where.values(values(small.graph, where.tensor), old.shape, keeps, plan.removed)
            with torch.no_grad():
                new = old.detach()
                for axis, keep in enumerate(keeps):
                    if len(keep) < new.shape[axis]:
                        new = new.index_select(axis, torch.as_tensor(keep, device=new.device))
                new = new.clone() if array is None else torch.as_tensor(np.array(array)).to(new)
            made[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
        owner, leaf = _owner(module, name), name.rpartition(".")[2]
        registry = owner._parameters if leaf in owner._parameters else owner._buffers
        registry[leaf] = made[id(old)]


def _group_sizes(analysis: Analysis, plan: Plan, state: _State) -> GroupKeeps:
    """Array -> (size, coordinates that stay) of every group on one of its axes: heads, their width, channels of a group."""
    gone = mask_of(plan, analysis.groups)
    on: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for group in analysis.groups.groups:
        entry = group.size, np.flatnonzero(~gone[group.coordinates])
        for value, _ in group.sites:
            on.setdefault(plan.copies.get(value, value), []).append(entry)
    return {name: on.get(where.tensor, []) for name, where in state.found.items()}


# ---------------------------------------------------------------------- the check


def _compare(
    module: Any, analysis: Analysis, small: Model, call: Call | None, tolerance: float, unsure: Sequence[str], heads: Narrowed | None
) -> None:  # fmt: skip
    from spa.proof.check import run
    from spa.proof.prove import runnable

    listed = f" No rule could set: {'; '.join(unsure)}." if unsure else ""
    told = f" ({heads})" if heads is not None else ""
    fed = runnable(analysis.normal.model, analysis.groups.traced)
    wanted = run(small, dict(fed))
    names = [t.name for t in analysis.given.graph.inputs]
    tensors = {n: torch.as_tensor(np.asarray(fed[n])).to(_device(module)) for n in names}
    training = module.training
    try:
        with torch.no_grad():
            module.eval()
            raw = module(*(tensors[n] for n in names)) if call is None else call(module, tensors)
    except Exception as error:  # whatever a module's own code raises
        raise CheckFailed(f"The smaller module does not run ({' '.join(str(error).split())}).{listed} Set what it stores of its sizes, or "
                          "pass call= if it is called in another way.") from error  # fmt: skip
    finally:
        module.train(training)
    for name, got in zip((t.name for t in small.graph.outputs), _flat(raw), strict=False):
        expected, ours = np.asarray(wanted[name]), got.detach().cpu().numpy()
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-6)
        off = float(np.abs(ours - expected).max(initial=0.0)) / scale if ours.shape == expected.shape else np.inf
        if not off <= tolerance:
            raise CheckFailed(f"The smaller module's output {name!r}, {tuple(ours.shape)}, differs by {off:.1e} of its scale from the "
                              f"pruned file's, {expected.shape}.{listed} Does its code compute something from a size that shrank, such as "
                              f"the scale of attention from the width of a head? The file keeps the old value{told}.")  # fmt: skip


def _device(module: Any) -> Any:
    return next((p.device for p in module.parameters()), "cpu")


def _flat(raw: Any) -> Iterator[Any]:
    """Tensors of what a module returns, in order."""
    if isinstance(raw, torch.Tensor):
        yield raw
    elif isinstance(raw, Mapping):
        for value in raw.values():
            yield from _flat(value)
    elif isinstance(raw, Sequence):
        for value in raw:
            yield from _flat(value)
