"""A layered layout of an acyclic graph, top to bottom, after Sugiyama: layers, bends, order, positions.

    sizes of boxes, wires --arrange--> rows of boxes and bends, a centre for each, links between neighbouring rows

A wire leaves one box for several; it runs through one bend in every row that it passes, and boxes branch off it, so that a value which
many nodes read is one line. Everything is counted and sorted, nothing drawn by chance: the same graph gives the same picture.

(`grandalf` does this too, but is an alpha of 2022 under the GPL, and knows no shared wires.)
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

BEND = 12.0  # width of a bend
GAP = 22.0  # between boxes of a row
SWEEPS = 8  # of ordering
PLACINGS = 32  # sweeps of placing
PULL = 0.12  # share of the way to the middle


@dataclass(frozen=True)
class Arranged:
    """A layout. Boxes are numbered as given, bends follow them.

    rows: numbers from left to right, row by row. x: centres. links: (from, to), always from a row to the next one.
    """

    rows: tuple[tuple[int, ...], ...]
    x: tuple[float, ...]
    links: tuple[tuple[int, int], ...]
    boxes: int


def arrange(widths: Sequence[float], wires: Sequence[tuple[int, Sequence[int]]]) -> Arranged:
    """Lays boxes out.

    widths: of the boxes, in topological order. wires: (box, boxes that it leads to); what leads backwards is left out.
    Time is linear in boxes and in the rows that wires pass, times their logarithm.
    """
    ahead = [(a, sorted({b for b in ends if b > a})) for a, ends in wires]
    layer = _layers(len(widths), ahead)
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for box, number in enumerate(layer):
        rows[number].append(box)
    links, spans = _bends(ahead, layer, rows, len(widths))
    rows = _ordered(rows, links)
    x = _placed(rows, links, [*widths, *[BEND] * spans], len(widths))
    return Arranged(tuple(map(tuple, rows)), tuple(x), tuple(links), len(widths))


def _layers(boxes: int, wires: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """Row of each box: after all that leads to it, and a box that nothing leads to right above its first reader."""
    layer, fed = [0] * boxes, [False] * boxes
    ends: list[list[int]] = [[] for _ in range(boxes)]
    for start, readers in wires:
        ends[start] += readers
        for reader in readers:
            fed[reader] = True
    for box in range(boxes):
        for reader in ends[box]:
            layer[reader] = max(layer[reader], layer[box] + 1)
    for box in range(boxes):
        if not fed[box] and ends[box]:
            layer[box] = min(layer[r] for r in ends[box]) - 1
    return layer


def _bends(
    wires: Sequence[tuple[int, Sequence[int]]], layer: Sequence[int], rows: list[list[int]], boxes: int
) -> tuple[list[tuple[int, int]], int]:
    """Links between neighbouring rows, and the number of bends that they run through, which are put into the rows."""
    links: list[tuple[int, int]] = []
    bend = boxes
    for start, readers in wires:
        at, row = start, layer[start]
        for reader in sorted(readers, key=lambda r: layer[r]):
            while row < layer[reader] - 1:
                row += 1
                rows[row].append(bend)
                links.append((at, bend))
                at, bend = bend, bend + 1
            links.append((at, reader))
    return links, bend - boxes


def _neighbours(links: Sequence[tuple[int, int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for a, b in links:
        below[a].append(b)
        above[b].append(a)
    return above, below


def _ordered(rows: list[list[int]], links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Rows in an order with few crossings: sorted by the mean place of neighbours, down and up by turns; the best is kept."""
    above, below = _neighbours(links, sum(map(len, rows)))
    best, fewest = [list(r) for r in rows], _crossings(rows, below)
    for sweep in range(SWEEPS):
        if not fewest:
            break
        towards, order = (above, range(1, len(rows))) if sweep % 2 == 0 else (below, range(len(rows) - 2, -1, -1))
        place = {box: i for row in rows for i, box in enumerate(row)}
        for number in order:
            row = rows[number]
            mean = {b: sum(place[n] for n in towards[b]) / len(towards[b]) if towards[b] else float(place[b]) for b in row}
            row.sort(key=mean.__getitem__)
            place.update({box: i for i, box in enumerate(row)})
        found = _crossings(rows, below)
        if found < fewest:
            best, fewest = [list(r) for r in rows], found
    return best


def _crossings(rows: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        place = {box: i for i, box in enumerate(lower)}
        seen: list[int] = []
        for box in upper:
            ends = sorted(place[n] for n in below[box])
            total += sum(len(seen) - bisect_right(seen, e) for e in ends)
            for end in ends:
                insort(seen, end)
    return total


def _placed(rows: Sequence[Sequence[int]], links: Sequence[tuple[int, int]], widths: Sequence[float], boxes: int) -> list[float]:
    """Centres: every box wants to stand under the mean of its neighbours, bends before all, and none may overlap.

    A pull towards the middle closes the gaps that straight columns of bends would leave, and keeps long chains from drifting aside.
    """
    above, below = _neighbours(links, len(widths))
    x = [0.0] * len(widths)
    for row in rows:
        _settle(row, [0.0] * len(row), [1.0] * len(row), widths, x)
    for sweep in range(PLACINGS):
        down = sweep % 2 == 0
        middle = sum(x[:boxes]) / max(boxes, 1)
        for row in rows if down else reversed(rows):
            wanted, weights = [], []
            for box in row:
                near = (above[box] or below[box]) if down else (below[box] or above[box])
                mean = sum(x[n] for n in near) / len(near) if near else x[box]
                wanted.append(mean + PULL * (middle - mean))
                weights.append(6.0 if box >= boxes else 1.0 + len(near))
            _settle(row, wanted, weights, widths, x)
    _straighten(rows, _columns(rows, above, below, boxes), widths, x)
    left = min((x[b] - widths[b] / 2 for b in range(len(widths))), default=0.0)
    return [round(c - left, 1) for c in x]


def _columns(rows: Sequence[Sequence[int]], above: Sequence[Sequence[int]], below: Sequence[Sequence[int]], boxes: int) -> list[list[int]]:
    """Runs of boxes or bends that should stand below each other, the longest first: each is the other's foremost neighbour."""
    def foremost(box: int, near: Sequence[int]) -> int:
        alike = [n for n in near if (n >= boxes) == (box >= boxes)] or near
        return alike[(len(alike) - 1) // 2] if alike else -1

    place = {box: i for row in rows for i, box in enumerate(row)}
    down = [foremost(b, sorted(n, key=place.__getitem__)) for b, n in enumerate(below)]
    up = [foremost(b, sorted(n, key=place.__getitem__)) for b, n in enumerate(above)]
    found = []
    for row in rows:
        for box in row:
            if up[box] >= 0 and down[up[box]] == box:
                continue  # it stands in a column that began above
            column = [box]
            while down[column[-1]] >= 0 and up[down[column[-1]]] == column[-1]:
                column.append(down[column[-1]])
            if len(column) > 1:
                found.append(column)
    return sorted(found, key=len, reverse=True)


def _straighten(rows: Sequence[Sequence[int]], columns: Sequence[Sequence[int]], widths: Sequence[float], x: list[float]) -> None:
    """Puts columns upright, as far as their neighbours leave room: as a whole, or in halves."""
    beside = {box: (row[i - 1] if i else -1, row[i + 1] if i + 1 < len(row) else -1) for row in rows for i, box in enumerate(row)}
    for _ in range(2):  # the second time, others have made room
        waiting = [list(c) for c in reversed(columns)]
        while waiting:
            column = waiting.pop()
            low, high = float("-inf"), float("inf")
            for box in column:
                left, right = beside[box]
                low = max(low, x[left] + (widths[left] + widths[box]) / 2 + GAP) if left >= 0 else low
                high = min(high, x[right] - (widths[right] + widths[box]) / 2 - GAP) if right >= 0 else high
            if low <= high:
                centre = min(max(sum(x[b] for b in column) / len(column), low), high)
                for box in column:
                    x[box] = centre
            elif len(column) > 2:
                waiting += [column[len(column) // 2 :], column[: len(column) // 2]]


def _settle(row: Sequence[int], wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float], x: list[float]) -> None:
    """Centres nearest to what is wanted, in least squares, that keep the order and the gaps: pooling of neighbours that collide."""
    offsets, at = [], 0.0
    for i, box in enumerate(row):
        if i:
            at += (widths[row[i - 1]] + widths[box]) / 2 + GAP
        offsets.append(at)
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, mass, members = want - offset, weight, 1
        while pools and pools[-1][0] >= mean:
            other, more, count = pools.pop()
            mean, mass, members = (mean * mass + other * more) / (mass + more), mass + more, members + count
        pools.append((mean, mass, members))
    i = 0
    for mean, _, members in pools:
        for _ in range(members):
            x[row[i]] = mean + offsets[i]
            i += 1
