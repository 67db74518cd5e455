"""Simulated holders: the very ClientApp of deployment, a real ledger, a seeded noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from client.holder import Holder
from common.data.on_demand import OnDemand
from common.errors import RunError, WireError
from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.settings import plan_for
from common.tasks.base import Examples, HolderData, HolderTables
from common.tasks.parameters import initial_parameters
from common.wire import EvaluateReply, RoundRequest, TrainReply
from server.aggregation import build_strategy
from server.central import combination_of
from server.checkpoints import RunState
from server.grid import LinkGrid
from server.rounds import cohort_of, evaluate, next_round
from server.runs import RunResult
from server.summaries import RoundSummary
from simulations.experiment import Experiment, run_experiment
from simulations.grid import BatchedGrid, InProcessGrid, simulated_holder
from simulations.jobs import Job, Outcome
from simulations.workers import BlockTrainer, InProcess
from tests.fakes import FakeGrid, pulls_towards
from tests.tiny import TinySource, TinyTask, table

CPU = torch.device("cpu")


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"rounds": 3, "epsilon": 2.0, **settings})


def holders(plan: TrainingPlan) -> dict[str, Holder]:
    task = TinyTask()
    return {
        name: simulated_holder(name, task, data, plan, CPU)
        for name, data in task.holder_data(3).items()
    }


def close(there: Mapping[str, Holder]) -> None:
    for holder in there.values():
        holder.state.close()


def requests(
    grid: BaseGrid, plan: TrainingPlan, number: int, kind: str = "train", run: str = "run"
) -> list[Message]:
    request = RoundRequest(run, number, plan, np.zeros(4, np.float32))
    return [Message(request.records(), node, kind) for node in grid.get_node_ids()]


def ask(
    grid: BaseGrid, plan: TrainingPlan, number: int, kind: str = "train", run: str = "run"
) -> list[Message]:
    return list(grid.send_and_receive(requests(grid, plan, number, kind, run)))


def updates(grid: InProcessGrid, plan: TrainingPlan, number: int) -> list[np.ndarray]:
    return [TrainReply.of(reply.content, plan, 4).update for reply in ask(grid, plan, number)]


def test_everyone_answers_under_its_own_name_and_each_request_gets_its_own_reply() -> None:
    wanted, there = plan(), holders(plan())
    grid = InProcessGrid(there)
    assert [grid.holder_name(node) for node in grid.get_node_ids()] == ["h0", "h1", "h2"]
    replies = ask(grid, wanted, 1)
    assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()
    first, second, third = updates(grid, wanted, 1)  # asked again: the stored answers
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    close(there)


def test_the_ledger_is_charged_for_each_round_once_and_refuses_past_the_budget() -> None:
    wanted, there = plan(), holders(plan())
    grid = InProcessGrid(there)
    for number in (1, 2, 2, 3):
        assert not any(reply.has_error() for reply in ask(grid, wanted, number))
    for holder in there.values():
        assert len(holder.state.ledger.entries(holder.name)) == 2 * wanted.rounds
        assert holder.spent() == epsilon(wanted.composition(), wanted.privacy.delta)
        assert holder.spent() <= wanted.privacy.epsilon

    for reply in ask(grid, wanted, 1, run="another"):
        assert "0.00 of 2.00 is left" in reply.error.reason
    for holder in there.values():
        assert len(holder.state.ledger.entries(holder.name)) == 2 * wanted.rounds
    close(there)


def test_the_noise_follows_from_seed_holder_and_round() -> None:
    def trained(seed: int) -> list[np.ndarray]:
        wanted = plan(seed=seed)
        there = holders(wanted)
        try:
            return [
                update
                for number in (1, 2)
                for update in updates(InProcessGrid(there), wanted, number)
            ]
        finally:
            close(there)

    one, again, other = trained(0), trained(0), trained(1)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    rounds = zip(one[:3], one[3:], strict=True)  # the same data and parameters, another noise
    assert not any(np.array_equal(first, second) for first, second in rounds)


def test_two_holders_of_the_same_rows_have_independent_noise() -> None:
    task, wanted = TinyTask(), plan()
    (data,) = task.holder_data(1).values()
    there = {name: simulated_holder(name, task, data, wanted, CPU) for name in ("h0", "h1")}
    first, second = updates(InProcessGrid(there), wanted, 1)
    assert not np.isclose(first, second).any()
    close(there)


def test_exact_metrics_are_shared_because_the_experimenter_holds_the_data() -> None:
    wanted, there = plan(), holders(plan())
    for reply in ask(InProcessGrid(there), wanted, 3, "evaluate"):
        assert set(EvaluateReply.of(reply.content).metrics) == {"accuracy"}
    close(there)


@pytest.mark.parametrize("no_dp", [True, False])
def test_a_holder_has_a_budget_exactly_where_the_plan_has_privacy(no_dp: bool) -> None:
    wanted = plan(no_dp=no_dp, epsilon=None if no_dp else 2.0)
    there = holders(wanted)
    assert not any(reply.has_error() for reply in ask(InProcessGrid(there), wanted, 1))
    for holder in there.values():
        assert (holder.policy.budget is None) == no_dp
        assert (holder.spent() == float("inf")) == no_dp
    close(there)


# -- everybody at once ----------------------------------------------------------------------------


class Spied(InProcess):
    """Workers that note what they were asked."""

    def __init__(self, trainer: BlockTrainer) -> None:
        super().__init__(trainer)
        self.jobs: list[Job] = []
        self.closed = 0

    def train(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        self.jobs += jobs
        return super().train(jobs)

    def close(self) -> None:
        self.closed += 1


def batched(
    data: Mapping[str, HolderData] | None = None, task: TinyTask | None = None
) -> tuple[BatchedGrid, Spied]:
    task = task or TinyTask()
    held = task.holder_data(3) if data is None else data
    workers = Spied(BlockTrainer(task, held, CPU))
    return BatchedGrid(list(held), workers), workers


def test_one_reply_speaks_for_all_where_the_strategy_is_linear() -> None:
    wanted, there = plan(weighting="size"), holders(plan(weighting="size"))
    grid, _ = batched()
    (reply,) = ask(grid, wanted, 1)
    assert list(grid.answered_by(reply)) == grid.get_node_ids() == [2, 3, 4]
    found = TrainReply.of(reply.content, wanted, 4, holders=3)
    apart = [TrainReply.of(one.content, wanted, 4) for one in ask(InProcessGrid(there), wanted, 1)]
    weights = [one.weight for one in apart]
    assert found.weight == pytest.approx(sum(weights))
    mean = np.average([one.update for one in apart], axis=0, weights=weights)
    np.testing.assert_allclose(found.update, mean, rtol=1e-5, atol=1e-6)
    close(there)


@pytest.mark.parametrize("how", ["robust", "individually"])
def test_everybody_answers_for_itself_where_updates_are_compared(how: str) -> None:
    wanted = plan(strategy="fedmedian") if how == "robust" else plan()
    grid, there = batched()[0], holders(wanted)
    exchange = grid.individually if how == "individually" else grid.send_and_receive
    replies = exchange(requests(grid, wanted, 1))
    assert [list(grid.answered_by(reply)) for reply in replies] == [[2], [3], [4]]
    expected = updates(InProcessGrid(there), wanted, 1)
    for reply, other in zip(replies, expected, strict=True):
        found = TrainReply.of(reply.content, wanted, 4).update
        np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)
    close(there)


def test_nobody_is_asked_and_nobody_answers() -> None:
    grid, workers = batched()
    assert grid.send_and_receive([]) == grid.individually([]) == []
    assert workers.jobs == []
    grid.close()
    assert workers.closed == 1


def test_metrics_are_those_of_each_holder() -> None:
    wanted, there = plan(), holders(plan())
    expected = [
        EvaluateReply.of(reply.content).metrics
        for reply in ask(InProcessGrid(there), wanted, 3, "evaluate")
    ]
    replies = ask(batched()[0], wanted, 3, "evaluate")
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4]
    assert [EvaluateReply.of(reply.content).metrics for reply in replies] == expected
    close(there)


def with_nan(data: HolderData) -> HolderData:
    x = data.train["x"].clone()
    x[0] = float("nan")
    return HolderData(Examples({"x": x, "y": data.train["y"]}), data.test)


def one_round(grid: BaseGrid, plan: TrainingPlan) -> tuple[RunState, RoundSummary]:
    """The first round of a plan."""
    return next_round(grid, plan, build_strategy(plan), begun(plan), combination_of(plan))


def begun(wanted: TrainingPlan) -> RunState:
    return RunState("run", 0, initial_parameters(TinyTask(), wanted.seed))


@pytest.mark.parametrize("strategy", ["fedavg", "fedmedian"])
def test_an_update_that_is_not_finite_is_rejected_and_the_others_count(strategy: str) -> None:
    wanted = plan(no_dp=True, epsilon=None, strategy=strategy, min_holders=2)
    data = TinyTask().holder_data(3)
    spoiled, _ = batched({**data, "h1": with_nan(data["h1"])})
    state, summary = one_round(spoiled, wanted)
    assert summary.accepted == ("h0", "h2")
    assert summary.missed.keys() == {"h1"}
    assert "NaN or infinite" in summary.missed["h1"]

    others, _ = batched({name: data[name] for name in ("h0", "h2")})
    expected, _ = one_round(others, wanted)
    np.testing.assert_allclose(state.parameters, expected.parameters, rtol=1e-6, atol=1e-7)


def test_too_few_updates_end_the_round_with_every_reason() -> None:
    wanted = plan(no_dp=True, epsilon=None, min_holders=3)
    data = TinyTask().holder_data(3)
    spoiled, _ = batched({**data, "h1": with_nan(data["h1"])})
    with pytest.raises(RunError, match=r"2 of at least 3 updates .*h1: reply rejected"):
        one_round(spoiled, wanted)


def test_a_holder_whose_data_break_misses_the_round() -> None:
    wanted, data = plan(min_holders=2), TinyTask().holder_data(3)

    def build(name: str) -> HolderData:
        if name == "h1":
            raise OSError("gone")
        return data[name]

    grid, _ = batched(OnDemand(list(data), build))
    state, summary = one_round(grid, wanted)
    assert summary.accepted == ("h0", "h2")
    assert "OSError" in summary.missed["h1"]
    judged = evaluate(grid, wanted, TinyTask(), state, summary)
    assert judged.metrics.keys() == {"h0", "h2"}
    assert "h1" in judged.missed


# -- whom a reply speaks for ----------------------------------------------------------------------


def test_only_the_grid_says_whom_a_reply_speaks_for() -> None:
    """A holder's reply counts once, whatever it writes; else its weight could be anybody's."""
    wanted = plan(weighting="size", min_holders=1)

    def greedy(request: RoundRequest) -> RecordDict:
        content = TrainReply(np.ones(4, np.float32), 3 * wanted.largest_weight).records()
        content["answered_by"] = ConfigRecord({"nodes": [2, 3, 4]})
        content["speaks-for"] = ConfigRecord({"holders": 3})
        return content

    grid = FakeGrid({"liar": greedy, "honest": pulls_towards(1.0), "other": pulls_towards(1.0)})
    for one in (FakeGrid, LinkGrid):
        assert one.answered_by is BaseGrid.answered_by
    (reply,) = grid.send_and_receive(requests(grid, wanted, 1)[:1])
    assert list(grid.answered_by(reply)) == [2]
    _, summary = one_round(grid, wanted)
    assert summary.accepted == ("honest", "other")
    assert "weight" in summary.missed["liar"]


def test_a_sums_weight_is_bounded_by_those_that_it_speaks_for() -> None:
    wanted = plan(weighting="size")
    largest = wanted.largest_weight
    for weight, holders_, good in ((3 * largest, 3, True), (3 * largest, 2, False)):
        content = TrainReply(np.zeros(4, np.float32), weight).records()
        if good:
            assert TrainReply.of(content, wanted, 4, holders=holders_).weight == weight
        else:
            with pytest.raises(WireError, match="weight"):
                TrainReply.of(content, wanted, 4, holders=holders_)


# -- whole runs -----------------------------------------------------------------------------------


def final(engine: str = "batched", seed: int = 0, **settings: object) -> np.ndarray:
    wanted = plan_for(TinyTask(), {"rounds": 3, "epsilon": 5.0, "local_steps": 2, **settings})
    result = run_experiment(Experiment(TinyTask(), wanted, (seed,), 6, engine=engine))
    return result.runs[0].parameters


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weighting": "size", "batch_size": 8},
        {"strategy": "fedadam", "server_learning_rate": 0.1},
        {"strategy": "fedmedian"},
        {"cohort": 3, "batch_size": 8},
        {"evaluate": "never", "average_from": 0.5},
        {"epsilon": None, "no_dp": True, "momentum": 0.5, "batch_size": 2},
    ],
    ids=str,
)
def test_the_final_model_is_that_of_opacus(settings: dict[str, object]) -> None:
    one = final(**settings)
    np.testing.assert_allclose(one, final("opacus", **settings), rtol=0, atol=1e-5)
    assert np.array_equal(one, final(**settings)), "the same seed, the same bits"
    assert np.abs(one - final(seed=1, **settings)).max() > 1e-3, "another seed shows"


def of_holders(engine: str = "batched", seed: int = 0, **settings: object) -> RunResult:
    """A run of 12 holders that are the unit themselves."""
    common = {"unit": "holder", "epsilon": 5.0, "clip_norm": 0.3, "rounds": 6, "local_steps": 2}
    wanted = plan_for(TinyTask(), {"holder_size": 40, **common, **settings}, holders=12)
    return run_experiment(Experiment(TinyTask(), wanted, (seed,), 12, engine=engine)).runs[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"cohort": 4},
        {"cohort": 6, "clipping": "adaptive", "strategy": "fedadam"},
        {"mechanism": "banded", "bands": 3, "average_from": 0.5},
    ],
    ids=str,
)
def test_with_holders_as_the_unit_both_engines_agree(settings: dict[str, object]) -> None:
    one, other = of_holders(**settings), of_holders("opacus", **settings)
    np.testing.assert_allclose(one.parameters, other.parameters, rtol=0, atol=1e-5)
    took_part = [set(summary.accepted) for summary in one.history]
    assert took_part == [set(summary.accepted) for summary in other.history]
    assert len({frozenset(names) for names in took_part}) > 1, "not the same holders every round"
    assert np.array_equal(one.parameters, of_holders(**settings).parameters)
    assert np.abs(one.parameters - of_holders(seed=1, **settings).parameters).max() > 1e-3


def test_holders_are_clipped_each_before_they_are_summed() -> None:
    """Negative control in one: the plain sum of the same updates is longer than 3C."""
    wanted = plan_for(
        TinyTask(),
        {"unit": "holder", "epsilon": 5.0, "clip_norm": 0.01, "local_steps": 9, "holder_size": 40},
        holders=3,
    )
    data = TinyTask().holder_data(3)
    grid, _ = batched({**data, "h1": with_nan(data["h1"])})
    request = RoundRequest("run", 1, wanted, np.zeros(4, np.float32), 0.01)

    def sum_of(asked: RoundRequest) -> TrainReply:
        content = asked.records()
        messages = [Message(content, node, "train") for node in grid.get_node_ids()]
        (reply,) = grid.send_and_receive(messages)
        return TrainReply.of(reply.content, wanted, 4, holders=3, clip_norm=asked.clip_norm or 1e6)

    clipped = sum_of(request)
    assert clipped.weight == 3.0
    assert clipped.within == 0
    assert np.linalg.norm(clipped.update) * 3 <= 2 * 0.01 * (1 + 1e-4), "a NaN adds nothing"
    loose = sum_of(replace(request, clip_norm=1e6))
    assert loose.within == 2
    assert np.linalg.norm(loose.update) * 3 > 30 * 0.01


@pytest.mark.parametrize(("most", "fewest", "jobs"), [(1, 1, 6), (2, 1, 4), (4, 3, 2), (2, 2, 4)])
def test_how_holders_are_cut_into_blocks_hardly_shows(
    monkeypatch: pytest.MonkeyPatch, most: int, fewest: int, jobs: int
) -> None:
    usual = final(weighting="size")
    settings = {"workers.MOST": most, "jobs.FEWEST": fewest, "workers.BLOCK_BYTES": 2**40}
    for name, value in settings.items():
        monkeypatch.setattr(f"simulations.{name}", value)
    grid, workers = batched(TinyTask().holder_data(6))
    ask(grid, plan(), 1)
    assert len(workers.jobs) == jobs
    np.testing.assert_allclose(final(weighting="size"), usual, rtol=0, atol=1e-6)


class Crowd(TinyTask):
    """A hundred thousand holders, of whom few are ever looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []
        self.prepared = 0
        self.source = CrowdSource(self.made)

    def prepare(self, tables: HolderTables) -> HolderData:
        self.prepared += 1
        return super().prepare(tables)


class CrowdSource(TinySource):
    def __init__(self, made: list[str]) -> None:
        self._made = made

    def tables(self, holders: int | None = None, *, seed: int = 0) -> Mapping[str, pd.DataFrame]:
        def build(name: str) -> pd.DataFrame:
            self._made.append(name)
            return table(60, seed=int(name[1:]))

        return OnDemand([f"h{place}" for place in range(100_000)], build, keep=0)


def test_only_the_cohorts_data_are_made() -> None:
    task = Crowd()
    wanted = plan_for(task, {"rounds": 2, "epsilon": 5.0, "cohort": 20, "min_holders": 20})
    result = run_experiment(Experiment(task, wanted))
    names = range(100_000)
    asked = [cohort_of(names, wanted, number) for number in (1, 2)]
    judged = [cohort_of(names, wanted, number, "evaluation") for number in (1, 2)]
    expected = {f"h{place}" for cohort in (*asked, *judged) for place in cohort}
    assert set(task.made) == expected
    assert task.prepared <= len(expected) + 2, "each once, but for what was forgotten since"
    assert len(result.holders) == 100_000
    for summary, cohort, judges in zip(result.runs[0].history, asked, judged, strict=True):
        assert set(summary.accepted) == {f"h{place}" for place in cohort}
        assert set(summary.metrics) == {f"h{place}" for place in judges}
