"""Selecting the coordinates whose loss linear consumers can best make up for: exact errors of removal with repair.

Each layer y = W x of a group sees a coordinate c as a block B of its columns (a channel of a convolution: kh·kw of them; a head: its
width). With C the covariance of the layer's inputs, damped, removing the blocks P and repairing the rest (`spa.repairs.solve.obspa`) leaves

    E(P) = tr(W_P Σ W_Pᵀ),   Σ = C_PP − C_PS C_SS⁻¹ C_SP = [(C⁻¹)_PP]⁻¹

and the error of a group is the sum over its layers, each times its `scale`. This is E ‖y − y'‖² + λ ‖W − W'‖², without the ½ and the 2 of
H = 2XXᵀ. Optimal Brain Surgeon for structures: OBC (arXiv 2208.11580), ZipLM (2302.04089), SlimGPT (2412.18110), OSSCAR (2403.12983).

The errors depend on W through WᵀW only, so a layer with more rows than columns is replaced by the R of its QR decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spa.errors import BadOption
from spa.repairs.solve import Array, Mask, backward, damped, dead, factor, forward, invert

Block = Literal["block", "diagonal", "sweep"]
_FADED = 1e-8  # a diagonal of C⁻¹ that down-dates shrank by more has lost its digits
_EMPTY = 0.2  # part of the columns that went before they are cut out of the matrices
_GONE = -2
_BETTER = 1e-10  # relative fall of the error that counts as one


@dataclass(frozen=True)
class Layer:
    """One linear consumer of the coordinates, or one group of a grouped convolution."""

    weight: Array  # (m, d)
    covariance: Array  # (d, d)
    of: NDArray[np.int64]  # (d,) coordinate of each column, -1 = of no coordinate of this group, never removed
    scale: float = 1.0  # of this layer's error in the sum; 1 / output energy makes it relative


def _blocks(of: NDArray[np.int64], size: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Coordinates (n,) and their columns (n, b), for each block size b that occurs."""
    columns = np.argsort(of, kind="stable")
    columns = columns[np.searchsorted(of[columns], 0) :]
    counts = np.bincount(of[columns], minlength=size)
    starts = np.cumsum(counts) - counts
    found = []
    for width in np.unique(counts[counts > 0]):
        coordinates = np.flatnonzero(counts == width)
        found.append((coordinates, columns[starts[coordinates][:, None] + np.arange(width)]))
    return found


def _diagonal_blocks(matrix: Array, columns: NDArray[np.int64]) -> Array:
    """(n, b, b) blocks of a (d, d) matrix."""
    return np.asarray(matrix[columns[:, :, None], columns[:, None, :]])


def _gram(rows: Array, columns: NDArray[np.int64]) -> Array:
    """(n, b, b) blocks of RᵀR for R (k, d), without the rest of it."""
    if columns.shape[1] == 1:
        return np.asarray(np.einsum("kd,kd->d", rows, rows)[columns][:, :, None])
    picked = rows.T[columns]  # (n, b, k)
    return np.asarray(picked @ picked.transpose(0, 2, 1))


def _traces(inverse: Array, gram: Array) -> Array:
    """(n,) tr(W_B [(C⁻¹)_BB]⁻¹ W_Bᵀ) from the blocks of C⁻¹ and of WᵀW."""
    if inverse.shape[1] == 1:
        return np.asarray(gram[:, 0, 0] / inverse[:, 0, 0])
    return np.asarray(np.maximum(np.trace(np.linalg.solve(inverse, gram), axis1=1, axis2=2), 0.0))


def _active(layer: Layer) -> Array:
    """(m', d) weights with the same WᵀW, m' <= d, without those of dead columns, whose loss the intercept makes up for."""
    weight = np.where(dead(layer.covariance), 0.0, np.asarray(layer.weight, np.float64))
    return np.asarray(np.linalg.qr(weight, mode="r"), np.float64) if len(weight) > weight.shape[1] else weight


def errors(layers: Sequence[Layer], size: int, *, damping: float, block: Block = "block", repaired: bool = True) -> Array:
    """(size,) error of removing each coordinate alone.

    Parameters
    ----------
    layers
        The consumers. A coordinate without columns in any of them costs nothing.
    size
        Number of coordinates.
    damping
        λ as a part of the mean of the diagonal of C; see `spa.repairs.solve.damped`.
    block
        * "block": tr(W_B [(C⁻¹)_BB]⁻¹ W_Bᵀ), exact (ZipLM, OBC).
        * "diagonal": Σ_{j in B} ‖w_j‖² / (C⁻¹)_jj, each column as if it went alone.
        * "sweep": Σ_{j in B} ‖w_j‖² / U_jj² with C⁻¹ = UᵀU, U upper: the score of SparseGPT (arXiv 2301.00774) that the prototype of
          OBSPA takes. 1/U_jj² is the variance of column j given the *later* ones only, so the score depends on the order of the columns.
    repaired
        False: tr(W_B C_BB W_Bᵀ), or its diagonal: the error where only the intercept is repaired (FLAP, arXiv 2312.11983), not damped.

    Raises
    ------
    BadOption
        A block of another name, or a sweep without repair.
    """
    if block not in ("block", "diagonal", "sweep") or (block == "sweep" and not repaired):
        raise BadOption(f"There is no error {block!r} {'with' if repaired else 'without'} repair; the choice is: block, diagonal, sweep.")
    total = np.zeros(size)
    for layer in layers:
        weight = _active(layer)
        if repaired and block == "block":
            half = invert(factor(layer.covariance, damping)[0])  # C⁻¹ = halfᵀ half
            for coordinates, columns in _blocks(layer.of, size):
                total[coordinates] += layer.scale * _traces(_gram(half, columns), _gram(weight, columns))
        elif block == "block":
            for coordinates, columns in _blocks(layer.of, size):
                covariance = _diagonal_blocks(layer.covariance, columns)
                total[coordinates] += layer.scale * np.einsum("nbc,nbc->n", covariance, _gram(weight, columns))
        else:
            cost = np.einsum("md,md->d", weight, weight) * _variances(layer.covariance, damping, block, repaired=repaired)
            own = layer.of >= 0
            total += layer.scale * np.bincount(layer.of[own], weights=cost[own], minlength=size)
    return np.maximum(total, 0.0)


def _variances(covariance: Array, damping: float, block: Block, *, repaired: bool) -> Array:
    """(d,) what is left of each column's variance given no other column, the later ones (sweep) or all others (diagonal)."""
    if not repaired:
        return np.diagonal(covariance)
    if block == "sweep":  # Cholesky from the last column to the first
        return np.diagonal(factor(covariance[::-1, ::-1], damping)[0])[::-1] ** 2
    half = invert(factor(covariance, damping)[0])
    return np.asarray(1.0 / np.einsum("kd,kd->d", half, half))


class _Remaining:
    """A layer while coordinates leave it: C⁻¹ and the repaired W of the columns that remain."""

    def __init__(self, layer: Layer, size: int, damping: float) -> None:
        self.size, self.scale = size, layer.scale
        self.of = np.array(layer.of, np.int64)  # becomes _GONE where a column went
        self.weight = _active(layer)
        lower, used = factor(layer.covariance, damping)
        self.covariance = damped(layer.covariance, used)
        self._invert(lower)

    def _invert(self, lower: Array) -> None:
        half = invert(lower)
        self.inverse = half.T @ half
        self.fresh = np.diagonal(self.inverse).copy()
        self.blocks = _blocks(self.of, self.size)

    def _compact(self) -> None:
        """Forgets the columns that went."""
        stay = np.flatnonzero(self.of > _GONE)
        self.of, self.weight = self.of[stay], self.weight[:, stay]
        self.covariance = self.covariance[np.ix_(stay, stay)]
        self.inverse, self.fresh = self.inverse[np.ix_(stay, stay)], self.fresh[stay]
        self.blocks = _blocks(self.of, self.size)

    def costs(self) -> Array:
        """(size,) error that the removal of each remaining coordinate adds."""
        out = np.zeros(self.size)
        for coordinates, columns in self.blocks:
            here = self.of[columns[:, 0]] >= 0
            coordinates, columns = coordinates[here], columns[here]
            if len(coordinates):
                out[coordinates] = _traces(_diagonal_blocks(self.inverse, columns), _gram(self.weight, columns))
        return self.scale * out

    def remove(self, coordinates: NDArray[np.int64]) -> Array:
        """Removes coordinates in this order; the error that each adds when it goes.

        With (C⁻¹)_QQ = L Lᵀ, the rows of Y = L⁻¹ W_Qᵀ are what the columns add in turn, and C⁻¹ −= VᵀV, W −= Yᵀ V for V = L⁻¹ (C⁻¹)_Q.
        """
        turn = np.full(self.size, -1)
        turn[coordinates] = np.arange(len(coordinates))
        mine = np.flatnonzero(self.of >= 0)
        mine = mine[turn[self.of[mine]] >= 0]
        if not len(mine):
            return np.zeros(len(coordinates))
        mine = mine[np.argsort(turn[self.of[mine]], kind="stable")]
        owner = self.of[mine]
        lost = self._downdate(mine)
        if lost is None:
            lost = self._resolve(mine)
        added = np.bincount(turn[owner], weights=np.einsum("qm,qm->q", lost, lost), minlength=len(coordinates))
        if np.count_nonzero(self.of == _GONE) > _EMPTY * len(self.of):
            self._compact()
        return np.asarray(self.scale * added)

    def _downdate(self, going: NDArray[np.int64]) -> Array | None:
        """(q, m) Y; None, and nothing done, where C⁻¹ would lose its digits."""
        try:
            lower = np.asarray(np.linalg.cholesky(self.inverse[np.ix_(going, going)]), np.float64)
        except np.linalg.LinAlgError:
            return None
        down = forward(lower, self.inverse[going])  # V (q, d)
        left = np.diagonal(self.inverse) - np.einsum("qd,qd->d", down, down)
        left[going] = np.diagonal(lower) ** 2
        if (left < _FADED * self.fresh)[self.of > _GONE].any():
            return None
        lost = forward(lower, self.weight[:, going].T)  # Y
        self.weight -= lost.T @ down
        self.inverse -= down.T @ down
        self.of[going] = _GONE
        return lost

    def _resolve(self, going: NDArray[np.int64]) -> Array:
        """(q, m) rows of the same norms as Y, from C: its Cholesky factor in the order (stay, last to go, …, first to go)."""
        stay = np.setdiff1d(np.flatnonzero(self.of > _GONE), going)
        order, s = np.concatenate([stay, going[::-1]]), len(stay)
        lower = factor(self.covariance[np.ix_(order, order)], 0.0)[0]
        lost = self.weight[:, going[::-1]] @ lower[s:, s:]
        self.weight[:, stay] += self.weight[:, going[::-1]] @ backward(lower[:s, :s], lower[s:, :s].T).T
        self.of[going] = _GONE
        self._compact()
        self._invert(lower[:s, :s])
        return lost.T[::-1]


def greedy(layers: Sequence[Layer], size: int, *, damping: float, steps: int | None = None) -> Array:
    """(size,) scores from removing the cheapest coordinate, repairing, and going on until none is left.

    The score of a coordinate is the error of the whole layer set after it went, so ranking by the score gives the order of removal, and the
    score is the price of pruning so far. After each removal C⁻¹ −= C⁻¹_{:Q} [(C⁻¹)_QQ]⁻¹ C⁻¹_{Q:} and W −= W_Q [(C⁻¹)_QQ]⁻¹ C⁻¹_{Q:} in
    every layer (ZipLM, arXiv 2302.04089, algorithm 1). Where these down-dates cancel (columns that nearly repeat each other), the step is
    done from what remains of C instead.

    Parameters
    ----------
    layers, size
        As for `errors`.
    damping
        λ as a part of the mean of the diagonal of C, of all columns: it stays while they go.
    steps
        Removes ceil(size / steps) coordinates a step, the cheapest first; one a step where it is None.

    Returns
    -------
    Strictly rising in the order of removal; equal errors are set apart by their last bits.
    """
    states = [_Remaining(layer, size, damping) for layer in layers]
    batch = 1 if steps is None else -(-size // max(steps, 1))
    alive = np.arange(size)
    order, added = [np.zeros(0, np.int64)], [np.zeros(0)]
    while len(alive):
        costs = sum((state.costs()[alive] for state in states), np.zeros(len(alive)))
        first = np.argsort(costs, kind="stable")[:batch]
        going = alive[first]
        alive = np.delete(alive, first)
        order.append(going)
        added.append(sum((state.remove(going) for state in states), np.zeros(len(going))))
    total = np.cumsum(np.concatenate(added))
    if size:
        total += np.arange(size) * (4 * np.finfo(np.float64).eps * total[-1] or np.finfo(np.float64).tiny)
    scores = np.empty(size)
    scores[np.concatenate(order)] = total
    return scores


class _System:
    """A layer ready for sets of coordinates: weights of equal error, C and its damping."""

    def __init__(self, layer: Layer, damping: float) -> None:
        self.weight, self.covariance, self.damping = _active(layer), layer.covariance, damping
        self.of, self.scale = np.asarray(layer.of, np.int64), layer.scale

    def parts(self, gone: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """Columns that stay, columns that go, and the Cholesky factor of C in the order (stay, go); its last block is that of Σ."""
        going = (self.of >= 0) & np.append(gone, False)[self.of]
        stay, go = np.flatnonzero(~going), np.flatnonzero(going)
        order = np.concatenate([stay, go])
        return stay, go, factor(self.covariance[np.ix_(order, order)], self.damping)[0]

    def error(self, gone: Mask) -> float:
        stay, go, lower = self.parts(gone)
        return self.scale * float(((self.weight[:, go] @ lower[len(stay) :, len(stay) :]) ** 2).sum()) if len(go) else 0.0


def total_error(layers: Sequence[Layer], gone: Mask, *, damping: float) -> float:
    """Error of removing a set of coordinates together, with repair: Σ scale · ‖W_P L‖² where L Lᵀ = C_PP − C_PS C_SS⁻¹ C_SP.

    L is the last block of the Cholesky factor of C with the kept columns first, so nothing cancels.
    """
    return sum((_System(layer, damping).error(gone) for layer in layers), 0.0)


class _Exchange:
    """What one layer says about exchanging a removed coordinate p for a kept k, given the set that is gone now.

    Σ = Cov(x_P | x_S) = L_PP L_PPᵀ; G = W_P Σ; Ŵ_S = W_S + W_P B; B = C_PS C_SS⁻¹. Taking p back saves tr(G_p Σ_pp⁻¹ G_pᵀ). Removing k
    costs tr(Ŵ_k D Ŵ_kᵀ), D = [(C_SS⁻¹)_kk]⁻¹, and then Σ_pp becomes Σ_pp + B_pk D B_pkᵀ and G_p becomes G_p + Ŵ_k D B_pkᵀ.
    """

    def __init__(self, system: _System, gone: Mask) -> None:
        self.scale, size = system.scale, len(gone)
        stay, go, lower = system.parts(gone)
        s = len(stay)
        self.half = invert(lower[:s, :s])  # C_SS⁻¹ = halfᵀ half
        self.fold = lower[s:, :s] @ self.half  # B (p, s)
        self.left = lower[s:, s:] @ lower[s:, s:].T  # Σ (p, p)
        self.repaired = system.weight[:, stay] + system.weight[:, go] @ self.fold
        self.lost = system.weight[:, go] @ self.left  # G (m, p)
        self.kept_blocks, self.gone_blocks = _blocks(system.of[stay], size), _blocks(system.of[go], size)
        self.size = size

    def costs(self) -> Array:
        """(size,) error that removing each kept coordinate adds."""
        out = np.zeros(self.size)
        for coordinates, columns in self.kept_blocks:
            out[coordinates] = _traces(_gram(self.half, columns), _gram(self.repaired, columns))
        return self.scale * out

    def gains(self) -> Array:
        """(size,) error that taking back each removed coordinate saves."""
        out = np.zeros(self.size)
        for coordinates, columns in self.gone_blocks:
            out[coordinates] = _traces(_diagonal_blocks(self.left, columns), _gram(self.lost, columns))
        return self.scale * out

    def pairs(self, kept: NDArray[np.int64], back: NDArray[np.int64]) -> Array:
        """(kept, back) change of the error if kept[i] goes and back[j] returns."""
        leaving = {int(c): columns for cs, rows in self.kept_blocks for c, columns in zip(cs, rows, strict=True)}
        coming = {int(c): columns for cs, rows in self.gone_blocks for c, columns in zip(cs, rows, strict=True)}
        out = np.zeros((len(kept), len(back)))
        none = np.zeros(0, np.int64)
        for i, k in enumerate(kept):
            ks = leaving.get(int(k), none)
            spread = np.linalg.inv(self.half[:, ks].T @ self.half[:, ks])  # D
            pull = self.repaired[:, ks] @ spread  # (m, b)
            cost = float((pull * self.repaired[:, ks]).sum())
            for j, p in enumerate(back):
                ps = coming.get(int(p), none)
                fold = self.fold[np.ix_(ps, ks)]
                lost = self.lost[:, ps] + pull @ fold.T
                out[i, j] = cost - float((np.linalg.solve(self.left[np.ix_(ps, ps)] + fold @ spread @ fold.T, lost.T) * lost.T).sum())
        return self.scale * out


def swap(layers: Sequence[Layer], gone: Mask, *, damping: float, rounds: int = 10, candidates: int = 8, held: Mask | None = None) -> Mask:
    """(size,) a set of as many coordinates whose joint error is no larger: exchanges removed for kept ones, not for `held` ones, while that
    helps.

    Local search of OSSCAR (Meng et al. 2024, arXiv 2403.12983), with the exact change of the error for all pairs of the `candidates` kept
    coordinates that cost least and the `candidates` removed ones that would save most. A round makes all exchanges that help and do not
    share a coordinate, or the better half of them, and so on, if together they do not.
    """
    systems = [_System(layer, factor(layer.covariance, damping)[1]) for layer in layers]  # one damping for all sets
    best = sum(system.error(gone) for system in systems)
    gone = gone.copy()
    for _ in range(rounds):
        if not gone.any() or gone.all():
            break
        exchanges = [_Exchange(system, gone) for system in systems]
        cost = sum((x.costs() for x in exchanges), np.zeros(len(gone)))
        gain = sum((x.gains() for x in exchanges), np.zeros(len(gone)))
        kept, back = np.flatnonzero(~gone if held is None else ~gone & ~held), np.flatnonzero(gone)
        kept = kept[np.argsort(cost[kept], kind="stable")[:candidates]]
        back = back[np.argsort(-gain[back], kind="stable")[:candidates]]
        change = sum((x.pairs(kept, back) for x in exchanges), np.zeros((len(kept), len(back))))
        moves = _disjoint(change, -_BETTER * best)
        while moves:
            trial = gone.copy()
            trial[[kept[i] for i, _ in moves]] = True
            trial[[back[j] for _, j in moves]] = False
            error = sum(system.error(trial) for system in systems)
            if error < best * (1 - _BETTER):
                gone, best = trial, error
                break
            moves = moves[: len(moves) // 2]
        if not moves:
            break
    return gone


def _disjoint(change: Array, limit: float) -> list[tuple[int, int]]:
    """Pairs whose change is below the limit, best first, no row and no column twice."""
    moves: list[tuple[int, int]] = []
    rows, columns = set(), set()
    for flat in np.argsort(change, axis=None, kind="stable"):
        i, j = (int(n) for n in np.unravel_index(flat, change.shape))
        if change[i, j] >= limit:
            break
        if i not in rows and j not in columns:
            moves.append((i, j))
            rows.add(i)
            columns.add(j)
    return moves
