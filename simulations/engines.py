"""Engines by name: who computes the blocks of a simulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from common.errors import ConfigurationError
from common.tasks.base import HolderData, Task
from simulations.processes import Processes
from simulations.workers import BlockTrainer, InProcess, Workers

__all__ = ["BLOCK_ENGINES", "ENGINES", "engine_running", "workers_for"]

BLOCK_ENGINES = ("batched", "ray")
"""Engines that stack many holders: in this process, or on a Ray cluster."""

ENGINES = ("batched", "opacus", "ray")
"""Ways to compute a round's local training: stacked blocks in this process (the default), each
holder's own ClientApp with Opacus, ledger and policy, or stacked blocks on a Ray cluster."""


def workers_for(
    engine: str,
    task: Task,
    data: Mapping[str, HolderData],
    device: torch.device,
    address: str | None = None,
) -> Workers:
    """Workers of one of :data:`BLOCK_ENGINES`.

    Args:
        engine: its name.
        task: what is learned.
        data: every holder's, by key.
        device: where models live.
        address: of the Ray cluster; None starts one on this machine.

    Raises:
        ConfigurationError: there is no such engine, or it does not stack holders.
    """
    if engine not in BLOCK_ENGINES:
        raise ConfigurationError(
            f"engine {engine!r} does not stack holders; those that do are "
            f"{', '.join(BLOCK_ENGINES)}"
        )
    if engine == "ray":
        from simulations.ray import RayWorkers

        return RayWorkers(task, data, device, address)
    trainer = BlockTrainer(task, data, device)
    return InProcess(trainer) if device.type == "cuda" else Processes(trainer)


@contextmanager
def engine_running(engine: str, address: str | None = None) -> Iterator[None]:
    """Keep up what an engine's workers share, so that not every run of an experiment starts it."""
    if engine == "ray":
        from simulations.ray import cluster

        with cluster(address):
            yield
    else:
        yield
