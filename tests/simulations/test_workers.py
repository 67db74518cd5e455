"""A round's blocks: who is trained with whom changes no result, and one bad holder costs itself."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import count, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from common.data.on_demand import OnDemand
from common.errors import ConfigurationError, DataError
from common.plan import TrainingPlan
from common.privacy.noise import SeededRandomness
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, HolderData, Task
from simulations import workers as module
from simulations.grid import simulated_holder
from simulations.jobs import (
    FEWEST,
    SEVERAL,
    Assignment,
    Cut,
    Figures,
    Job,
    Outcome,
    Total,
    jobs_of,
    merged,
)
from simulations.sums import ExactSum
from simulations.workers import MOST, UNLIKE, BlockTrainer, InProcess
from tests.tiny import FEATURES, TinyTask, table

CPU = torch.device("cpu")
START = torch.linspace(-1, 1, FEATURES + 1).unsqueeze(0)


def plan_of(task: Task, **settings: object) -> TrainingPlan:
    return plan_for(task, {"rounds": 3, "epsilon": 5.0, "local_steps": 2, **settings})


def holder(task: TinyTask, units: int, seed: int, test: int = 10) -> HolderData:
    # An empty table has no types to encode.
    some, others = task.examples(table(units + 1, seed)), task.examples(table(test + 1, seed + 999))
    return HolderData(some.take(torch.arange(units)), others.take(torch.arange(test)))


def data_of(task: TinyTask, sizes: Sequence[int]) -> dict[str, HolderData]:
    return {f"h{place}": holder(task, size, place) for place, size in enumerate(sizes)}


def job_of(
    names: Sequence[str], wanted: TrainingPlan, *, individually: bool = False, number: int = 1
) -> Job:
    assignments = [Assignment(name, name, wanted) for name in names]
    return Job(assignments, number, START, individually=individually)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# -- cutting a round into jobs --------------------------------------------------------------------


@given(
    count=st.integers(0, 700),
    most=st.integers(1, 300),
    known=st.sets(st.integers(0, 699), max_size=20),
)
def test_every_assignment_is_in_one_job_in_order_with_its_private_parameters(
    count: int, most: int, known: set[int]
) -> None:
    wanted = PLAN
    assignments = [Assignment(f"h{place}", "rows", wanted) for place in range(count)]
    private = {place: {"w": torch.tensor(place)} for place in known if place < count}
    jobs = jobs_of(assignments, Cut(most, 7), 3, START, private, individually=True)

    assert [one for job in jobs for one in job.assignments] == assignments
    sizes = [len(job.assignments) for job in jobs]
    assert all(0 < size <= most for size in sizes)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1, "of about equal size"
    found = {
        job.assignments[position].holder: int(own["w"])
        for job in jobs
        for position, own in job.private.items()
    }
    assert found == {f"h{place}": place for place in private}
    assert {(job.number, job.individually, job.a_unit) for job in jobs} <= {(3, True, 7)}


PLAN = plan_of(TinyTask())


@pytest.mark.parametrize(
    ("count", "most", "jobs"),
    [(1, 64, 1), (FEWEST - 1, 64, 1), (FEWEST, 256, SEVERAL), (300, 256, 2), (700, 256, 4)],
)
def test_jobs_come_in_twos_unless_they_are_too_small_to_halve(
    count: int, most: int, jobs: int
) -> None:
    assignments = [Assignment(f"h{place}", "rows", PLAN) for place in range(count)]
    assert len(jobs_of(assignments, Cut(most, 7), 1, START)) == jobs


@given(st.dictionaries(st.integers(0, 50), st.integers(0, 2000), max_size=30))
def test_a_blocks_largest_holder_is_at_most_four_times_its_smallest(sizes: dict[int, int]) -> None:
    blocks = module._alike(sizes)
    assert sorted(position for block in blocks for position in block) == sorted(sizes)
    for block in blocks:
        assert block == sorted(block)
        own = [sizes[position] for position in block]
        assert max(own) <= UNLIKE * min(own) or max(own) == min(own)
    # No more blocks than needed: the largest of the next does not fit into the one before.
    tops = [max(sizes[position] for position in block) for block in blocks]
    assert all(after * UNLIKE < before for before, after in pairwise(tops))


# -- who else is there ----------------------------------------------------------------------------

UNEQUAL = (400, 1, 90, 3, 30, 0, 120)


@pytest.mark.parametrize("privacy", [{}, {"epsilon": None, "no_dp": True}], ids=["dp", "no dp"])
@pytest.mark.parametrize("more", [{}, {"batch_size": 5}, {"optimizer": "adam"}], ids=str)
def test_very_unequal_holders_get_the_updates_that_they_get_alone(
    privacy: dict[str, object], more: dict[str, object]
) -> None:
    task = TinyTask()
    wanted = plan_of(task, **privacy, **more)
    data = data_of(task, UNEQUAL)
    together = BlockTrainer(task, data, CPU).train(job_of(list(data), wanted, individually=True))
    assert together.singles.keys() == set(range(len(UNEQUAL)))
    for position, name in enumerate(data):
        alone = BlockTrainer(task, {name: data[name]}, CPU).train(
            job_of([name], wanted, individually=True)
        )
        torch.testing.assert_close(
            together.singles[position], alone.singles[0], rtol=1e-5, atol=1e-6
        )


def test_holders_metrics_are_those_that_they_get_alone() -> None:
    task = TinyTask()
    data = data_of(task, UNEQUAL)
    data["h0"] = holder(task, 5, 0, test=200)
    data["h1"] = holder(task, 5, 1, test=0)
    together = BlockTrainer(task, data, CPU).evaluate(job_of(list(data), plan_of(task)))
    for name, found in zip(data, together, strict=True):
        alone = BlockTrainer(task, data, CPU).evaluate(job_of([name], plan_of(task)))
        (only,) = alone
        assert isinstance(found, Figures)
        assert isinstance(only, Figures)
        assert found.metrics == pytest.approx(only.metrics, nan_ok=True)
    assert isinstance(together[1], Figures)
    assert math.isnan(together[1].metrics["accuracy"]), "it has no held-out units"


def test_nobody_with_held_out_units_is_no_error() -> None:
    task = TinyTask()
    data = {name: holder(task, 5, 0, test=0) for name in ("h0", "h1")}
    found = BlockTrainer(task, data, CPU).evaluate(job_of(list(data), plan_of(task)))
    assert all(isinstance(one, Figures) and math.isnan(one.metrics["accuracy"]) for one in found)


def test_a_job_may_have_several_points() -> None:
    """A sweep's runs train in one block, each from its own model into its own sum."""
    task = TinyTask()
    data = data_of(task, (30, 40))
    plans = [plan_of(task, local_steps=1), plan_of(task, local_steps=4, learning_rate=0.1)]
    assignments = [
        Assignment(name, name, wanted, point) for name in data for point, wanted in enumerate(plans)
    ]
    starts = torch.cat([START, 2 * START])
    both = BlockTrainer(task, data, CPU).train(Job(assignments, 1, starts))
    assert not both.singles
    for point, wanted in enumerate(plans):
        only = [Assignment(name, name, wanted) for name in data]
        alone = BlockTrainer(task, data, CPU).train(Job(only, 1, starts[point : point + 1]))
        assert distance(both.totals[point].mean(), alone.totals[0].mean()) < 1e-5
        assert both.totals[point].weight == 2


def test_holders_that_share_data_share_its_rows_and_not_its_noise() -> None:
    task = TinyTask()
    data = data_of(task, (30, 25))
    assignments = [
        Assignment(name, key, PLAN) for name, key in [("a", "h0"), ("b", "h0"), ("c", "h1")]
    ]
    shared = BlockTrainer(task, data, CPU)
    found = shared.train(Job(assignments, 1, START, individually=True)).singles
    copies = BlockTrainer(task, {"a": data["h0"], "b": data["h0"], "c": data["h1"]}, CPU)
    apart = copies.train(job_of(["a", "b", "c"], PLAN, individually=True)).singles
    assert all(torch.equal(found[place], apart[place]) for place in range(3))
    assert not torch.isclose(found[0], found[1]).any()
    (block,) = shared._blocks._blocks.values()
    assert (len(block), len(block.units)) == (3, 55), "the rows lie there once"
    metrics = shared.evaluate(Job(assignments, 1, START))
    assert metrics == copies.evaluate(job_of(["a", "b", "c"], PLAN))


class Dropping(TinyTask):
    def model(self, units: int) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def test_dropout_follows_from_the_seed() -> None:
    """It draws from torch's own generator, which a copied process would have in another state."""
    task = Dropping()
    data = data_of(task, (20, 20))

    states = count()

    def found(number: int, seed: int) -> Tensor:
        torch.manual_seed(next(states))
        trainer = BlockTrainer(task, data, CPU)
        wanted = plan_of(task, seed=seed, no_dp=True, epsilon=None)
        start = torch.linspace(-1, 1, trainer.dimension).unsqueeze(0)
        job = Job([Assignment(name, name, wanted) for name in data], number, start)
        return trainer.train(job).totals[0].mean()

    assert torch.equal(found(1, 0), found(1, 0))
    assert not torch.equal(found(1, 0), found(2, 0))
    assert not torch.equal(found(1, 0), found(1, 1))


# -- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["equal", "size"])
def test_the_total_is_the_weighted_sum_of_the_singles(weighting: str) -> None:
    task = TinyTask()
    wanted = plan_of(task, weighting=weighting)
    data = data_of(task, (400, 1, 90, 30))
    trainer = BlockTrainer(task, data, CPU)
    total = trainer.train(job_of(list(data), wanted)).totals[0]
    apart = trainer.train(job_of(list(data), wanted, individually=True))
    assert not apart.totals
    weights = [wanted.weight(size) for size in (400, 1, 90, 30)]
    assert list(apart.weights.values()) == [apart.weights[place] for place in apart.singles]
    assert [apart.weights[place] for place in range(4)] == weights
    expected = sum(apart.singles[place].double() * weights[place] for place in range(4))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(total.sum.total(), expected, rtol=0, atol=1e-12)
    assert float(total.weight) == pytest.approx(sum(weights), rel=1e-15)
    assert (weighting == "size") == (len(set(weights)) > 1), "the setting shows"


def test_an_update_that_the_plan_does_not_allow_comes_by_itself() -> None:
    task = TinyTask()
    data = data_of(task, (20, 20, 20))
    data["h1"] = HolderData(
        Examples({"x": 1e6 * data["h1"].train["x"], "y": data["h1"].train["y"]}), data["h1"].test
    )
    wanted = plan_of(task, epsilon=None, no_dp=True, max_update_norm=10.0)
    outcome = BlockTrainer(task, data, CPU).train(job_of(list(data), wanted))
    assert outcome.singles.keys() == outcome.weights.keys() == {1}
    assert float(outcome.singles[1].norm()) > 10.0
    assert outcome.totals[0].weight == 2
    others = BlockTrainer(task, data, CPU).train(job_of(["h0", "h2"], wanted))
    assert torch.equal(outcome.totals[0].mean(), others.totals[0].mean())


def test_a_nan_is_no_update_that_the_plan_allows() -> None:
    task = TinyTask()
    data = data_of(task, (20, 20))
    x = data["h1"].train["x"].clone()
    x[0, 0] = math.nan
    data["h1"] = HolderData(Examples({"x": x, "y": data["h1"].train["y"]}), data["h1"].test)
    wanted = plan_of(task, epsilon=None, no_dp=True)
    outcome = BlockTrainer(task, data, CPU).train(job_of(list(data), wanted))
    assert outcome.singles.keys() == {1}
    assert outcome.singles[1].isnan().any()
    assert outcome.totals[0].mean().isfinite().all()


def test_a_part_that_fails_halfway_leaves_nothing_in_the_sums() -> None:
    """One point's sum is too large for fixed point; the holders of the others count once."""
    task = TinyTask()
    data = data_of(task, (40, 35, 1))  # the last one has a block of its own
    good = plan_of(task)
    huge = plan_of(task, learning_rate=1e12)
    two_points = [Assignment(name, name, good) for name in data]
    both = [*two_points, Assignment("h0", "h0", huge, 1)]
    starts = START.repeat(2, 1)
    trainer = BlockTrainer(task, data, CPU)
    outcome = trainer.train(Job(both, 1, starts))
    assert outcome.failed == {3: "ValueError"}
    assert outcome.totals.keys() == {0}
    expected = trainer.train(Job(two_points, 1, START)).totals[0]
    assert outcome.totals[0].weight == expected.weight == 3
    assert distance(outcome.totals[0].mean(), expected.mean()) < 1e-5


def test_merging_makes_new_sums() -> None:
    parts = []
    for value in (1.0, 2.0):
        total = Total(ExactSum(2))
        total.add(torch.full((2,), value, dtype=torch.float64), 0.5)
        parts.append({0: total})
    both = merged([*parts, {3: parts[0][0]}])
    assert both[0].mean().tolist() == [3.0, 3.0]
    assert both[3].mean().tolist() == [2.0, 2.0]
    assert [part[0].weight for part in parts] == [Fraction(1, 2)] * 2, "the parts are as before"
    assert merged([]) == {}


def test_jobs_and_outcomes_keep_their_bits_on_the_way() -> None:
    task = load("recommendation")
    data = dict(list(task.holder_data(30).items())[:2])
    trainer = BlockTrainer(task, data, CPU)
    names, wanted = list(data), plan_of(task)
    start = torch.zeros(1, trainer.dimension)
    job = Job([Assignment(name, name, wanted) for name in names], 1, start)
    outcome = trainer.train(job)
    arrived: Outcome = pickle.loads(pickle.dumps(outcome))  # noqa: S301 - what a pipe does
    assert torch.equal(arrived.totals[0].mean(), outcome.totals[0].mean())
    for place, private in outcome.private.items():
        assert all(torch.equal(arrived.private[place][n], value) for n, value in private.items())
    again = Job(job.assignments, 2, start, outcome.private)
    sent: Job = pickle.loads(pickle.dumps(again))  # noqa: S301
    one, other = trainer.train(again), trainer.train(sent)
    assert torch.equal(one.totals[0].mean(), other.totals[0].mean())


# -- private parameters ---------------------------------------------------------------------------


def test_private_parameters_begin_and_go_on_as_with_opacus() -> None:
    """Two rounds from the same shared parameters: what users keep comes back in the second."""
    task = load("recommendation")
    data = dict(list(task.holder_data(30).items())[:3])
    wanted = plan_of(task, batch_size=5, holder_size=10)
    trainer = BlockTrainer(task, data, CPU)
    start = torch.linspace(-0.1, 0.1, trainer.dimension).unsqueeze(0)
    assignments = [Assignment(name, name, wanted) for name in data]
    first = trainer.train(Job(assignments, 1, start, individually=True))
    second = trainer.train(Job(assignments, 2, start, first.private, individually=True))
    forgotten = trainer.train(Job(assignments, 2, start, individually=True))
    for place, (name, own) in enumerate(data.items()):
        there = simulated_holder(name, task, own, wanted, CPU)
        private = None
        for number, found in ((1, first), (2, second)):
            update, private = there.trainer.train(
                wanted,
                start[0],
                private,
                randomness_of(wanted, name, number),
                divisor=wanted.divisor(max(1, len(own.train))),
            )
            assert distance(found.singles[place], update) < 1e-5
            for key, value in private.items():
                torch.testing.assert_close(found.private[place][key], value, rtol=1e-4, atol=1e-6)
        there.state.close()
        kept = second.private[place]
        assert any(not torch.equal(kept[key], forgotten.private[place][key]) for key in kept)


def randomness_of(wanted: TrainingPlan, name: str, number: int) -> SeededRandomness:
    return SeededRandomness("simulation", wanted.seed, name, number)


# -- holders that break ---------------------------------------------------------------------------


class Fragile(TinyTask):
    """Its loss and predictions break over a mark that one holder's rows carry."""

    def _look(self, units: Examples) -> None:
        if bool((units["x"] == 7.5).any()):
            raise ZeroDivisionError("cannot take 7.5")

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        self._look(batch)
        return super().loss(model, batch)

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        self._look(units)
        return super().predict(model, units)


def marked(units: Examples) -> Examples:
    x = units["x"].clone()
    x[:, 1] = 7.5
    return Examples({"x": x, "y": units["y"]})


@pytest.mark.usefixtures("quietly")
@pytest.mark.parametrize("how", ["loss", "data"])
def test_a_holder_that_breaks_costs_only_itself(how: str) -> None:
    task = Fragile()
    data: Mapping[str, HolderData] = data_of(task, (20, 24, 28, 22))
    good = BlockTrainer(task, data, CPU)
    if how == "loss":
        bad = HolderData(marked(data["h1"].train), marked(data["h1"].test))
        spoiled: Mapping[str, HolderData] = {**data, "h1": bad}
        kind = "ZeroDivisionError"
    else:
        whole = data

        def build(name: str) -> HolderData:
            if name == "h1":
                raise OSError("the disk is gone")
            return whole[name]

        spoiled, kind = OnDemand(list(data), build), "OSError"
    trainer = BlockTrainer(task, spoiled, CPU)
    wanted = plan_of(task, batch_size="full")
    outcome = trainer.train(job_of(list(data), wanted))
    assert outcome.failed == {1: kind}
    assert not outcome.singles
    rest = good.train(job_of(["h0", "h2", "h3"], wanted))
    assert outcome.totals[0].weight == 3
    assert distance(outcome.totals[0].mean(), rest.totals[0].mean()) < 1e-5
    judged = trainer.evaluate(job_of(list(data), wanted))
    assert judged[1] == kind
    expected = good.evaluate(job_of(["h0", "h2", "h3"], wanted))
    assert [judged[0], *judged[2:]] == expected


@pytest.fixture
def quietly(caplog: pytest.LogCaptureFixture) -> None:
    """Every failure is logged with its traceback, of which the terminal need not see."""
    caplog.set_level(logging.CRITICAL, logger="sotto.simulation")


def test_what_broke_is_logged_with_the_holders_name(caplog: pytest.LogCaptureFixture) -> None:
    task = Fragile()
    data = data_of(task, (20, 20))
    data["h1"] = HolderData(marked(data["h1"].train), data["h1"].test)
    BlockTrainer(task, data, CPU).train(job_of(list(data), plan_of(task, batch_size="full")))
    assert [record.getMessage() for record in caplog.records] == ["h1 failed"]
    assert "cannot take 7.5" in caplog.text


class Wrong(TinyTask):
    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        raise ConfigurationError("everybody's problem")

    predict = loss


@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_what_concerns_everybody_ends_the_round(method: str) -> None:
    task = Wrong()
    trainer = BlockTrainer(task, data_of(task, (20, 20)), CPU)
    with pytest.raises(ConfigurationError, match="everybody's problem"):
        getattr(trainer, method)(job_of(["h0", "h1"], plan_of(task)))


def test_data_that_are_missing_for_everybody_end_the_round() -> None:
    def build(name: str) -> HolderData:
        raise DataError("download it first")

    task = TinyTask()
    trainer = BlockTrainer(task, OnDemand(["h0"], build), CPU)
    assignment = Assignment("h0", "h0", PLAN)
    with pytest.raises(DataError, match="download it first"):
        trainer.measure(assignment)
    with pytest.raises(DataError, match="download it first"):
        trainer.train(job_of(["h0"], PLAN))


# -- the shelf ------------------------------------------------------------------------------------


def test_assembled_blocks_are_kept_for_the_next_round() -> None:
    task, built = TinyTask(), list[str]()
    whole = data_of(task, (20, 30))

    class Counting(dict[str, HolderData]):
        def __getitem__(self, name: str) -> HolderData:
            built.append(name)
            return super().__getitem__(name)

    trainer = BlockTrainer(task, Counting(whole), CPU)
    first = trainer.train(job_of(["h0", "h1"], PLAN))
    before = len(built)
    second = trainer.train(job_of(["h0", "h1"], PLAN))
    assert len(trainer._blocks._blocks) == 1
    assert torch.equal(first.totals[0].mean(), second.totals[0].mean())
    assert len(built) - before == 2, "their sizes are looked up, their rows not put together again"


def test_a_full_shelf_keeps_what_it_has_and_results_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TinyTask()
    data = data_of(task, (20, 20, 20))
    roomy = BlockTrainer(task, data, CPU)
    one_block = 20 * (FEATURES + 1) * 4
    monkeypatch.setattr(module, "KEPT_BYTES", one_block)
    narrow = BlockTrainer(task, data, CPU)
    for number in (1, 2):
        for name in data:
            job = job_of([name], PLAN, number=number)
            one, other = roomy.train(job), narrow.train(job)
            assert torch.equal(one.totals[0].mean(), other.totals[0].mean())
    assert list(narrow._blocks._blocks) == [("train", ("h0", ()))]
    assert len(roomy._blocks._blocks) == 3


# -- how many at once -----------------------------------------------------------------------------


class Wide(TinyTask):
    """A model of about ``width`` · 4 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def model(self, units: int) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, self.width), nn.ReLU(), nn.Linear(self.width, 1))


def measured(width: int, units: int = 20) -> Cut:
    task = Wide(width)
    trainer = BlockTrainer(task, data_of(task, (units,)), CPU)
    return trainer.measure(Assignment("h0", "h0", plan_of(task)))


def test_small_models_train_many_at_once_and_large_ones_few() -> None:
    assert measured(4).holders == MOST
    assert FEWEST <= measured(200).holders < MOST
    assert 1 <= measured(400_000).holders < FEWEST
    widths = (4, 50, 200, 1000, 100_000, 400_000)
    found = [measured(width).holders for width in widths]
    assert found == sorted(found, reverse=True)


def test_the_measure_counts_what_layers_keep_of_a_unit() -> None:
    """Inputs and output gradients: 3 + w of the first layer, w + 1 of the last."""
    assert measured(50).a_unit == FEATURES + 50 + 50 + 1


def test_a_holder_that_cannot_be_measured_gives_the_usual_cut() -> None:
    task = Fragile()
    data = data_of(task, (20,))
    bad = HolderData(marked(data["h0"].train), data["h0"].test)
    empty = HolderData(data["h0"].train.take(torch.tensor([], dtype=torch.int64)), data["h0"].test)
    for own in (bad, empty):
        trainer = BlockTrainer(task, {"h0": own}, CPU)
        cut = trainer.measure(Assignment("h0", "h0", PLAN))
        assert cut == Cut(FEWEST, module.USUAL)


def test_nothing_moves_global_randomness() -> None:
    task = load("recommendation")
    data = dict(list(task.holder_data(30).items())[:2])
    some = next(iter(data.values()))
    nobody = some.test.take(torch.tensor([], dtype=torch.int64))
    data["empty"] = HolderData(some.train, nobody)
    trainer = BlockTrainer(task, data, CPU)
    wanted = plan_of(task)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer.measure(Assignment("a", next(iter(data)), wanted))
    start = torch.zeros(1, trainer.dimension)
    for names in (list(data), ["empty"]):
        job = Job([Assignment(name, name, wanted) for name in names], 1, start)
        trainer.train(job)
        trainer.evaluate(job)
    assert torch.equal(torch.get_rng_state(), before)


class Together(TinyTask):
    """A unit's loss depends on who else is there."""

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        return super().loss(model, batch) * batch["x"].sum()


def test_a_task_whose_units_are_not_separate_is_refused() -> None:
    task = Together()
    trainer = BlockTrainer(task, data_of(task, (20,)), CPU)
    with pytest.raises(ConfigurationError, match="entry i must depend on unit i only"):
        trainer.measure(Assignment("h0", "h0", plan_of(task)))


def test_it_is_refused_too_where_the_first_holder_has_too_few_units_to_tell() -> None:
    task = Together()
    trainer = BlockTrainer(task, data_of(task, (1, 0, 20)), CPU)
    for name in ("h0", "h1"):
        trainer.measure(Assignment(name, name, plan_of(task)))
    with pytest.raises(ConfigurationError, match="entry i must depend on unit i only"):
        trainer.train(job_of(["h0", "h1", "h2"], plan_of(task)))


def test_workers_that_are_one_answer_job_by_job() -> None:
    task = TinyTask()
    here = InProcess(BlockTrainer(task, data_of(task, (20, 20)), CPU))
    jobs = [job_of([name], PLAN) for name in ("h0", "h1")]
    outcomes = here.train(jobs)
    assert float(next(outcomes).totals[0].weight) == 1.0
    assert len(list(outcomes)) == 1
    assert len(list(here.evaluate(jobs))) == 2
    here.close()
