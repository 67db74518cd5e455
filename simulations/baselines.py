"""What a plan becomes without a federation: for one holder alone, and for all data in one place.

There is nobody to sum with, so nothing is masked, and noise that would be in the sum of many is in
each step: with the same rounds, ε, δ, clip norm and strategy, calibrated anew. Of all data together
that is central DP-SGD.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from common.aggregation import Plain
from common.guarantees import DistributedPrivacy, Privacy
from common.plan import TrainingPlan
from common.tasks.base import HolderTables
from server.aggregation import STRATEGIES

__all__ = ["POOLED", "pooled_plan", "pooled_tables", "solo_plan"]

POOLED = "pooled"
"""The name of whoever holds all data."""


def solo_plan(plan: TrainingPlan) -> TrainingPlan:
    """The plan for one holder: robust strategies need several, so they become the mean."""
    linear = STRATEGIES[plan.strategy.name].linear
    strategy = plan.strategy if linear else plan.strategy.model_copy(update={"name": "fedavg"})
    privacy = plan.privacy
    if isinstance(privacy, DistributedPrivacy):
        privacy = _own_noise(privacy).calibrated(plan)
    return plan.model_copy(
        update={
            "min_holders": 1,
            "cohort": None,
            "over_selection": 0.0,
            "strategy": strategy,
            "evaluate_every": plan.rounds,
            "privacy": privacy,
            "aggregation": Plain(),
        }
    )


def _own_noise(privacy: DistributedPrivacy) -> Privacy:
    """The same target, with the noise in each holder's steps; not yet calibrated."""
    return Privacy(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        unit=privacy.unit,
        clip_norm=privacy.clip_norm,
    )


def pooled_plan(plan: TrainingPlan, holders: int) -> TrainingPlan:
    """The plan for the union of so many holders: the guarantee is that of central DP-SGD."""
    size = plan.holder_size * holders
    return solo_plan(plan).model_copy(
        update={"holder_size": size, "expected_batch_size": plan.sampling_rate * size}
    )


def pooled_tables(tables: Mapping[str, HolderTables]) -> HolderTables:
    """Every holder's rows in one pair of tables."""
    return HolderTables(
        *(
            pd.concat([getattr(half, part) for half in tables.values()], ignore_index=True)
            for part in ("train", "test")
        )
    )
