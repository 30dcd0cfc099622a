"""Atoms: the unknowns of the type system, one for each position of an axis.

An axis of length L carries labels, an integer array (L, k): row p lists the atoms of position p, padded with 0.
A position is removed if *any* of its atoms is removed; that is the whole semantics, and it gives

* a **sum** axis (Concat, Split, Slice, Gather): rows are stacked or picked;
* a **product** axis (Reshape, heads, convolution groups): row (i, j) is the union of row i and row j.

Equal axes are unified: their atoms become one (union-find). An axis of plain atoms that turns out to be a product is
*refined*: every atom x_ij is replaced, everywhere, by {a_i, b_j}. Both are single facts about atoms, so the order
in which nodes are visited does not matter, and nothing loops over positions in Python.

Freezing an atom is always safe. Each frozen atom knows one cause (an index that the caller gives a meaning to).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]  # (length, k), 0 = no atom
_DEEPEST = 16  # factors of one axis; more come from products that cross each other again and again
_ROUNDS = 32  # unification settles in two or three rounds; more means that it went in circles


def merge(parts: Sequence[Labels]) -> Labels:
    """Labels of the product axis (a b c …): row (i, j, …) holds the atoms of a_i, b_j, … (outer factor first)."""
    whole = parts[0]
    for part in parts[1:]:
        n, m = len(whole), len(part)
        if not part.shape[1]:
            whole = np.repeat(whole, m, axis=0)
        elif not whole.shape[1]:
            whole = np.tile(part, (n, 1))
        else:
            whole = np.concatenate([np.repeat(whole, m, axis=0), np.tile(part, (n, 1))], axis=1)
    return whole


def stack(parts: Sequence[Labels]) -> Labels:
    """Labels of the sum axis (a|b|c …)."""
    width = max(p.shape[1] for p in parts)
    return np.concatenate([p if p.shape[1] == width else np.pad(p, ((0, 0), (0, width - p.shape[1]))) for p in parts])


def _compact(labels: Labels) -> Labels:
    """Sorts each row, drops repeated atoms and the columns that only pad."""
    if labels.shape[1] > 1:
        labels = -np.sort(-labels, axis=1)
        twice = labels[:, 1:] == labels[:, :-1]
        twice &= labels[:, 1:] > 0
        if twice.any():
            labels[:, 1:][twice] = 0
            labels = -np.sort(-labels, axis=1)
    used = labels.any(axis=0)
    return labels if used.all() else labels[:, used]


class Atoms:
    """Union-find over atoms, with refinement into products and with causes of freezing."""

    def __init__(self) -> None:
        self._count = 1  # atom 0 stands for "no atom"
        self._parent = np.zeros(1024, np.int64)
        self._left = np.zeros(1024, np.int64)  # a refined atom is {left, right}
        self._right = np.zeros(1024, np.int64)
        self._cause = np.zeros(1024, np.int64)  # of a root; 0 = free

    def __len__(self) -> int:
        return self._count

    def fresh(self, length: int) -> Labels:
        """Labels (length, 1) of an axis that nothing is known about yet."""
        start, self._count = self._count, self._count + length
        if self._count > len(self._parent):
            grow = max(self._count, 2 * len(self._parent)) - len(self._parent)
            for name in ("_parent", "_left", "_right", "_cause"):
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(grow, np.int64)]))
        new = np.arange(start, self._count)
        self._parent[start : self._count] = new
        return new[:, None]

    def find(self, atoms: NDArray[np.int64]) -> NDArray[np.int64]:
        """Root of each atom; any shape."""
        roots = self._parent[atoms]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                return roots
            self._parent[atoms] = above
            roots = above

    def resolve(self, labels: Labels, *, frozen: bool = False) -> Labels:
        """Current form of labels: roots, refined atoms replaced, rows sorted; frozen atoms left out unless asked for."""
        if not labels.shape[1]:
            return labels
        while True:
            labels = self.find(labels)
            refined = self._left[labels] > 0
            if not refined.any():
                break
            split = refined.any(axis=0)
            right = np.where(refined[:, split], self._right[labels[:, split]], 0)
            labels = np.concatenate([np.where(refined, self._left[labels], labels), right], axis=1)
            if labels.shape[1] > 2 * _DEEPEST:
                labels = _compact(self.find(labels))
        if not frozen:
            labels = np.where(self._cause[labels] > 0, 0, labels)
        return _compact(labels)

    def causes(self, labels: Labels) -> NDArray[np.int64]:
        """(length, k) cause of each atom after `resolve(labels, frozen=True)`; 0 where it is free."""
        return self._cause[self.resolve(labels, frozen=True)]

    def a_cause(self, labels: Labels) -> int:
        """Any cause among the frozen atoms of these labels, 0 if there is none."""
        causes = self.causes(labels)
        return int(causes.max()) if causes.size else 0

    def freeze(self, labels: Labels, cause: int) -> None:
        """Makes every position of these labels stay."""
        atoms = self.resolve(labels).ravel()
        self._cause[atoms[atoms > 0]] = cause

    def unify(self, one: Labels, two: Labels) -> None:
        """Makes position p of both axes live and die together, for every p."""
        if one is two:
            return
        for _ in range(_ROUNDS):
            x, y = self._differences(one, two)
            if not x.shape[1] and not y.shape[1]:
                return
            nx, ny = np.count_nonzero(x, axis=1), np.count_nonzero(y, axis=1)
            if self._settle(one, two, x, y, nx, ny):
                continue
            if self._match_many(x, y):
                continue
            both = np.concatenate([x, y], axis=1)  # crossing products: one class a row, which is safe
            both = -np.sort(-both, axis=1)
            rest = np.where(both[:, 1:] > 0, both[:, 1:], both[:, :1])
            self._union(np.repeat(both[:, :1], rest.shape[1], axis=1).ravel(), rest.ravel())
        raise AssertionError("unification did not settle")  # pragma: no cover

    def split(self, labels: Labels, sizes: Sequence[int]) -> list[Labels]:
        """Factors (a b c …) of a product axis, outer first; refines atoms that are not yet products."""
        parts = []
        for size in sizes[:-1]:
            head, labels = self._split_two(labels, size, len(labels) // size)
            parts.append(head)
        return [*parts, labels]

    # ------------------------------------------------------------------ below: one step each

    def _union(self, one: NDArray[np.int64], two: NDArray[np.int64]) -> None:
        while True:
            one, two = self.find(one), self.find(two)
            apart = one != two
            if not apart.any():
                return
            low, high = np.minimum(one, two)[apart], np.maximum(one, two)[apart]
            caused = self._cause[high] > 0
            self._cause[low[caused]] = self._cause[high[caused]]
            self._parent[high] = low  # where one root is named twice the last wins; the loop does the others

    def _refine(self, atoms: NDArray[np.int64], rows: Labels) -> None:
        """atoms[i] := the set rows[i], two atoms at a time."""
        while rows.shape[1] > 2:
            last = rows[:, 1:]
            plain = np.count_nonzero(last, axis=1) <= 1
            joint = self.fresh(len(rows))[:, 0]
            joint[plain] = last[plain].max(axis=1)
            rest = ~plain
            self._left[atoms[rest]], self._right[atoms[rest]] = rows[rest, 0], joint[rest]
            self._left[atoms[plain]], self._right[atoms[plain]] = rows[plain, 0], joint[plain]
            atoms, rows = joint[rest], last[rest]
        if len(atoms):
            self._left[atoms] = rows[:, 0]
            self._right[atoms] = rows[:, 1] if rows.shape[1] > 1 else 0

    def _differences(self, one: Labels, two: Labels) -> tuple[Labels, Labels]:
        x, y = self.resolve(one), self.resolve(two)
        if x.shape == y.shape and np.array_equal(x, y):
            return x[:, :0], y[:, :0]
        if x.shape[1] and y.shape[1]:
            same = x[:, :, None] == y[:, None, :]
            if same.any():
                x, y = _compact(np.where(same.any(axis=2), 0, x)), _compact(np.where(same.any(axis=1), 0, y))
        return x, y

    def _settle(
        self, one: Labels, two: Labels, x: Labels, y: Labels, nx: NDArray[np.int64], ny: NDArray[np.int64]
    ) -> bool:
        """Rows where one side has no atom left or a single one. True if anything was done."""
        for side, other, lonely in ((x, two, (nx > 0) & (ny == 0)), (y, one, (ny > 0) & (nx == 0))):
            if lonely.any():
                self._freeze_like(side[lonely], other[lonely])
                return True
        pair = (nx == 1) & (ny == 1)
        if pair.any():
            self._union(x[pair].max(axis=1), y[pair].max(axis=1))
            return True
        for single, many, rows in ((x, y, (nx == 1) & (ny > 1)), (y, x, (ny == 1) & (nx > 1))):
            if rows.any():
                self._refine_once(single[rows].max(axis=1), many[rows])
                return True
        return False

    def _freeze_like(self, free: Labels, other: Labels) -> None:
        """The other side stays whatever happens, or already has all these atoms but one: so these stay."""
        cause = self.a_cause(other)
        raw = self.resolve(other, frozen=True)
        if cause and raw.shape[1] == 1 and free.shape[1] == 1:
            self._union(free[:, 0], raw[:, 0])  # keeps the way to the cause
        else:
            self.freeze(free, cause or 1)

    def _refine_once(self, atoms: NDArray[np.int64], rows: Labels) -> None:
        unique, first = np.unique(atoms, return_index=True)
        rows = rows[first]
        inside = np.isin(unique, rows)
        if inside.all():  # x = {y, …} and y = {x, …}: all of them are one
            self._union(np.repeat(unique[:, None], rows.shape[1], axis=1).ravel(),
                        np.where(rows > 0, rows, unique[:, None]).ravel())
        else:
            self._refine(unique[~inside], rows[~inside])

    def _match_many(self, x: Labels, y: Labels) -> bool:
        """Rows with several atoms on both sides: pairs atoms that occupy the same rows, or one set of rows within another."""
        both = [(x[:, i], y[:, j]) for i in range(x.shape[1]) for j in range(y.shape[1])]
        u = np.concatenate([a for a, _ in both])
        v = np.concatenate([b for _, b in both])
        real = (u > 0) & (v > 0)
        pairs, together = np.unique(np.stack([u[real], v[real]]), axis=1, return_counts=True)
        rows_of = {}
        for side in (x, y):
            atoms, counts = np.unique(side[side > 0], return_counts=True)
            rows_of[id(side)] = (atoms, counts)
        in_x = rows_of[id(x)][1][np.searchsorted(rows_of[id(x)][0], pairs[0])]
        in_y = rows_of[id(y)][1][np.searchsorted(rows_of[id(y)][0], pairs[1])]
        equal = (together == in_x) & (together == in_y)
        if equal.any():
            _, first = np.unique(pairs[0][equal], return_index=True)
            left, right = pairs[0][equal][first], pairs[1][equal][first]
            _, first = np.unique(right, return_index=True)
            self._union(left[first], right[first])
            return True
        done = False
        for inner, outer, size, bigger in ((pairs[0], pairs[1], in_x, in_y), (pairs[1], pairs[0], in_y, in_x)):
            within = together == size  # every row of the inner atom has the outer one too
            if within.any() and not done:
                order = np.lexsort((bigger[within], inner[within]))
                atoms, first = np.unique(inner[within][order], return_index=True)
                around = outer[within][order][first]
                free = ~np.isin(atoms, around)
                if free.any():
                    rest = self.fresh(int(free.sum()))[:, 0]
                    self._refine(atoms[free], np.stack([around[free], rest], axis=1))
                    done = True
        return done

    def _split_two(self, labels: Labels, n: int, m: int) -> tuple[Labels, Labels]:
        if n == 1 or m == 1:
            none = np.zeros((1, 0), np.int64)
            return (none, labels) if n == 1 else (labels, none)
        for _ in range(_ROUNDS):
            flat = self.resolve(labels)
            if flat.shape[1] > _DEEPEST:
                break
            grid = flat.reshape(n, m, -1)  # (n, m, k)
            outer, inner = self._common(grid), self._common(grid.transpose(1, 0, 2))
            known = (grid[..., None] == outer[:, None, None, :]).any(3) | (grid[..., None] == inner[None, :, None, :]).any(3)
            rest = np.where(known, 0, grid)
            if not rest.any():
                return _compact(outer), _compact(inner)
            self.unify(_compact(rest.reshape(n * m, -1)), merge([self.fresh(n), self.fresh(m)]))
        self.freeze(labels, 2)
        return np.zeros((n, 0), np.int64), np.zeros((m, 0), np.int64)

    @staticmethod
    def _common(grid: NDArray[np.int64]) -> Labels:
        """(n, k): the atoms of row i that every cell (i, j) has."""
        first = grid[:, 0, :]  # (n, k)
        everywhere = (grid[:, :, :, None] == first[:, None, None, :]).any(axis=2).all(axis=1)
        return np.where(everywhere, first, 0)
