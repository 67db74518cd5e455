"""Privacy loss variables against draws and sums, and their composition against exact curves."""

import math

import numpy as np
import pytest

from common.privacy.gaussian import gaussian_epsilon
from common.privacy.losses import DiscreteGaussianLoss, Loss, SampledGaussianLoss
from common.privacy.prv import LARGEST_ERROR, MOST_POINTS, composed_epsilon, mesh_for
from common.privacy.renyi import ORDERS

CASES = [(0.01, 0.7), (0.3, 1.0), (0.9, 3.0), (1.0, 0.2), (1.0, 2.0), (1e-6, 1e4)]


def outcomes(rate: float, sigma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x with the probabilities of the unit's absence (Q) and presence (P): each [n], on a grid."""
    x = np.linspace(-10 * sigma, 1 + 10 * sigma, 400_001)
    absent = np.exp(-(x**2) / (2 * sigma**2))
    present = np.exp(-((x - 1) ** 2) / (2 * sigma**2))
    absent, present = absent / absent.sum(), present / present.sum()
    return x, absent, (1 - rate) * absent + rate * present


@pytest.mark.parametrize(("rate", "sigma"), CASES)
@pytest.mark.parametrize("added", [False, True])
def test_a_steps_loss_is_that_of_its_outcomes(rate: float, sigma: float, added: bool) -> None:
    x, absent, mixture = outcomes(rate, sigma)
    loss = SampledGaussianLoss(rate, sigma, added=added)
    drawn = absent if added else mixture
    # Of the step itself: log P/Q from the two densities.
    z = (2 * x - 1) / (2 * sigma**2)
    y = z if rate == 1 else np.log1p(rate * np.expm1(np.minimum(z, 600.0)))
    y = -y if added else y
    spread = math.sqrt(float(drawn @ (y - drawn @ y) ** 2))
    at = np.linspace(float(drawn @ y) - 4 * spread, float(drawn @ y) + 4 * spread, 41)
    expected = np.array([drawn[y <= value].sum() for value in at])
    # The grid's largest cell has a probability of 5·10⁻⁵ · 0.4.
    assert loss.cdf(at) == pytest.approx(expected, abs=5e-5)
    low, high = float(at[3]), float(at[-2])
    inside = (y > low) & (y <= high)
    mean = float(drawn[inside] @ y[inside]) / float(drawn[inside].sum())
    assert loss.mean(low, high) == pytest.approx(mean, abs=3e-4 * spread)


def test_the_directions_are_told_apart() -> None:
    """Negative control for the above: P(Y ≤ 0) differs by far more than the tolerance."""
    removed, added = (SampledGaussianLoss(0.3, 1.0, added=added) for added in (False, True))
    assert abs(removed.cdf(np.zeros(1)) - added.cdf(np.zeros(1)))[0] > 0.05
    # Removing gives away a lot at times, adding at most −log(1 − q).
    most = np.array([-math.log1p(-0.3) + 1e-9])
    assert added.cdf(most)[0] == 1.0
    assert removed.cdf(most)[0] < 0.99


def test_small_losses_keep_their_digits() -> None:
    """σ = 10⁶ and q = 10⁻⁶: losses of 10⁻¹², of which e^t − 1 has no digits, but expm1 has."""
    loss = SampledGaussianLoss(1e-6, 1e6, added=False)
    assert loss.cdf(np.array([-1e-12, 0.0, 1e-12])) == pytest.approx(
        [0.1587, 0.5, 0.8413], abs=1e-3
    )


@pytest.mark.parametrize("sigma", [0.2, 0.8, 3.0, 100.0])
def test_a_discrete_loss_is_that_of_its_outcomes(sigma: float) -> None:
    loss = DiscreteGaussianLoss(sigma)
    x = np.arange(-2000, 2001)
    mass = np.exp(-(x**2) / (2 * sigma**2))
    mass /= mass.sum()
    y = (1 - 2 * x) / (2 * sigma**2)
    at = np.linspace(-5, 5, 1001) / sigma + 1e-6
    assert loss.cdf(at) == pytest.approx([mass[y <= value].sum() for value in at], abs=1e-12)
    whole = float(np.max(np.abs(y))) + 1
    assert loss.mean(-whole, whole) == pytest.approx(1 / (2 * sigma**2), rel=1e-12)
    inside = (y > -0.5 / sigma) & (y <= 2 / sigma + 1e-6)
    expected = float(mass[inside] @ y[inside] / mass[inside].sum()) if inside.any() else math.nan
    if inside.any():
        assert loss.mean(-0.5 / sigma, 2 / sigma + 1e-6) == pytest.approx(expected)


def test_a_table_too_large_is_refused() -> None:
    DiscreteGaussianLoss(3000.0)
    with pytest.raises(ValueError, match="too many outcomes"):
        DiscreteGaussianLoss(4000.0)


# -- composition -----------------------------------------------------------------------------


def composed(losses: list[Loss], rho: list[float], counts: list[int], error: float) -> float:
    """ε at δ = 10⁻⁵; each loss has Rényi divergences of at most ρα."""
    mesh = mesh_for([order * ORDERS for order in rho], counts, error, 1e-8)
    return composed_epsilon(losses, counts, mesh, 1e-5, 1e-8)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("error", [1e-3, 1e-2])
@pytest.mark.parametrize(("sigma", "runs"), [(5.0, 1), (20.0, 100), (100.0, 1000)])
def test_gaussian_losses_compose_to_the_exact_curve(
    sigma: float, runs: int, error: float, added: bool
) -> None:
    truth = gaussian_epsilon(math.sqrt(runs) / sigma, 1e-5)
    loss = SampledGaussianLoss(1.0, sigma, added=added)
    found = composed([loss], [1 / (2 * sigma**2)], [runs], error)
    # The error is added, and was a bound: what remains lies between none and two of it.
    assert truth <= found <= truth + 2.1 * error


def test_discrete_losses_compose_to_the_exact_sum() -> None:
    """Five releases of σ = 2 are the sum of their noises: a distribution on whole numbers."""
    x = np.arange(-60, 61)
    noise = np.exp(-(x**2) / 8.0)
    noise /= noise.sum()
    total = noise
    for _ in range(4):
        total = np.convolve(total, noise)
    loss = (5 - 2 * np.arange(-300, 301)) / 8.0

    def curve(cost: float) -> float:
        return float(total @ np.maximum(0.0, -np.expm1(cost - loss)))

    found = composed([DiscreteGaussianLoss(2.0)], [1 / 8], [5], 1e-3)
    assert curve(found) <= 1e-5 < curve(found - 2.1e-3)


def test_a_mesh_gives_up_where_points_do_not_suffice() -> None:
    mesh = mesh_for([ORDERS * 1e6], [10], 1e-3, 1e-8)
    assert mesh.error > LARGEST_ERROR
    assert 2 * mesh.reach / mesh.width <= MOST_POINTS
    assert mesh_for([ORDERS], [10**12], 1e-3, 1e-8).error == math.inf
