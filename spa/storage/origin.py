"""Where a model came from: its files, and the hash of their bytes by which plans know it again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

from spa.storage.wire import Buffer
from spa.timing.share import in_background


@dataclass(frozen=True, eq=False)
class Origin:
    """What a model was read from.

    Attributes
    ----------
    files
        Paths of the model file and its external files.
    nbytes
        Bytes of them all.
    read
        Gives these bytes, in pieces.
    """

    files: tuple[str, ...]
    nbytes: int
    read: Callable[[], Iterator[Buffer]]

    @property
    def sha256(self) -> str:
        """Hash of all bytes, the model file first, its external files in the order of their names."""
        return self._hash.result()

    @cached_property
    def _hash(self) -> Future[str]:
        return in_background(self._hashed)

    def _hashed(self) -> str:
        digest = hashlib.sha256()
        for piece in self.read():
            digest.update(piece)
        return digest.hexdigest()

    def prepare(self) -> None:
        """Begins to work out the hash, beside whatever is done next: it takes as long as reading the files."""
        _ = self._hash
