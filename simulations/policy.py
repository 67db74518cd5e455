"""What a simulated holder allows."""

from __future__ import annotations

from functools import lru_cache

from client.policy import Policy
from common.errors import Refusal
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.ledger import Budget
from common.tasks.base import Task

__all__ = ["price_of", "simulated_policy", "simulated_refusal"]


def simulated_policy(name: str, plan: TrainingPlan, units: int) -> Policy:
    """The plan's own budget, and otherwise everything: the experimenter holds the data anyway.

    The size is declared exactly.

    Args:
        name: of the holder.
        plan: of the run.
        units: how many training units it has.
    """
    return Policy.of_experiment(name, price_of(plan), max(1, units))


@lru_cache(maxsize=4096)
def simulated_refusal(plan: TrainingPlan, task: Task, units: int) -> Refusal | None:
    """What a simulated holder of so many units has against a plan.

    No rule looks at a holder's name, so the holders of a large cohort are judged together.
    """
    try:
        simulated_policy("any", plan, units).check(plan, task)
    except Refusal as refusal:
        return refusal
    return None


@lru_cache(maxsize=256)
def price_of(plan: TrainingPlan) -> Budget | None:
    """The budget that just allows the whole plan: its ε, or more where evaluations have a price.

    Args:
        plan: calibrated.

    Returns:
        None for a plan without privacy.
    """
    privacy = plan.privacy
    if privacy.kind not in ("dp", "distributed"):
        return None
    total = privacy.epsilon
    if plan.evaluation.kind == "histogram":
        total = max(total, epsilon(plan.composition(), privacy.delta))
    return Budget(total, privacy.delta)
