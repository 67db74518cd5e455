"""What a simulated holder allows."""

from __future__ import annotations

from client.policy import Policy
from common.plan import TrainingPlan
from common.privacy.ledger import Budget

__all__ = ["simulated_policy"]


def simulated_policy(name: str, plan: TrainingPlan, units: int) -> Policy:
    """The plan's own budget; metrics shared and the size declared exactly.

    The experimenter holds the data anyway.

    Args:
        name: of the holder.
        plan: of the run.
        units: how many training units it has.
    """
    privacy = plan.privacy
    budget = Budget(privacy.epsilon, privacy.delta) if privacy.kind == "dp" else None
    return Policy(
        name, budget, privacy.kind == "none", share_metrics=True, size_class=max(1, units)
    )
