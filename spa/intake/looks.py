"""What a file or folder looks like, by its name, its first bytes and what lies in it. Nothing is ever loaded or run."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Looks = Callable[[Path], bool]
HEAD = 1 << 16  # bytes of a script that are read


def suffix(*endings: str) -> Looks:
    """A file or folder of one of these endings, such as ".keras"."""
    return lambda path: path.exists() and path.name.lower().endswith(endings)


def scheme(name: str) -> Looks:
    """A name such as timm:resnet18."""
    return lambda path: str(path).startswith(f"{name}:")


def starts(*heads: bytes, at: int = 0) -> Looks:
    """A file whose first bytes are one of these; or the bytes from another place on."""

    def looks(path: Path) -> bool:
        return path.is_file() and _head(path, at + max(map(len, heads)))[at:].startswith(heads)

    return looks


def folder(*names: str) -> Looks:
    """A folder that holds a file of each of these names; globs go too."""
    return lambda path: path.is_dir() and all(any(path.glob(name)) for name in names)


def archive(*members: str, without: str = "") -> Looks:
    """A zip archive that holds members whose names end in these patterns, and none that ends in the other."""

    def looks(path: Path) -> bool:
        names = _members(path)
        holds = all(any(re.search(f"(^|/){m}$", n) for n in names) for m in members)
        return bool(names) and holds and not (without and any(re.search(f"(^|/){without}$", n) for n in names))

    return looks


def script(*packages: str) -> Looks:
    """A Python file, or a module's dotted name, whose imports name one of these packages."""
    pattern = re.compile(rf"^\s*(import|from)\s+({'|'.join(packages)})\b", re.MULTILINE)

    def looks(path: Path) -> bool:
        file = path if path.suffix == ".py" else Path(f"{str(path).replace('.', '/')}.py")
        return file.is_file() and pattern.search(_head(file, HEAD).decode("utf-8", "replace")) is not None

    return looks


def settings(*keys: str, name: str = "config.json") -> Looks:
    """A folder whose configuration has all of these keys."""

    def looks(path: Path) -> bool:
        found = read_json(path / name) if path.is_dir() else None
        return isinstance(found, dict) and all(key in found for key in keys)

    return looks


def document(*keys: str) -> Looks:
    """A JSON file that has all of these keys."""

    def looks(path: Path) -> bool:
        found = read_json(path) if path.suffix == ".json" and path.is_file() else None
        return isinstance(found, dict) and all(key in found for key in keys)

    return looks


def any_of(*ways: Looks) -> Looks:
    """One of these."""
    return lambda path: any(way(path) for way in ways)


def all_of(*ways: Looks) -> Looks:
    """All of these."""
    return lambda path: all(way(path) for way in ways)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it can't be read."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _head(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _members(path: Path) -> list[str]:
    if not path.is_file() or _head(path, 4) != b"PK\x03\x04":
        return []
    try:
        with zipfile.ZipFile(path) as opened:
            return opened.namelist()
    except (OSError, zipfile.BadZipFile):
        return []
