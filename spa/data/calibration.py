"""Calibration data: samples that a model is run on to see what its channels do, from files, folders, functions, or made up.

    .npz .npy, pictures, text, Python --source--> pieces --`Regrouping`--> batches

Whatever comes in, a batch that comes out has the model's names, shapes and types and no NaN or infinity, or one sentence says which
file, entry and input is wrong. Reading is lazy, memory is that of a batch, and every reading gives the same batches.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spa.data import preprocess as pictures
from spa.data import texts
from spa.data.batches import Regrouping, Tally
from spa.data.preprocess import PRESETS, Preprocess, image_source, read_preprocess
from spa.data.python_data import Replay, Steady, as_array, pieces_of
from spa.data.samples import Layout, Piece, layout_of, reason
from spa.data.texts import text_source, token_inputs
from spa.errors import BadFile, BadOption, SpaError
from spa.graph.trace import Traced
from spa.proof.feeds import Feeds, draw
from spa.storage import array_files
from spa.storage.array_files import ArraySource, Entry, of_array, source_of, sources_of

NOISE = "none"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_KNOWN = "an .npz or .npy file, a folder of them or of pictures, text (.txt, .md, .gz), module:function, or none"


@dataclass(frozen=True)
class Calibration:
    """Batches to run a model on; each `iter()` starts anew and gives the same ones in the same order.

    Attributes
    ----------
    name
        What it is, for reports.
    noise
        True where the inputs are made up.
    samples
        How many samples a reading gives, None if that is not known before reading.
    labels
        Entry that comes along in the feeds though it is no input, None if there is none.
    """

    name: str
    noise: bool
    samples: int | None
    labels: str | None = None
    _read: Callable[[Tally], Iterator[Feeds]] = field(default=lambda _: iter(()), repr=False, compare=False)
    _tally: Tally = field(default_factory=Tally, repr=False, compare=False)

    def __iter__(self) -> Iterator[Feeds]:
        return self._read(self._tally)

    @property
    def dropped(self) -> int:
        """Samples that the last full reading left out, as they did not fill a batch of the model's fixed size."""
        return self._tally.dropped

    @property
    def repeated(self) -> int:
        """Samples that the last full reading gave again, to fill the only batch of the model's fixed size."""
        return self._tally.repeated


def calibration(
    source: str | Path | Iterable[Any] | Callable[[], Any] | None,
    traced: Traced,
    *,
    samples: int = 256,
    batch: int = 32,
    preprocess: str | Preprocess | None = None,
    tokenizer: str | Path | None = None,
    length: int | None = None,
    seed: int = 0,
    labels: str | None = None,
) -> Calibration:
    """Opens calibration data for a model; what can be checked without reading it all is checked here.

    Parameters
    ----------
    source
        A path (.npz, .npy, a folder of these or of pictures, a picture, text or a folder of text), "module:function", an array, a
        mapping of arrays by input, an iterable of either, a function that returns one, or None or "none" for noise.
    traced
        The traced model.
    samples
        Most samples. Arrays and text give their first ones, folders of pictures an even choice of their files.
    batch
        Most samples in a batch where the model does not fix that; fewer where their activations would take some gigabytes.
    preprocess
        For pictures: a `Preprocess`, a preset of `spa.data.preprocess.PRESETS`, a YAML or TOML file, or "size=224,mean=0.5".
    tokenizer
        For text: a tokenizer.json or a Hugging Face directory.
    length
        Tokens in a row, for text and noise.
    seed
        For noise.
    labels
        Entry of labels, one for each sample; "labels" is taken along without being named.

    Raises
    ------
    BadOption
        Something does not fit the model or the source.
    BadFile
        A file can't be read or holds NaN or infinity. Reading the batches raises both, too.

    >>> for feeds in calibration("photos/", traced, preprocess="imagenet"):
    ...     session.run(None, feeds)
    """
    for name, number, least in (("samples", samples, 1), ("batch", batch, 1), ("length", length, 1), ("seed", seed, 0)):
        if number is not None and number < least:
            raise BadOption(f"--{name} is {number}, but must be a whole number of at least {least}.")
    if isinstance(source, Calibration):
        return source
    opened = _open(source, _Request(traced, layout_of(traced), samples, batch, preprocess, tokenizer, length, seed, labels))
    for name, value, fits in (
        ("preprocess", preprocess, "pictures"), ("tokenizer", tokenizer, "text"),
        ("length", length, "text or noise"), ("labels", labels, "arrays"),
    ):  # fmt: skip
        if value is not None and opened.kind not in fits.split(" or "):
            raise BadOption(f"--{name} is for {fits}, but the calibration data ({opened.name}) are {opened.kind}: leave it out.")
    steady = Steady(opened.source) if opened.foreign else None

    def read(tally: Tally) -> Iterator[Feeds]:
        found = Regrouping(opened.layout, batch, samples, opened.source, tally, traced).batches(opened.pieces())
        return found if steady is None else steady.check(found)

    count = opened.samples
    if count is not None and opened.layout.batch is not None:
        count = count // opened.layout.batch * opened.layout.batch or opened.layout.batch
    return Calibration(opened.name, opened.kind == "noise", count, opened.labels, read)


@dataclass(frozen=True)
class _Request:
    """What was asked for."""

    traced: Traced
    layout: Layout
    samples: int
    batch: int
    preprocess: str | Preprocess | None
    tokenizer: str | Path | None
    length: int | None
    seed: int
    labels: str | None

    @property
    def rows(self) -> int:
        """Samples in a batch."""
        return self.layout.batch or self.batch


@dataclass(frozen=True)
class _Opened:
    """A source. `name` is for reports, `source` begins a sentence, `kind` is what it gives, `foreign`: whether code of others makes it."""

    name: str
    source: str
    kind: str
    samples: int | None
    layout: Layout
    pieces: Callable[[], Iterator[Piece]]
    labels: str | None = None
    foreign: bool = False


def _open(source: Any, asked: _Request) -> _Opened:
    if source is None or (isinstance(source, str) and source == NOISE):
        return _noise(asked)
    if isinstance(source, str | Path):
        path = Path(source)
        try:
            if path.is_dir():
                return _folder(path, asked)
            if path.is_file():
                return _files(str(path), [path], path.suffix.lower(), asked)
        except (OSError, ValueError) as error:
            raise BadFile(f"The calibration data {source} can't be read: {reason(error)}.") from error
        if isinstance(source, str) and _FUNCTION.fullmatch(source):
            return _foreign(source, _imported(source), asked)
        raise BadFile(f"The calibration data {source} do not exist: give {_KNOWN}.")
    if isinstance(source, np.ndarray):
        return _arrays("array", [source_of("The calibration array", {"": of_array(source)}, asked.layout, asked.labels)], asked)
    if isinstance(source, Mapping):
        entries = {str(n): of_array(as_array(f"Entry {n!r} of the calibration data", v)) for n, v in source.items()}
        return _arrays("arrays", [source_of("The calibration mapping", entries, asked.layout, asked.labels)], asked)
    if isinstance(source, Iterable) or callable(source):
        name = getattr(source, "__qualname__", None) or type(source).__name__
        return _foreign(str(name), source, asked)
    raise BadOption(f"Calibration data can't be a {type(source).__name__}: give {_KNOWN}.")


# ---------------------------------------------------------------------- files


def _folder(folder: Path, asked: _Request) -> _Opened:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not any(n.startswith(".") for n in p.relative_to(folder).parts))
    kinds = (array_files.SUFFIXES, pictures.SUFFIXES, texts.SUFFIXES)
    arrays, images, text = ([p for p in files if p.suffix.lower() in kind] for kind in kinds)
    if asked.preprocess is not None and images:
        arrays, text = [], []
    elif asked.tokenizer is not None and text:
        arrays, images = [], []
    if arrays and images:
        raise BadOption(
            f"The folder {folder} holds both arrays ({arrays[0].name}) and pictures ({images[0].name}): give a folder of one kind."
        )
    chosen = arrays or images or text  # notes often lie beside data
    if not chosen:
        found = f"only others such as {files[0].name}" if files else "nothing"
        listed = ", ".join(s for kind in kinds for s in kind)
        raise BadFile(f"The folder {folder} has no calibration data but {found}: it needs files that end in {listed}.")
    return _files(str(folder), chosen, chosen[0].suffix.lower(), asked)


def _files(name: str, files: Sequence[Path], suffix: str, asked: _Request) -> _Opened:
    if suffix in array_files.SUFFIXES:
        found, _ = sources_of(files, asked.layout, asked.labels, asked.samples)
        return _arrays(name, found, asked)
    if suffix in pictures.SUFFIXES:
        return _images(name, files, asked)
    if suffix in texts.SUFFIXES:
        source = text_source(f"The calibration data {name}", files, asked.traced, asked.layout, asked.tokenizer, asked.length)
        rows = source.inputs.layout.batch or asked.batch
        shown = f"text in {name}, {source.inputs.length} tokens a sample"
        return _Opened(shown, source.name, "text", None, source.inputs.layout, lambda: source.pieces(rows))
    raise BadOption(f"The calibration file {name} is of no known kind: give {_KNOWN}.")


def _arrays(name: str, sources: Sequence[ArraySource], asked: _Request) -> _Opened:
    def pieces() -> Iterator[Piece]:
        for source in sources:
            yield from source.pieces(asked.rows)

    count = sum(s.count for s in sources)
    where = sources[0].where if len(sources) == 1 else f"The calibration data {name}"
    if not count:
        raise BadOption(f"{where} holds no samples: give at least one.")
    shapes = {tuple(sorted((n, _sample_shape(e, s, n)) for n, e in s.entries.items())) for s in sources}
    known = len(shapes) == 1 or asked.rows == 1 or asked.layout.batch is None
    extra = next((n for n in sources[0].entries if n not in asked.layout.inputs), None)
    return _Opened(name, where, "arrays", min(count, asked.samples) if known else None, asked.layout, pieces, extra)


def _sample_shape(entry: Entry, source: ArraySource, name: str) -> tuple[int, ...]:
    axis = source.layout.axes.get(name, 0)
    return entry.shape if axis is None or source.bare else entry.shape[:axis] + entry.shape[axis + 1 :]


def _images(name: str, files: Sequence[Path], asked: _Request) -> _Opened:
    count = min(len(files), asked.samples)
    chosen = [files[i * len(files) // count] for i in range(count)]
    settings, words = asked.preprocess, "as given"
    if isinstance(settings, str):
        settings, words = read_preprocess(settings)
    source = image_source(chosen, asked.layout, settings)
    if settings is None:
        numbers = "ImageNet's mean and std" if source.settings.mean == PRESETS["imagenet"].mean else "pixels as they are"
        words = f"no --preprocess given, so {numbers} ({source.settings}, {source.settings.layout} read off the input)"
    elif words == "as given":
        words = str(source.settings)
    return _Opened(f"images in {name}, {words}", f"The calibration data {name}", "pictures", count, asked.layout, source.pieces)


# ---------------------------------------------------------------------- Python


def _imported(name: str) -> Any:
    """What module:function names; the working directory is put on sys.path for it, and stays there. Raises BadOption."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # the user's module runs here
        raise BadOption(f"The calibration function {name} can't be imported: {reason(error)}; it is looked for in {here} too.") from error
    return found


def _foreign(name: str, source: Any, asked: _Request) -> _Opened:
    replays: list[tuple[Any, Replay]] = []

    def pieces() -> Iterator[Piece]:
        try:
            made = source if isinstance(source, Iterable) else source()
        except SpaError:
            raise
        except Exception as error:  # the user's function
            raise BadOption(f"The calibration function {name} fails: {reason(error)}.") from error
        if isinstance(made, Mapping | np.ndarray):
            made = [made]
        if not isinstance(made, Iterable) or isinstance(made, str | bytes):
            what = "The calibration function" if callable(source) else "The calibration data"
            raise BadOption(f"{what} {name} gives a {type(made).__name__}: give an iterable of dicts {{input: array}}, or of arrays.")
        for once, replay in replays:
            if once is made:
                return iter(replay)
        try:
            iterator = iter(made)
        except Exception as error:  # the user's __iter__
            raise BadOption(f"The calibration data {name} fail: {reason(error)}.") from error
        found = pieces_of(name, iterator, asked.layout, asked.labels)
        if iterator is made and (source is made or not replays):  # one reading is all it has: keep what was read
            replays.append((made, Replay(found)))
            return iter(replays[-1][1])
        return found

    wanted = asked.labels or "labels"
    extra = None if wanted in asked.layout.inputs else wanted
    if not isinstance(source, Iterable) and not callable(source):
        raise BadOption(f"The calibration data {name} are a {type(source).__name__}: give a function or an iterable.")
    return _Opened(name, f"The calibration data {name}", "arrays", None, asked.layout, pieces, extra, foreign=True)


# ---------------------------------------------------------------------- noise


def _noise(asked: _Request) -> _Opened:
    """Made-up inputs as `spa.proof.feeds.draw` makes them; the seed of every batch follows from the run's."""
    layout, shapes, off = asked.layout, dict[str, tuple[int, ...]](), list[str]()
    for name in layout.inputs:
        shapes[name] = tuple(asked.traced.facts.shapes.get(name) or ())
    tokens = None
    try:
        axis = next((s[-1] for n, s in shapes.items() if s and not layout.inputs[n].is_float), None)
        tokens = token_inputs(asked.traced, layout, asked.length) or None
        if tokens is not None and asked.length is None and axis is not None:
            tokens = token_inputs(asked.traced, layout, axis)
    except BadOption:
        if asked.length is not None:
            raise
    if tokens is None and asked.length is not None:
        raise BadOption(f"--length is for models that take token ids, which no input does; its inputs are: {layout.names}.")
    if tokens is not None:
        layout = tokens.layout
        off = [n for n, role in tokens.roles.items() if role == "off"]
    size = layout.batch or asked.batch
    count = max(asked.samples // size, 1) * size if layout.batch else asked.samples

    def shape(name: str, rows: int) -> tuple[int, ...]:
        axis = layout.inputs[name].axis
        full = tokens.shape(name, rows) if tokens is not None else ((0,) if layout.added and axis is not None else ()) + shapes[name]
        return full if axis is None else (*full[:axis], rows, *full[axis + 1 :])

    def pieces() -> Iterator[Piece]:
        for start in range(0, count, size):
            rows = min(size, count - start)
            state = np.random.SeedSequence([asked.seed, start // size]).generate_state(1, np.uint64)
            feeds = draw(asked.traced, seed=int(state[0]), shapes={n: shape(n, rows) for n in layout.inputs})
            feeds.update({n: np.zeros_like(feeds[n]) for n in off})
            yield Piece(feeds, rows, layout.axes)

    return _Opened("noise", "The noise", "noise", asked.samples, layout, pieces)


__all__ = ["Calibration", "calibration"]
