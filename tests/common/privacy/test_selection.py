"""The best of a random number of runs: its price against exact distributions, and K itself."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.privacy.accounting import (
    crosscheck,
    epsilon,
    noise_multiplier,
    run_epsilon,
    selection_noise,
)
from common.privacy.events import Composition, Selection, SubsampledGaussian, gaussian
from common.privacy.noise import SeededRandomness
from common.privacy.renyi import ORDERS, divergences
from common.privacy.selection import draw_candidates, draw_runs, runs_distribution, selected

SHAPES = [0.0, 0.5, 1.0, 3.0]
MEANS = [1.0, 1.5, 5.0, 20.0]


def best_of(run: np.ndarray, expected_runs: float, shape: float) -> np.ndarray:
    """Exact probabilities of the winner: outcomes of one run, [n], in ascending order of merit.

    All K runs are below an outcome with probability F^K, and one is above with 1 − (1 − S)^K. The
    difference between neighbouring outcomes is taken of whichever has its digits there.
    """
    below = np.minimum(np.cumsum(run), 1.0)
    above = np.minimum(np.cumsum(run[::-1])[::-1], 1.0)
    low = below < 0.5
    winner = np.zeros_like(run)
    for runs, probability in enumerate(runs_distribution(expected_runs, shape), start=1):
        every = np.diff(below**runs, prepend=0.0)
        with np.errstate(divide="ignore"):
            some = -np.diff(-np.expm1(runs * np.log1p(-above)), append=0.0)
        winner += probability * np.where(low, every, some)
    return winner


def renyi(p: np.ndarray, q: np.ndarray, order: float) -> float:
    """D_α(P ‖ Q), exactly."""
    keep = p > 0
    terms = order * np.log(p[keep]) + (1 - order) * np.log(q[keep])
    top = np.max(terms)
    return float(top + np.log(np.sum(np.exp(terms - top)))) / (order - 1)


def gaussians(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """N(0, σ²) and N(1, σ²) on a fine grid, where outcomes rank by their value."""
    x = np.linspace(-9 * sigma, 1 + 9 * sigma, 4001)
    pair = [np.exp(-((x - mean) ** 2) / (2 * sigma**2)) for mean in (0.0, 1.0)]
    return pair[0] / pair[0].sum(), pair[1] / pair[1].sum()


def randomised_response(cost: float) -> tuple[np.ndarray, np.ndarray]:
    """The true bit with probability e^ε/(1 + e^ε); a one beats a zero."""
    lie = 1 / (1 + math.exp(cost))
    return np.array([1 - lie, lie]), np.array([lie, 1 - lie])


BASES = [
    pytest.param(gaussians(5.0), id="gaussian-5"),
    pytest.param(gaussians(1.0), id="gaussian-1"),
    pytest.param(randomised_response(0.3), id="response-0.3"),
    pytest.param(randomised_response(2.0), id="response-2"),
]

# Where the exact divergences keep their digits.
SOME = ORDERS[ORDERS <= 32]


def exact(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The worse of both directions at each of :data:`SOME`."""
    return np.array([max(renyi(p, q, order), renyi(q, p, order)) for order in SOME])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [2.0, 5.0, 20.0])
@pytest.mark.parametrize("base", BASES)
def test_the_bound_covers_the_exact_winner_and_the_price_of_one_run_does_not(
    base: tuple[np.ndarray, np.ndarray], mean: float, shape: float
) -> None:
    one = exact(*base)
    winner = exact(*(best_of(side, mean, shape) for side in base))
    bound = selected(SOME, one, mean, shape)
    assert np.all(winner <= bound * (1 + 1e-9))
    # Negative control: were the choice free, the winner would cost what a run costs.
    assert np.any(winner > one * 1.05)


def test_the_bound_is_not_far_from_the_exact_winner() -> None:
    base = gaussians(5.0)
    winner = exact(*(best_of(side, 20.0, 1.0) for side in base))
    bound = selected(SOME, exact(*base), 20.0, 1.0)
    assert np.min(bound / winner) < 5


def test_a_bound_without_its_constants_would_fail() -> None:
    """Negative control: less than (1 + η)·(…) is not enough for a strong random response."""
    base = randomised_response(2.0)
    winner = exact(*(best_of(side, 20.0, 1.0) for side in base))
    one = exact(*base)
    half = one + (selected(SOME, one, 20.0, 1.0) - one) / 4
    assert np.any(winner > half)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_run_costs_what_it_costs(shape: float) -> None:
    run = divergences(Composition.of(SubsampledGaussian(0.1, 2.0, 30)))
    assert selected(ORDERS, run, 1.0, shape) == pytest.approx(run)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("mean", [1.5, 10.0, 300.0])
@pytest.mark.parametrize("sigma", [1.0, 10.0, 40.0])
def test_googles_accountant_says_the_same(sigma: float, mean: float, shape: float) -> None:
    pytest.importorskip("dp_accounting")
    from dp_accounting import dp_event, rdp

    event = Selection((Composition.of(gaussian(sigma, 3)),), mean, shape)
    accountant = rdp.RdpAccountant(orders=[1.0, *ORDERS])
    run = dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(sigma), 3)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(run, mean, shape))
    ours = divergences(Composition.of(event))
    assert ours == pytest.approx(np.asarray(accountant._rdp)[1:], rel=1e-6)


def test_the_worst_candidate_counts() -> None:
    cheap, dear = (Composition.of(gaussian(sigma, 1)) for sigma in (30.0, 10.0))
    both = Composition.of(Selection((cheap, dear), 10.0))
    assert epsilon(both, 1e-5) == epsilon(Composition.of(Selection((dear,), 10.0)), 1e-5)
    assert epsilon(both, 1e-5) > epsilon(Composition.of(Selection((cheap,), 10.0)), 1e-5)


def test_a_search_costs_less_than_its_runs_and_more_than_one() -> None:
    run = Composition.of(SubsampledGaussian(0.05, 3.0, 200))
    search = Composition.of(Selection((run,), 20.0))
    one, all_ = epsilon(run, 1e-5), epsilon(run * 20, 1e-5)
    assert 1.5 * one < epsilon(search, 1e-5) < 3 * one < all_
    assert epsilon(search * 2, 1e-5) > epsilon(search, 1e-5)
    found = crosscheck(search, 1e-5)
    assert found.prv == found.gaussian == math.inf
    assert found.chosen == found.renyi


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", MEANS)
def test_the_number_of_runs_has_the_stated_mean(mean: float, shape: float) -> None:
    chances = np.fromiter(runs_distribution(mean, shape), dtype=float)
    assert math.fsum(chances) == pytest.approx(1.0, abs=1e-12)
    assert float(np.arange(1, len(chances) + 1) @ chances) == pytest.approx(mean, rel=1e-9)


def test_known_distributions_of_the_number_of_runs() -> None:
    geometric = list(itertools.islice(runs_distribution(4.0, 1.0), 5))
    assert geometric == pytest.approx([0.25 * 0.75**k for k in range(5)])
    # Logarithmic: p^k/(−k·log(1 − p)), of mean −p/((1 − p)·log(1 − p)).
    p = 0.9
    mean = -p / ((1 - p) * math.log(1 - p))
    logarithmic = list(itertools.islice(runs_distribution(mean, 0.0), 5))
    assert logarithmic == pytest.approx([p**k / (-k * math.log(1 - p)) for k in range(1, 6)])


def test_runs_are_drawn_from_that_distribution() -> None:
    event = Selection((Composition(),), 8.0)
    randomness = SeededRandomness("runs")
    draws = [draw_runs(event, randomness) for _ in range(4000)]
    # Geometric: standard deviation √(m² − m) = 7.5, of the mean 0.118; five of them.
    assert abs(np.mean(draws) - 8.0) < 0.6
    assert min(draws) == 1
    # P(K = 1) = 1/8, standard deviation of the share 0.0052.
    assert abs(np.mean(np.array(draws) == 1) - 0.125) < 0.026


def test_candidates_are_drawn_alike() -> None:
    drawn = draw_candidates(5, 10_000, SeededRandomness("candidates"))
    counts = np.bincount(drawn, minlength=5)
    # 2,000 each, standard deviation 40; five of them.
    assert len(counts) == 5
    assert np.all(np.abs(counts - 2000) < 200)


@given(st.floats(1.0, 1e6), st.floats(0.0, 10.0), st.floats(0.05, 1e5))
def test_edges_give_a_bound_and_never_a_warning(mean: float, shape: float, sigma: float) -> None:
    run = Composition.of(gaussian(sigma, 1))
    cost = epsilon(Composition.of(Selection((run,), mean, shape)), 1e-6)
    assert cost >= epsilon(run, 1e-6) * (1 - 1e-9)
    assert math.isfinite(cost)


# -- calibration -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("target", [0.5, 3.0])
def test_each_runs_noise_meets_the_target_of_the_search(rate: float, target: float) -> None:
    sigma = selection_noise(rate, 50, 15.0, target, 1e-5)
    run = Composition.of(SubsampledGaussian(rate, sigma, 50))
    assert 0.998 * target <= epsilon(Composition.of(Selection((run,), 15.0)), 1e-5) <= target
    assert sigma > 1.5 * noise_multiplier(rate, 50, target, 1e-5)


def test_what_a_run_may_cost_where_candidates_differ() -> None:
    def candidates(cost: float) -> list[Composition]:
        return [
            Composition.of(
                SubsampledGaussian(rate, noise_multiplier(rate, steps, cost, 1e-5), steps)
            )
            for rate, steps in [(1.0, 20), (0.2, 100)]
        ]

    share = run_epsilon(candidates, 15.0, 2.0, 1e-5)
    assert 0.6 < share < 1.3
    search = Composition.of(Selection(tuple(candidates(share)), 15.0))
    assert 0.995 * 2.0 <= epsilon(search, 1e-5) <= 2.0


def test_a_search_that_cannot_be_so_cheap_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="raise epsilon or delta, or take fewer"):
        selection_noise(1.0, 10**9, 20.0, 1e-4, 1e-12)
    with pytest.raises(
        ConfigurationError, match=r"expected_runs must be from 1 to 1e\+06, got 0.5"
    ):
        selection_noise(1.0, 10, 0.5, 1.0, 1e-5)
