"""What a simulated holder allows: every plan, and no more than the plan's own price."""

from __future__ import annotations

import pytest

from client.requests import Terms
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.ledger import Budget
from common.settings import plan_for
from simulations.policy import price_of, simulated_policy, simulated_refusal
from tests.tiny import CountedTask, TinyTask

LEVELS = ("plain", "secure", "secure-sum")


def plan(level: str, **settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"aggregation": level, "rounds": 5, **settings}, holders=3)


@pytest.mark.parametrize("level", LEVELS)
def test_a_plan_with_privacy_has_a_budget_that_just_holds_it(level: str) -> None:
    asked = plan(level, epsilon=1.0)
    assert Terms.of_plan(asked).private
    assert price_of(asked) == Budget(1.0, 1e-4)
    spent = epsilon(asked.composition(), 1e-4)
    assert 0.99 < spent <= 1.0
    assert epsilon(asked.composition() * 2, 1e-4) > 1.0


@pytest.mark.parametrize("level", LEVELS)
def test_simulated_holders_take_part_at_every_level(level: str) -> None:
    asked = plan(level, epsilon=1.0)
    assert level in simulated_policy("h0", asked, 40).aggregation
    assert simulated_refusal(asked, TinyTask(), 40) is None


def test_evaluations_that_have_a_price_are_in_the_budget_of_a_sum_too() -> None:
    settings = {"aggregation": "secure-sum", "epsilon": 1.0, "evaluation_epsilon": 0.5}
    asked = plan_for(CountedTask(), settings, holders=3)
    budget = price_of(asked)
    assert budget is not None
    assert budget.epsilon == epsilon(asked.composition(), 1e-4) > 1.0


def test_a_plan_without_privacy_has_no_budget() -> None:
    assert price_of(plan("secure", no_dp=True)) is None
