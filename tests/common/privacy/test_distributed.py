"""Noise in the sum: what one unit moves, how much noise a threshold brings, what holds."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from common.aggregation import SecureSum
from common.errors import ConfigurationError
from common.guarantees import DistributedPrivacy
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.distributed import (
    against_coalitions,
    mean_update,
    noised_steps,
    rounded_steps,
)
from common.privacy.events import FINEST_SHARE, Composition, DistributedGaussian
from common.privacy.noise import OsRandomness, SeededRandomness
from common.settings import plan_for
from common.tasks import load
from tests.tiny import TinyTask

C = 0.5
ACCEPTED, REJECTED = 1e-4, 1e-12
HOLDERS, DRAWS = 10, 20_000


def plan_of(dimension: int = 4, **settings: object) -> TrainingPlan:
    """Of ten holders, of whom seven suffice."""
    chosen = {"aggregation": "secure-sum", "epsilon": 1.0, "clip_norm": C, **settings}
    plan = plan_for(TinyTask(), chosen, holders=HOLDERS)
    aggregation = secure_sum_of(plan).model_copy(update={"dimension": dimension})
    return plan.model_copy(update={"aggregation": aggregation}).calibrated()


@cache
def wide_plan() -> TrainingPlan:
    """With 1,713 parameters, whose rounding adds up."""
    task = load("credit-risk", "synthetic")
    return plan_for(task, {"aggregation": "secure-sum", "epsilon": 8.0, "clip_norm": C}, holders=4)


@pytest.fixture(autouse=True, scope="module")
def _fresh() -> None:
    """A mutant, which runs in the process of others, makes its own plan."""
    wide_plan.cache_clear()


def secure_sum_of(plan: TrainingPlan) -> SecureSum:
    assert isinstance(plan.aggregation, SecureSum)
    return plan.aggregation


def privacy_of(plan: TrainingPlan) -> DistributedPrivacy:
    assert isinstance(plan.privacy, DistributedPrivacy)
    return plan.privacy


def sigma_of(plan: TrainingPlan) -> float:
    """σ that the plan is charged for, in the units of what one unit moves."""
    (event,) = plan.composition()
    assert isinstance(event, DistributedGaussian)
    return event.noise_multiplier


def step_of(plan: TrainingPlan) -> float:
    ring = secure_sum_of(plan).ring
    assert ring is not None
    return ring.step


def with_step(plan: TrainingPlan, step: float) -> TrainingPlan:
    """The plan, calibrated carelessly."""
    aggregation = secure_sum_of(plan)
    assert aggregation.ring is not None
    ring = aggregation.ring.model_copy(update={"step": step})
    return plan.model_copy(update={"aggregation": aggregation.model_copy(update={"ring": ring})})


# -- what one unit moves ---------------------------------------------------------------------


def moved(total: torch.Tensor, gradient: torch.Tensor, step: float) -> float:
    """L2 norm by which a gradient moves a rounded sum, in the units of a gradient."""
    difference = rounded_steps(total + gradient, step) - rounded_steps(total, step)
    return float(np.linalg.norm(difference.astype(np.float64))) * step


@given(st.integers(0, 2**32), st.floats(0, 1e6), st.sampled_from([0.0, 1e-9, 0.1, 1.0]))
@example(0, 0.0, 1.0)
def test_one_unit_moves_the_rounded_sum_by_no_more_than_the_noise_is_sized_for(
    seed: int, size: float, length: float
) -> None:
    """The noise that counts is at least σ of whatever a clipped gradient can do to the steps."""
    plan, rng = wide_plan(), np.random.default_rng(seed)
    dimension, step = secure_sum_of(plan).dimension, step_of(plan)
    # Halfway between two steps, where the least change of a coordinate is rounded to a whole step.
    total = torch.from_numpy(size * rng.normal(size=dimension))
    total = torch.round(total / step) * step + step / 2 * (1 - 1e-9)
    direction = torch.from_numpy(rng.normal(size=dimension)).abs()
    gradient = length * C * direction / direction.norm()
    noise = privacy_of(plan).share(plan) * math.sqrt(plan.min_holders)
    assert sigma_of(plan) * moved(total, gradient, step) <= noise


def test_rounding_moves_a_sum_too() -> None:
    """Negative control: by a whole step in every coordinate, where none moved by more than dust."""
    plan = wide_plan()
    dimension, step = secure_sum_of(plan).dimension, step_of(plan)
    total = torch.full((dimension,), step * (0.5 - 1e-9), dtype=torch.float64)
    dust = torch.full((dimension,), 1e-6 * step, dtype=torch.float64)
    assert moved(total, dust, step) == pytest.approx(math.sqrt(dimension) * step)
    # Steps of a hundred times that length are not small beside C, and are refused.
    assert moved(100 * total, 100 * dust, 100 * step) > 0.02 * C
    with pytest.raises(ConfigurationError, match=r"ring\.step must be at most"):
        noised_steps(total, with_step(plan, 128 * step), OsRandomness())


def test_a_sum_is_rounded_to_the_nearest_step() -> None:
    total = torch.tensor([0.0, 0.24, 0.26, -0.26, 1e6], dtype=torch.float64)
    assert rounded_steps(total, 0.5).tolist() == [0, 0, 1, -1, 2_000_000]


# -- how much noise --------------------------------------------------------------------------


def spread(parts: list[np.ndarray], wanted: float) -> tuple[float, float]:
    """χ² test that summed parts have this deviation: the chance of so little, and of so much."""
    total = np.sum(parts, axis=0).astype(np.float64)
    statistic = float(np.sum(total**2)) / wanted**2
    return float(stats.chi2.cdf(statistic, len(total))), float(stats.chi2.sf(statistic, len(total)))


def parts_of(plan: TrainingPlan, holders: int) -> list[np.ndarray]:
    zero = torch.zeros(DRAWS, dtype=torch.float64)
    return [noised_steps(zero, plan, SeededRandomness("share", i)) for i in range(holders)]


@pytest.mark.parametrize("coalition", [0, 2])
def test_the_noise_of_the_fewest_honest_survivors_is_the_full_noise(coalition: int) -> None:
    """Of exactly ``min_holders`` − ``coalition`` holders; of one less it is not.

    20,000 draws tell deviations apart that differ by 2 %, and one holder of seven is 7 %.
    """
    plan = plan_of(DRAWS, coalition=coalition)
    assert plan.min_holders == 7
    full = sigma_of(plan) * 1.002 * C / step_of(plan)
    honest = plan.min_holders - coalition
    parts = parts_of(plan, honest)
    assert min(spread(parts, full)) > ACCEPTED
    assert spread(parts[:-1], full)[0] < REJECTED, "one share less is too little"
    assert spread([*parts, *parts_of(plan, 1)], full)[1] < REJECTED, "and one more is more"


def test_parts_are_gaussian_about_the_sum_and_independent() -> None:
    plan = plan_of(DRAWS)
    total = torch.linspace(-10, 10, DRAWS, dtype=torch.float64)
    step, share = step_of(plan), privacy_of(plan).share(plan)
    first, second = (
        noised_steps(total, plan, SeededRandomness("part", i)) * step - total.numpy()
        for i in range(2)
    )
    assert stats.kstest(first / share, "norm").pvalue > ACCEPTED
    assert stats.kstest(first / share * 1.15, "norm").pvalue < REJECTED
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(DRAWS)


def test_each_share_is_as_fine_as_its_price_assumes() -> None:
    for plan in (plan_of(), wide_plan(), plan_of(epsilon=100.0, delta=1e-3)):
        assert privacy_of(plan).share(plan) / step_of(plan) >= FINEST_SHARE


def test_plans_that_do_not_fit_are_refused() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    plain = plan_for(TinyTask(), {"epsilon": 1.0})
    with pytest.raises(ConfigurationError, match="build the plan with aggregation 'secure-sum'"):
        noised_steps(zero, plain, OsRandomness())
    with pytest.raises(ConfigurationError, match="the plan is for 4 parameters, and there are 5"):
        noised_steps(torch.zeros(5, dtype=torch.float64), plan_of(), OsRandomness())
    uncalibrated = plan_of().model_copy(
        update={"aggregation": plan_of().aggregation.model_copy(update={"ring": None})}
    )
    with pytest.raises(ConfigurationError, match="not calibrated"):
        noised_steps(zero, uncalibrated, OsRandomness())


# -- what the coordinator makes of it ---------------------------------------------------------


@given(st.integers(7, HOLDERS), st.integers(0, 2**32))
def test_the_update_is_a_step_along_the_mean_gradient(survivors: int, seed: int) -> None:
    """Whoever survives: the divisor is their number, and the public batch size."""
    plan = plan_of()
    sums = torch.from_numpy(np.random.default_rng(seed).normal(size=(survivors, 4)) * 10)
    total = np.sum([rounded_steps(each, step_of(plan)) for each in sums], axis=0)
    found = mean_update(total, survivors, plan)
    assert found.dtype == np.float32
    expected = -plan.learning_rate * sums.mean(0) / plan.expected_batch_size
    tolerance = plan.learning_rate * step_of(plan) / plan.expected_batch_size
    assert np.allclose(found, expected.numpy(), atol=tolerance, rtol=1e-6)


# -- coalitions ------------------------------------------------------------------------------


def test_what_holds_against_coalitions() -> None:
    plan = plan_of(coalition=2)
    found = against_coalitions(plan)
    assert [each.holders for each in found] == list(range(7))
    prices = [each.epsilon for each in found]
    assert prices == sorted(prices)
    # Up to the two that the plan is calibrated for, and no further.
    assert prices[2] == pytest.approx(1.0, rel=2e-3)
    assert prices[2] <= 1.0 < prices[3]
    # One honest share of seven, of which any five make the full noise.
    alone = DistributedGaussian(sigma_of(plan) / math.sqrt(5), plan.rounds)
    assert prices[6] == epsilon(Composition.of(alone), privacy_of(plan).delta)
