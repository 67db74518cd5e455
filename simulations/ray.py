"""Blocks on a Ray cluster: one on this machine, or one that is there already.

    driver     cuts a round's jobs into bundles, each with a home          same place, same actor
               puts the round's parameters into the object store           once
    actor      trains its bundles, one torch thread; keeps data, model and assembled blocks
               answers with what is each holder's own; the bundle's sum stays in the object store
    actors     add the sums in pairs, and those in pairs, ...              ExactSum: any order
    driver     fetches one sum

An actor that has nothing left takes a bundle of the one that has most. One that dies is replaced,
and its bundle redone. Neither changes a bit of the result: what a bundle gives depends on the
bundle alone, and sums are exact.

Every machine of a cluster needs the same installation of this package and of the task's.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ConfigurationError, RunError
from common.tasks.base import HolderData, Task
from simulations.jobs import Assignment, Cut, Job, Judged, Outcome, Totals, merged
from simulations.workers import BlockTrainer

__all__ = ["RayWorkers", "cluster"]

_Result = TypeVar("_Result")

BUNDLES = 2
"""Bundles of each actor in a round: what it has not begun another can take."""

ATTEMPTS = 3
"""Workers that a bundle may cost, and times that sums may be lost with their machine."""

KNOCK = 10.0
"""Seconds that a cluster may take to accept a connection."""

PATIENCE = 300.0
"""Seconds until some actor must have started."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # An error reaches us once, with the answer; Ray would print it again for the sum's sake.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # Without a GPU there is nothing to hide from an actor, and nothing to warn of.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Ray's environment, where the user has not set it."""

_NOWHERE = torch.empty(0)
"""Stands for parameters that travel by themselves."""

Bundle = Sequence[tuple[Job, int]]
"""Jobs without their parameters, and which of those that come along are theirs."""


class RayWorkers:
    """Workers that are Ray actors of one thread each, or of one GPU.

    Where Ray runs in this process already, it is used as it is, and stays.

    Args:
        task: what is learned.
        data: every holder's, by key; sent once, and made where it is needed if on demand.
        device: of models and data, on the actors.
        address: of a cluster; None starts one on this machine, for as long as this object lives.
        workers: how many actors; None for as many as the cluster has CPUs (GPUs).

    Raises:
        ConfigurationError: Ray is not installed or there is no cluster at the address; it has
            nothing to compute on; or task and data cannot be sent.
    """

    def __init__(
        self,
        task: Task,
        data: Mapping[str, HolderData],
        device: torch.device,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        self._ray = _imported()
        self._is_ours = _connect(self._ray, address, workers)
        self._actors: dict[int, Any] = {}
        self._idle: set[int] = set()
        self._doing: dict[Any, _Doing] = {}
        self._lost_at_start = 0
        try:
            kind = "GPU" if device.type == "cuda" else "CPU"
            self._places = workers or _capacity(self._ray, kind)
            self._make = self._ray.remote(_Worker).options(
                num_cpus=1, num_gpus=int(kind == "GPU"), max_restarts=0
            )
            # An actor sees one GPU, whatever its number.
            self._materials = _stored(self._ray, task, data, torch.device(device.type))
            for place in range(self._places):
                self._hire(place)
        except BaseException:
            self.close()
            raise

    def measure(self, assignment: Assignment) -> Cut:
        """See :meth:`BlockTrainer.measure`."""
        (answer,) = self._do([_Errand("measure", (assignment,), 0)])
        cut: Cut = answer.value
        return cut

    def train(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """The outcome of every job, in their order; all totals come with the last.

        Raises:
            RunError: worker after worker dies.
        """
        for _ in range(1, ATTEMPTS):
            try:
                return iter(self._train(jobs))
            except self._ray.exceptions.ObjectLostError:
                continue  # a machine went, and with it sums of bundles that were done
        return iter(self._train(jobs))

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[list[Judged]]:
        """The metrics of every job's assignments, in their order.

        Raises:
            RunError: worker after worker dies.
        """
        answers = self._do(self._bundled("evaluate", jobs))
        return (metrics for answer in answers for metrics in answer.value)

    def close(self) -> None:
        """Let go of the actors, and of Ray where it was started here."""
        actors, self._actors = self._actors, {}
        self._idle.clear()
        self._doing.clear()
        if not self._ray.is_initialized():
            return
        for actor in actors.values():
            self._ray.kill(actor)
        if self._is_ours:
            self._ray.shutdown()

    # -- a round -----------------------------------------------------------------------------

    def _train(self, jobs: Sequence[Job]) -> list[Outcome]:
        answers = self._do(self._bundled("train", jobs))
        outcomes: list[Outcome] = [outcome for answer in answers for outcome in answer.value]
        if not all(job.individually for job in jobs):
            outcomes[-1] = replace(outcomes[-1], totals=self._sum(answers))
        return outcomes

    def _bundled(self, method: str, jobs: Sequence[Job]) -> list[_Errand]:
        """Jobs in bundles, for whom they were in the last round too."""
        stored = {id(job.parameters): job.parameters for job in jobs}
        which = {key: number for number, key in enumerate(stored)}
        parameters = [self._ray.put(tensor.numpy()) for tensor in stored.values()]
        count = min(len(jobs), BUNDLES * self._places)
        ends = [number * len(jobs) // max(1, count) for number in range(count + 1)]
        errands = []
        for number in range(count):
            bundle = [
                (replace(job, parameters=_NOWHERE), which[id(job.parameters)])
                for job in jobs[ends[number] : ends[number + 1]]
            ]
            home = number * self._places // count
            errands.append(_Errand(method, (bundle, *parameters), home))
        return errands

    def _sum(self, answers: Sequence[_Answer]) -> Totals:
        """Add bundles' sums where they are, in a tree; neighbours tend to be one actor's."""
        while len(answers) > 1:
            pairs = [answers[first : first + 2] for first in range(0, len(answers), 2)]
            errands = [
                _Errand("merge", (left.kept, right.kept), left.place)
                for left, right in (pair for pair in pairs if len(pair) == 2)
            ]
            left_over = [pair[0] for pair in pairs if len(pair) == 1]
            answers = [*self._do(errands), *left_over]
        totals: Totals = self._ray.get(answers[0].kept)
        return totals

    # -- who does what -----------------------------------------------------------------------

    def _hire(self, place: int) -> None:
        """Start an actor; it is idle when it is ready."""
        self._actors[place] = actor = self._make.remote()
        self._begin(place, actor, _Errand("prepare", (self._materials,), place))

    def _begin(
        self, place: int, actor: Any, errand: _Errand, call: _Call | None = None, index: int = 0
    ) -> None:
        method = getattr(actor, errand.method).options(num_returns=2)
        answer, kept = method.remote(*errand.arguments)
        self._doing[answer] = _Doing(place, kept, call, index)

    def _do(self, errands: Sequence[_Errand]) -> list[_Answer]:
        """Everything's answer, in order."""
        call = _Call(errands, self._places)
        while not call.is_done:
            for place in sorted(self._idle):
                index = call.next(place)
                if index is not None:
                    self._idle.discard(place)
                    self._begin(place, self._actors[place], errands[index], call, index)
            for answer in self._arrived():
                self._receive(answer, call)
        return call.answers

    def _arrived(self) -> list[Any]:
        """What is there; waits for something."""
        starting = all(doing.call is None for doing in self._doing.values())
        timeout = PATIENCE if starting else None
        arrived: list[Any]
        arrived, _ = self._ray.wait(list(self._doing), timeout=timeout)
        if not arrived:
            free = self._ray.available_resources().get("CPU", 0)
            raise RunError(
                f"no worker started within {PATIENCE:.0f} s; the Ray cluster has {free:g} free "
                "CPUs, and each worker needs one: wait until it is less busy, or add a machine"
            )
        return arrived

    def _receive(self, answer: Any, call: _Call) -> None:
        doing = self._doing.pop(answer)
        errors = self._ray.exceptions
        try:
            value = self._ray.get(answer)
        except errors.RayTaskError as error:
            if doing.call is None:
                self._replace(doing.place)
            else:
                self._idle.add(doing.place)
            if doing.call is None and isinstance(error.cause, errors.RaySystemError):
                raise _unloadable(error.cause) from error
            # Of a call that another error ended nobody wants to know.
            if doing.call in (None, call):
                raise error.cause from error
        except errors.RayError as error:
            self._replace(doing.place)
            self._died(doing, str(error))
        else:
            self._idle.add(doing.place)
            if doing.call is None:
                self._lost_at_start = 0
            else:
                doing.call.answered(doing.index, _Answer(value, doing.kept, doing.place))

    def _died(self, doing: _Doing, reason: str) -> None:
        if doing.call is not None:
            doing.call.failed(doing.index, reason)
            return
        self._lost_at_start += 1
        if self._lost_at_start >= ATTEMPTS:
            raise RunError(
                f"{ATTEMPTS} workers in a row died while they started; the last one: {reason}"
            )

    def _replace(self, place: int) -> None:
        self._ray.kill(self._actors[place])
        self._hire(place)


@dataclass(frozen=True)
class _Errand:
    """Something for an actor to do.

    Args:
        method: of :class:`_Worker`.
        arguments: or references to them.
        home: the place whose actor should do it.
    """

    method: str
    arguments: tuple[Any, ...]
    home: int


@dataclass(frozen=True)
class _Answer:
    """What came of an errand.

    Args:
        value: what the driver wants to see.
        kept: reference to what only other actors need.
        place: whose actor did it.
    """

    value: Any
    kept: Any
    place: int


@dataclass(frozen=True)
class _Doing:
    """What the actor of some place is at: an errand of a call, or its own preparation."""

    place: int
    kept: Any
    call: _Call | None
    index: int


class _Call:
    """Errands that are done together: which wait, which are answered, which failed how often."""

    def __init__(self, errands: Sequence[_Errand], places: int) -> None:
        self._errands = errands
        self._waiting: list[deque[int]] = [deque() for _ in range(places)]
        for index, errand in enumerate(errands):
            self._waiting[errand.home].append(index)
        self._answers: dict[int, _Answer] = {}
        self._failures: Counter[int] = Counter()

    @property
    def is_done(self) -> bool:
        """Whether everything is answered."""
        return len(self._answers) == len(self._errands)

    @property
    def answers(self) -> list[_Answer]:
        """In the errands' order."""
        return [self._answers[index] for index in range(len(self._errands))]

    def next(self, place: int) -> int | None:
        """What that place's actor does now: its own, or what would be somebody's last."""
        if self._waiting[place]:
            return self._waiting[place].popleft()
        longest = max(self._waiting, key=len)
        return longest.pop() if longest else None

    def answered(self, index: int, answer: _Answer) -> None:
        """Note an answer."""
        self._answers[index] = answer

    def failed(self, index: int, reason: str) -> None:
        """Have it done again, unless it cost too many workers already."""
        self._failures[index] += 1
        if self._failures[index] >= ATTEMPTS:
            raise RunError(
                f"{ATTEMPTS} workers died over the same block of holders; the last one: {reason}"
            )
        self._waiting[self._errands[index].home].appendleft(index)


# -- on the actor ---------------------------------------------------------------------------------


class _Worker:
    """An actor. Every method returns what the driver wants to see, and what only actors need."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._trainer: BlockTrainer

    def prepare(
        self, materials: tuple[Task, Mapping[str, HolderData], torch.device]
    ) -> tuple[None, None]:
        """Build the model; not in the constructor, whose errors Ray passes on as text."""
        self._trainer = BlockTrainer(*materials)
        return None, None

    def measure(self, assignment: Assignment) -> tuple[Cut, None]:
        """See :meth:`BlockTrainer.measure`."""
        return self._trainer.measure(assignment), None

    def train(
        self, bundle: Bundle, *parameters: NDArray[np.float32]
    ) -> tuple[list[Outcome], Totals]:
        """Outcomes without totals; and the totals of all of them."""
        outcomes = self._each(self._trainer.train, bundle, parameters)
        totals = merged(outcome.totals for outcome in outcomes)
        return [_to_send(outcome) for outcome in outcomes], totals

    def evaluate(
        self, bundle: Bundle, *parameters: NDArray[np.float32]
    ) -> tuple[list[list[Judged]], None]:
        """The metrics of every job's assignments."""
        return self._each(self._trainer.evaluate, bundle, parameters), None

    def merge(self, *parts: Totals) -> tuple[None, Totals]:
        """Add totals."""
        return None, merged(parts)

    def _each(
        self,
        call: Callable[[Job], _Result],
        bundle: Bundle,
        parameters: Sequence[NDArray[np.float32]],
    ) -> list[_Result]:
        # Copies: what Ray hands out is memory that other actors read too.
        tensors = [torch.tensor(array) for array in parameters]
        return [call(replace(job, parameters=tensors[which])) for job, which in bundle]


def _to_send(outcome: Outcome) -> Outcome:
    """Without totals; each update by itself, for a row is sent with the matrix it is of."""
    singles = {position: update.clone() for position, update in outcome.singles.items()}
    return replace(outcome, totals={}, singles=singles)


# -- Ray ------------------------------------------------------------------------------------------


@contextmanager
def cluster(address: str | None = None, workers: int | None = None) -> Iterator[None]:
    """Have Ray running for a while: workers that are made meanwhile share it, and start sooner.

    Args:
        address: of a cluster; None starts one on this machine.
        workers: the most actors that one on this machine is to run at once; None for its CPUs.

    Raises:
        ConfigurationError: Ray is not installed, or there is no cluster at the address.
    """
    ray = _imported()
    is_ours = _connect(ray, address, workers)
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()


def _imported() -> Any:
    """The module; untyped, because it is an extra."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            "the engine 'ray' needs Ray, which is not installed: pip install 'sotto[ray]', or use "
            "the engine 'batched'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None, workers: int | None) -> bool:
    """Have Ray running; returns whether it was not before."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        return True
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"there is no Ray cluster to use at {address!r}: {error}; give the address as "
            "ray://HOST:PORT, or leave it out to start one on this machine"
        ) from error
    return True


def _knock(address: str) -> None:
    """Fail at once where nobody listens: Ray itself would try for minutes, deaf to signals."""
    there = urlsplit(address if "://" in address else f"//{address}")
    if there.hostname and there.port:
        socket.create_connection((there.hostname, there.port), timeout=KNOCK).close()


def _capacity(ray: Any, kind: str) -> int:
    """How many actors fit."""
    there = int(ray.cluster_resources().get(kind, 0))
    if not there:
        raise ConfigurationError(
            f"the Ray cluster has no {kind}, and each worker needs one; choose another device or "
            f"add a machine with a {kind}"
        )
    return there


def _stored(ray: Any, task: Task, data: Mapping[str, HolderData], device: torch.device) -> Any:
    """Reference to what every actor starts with."""
    try:
        return ray.put((task, data, device))
    except Exception as error:  # whatever the objects raise when they are taken apart
        # Ray surrounds a TypeError with a page of advice.
        reason = error.__cause__ or error
        raise ConfigurationError(
            f"task {task.name!r} or its data cannot be sent to Ray's workers: {reason}; what they "
            "hold must be picklable: no locks, files or connections"
        ) from error


def _unloadable(cause: Exception) -> ConfigurationError:
    """What arrived could not be put together."""
    reason = str(cause).strip().splitlines()[0]
    return ConfigurationError(
        f"a worker of the Ray cluster cannot load the task and its data: {reason}; every machine "
        "needs the same installation as this one, the package of the task included"
    )
