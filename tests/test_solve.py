"""The repairs of a linear layer, against least squares on the data itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa.errors import BadOption
from spa.repairs.solve import Moments, affine, backward, bias, damped, dead, drop, factor, forward, invert, obspa, refit, residual


def moments(x: np.ndarray) -> Moments:
    """Moments of the rows of x (n, d)."""
    mean = x.mean(axis=0)
    return Moments(float(len(x)), mean, (x - mean).T @ (x - mean) / len(x))


def correlated(rng: np.random.Generator, n: int, d: int, rank: int | None = None) -> np.ndarray:
    """(n, d) rows with a mean, that mix `rank` sources plus a little of their own."""
    rank = rank or max(d // 2, 1)
    return rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d)) + 0.3 * rng.normal(size=(n, d)) + rng.normal(size=d)


def problem(seed: int, *, d: int = 18, m: int = 5, n: int = 200, part: float = 0.4):
    """Inputs, weights, intercept, moments and a mask that removes some columns and keeps some."""
    rng = np.random.default_rng(seed)
    x = correlated(rng, n, d)
    removed = np.arange(d) < max(1, int(part * d))
    rng.shuffle(removed)
    return x, rng.normal(size=(m, d)), rng.normal(size=m), moments(x), removed


def measured(x, weight, offset, new, shift) -> float:
    """Mean over the rows of the squared error, from the rows."""
    return float((((x @ weight.T + offset) - (x @ new.T + shift)) ** 2).sum(axis=1).mean())


seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("d", [0, 1, 5, 64, 65, 200])
def test_triangular_solvers(d: int) -> None:
    rng = np.random.default_rng(d)
    lower = np.tril(rng.normal(size=(d, d)), -1) / 8 + np.eye(d)
    right = rng.normal(size=(d, 3))
    assert np.allclose(lower @ forward(lower, right), right)
    assert np.allclose(lower.T @ backward(lower, right), right)
    assert np.allclose(invert(lower) @ lower, np.eye(d))


@settings(deadline=None, max_examples=30)
@given(seed=seeds, damping=st.sampled_from([0.0, 1e-2, 1.0]))
def test_obspa_is_ridge_least_squares_on_the_rows(seed: int, damping: float) -> None:
    """Minimise ‖Y − X_S W'ᵀ − b'‖² / n + λ ‖W' − W_S‖²: the rows and, below them, √λ (W' − W_S)."""
    x, weight, offset, known, removed = problem(seed)
    new, shift = obspa(weight, offset, known, removed, damping)
    kept = x[:, ~removed]
    strength = damping * np.diagonal(known.covariance)[~removed].mean()
    n, s = kept.shape
    system = np.block([[kept / np.sqrt(n), np.ones((n, 1)) / np.sqrt(n)], [np.sqrt(strength) * np.eye(s), np.zeros((s, 1))]])
    target = np.concatenate([(x @ weight.T + offset) / np.sqrt(n), np.sqrt(strength) * weight[:, ~removed].T])
    best = np.linalg.lstsq(system, target, rcond=None)[0]
    np.testing.assert_allclose(new[:, ~removed], best[:-1].T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(shift, best[-1], rtol=1e-8, atol=1e-9)
    assert not new[:, removed].any()


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_obspa_is_removing_columns_one_after_the_other(seed: int) -> None:
    """Optimal Brain Surgeon's step for one column, with the down-date of the inverse, column by column, in any order."""
    _, weight, offset, known, removed = problem(seed)
    system = damped(known.covariance, 1e-2)
    new, _ = obspa(weight, offset, Moments(known.count, known.mean, system), removed, 0.0)
    inverse, swept = np.linalg.inv(system), weight.copy()
    for j in np.random.default_rng(seed).permutation(np.flatnonzero(removed)):
        swept -= np.outer(swept[:, j], inverse[j]) / inverse[j, j]
        inverse -= np.outer(inverse[j], inverse[j]) / inverse[j, j]
        inverse[j] = inverse[:, j] = 0
    np.testing.assert_allclose(swept, new, rtol=1e-8, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, block=st.sampled_from([1, 3, 9]))
def test_more_freedom_leaves_less_error(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    d = 6 * block
    x = correlated(rng, 500, d)
    known, of = moments(x), np.arange(d) // block
    weight, offset = rng.normal(size=(7, d)), rng.normal(size=7)
    removed = np.isin(of, rng.choice(6, 2, replace=False))
    results = [
        (drop(weight, removed), offset),
        bias(weight, offset, known, removed),
        affine(weight, offset, known, removed, of, 0.0),
        obspa(weight, offset, known, removed, 0.0),
    ]
    left = [residual(weight, offset, *r, known) for r in results]
    for (new, shift), error in zip(results, left, strict=True):
        assert error == pytest.approx(measured(x, weight, offset, new, shift), rel=1e-9)
    assert left[0] > left[1] > left[2] >= left[3] * (1 - 1e-9)


def test_affine_is_least_squares_on_the_scales() -> None:
    x, weight, offset, known, removed = problem(3, d=12, m=4)
    of = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1])
    removed = of == 1
    new, shift = affine(weight, offset, known, removed, of, 0.0)
    centred = x - known.mean
    parts = [(centred[:, of == c] @ weight[:, of == c].T).ravel() for c in (0, 1, 2)]
    scales = np.linalg.lstsq(np.stack([parts[0], parts[2]], axis=1), sum(parts), rcond=None)[0]
    np.testing.assert_allclose(new[:, :3], scales[0] * weight[:, :3])
    np.testing.assert_allclose(new[:, 6:9], scales[1] * weight[:, 6:9])
    np.testing.assert_array_equal(new[:, 9:], weight[:, 9:])
    assert not new[:, 3:6].any()
    np.testing.assert_allclose(new @ known.mean + shift, weight @ known.mean + offset)


def test_affine_with_much_damping_is_bias() -> None:
    _, weight, offset, known, removed = problem(4)
    of = np.arange(18) // 3
    for got, want in zip(affine(weight, offset, known, removed, of, 1e12), bias(weight, offset, known, removed), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-8)


def test_obspa_with_much_damping_is_bias() -> None:
    _, weight, offset, known, removed = problem(5)
    for got, want in zip(obspa(weight, offset, known, removed, 1e12), bias(weight, offset, known, removed), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, damping=st.sampled_from([0.0, 1e-2]))
def test_refit_from_dense_inputs_is_obspa(seed: int, damping: float) -> None:
    x, weight, offset, known, removed = problem(seed)
    y = x @ weight.T + offset
    kept = moments(x[:, ~removed])
    cross = (y - y.mean(axis=0)).T @ (x[:, ~removed] - kept.mean) / len(x)
    got = refit(weight, offset, kept, cross, y.mean(axis=0), removed, damping)
    for one, two in zip(got, obspa(weight, offset, known, removed, damping), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-7, atol=1e-9)


def test_refit_makes_up_for_what_upstream_lost() -> None:
    x, weight, offset, _, removed = problem(7, n=400)
    rng = np.random.default_rng(8)
    y = x @ weight.T + offset
    pruned = np.tanh(x) + 0.1 * rng.normal(size=x.shape)  # what arrives after pruning before this layer
    kept = moments(pruned[:, ~removed])
    cross = (y - y.mean(axis=0)).T @ (pruned[:, ~removed] - kept.mean) / len(x)
    new, shift = refit(weight, offset, kept, cross, y.mean(axis=0), removed, 0.0)
    best = np.linalg.lstsq(np.hstack([pruned[:, ~removed], np.ones((len(x), 1))]), y, rcond=None)[0]
    np.testing.assert_allclose(new[:, ~removed], best[:-1].T, atol=1e-9)
    np.testing.assert_allclose(shift, best[-1], atol=1e-9)
    symmetric, other = obspa(weight, offset, moments(pruned), removed, 0.0)
    assert ((pruned @ new.T + shift - y) ** 2).sum() < ((pruned @ symmetric.T + other - y) ** 2).sum()


def test_refit_where_nothing_goes_here() -> None:
    x, weight, offset, _, removed = problem(9)
    none, y = np.zeros_like(removed), x @ weight.T + offset
    seen = moments(1.5 * x)
    cross = (y - y.mean(axis=0)).T @ (1.5 * x - seen.mean) / len(x)
    assert refit(weight, offset, seen, cross, y.mean(axis=0), none, 0.0)[0] is weight
    new, shift = refit(weight, offset, seen, cross, y.mean(axis=0), none, 0.0, always=True)
    np.testing.assert_allclose(new, weight / 1.5, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shift, offset, atol=1e-8)


def test_nothing_removed_gives_the_very_arrays() -> None:
    _, weight, offset, known, removed = problem(1)
    none = np.zeros_like(removed)
    assert drop(weight, none) is weight
    for new, shift in (
        bias(weight, offset, known, none),
        affine(weight, offset, known, none, np.arange(18), 0.01),
        obspa(weight, offset, known, none, 0.01),
    ):
        assert new is weight
        assert shift is offset


def test_everything_removed_leaves_the_mean() -> None:
    _, weight, offset, known, removed = problem(2)
    whole = np.ones_like(removed)
    empty = Moments(known.count, np.zeros(0), np.zeros((0, 0)))
    mean = weight @ known.mean + offset
    for new, shift in (
        bias(weight, offset, known, whole),
        affine(weight, offset, known, whole, np.arange(18), 0.01),
        obspa(weight, offset, known, whole, 0.01),
        refit(weight, offset, empty, np.zeros((5, 0)), mean, whole, 0.01),
    ):
        assert new.shape == weight.shape
        assert not new.any()
        np.testing.assert_allclose(shift, mean)


def test_inputs_are_not_written_to() -> None:
    _, weight, offset, known, removed = problem(2)
    before = [a.copy() for a in (weight, offset, known.mean, known.covariance)]
    affine(weight, offset, known, removed, np.arange(18) // 2, 0.01)
    obspa(weight, offset, known, removed, 0.01)
    damped(known.covariance, 1.0)
    for was, now in zip(before, (weight, offset, known.mean, known.covariance), strict=True):
        np.testing.assert_array_equal(was, now)


def test_a_duplicate_takes_over() -> None:
    x, weight, offset, _, _ = problem(11)
    x[:, 7] = x[:, 2]
    known, removed = moments(x), np.arange(18) == 7
    new, shift = obspa(weight, offset, known, removed, 0.0)
    np.testing.assert_allclose(new[:, 2], weight[:, 2] + weight[:, 7], rtol=1e-6)
    assert residual(weight, offset, new, shift, known) < 1e-12


@pytest.mark.parametrize("function", ["obspa", "affine"])
def test_dead_columns(function: str) -> None:
    """A constant column gives nothing and gets nothing; removed, its part goes to the intercept."""
    x, weight, offset, _, removed = problem(12)
    x[:, :3] = [0.1, 1e3 / 3, -2.2]  # the mean is not exact, so the covariances are not quite 0
    removed[:3] = [False, True, False]
    known = moments(x)
    assert list(np.flatnonzero(dead(known.covariance))) == [0, 1, 2]
    new, shift = (
        obspa(weight, offset, known, removed, 0.0) if function == "obspa" else affine(weight, offset, known, removed, np.arange(18), 0.0)
    )
    np.testing.assert_array_equal(new[:, [0, 2]], weight[:, [0, 2]])
    np.testing.assert_allclose(x.mean(axis=0) @ new.T + shift, x.mean(axis=0) @ weight.T + offset)
    alive = np.arange(3, 18)
    part = Moments(known.count, known.mean[alive], known.covariance[np.ix_(alive, alive)])
    if function == "obspa":
        np.testing.assert_allclose(new[:, 3:], obspa(weight[:, 3:], offset, part, removed[3:], 0.0)[0], rtol=1e-7, atol=1e-9)


def test_all_columns_dead() -> None:
    known = Moments(4.0, np.arange(3.0), np.zeros((3, 3)))
    new, shift = obspa(np.ones((2, 3)), np.zeros(2), known, np.array([False, False, True]), 0.01)
    np.testing.assert_array_equal(new, [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(shift, [2, 2])


@pytest.mark.parametrize("n", [3, 10])
def test_fewer_rows_than_columns(n: int) -> None:
    x, weight, offset, known, removed = problem(13, n=n)
    new, shift = obspa(weight, offset, known, removed, 0.0)
    assert np.abs(new).max() < 1e3
    assert residual(weight, offset, new, shift, known) < 1e-9 * (x @ weight.T).var() + 1e-12


def test_damping_rises_until_it_factors() -> None:
    covariance = np.ones((30, 30))
    lower, used = factor(covariance, 0.0)
    assert 0 < used < 1e-8
    np.testing.assert_allclose(lower @ lower.T, damped(covariance, used))
    indefinite = np.array([[1.0, 2.0], [2.0, 1.0]])
    assert 1.0 < factor(indefinite, 1e-3)[1] <= 10.0
    assert factor(np.eye(3), 1e-3)[1] == 1e-3


def test_damping_is_in_units_of_the_diagonal() -> None:
    covariance = np.diag([1.0, 3.0, 0.0])
    np.testing.assert_allclose(damped(covariance, 0.3), np.diag([1.4, 3.4, 4 / 3]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_must_be_finite(bad: float) -> None:
    with pytest.raises(BadOption, match="NaN or infinities"):
        factor(np.array([[1.0, bad], [bad, 1.0]]), 0.01)


def test_statistics_must_be_covariances() -> None:
    with pytest.raises(BadOption, match="no covariances"):
        factor(np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, -3.0]]), 0.01)


def test_rounding_in_a_dead_column_moves_nothing() -> None:
    _, weight, offset, known, removed = problem(14)
    covariance = known.covariance.copy()
    covariance[0] = covariance[:, 0] = 1e-9  # of a large constant, by accumulated products
    covariance[0, 0] = -1e-12
    removed[:2] = [False, True]
    new, _ = obspa(weight, offset, Moments(known.count, known.mean, covariance), removed, 0.01)
    np.testing.assert_array_equal(new[:, 0], weight[:, 0])
    new, _ = affine(weight, offset, Moments(known.count, known.mean, covariance), removed, np.arange(18), 0.01)
    np.testing.assert_allclose(new[:, 0], weight[:, 0], rtol=1e-9)
