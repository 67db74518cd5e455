"""Blocks on the cores of this machine: copies of this process, made when there is work for them.

Threads would wait for one another: between two small products each needs Python's lock. A fork
costs some milliseconds and shares the data that are loaded; each process computes with one thread,
as many of them as torch would use threads. The first is this one, which does its share too.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from simulations.jobs import Assignment, Cut, Job, Judged, Outcome, Totals, gather
from simulations.workers import BlockTrainer

__all__ = ["Processes"]

logger = logging.getLogger("sotto.simulation")

_NOWHERE = torch.empty(0, 0)

AWAKE = 0.02
"""Seconds: more than lies between the rounds of a small federation."""

_OUR_ENDS: set[Connection] = set()
"""Of the pipes to all copies that this process has."""


class Processes:
    """Workers that are this process and copies of it.

    A copy that dies has its share done here, with the same result.

    Args:
        trainer: of this process; the copies inherit it.
        number: of processes; None for as many as torch would use threads. One, where a process
            cannot be copied.
    """

    def __init__(self, trainer: BlockTrainer, number: int | None = None) -> None:
        can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        self._number = (number or torch.get_num_threads()) if can_fork else 1
        self._trainer = trainer
        self._copies: list[_Copy] = []
        self._threads: int | None = None

    def measure(self, assignment: Assignment) -> Cut:
        """See :meth:`BlockTrainer.measure`."""
        return self._trainer.measure(assignment)

    def train(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """The outcome of every job, in their order."""
        return iter(self._shared("train", jobs))

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[list[Judged]]:
        """The metrics of every job's assignments, in their order."""
        return iter(self._shared("evaluate", jobs))

    def close(self) -> None:
        """End the copies."""
        for copy in self._copies:
            copy.end()
        self._copies = []
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None

    def _shared(self, method: str, jobs: Sequence[Job]) -> list[Any]:
        number = min(self._number, len(jobs))
        if number < 2:
            return self._here(method, jobs, range(len(jobs)))
        if self._threads is None:
            # Two threads here would wait for a core that a copy has, at every operation.
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)
        while len(self._copies) < self._number - 1:
            self._copies.append(_Copy(self._trainer))
        copies = self._copies[: number - 1]
        shares = [range(first, len(jobs), number) for first in range(number)]
        for copy, share in zip(copies, shares[1:], strict=True):
            copy.ask(method, [jobs[place] for place in share])
        answers: dict[int, Any] = {}
        try:
            answers |= zip(shares[0], self._here(method, jobs, shares[0]), strict=True)
            for copy, share in zip(copies, shares[1:], strict=True):
                answers |= zip(share, self._answer(copy, method, jobs, share), strict=True)
        except BaseException:
            self.close()  # an answer that nobody reads would be taken for the next one's
            raise
        return [answers[place] for place in range(len(jobs))]

    def _answer(
        self, copy: _Copy, method: str, jobs: Sequence[Job], share: Sequence[int]
    ) -> list[Any]:
        try:
            return copy.answer()
        except (EOFError, ConnectionError):
            logger.warning("a worker process died; its part of the round is done again")
            self._copies.remove(copy)
            copy.end()
            return self._here(method, jobs, share)

    def _here(self, method: str, jobs: Sequence[Job], share: Sequence[int]) -> list[Any]:
        return _done(self._trainer, method, [jobs[place] for place in share])


class _Copy:
    """A copy of this process that does jobs until it is told to end.

    Args:
        trainer: what it does them with.
    """

    def __init__(self, trainer: BlockTrainer) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        _OUR_ENDS.add(self._pipe)
        self._process = context.Process(target=_serve, args=(theirs, trainer), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, jobs: Sequence[Job]) -> None:
        """Hand over jobs of one round; the parameters, which they share, once."""
        bare = [replace(job, parameters=_NOWHERE) for job in jobs]
        with suppress(ConnectionError):  # if it has died, that shows when its answer is read
            self._pipe.send((method, jobs[0].parameters.numpy(), bare))

    def answer(self) -> list[Any]:
        """What came of them; raises what they raised."""
        _watch(self._pipe)
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        done: list[Any] = answer
        return done

    def end(self) -> None:
        """End it, whatever it is doing."""
        _OUR_ENDS.discard(self._pipe)
        self._pipe.close()
        self._process.kill()  # it has nothing to put away
        self._process.join()


def _done(trainer: BlockTrainer, method: str, jobs: Sequence[Job]) -> list[Any]:
    """What came of some jobs; all totals with the last, so that there is one sum to hand over."""
    if method == "evaluate":
        return [trainer.evaluate(job) for job in jobs]
    outcomes: list[Outcome] = []
    totals: Totals = {}
    for job in jobs:
        outcome = trainer.train(job)
        gather(totals, outcome.totals)
        outcomes.append(replace(outcome, totals={}))
    if outcomes:
        outcomes[-1] = replace(outcomes[-1], totals=totals)
    return outcomes


def _watch(pipe: Connection) -> None:
    """Wait a moment for something to read, awake.

    Who sleeps is often woken on the core of whoever wrote, and then both share that one.
    """
    end = time.perf_counter() + AWAKE
    while not pipe.poll() and time.perf_counter() < end:
        pass


def _serve(pipe: Connection, trainer: BlockTrainer) -> None:
    """The life of a copy."""
    # An interruption ends the process that we are a copy of, and with its pipe us: unless we, or
    # a copy that was made after us, hold the other end of the pipe too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for end in _OUR_ENDS:
        end.close()
    torch.set_num_threads(1)
    while True:
        try:
            _watch(pipe)
            method, parameters, bare = pipe.recv()
        except (EOFError, ConnectionError):
            return
        shared = torch.tensor(parameters)
        jobs = [replace(job, parameters=shared) for job in bare]
        try:
            answer: Any = _done(trainer, method, jobs)
        except Exception as error:
            answer = error
        try:
            pipe.send(answer)
        except ConnectionError:
            return
