"""Files of named arrays: .npz, and .safetensors where that package is installed. Pickles are never loaded."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import BadFile, BadOption
from spa.frameworks.arrays import Array
from spa.storage.files import write_files

SUFFIXES = (".npz", ".safetensors")


def check_suffix(path: Path) -> None:
    """Raises BadOption for names that are neither, and where safetensors is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadOption(f"{path}: weights are read and written as {' or '.join(SUFFIXES)}; numpy.savez writes the first.")
    if path.suffix.lower() == ".safetensors":
        _safetensors(path)


def read_weights(path: Path) -> dict[str, Array]:
    """Arrays by name, in the file's order. Raises BadFile, BadOption."""
    check_suffix(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return dict(_safetensors(path).load(path.read_bytes()))
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError as error:
        raise BadFile(f"There is no file {path}.") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise BadFile(f"{path} can't be read as a file of weights: {' '.join(str(error).split())}.") from error
    except Exception as error:  # safetensors has an error of its own for damaged files
        raise BadFile(f"{path} can't be read as a file of weights: {' '.join(str(error).split())}.") from error


def write_weights(path: Path, arrays: Mapping[str, Array], sources: tuple[str, ...] = ()) -> None:
    """Writes arrays, whole or not at all. Raises BadFile, BadOption."""
    check_suffix(path)
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if path.suffix.lower() == ".safetensors":
        data = _safetensors(path).save(whole)
    else:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **whole)  # type: ignore[arg-type]
        data = buffer.getvalue()
    write_files([(path, [data])], sources)


def _safetensors(path: Path) -> Any:
    try:
        from safetensors import numpy
    except ImportError as error:
        raise BadOption(f"{path}: safetensors is not installed: pip install safetensors; .npz needs nothing.") from error
    return numpy
