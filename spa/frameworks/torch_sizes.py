"""The numbers that torch modules keep of their sizes, set anew after their parameters shrank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.torch_ops import torch

Keeps = Mapping[str, Sequence[NDArray[np.int64]]]
Shapes = Mapping[str, tuple[int, ...]]
Pairs = Mapping[str, Sequence[tuple[int, int]]]


def set_sizes(module: Any, before: Shapes, keeps: Keeps, groups: Pairs) -> list[str]:
    """Sets sizes wherever a module stores them, and returns those that could be several things, in words.

    before: shapes of parameters and buffers as they were, by name. keeps: positions of each axis that stayed. groups: (size, kept) of the
    groups on each parameter. Layers of torch.nn say themselves which number is which axis; in other modules a whole number that is the
    old size of something in it, and of one thing only, becomes its new size.
    """
    unsure = []
    for name, part in module.named_modules():
        own = {n: keeps[f"{name}.{n}".lstrip(".")] for n, _ in _tensors(part) if f"{name}.{n}".lstrip(".") in keeps}
        rule = next((r for kind, r in _rules() if isinstance(part, kind)), None)
        if rule is not None:
            if own:
                rule(part, own, {n: before[f"{name}.{n}".lstrip(".")] for n in own})
        else:
            unsure += _guessed(name, part, before, keeps, groups)
    return unsure


def _tensors(part: Any) -> Iterator[tuple[str, Any]]:
    yield from part.named_parameters(recurse=False)
    yield from part.named_buffers(recurse=False)


def _rules() -> tuple[tuple[Any, Callable[[Any, Keeps, Shapes], None]], ...]:
    nn = torch.nn
    return (
        (nn.modules.conv._ConvTransposeNd, _transposed),
        (nn.modules.conv._ConvNd, _convolution),
        (nn.Linear, lambda m, k, _: _set(m, in_features=m.weight.shape[1], out_features=m.weight.shape[0])),
        (nn.modules.batchnorm._NormBase, lambda m, k, _: _set(m, num_features=len(next(iter(k.values()))[0]))),
        (nn.LayerNorm, lambda m, k, _: _set(m, normalized_shape=tuple(m.weight.shape))),
        (nn.RMSNorm, lambda m, k, _: _set(m, normalized_shape=tuple(m.weight.shape))),
        (nn.GroupNorm, _group_norm),
        (nn.Embedding, lambda m, k, _: _set(m, num_embeddings=m.weight.shape[0], embedding_dim=m.weight.shape[1])),
        (nn.PReLU, lambda m, k, _: _set(m, num_parameters=m.weight.shape[0])),
        (nn.RNNBase, lambda m, k, _: _set(m, hidden_size=m.weight_hh_l0.shape[1], input_size=m.weight_ih_l0.shape[1])),
    )


def _set(part: Any, **numbers: Any) -> None:
    for name, value in numbers.items():
        setattr(part, name, value)


def _groups_left(keep: NDArray[np.int64], size: int, groups: int) -> int:
    """How many groups of an axis still have a channel."""
    return len(np.unique(keep // (size // groups)))


def _convolution(part: Any, keeps: Keeps, before: Shapes) -> None:
    out, inner = part.weight.shape[:2]
    groups = _groups_left(keeps["weight"][0], before["weight"][0], part.groups)
    _set(part, groups=groups, out_channels=out, in_channels=inner * groups)


def _transposed(part: Any, keeps: Keeps, before: Shapes) -> None:
    into, inner = part.weight.shape[:2]
    groups = _groups_left(keeps["weight"][0], before["weight"][0], part.groups)
    _set(part, groups=groups, in_channels=into, out_channels=inner * groups)


def _group_norm(part: Any, keeps: Keeps, before: Shapes) -> None:
    groups = _groups_left(keeps["weight"][0], before["weight"][0], part.num_groups)
    _set(part, num_groups=groups, num_channels=part.weight.shape[0])


def _guessed(name: str, part: Any, before: Shapes, keeps: Keeps, groups: Pairs) -> list[str]:
    """Sets whole numbers of a module that no rule knows, by the sizes of its own parameters and of those of its layers."""
    prefix = f"{name}." if name else ""
    inside = [n for n in keeps if n.startswith(prefix) and n.removeprefix(prefix).count(".") < 2]
    changed: dict[int, set[int]] = {}
    for tensor in inside:
        for old, keep in zip(before[tensor], keeps[tensor], strict=True):
            changed.setdefault(old, set()).add(len(keep))
        for old, new in groups.get(tensor, ()):
            changed.setdefault(old, set()).add(new)
    unsure = []
    for attribute, value in list(vars(part).items()):
        if attribute.startswith("_") or isinstance(value, bool) or not isinstance(value, int) or value < 2 or value not in changed:
            continue
        news = changed[value]
        if len(news) == 1:
            setattr(part, attribute, next(iter(news)))
        elif news != {value}:
            could = " or ".join(map(str, sorted(news)))
            unsure.append(f"{name + '.' if name else ''}{attribute} (was {value}, could be {could})")
    return unsure
