"""Which coordinates go: every error against the error that is measured, every search against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solve import correlated, moments

from spa.criteria.select import Layer, _Exchange, _System, errors, greedy, swap, total_error
from spa.errors import BadOption
from spa.repairs.solve import Moments, bias, damped, obspa, residual

seeds = st.integers(0, 10_000)


def layers(seed: int, *, size: int = 6, widths=(3, 1), rows=(5, 40), extra: int = 2, rank: int | None = None) -> list[Layer]:
    """Consumers with blocks of columns of these widths, rows below and above the number of columns, and columns of nobody."""
    rng = np.random.default_rng(seed)
    out = []
    for width, m in zip(widths, rows, strict=True):
        of = np.concatenate([np.arange(size).repeat(width), np.full(extra, -1)])
        rng.shuffle(of)
        x = correlated(rng, 400, len(of), rank)
        out.append(Layer(rng.normal(size=(m, len(of))), moments(x).covariance, of, float(rng.uniform(0.5, 2))))
    return out


def repaired(found: list[Layer], gone: np.ndarray, damping: float) -> float:
    """Joint error from the repaired weights themselves: of the damped covariance, as the searches see it."""
    total = 0.0
    for layer in found:
        removed = np.isin(layer.of, np.flatnonzero(gone))
        system = Moments(1.0, np.zeros(len(layer.of)), damped(layer.covariance, damping))
        offset = np.zeros(len(layer.weight))
        total += layer.scale * residual(layer.weight, offset, *obspa(layer.weight, offset, system, removed, 0.0), system)
    return total


def one(size: int, *coordinates: int) -> np.ndarray:
    return np.isin(np.arange(size), coordinates)


def cheapest(scores: np.ndarray, count: int) -> np.ndarray:
    return one(len(scores), *np.argsort(scores, kind="stable")[:count])


@settings(deadline=None, max_examples=20)
@given(seed=seeds, damping=st.sampled_from([0.0, 1e-2, 1.0]), width=st.sampled_from([1, 2, 9]))
def test_block_error_is_what_repair_leaves(seed: int, damping: float, width: int) -> None:
    found = layers(seed, widths=(width, 3))
    costs = errors(found, 6, damping=damping)
    for c in range(6):
        assert costs[c] == pytest.approx(repaired(found, one(6, c), damping), rel=1e-8)
        assert costs[c] == pytest.approx(total_error(found, one(6, c), damping=damping), rel=1e-8)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, damping=st.sampled_from([0.0, 1e-2]))
def test_total_error_is_what_repair_leaves(seed: int, damping: float) -> None:
    found = layers(seed)
    gone = np.random.default_rng(seed).random(6) < 0.5
    assert total_error(found, gone, damping=damping) == pytest.approx(repaired(found, gone, damping), rel=1e-8)


def test_errors_without_repair_are_those_of_the_intercept_alone() -> None:
    found = layers(1)
    costs = errors(found, 6, damping=0.3, repaired=False)
    for c in range(6):
        want = 0.0
        for x in found:
            known, offset = Moments(1.0, np.ones(len(x.of)), x.covariance), np.zeros(len(x.weight))
            want += x.scale * residual(x.weight, offset, *bias(x.weight, offset, known, x.of == c), known)
        assert costs[c] == pytest.approx(want)
    assert (costs > errors(found, 6, damping=0.0)).all()
    columns = errors(found, 6, damping=0.3, block="diagonal", repaired=False)
    want = sum(x.scale * ((x.weight[:, j] ** 2).sum() * x.covariance[j, j]) for x in found for j in np.flatnonzero(x.of == 4))
    assert columns[4] == pytest.approx(want)


def test_diagonal_error() -> None:
    found = layers(2)
    want = np.zeros(6)
    for x in found:
        inverse = np.linalg.inv(damped(x.covariance, 0.01))
        for j in np.flatnonzero(x.of >= 0):
            want[x.of[j]] += x.scale * (x.weight[:, j] ** 2).sum() / inverse[j, j]
    np.testing.assert_allclose(errors(found, 6, damping=0.01, block="diagonal"), want)
    scalar = layers(2, widths=(1, 1))
    np.testing.assert_allclose(errors(scalar, 6, damping=0.01, block="diagonal"), errors(scalar, 6, damping=0.01))


def test_sweep_is_the_cholesky_factor_of_the_inverse() -> None:
    found = layers(3)
    want = np.zeros(6)
    for x in found:
        upper = np.linalg.cholesky(np.linalg.inv(damped(x.covariance, 0.01))).T  # SparseGPT: cholesky(inverse, upper=True)
        for j in np.flatnonzero(x.of >= 0):
            want[x.of[j]] += x.scale * (x.weight[:, j] ** 2).sum() / upper[j, j] ** 2
    np.testing.assert_allclose(errors(found, 6, damping=0.01, block="sweep"), want)


@pytest.mark.parametrize("block", ["block", "diagonal", "sweep"])
def test_scaling(block) -> None:
    found, rng = layers(4), np.random.default_rng(0)
    base = errors(found, 6, damping=0.0, block=block)
    larger = [Layer(3 * x.weight, x.covariance, x.of, x.scale) for x in found]
    np.testing.assert_allclose(errors(larger, 6, damping=0.0, block=block), 9 * base)
    moved = []
    for x in found:
        s = rng.uniform(0.01, 100, len(x.of))
        moved.append(Layer(x.weight / s, x.covariance * np.outer(s, s), x.of, x.scale))
    np.testing.assert_allclose(errors(moved, 6, damping=0.0, block=block), base, rtol=1e-6)
    np.testing.assert_allclose(greedy(moved, 6, damping=0.0), greedy(found, 6, damping=0.0), rtol=1e-6)


@pytest.mark.parametrize("options", [{"block": "rows"}, {"block": "sweep", "repaired": False}])
def test_no_such_error(options) -> None:
    with pytest.raises(BadOption, match="There is no error"):
        errors(layers(0), 6, damping=0.01, **options)


def duplicated(width: int = 3) -> list[Layer]:
    """Coordinate 5 repeats coordinate 2, in one layer with blocks."""
    rng = np.random.default_rng(5)
    of = np.arange(6).repeat(width)
    x = correlated(rng, 500, len(of))
    x[:, of == 5] = x[:, of == 2]
    return [Layer(rng.normal(size=(4, len(of))), moments(x).covariance, of)]


@pytest.mark.parametrize("damping", [0.0, 1e-9])
def test_a_duplicate_costs_nothing_until_its_double_went(damping: float) -> None:
    found = duplicated()
    costs = errors(found, 6, damping=damping)
    assert costs[[2, 5]].max() < 1e-6 * costs[[0, 1, 3, 4]].min()
    scores = greedy(found, 6, damping=damping)
    assert scores.argmin() in (2, 5)
    order = np.argsort(scores)
    for k in range(1, 7):
        assert scores[order[k - 1]] == pytest.approx(total_error(found, one(6, *order[:k]), damping=damping), rel=1e-3, abs=1e-6)


def by_force(found: list[Layer], size: int, damping: float) -> tuple[list[int], list[float]]:
    order, prices = [], []
    while len(order) < size:
        prices_now = {c: total_error(found, one(size, *order, c), damping=damping) for c in range(size) if c not in order}
        order.append(min(prices_now, key=prices_now.__getitem__))
        prices.append(prices_now[order[-1]])
    return order, prices


@settings(deadline=None, max_examples=15)
@given(seed=seeds, damping=st.sampled_from([0.0, 1e-2]), width=st.sampled_from([1, 4]))
def test_greedy_is_the_order_of_brute_force(seed: int, damping: float, width: int) -> None:
    found = layers(seed, widths=(width, 1))
    order, prices = by_force(found, 6, damping)
    scores = greedy(found, 6, damping=damping)
    assert list(np.argsort(scores)) == order
    np.testing.assert_allclose(np.sort(scores), prices, rtol=1e-7)


@settings(deadline=None, max_examples=15)
@given(seed=seeds, steps=st.sampled_from([1, 2, 3, 5, 100]))
def test_greedy_in_steps_prices_what_went(seed: int, steps: int) -> None:
    found = layers(seed, size=10)
    scores = greedy(found, 10, damping=0.01, steps=steps)
    order = np.argsort(scores)
    assert list(order[: -(-10 // steps)]) == list(np.argsort(errors(found, 10, damping=0.01))[: -(-10 // steps)])
    for k in range(1, 11):
        assert scores[order[k - 1]] == pytest.approx(total_error(found, one(10, *order[:k]), damping=0.01), rel=1e-7)


def wide(seed: int, size: int = 40) -> list[Layer]:
    """Two layers whose inputs mix a few sources: many coordinates can stand in for each other."""
    return layers(seed, size=size, widths=(3, 1), rows=(8, 30), rank=size // 2)


def test_greedy_beats_one_shot_and_swap_beats_both() -> None:
    """Greedy is no optimum, so it may lose a draw by a little; it may not lose many."""
    ratios = []
    for seed, count in itertools.product(range(6), (10, 20, 30)):
        found = wide(seed)
        shot = cheapest(errors(found, 40, damping=0.01), count)
        stepwise = cheapest(greedy(found, 40, damping=0.01), count)
        price = [total_error(found, gone, damping=0.01) for gone in (shot, stepwise)]
        ratios.append(price[1] / price[0])
        for gone, before in zip((shot, stepwise), price, strict=True):
            better = swap(found, gone, damping=0.01)
            assert better.sum() == count
            after = total_error(found, better, damping=0.01)
            assert after <= before
        assert total_error(found, swap(found, shot, damping=0.01), damping=0.01) < price[0]
    assert max(ratios) < 1.02
    assert np.mean(np.array(ratios) <= 1) > 0.9
    assert np.mean(ratios) < 0.95


@settings(deadline=None, max_examples=25)
@given(seed=seeds, damping=st.sampled_from([0.0, 1e-2]), count=st.integers(0, 7), candidates=st.integers(1, 8))
def test_swap_is_never_worse(seed: int, damping: float, count: int, candidates: int) -> None:
    found = layers(seed, size=7)
    gone = one(7, *np.random.default_rng(seed).permutation(7)[:count])
    before = gone.copy()
    better = swap(found, gone, damping=damping, candidates=candidates)
    np.testing.assert_array_equal(gone, before)
    assert better.sum() == count
    assert total_error(found, better, damping=damping) <= total_error(found, gone, damping=damping)


@pytest.mark.parametrize("seed", range(5))
def test_swap_ends_where_no_exchange_helps(seed: int) -> None:
    found = layers(seed, size=8)
    gone = swap(found, one(8, 0, 1, 2), damping=0.01, rounds=50)
    error = total_error(found, gone, damping=0.01)
    for k, p in itertools.product(np.flatnonzero(~gone), np.flatnonzero(gone)):
        trial = gone.copy()
        trial[k], trial[p] = True, False
        assert total_error(found, trial, damping=0.01) >= error * (1 - 1e-9)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_an_exchange_is_priced_exactly(seed: int) -> None:
    for layer in layers(seed, size=7):
        gone = one(7, 1, 4, 6)
        error = total_error([layer], gone, damping=0.01)
        exchange = _Exchange(_System(layer, 0.01), gone)
        kept, back = np.flatnonzero(~gone), np.flatnonzero(gone)
        change = exchange.pairs(kept, back)
        for i, k in enumerate(kept):
            assert exchange.costs()[k] == pytest.approx(total_error([layer], gone | one(7, k), damping=0.01) - error, rel=1e-6)
            for j, p in enumerate(back):
                trial = (gone | one(7, k)) & ~one(7, p)
                assert change[i, j] == pytest.approx(total_error([layer], trial, damping=0.01) - error, rel=1e-6, abs=1e-9 * error)
        for p in back:
            assert exchange.gains()[p] == pytest.approx(error - total_error([layer], gone & ~one(7, p), damping=0.01), rel=1e-6)


def test_swap_without_rounds_changes_nothing() -> None:
    gone = one(6, 0, 1, 2)
    np.testing.assert_array_equal(swap(layers(0), gone, damping=0.01, rounds=0), gone)


def test_dead_columns_cost_nothing() -> None:
    """A channel that is constant, and one that nobody reads, go first and free of charge; the rest is priced as without them."""
    rng = np.random.default_rng(6)
    of = np.arange(6).repeat(3)
    x = correlated(rng, 300, 18)
    x[:, of == 1] = 7.0
    weight = rng.normal(size=(4, 18))
    weight[:, of == 4] = 0
    found = [Layer(weight, moments(x).covariance, of)]
    for block in ("block", "diagonal", "sweep"):
        costs = errors(found, 6, damping=0.0, block=block)
        assert list(np.flatnonzero(costs < 1e-20)) == [1, 4]
    live = of != 1
    rest = [Layer(weight[:, live], found[0].covariance[np.ix_(live, live)], of[live])]
    np.testing.assert_allclose(errors(found, 6, damping=0.0), errors(rest, 6, damping=0.0), rtol=1e-7, atol=1e-12)
    scores = greedy(found, 6, damping=0.0)
    assert set(np.argsort(scores)[:2]) == {1, 4}
    assert (np.diff(np.sort(scores)) > 0).all()
    assert total_error(found, one(6, 1, 4), damping=0.0) < 1e-18


def test_a_coordinate_that_no_layer_has_costs_nothing() -> None:
    found = [Layer(x.weight, x.covariance, np.where(x.of == 3, -1, x.of), x.scale) for x in layers(7)]
    assert errors(found, 6, damping=0.01)[3] == 0
    assert greedy(found, 6, damping=0.01).argmin() == 3
    gone = swap(found, one(6, 0, 1), damping=0.01)
    assert gone[3]
    assert gone.sum() == 2


def test_blocks_of_different_widths_in_one_layer() -> None:
    rng = np.random.default_rng(8)
    of = np.array([0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5])
    found = [Layer(rng.normal(size=(4, 12)), moments(correlated(rng, 300, 12)).covariance, of)]
    costs = errors(found, 6, damping=0.01)
    for c in range(6):
        assert costs[c] == pytest.approx(repaired(found, one(6, c), 0.01))
    order, _ = by_force(found, 6, 0.01)
    assert list(np.argsort(greedy(found, 6, damping=0.01))) == order


def test_no_layers_and_no_coordinates() -> None:
    assert not errors([], 3, damping=0.01).any()
    assert list(np.argsort(greedy([], 3, damping=0.01))) == [0, 1, 2]
    assert greedy([], 0, damping=0.01).shape == (0,)
    assert total_error([], np.ones(3, bool), damping=0.01) == 0
    np.testing.assert_array_equal(swap([], one(3, 1), damping=0.01), one(3, 1))


@pytest.mark.parametrize("n", [5, 12])
@pytest.mark.parametrize("steps", [None, 4])
def test_nearly_singular_covariance(n: int, steps: int | None) -> None:
    """Fewer rows than columns, no damping asked for: n − 1 columns carry everything, so the first to go are free and the price is right."""
    rng = np.random.default_rng(9)
    of = np.arange(16).repeat(2)
    x = correlated(rng, n, 32)
    weight = rng.normal(size=(6, 32))
    found = [Layer(weight, moments(x).covariance, of)]
    power = float(np.einsum("md,de,me->", weight, found[0].covariance, weight))
    scores = greedy(found, 16, damping=0.0, steps=steps)
    order = np.argsort(scores)
    assert np.isfinite(scores).all()
    assert (np.diff(scores[order]) > 0).all()
    free = (32 - (n - 1)) // 2
    assert scores[order[free - 1]] < 1e-6 * power
    assert scores[order[-1]] == pytest.approx(power, rel=1e-6)
    for k in range(1, 17):
        assert scores[order[k - 1]] == pytest.approx(total_error(found, one(16, *order[:k]), damping=0.0), rel=1e-3, abs=1e-6 * power)


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-6])
def test_nearly_equal_columns_keep_the_digits(damping: float) -> None:
    """Eight coordinates that differ by 1e-7: the down-date would lose all digits of what remains."""
    rng = np.random.default_rng(10)
    x = rng.normal(size=(400, 1)) + 1e-7 * rng.normal(size=(400, 8))
    x = np.hstack([x, rng.normal(size=(400, 4))])
    found = [Layer(rng.normal(size=(3, 12)), moments(x).covariance, np.arange(12))]
    for steps in (None, 3):
        scores = greedy(found, 12, damping=damping, steps=steps)
        order = np.argsort(scores)
        for k in range(1, 13):
            want = total_error(found, one(12, *order[:k]), damping=damping)
            assert scores[order[k - 1]] == pytest.approx(want, rel=1e-4, abs=1e-10)


def test_layers_are_not_written_to() -> None:
    found = layers(11)
    before = [(x.weight.copy(), x.covariance.copy(), x.of.copy()) for x in found]
    greedy(found, 6, damping=0.01)
    swap(found, one(6, 1, 2), damping=0.01)
    errors(found, 6, damping=0.01)
    for x, was in zip(found, before, strict=True):
        for now, then in zip((x.weight, x.covariance, x.of), was, strict=True):
            np.testing.assert_array_equal(now, then)
