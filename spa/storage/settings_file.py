"""Settings that people write by hand: YAML or TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spa.data.samples import reason
from spa.errors import BadFile, BadOption


def read_settings(path: Path, kind: str, *, maps: str, example: str) -> Mapping[Any, Any]:
    """What a YAML file, or a TOML file by its suffix, maps to what.

    kind: the file's name for people ("ratios"). maps: what it must map ("patterns to ratios"); example: a line of one.
    Raises BadFile if it can't be read, BadOption if it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"The {kind} file {path} can't be read: {reason(error)}.") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError) as error:
        raise BadOption(f"The {kind} file {path} is neither YAML nor TOML: {reason(error)}.") from error
    if not isinstance(found, Mapping) or not found:
        raise BadOption(f"The {kind} file {path} must map {maps}, such as {example!r}.")
    return found
