"""Writing files so that there is always a whole one: the old, or the new."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from spa.errors import BadFile, BadOption

Pieces = Iterable[bytes | memoryview]


def check_target(target: Path, sources: Iterable[str]) -> None:
    """Refuse to write over what the result is still read from, and over devices and folders.

    Parameters
    ----------
    target
        The file to write.
    sources
        Files that must stay.

    Raises
    ------
    BadOption
        If the target is one of them, under whichever name, or exists and is not an ordinary file.
    """
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise BadOption(f"{target}: it is not an ordinary file; give the name of a file to write")
    for source in sources:
        with suppress(FileNotFoundError):
            if os.path.samefile(target, source):
                raise BadOption(f"{target}: the model was read from this file; give another name for the result")


def write_files(writes: Sequence[tuple[Path, Pieces]], sources: Iterable[str] = ()) -> None:
    """`check_target` and `replace_all`, with a sentence for whatever goes wrong.

    Raises
    ------
    BadOption
        If a file is one of `sources`, or is not an ordinary file.
    BadFile
        If one cannot be written. Nothing is left behind then, and what was there is there.
    """
    target = writes[-1][0]
    known = list(sources)
    try:
        for file, _ in writes:
            target = file
            check_target(file, known)
        replace_all(writes)
    except FileNotFoundError as error:
        target = _meant(error, writes) or target
        raise BadFile(f"{target}: there is no folder '{target.parent}'; create it first") from error
    except (OSError, ValueError) as error:
        target = _meant(error, writes) or target
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadFile(f"{target}: it cannot be written ({reason}); choose another folder or make room") from error


def _meant(error: Exception, writes: Sequence[tuple[Path, Pieces]]) -> Path | None:
    """The file that an error names, if it is one of those to write."""
    name = getattr(error, "filename", None)
    return next((path for path, _ in writes if os.fspath(path) == name), None)


def replace_all(writes: Sequence[tuple[Path, Pieces]]) -> None:
    """Write files piece by piece, and give them their names only when all are on the disk.

    Parameters
    ----------
    writes
        Each file with its content, in the order in which they are to appear.

    Raises
    ------
    OSError
        If one cannot be written; nothing has changed then.
    """
    waiting: list[tuple[Path, Path]] = []
    try:
        for path, pieces in writes:
            temporary = path.with_name(f".spa-{secrets.token_hex(8)}.tmp")
            waiting.append((temporary, path))
            try:
                _write(temporary, pieces)
            except OSError as error:
                error.filename = os.fspath(path)  # of several files, the one that is meant
                raise
        for temporary, path in waiting:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in waiting:
            with suppress(OSError):
                temporary.unlink()
        raise
    for folder in {path.parent for path, _ in writes}:
        _sync_folder(folder)


def _write(path: Path, pieces: Pieces) -> None:
    # Not tempfile: it makes files that nobody else may read, and the result keeps that.
    with open(path, "xb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the new names survive a power failure, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
