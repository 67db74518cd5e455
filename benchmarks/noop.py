"""Sotto, with two holder processes that do everything but train.

Certificates on both sides, the ledger's reserve and commit, the answer on disk, the checkpoint of
every round and FedAvg are the real ones; only the training returns a zero update. This module is
also the holder: ``python -m benchmarks.noop HOST:PORT STATE PARAMETERS``.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn

from benchmarks.loopback import HOLDERS, Loopback
from client.app import build_app
from client.holder import Holder
from client.node import Node
from client.policy import Policy
from client.state import HolderState
from client.trainer import Trainer
from common.data.schema import Column, Schema
from common.flower import quiet_flower
from common.link.keys import HolderKeys
from common.plan import TrainingPlan
from common.privacy.ledger import Budget
from common.privacy.noise import Randomness
from common.settings import plan_for
from common.tasks.base import Examples, HolderData, HolderTables, Source, Task
from server.app import federate
from server.grid import LinkGrid
from server.runs import RunFolder

__all__ = ["sotto_rounds"]

EPSILON = 5.0
UNITS = 100


def sotto_rounds(folder: Path, parameters: int, rounds: int) -> list[float]:
    """Seconds of each round, from one durable checkpoint to the next.

    Args:
        folder: for every state folder.
        parameters: of the model, one float32 tensor.
        rounds: how many to time; one more is run before them, to warm up.
    """
    task = NoTask(parameters)
    plan = plan_for(
        task,
        {
            "rounds": rounds + 1,
            "min_holders": len(HOLDERS),
            "epsilon": EPSILON,
            "evaluate": "never",
        },
    )
    quiet_flower()
    loopback = Loopback.under(folder)
    done: list[float] = []
    with ExitStack() as stack:
        grid = LinkGrid("127.0.0.1:0", keys=loopback.keys)
        port = grid.start()
        stack.callback(grid.stop)
        stack.enter_context(loopback.holders("benchmarks.noop", port, str(parameters)))
        grid.wait_for_holders(len(HOLDERS), timeout=120.0)
        run = RunFolder.begin(loopback.coordinator / "runs" / "noop", plan)
        federate(grid, plan, task, run, lambda _: done.append(time.perf_counter()))
    return [end - begin for begin, end in pairwise(done)]


class _NoSource(Source):
    name = "nothing"
    schema = Schema((Column("x", "number", low=0, high=1),))
    holder_size = UNITS
    delta = 1e-4

    def tables(self, holders: int | None = None, *, seed: int = 0) -> Mapping[str, pd.DataFrame]:
        raise NotImplementedError("nobody reads a table here")


class _Parameters(nn.Module):
    """One tensor."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parameters))


class NoTask(Task):
    """A task of a given size that nobody trains."""

    name = "noop"
    unit = "record"
    headline = "nothing"
    sources: ClassVar[Mapping[str, type[Source]]] = {"nothing": _NoSource}

    def __init__(self, parameters: int) -> None:
        self.source = _NoSource()
        self.schema = self.source.schema
        self.preprocessing = "default"
        self._parameters = parameters

    def model(self, units: int) -> nn.Module:
        """One tensor, whatever ``units``."""
        return _Parameters(self._parameters)

    def examples(self, table: pd.DataFrame) -> Examples:
        """As many units as the source says; they are never looked at."""
        return Examples({"x": torch.zeros(UNITS)})

    def recommended(self, epsilon: float | None) -> dict[str, object]:
        """Something: nothing is trained."""
        return {"learning_rate": 1.0}

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Not called."""
        raise NotImplementedError

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        """Not called."""
        raise NotImplementedError

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        """Not called."""
        raise NotImplementedError

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        """Not called."""
        raise NotImplementedError


class NoTrainer(Trainer):
    """Leaves the model as it is."""

    def train(
        self,
        plan: TrainingPlan,
        parameters: Tensor,
        private: Mapping[str, Tensor] | None,
        randomness: Randomness,
        *,
        divisor: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A zero update."""
        return torch.zeros_like(parameters), {}


def serve_holder(server: str, state: Path, parameters: int) -> None:
    """Be a holder until SIGTERM, as ``sotto join`` is."""
    task, keys = NoTask(parameters), HolderKeys.load(state)
    units = task.examples(pd.DataFrame())
    budget = Budget(EPSILON, task.source.delta)
    policy = Policy.of_experiment("nothing", budget, len(units))
    with HolderState.at(state) as memory:
        device = torch.device("cpu")
        holder = Holder(keys.name, task, HolderData(units, units), policy, memory, device)
        holder.trainer = NoTrainer(task, units, device)
        app, context = build_app(lambda _: holder), Context(1, 1, {}, RecordDict(), {})
        node = Node(server, lambda message: app(message, context), keys=keys)
        signal.signal(signal.SIGTERM, lambda *_: node.stop())
        node.run()


if __name__ == "__main__":
    serve_holder(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
