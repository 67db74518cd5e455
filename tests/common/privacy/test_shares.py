"""Noise in shares is priced as a Gaussian: the steps of the proof, in numbers, and its result.

The proof's errors vanish for shares of 64, so its steps are tested with tiny shares, where the
errors can be seen, and its result with shares of 64, against the exact curve.
"""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import integrate

from common.privacy.events import FINEST_SHARE, DistributedGaussian, gaussian
from common.privacy.gaussian import gaussian_delta
from common.privacy.shares import ROUNDING_DEVIATION, as_gaussian

Array = npt.NDArray[np.float64]
FLOATS = 1e-13
"""Relative, of sums of a few hundred floats."""


def kappa(r: float) -> float:
    """κ(r) of the proof."""
    return 2 * math.fsum(math.exp(-2 * (math.pi * r * k) ** 2) for k in range(1, 20))


def discrete(sigma: float, reach: int) -> Array:
    """N_Z(0, σ²) at −reach, ..., reach."""
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return np.asarray(weights / math.fsum(weights))


def density(x: Array | float, variance: float) -> Array:
    return np.asarray(np.exp(-np.square(x) / (2 * variance)) / math.sqrt(2 * math.pi * variance))


@pytest.mark.parametrize("r", [0.4, 0.7, 1.0])
def test_a_sum_over_the_integers_is_the_integral_up_to_kappa(r: float) -> None:
    """Poisson's formula: the error is largest about an integer, and is κ there."""
    integers = np.arange(-60, 61)
    errors = [
        math.fsum(np.exp(-((integers - y) ** 2) / (2 * r**2))) / (r * math.sqrt(2 * math.pi)) - 1
        for y in np.linspace(-0.5, 0.5, 41)
    ]
    assert max(map(abs, errors)) <= kappa(r) * (1 + 1e-6) + FLOATS
    assert errors[20] == pytest.approx(kappa(r), rel=1e-6, abs=FLOATS)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.6, 0.8), (0.7, 0.5, 0.9)])
def test_a_sum_of_shares_is_a_discrete_gaussian_up_to_its_bound(shares: tuple[float, ...]) -> None:
    """Step 1 of the proof. For shares of a half it is not one, and the bound says by how much."""
    reach, bound, variance = 60, 1.0, shares[0] ** 2
    law = discrete(shares[0], reach)
    for share in shares[1:]:
        law = np.convolve(law, discrete(share, reach))[reach:-reach]
        bound *= (1 - kappa(math.sqrt(variance * share**2 / (variance + share**2)))) ** -2
        variance += share**2
    seen = slice(reach - 6, reach + 7)
    ratios = law[seen] / discrete(math.sqrt(variance), reach)[seen]
    assert 1 / bound <= ratios.min() * (1 + FLOATS)
    assert ratios.max() <= bound * (1 + FLOATS)
    assert np.abs(ratios - 1).max() > 1e-3, "or this test would show nothing"


@pytest.mark.parametrize(("r", "v"), [(0.4, 0.3), (0.5, 1.0), (0.7, 2.0)])
def test_rounding_a_gaussian_at_random_gives_a_discrete_gaussian_up_to_kappa(
    r: float, v: float
) -> None:
    """Step 2 of the proof: N(0, v), rounded by N_Z(y, r²)."""
    integers = np.arange(-40, 41)

    def weight(y: float, x: int) -> float:
        about = np.exp(-((integers - y) ** 2) / (2 * r**2))
        rounded = math.exp(-((x - y) ** 2) / (2 * r**2)) / math.fsum(about)
        return float(density(y, v)) * rounded

    for x in range(4):
        found, error = integrate.quad(weight, -12, 12, (x,), epsabs=1e-12, epsrel=1e-10, limit=400)
        ratio = found / float(density(float(x), v + r**2))
        slack = error / found + 1e-9
        assert 1 / (1 + kappa(r)) - slack <= ratio <= 1 / (1 - kappa(r)) + slack
        if x == 0:
            assert found / float(density(0.0, v)) < 0.95, "the variances add"


def test_at_64_the_errors_are_less_than_any_account_could_say() -> None:
    """η of the proof, for 10^18 releases of 10^18 numbers."""
    assert 2 * kappa(ROUNDING_DEVIATION) < 1e-76
    assert 1e18 * 1e18 * 2 * 1e-76 < 1e-39
    # κ(45) is no float any more; its logarithm is.
    assert FINEST_SHARE**2 / 2 >= 45**2
    assert -2 * (math.pi * 45) ** 2 / math.log(10) < -17_000


def exact_delta(epsilon: float, sigma: float, moved: tuple[int, ...]) -> float:
    """δ(ε) of noise N_Z(0, σ²) on a vector that a unit moves by ``moved``, from its definition."""
    reach = math.ceil(9 * sigma) + max(map(abs, moved))
    here = np.ones(1)
    there = np.ones(1)
    for v in moved:
        law = discrete(sigma, reach)
        here = np.outer(here, law[abs(v) :]).ravel()
        there = np.outer(there, law[: len(law) - abs(v)]).ravel()
    return float(np.sum(np.maximum(here - math.exp(epsilon) * there, 0.0)))


@pytest.mark.parametrize("moved", [(64,), (200,), (13,), (40, 50), (64, -64)])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 3.0])
def test_the_price_is_an_upper_bound_of_the_exact_curve_and_close(
    moved: tuple[int, ...], epsilon: float
) -> None:
    """One share of 64, the coarsest that is allowed; a unit moves one or two coordinates."""
    sigma = FINEST_SHARE / math.hypot(*moved)
    exact = exact_delta(epsilon, FINEST_SHARE, moved)
    priced = gaussian_delta(
        1 / as_gaussian(DistributedGaussian(sigma, 1)).noise_multiplier, epsilon
    )
    if exact > 1e-12:  # below, nine deviations of the table are too few
        assert exact <= priced
        assert gaussian_delta(1 / (sigma * 1.02), epsilon) < exact, "2 % more noise would be wrong"


def test_the_coarsest_share_is_not_a_continuous_gaussian() -> None:
    """Why a thousandth is taken off: the exact curve is somewhere above that of all the noise."""
    above = [
        exact_delta(epsilon, FINEST_SHARE, (v,)) - gaussian_delta(v / FINEST_SHARE, epsilon)
        for v, epsilon in itertools.product((13, 64, 200), np.linspace(0, 3, 31))
    ]
    assert max(above) > 1e-9


def test_a_gaussian_takes_the_place_of_as_many_releases() -> None:
    found = as_gaussian(DistributedGaussian(10.0, 7))
    assert found == gaussian(10.0 * math.sqrt(1 - (3 / 64) ** 2), 7)
    assert as_gaussian(DistributedGaussian(1e-300, 1)).noise_multiplier == 1e-300
