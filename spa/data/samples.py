"""Samples: what calibration data must look like for a model's inputs.

    source --> Piece (some samples, checked and of the model's types) --`spa.data.batches`--> batches (`spa.proof.feeds.Feeds`)

A `Layout` says for each input which axis counts samples: the first one, or the one that carries the first one's symbol (the state
(2, batch, 64) of a recurrent net); an input without one is the same in every batch. A model whose inputs have no such axis at all, such
as a single image (3, 224, 224), gets one in front that is taken off again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from spa.errors import BadFile, BadOption, SpaError
from spa.graph.trace import Traced
from spa.graph.view import FLOATS
from spa.proof.feeds import Feeds

Array = NDArray[Any]
Sizes = tuple[int | None, ...]
INTEGERS = "iub"
_WORTH = {"b": 0, "u": 1, "i": 1}  # kinds of numpy types by what they can hold; floats come after


@dataclass(frozen=True)
class Input:
    """An input: sizes by axis, None where free, the axis that counts samples (None if there is none), and the ONNX type."""

    name: str
    sizes: Sizes
    axis: int | None
    kind: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """What its arrays are in numpy; text is objects."""
        return np.dtype(object) if self.kind == onnx.TensorProto.STRING else np.dtype(helper.tensor_dtype_to_np_dtype(self.kind))

    @property
    def is_float(self) -> bool:
        """Whether it takes floating point numbers."""
        return self.kind in FLOATS

    def __str__(self) -> str:
        return _shown(self.sizes)


@dataclass(frozen=True)
class Layout:
    """What the inputs of a model take.

    Attributes
    ----------
    inputs
        By name, in the order of the graph.
    batch
        Samples in a batch, None if the model leaves it free.
    added
        Whether the axis that counts samples is ours and not the model's: sizes and axes then hold it in front.
    """

    inputs: Mapping[str, Input]
    batch: int | None
    added: bool = False

    @property
    def names(self) -> str:
        """The inputs, to be shown."""
        return ", ".join(self.inputs) or "none"

    @property
    def sole(self) -> Input | None:
        """The input, where there is just one."""
        return next(iter(self.inputs.values())) if len(self.inputs) == 1 else None

    @property
    def axes(self) -> dict[str, int | None]:
        """The axis of each input that counts samples."""
        return {n: i.axis for n, i in self.inputs.items()}


@dataclass(frozen=True)
class Piece:
    """Some samples as arrays by input; `axes` says where each counts them."""

    feeds: Feeds
    count: int
    axes: Mapping[str, int | None]

    def cut(self, start: int, stop: int) -> Piece:
        """The samples from `start` up to `stop`, as views."""
        stop = min(stop, self.count)
        cuts = {n: v if (a := self.axes[n]) is None else v[(slice(None),) * a + (slice(start, stop),)] for n, v in self.feeds.items()}
        return Piece(cuts, stop - start, self.axes)

    def joins(self, other: Piece) -> bool:
        """Whether both fit into one batch: same shapes but for the count, same values where an input counts no samples."""
        if self.feeds.keys() != other.feeds.keys():
            return False
        for name, value in self.feeds.items():
            more, axis = other.feeds[name], self.axes[name]
            if axis is None:
                if not np.array_equal(value, more):
                    return False
            elif value.dtype != more.dtype or _without(value.shape, axis) != _without(more.shape, axis):
                return False
        return True


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _shown(sizes: Iterable[int | None]) -> str:
    texts = ["?" if n is None else str(n) for n in sizes]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


# ---------------------------------------------------------------------- the model's side


def layout_of(traced: Traced) -> Layout:
    """Reads off the inputs which axes count samples.

    The first input of two axes or more decides, a picture without batch (rank 3 with 1, 3 or 4 channels at its front or 3 at its end)
    aside: a free first axis is a free batch, a fixed one a fixed batch.
    """
    sizes: dict[str, Sizes] = {}
    symbols: dict[str, tuple[object, ...]] = {}
    for tensor in traced.graph.inputs:
        shape = traced.facts.shapes.get(tensor.name) or ()
        free = traced.facts.dynamic.get(tensor.name) or (False,) * len(shape)
        sizes[tensor.name] = tuple(None if f else n for n, f in zip(shape, free, strict=True))
        declared = tuple(tensor.shape or ())
        symbols[tensor.name] = declared if len(declared) == len(shape) else (None,) * len(shape)
    kinds = {n: traced.facts.types.get(n, onnx.TensorProto.FLOAT) for n in sizes}
    first = next((n for n, s in sizes.items() if len(s) >= 2 and not _is_picture(s, kinds[n])), None)
    if first is None:
        first = next((n for n, s in sizes.items() if len(s) == 1 and s[0] is None), None)
    if first is None:
        return with_added_axis(Layout({n: Input(n, s, None, kinds[n]) for n, s in sizes.items()}, None))
    batch = sizes[first][0]
    declared_first = symbols[first][0]
    symbol = declared_first if batch is None and isinstance(declared_first, str) else None
    inner = {s for found in symbols.values() for s in found[1:] if isinstance(s, str)} - {symbol}
    inputs = {}
    for name, given in sizes.items():
        axis = _batch_axis(given, symbols[name], batch, symbol, inner)
        inputs[name] = Input(name, given if axis is None else (*given[:axis], None, *given[axis + 1 :]), axis, kinds[name])
    return Layout(inputs, batch)


def _is_picture(sizes: Sizes, kind: int) -> bool:
    return len(sizes) == 3 and (kind in FLOATS or kind == onnx.TensorProto.UINT8) and None not in sizes and (
        (sizes[0] == 3 and (sizes[2] or 0) > 4) or (sizes[2] == 3 and (sizes[0] or 0) > 4)
    )  # fmt: skip


def _batch_axis(sizes: Sizes, symbols: tuple[object, ...], batch: int | None, symbol: str | None, inner: set[str]) -> int | None:
    if not sizes:
        return None
    if symbol is not None and symbol in symbols:
        return symbols.index(symbol)
    free = [a for a, n in enumerate(sizes) if n is None]
    if batch is None and symbol is None and len(free) == 1 and not isinstance(symbols[free[0]], str):
        return free[0]  # a state (2, ?, 64) beside an input (?, 16), neither of them named
    if batch is not None:
        return 0 if sizes[0] == batch or (sizes[0] is None and len(sizes) > 1) else None
    return 0 if sizes[0] is None and (len(sizes) > 1 or symbols[0] not in inner) else None


def with_added_axis(layout: Layout) -> Layout:
    """The layout of batches of one, whose axis is taken off before the model sees them."""
    inputs = {n: Input(n, (None, *i.sizes), 0, i.kind) if i.sizes else i for n, i in layout.inputs.items()}
    return Layout(inputs, 1, True)


# ---------------------------------------------------------------------- the data's side


def name_entries(where: str, names: Sequence[str], layout: Layout, labels: str | None, *, by_place: bool) -> dict[str, str]:
    """{entry: input}; the labels' entry stands for itself.

    where: the source, as the beginning of a sentence. names: an array without a name is "". by_place: whether a sole entry may have any
    name. Raises BadOption.
    """
    known = {n: n for n in names if n in layout.inputs}
    wanted = labels or "labels"
    extra = [n for n in names if n not in layout.inputs and n != wanted]
    if by_place and layout.sole is not None and not known and len(extra) == 1:
        known, extra = {extra[0]: layout.sole.name}, []
    if extra == [""]:
        raise BadOption(f"{where} is one array, but the model has several inputs: give an .npz file or dicts with each of {layout.names}.")
    if extra:
        raise BadOption(
            f"{where} holds {extra[0]!r}, which is no input of the model and not its labels {wanted!r}; its inputs are: {layout.names}."
        )
    missing = [n for n in layout.inputs if n not in known.values()]
    if missing:
        held = ", ".join(map(repr, names)) or "nothing"
        raise BadOption(f"{where} lacks input {missing[0]!r} and holds {held}: give all of {layout.names}.")
    if wanted in names and wanted not in known:
        known[wanted] = wanted
    elif labels is not None and labels not in names:
        raise BadOption(f"{where} has no entry {labels!r} for the labels and holds {', '.join(map(repr, names))}: name one of them.")
    return known


def fit(where: str, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> tuple[int, bool]:
    """How many samples arrays of these shapes hold, and whether they are one sample without an axis that counts.

    shapes: by input, and of labels. where: the source, as the beginning of a sentence. Raises BadOption for what does not fit.
    """
    counts: dict[str, int] = {}
    bare: list[str] = []
    for name, found in layout.inputs.items():
        shape = shapes[name]
        sizes = found.sizes
        if found.axis is not None and len(shape) == len(sizes) - 1:
            sizes = sizes[: found.axis] + sizes[found.axis + 1 :]
            bare.append(name)
        elif found.axis is not None and len(shape) == len(sizes):
            counts[name] = shape[found.axis]
        if len(shape) != len(sizes) or any(w is not None and w != n for w, n in zip(sizes, shape, strict=True)):
            raise BadOption(
                f"{where} holds shape {_shown(shape)} for input {name!r}, which takes {found} (? is any size): give it in that shape."
            )
    if bare and counts:
        raise BadOption(
            f"{where} holds one sample for input {bare[0]!r} (shape {_shown(shapes[bare[0]])}) but a batch for {next(iter(counts))!r}: "
            f"give {bare[0]!r} as {layout.inputs[bare[0]]}."
        )
    extra = {n: s for n, s in shapes.items() if n not in layout.inputs}
    if not bare:
        for name, shape in extra.items():
            if not shape:
                raise BadOption(f"{where} holds a single number as {name!r}, but needs one for each sample along its first axis.")
            counts[name] = shape[0]
    if len(set(counts.values())) > 1:
        (one, n), (other, m) = next((a, b) for a in counts.items() for b in counts.items() if a[1] != b[1])
        raise BadOption(f"{where} holds {n} samples in {one!r} but {m} in {other!r}: give the same number of each.")
    return (1, True) if bare else (next(iter(counts.values()), 1), False)


def piece(where: str, arrays: Mapping[str, Array], layout: Layout) -> Piece:
    """Checked samples in the model's types. Raises BadOption or BadFile."""
    count, bare = fit(where, {n: v.shape for n, v in arrays.items()}, layout)
    axes: dict[str, int | None] = {}
    feeds: Feeds = {}
    for name, array in arrays.items():
        wanted = layout.inputs.get(name)
        axes[name] = 0 if wanted is None else wanted.axis
        value = convert(where, array, wanted) if wanted is not None else np.asarray(array)
        if wanted is None:
            check_finite(where, name, value)
        axis = axes[name]
        feeds[name] = np.expand_dims(value, axis) if bare and axis is not None else value
    return Piece(feeds, count, axes)


def check_type(where: str, dtype: np.dtype[Any], wanted: Input) -> None:
    """Refuses types that no value of which may be carried over. Raises BadOption."""
    if wanted.kind == onnx.TensorProto.STRING:
        fits = dtype.kind in "UTO"
    elif wanted.is_float:
        fits = dtype.kind in "fbiu" or dtype == wanted.dtype or dtype.name == "bfloat16"
    else:
        fits = dtype.kind in _WORTH
    if not fits:
        raise BadOption(f"{where} holds {dtype} for input {wanted.name!r}, which takes {_type_name(wanted)}: convert it first.")


def _type_name(wanted: Input) -> str:
    return "text" if wanted.kind == onnx.TensorProto.STRING else str(wanted.dtype)


def convert(where: str, array: Array, wanted: Input) -> Array:
    """The array in the input's type, where no value is lost: floats may be rounded to the input's precision, but not to infinity.

    Raises BadOption for another type, or whole numbers that the input's type cannot hold; BadFile for NaN and infinity.
    """
    array = np.asarray(array)
    check_type(where, array.dtype, wanted)
    if wanted.kind == onnx.TensorProto.STRING:
        return array.astype(object)
    check_finite(where, wanted.name, array)
    if array.dtype == wanted.dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(wanted.dtype)
        whole = array.dtype.kind in INTEGERS
        kept = np.array_equal(result.astype(array.dtype), array) if whole else bool(np.isfinite(result).all())
    if not kept:
        raise BadOption(
            f"{where} holds {array.dtype} for input {wanted.name!r} with values that {wanted.dtype} cannot hold: convert it first."
        )
    return result


def check_finite(where: str, name: str, array: Array) -> None:
    """Raises BadFile where an array of floats holds NaN or infinity."""
    if array.dtype.kind in INTEGERS + "USTOM" or (array.dtype.kind == "V" and array.dtype.name != "bfloat16"):
        return
    bad = ~np.isfinite(array)
    if bad.any():
        what = "NaN" if np.isnan(array).any() else "infinity"
        place = ", ".join(str(int(i)) for i in np.unravel_index(int(bad.argmax()), array.shape))
        raise BadFile(f"{where} holds {what} for {name!r} (at [{place}] of what was read): remove these samples.")


def reason(error: BaseException) -> str:
    """The first sentence of what an exception says, in one line without its full stop."""
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    text = re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0].rstrip(".")
    return text if isinstance(error, SpaError | OSError) else f"{type(error).__name__}: {text}" if text != type(error).__name__ else text


__all__ = ["Input", "Layout", "Piece", "check_type", "fit", "layout_of", "name_entries", "piece", "reason"]
