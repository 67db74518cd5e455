"""Copies of this process: the bits of one process, whatever becomes of the copies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, HolderData, Task
from simulations.jobs import Assignment, Cut, Job, Judged, Outcome, jobs_of, merged
from simulations.processes import Processes
from simulations.workers import BlockTrainer, InProcess, Workers
from tests.tiny import TinyTask

CPU = torch.device("cpu")
HOLDERS = 14
SMALL = Cut(holders=2, a_unit=16)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

Round = tuple[list[Outcome], list[list[Judged]]]


def trainer_of(task: Task) -> BlockTrainer:
    return BlockTrainer(task, task.holder_data(HOLDERS), CPU)


def jobs(task: Task, number: int = 1, private: Mapping[int, object] | None = None) -> list[Job]:
    wanted = plan_for(task, {"epsilon": 3.0, "rounds": 3, "local_steps": 2, "weighting": "size"})
    names = list(task.source.tables(HOLDERS))
    assignments = [Assignment(name, name, wanted, place % 2) for place, name in enumerate(names)]
    size = BlockTrainer(task, {}, CPU).dimension
    parameters = torch.linspace(-1, 1, 2 * size).view(2, -1)
    return jobs_of(assignments, SMALL, number, parameters, private)  # type: ignore[arg-type]


def children() -> set[int]:
    """Processes that this one has started and that live, by id."""
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return {int(number) for number in own.read_text().split()}


@contextmanager
def processes(task: Task, number: int) -> Iterator[Processes]:
    there = Processes(trainer_of(task), number)
    try:
        yield there
    finally:
        there.close()


def a_round(workers: Workers, work: Sequence[Job]) -> Round:
    return list(workers.train(work)), list(workers.evaluate(work))


def assert_same(one: Round, other: Round) -> None:
    """In every bit."""
    totals = [merged(outcome.totals for outcome in each[0]) for each in (one, other)]
    assert totals[0].keys() == totals[1].keys() == {0, 1}
    for point in totals[0]:
        assert torch.equal(totals[0][point].sum.total(), totals[1][point].sum.total())
        assert totals[0][point].weight == totals[1][point].weight
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert (ours.failed, ours.weights) == (theirs.failed, theirs.weights)
        assert ours.private.keys() == theirs.private.keys()
        for place, private in ours.private.items():
            for name, value in private.items():
                assert torch.equal(value, theirs.private[place][name])
    assert one[1] == other[1]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "task", [TinyTask(), load("recommendation")], ids=["tiny", "recommendation"]
)
def test_any_number_of_processes_gives_the_bits_of_one(task: Task, number: int) -> None:
    alone = InProcess(trainer_of(task))
    with processes(task, number) as together:
        private: dict[int, object] = {}
        for round_number in (1, 2):
            work = jobs(task, round_number, private)
            expected, found = a_round(alone, work), a_round(together, work)
            assert_same(found, expected)
            first = 0
            for job, outcome in zip(work, expected[0], strict=True):
                private |= {first + place: own for place, own in outcome.private.items()}
                first += len(job.assignments)
        assert len(together._copies) == number - 1


def test_the_rounds_differ() -> None:
    """Else the comparisons here would show little."""
    alone = InProcess(trainer_of(TinyTask()))
    first, second = (a_round(alone, jobs(TinyTask(), number)) for number in (1, 2))
    with pytest.raises(AssertionError):
        assert_same(first, second)


def test_a_copy_that_was_killed_between_rounds_has_its_share_done_again() -> None:
    task = TinyTask()
    alone = InProcess(trainer_of(task))
    with processes(task, 3) as together:
        for number in (1, 2, 3):
            work = jobs(task, number)
            assert_same(a_round(together, work), a_round(alone, work))
            victim = together._copies[0]._process
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
        assert victim.pid not in {copy._process.pid for copy in together._copies[1:]}


class Deadly(TinyTask):
    """Ends any copy in the middle of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.home = os.getpid()

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        if os.getpid() != self.home:
            os._exit(1)
        return super().loss(model, batch)


def test_a_copy_that_dies_while_it_works_has_its_share_done_again() -> None:
    plain, deadly = TinyTask(), Deadly()
    alone = InProcess(trainer_of(plain))
    with processes(deadly, 3) as together:
        for number in (1, 2):
            work = jobs(plain, number)
            found = list(together.train(work)), list(alone.evaluate(work))
            assert_same(found, a_round(alone, work))


class Wrong(TinyTask):
    """Fails in copies alone, with an error about everybody."""

    def __init__(self) -> None:
        super().__init__()
        self.home, self.cured = os.getpid(), False

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        if os.getpid() != self.home and batch["x"].abs().sum() > 0:
            raise ConfigurationError("everybody's problem")
        return super().loss(model, batch)


def test_an_error_in_a_copy_surfaces_as_itself_and_the_next_call_is_not_confused() -> None:
    task = Wrong()
    alone = InProcess(trainer_of(TinyTask()))
    with processes(task, 3) as together:
        work = jobs(task)
        with pytest.raises(ConfigurationError, match="everybody's problem"):
            list(together.train(work))
        # The other copy's answer must not be taken for that of the next question.
        assert list(together.evaluate(work)) == list(alone.evaluate(work))


class WrongHere(TinyTask):
    """Fails in this process alone."""

    def __init__(self) -> None:
        super().__init__()
        self.home = os.getpid()

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        if os.getpid() == self.home:
            raise ConfigurationError("everybody's problem")
        return super().loss(model, batch)


def test_an_error_here_leaves_no_answer_behind_either() -> None:
    task = WrongHere()
    alone = InProcess(trainer_of(TinyTask()))
    with processes(task, 3) as together:
        work = jobs(TinyTask())
        with pytest.raises(ConfigurationError, match="everybody's problem"):
            list(together.train(work))
        assert list(together.evaluate(work)) == list(alone.evaluate(work))


class Broken(TinyTask):
    """One holder's data cannot be made, in any process."""

    def holder_data(
        self, holders: int | None = None, *, seed: int = 0, division: int = 0
    ) -> dict[str, HolderData]:
        data = super().holder_data(holders)
        data["h3"] = HolderData(
            Examples({"x": torch.empty(5, 2), "y": torch.empty(5)}), data["h3"].test
        )
        return data


def test_a_holder_that_breaks_in_a_copy_costs_itself() -> None:
    task = Broken()
    alone = InProcess(trainer_of(task))
    with processes(task, 3) as together:
        work = jobs(task)
        found = a_round(together, work)
        assert_same(found, a_round(alone, work))
        failed = {
            job.assignments[place].holder
            for job, outcome in zip(work, found[0], strict=True)
            for place in outcome.failed
        }
        assert failed == {"h3"}


# -- when there are copies ------------------------------------------------------------------------


def test_nothing_is_copied_for_one_job_or_one_process() -> None:
    task, before = TinyTask(), children()
    work = jobs(task)
    with processes(task, 3) as together:
        a_round(together, work[:1])
        list(together.train([]))
        together.measure(work[0].assignments[0])
        assert children() == before
    with processes(task, 1) as alone:
        a_round(alone, work)
        assert children() == before


def test_closing_leaves_no_process_behind_and_may_be_done_twice() -> None:
    task, before = TinyTask(), children()
    with processes(task, 3) as together:
        a_round(together, jobs(task))
        assert len(children() - before) == 2
        together.close()
        assert children() == before
        a_round(together, jobs(task))  # it makes new ones when there is work again
        assert len(children() - before) == 2
    assert children() == before


def test_a_copy_that_died_is_no_zombie() -> None:
    task, before = TinyTask(), children()
    with processes(task, 2) as together:
        a_round(together, jobs(task))
        (victim,) = children() - before
        os.kill(victim, signal.SIGKILL)
        a_round(together, jobs(task))
        assert victim not in children()
    assert children() == before


def test_copies_end_with_the_process_that_they_are_copies_of(tmp_path: Path) -> None:
    """Even if it is killed: no copy holds an end of a pipe that would keep another one waiting."""
    note = tmp_path / "copies"

    def work_and_wait() -> None:
        together = Processes(trainer_of(TinyTask()), 3)
        a_round(together, jobs(TinyTask()))
        (tmp_path / "draft").write_text(" ".join(map(str, children())))
        (tmp_path / "draft").rename(note)
        signal.pause()

    parent = multiprocessing.get_context("fork").Process(target=work_and_wait)
    parent.start()
    wait_for(note.exists)
    copies = [int(number) for number in note.read_text().split()]
    assert len(copies) == 2
    assert all(lives(number) for number in copies)
    parent.kill()
    parent.join()
    wait_for(lambda: not any(lives(number) for number in copies))


def lives(process: int) -> bool:
    """A zombie, which waits for its new parent to look, does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    """However long it takes; the test's time limit ends what never comes."""
    while not condition():
        time.sleep(0.01)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_as_before_in_the_end(threads: int) -> None:
    task = TinyTask()
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with processes(task, 2) as together:
            a_round(together, jobs(task))
            assert torch.get_num_threads() == 1, "the other cores are the copies'"
        assert torch.get_num_threads() == threads
        assert Processes(trainer_of(task))._number == threads
    finally:
        torch.set_num_threads(usual)
