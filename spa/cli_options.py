"""The command line's surroundings: what it is given, turned into what the API takes; what is shown while it works; how it ends.

Progress and logs go to stderr, the spinner only where that is a terminal; results go to stdout.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import time
import tomllib
import traceback
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_graphsurgeon as gs
import typer
import yaml
from onnx import helper
from onnx_graphsurgeon.logger import G_LOGGER
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperGroup

from passes import Weight
from spa.errors import BadFile, BadOption, SpaError
from spa.feeds import Feeds
from spa.files import check_target
from spa.plan import Plan
from spa.repair import RepairOptions
from spa.report import plain, printable
from spa.store import Model
from spa.trace import constant_values
from spa.view import dtype_is_float

WIDTH = 120  # where stdout is no terminal
SLOW = 1.0  # seconds; stages above leave a line on a terminal

# ---------------------------------------------------------------------- options, as typer reads them

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.", show_default=False)]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by `spa plan` or `spa prune`.", show_default=False)]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the pruned model.", show_default=False)]
PlanOut = Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="Where to write the plan.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with exact numbers.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every stage to stderr, and tracebacks of defects.")]
Ratio = Annotated[float, typer.Option("--ratio", "-r", help="Share of the channels that goes, between 0 and 1.")]
Scope = Annotated[str, typer.Option(
    "--scope", metavar="SCOPE", help="local: same share each; global: one threshold; isomorphic: per shape.")]
Criterion = Annotated[str, typer.Option("--criterion", metavar="NAME", help="What makes a channel worth keeping: l2, obspa, taylor, …")]
Aggregate = Annotated[str | None, typer.Option(
    "--aggregate", metavar="WAY", help="How scores of a group's layers are joined: sum, mean, median, max, prod.", show_default=False)]
Normalize = Annotated[str, typer.Option(
    "--normalize", metavar="WAY", help="How groups compare: none, sum, mean, max, standardize, energy.")]
Swaps = Annotated[int, typer.Option("--swaps", min=0, help="Rounds of exchanging removed for kept channels.")]
Loss = Annotated[str, typer.Option("--loss", metavar="NAME", help="For gradients: auto, cross-entropy, entropy or module:function.")]
Source = Annotated[str | None, typer.Option(
    "--calibration", metavar="SOURCE", help="Data: .npz, pictures, text, a folder, module:function; or none (noise), synthetic, moments.",
    show_default=False)]
Preprocess = Annotated[str | None, typer.Option(
    "--preprocess", metavar="HOW", help="For pictures: imagenet, cifar10, lite0, …, a file, or size=224,mean=0.5.",
    show_default=False)]
Tokenizer = Annotated[str | None, typer.Option(
    "--tokenizer", metavar="PATH", help="For text: a tokenizer.json or a Hugging Face folder.", show_default=False)]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Most calibration samples.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Samples in a batch, where the model leaves that free.")]
Length = Annotated[int | None, typer.Option("--length", min=1, help="Tokens in a row of text.", show_default=False)]
Labels = Annotated[str | None, typer.Option(
    "--labels", metavar="NAME", help="Entry of the data that holds labels, for losses.", show_default=False)]
Repair = Annotated[str | None, typer.Option(
    "--repair", metavar="METHOD", help="none, bias, affine, obspa or fold; obspa where --calibration is given.", show_default=False)]
Damping = Annotated[float, typer.Option("--damping", help="Ridge of repair and of errors, over the mean variance of a layer's inputs.")]
RepairInputs = Annotated[str, typer.Option(
    "--repair-inputs", metavar="WHICH", help="pruned: as layers before left them; dense: each layer alone.")]
RepairTarget = Annotated[str, typer.Option("--repair-target", metavar="WHICH", help="What layers are fitted to: dense or pruned.")]
NoNorms = Annotated[bool, typer.Option("--no-norms", help="Leave the statistics that BatchNorm stores as they were.")]
RepairedOut = Annotated[Path | None, typer.Option(
    "--repaired-out", metavar="FILE", help="Also write the repaired model before the deletion, and its plan.", show_default=False)]
MultipleOf = Annotated[str, typer.Option("--multiple-of", metavar="N|auto", help="Round widths; auto: what the CPU provider likes.")]
KeepAtLeast = Annotated[int, typer.Option("--keep-at-least", help="Channels that every group keeps.")]
Include = Annotated[list[str] | None, typer.Option(
    "--include", metavar="PATTERN", help="Only groups, nodes and values of this glob or /regex/.")]
Exclude = Annotated[list[str] | None, typer.Option(
    "--exclude", metavar="PATTERN", help="Not these; may be given more than once, like --include.")]
Ratios = Annotated[Path | None, typer.Option("--ratios", metavar="FILE", help="YAML or TOML: pattern -> ratio of its own.")]
Protect = Annotated[bool, typer.Option("--protect-outputs/--no-protect-outputs", help="Leave the outputs' axes whole.")]
NoStat = Annotated[bool, typer.Option("--no-stat", help="Leave axes that a normalisation runs over.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="For random scores and drawn inputs.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Skip the proof that removing equals masking.")]
Tolerance = Annotated[float, typer.Option("--tolerance", help="What the proof allows, relative to an output's scale.")]
Inputs = Annotated[list[str] | None, typer.Option("--input", metavar="NAME:1x3x224x224", help="Shape of an input; repeatable.")]
FeedsFile = Annotated[Path | None, typer.Option("--feeds", metavar="FILE.npz", help="Inputs for the proof and the timing, by name.")]
NoBench = Annotated[bool, typer.Option("--no-bench", help="Do not measure latency.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads of the timing; 0: ONNX Runtime's choice.")]
OtherWeights = Annotated[bool, typer.Option("--other-weights", help="Accept a model of the same graph with other weights.")]


def multiple_of(text: str) -> int | str:
    """A whole number or "auto"; anything else is left for `spa.choose.Options` to refuse."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def check_tolerance(tolerance: float) -> float:
    """A finite number above zero. Raises BadOption."""
    if not 0 < tolerance < np.inf:
        raise BadOption(f"--tolerance is {tolerance}, but must be a number above 0, such as 1e-4.")
    return tolerance


def repair_options(
    method: str | None, source: str | None, damping: float, inputs: str, target: str, no_norms: bool, repaired_out: Path | None
) -> RepairOptions:
    """How to repair; by default all weights where there are data, and nothing where there are none. Raises BadOption."""
    chosen = RepairOptions(method or ("none" if source is None else "obspa"), inputs, target, damping, not no_norms)
    if chosen.method == "none" and repaired_out is not None:
        raise BadOption("Nothing was repaired, so there is nothing to write to --repaired-out: ask for a repair with --repair obspa.")
    if chosen.method not in ("none", "fold") and source is None:
        raise BadOption(f"--repair {chosen.method} fits layers to data: give some with --calibration (none draws noise).")
    return chosen


def read_ratios(path: Path | None) -> dict[str, float]:
    """Pattern -> ratio, from a YAML or TOML file. Raises BadOption or BadFile."""
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"The ratios file {path} can't be read: {_reason(error)}.") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError) as error:
        raise BadOption(f"The ratios file {path} is neither YAML nor TOML: {' '.join(str(error).split())}.") from error
    if not isinstance(found, Mapping) or not found:
        raise BadOption(f"The ratios file {path} must map patterns to ratios, such as 'layer4.*: 0.7'.")
    for pattern, ratio in found.items():
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise BadOption(f"The ratios file {path} gives {pattern!r} the ratio {ratio!r}, which is no number.")
    return {str(k): float(v) for k, v in found.items()}


def read_shapes(texts: Sequence[str], model: Model) -> dict[str, list[int]]:
    """{input: shape} from NAME:1x3x224x224, or 1x3x224x224 where there is one input. Raises BadOption."""
    names = [t.name for t in model.graph.inputs]
    shapes: dict[str, list[int]] = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        if not re.fullmatch(r"\d+(x\d+)*|", sizes) or (not sizes and not name):
            raise BadOption(f"--input {text!r} is not of the form name:1x3x224x224.")
        if not name:
            if len(names) != 1:
                raise BadOption(f"--input {text!r} does not say which input it means: {', '.join(names)}.")
            name = names[0]
        if name in shapes:
            raise BadOption(f"--input gives {name!r} two shapes.")
        shapes[name] = [int(n) for n in sizes.split("x")] if sizes else []
        if not all(shapes[name]):
            raise BadOption(f"--input {text!r} has an axis of size 0, on which nothing can be proven.")
    return shapes


def read_feeds(path: Path | None, model: Model) -> Feeds | None:
    """Inputs from an .npz file, checked against the model's. Raises BadFile or BadOption."""
    if path is None:
        return None
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise BadFile(f"The feeds file {path} is no .npz file; numpy.savez writes one.")
        with loaded:
            feeds = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadFile(f"The feeds file {path} can't be read as .npz: {_reason(error)}.") from error
    for tensor in model.graph.inputs:
        if tensor.name not in feeds:
            raise BadOption(f"The feeds file {path} lacks input {tensor.name!r}; it has: {', '.join(feeds) or 'nothing'}.")
        _check_feed(path, tensor, feeds[tensor.name])
    return {t.name: feeds[t.name] for t in model.graph.inputs}


def _check_feed(path: Path, tensor: gs.Tensor, array: np.ndarray[Any, Any]) -> None:
    kind = tensor.dtype
    wanted = np.dtype(helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind) if kind is not None else array.dtype
    if array.dtype != wanted and wanted.kind != "O":
        raise BadOption(f"The feeds file {path} holds {array.dtype} for input {tensor.name!r}, which takes {wanted}.")
    shape = list(tensor.shape) if tensor.shape is not None else list(array.shape)
    fits = len(shape) == array.ndim and all(not isinstance(s, int) or s <= 0 or s == n for s, n in zip(shape, array.shape, strict=True))
    if not fits:
        raise BadOption(f"The feeds file {path} holds shape {array.shape} for input {tensor.name!r}, which is declared as {tuple(shape)}.")


def shapes_of(feeds: Feeds | None) -> dict[str, list[int]]:
    """The shapes that feeds give the inputs."""
    return {name: list(array.shape) for name, array in (feeds or {}).items()}


def data_files(outputs: Mapping[str, Path | None], *sources: str | None) -> list[str]:
    """What may be read for calibration, as far as an output could destroy it: files, and files in folders."""
    found = [s for s in sources if s is not None and os.path.isfile(s)]
    folders = [Path(os.path.realpath(s)) for s in sources if s is not None and os.path.isdir(s)]
    targets = [t for t in outputs.values() if t is not None and os.path.exists(t)]
    return found + [os.fspath(t) for t in targets if any(f in Path(os.path.realpath(t)).parents for f in folders)]


def check_outputs(outputs: Mapping[str, Path | None], sources: Sequence[str | os.PathLike[str] | None]) -> None:
    """Refuses, before anything is computed, what could not be written or would destroy an input.

    outputs: option -> file. sources: files that are read. Raises BadOption or BadFile.
    """
    kept = [os.fspath(s) for s in sources if s is not None]
    seen: dict[Path, str] = {}
    for option, target in outputs.items():
        if target is None:
            continue
        try:
            _check_output(option, target, kept)
        except (OSError, ValueError) as error:
            raise BadFile(f"{option} {target} can't be written: {_reason(error)}.") from error
        place = Path(os.path.realpath(target))
        if place in seen:
            raise BadOption(f"{option} and {seen[place]} are the same file, {target}; give two names.")
        seen[place] = option


def _check_output(option: str, target: Path, sources: Sequence[str]) -> None:
    folder = target.parent
    if target.is_dir():
        raise BadOption(f"{option} {target} is a folder; give the name of a file in it.")
    if not folder.is_dir():
        raise BadFile(f"{option} {target} can't be written: there is no folder {folder}; create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadFile(f"{option} {target} can't be written: the folder {folder} may not be changed.")
    if any(os.path.realpath(target) == os.path.realpath(s) for s in sources):
        raise BadOption(f"{option} {target} is a file that is read from; give another name for the result.")
    check_target(target, sources)


def plan_name(output: Path) -> Path:
    """Where the plan of a pruned model goes by default: small.onnx -> small.plan.json."""
    return output.with_name(f"{output.stem if output.suffix else output.name}.plan.json")


def _reason(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


# ---------------------------------------------------------------------- spa check


@dataclass(frozen=True)
class KeptWeights:
    """Whether the float tensors of a pruned model hold exactly the kept elements of the original.

    exact, differing, unknown: names of those that do, that do not, and that the original has no tensor for.
    """

    exact: tuple[str, ...]
    differing: tuple[str, ...]
    unknown: tuple[str, ...]


def kept_weights(given: Model, small: Model, plan: Plan) -> KeptWeights:
    """Compares bytes, tensor by tensor and in bounded memory."""
    before, after = constant_values(given.graph), constant_values(small.graph)
    found: dict[str, list[str]] = {"exact": [], "differing": [], "unknown": []}
    for name, tensor in after.items():
        if not dtype_is_float(tensor.dtype):
            continue  # whole numbers restate sizes
        origin = before.get(plan.copies.get(name, name))
        if origin is None:
            found["unknown"].append(name)
            continue
        wanted = _weight(origin)
        removed = plan.removed.get(name, {})
        try:
            for axis, gone in removed.items():
                keep = np.ones(wanted.shape[int(axis)], bool)
                keep[gone] = False
                wanted = wanted.take(np.flatnonzero(keep), int(axis))
        except IndexError:
            found["differing"].append(name)
            continue
        found["exact" if _digest(wanted) == _digest(_weight(tensor)) else "differing"].append(name)
    return KeptWeights(*(tuple(found[k]) for k in ("exact", "differing", "unknown")))


def _weight(constant: gs.Constant) -> Weight:
    values = constant._values
    return values if isinstance(values, Weight) else Weight.of_array(np.asarray(constant.values))


def _digest(weight: Weight) -> tuple[tuple[int, ...], int, bytes]:
    digest = hashlib.sha256()
    for piece in weight.pieces():
        digest.update(piece)
    return tuple(weight.shape), int(weight.data_type), digest.digest()


def check_interfaces(given: Model, small: Model) -> None:
    """Raises BadOption unless both models have the same inputs and outputs by name."""
    for what, one, other in (("input", given.graph.inputs, small.graph.inputs), ("output", given.graph.outputs, small.graph.outputs)):
        names, found = {t.name for t in one}, {t.name for t in other}
        missing = sorted(names ^ found)
        if missing:
            raise BadOption(f"The models have different {what}s ({', '.join(missing[:3])}), so that one can't be the other pruned.")


# ---------------------------------------------------------------------- what is shown, and the end


class _Out(Console):
    """A console that falls silent when the reader has gone (`spa inspect … | head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _drop_stdout()


def _drop_stdout() -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


class Terminal:
    """Where a command talks to: results, and what goes on meanwhile.

    Parameters
    ----------
    as_json
        Whether results are one JSON object.
    verbose
        Whether every stage is logged.
    """

    def __init__(self, as_json: bool, verbose: bool) -> None:
        self.as_json, self.verbose = as_json, verbose
        self.err = Console(stderr=True, highlight=False)
        G_LOGGER.severity = G_LOGGER.CRITICAL  # it prints to stdout
        if verbose:
            logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        else:
            warnings.simplefilter("ignore")

    def show(self, data: dict[str, Any], *tables: RenderableType) -> None:
        """The result: as tables, or as JSON."""
        if self.as_json:
            write_json(data)
            return
        plain_text = not sys.stdout.isatty()
        out = _Out(width=int(os.environ.get("COLUMNS", WIDTH)) if plain_text else None, highlight=False, soft_wrap=False,
                   color_system=None if plain_text else "auto")
        for shown in tables:
            out.print(shown)

    def log(self, text: str, *, always: bool = False) -> None:
        """A line on stderr, with --verbose or always."""
        if self.verbose or always:
            self.err.print(Text(printable(text)))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows that a stage goes on, and how long it took where that was long."""
        start = time.perf_counter()
        if self.err.is_terminal:
            with self.err.status(Text(f"{name} …")):
                yield
        else:
            yield
        took = time.perf_counter() - start
        self.log(f"{name}: {took:.2f} s", always=self.err.is_terminal and took >= SLOW)


def write_json(data: dict[str, Any]) -> None:
    """One object on stdout, with exact numbers."""
    try:
        sys.stdout.write(json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()


class Guarded(TyperGroup):
    """Commands that end in one sentence and an exit code, whatever happens."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Runs a command and exits."""
        words = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # names may hold what the terminal's encoding lacks
        options["standalone_mode"] = False
        try:
            code = super().main(words, *rest, **options)
        except BaseException as error:
            code, sentence = verdict(error)
            _complain(error, code, sentence, words)
        else:
            if code == 130 and isinstance(code, int):
                _complain(KeyboardInterrupt(), code, "interrupted before it was done", words)
        sys.exit(code if isinstance(code, int) else 0)


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence of an error."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 2), ""
    if isinstance(error, SpaError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted before it was done"
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return 0, ""
    if isinstance(error, MemoryError):
        return 2, "there is not enough memory for this; close other programs or use a larger machine. Nothing was written"
    if hasattr(error, "format_message"):  # typer's own, of whichever version; without a word where it has shown the help
        text = " ".join(error.format_message().split())
        return 2, f"{text}{'' if text.endswith(('.', '?')) else '.'} See --help." if text else ""
    if isinstance(error, OSError):
        return 2, f"{error.filename or 'a file'} can't be read or written: {error.strerror or error}"
    where = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else ""
    text = " ".join(str(error).split())[:200]
    return 2, f"internal error ({type(error).__name__}: {text}{place}); this is a defect of spa, please report it (-v shows the traceback)"


def _complain(error: BaseException, code: int, sentence: str, words: Sequence[str]) -> None:
    if not sentence:
        return
    if {"-v", "--verbose"} & set(words) and error.__traceback__ is not None:
        traceback.print_exception(error)
    if "--json" in words:
        write_json({"error": {"kind": type(error).__name__, "message": sentence, "exit_code": code}})
    text = printable(sentence)
    sys.stderr.write(f"spa: {text}{'' if text.endswith(('.', '?', '!')) else '.'}\n")
