"""What the command line is given, checked and turned into what the API takes; and files that it may write."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from spa.budgets.targets import UNITS
from spa.data.samples import reason
from spa.errors import BadFile, BadOption
from spa.graph.kinds import KINDS
from spa.layers.depth import BALANCE, Depth
from spa.proof.feeds import Feeds
from spa.repairs.repair import RepairOptions
from spa.storage.files import check_target
from spa.storage.settings_file import read_settings
from spa.storage.store import Model
from spa.timing.share import limit_memory

LEAST_MEMORY = 64_000_000


def multiple_of(text: str) -> int | str:
    """A whole number or "auto"; anything else is left for `spa.plans.choose.Options` to refuse."""
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


def depth(drop: str | None, kind: str, method: str) -> Depth | None:
    """Which layers go: a number, a share, balance, or names with commas. Raises BadOption."""
    if drop is None:
        if (kind, method) != ("any", "finercut"):
            raise BadOption("--layer-kind and --layers say how layers are chosen: say how many go with --drop-layers.")
        return None
    names = tuple(part.strip() for part in drop.split(",") if part.strip())
    if not names:
        raise BadOption("--drop-layers is empty: give a number, a share such as 0.2, balance, or names.")
    if names == (BALANCE,):
        return Depth(BALANCE, method, kind)
    return Depth(float(drop) if re.fullmatch(r"-?\d*\.?\d+", drop.strip()) else names, method, kind)


def units(text: str | None) -> tuple[str, ...]:
    """Kinds of groups from a list with commas, each once. Raises BadOption for what is no kind."""
    found = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    for kind in found:
        if kind not in KINDS:
            raise BadOption(f"--units: there is no kind {kind!r}; the choice is: {', '.join(KINDS)}.")
    if text is not None and not found:
        raise BadOption("--units is empty: give kinds of groups, such as head,neuron.")
    return found


def read_ratios(path: Path | None) -> dict[str, float]:
    """Pattern -> ratio, from a YAML or TOML file. Raises BadOption or BadFile."""
    if path is None:
        return {}
    found = read_settings(path, "ratios", maps="patterns to ratios", example="layer4.*: 0.7")
    for pattern, ratio in found.items():
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise BadOption(f"The ratios file {path} gives {pattern!r} the ratio {ratio!r}, which is no number.")
    return {str(k): float(v) for k, v in found.items()}


def limited(text: str | None) -> str | None:
    """Limits this process's memory to a size such as 4GB, or lifts the limit for None. Raises BadOption for what is no size."""
    nbytes = 0
    if text is not None:
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]+)", text.strip())
        if match is None or match[2] not in UNITS["memory"]:
            raise BadOption(f"--memory {text!r} is no size: give one such as 4GB or 800MiB.")
        nbytes = int(float(match[1]) * UNITS["memory"][match[2]])
        if nbytes < LEAST_MEMORY:
            raise BadOption(f"--memory {text} is less than anything can be done in: give at least {LEAST_MEMORY // 1_000_000}MB.")
    limit_memory(nbytes)
    return text


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
        raise BadFile(f"The feeds file {path} can't be read as .npz: {reason(error)}.") from error
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
            raise BadFile(f"{option} {target} can't be written: {reason(error)}.") from error
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
