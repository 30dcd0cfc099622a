"""Allocation: how wide each group stays so that a budget is met. Losses and costs in, widths out.

Each group has a ladder of widths that the rounding allows, and a loss on each rung: what is lost if this group alone shrinks so far. Costs
come from a function of all widths at once (`spa.budgets.costs`, `spa.budgets.latency`) and are never taken apart, since a layer's cost is a
product of two groups' widths. Whatever way finds the widths, they end on the safe side of every limit, with no group that could be wider.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from spa.budgets.targets import EXACT, amount
from spa.errors import BadOption

Array = NDArray[np.float64]
Costs = Callable[[Array], Mapping[str, Array]]

WAYS = ("auto", "uniform", "global", "sensitivity", "solver")
ADAPTIVE = "adaptive"  # spends a drop of quality, not a cost: `spa.budgets.adaptive`
ROUNDS = 24  # of the solver: each takes the costs as they are at the widths of the one before
EXCHANGES, PAIRS = 64, 4000  # rounds of exchanging between two groups, and pairs that each looks at
GIVEN = 0.02  # of the loss, which coming within 2 % of a limit may cost
REACH = 0.5  # of a group's size: how far one round may lead at first


@dataclass(frozen=True)
class Problem:
    """What is to be decided.

    size: groups of the graph, of which `groups` (indices) may shrink. ladders: widths, ascending, the last being the group's own.
    losses: one a rung, 0 at the end, not rising. costs: of (candidates, size) widths, by kind. limits: in the kinds' units.
    """

    dense: Array
    groups: tuple[int, ...]
    ladders: tuple[NDArray[np.int64], ...]
    losses: tuple[Array, ...]
    costs: Costs = field(repr=False)
    limits: Mapping[str, float]

    def widths(self, rungs: NDArray[np.int64]) -> Array:
        """(candidates, size) widths of (candidates, groups) rungs."""
        found = np.repeat(self.dense[None], len(rungs), axis=0)
        for column, (group, ladder) in enumerate(zip(self.groups, self.ladders, strict=True)):
            found[:, group] = ladder[rungs[:, column]]
        return found

    def excess(self, rungs: NDArray[np.int64]) -> Array:
        """(candidates,) the largest of costs over limits: at most 1 where all are met."""
        found = self.costs(self.widths(rungs))
        return np.asarray(np.max([found[kind] / limit for kind, limit in self.limits.items()], axis=0))

    def loss(self, rungs: NDArray[np.int64]) -> float:
        """Sum of the groups' losses."""
        return float(sum(loss[r] for loss, r in zip(self.losses, rungs, strict=True)))

    @property
    def top(self) -> NDArray[np.int64]:
        """Rungs of the dense model."""
        return np.array([len(ladder) - 1 for ladder in self.ladders], np.int64)


@dataclass(frozen=True)
class Allocation:
    """Widths of all groups that may shrink, by index; costs by kind, and whether each is within 2 % of its limit."""

    widths: Mapping[int, int]
    costs: Mapping[str, float]
    dense: Mapping[str, float]
    limits: Mapping[str, float]
    way: str
    loss: float

    @property
    def binding(self) -> str:
        """The kind whose limit is nearest."""
        return max(self.limits, key=lambda k: self.costs[k] / self.limits[k])

    @property
    def reached(self) -> bool:
        """Whether a limit is reached within 2 %, or the dense model is within all of them."""
        return self.costs[self.binding] / self.limits[self.binding] >= 1 - EXACT


def check_possible(problem: Problem) -> None:
    """Raises BadOption, with what is possible, if even the smallest widths cost more than a limit."""
    rungs = np.stack([np.zeros_like(problem.top), problem.top])
    found = problem.costs(problem.widths(rungs))
    for kind, limit in problem.limits.items():
        least, most = found[kind]
        if least > limit:
            share = f" ({least / most:.3g} of the model as it is)"
            raise BadOption(f"--target {kind}: {amount(kind, limit)} is impossible: with every group that may shrink at its smallest width "
                            f"{amount(kind, least)} is left{share}. Ask for at least that, or let more shrink (--multiple-of 1, "
                            "--no-protect-outputs, fewer --exclude).")  # fmt: skip


def allocate(problem: Problem, way: str, start: Callable[[float], NDArray[np.int64]] | None = None) -> Allocation:
    """Widths that meet every limit. Raises BadOption if there are none.

    way: uniform: `start(share)` gives the rungs where each group loses that share. global, sensitivity: no group goes where a step down
    costs more loss a channel (global) or more loss in all (sensitivity) than everywhere else. solver: least loss in sum, by integer
    programming over all groups at once (as in ZipLM, arXiv 2302.04089, and HALP, arXiv 2110.10811), the costs linearised anew each round.
    """
    check_possible(problem)
    if problem.excess(problem.top[None])[0] <= 1:
        rungs = problem.top
    elif way == "uniform" and start is not None:
        rungs = _bisect(problem, start)
    elif way == "global":
        rungs = _by_threshold(problem, [_slopes(x, w) for x, w in zip(problem.losses, problem.ladders, strict=True)])
    elif way == "sensitivity":
        rungs = _by_threshold(problem, list(problem.losses))
    elif way == "solver":
        rungs = _solve(problem)
    else:
        raise BadOption(f"--allocation is {way!r}; the choice is: {', '.join(WAYS)}.")
    rungs = _nearer(problem, _fill(problem, rungs))
    costs = problem.costs(problem.widths(np.stack([rungs, problem.top])))
    kept = {g: int(ladder[r]) for g, ladder, r in zip(problem.groups, problem.ladders, rungs, strict=True)}
    first, second = ({kind: float(found[i]) for kind, found in costs.items()} for i in (0, 1))
    return Allocation(kept, first, second, dict(problem.limits), way, problem.loss(rungs))


def _slopes(losses: Array, ladder: NDArray[np.int64]) -> Array:
    """Loss per channel of the step that leads down to each rung, made to rise on the way down; 0 at the top."""
    steps = -np.diff(losses) / np.diff(ladder)
    return np.concatenate([np.maximum.accumulate(steps[::-1])[::-1], [0.0]])


def _by_threshold(problem: Problem, prices: Sequence[Array]) -> NDArray[np.int64]:
    """Each group on the lowest rung whose price is within one threshold, the smallest that meets the limits."""

    def at(threshold: float) -> NDArray[np.int64]:
        return np.array([int(np.flatnonzero(p <= threshold)[0]) for p in prices], np.int64)

    every = np.unique(np.concatenate([np.maximum.accumulate(p[::-1]) for p in prices]))
    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.excess(at(every[middle])[None])[0] <= 1 else (middle + 1, high)
    return at(every[high])


def _bisect(problem: Problem, start: Callable[[float], NDArray[np.int64]]) -> NDArray[np.int64]:
    """The rungs of the smallest share that meets the limits."""
    shares = np.linspace(0, 1, 1025)
    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.excess(start(float(shares[middle]))[None])[0] <= 1 else (middle + 1, high)
    rungs = start(float(shares[high]))
    return rungs if problem.excess(rungs[None])[0] <= 1 else np.zeros_like(rungs)


def _solve(problem: Problem) -> NDArray[np.int64]:
    """Least loss under the limits: from several starts, rounds of a multiple-choice knapsack, then exchanges between two groups."""
    slopes = [_slopes(x, w) for x, w in zip(problem.losses, problem.ladders, strict=True)]
    starts = [_by_threshold(problem, prices) for prices in (slopes, list(problem.losses))]
    found = [_exchanged(problem, _rounds(problem, _fill(problem, start))) for start in starts]
    return min(found, key=problem.loss)


def _rounds(problem: Problem, rungs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rounds of the knapsack, each within reach of the best widths so far."""
    best, least = rungs, problem.loss(rungs)
    reach = REACH
    for _ in range(ROUNDS):
        found = _knapsack(problem, best, reach)
        if found is None:
            break
        found = _fill(problem, _shrunk(problem, found))
        loss = problem.loss(found)
        if loss < least * (1 - 1e-6):
            best, least = found, loss
            continue
        reach /= 2
        if reach * max(len(ladder) for ladder in problem.ladders) < 1:
            break
    return best


def _exchanged(problem: Problem, rungs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Steps up of one group paid for by steps down of another, as long as that loses less."""
    for _ in range(EXCHANGES):
        moved, losses, excess = _exchanges(problem, rungs)
        fits = np.flatnonzero((excess <= 1) & (losses < problem.loss(rungs) * (1 - 1e-9)))
        if not len(fits):
            break
        rungs = _fill(problem, moved[fits[np.argmin(losses[fits])]])
    return rungs


def _nearer(problem: Problem, rungs: NDArray[np.int64]) -> NDArray[np.int64]:
    """An exchange that comes within 2 % of a limit, where none of the steps does and that costs little: what may be spent is spent."""
    if problem.excess(rungs[None])[0] >= 1 - EXACT or (rungs == problem.top).all():
        return rungs
    moved, losses, excess = _exchanges(problem, rungs)
    fits = np.flatnonzero((excess <= 1) & (excess >= 1 - EXACT) & (losses <= problem.loss(rungs) * (1 + GIVEN)))
    return _fill(problem, moved[fits[np.argmin(losses[fits])]]) if len(fits) else rungs


def _exchanges(problem: Problem, rungs: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array, Array]:
    """Rungs, losses and excess after each exchange of some steps up of one group for some steps down of another."""
    rng = np.random.default_rng(0)
    pairs = np.array([(i, j) for i in range(len(rungs)) for j in range(len(rungs)) if i != j], np.int64).reshape(-1, 2)
    if len(pairs) > PAIRS:
        pairs = pairs[rng.choice(len(pairs), PAIRS, replace=False)]
    parts = [np.column_stack([pairs, np.full(len(pairs), up), np.full(len(pairs), down)]) for up in (1, 2, 3) for down in (1, 2)]
    moves = np.concatenate(parts) if len(pairs) else np.zeros((0, 4), np.int64)
    i, j, up, down = moves.T
    moves = moves[(rungs[i] + up <= problem.top[i]) & (rungs[j] >= down)]
    i, j, up, down = moves.T
    rows = np.arange(len(moves))
    moved = np.repeat(rungs[None], len(moves), axis=0)
    moved[rows, i] += up
    moved[rows, j] -= down
    most = max(len(x) for x in problem.losses)
    table = np.stack([np.pad(x, (0, most - len(x))) for x in problem.losses])
    losses = problem.loss(rungs) + table[i, moved[rows, i]] - table[i, rungs[i]] + table[j, moved[rows, j]] - table[j, rungs[j]]
    return moved, losses, problem.excess(moved) if len(moves) else np.zeros(0)


def _knapsack(problem: Problem, rungs: NDArray[np.int64], reach: float) -> NDArray[np.int64] | None:
    """One rung a group, least loss, with the costs of moving one group from `rungs`; None if the solver finds nothing."""
    spans = []
    for rung, ladder in zip(rungs, problem.ladders, strict=True):
        near = np.flatnonzero(np.abs(ladder - ladder[rung]) <= max(reach * ladder[-1], 1))
        spans.append(np.union1d(near, [rung, max(rung - 1, 0), min(rung + 1, len(ladder) - 1)]))
    owner = np.repeat(np.arange(len(spans)), [len(s) for s in spans])
    choice = np.concatenate(spans)
    moved = np.repeat(rungs[None], len(choice), axis=0)
    moved[np.arange(len(choice)), owner] = choice
    here = problem.costs(problem.widths(rungs[None]))
    there = problem.costs(problem.widths(moved))
    rows = [(there[kind] - here[kind][0]) / limit for kind, limit in problem.limits.items()]
    room = [1 - here[kind][0] / limit for kind, limit in problem.limits.items()]
    once = sparse.csr_array((np.ones(len(choice)), (owner, np.arange(len(choice)))))
    loss = np.concatenate([x[s] for x, s in zip(problem.losses, spans, strict=True)])
    with _silenced():
        found = optimize.milp(
            loss / (loss.max() or 1.0), integrality=np.ones(len(choice), np.int64), bounds=optimize.Bounds(0, 1),
            constraints=[optimize.LinearConstraint(once, 1, 1), optimize.LinearConstraint(np.array(rows), -np.inf, room)],
            options={"mip_rel_gap": 1e-3, "time_limit": 10.0},
        )  # fmt: skip
    if found.x is None:
        return None
    taken = np.flatnonzero(found.x > 0.5)
    result = rungs.copy()
    result[owner[taken]] = choice[taken]
    return result


@contextmanager
def _silenced() -> Iterator[None]:
    """HiGHS leaves lines for its developers on the process's stdout, past Python's, where results go."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be written to it
        yield
        return
    void = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(void)


def _shrunk(problem: Problem, rungs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Steps down, each the one that loses least for what it saves, until the limits are met."""
    rungs = rungs.copy()
    while (excess := problem.excess(rungs[None])[0]) > 1:
        may = np.flatnonzero(rungs > 0)
        moved = np.repeat(rungs[None], len(may), axis=0)
        moved[np.arange(len(may)), may] -= 1
        saved = excess - problem.excess(moved)
        lost = np.array([problem.losses[g][rungs[g] - 1] - problem.losses[g][rungs[g]] for g in may])
        rungs[may[np.lexsort((lost / np.maximum(saved, 1e-12), saved <= 0))[0]]] -= 1
    return rungs


def _fill(problem: Problem, rungs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Steps up, each the one that wins most back for what it costs, as long as the limits allow one."""
    rungs = rungs.copy()
    while len(may := np.flatnonzero(rungs < problem.top)):
        moved = np.repeat(rungs[None], len(may), axis=0)
        moved[np.arange(len(may)), may] += 1
        excess = problem.excess(moved)
        fits = np.flatnonzero(excess <= 1)
        if not len(fits):
            break
        before = problem.excess(rungs[None])[0]
        won = np.array([problem.losses[g][rungs[g]] - problem.losses[g][rungs[g] + 1] for g in may[fits]])
        rungs[may[fits[np.argmax(won / np.maximum(excess[fits] - before, 1e-12))]]] += 1
    return rungs
