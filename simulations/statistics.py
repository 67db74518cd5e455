"""Statistics of simulated holders: the exchange of a deployment, in this process."""

from __future__ import annotations

import torch

from client.holder import Holder, RandomnessFor
from client.policy import Policy
from client.requests import Request
from client.state import HolderState
from common.privacy.ledger import Budget
from common.privacy.noise import Randomness, SeededRandomness
from common.statistics_plan import StatisticsPlan
from common.tasks.base import Task
from server.statistics import Gathered, gather
from simulations.grid import InProcessGrid

__all__ = ["simulate_statistics"]


def simulate_statistics(
    task: Task, plan: StatisticsPlan, *, holders: int | None = None, seed: int = 0
) -> Gathered:
    """Ask the holders of a task's own source.

    Args:
        task: on its source.
        plan: calibrated; its seed is that of the noise.
        holders: how many; None for the source's own number.
        seed: of the split into training and held-out rows.

    Raises:
        RunError: too few holders, or too much noise to say anything.
    """
    tables = task.source.tables(holders)
    split = {name: task.split(table, holder=name, seed=seed) for name, table in tables.items()}
    everyone: dict[str, Holder] = {}
    try:
        for name, rows in split.items():
            data = task.prepare(rows)
            policy = Policy.of_experiment(
                name, Budget(plan.epsilon, plan.delta), max(1, len(data.train))
            )
            everyone[name] = Holder(
                name,
                task,
                data,
                policy,
                HolderState.in_memory(),
                torch.device("cpu"),
                randomness=_seeded(name),
                seed=seed,
                rows=rows.train,
            )
        return gather(InProcessGrid(everyone), plan, "simulation")
    finally:
        for holder in everyone.values():
            holder.state.close()


def _seeded(name: str) -> RandomnessFor:
    def randomness(request: Request) -> Randomness:
        return SeededRandomness("statistics", request.plan.seed, name)

    return randomness
