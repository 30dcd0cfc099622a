"""Batches: pieces of any number of samples, grouped into the batches that a model takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from spa.data.samples import Array, Layout, Piece
from spa.errors import BadOption
from spa.graph.count import itemsize
from spa.graph.trace import Traced
from spa.proof.feeds import Feeds

BATCH_BYTES = 4 << 30  # of all activations of a batch: runs that look at every layer hold about a third of them at once


@dataclass
class Tally:
    """What the last full reading left out and repeated, in samples."""

    dropped: int = 0
    repeated: int = 0


@dataclass
class Regrouping:
    """Cuts pieces into batches.

    Attributes
    ----------
    layout
        The model's side; its fixed batch comes before `batch`.
    batch
        Most samples in a batch where the model leaves that free.
    samples
        Most samples that are taken.
    source
        What the pieces come from, to be named.
    tally
        Told at the end what was dropped and repeated.
    traced
        The model; where it leaves the batch free, a batch has no more samples than keep its activations near `BATCH_BYTES`. A limit of
        memory does not count: rows are drawn batch by batch, and a plan must not depend on the machine. None: only `batch` counts.
    """

    layout: Layout
    batch: int
    samples: int
    source: str
    tally: Tally
    traced: Traced | None = None
    _held: list[Piece] = field(default_factory=list)
    _dropped: Piece | None = None

    def batches(self, pieces: Iterable[Piece]) -> Iterator[Feeds]:
        """Batches in the order of the pieces; memory is that of a batch and a piece.

        Where samples differ in shape a batch ends early. What does not fill a batch that the model fixes is dropped; if
        there would be no batch at all, its samples are repeated in turn until they fill one.
        """
        size = self.layout.batch or 0
        self.tally.dropped = self.tally.repeated = taken = given = 0
        for found in pieces:
            part = found.cut(0, self.samples - taken)
            if part.count == 0:
                continue
            taken += part.count
            size = size or min(self.batch, self._fitting(part))
            if self._held and not self._held[0].joins(part):
                for rest in self._end():
                    given += 1
                    yield rest
            self._held.append(part)
            while sum(p.count for p in self._held) >= size:
                whole = _join(self._held)
                self._held = [whole.cut(size, whole.count)] if whole.count > size else []
                given += 1
                yield self._finish(whole.cut(0, size))
            if taken == self.samples:
                break
        for rest in self._end():
            given += 1
            yield rest
        if not taken:
            raise BadOption(f"{self.source} holds no samples: give at least one.")
        if not given and self._dropped is not None:
            whole = self._dropped
            self.tally.dropped -= whole.count
            self.tally.repeated = size - whole.count
            times = -(-size // whole.count)
            yield self._finish(_join([whole] * times).cut(0, size))

    def _fitting(self, piece: Piece) -> int:
        """Samples, at least one, whose activations fit.

        A free length, such as that of text, is traced with few positions: what a sample of the piece has more of them is taken to be
        proportional, which leaves out the square of attention's products.
        """
        if self.traced is None:
            return self.batch
        facts, constants = self.traced.facts, self.traced.constants
        made = {t.name for node in self.traced.nodes for t in node.node.outputs if t.name} - set(constants)
        nbytes = sum(math.prod(facts.shapes.get(n) or (0,)) * itemsize(facts.types.get(n, 1)) for n in made)
        counts = {n: math.prod(facts.shapes.get(n) or (0,)) for n in piece.feeds}
        samples = max((value.size / counts[n] for n, value in piece.feeds.items() if counts[n]), default=0)  # of the traced run
        return max(int(BATCH_BYTES * piece.count // max(nbytes * samples, 1)), 1)

    def _end(self) -> Iterator[Feeds]:
        """What is held: a smaller batch where the model leaves that free, else dropped."""
        if not self._held:
            return
        whole = _join(self._held)
        self._held = []
        if self.layout.batch is None:
            yield self._finish(whole)
        else:
            self.tally.dropped += whole.count
            self._dropped = self._dropped or whole

    def _finish(self, whole: Piece) -> Feeds:
        added = {n for n, i in self.layout.inputs.items() if self.layout.added and i.axis is not None}
        return {n: np.ascontiguousarray(v[0]).reshape(v.shape[1:]) if n in added else _contiguous(v) for n, v in whole.feeds.items()}


def _contiguous(value: Array) -> Array:
    return value if value.flags.c_contiguous else np.ascontiguousarray(value)


def _join(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    feeds = {n: v if (a := first.axes[n]) is None else np.concatenate([p.feeds[n] for p in pieces], a) for n, v in first.feeds.items()}
    return Piece(feeds, sum(p.count for p in pieces), first.axes)


__all__ = ["Regrouping", "Tally"]
