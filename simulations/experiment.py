"""An experiment: one plan, several seeds, and what the same plan gives alone and pooled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

from common.data.on_demand import OnDemand
from common.errors import ConfigurationError
from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.privacy.noise import SeededRandomness
from common.tasks.base import HolderData, HolderTables, Task
from common.tasks.parameters import load_shared
from common.tasks.scaling import scaled
from server.aggregation import is_buffered
from server.app import build_app
from server.central import Combination, combination_of
from server.runs import RunFolder, RunResult
from server.summaries import RoundSummary
from simulations.asynchronous import AsynchronousGrid
from simulations.baselines import POOLED, pooled_plan, pooled_tables, solo_plan
from simulations.engines import ENGINES, engine_running, workers_for
from simulations.faults import Byzantine, Faults, FaultyGrid, RoundFaults
from simulations.grid import BatchedGrid, in_process
from simulations.masked_faults import FaultyMaskedGrid
from simulations.results import Metrics

__all__ = [
    "Baselines",
    "Experiment",
    "ExperimentResult",
    "run_experiment",
    "train_baselines",
]


@dataclass(frozen=True)
class Experiment:
    """What to simulate.

    Args:
        task: on its source.
        plan: calibrated; each run replaces its seed.
        seeds: of split, initial parameters, sampling and noise.
        holders: how many; None for the source's own number.
        device: where models live.
        engine: one of :data:`simulations.engines.ENGINES`.
        address: of the Ray cluster; None starts one on this machine.
        baselines: whether to train each holder alone, and all data pooled, for comparison.
        faults: what goes wrong in the federation, and not in the baselines; None for nothing.
        folder: the first seed's run is kept here; None keeps nothing.
    """

    task: Task
    plan: TrainingPlan
    seeds: Sequence[int] = (0,)
    holders: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    engine: str = "batched"
    address: str | None = None
    baselines: bool = False
    faults: Faults | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.baselines and self.plan.privacy.kind == "central":
            raise ConfigurationError(
                "baselines train one holder alone, and where holders are the unit nothing about "
                "one holder can be learned; leave --baselines out"
            )
        if self.engine not in ENGINES:
            raise ConfigurationError(
                f"there is no engine {self.engine!r}; there are {', '.join(ENGINES)}"
            )
        if self.byzantine is not None:
            self.byzantine.check(self.task)
            self.byzantine.check_seen(self.plan)

    @property
    def byzantine(self) -> Byzantine | None:
        """Holders that lie; None if all are honest."""
        return None if self.faults is None else self.faults.byzantine


@dataclass(frozen=True)
class Baselines:
    """What the same plan gives without a federation: for every seed, holder → metrics."""

    local: Sequence[Mapping[str, Metrics]]
    pooled: Sequence[Mapping[str, Metrics]]


@dataclass(frozen=True)
class ExperimentResult:
    """Every seed's run.

    Args:
        experiment: what was asked.
        holders: names.
        runs: one for each seed.
        baselines: if they were asked for.
        seconds: wall time of all of it.
        faults: what went wrong, for every round of every seed, where time is simulated.
        clocks: for every seed, simulated seconds at the end of each round; none where no time is
            simulated.
    """

    experiment: Experiment
    holders: Sequence[str]
    runs: Sequence[RunResult]
    baselines: Baselines | None
    seconds: float
    faults: Sequence[RoundFaults] = ()
    clocks: Sequence[Sequence[float]] = ()

    @property
    def finals(self) -> Sequence[Mapping[str, Metrics]]:
        """For every seed, holder → metrics of the final model."""
        return [run.final.metrics for run in self.runs]


COHORTS_KEPT = 4
"""Prepared data sets are kept for so many cohorts; the others are made again when needed."""

OnProgress = Callable[[str, int, RoundSummary], None]
"""Called with the stage (``federation``, ``NAME alone``, ``pooled``), the seed and the round."""


def _silent(*_: object) -> None:
    """Report nothing."""


def run_experiment(experiment: Experiment, on_progress: OnProgress = _silent) -> ExperimentResult:
    """Simulate every seed, sequentially and reproducibly.

    Raises:
        RunError: a round lacked its quorum.
    """
    begin = time.perf_counter()
    runs, local, pooled, names = [], [], [], list[str]()
    happened: list[RoundFaults] = []
    clocks: list[list[float]] = []
    with engine_running(experiment.engine, experiment.address):
        for number, seed in enumerate(experiment.seeds):
            plan = experiment.plan.model_copy(update={"seed": seed})
            tables, data = _data_of(experiment, seed)
            names = list(data)
            folder = None
            if experiment.folder is not None and number == 0:
                folder = RunFolder.begin(experiment.folder, plan)
            report = partial(on_progress, "federation", seed)
            disturb = _disturbance(experiment, seed, happened)
            trained_on = _poisoned(experiment, seed, tables, data)
            clock: list[float] = []
            runs.append(_train(experiment, plan, trained_on, report, folder, disturb, clock))
            clocks += [clock] if clock else []
            if experiment.baselines:
                alone, together = _baselines(experiment, plan, tables, data, on_progress)
                local.append(alone)
                pooled.append(together)
    baselines = Baselines(local, pooled) if experiment.baselines else None
    seconds = time.perf_counter() - begin
    return ExperimentResult(experiment, names, runs, baselines, seconds, happened, clocks)


def train_baselines(
    experiment: Experiment, seed: int, on_progress: OnProgress
) -> tuple[Mapping[str, Metrics], Mapping[str, Metrics]]:
    """What one seed gives without a federation: each holder alone, and all data pooled.

    Returns:
        For each, holder → metrics.
    """
    plan = experiment.plan.model_copy(update={"seed": seed})
    return _baselines(experiment, plan, *_data_of(experiment, seed), on_progress)


def _baselines(
    experiment: Experiment,
    plan: TrainingPlan,
    tables: Mapping[str, HolderTables],
    data: Mapping[str, HolderData],
    on_progress: OnProgress,
) -> tuple[Mapping[str, Metrics], Mapping[str, Metrics]]:
    alone = {
        name: _alone(experiment, plan, name, own, partial(on_progress, f"{name} alone", plan.seed))
        for name, own in data.items()
    }
    pooled = _pooled(experiment, plan, tables, data, partial(on_progress, "pooled", plan.seed))
    return alone, pooled


def _data_of(
    experiment: Experiment, seed: int
) -> tuple[Mapping[str, HolderTables], Mapping[str, HolderData]]:
    """Every holder's rows, split with ``seed``, and the same encoded; made when asked for."""
    task, keep = experiment.task, _kept(experiment)
    tables = task.source.tables(experiment.holders)
    split = OnDemand(
        list(tables), lambda name: task.split(tables[name], holder=name, seed=seed), keep
    )
    return split, OnDemand(list(tables), lambda name: task.prepare(split[name]), keep)


def _kept(experiment: Experiment) -> int | None:
    """How many holders' data to keep; None for everybody's."""
    cohort = experiment.plan.cohort
    return None if cohort is None else COHORTS_KEPT * cohort


def _poisoned(
    experiment: Experiment,
    seed: int,
    tables: Mapping[str, HolderTables],
    data: Mapping[str, HolderData],
) -> Mapping[str, HolderData]:
    """The data as the federation trains on them, malicious holders' rows poisoned.

    Rows are poisoned before they are encoded, so it is the same for every task and engine.
    """
    byzantine = experiment.byzantine
    if byzantine is None or not byzantine.poisons:
        return data
    liars = byzantine.malicious(data, seed)

    def prepared(name: str) -> HolderData:
        if name not in liars:
            return data[name]
        task = experiment.task
        return task.prepare(byzantine.poisoned(tables[name], task.schema))

    return OnDemand(list(data), prepared, _kept(experiment))


def seeded_combination(plan: TrainingPlan) -> Combination:
    """A plan's combination of replies, with coins and noise that repeat."""
    return combination_of(plan, lambda number: SeededRandomness("coordinator", plan.seed, number))


Disturb = Callable[[BaseGrid], BaseGrid]
"""Puts a Grid around another one."""


def _as_it_is(grid: BaseGrid) -> BaseGrid:
    """Disturb nothing."""
    return grid


def _disturbance(experiment: Experiment, seed: int, happened: list[RoundFaults]) -> Disturb:
    """What puts time and faults into a run; what they did is appended to ``happened``."""
    plan, faults = experiment.plan, experiment.faults
    kind: type[FaultyGrid] = FaultyGrid
    if is_buffered(plan.strategy.name):
        kind = AsynchronousGrid
    elif plan.aggregation.kind != "plain":
        kind = FaultyMaskedGrid
    if faults is None and kind is not AsynchronousGrid and not plan.over_selection:
        return _as_it_is
    return lambda grid: kind(grid, faults or Faults(), seed, happened)


def _train(
    experiment: Experiment,
    plan: TrainingPlan,
    data: Mapping[str, HolderData],
    on_round: Callable[[RoundSummary], None],
    folder: RunFolder | None = None,
    disturb: Disturb = _as_it_is,
    clock: list[float] | None = None,
) -> RunResult:
    """The ServerApp of a deployment, on a Grid in this process.

    Args:
        experiment: what was asked.
        plan: of this run.
        data: by holder.
        on_round: called with every round's summary.
        folder: of the run; None keeps nothing.
        disturb: puts time and faults into it.
        clock: the simulated time at the end of each round is appended here, where there is any.
    """
    results: list[RunResult] = []
    with _grid(experiment, plan, data) as grid:
        disturbed = disturb(grid)

        def on_end_of(summary: RoundSummary) -> None:
            if clock is not None and isinstance(disturbed, FaultyGrid):
                clock.append(disturbed.now())
            on_round(summary)

        app = build_app(
            lambda _: (plan, experiment.task, folder),
            on_end_of,
            results.append,
            seeded_combination,
        )
        app(disturbed, Context(1, 1, {}, RecordDict(), {}))
    return results[0]


@contextmanager
def _grid(
    experiment: Experiment, plan: TrainingPlan, data: Mapping[str, HolderData]
) -> Iterator[BaseGrid]:
    """Reaches the holders through the engine that was asked for."""
    if experiment.engine == "opacus":
        with in_process(experiment.task, plan, data, experiment.device) as grid:
            yield grid
        return
    workers = workers_for(
        experiment.engine, experiment.task, data, experiment.device, experiment.address
    )
    try:
        yield BatchedGrid(list(data), workers)
    finally:
        workers.close()


def _alone(
    experiment: Experiment,
    plan: TrainingPlan,
    name: str,
    data: HolderData,
    on_round: Callable[[RoundSummary], None],
) -> Metrics:
    """A holder on its own: the same steps, noise and guarantee, nobody to learn with."""
    result = _train(experiment, solo_plan(plan), {name: data}, on_round)
    return result.final.metrics[name]


def _pooled(
    experiment: Experiment,
    plan: TrainingPlan,
    tables: Mapping[str, HolderTables],
    data: Mapping[str, HolderData],
    on_round: Callable[[RoundSummary], None],
) -> Mapping[str, Metrics]:
    """All rows in one place, judged on each holder's own held-out rows.

    Where parameters are private to a holder the pooled model has other ones, and is judged on the
    union.
    """
    task = experiment.task
    union = {POOLED: task.prepare(pooled_tables(tables))}
    result = _train(experiment, pooled_plan(plan, len(data)), union, on_round)
    if task.private_parameters:
        return {POOLED: result.final.metrics[POOLED]}
    parameters = torch.tensor(result.parameters)
    model = task.model(1)
    load_shared(task, model, parameters)
    model.eval()
    return {
        name: task.evaluate(model, scaled(own.test, plan.scaling)) for name, own in data.items()
    }
