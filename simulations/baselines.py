"""What a plan becomes without a federation: for one holder alone, and for all data in one place."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

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
    return plan.model_copy(
        update={
            "min_holders": 1,
            "cohort": None,
            "strategy": strategy,
            "evaluate_every": plan.rounds,
        }
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
