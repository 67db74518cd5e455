"""Blocks on a Ray cluster: the same bits as in one process, whatever becomes of the workers."""

from __future__ import annotations

import copy
import gc
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.data.on_demand import OnDemand
from common.errors import ConfigurationError, DataError, RunError
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks.base import Examples, HolderData
from simulations.experiment import Experiment, run_experiment
from simulations.jobs import Assignment, Cut, Job, Outcome, Total, jobs_of, merged
from simulations.ray import RayWorkers, cluster
from simulations.sums import ExactSum
from simulations.workers import BlockTrainer, InProcess
from tests.tiny import FEATURES, TinyTask

CPU = torch.device("cpu")
HOLDERS = 40
SMALL = Cut(holders=3, a_unit=16)


@contextmanager
def without_its_litter() -> Iterator[None]:
    """Ray leaves its processes and their log files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One cluster for all tests here: starting it takes longer than they do."""
    module = pytest.importorskip("ray")
    with ExitStack() as stack:
        late = ""
        with without_its_litter():
            try:
                stack.enter_context(cluster(workers=3))
            except Exception as error:  # Ray raises plain ones, too
                late = str(error)
                if "timed out" not in late.lower():
                    raise
        if late:  # Ray gives its own processes a time limit, which a busy machine may exceed
            with without_its_litter():
                module.shutdown()
            pytest.skip(f"Ray did not start on this machine: {late}")
        yield module
        with without_its_litter():
            stack.close()


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"rounds": 3, "epsilon": 2.0, "local_steps": 2, **settings})


def data(task: TinyTask) -> Mapping[str, HolderData]:
    tables = task.source.tables(HOLDERS)
    return OnDemand(
        list(tables), lambda name: task.prepare(task.split(tables[name], holder=name, seed=0))
    )


def jobs(wanted: TrainingPlan, number: int = 1, *, individually: bool = False) -> list[Job]:
    assignments = [
        Assignment(f"h{place}", f"h{place}", wanted, point=place % 2) for place in range(HOLDERS)
    ]
    parameters = torch.linspace(-1, 1, 2 * (FEATURES + 1)).view(2, -1)
    return jobs_of(assignments, SMALL, number, parameters, individually=individually)


def in_process(task: TinyTask) -> InProcess:
    return InProcess(BlockTrainer(task, data(task), CPU))


def on_ray(task: TinyTask, workers: int) -> RayWorkers:
    return RayWorkers(task, data(task), CPU, workers=workers)


def sums(outcomes: Iterator[Outcome]) -> dict[int, tuple[list[float], float]]:
    """Every bit of a round's totals, by point."""
    totals = merged(outcome.totals for outcome in outcomes)
    return {point: (total.mean().tolist(), float(total.weight)) for point, total in totals.items()}


# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_bits_of_one_process(workers: int) -> None:
    task, wanted = TinyTask(), plan(weighting="size")
    here, there = in_process(task), on_ray(task, workers)
    try:
        assert there.measure(jobs(wanted)[0].assignments[0]) == here.measure(
            jobs(wanted)[0].assignments[0]
        )
        for number in (1, 2):
            work = jobs(wanted, number)
            assert sums(there.train(work)) == sums(here.train(work))
        assert list(there.evaluate(work)) == list(here.evaluate(work))
        alone = jobs(wanted, individually=True)
        for one, other in zip(there.train(alone), here.train(alone), strict=True):
            assert not one.totals
            assert one.weights == other.weights
            assert one.singles.keys() == other.singles.keys()
            assert all(torch.equal(one.singles[key], other.singles[key]) for key in one.singles)
        assert not list(there.train([]))
    finally:
        there.close()
        there.close()  # the Grid closes it too
        here.close()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_an_experiment_gives_the_same_bits_on_ray_and_in_batches() -> None:
    wanted = plan_for(TinyTask(), {"epsilon": 5.0, "rounds": 2})
    one, other = (
        run_experiment(Experiment(TinyTask(), wanted, engine=engine)).runs[0]
        for engine in ("batched", "ray")
    )
    assert np.array_equal(one.parameters, other.parameters)
    assert [each.metrics for each in one.history] == [each.metrics for each in other.history]


def test_how_terms_are_grouped_does_not_change_a_bit_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    weights = torch.rand(50, generator=generator, dtype=torch.float64).tolist()

    def of(places: list[int]) -> Total:
        total = Total(ExactSum(7))
        for place in places:
            total.add(terms[place], weights[place])
        return total

    forth, back = list(range(50)), list(range(49, -1, -1))
    tree = merged([{0: of(forth[:13])}, {0: of(back[:20])}, {0: of(forth[13:30])}])[0]
    assert torch.equal(of(forth).mean(), of(back).mean())
    assert torch.equal(of(forth).mean(), tree.mean())
    assert of(forth).weight == of(back).weight == tree.weight


# -- workers that die -----------------------------------------------------------------------------


class Deadly(TinyTask):
    """Ends its process as often as it is told: in training, over any block.

    Args:
        folder: where each death is noted.
        deaths: how many.
    """

    def __init__(self, folder: Path, deaths: int) -> None:
        super().__init__()
        self.folder, self.deaths, self.driver = folder, deaths, os.getpid()

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        if os.getpid() != self.driver and not batch["x"].is_meta:
            for number in range(self.deaths):
                try:
                    (self.folder / str(number)).touch(exist_ok=False)
                except FileExistsError:
                    continue
                os._exit(1)
        return super().loss(model, batch)


@pytest.mark.slow
def test_what_a_dead_worker_had_to_do_is_redone_with_the_same_result(
    ray: Any, tmp_path: Path
) -> None:
    here, there = in_process(TinyTask()), on_ray(Deadly(tmp_path, deaths=1), 2)
    try:
        work = jobs(plan(), 1)
        assert sums(there.train(work)) == sums(here.train(work))
        assert len(list(tmp_path.iterdir())) == 1  # in the midst of its work
        for actor in there._actors.values():
            ray.kill(actor)  # between two rounds
        work = jobs(plan(), 2)
        assert sums(there.train(work)) == sums(here.train(work))
    finally:
        there.close()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_block_that_costs_three_workers_ends_the_run(tmp_path: Path) -> None:
    there = on_ray(Deadly(tmp_path, deaths=99), 1)
    try:
        with pytest.raises(RunError, match=r"3 workers died over the same block.*actor died"):
            there.train(jobs(plan()))
    finally:
        there.close()


# -- errors ---------------------------------------------------------------------------------------


class Wrong(TinyTask):
    """Raises an error of our own on the worker."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        raise DataError("column 'x1' is missing")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_an_error_of_ours_surfaces_as_itself_and_is_not_tried_again() -> None:
    there = on_ray(Wrong(), 1)
    try:
        for _ in range(2):
            with pytest.raises(DataError, match=r"^column 'x1' is missing$") as caught:
                there.train(jobs(plan()))
            assert type(caught.value) is DataError
    finally:
        there.close()


class Locked(TinyTask):
    """Cannot be sent."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a connection")


@pytest.mark.usefixtures("ray")
def test_a_task_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"task 'tiny'.*cannot pickle a connection"):
        on_ray(Locked(), 1)


def unpack() -> Any:
    """Works here only."""
    raise ModuleNotFoundError("No module named 'elsewhere'")


class Elsewhere(TinyTask):
    """Of a package that workers do not have."""

    def __reduce__(self) -> Any:
        return unpack, ()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_workers_without_the_tasks_package_are_told_to_install_it() -> None:
    there = on_ray(Elsewhere(), 1)
    try:
        with pytest.raises(ConfigurationError, match=r"No module named 'elsewhere'.*same install"):
            there.train(jobs(plan()))
    finally:
        there.close()


@pytest.mark.usefixtures("ray")
def test_a_gpu_that_no_machine_has_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the Ray cluster has no GPU"):
        RayWorkers(TinyTask(), data(TinyTask()), torch.device("cuda"))


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'sotto\[ray\]'"):
        run_experiment(Experiment(TinyTask(), plan(), engine="ray"))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with (
        pytest.raises(ConfigurationError, match=r"no Ray cluster.*ray://HOST:PORT"),
        cluster(f"{scheme}127.0.0.1:1"),
    ):
        pass


def test_a_copy_of_data_on_demand_makes_its_own_values() -> None:
    made: list[str] = []
    first = OnDemand(["a", "b"], lambda name: made.append(name) or name.upper(), keep=1)
    assert first["a"] == "A"
    second = copy.copy(first)
    assert (list(second), second["a"], second["b"]) == (["a", "b"], "A", "B")
    assert made == ["a", "a", "b"]
