"""Arrays that are kept for later: in memory up to a limit, then in files that are mapped when they are read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadFile

SMALL = 1 << 16  # bytes; smaller arrays are not worth a file


class Spill:
    """Keeps arrays; the files go with it, or with `close`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, Path] = {}
        self._count = 0

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array, or a mapped copy of it in a file. Raises BadFile where there is no room for that."""
        if not isinstance(array, np.ndarray):  # a sequence or a map: never large
            return array
        if array.nbytes < SMALL or self.used + array.nbytes <= self.limit or array.dtype == object:
            self.used += array.nbytes
            return array
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="spa-values-")
            self._count += 1
            path = Path(self._folder.name) / f"{self._count}.npy"
            np.save(path, array)
            mapped = np.asarray(np.load(path, mmap_mode="r"))
        except OSError as error:
            where, reason = tempfile.gettempdir(), error.strerror or "only a part was written"  # as numpy puts it, without a cause
            way_out = "make room there, name another folder in TMPDIR, or give more --memory"
            raise BadFile(f"{where}: values that do not fit into memory can't be kept ({reason}): {way_out}.") from error
        self._files[id(mapped)] = path
        return mapped

    def drop(self, array: NDArray[Any]) -> None:
        """Forgets an array that `keep` gave: its memory counts no more, its file goes."""
        path = self._files.pop(id(array), None)
        if not isinstance(array, np.ndarray):
            return
        if path is None:
            self.used -= array.nbytes
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes all files."""
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
