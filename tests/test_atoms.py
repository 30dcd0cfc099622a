"""Atoms against what they mean: whatever is removed, every constraint that was stated holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spa.graph.atoms import Atoms, Labels, merge, stack

SIZES = (2, 3, 4, 6, 8, 12, 24)
Step = tuple[str, int, int, int]


@dataclass
class World:
    """Atoms, axes made by a script, and the constraints that the script stated."""

    atoms: Atoms = field(default_factory=Atoms)
    axes: list[Labels] = field(default_factory=list)
    equal: list[tuple[int, int]] = field(default_factory=list)
    products: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    sums: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)

    def add(self, labels: Labels) -> int:
        self.axes.append(labels)
        return len(self.axes) - 1

    def step(self, step: Step) -> None:
        kind, a, b, c = step
        one, two = a % len(self.axes), b % len(self.axes)
        length = len(self.axes[one])
        if kind == "fresh":
            self.add(self.atoms.fresh(SIZES[a % len(SIZES)]))
        elif kind == "split":
            sizes = [n for n in range(1, length + 1) if length % n == 0]
            outer = sizes[b % len(sizes)]
            rest = [n for n in range(1, length // outer + 1) if (length // outer) % n == 0]
            middle = rest[c % len(rest)]
            parts = self.atoms.split(self.axes[one], [outer, middle, length // outer // middle])
            self.products.append((one, tuple(self.add(p) for p in parts)))
        elif kind == "merge" and length * len(self.axes[two]) <= 48:
            self.products.append((self.add(merge([self.axes[one], self.axes[two]])), (one, two)))
        elif kind == "stack" and length + len(self.axes[two]) <= 48:
            self.sums.append((self.add(stack([self.axes[one], self.axes[two]])), (one, two)))
        elif kind == "cut" and length > 1:
            at = 1 + b % (length - 1)
            self.sums.append((one, (self.add(self.axes[one][:at]), self.add(self.axes[one][at:]))))
        elif kind == "unify" and length == len(self.axes[two]):
            self.atoms.unify(self.axes[one], self.axes[two])
            self.equal.append((one, two))
        elif kind == "freeze":
            self.atoms.freeze(self.axes[one], 3)
            self.frozen.append(one)

    def roots(self) -> NDArray[np.int64]:
        """Free atoms that occur anywhere."""
        found = [self.atoms.resolve(a).ravel() for a in self.axes]
        return np.setdiff1d(np.concatenate(found), [0])

    def gone(self, axis: int, removed: NDArray[np.int64]) -> NDArray[np.bool_]:
        rows = self.atoms.resolve(self.axes[axis])
        return np.isin(rows, removed).any(axis=1) if rows.shape[1] else np.zeros(len(rows), bool)

    def check(self, removed: NDArray[np.int64]) -> None:
        gone = [self.gone(i, removed) for i in range(len(self.axes))]
        for one, two in self.equal:
            assert np.array_equal(gone[one], gone[two])
        for whole, parts in self.products:
            expected = np.zeros(1, bool)
            for part in parts:
                expected = np.logical_or.outer(expected, gone[part]).ravel()
            assert np.array_equal(gone[whole], expected)
        for whole, parts in self.sums:
            assert np.array_equal(gone[whole], np.concatenate([gone[p] for p in parts]))
        for axis in self.frozen:
            assert not gone[axis].any()

    def occurrences(self, axes: int) -> set[frozenset[tuple[int, int]]]:
        """For each free atom the places where it occurs among the first axes: the partition, without names."""
        places: dict[int, set[tuple[int, int]]] = {}
        for i, axis in enumerate(self.axes[:axes]):
            for position, row in enumerate(self.atoms.resolve(axis)):
                for atom in row[row > 0]:
                    places.setdefault(int(atom), set()).add((i, position))
        return {frozenset(p) for p in places.values()}


def play(steps: list[Step]) -> World:
    world = World()
    for size in (4, 6, 12, 12, 24):
        world.add(world.atoms.fresh(size))
    for step in steps:
        world.step(step)
    return world


KINDS = ("fresh", "split", "split", "merge", "stack", "cut", "unify", "unify", "unify", "freeze")
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), *[st.integers(0, 30)] * 3), max_size=14)
BOUNDED = settings(max_examples=400, deadline=None, derandomize=True)


@BOUNDED
@given(STEPS, st.randoms(use_true_random=False))
def test_every_constraint_holds_whatever_is_removed(steps: list[Step], random: object) -> None:
    world = play(steps)
    roots = world.roots()
    for share in (0.1, 0.3, 0.6):
        picked = [r for r in roots if random.random() < share]  # type: ignore[attr-defined]
        world.check(np.array(picked, np.int64))
    for root in roots[:8]:
        world.check(np.array([root]))


@BOUNDED
@given(STEPS, st.integers(0, 30))
def test_freezing_is_monotone(steps: list[Step], axis: int) -> None:
    less, more = play(steps), play([*steps, ("freeze", axis, 0, 0)])
    for one, two in zip(less.axes, more.axes, strict=True):
        could = less.atoms.resolve(one).any(axis=1) if one.shape[1] else np.zeros(len(one), bool)
        can = more.atoms.resolve(two).any(axis=1) if two.shape[1] else np.zeros(len(two), bool)
        assert not (can & ~could).any()


@BOUNDED
@given(STEPS)
def test_frozen_atoms_know_their_cause(steps: list[Step]) -> None:
    world = play(steps)
    for labels in world.axes:
        held = world.atoms.resolve(labels, frozen=True)
        assert ((world.atoms.causes(labels) > 0) == (held > 0) & ~np.isin(held, world.roots())).all()


PAIRS = st.lists(st.tuples(st.sampled_from(("unify", "freeze")), st.integers(0, 7), st.integers(0, 7), st.just(0)), max_size=7)


@BOUNDED
@given(PAIRS, st.permutations(range(7)))
def test_plain_axes_do_not_mind_the_order(steps: list[Step], order: list[int]) -> None:
    """Sums and equalities of plain axes: the same constraints in another order give the same partition."""

    def start() -> World:
        world = World()
        a, b, c = (world.add(world.atoms.fresh(n)) for n in (4, 4, 4))
        world.add(stack([world.axes[a], world.axes[b]]))
        world.add(stack([world.axes[c], world.axes[a]]))
        for _ in range(3):
            world.add(world.atoms.fresh(8))
        return world

    one, two = start(), start()
    for step in steps:
        one.step(step)
    for i in order:
        if i < len(steps):
            two.step(steps[i])
    assert one.occurrences(8) == two.occurrences(8)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_products_do_not_mind_the_order(order: tuple[int, ...]) -> None:
    """Heads: x = (h d) at one node, x = y at another, y's inner factor is z at a third."""
    atoms = Atoms()
    x, y, z = atoms.fresh(12), atoms.fresh(12), atoms.fresh(3)
    for i in order:
        if i == 0:
            atoms.split(x, [4, 3])
        elif i == 1:
            atoms.unify(x, y)
        else:
            atoms.unify(atoms.split(y, [4, 3])[1], z)
    world = World(atoms, [x, y, z])
    heads = {frozenset((a, 3 * h + d) for a in (0, 1) for d in range(3)) for h in range(4)}
    dims = {frozenset({(2, d)} | {(a, 3 * h + d) for a in (0, 1) for h in range(4)}) for d in range(3)}
    assert world.occurrences(3) == heads | dims


def test_merge_and_stack_are_what_they_say() -> None:
    a, b = np.array([[1], [2]]), np.array([[3], [4], [5]])
    assert merge([a, b]).tolist() == [[1, 3], [1, 4], [1, 5], [2, 3], [2, 4], [2, 5]]
    assert stack([merge([a, a]), b]).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2], [3, 0], [4, 0], [5, 0]]
    nothing = np.zeros((2, 0), np.int64)
    assert merge([a, nothing]).tolist() == [[1], [1], [2], [2]]
    assert merge([nothing, a]).tolist() == [[1], [2], [1], [2]]


def test_split_finds_the_factors_it_was_merged_from() -> None:
    atoms = Atoms()
    a, b, c = atoms.fresh(2), atoms.fresh(3), atoms.fresh(4)
    found = atoms.split(merge([a, b, c]), [2, 3, 4])
    assert all(np.array_equal(f, p) for f, p in zip(found, (a, b, c), strict=True))


def test_split_again_in_finer_factors() -> None:
    """24 = (2 12) at one node and (6 4) at another: (2 3 4), and both see it."""
    atoms = Atoms()
    x = atoms.fresh(24)
    coarse, fine = atoms.split(x, [2, 12]), atoms.split(x, [6, 4])
    assert atoms.resolve(x).shape == (24, 3)
    assert [len(np.unique(atoms.resolve(f))) - (0 in atoms.resolve(f)) for f in (*coarse, *fine)] == [2, 7, 5, 4]


def test_a_swap_of_factors_couples_them() -> None:
    """A channel shuffle of a plain axis, (g c) = (c g), leaves one class of what it cannot tell apart, and stays right."""
    atoms = Atoms()
    x = atoms.fresh(6)
    g, c = atoms.split(x, [2, 3])
    atoms.unify(x, merge([c, g]))
    world = World(atoms, [x, g, c, merge([c, g])], [(0, 3)], [(0, (1, 2))])
    for root in world.roots():
        world.check(np.array([root]))


def test_unifying_with_what_stays_freezes_with_the_cause() -> None:
    atoms = Atoms()
    x, y = atoms.fresh(4), atoms.fresh(4)
    atoms.freeze(x, 7)
    atoms.unify(x, y)
    assert not atoms.resolve(y).any()
    assert atoms.a_cause(y) == 7
    z = atoms.fresh(4)
    atoms.unify(z, np.zeros((4, 0), np.int64))
    assert not atoms.resolve(z).any()
    assert atoms.a_cause(z) > 0


def test_a_hundred_thousand_positions_take_no_loop() -> None:
    atoms = Atoms()
    axes = [atoms.fresh(100_000) for _ in range(20)]
    for one, two in pairwise(axes):
        atoms.unify(one, two)
    atoms.split(axes[7], [100, 1000])
    assert len(np.unique(atoms.resolve(axes[19]))) == 1100
    assert math.prod(atoms.resolve(axes[0]).shape) == 200_000
