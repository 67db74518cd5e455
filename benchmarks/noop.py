"""Sotto, with holder processes that do everything but train.

Certificates on both sides, the ledger's reserve and commit, the answer on disk, the checkpoint of
every round, FedAvg and secure aggregation are the real ones; only the training returns a zero
update. This module is also the holder: ``python -m benchmarks.noop HOST:PORT STATE PARAMETERS
EPSILON``.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Self

import pandas as pd
import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn

from benchmarks.loopback import HOLDERS, Loopback
from client.app import build_app
from client.holder import Holder
from client.node import Node
from client.policy import Policy
from client.secure import Participant
from client.state import HolderState
from client.trainer import Trainer
from common.data.schema import Column, Schema
from common.flower import quiet_flower
from common.link.keys import HolderKeys
from common.link.signing import Identity, Trust
from common.plan import TrainingPlan
from common.privacy.ledger import Budget
from common.privacy.noise import Randomness
from common.settings import plan_for
from common.tasks.base import Examples, HolderData, HolderTables, Source, Task
from server.app import federate
from server.grid import LinkGrid
from server.runs import RunFolder
from server.summaries import RoundSummary

__all__ = ["Federation", "sotto_rounds"]

EPSILON = 5.0
"""Of one run."""

UNITS = 100


def sotto_rounds(folder: Path, parameters: int, rounds: int) -> list[float]:
    """Seconds of each round with two holders and plain updates; see :meth:`Federation.rounds`."""
    with Federation.started(folder, parameters, len(HOLDERS), runs=1) as federation:
        return federation.rounds("plain", rounds)


@dataclass(frozen=True)
class Federation:
    """A coordinator in this process and the holders' processes that have joined it.

    Args:
        loopback: everybody's keys and folders.
        grid: reaches the holders.
        task: that nobody trains.
    """

    loopback: Loopback
    grid: LinkGrid
    task: NoTask

    @classmethod
    @contextmanager
    def started(cls, folder: Path, parameters: int, holders: int, *, runs: int) -> Iterator[Self]:
        """Start the processes, and stop them when the block ends.

        Args:
            folder: for every state folder.
            parameters: of the model, one float32 tensor.
            holders: how many.
            runs: that their budgets are to pay for.
        """
        quiet_flower()
        loopback = Loopback.under(folder, [f"holder-{n}" for n in range(1, holders + 1)])
        with ExitStack() as stack:
            grid = LinkGrid("127.0.0.1:0", keys=loopback.keys)
            port = grid.start()
            stack.callback(grid.stop)
            arguments = (str(parameters), str(runs * EPSILON))
            stack.enter_context(loopback.holders("benchmarks.noop", port, *arguments))
            grid.wait_for_holders(holders, timeout=300.0)
            yield cls(loopback, grid, NoTask(parameters))

    def rounds(self, aggregation: str, rounds: int, run: str = "noop") -> list[float]:
        """Seconds of each round of a run, from one durable checkpoint to the next.

        Args:
            aggregation: ``"plain"`` or ``"secure"``.
            rounds: how many to time; one more is run before them, to warm up.
            run: names the run's folder.
        """
        holders = len(self.loopback.names)
        settings = {
            "rounds": rounds + 1,
            "epsilon": EPSILON,
            "evaluate": "never",
            "aggregation": aggregation,
        }
        plan = plan_for(self.task, settings, holders=holders)
        done: list[float] = []

        def note(summary: RoundSummary) -> None:
            done.append(time.perf_counter())
            if len(summary.accepted) != holders:
                raise RuntimeError(f"round {summary.round} lost holders: {summary.missed}")

        runs = RunFolder.begin(self.loopback.coordinator / "runs" / run, plan)
        federate(self.grid, plan, self.task, runs, note)
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


def serve_holder(server: str, state: Path, parameters: int, epsilon: float) -> None:
    """Be a holder until SIGTERM, as ``sotto join`` is."""
    task, keys = NoTask(parameters), HolderKeys.load(state)
    units = task.examples(pd.DataFrame())
    budget = Budget(epsilon, task.source.delta)
    policy = Policy.of_experiment("nothing", budget, len(units))
    with HolderState.at(state) as memory:
        device = torch.device("cpu")
        holder = Holder(keys.name, task, HolderData(units, units), policy, memory, device)
        holder.trainer = NoTrainer(task, units, device)
        participant = Participant(holder, lambda: Identity.of(keys), Trust(keys.authority))
        app, context = build_app(lambda _: participant), Context(1, 1, {}, RecordDict(), {})
        node = Node(server, lambda message: app(message, context), keys=keys)
        signal.signal(signal.SIGTERM, lambda *_: node.stop())
        node.run()


if __name__ == "__main__":
    serve_holder(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
