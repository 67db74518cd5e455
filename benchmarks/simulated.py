"""Simulated federations to be timed: networks on random records, and the seconds of their rounds.

    case = MLP
    result = simulated(case.task, case.plan(rounds=12), case.data())
    statistics.median(result.seconds[WARM_UP:])

A round is the real thing: `server.app.federate` on a `BatchedGrid`, with the workers that
`sotto simulate` would use. Nobody evaluates.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.data.schema import Column, Schema
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks.base import Examples, HolderData, HolderTables, Source, Task
from server.app import federate
from server.summaries import RoundSummary
from simulations.engines import workers_for
from simulations.grid import BatchedGrid
from simulations.workers import Workers

__all__ = [
    "MLP",
    "PFL",
    "WARM_UP",
    "Case",
    "Network",
    "Simulated",
    "names_of",
    "records",
    "simulated",
    "threads",
]

WARM_UP = 2
"""Rounds that are not timed: blocks are assembled and processes started in them."""

FEATURES = 30
_SCHEMA = Schema(
    (
        *(Column(f"x{i}", "number", low=-10, high=10) for i in range(FEATURES)),
        Column("y", "label", categories=(0, 1)),
    )
)


class RandomRecords(Source):
    """Says what a plan wants to know; the records themselves come from `records`."""

    name: ClassVar[str] = "random"
    schema = _SCHEMA
    holder_size = 300
    delta = 1e-5

    def tables(self, holders: int | None = None, *, seed: int = 0) -> Mapping[str, pd.DataFrame]:
        """None."""
        raise NotImplementedError("there are no tables of these records, only tensors")


class Network(Task):
    """Classification by linear layers with ReLU between them.

    Args:
        widths: of the layers, the features first and the classes last.
    """

    name: ClassVar[str] = "network"
    unit: ClassVar[Any] = "record"
    headline: ClassVar[str] = "accuracy"
    sources: ClassVar[Mapping[str, type[Source]]] = {"random": RandomRecords}

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        self.source, self.schema, self.preprocessing = RandomRecords(), _SCHEMA, "default"

    def model(self, units: int) -> nn.Module:
        """The layers, freshly initialised."""
        layers: list[nn.Module] = []
        for before, after in pairwise(self.widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Cross-entropy of each record."""
        return cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def examples(self, table: pd.DataFrame) -> Examples:
        """None."""
        raise NotImplementedError("there are no tables of these records, only tensors")

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        """Classes."""
        return model(units["x"]).argmax(1)

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        """Accuracy."""
        return {"accuracy": float((predictions == test["y"]).float().mean())}

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        """None."""
        raise NotImplementedError("there are no tables of these records, only tensors")

    def recommended(self, epsilon: float | None) -> dict[str, object]:
        """What no case sets."""
        return {"learning_rate": 0.1}


def records(count: int, seed: int) -> Examples:
    """``count`` random records whose label is the sign of the first feature."""
    x = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    return Examples({"x": x, "y": (x[:, 0] > 0).long()})


def names_of(holders: int) -> list[str]:
    """Names of so many holders."""
    return [f"holder-{number}" for number in range(holders)]


@dataclass(frozen=True)
class Case:
    """A federation of equals.

    Args:
        label: for people.
        widths: of the network.
        holders: how many.
        records: of each.
        batch: expected.
        steps: local ones of a round.
        private: whether with record-level differential privacy.
    """

    label: str
    widths: tuple[int, ...]
    holders: int
    records: int
    batch: int
    steps: int
    private: bool = True

    @property
    def task(self) -> Network:
        """What is learned."""
        return Network(self.widths)

    @property
    def dimension(self) -> int:
        """D, the number of parameters."""
        return sum(before * after + after for before, after in pairwise(self.widths))

    def of(self, holders: int) -> Case:
        """The same with so many holders."""
        return replace(self, holders=holders)

    def plan(self, rounds: int, **settings: Any) -> TrainingPlan:
        """Calibrated; ε is 8, which decides no speed."""
        chosen = {
            "rounds": rounds,
            "min_holders": self.holders,
            "local_steps": self.steps,
            "batch_size": self.batch,
            "holder_size": self.records,
            "evaluate": "never",
            **({"epsilon": 8.0} if self.private else {"no_dp": True}),
        }
        return plan_for(self.task, chosen | settings)

    def data(self) -> dict[str, HolderData]:
        """Every holder's own records; nothing to evaluate on, to speak of."""
        test = records(1, 0)
        return {
            name: HolderData(records(self.records, seed), test)
            for seed, name in enumerate(names_of(self.holders))
        }


MLP = Case("MLP 30-64-32-2, DP", (FEATURES, 64, 32, 2), 100, 300, 32, 10)
PFL = Case("MLP 30-64-2, no DP", (FEATURES, 64, 2), 100, 50, 10, 10, private=False)


@dataclass(frozen=True)
class Simulated:
    """A federation's rounds.

    Args:
        seconds: of every round, warm-up included.
        parameters: of the final model.
        processes: that shared the work, this one included.
    """

    seconds: Sequence[float]
    parameters: Tensor
    processes: int

    @property
    def timed(self) -> list[float]:
        """Seconds of the rounds after warm-up."""
        return list(self.seconds[WARM_UP:])

    @property
    def digest(self) -> str:
        """Of the final model's bits."""
        return hashlib.sha256(self.parameters.numpy().tobytes()).hexdigest()


@dataclass
class _Watch:
    """Notes what rounds took, and how many processes there were."""

    seconds: list[float] = field(default_factory=list)
    processes: int = 1

    def note(self, summary: RoundSummary) -> None:
        """A round is over."""
        self.seconds.append(summary.seconds)
        self.processes = max(self.processes, 1 + len(multiprocessing.active_children()))


def _as_they_are(workers: Workers) -> Workers:
    return workers


def simulated(
    task: Task,
    plan: TrainingPlan,
    data: Mapping[str, HolderData],
    *,
    processes: int | None = None,
    around: Callable[[Workers], Workers] = _as_they_are,
    workers: Workers | None = None,
) -> Simulated:
    """Run a plan to its end.

    Args:
        task: of the plan.
        plan: calibrated.
        data: every holder's.
        processes: to share the work; None for what the engine takes by itself.
        around: puts workers of one's own around the engine's.
        workers: to use in place of the engine's; closed at the end.
    """
    watch = _Watch()
    with threads(processes):
        workers = workers or workers_for("batched", task, data, torch.device("cpu"))
        grid = BatchedGrid(list(data), around(workers))
        try:
            result = federate(grid, plan, task, None, watch.note)
        finally:
            grid.close()
    return Simulated(watch.seconds, torch.tensor(result.parameters), watch.processes)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Torch's threads for a while, which is how many processes the engine takes; None: its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
