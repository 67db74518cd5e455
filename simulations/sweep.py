"""Sweeps: many settings and seeds as further entries of the stacked dimension.

Every setting with every seed is a run, and so are its baselines. Runs whose coordinators do the
same (rounds, strategy, averaging) advance in lockstep: their holders train in common blocks, each
with its own plan and from its own model, and a linear strategy, which works on each coordinate by
itself, averages all of their models as if they were one long one. What is finished is written
down, so that an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from common.data.on_demand import OnDemand
from common.durable import write_bytes
from common.errors import ConfigurationError, StateError
from common.flower import quiet_flower
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks.base import HolderData, HolderTables, Task
from server.aggregation import build_strategy, is_buffered
from simulations.baselines import POOLED, pooled_plan, pooled_tables, solo_plan
from simulations.engines import workers_for
from simulations.lanes import Member, Result, Run, stacks_of
from simulations.results import Metrics
from simulations.workers import Workers

__all__ = ["Finished", "Setting", "Sweep", "SweepResult", "run_sweep"]

FEDERATION, LOCAL = "federation", "local"


@dataclass(frozen=True)
class Setting:
    """One combination of the values that are swept.

    Args:
        values: setting → value, as the user named them.
        plan: calibrated; each run replaces its seed.
    """

    values: Mapping[str, Any]
    plan: TrainingPlan


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Args:
        task: on its source.
        settings: at least one.
        seeds: of each setting.
        holders: how many; None for the source's own number.
        baselines: whether to train each holder alone, and all data pooled, for comparison.
    """

    task: Task
    settings: Sequence[Setting]
    seeds: Sequence[int]
    holders: int | None = None
    baselines: bool = True

    @classmethod
    def over(
        cls,
        task: Task,
        settings: Mapping[str, Any],
        seeds: Sequence[int] = (0,),
        *,
        holders: int | None = None,
        baselines: bool = True,
    ) -> Sweep:
        """Every combination of the settings that are lists, the first one varying slowest.

        What is not set is what the task recommends at that ε. Everyone who is asked must answer,
        unless ``min_holders`` says otherwise or a masked sum has its own threshold, and models are
        judged when they are finished.

        Args:
            task: on its source.
            settings: as for ``plan_for``, but each may be a list of values; an infinite
                ``epsilon`` means no differential privacy.
            seeds: of each combination.
            holders: how many; None for the source's own number.
            baselines: whether to train each holder alone, and all data pooled.

        Raises:
            ConfigurationError: a value is given twice, or a combination makes no plan.
        """
        lists = {name: _distinct(name, value) for name, value in settings.items()}
        count = len(task.source.tables(holders))
        combinations = [
            dict(zip(lists, values, strict=True)) for values in product(*lists.values())
        ]
        return cls(
            task,
            [
                Setting(
                    {name: chosen[name] for name, values in lists.items() if len(values) > 1},
                    _plan(task, chosen, holders, count),
                )
                for chosen in combinations
            ],
            list(seeds),
            holders,
            baselines,
        )

    @property
    def swept(self) -> dict[str, list[Any]]:
        """Settings that differ, with their values in order."""
        names = self.settings[0].values
        return {
            name: list(dict.fromkeys(setting.values[name] for setting in self.settings))
            for name in names
        }


def _distinct(name: str, value: Any) -> list[Any]:
    """The values of a setting."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    twice = [each for each, times in Counter(values).items() if times > 1]
    if twice or not values:
        what = f"{twice[0]!r} twice" if twice else "no value"
        raise ConfigurationError(f"{name} has {what}; give each value once")
    return values


def _plan(task: Task, chosen: Mapping[str, Any], holders: int | None, count: int) -> TrainingPlan:
    """The plan of one combination."""
    settings = dict(chosen)
    if settings.get("epsilon") == math.inf:
        settings |= {"epsilon": None, "no_dp": True}
    if settings.get("min_holders") is None and settings.get("aggregation", "plain") == "plain":
        settings["min_holders"] = min(count, settings.get("cohort") or count)
    plan = plan_for(task, settings, holders=holders)
    if plan.privacy.kind == "central":
        raise ConfigurationError(
            "a sweep trains with each holder's own noise; where holders are the unit, run 'sotto "
            "simulate' for each setting"
        )
    build_strategy(plan)  # refuses one that there is not, or that lacks holders
    if plan.over_selection or is_buffered(plan.strategy.name):
        raise ConfigurationError(
            "a sweep has no time, so nobody in it is faster than another; where that matters "
            "(over_selection, strategy 'fedbuff'), run 'sotto simulate' for each setting"
        )
    return plan.model_copy(update={"evaluate_every": plan.rounds})


@dataclass(frozen=True)
class Finished:
    """One run's result.

    Args:
        setting: position in the sweep.
        seed: of the run.
        kind: ``federation``, ``local`` or ``pooled``.
        metrics: holder → metrics of the final model.
        failed: why it has none; empty if it has.
    """

    setting: int
    seed: int
    kind: str
    metrics: Mapping[str, Metrics]
    failed: str = ""


@dataclass(frozen=True)
class SweepResult:
    """Every run's result.

    Args:
        sweep: what was asked.
        holders: names.
        finished: runs.
        seconds: wall time of this call.
    """

    sweep: Sweep
    holders: Sequence[str]
    finished: Sequence[Finished]
    seconds: float

    def of(self, setting: int, kind: str) -> list[Finished]:
        """The runs of one setting, by seed; a baseline's runs of one seed put together."""
        runs: dict[int, Finished] = {}
        for one in self.finished:
            if (one.setting, one.kind) == (setting, kind):
                before = runs.get(one.seed)
                runs[one.seed] = one if before is None else _joined(before, one)
        return [runs[seed] for seed in sorted(runs)]


def _joined(first: Finished, second: Finished) -> Finished:
    return Finished(
        first.setting,
        first.seed,
        first.kind,
        {**first.metrics, **second.metrics},
        first.failed or second.failed,
    )


MakeWorkers = Callable[[Mapping[str, HolderData]], Workers]
"""Makes workers that compute blocks, from the data of every seed's holders."""

OnBegin = Callable[[int, int], None]
"""Called with how many runs the folder holds already, and how many there are."""

OnProgress = Callable[[float, str], None]
"""Called with the share of the work that is done, and what is being done."""


def _silent(*_: object) -> None:
    """Report nothing."""


def run_sweep(
    sweep: Sweep,
    make_workers: MakeWorkers | None = None,
    folder: Path | None = None,
    on_progress: OnProgress = _silent,
    on_begin: OnBegin = _silent,
) -> SweepResult:
    """Run everything that ``folder`` does not hold yet.

    Args:
        sweep: what to run.
        make_workers: see :data:`MakeWorkers`; None for the cores of this machine.
        folder: finished runs are kept here; None keeps nothing.
        on_progress: see :data:`OnProgress`.
        on_begin: see :data:`OnBegin`.

    Raises:
        ConfigurationError: a setting cannot be stacked.
        StateError: what the folder holds cannot be read.
    """
    begin = time.perf_counter()
    quiet_flower()
    seeds = _Seeds(sweep)
    parts = list(_parts(sweep, seeds))
    runs = {part.run.key: part.run for part in parts}  # settings may have a baseline in common
    notes = _Notes(folder)
    todo = [run for key, run in runs.items() if key not in notes.results]
    on_begin(len(runs) - len(todo), len(runs))
    if todo:
        workers = (make_workers or _cores(sweep.task))(seeds.data)
        _run_all(sweep.task, todo, workers, notes, on_progress)
    finished = [
        Finished(part.setting, part.run.plan.seed, part.kind, result.metrics, result.failed)
        for part in parts
        for result in (notes.results[part.run.key],)
    ]
    return SweepResult(sweep, seeds.names, finished, time.perf_counter() - begin)


def _run_all(
    task: Task, runs: Sequence[Run], workers: Workers, notes: _Notes, on_progress: OnProgress
) -> None:
    """Compute these runs, stack by stack, and note each stack's results down."""
    total, spent = sum(run.work for run in runs), 0.0
    try:
        for stack in stacks_of(task, runs):
            for number in stack.train(workers):
                share = (spent + stack.work * number / stack.rounds) / total
                on_progress(share, f"{len(stack.runs)} runs of {stack.rounds} rounds")
            notes.add(stack.judge(workers))
            spent += stack.work
    finally:
        workers.close()


def _cores(task: Task) -> MakeWorkers:
    return lambda data: workers_for("batched", task, data, torch.device("cpu"))


# -- runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A run's place in the sweep."""

    setting: int
    kind: str
    run: Run


def _parts(sweep: Sweep, seeds: _Seeds) -> Iterator[_Part]:
    """Every run: the federation, and with baselines each holder alone and all data pooled."""
    names, digests = seeds.names, seeds.digests

    def run(plan: TrainingPlan, members: tuple[Member, ...], judged: tuple[Member, ...]) -> Run:
        return Run(_name(plan, members, judged, digests), plan, members, judged)

    for place, setting in enumerate(sweep.settings):
        for seed in sweep.seeds:
            plan = setting.plan.model_copy(update={"seed": seed})
            members = tuple(Member(name, _key(seed, name)) for name in names)
            yield _Part(place, FEDERATION, run(plan, members, members))
            if not sweep.baselines:
                continue
            for member in members:
                yield _Part(place, LOCAL, run(solo_plan(plan), (member,), (member,)))
            union = (Member(POOLED, _key(seed, POOLED)),)
            judged = union if sweep.task.private_parameters else members
            yield _Part(place, POOLED, run(pooled_plan(plan, len(names)), union, judged))


def _name(
    plan: TrainingPlan,
    members: Sequence[Member],
    judged: Sequence[Member],
    digests: Mapping[str, str],
) -> str:
    """Names a run by everything that decides its result: the plan, who, and whose rows."""
    who = [[[member.name, digests[member.name]] for member in part] for part in (members, judged)]
    return hashlib.sha256(f"{plan.digest} {json.dumps(who)}".encode()).hexdigest()


def _key(seed: int, name: str) -> str:
    return f"{seed}/{name}"


class _Seeds:
    """Every seed's split of every holder's rows, made when it is needed.

    Args:
        sweep: whose task and seeds.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._task = sweep.task
        self._tables = sweep.task.source.tables(sweep.holders)
        self.names = list(self._tables)
        own = {name: _digest(table) for name, table in self._tables.items()}
        everyone = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        self.digests: Mapping[str, str] = {**own, POOLED: everyone}
        keys = [_key(seed, name) for seed in sweep.seeds for name in (*self.names, POOLED)]
        self.data: Mapping[str, HolderData] = OnDemand(keys, self._prepared)

    def _prepared(self, key: str) -> HolderData:
        seed, _, name = key.partition("/")
        if name != POOLED:
            return self._task.prepare(self._split(int(seed), name))
        return self._task.prepare(
            pooled_tables({each: self._split(int(seed), each) for each in self.names})
        )

    def _split(self, seed: int, name: str) -> HolderTables:
        return self._task.split(self._tables[name], holder=name, seed=seed)


def _digest(table: pd.DataFrame) -> str:
    """Of a holder's rows: a file of the same name may hold others the next time."""
    rows = pd.util.hash_pandas_object(table, index=False).to_numpy()
    return hashlib.sha256(rows.tobytes() + json.dumps(list(table)).encode()).hexdigest()


# -- what is finished -----------------------------------------------------------------------------


class _Notes:
    """Results of finished runs, a line each in ``runs.jsonl``.

    Args:
        folder: where; None keeps them in memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / "runs.jsonl"
        self.results: dict[str, Result] = {}
        if self._path is not None and self._path.exists():
            # A line that an interruption cut short is a run that is not finished.
            *whole, _ = self._path.read_text().split("\n")
            self.results = dict(_read(line, self._path) for line in whole)
            write_bytes(self._path, "".join(line + "\n" for line in whole).encode())

    def add(self, results: Mapping[str, Result]) -> None:
        """Note results down before anything else is begun."""
        self.results |= results
        if self._path is None:
            return
        lines = [
            json.dumps(
                {"run": key, "metrics": _without_nan(result.metrics), "failed": result.failed}
            )
            for key, result in results.items()
        ]
        with self._path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))


def _read(line: str, path: Path) -> tuple[str, Result]:
    try:
        values = json.loads(line)
        metrics = {
            holder: {name: math.nan if value is None else value for name, value in own.items()}
            for holder, own in values["metrics"].items()
        }
        return values["run"], Result(metrics, values["failed"])
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise StateError(
            f"{path} has a line that is not a run's result: {line[:80]!r}; move the file away to "
            "begin anew"
        ) from None


def _without_nan(metrics: Mapping[str, Metrics]) -> dict[str, dict[str, float | None]]:
    return {
        holder: {name: None if math.isnan(value) else value for name, value in own.items()}
        for holder, own in metrics.items()
    }
