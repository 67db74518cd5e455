"""Lower bounds on ε hold as often as they say, and say something."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit, ndtr, ndtri
from scipy.stats import binom

from common.privacy.gaussian import gaussian_epsilon, gaussian_mu
from simulations.lower_bounds import (
    Bools,
    Confusion,
    Floats,
    Guesses,
    _too_good,
    clopper_pearson,
    confusion_of,
    expected_guesses,
    fdp_mu,
    gdp_mu,
    guesses_of,
    one_run_epsilon,
    one_run_p_value,
    planned_guesses,
)

DELTA, CONFIDENCE, REPETITIONS = 1e-5, 0.95, 400

MANY = 10_000
"""Canaries that show most of ε=1; a thousand show a fifth of it."""

MOST_WRONG = int(binom.ppf(1 - 1e-4, REPETITIONS, 1 - CONFIDENCE))
"""A bound that is wrong 5 % of the time is wrong more often than this once in 10,000 suites."""


def canaries(mu: float, m: int, rng: np.random.Generator) -> tuple[Floats, Bools]:
    """Scores of the Gaussian mechanism with μ, N(μ · coin, 1), and the coins."""
    included = rng.random(m) < 0.5
    return rng.normal(size=m) + mu * included, included


def by_one_run(mu: float, m: int) -> Callable[[Floats, Bools], float]:
    """ε that the one-run method shows, its guesses planned for a claim of ``mu``."""
    made = planned_guesses(lambda g: one_run_epsilon(g, DELTA, CONFIDENCE), mu, m)
    return lambda s, coins: one_run_epsilon(guesses_of(s, coins, made), DELTA, CONFIDENCE)


def by_fdp(mu: float, m: int) -> Callable[[Floats, Bools], float]:
    made = planned_guesses(lambda g: fdp_mu(g, CONFIDENCE), mu, m)
    return lambda s, coins: fdp_mu(guesses_of(s, coins, made), CONFIDENCE)


def by_gdp(mu: float, m: int) -> Callable[[Floats, Bools], float]:
    return lambda s, coins: gdp_mu(confusion_of(s, coins, mu / 2), CONFIDENCE)


# -- they hold, and are not vacuous ---------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize(
    ("method", "least"), [(by_one_run, 0.1), (by_fdp, 0.1), (by_gdp, 0.5)], ids=["1", "f", "g"]
)
def test_bounds_hold_as_often_as_they_say(
    method: Callable[[float, int], Callable[[Floats, Bools], float]], least: float, epsilon: float
) -> None:
    mu, m = gaussian_mu(epsilon, DELTA), MANY if method is by_gdp else 1000
    truth = epsilon if method is by_one_run else mu
    rng = np.random.default_rng(int(epsilon))
    bound = method(mu, m)
    found = np.array([bound(*canaries(mu, m, rng)) for _ in range(REPETITIONS)])
    assert (found > truth).sum() <= MOST_WRONG
    assert np.median(found) > least * truth


def test_the_one_run_bound_holds_where_it_is_tight() -> None:
    # Randomised response: each guess is right with probability e^ε/(1 + e^ε), the worst there is.
    rng, epsilon, m = np.random.default_rng(0), 1.0, 1000

    def shown(true_epsilon: float) -> float:
        correct = int(rng.binomial(m, expit(true_epsilon)))
        return one_run_epsilon(Guesses(m, m, correct), 0.0, CONFIDENCE)

    honest = np.array([shown(epsilon) for _ in range(REPETITIONS)])
    # Discrete, so a little below 5 %; a bound that is never wrong would be a weak one.
    assert 2 <= (honest > epsilon).sum() <= MOST_WRONG
    assert np.median(honest) > 0.8 * epsilon
    leaky = np.array([shown(2 * epsilon) for _ in range(REPETITIONS)])
    assert (leaky > epsilon).all()


def test_a_mechanism_twice_as_leaky_as_claimed_is_flagged() -> None:
    rng = np.random.default_rng(1)
    for epsilon, m in ((1.0, MANY), (8.0, 1000)):
        mu = gaussian_mu(epsilon, DELTA)
        bound = by_gdp(mu, m)
        # The expected bound is 0.46 where 0.27 is claimed, with sd 0.03 (ε=1), and 2.8 where 1.7
        # is; there three missed canaries are expected, and with ten it would still be 2.5.
        assert all(bound(*canaries(2 * mu, m, rng)) > mu for _ in range(200))


def test_f_dp_flags_a_mechanism_three_times_as_leaky() -> None:
    rng, m, mu = np.random.default_rng(2), 1000, gaussian_mu(1.0, DELTA)
    bound = by_fdp(mu, m)
    assert all(bound(*canaries(3 * mu, m, rng)) > mu for _ in range(100))


def test_a_bound_at_twice_the_noise_would_be_noticed() -> None:
    """Negative control: a bound that overstates μ by half is wrong too often."""
    mu, m, rng = gaussian_mu(8.0, DELTA), 1000, np.random.default_rng(3)
    bound = by_gdp(mu, m)
    wrong = sum(1.5 * bound(*canaries(mu, m, rng)) > mu for _ in range(REPETITIONS))
    assert wrong > MOST_WRONG


# -- formulas -------------------------------------------------------------------------------------


def test_all_right_gives_the_closed_form() -> None:
    # q^r = α, with q = e^ε/(1 + e^ε)
    expected = logit(0.05 ** (1 / 100))
    assert one_run_epsilon(Guesses(100, 100, 100), 0.0, 0.95) == pytest.approx(expected, abs=2e-4)


@given(
    st.integers(1, 40).flatmap(
        lambda r: st.tuples(st.integers(r, 60), st.just(r), st.integers(0, r))
    ),
    st.floats(0, 5),
    st.floats(0, 1e-2),
)
def test_the_p_value_is_the_papers_sum(
    guesses: tuple[int, int, int], epsilon: float, delta: float
) -> None:
    m, r, v = guesses
    chance = float(expit(epsilon))
    pmf = [binom.pmf(k, r, chance) for k in range(r + 1)]
    worst = max((sum(pmf[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    expected = min(1.0, sum(pmf[v:]) + 2 * m * delta * worst)
    assert one_run_p_value(Guesses(m, r, v), epsilon, delta) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 80), st.floats(0, 4), st.floats(0.001, 0.2), st.data())
def test_f_dp_never_rejects_what_independent_gaussians_do_more_often(
    m: int, mu: float, alpha: float, data: st.DataObject
) -> None:
    """The best attack on m independent Gaussians is right Binomial(m, Φ(μ/2)) times."""
    v = data.draw(st.integers(0, m))
    if _too_good(Guesses(m, m, v), mu, alpha):
        assert binom.sf(v - 1, m, ndtr(mu / 2)) <= alpha * (1 + 1e-9)


@given(st.integers(1, 60), st.floats(0.01, 0.2), st.data())
def test_f_dp_with_one_canary_is_the_trade_off_curve(
    m: int, alpha: float, data: st.DataObject
) -> None:
    """One guess among m canaries: right with p/m and wrong with at least Φ(Φ⁻¹(p/m) − μ)."""
    mu = data.draw(st.floats(0.0, 3.0))

    wrong = ndtr(ndtri(alpha / m) - mu)
    expected = alpha / m + max(0.0, wrong) > 1 / m
    assert _too_good(Guesses(m, 1, 1), mu, alpha) == expected


def test_gdp_is_the_difference_of_quantiles() -> None:

    confusion = Confusion(included=500, missed=0, excluded=500, accused=0)
    upper = 1 - 0.025 ** (1 / 500)  # nothing in 500 trials
    assert clopper_pearson(0, 500, 0.975) == pytest.approx(upper)
    assert gdp_mu(confusion, 0.95) == pytest.approx(-2 * ndtri(upper))
    assert gdp_mu(Confusion(10, 10, 10, 0), 0.95) == 0.0
    assert gdp_mu(Confusion(0, 0, 10, 0), 0.95) == 0.0
    assert gdp_mu(Confusion(100, 50, 100, 50), 0.95) == 0.0  # guessing shows nothing


@given(st.floats(0.05, 5), st.integers(1, 400).map(lambda half: 2 * half))
def test_expected_guesses_are_right_more_often_the_fewer_they_are(mu: float, m: int) -> None:
    everything, few = expected_guesses(mu, m, m), expected_guesses(mu, m, max(1, m // 10))
    assert everything.correct == math.floor(m * ndtr(mu / 2))
    assert few.correct + 1 >= few.made * ndtr(mu / 2) - 1e-6


def test_guesses_are_the_extremes() -> None:
    scores = np.array([0.1, 0.9, 0.5, -1.0, 2.0])
    included = np.array([False, True, True, True, True])
    assert guesses_of(scores, included, 2) == Guesses(5, 2, 1)  # -1.0 was there after all
    assert guesses_of(scores, included, 5) == Guesses(5, 5, 4)
    assert confusion_of(scores, included, 0.7) == Confusion(4, 2, 1, 0)


def test_impossible_guesses_are_refused() -> None:
    with pytest.raises(ValueError, match="correct ≤ made ≤ canaries"):
        Guesses(10, 5, 6)


def test_nothing_right_shows_nothing() -> None:
    assert one_run_epsilon(Guesses(10, 10, 0), DELTA, 0.95) == 0.0
    assert fdp_mu(Guesses(10, 10, 0), 0.95) == 0.0


def test_planning_looks_at_no_scores() -> None:
    """The rule is a function of public figures; more canaries allow a pickier attacker."""
    mu = gaussian_mu(8.0, DELTA)
    few, many = (
        planned_guesses(lambda g: one_run_epsilon(g, DELTA, 0.95), mu, m) / m for m in (100, 10_000)
    )
    assert many < few
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(8.0, rel=1e-6)
