"""PaddlePaddle's inference folders, by paddle2onnx: `inference.json` (PaddlePaddle 3) or `inference.pdmodel`, and `inference.pdiparams`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OPSET = 17
PROGRAMS = (".json", ".pdmodel")
PARAMETERS = ".pdiparams"


def inputs(source: str, wish: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each input."""
    import paddle

    program, _ = files(source)
    paddle.enable_static()
    guard = paddle.pir_utils.OldIrGuard if program.suffix == ".pdmodel" else contextlib.nullcontext
    with guard(), paddle.static.scope_guard(paddle.static.Scope()):
        loaded, names, _ = paddle.static.load_inference_model(str(program.with_suffix("")), paddle.static.Executor(paddle.CPUPlace()))
        block = loaded.global_block()
        given = {op.attrs()["name"]: op.results()[0] for op in block.ops if op.name() == "pd_op.data"} if hasattr(block, "ops") and (
            program.suffix == ".json") else {name: block.var(name) for name in names}  # fmt: skip
    return [{"name": name, "dtype": str(given[name].dtype).rpartition(".")[2].lower(),
             "shape": [n if n > 0 else None for n in given[name].shape]} for name in names]  # fmt: skip


def convert(source: str, target: str, wish: Mapping[str, Any]) -> None:
    """Writes the ONNX file."""
    from paddle2onnx import convert as converter

    program, parameters = files(source)
    _program(source)  # PaddlePaddle tells a damaged file from an operator that the converter lacks
    said: list[str] = []
    told = converter.logging.error
    converter.logging.error = lambda message="", **_: said.append(str(message))  # it logs what went wrong, and raises something else
    try:
        # its other way to fold constants, polygraphy, calls pip; spa folds them itself
        converter.export(str(program), str(parameters), target, opset_version=wish.get("opset") or OPSET, optimize_tool="none")
    except UnboundLocalError as error:
        raise RuntimeError(next((s for s in said if s), "paddle2onnx fails without a word")) from error
    finally:
        converter.logging.error = told
    if not Path(target).exists():
        raise RuntimeError(next((s for s in said if s), "paddle2onnx has written nothing"))


def outputs(source: str, feeds: Mapping[str, Any], wish: Mapping[str, Any]) -> list[Any]:
    """All outputs in order."""
    program = _program(source)
    for name in program.get_input_names():
        handle = program.get_input_handle(name)
        handle.reshape(feeds[name].shape)
        handle.copy_from_cpu(feeds[name])
    program.run()
    return [program.get_output_handle(name).copy_to_cpu() for name in program.get_output_names()]


def files(source: str) -> tuple[Path, Path]:
    """Program and parameters of a folder, or of the file that is one of both."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    stems = {p.stem for p in folder.glob(f"*{PARAMETERS}")} if path.is_dir() else {path.stem}
    found = [folder / f"{stem}{ending}" for stem in sorted(stems) for ending in PROGRAMS if (folder / f"{stem}{ending}").exists()]
    if not found:
        raise FileNotFoundError(f"it holds no NAME{PARAMETERS} with NAME{PROGRAMS[0]} or NAME{PROGRAMS[1]} beside it")
    if len(stems) > 1:
        raise ValueError(f"it holds several networks ({', '.join(sorted(stems))}): name the {PARAMETERS} file of one")
    parameters = found[0].with_suffix(PARAMETERS)
    if not parameters.exists():
        raise FileNotFoundError(f"there is no {parameters.name} beside {found[0].name}")
    return found[0], parameters


@functools.lru_cache(maxsize=1)
def _program(source: str) -> Any:
    from paddle import inference

    try:
        settings = inference.Config(*map(str, files(source)))
        settings.disable_gpu()
        settings.disable_glog_info()
        settings.switch_ir_optim(False)
        return inference.create_predictor(settings)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"PaddlePaddle can't load it ({_line(error)})") from error


def _line(error: BaseException) -> str:
    """The line of Paddle's long messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Error:" in line), lines[-1] if lines else type(error).__name__)
