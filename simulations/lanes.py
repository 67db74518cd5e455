"""Runs in lockstep: many coordinators' rounds as one round of their holders' blocks.

A linear strategy works on each coordinate by itself, so one instance serves all runs of a stack
whose coordinators do the same: their models, end to end, are one long vector to it. A robust one
compares whole updates, and every run has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.tasks.base import Task
from common.tasks.parameters import initial_parameters
from common.wire import PARAMETERS, TrainReply, array_of
from server.aggregation import STRATEGIES, build_strategy, snapshot
from server.checkpoints import RunState
from server.rounds import cohort_of, result_of
from simulations.jobs import Assignment, Cut, Job, Outcome, Private, Totals, gather, jobs_of
from simulations.results import Metrics
from simulations.unseen import mean_of
from simulations.workers import Workers

__all__ = ["Member", "Result", "Run", "Stack", "stacks_of"]

STACK_UNITS = 2**18
"""Training units in one stack, roughly: more gain nothing from company, and an interruption costs
the stack that is under way."""


@dataclass(frozen=True)
class Member:
    """A holder of a run: its name, which names its random streams, and the key of its data."""

    name: str
    data: str


@dataclass(frozen=True)
class Run:
    """One coordinator and its holders.

    Args:
        key: names it among all runs.
        plan: with its own seed.
        members: who trains.
        judged: whose held-out units the model is judged on.
    """

    key: str
    plan: TrainingPlan
    members: tuple[Member, ...]
    judged: tuple[Member, ...]

    @property
    def units(self) -> float:
        """Units in a step, nominally."""
        return len(self.members) * self.plan.expected_batch_size

    @property
    def work(self) -> float:
        """Units in all steps, nominally; a step of nobody is work too."""
        return self.plan.rounds * self.plan.local_steps * (OVERHEAD + self.units)


OVERHEAD = 100.0
"""Units that cost as much as a step without any, roughly."""


@dataclass(frozen=True)
class Result:
    """What came of a run: metrics by holder, or why there are none."""

    metrics: Mapping[str, Metrics] = field(default_factory=dict)
    failed: str = ""


class _OneNode(BaseGrid):
    """What a strategy sees of a stack: a single node that answers with everybody's mean."""

    def get_node_ids(self) -> list[int]:
        return [2]

    def holder_name(self, node_id: int) -> str:
        return f"node-{node_id}"

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        raise NotImplementedError("a stack trains its holders itself")


class _Lane:
    """A strategy, its state, and the runs that it serves.

    Args:
        task: of all runs.
        runs: with one coordinator's settings; several only where the strategy is linear.
    """

    def __init__(self, task: Task, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._plan = runs[0].plan
        self._strategy = build_strategy(self._plan)
        self._grid = _OneNode()
        first = [initial_parameters(task, run.plan.seed) for run in runs]
        self._state = RunState("sweep", 0, np.concatenate(first))

    @property
    def parameters(self) -> Tensor:
        """Each run's model, [n, D]."""
        return torch.tensor(self._state.parameters).view(len(self.runs), -1)

    @property
    def released(self) -> Tensor:
        """Each run's model as it would be released, [n, D]."""
        return torch.tensor(self._state.released).view(len(self.runs), -1)

    def advance(self, number: int, replies: Sequence[TrainReply]) -> None:
        """Aggregate a round: one reply that is everybody's mean, or one from each holder."""
        old = self._state.parameters
        asked = self._strategy.configure_train(
            number, ArrayRecord({PARAMETERS: array_of(old)}), ConfigRecord(), self._grid
        )
        (request,) = asked
        messages = [Message(reply.parameters(old), reply_to=request) for reply in replies]
        arrays, _ = self._strategy.aggregate_train(number, messages)
        self._state = self._state.advanced(
            result_of(arrays, old),
            snapshot(self._plan.strategy.name, self._strategy),
            average=number > self._plan.average_from * self._plan.rounds,
        )


class Stack:
    """Runs that advance together.

    Args:
        task: of all runs.
        runs: as :func:`stacks_of` groups them.
    """

    def __init__(self, task: Task, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._linear = STRATEGIES[runs[0].plan.strategy.name].linear
        groups = [list(runs)] if self._linear else [[run] for run in runs]
        self._lanes = [_Lane(task, group) for group in groups]
        self._failed: dict[int, str] = {}
        self._private: dict[tuple[int, str], Private] = {}
        self._cut: Cut | None = None

    @property
    def rounds(self) -> int:
        """How many there are."""
        return self.runs[0].plan.rounds

    @property
    def work(self) -> float:
        """As :attr:`Run.work`."""
        return sum(run.work for run in self.runs)

    @property
    def released(self) -> Tensor:
        """Each run's model as it would be released now, in the order of the runs: [n, D]."""
        return torch.cat([lane.released for lane in self._lanes])

    def train(self, workers: Workers) -> Iterator[int]:
        """Every round, yielding its number when it is done."""
        for number in range(1, self.rounds + 1):
            assignments = self._assignments(number)
            if assignments:
                self._round(number, assignments, workers)
            yield number

    def judge(self, workers: Workers) -> dict[str, Result]:
        """Every run's result, by key."""
        assignments = [
            Assignment(member.name, member.data, run.plan, point)
            for point, run in self._alive()
            for member in self._judges(run)
        ]
        jobs = self._jobs(assignments, self.rounds, self.released, workers) if assignments else []
        judged = (figures for job in workers.evaluate(jobs) for figures in job)
        results = {self.runs[point].key: Result(failed=why) for point, why in self._failed.items()}
        metrics: dict[str, dict[str, Metrics]] = {run.key: {} for _, run in self._alive()}
        for one, figures in zip(assignments, judged, strict=True):
            if not isinstance(figures, str):
                metrics[self.runs[one.point].key][one.holder] = figures.metrics
        return results | {key: Result(figures) for key, figures in metrics.items()}

    # -- inside ------------------------------------------------------------------------------

    def _alive(self) -> list[tuple[int, Run]]:
        return [(point, run) for point, run in enumerate(self.runs) if point not in self._failed]

    def _judges(self, run: Run) -> list[Member]:
        places = range(len(run.judged))
        return [
            run.judged[place] for place in cohort_of(places, run.plan, self.rounds, "evaluation")
        ]

    def _assignments(self, number: int) -> list[Assignment]:
        """This round's, holders that share data next to each other."""
        chosen = [
            Assignment(member.name, member.data, run.plan, point)
            for point, run in self._alive()
            for member in (
                run.members[place] for place in cohort_of(range(len(run.members)), run.plan, number)
            )
        ]
        return sorted(chosen, key=lambda one: (one.data, one.point))

    def _jobs(
        self,
        assignments: Sequence[Assignment],
        number: int,
        parameters: Tensor,
        workers: Workers,
    ) -> list[Job]:
        if self._cut is None:
            self._cut = workers.measure(assignments[0])
        private = {
            place: self._private[one.point, one.holder]
            for place, one in enumerate(assignments)
            if (one.point, one.holder) in self._private
        }
        return jobs_of(
            assignments, self._cut, number, parameters, private, individually=not self._linear
        )

    def _round(self, number: int, assignments: Sequence[Assignment], workers: Workers) -> None:
        parameters = torch.cat([lane.parameters for lane in self._lanes])
        gathered = _Gathered(parameters)
        jobs = self._jobs(assignments, number, parameters, workers)
        for job, outcome in zip(jobs, workers.train(jobs), strict=True):
            gathered.add(job, outcome)
            for place, private in outcome.private.items():
                one = job.assignments[place]
                self._private[one.point, one.holder] = private
        for point, run in self._alive():
            why = gathered.shortfall(point, run.plan, number)
            if why:
                self._failed[point] = why
        first = 0
        for lane in self._lanes:
            points = {first + place: run.plan for place, run in enumerate(lane.runs)}
            first += len(lane.runs)
            if any(point not in self._failed for point in points):
                lane.advance(number, gathered.replies(points, self._failed, self._linear))


class _Gathered:
    """A round's updates, by point.

    Args:
        parameters: what the round began with, [P, D].
    """

    def __init__(self, parameters: Tensor) -> None:
        self._parameters = parameters
        self._asked: dict[int, int] = {}
        self._totals: Totals = {}
        self._singles: dict[int, list[TrainReply]] = {}
        self._refused: dict[int, int] = {}

    def add(self, job: Job, outcome: Outcome) -> None:
        """Take in what came of a job."""
        for one in job.assignments:
            self._asked[one.point] = self._asked.get(one.point, 0) + 1
        gather(self._totals, outcome.totals)
        for place in (*outcome.failed, *outcome.declined):
            self._refuse(job.assignments[place].point)
        for place, update in outcome.singles.items():
            one = job.assignments[place]
            # Where the sum was wanted, what is not in it is not allowed.
            bound = one.plan.largest_update_norm(len(update)) if job.individually else -1.0
            if float(update.norm()) <= bound:
                reply = TrainReply(update.numpy(), outcome.weights[place])
                self._singles.setdefault(one.point, []).append(reply)
            else:
                self._refuse(one.point)

    def _refuse(self, point: int) -> None:
        self._refused[point] = self._refused.get(point, 0) + 1

    def shortfall(self, point: int, plan: TrainingPlan, number: int) -> str:
        """Why a run cannot go on; empty if it can."""
        accepted = self._asked[point] - self._refused.get(point, 0)
        if accepted >= plan.min_holders:
            return ""
        return (
            f"round {number}: {accepted} of at least {plan.min_holders} updates were accepted; "
            "others failed, are not finite, or are larger than the plan allows; a lower learning "
            "rate may help"
        )

    def replies(
        self, points: Mapping[int, TrainingPlan], failed: Mapping[int, str], linear: bool
    ) -> list[TrainReply]:
        """What a lane's strategy gets: one mean of each run end to end, or every update.

        Args:
            points: of the lane's runs, in order, with their plans.
            failed: points of runs that have ended.
            linear: whether the strategy needs only means.
        """
        if not linear:
            (point,) = points
            return self._singles[point]
        still = torch.zeros(self._parameters.shape[1])
        means = [
            still if point in failed else mean_of(plan, self._totals[point])
            for point, plan in points.items()
        ]
        return [TrainReply(torch.cat(means).numpy(), 1.0)]


def stacks_of(task: Task, runs: Sequence[Run]) -> Iterator[Stack]:
    """Group runs whose coordinators do the same, into stacks of bounded size."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(_coordinator(run.plan), []).append(run)
    for group in groups.values():
        stack: list[Run] = []
        units = 0.0
        for run in group:
            if stack and units + run.units > STACK_UNITS:
                yield Stack(task, stack)
                stack, units = [], 0.0
            stack.append(run)
            units += run.units
        yield Stack(task, stack)


def _coordinator(plan: TrainingPlan) -> object:
    """What two plans must share to be stacked: all that the coordinator does with updates."""
    return (
        plan.rounds,
        plan.average_from,
        plan.strategy.model_dump_json(),
        plan.privacy.kind,
        plan.aggregation.kind,
        plan.optimizer,
    )
