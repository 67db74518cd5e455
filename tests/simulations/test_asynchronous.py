"""Simulated time: who is first is decided by a seed, and everything that follows repeats."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from flwr.app import Message

from client.holder import Holder
from common.errors import ConfigurationError, Refusal
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks.parameters import initial_parameters
from common.wire import RoundRequest, refusal_error
from server.aggregation import build_strategy
from server.buffered import buffered_rounds
from server.checkpoints import RunState
from server.rounds import rounds
from server.summaries import RoundSummary
from simulations.asynchronous import AsynchronousGrid
from simulations.experiment import Experiment, ExperimentResult, run_experiment
from simulations.faults import Byzantine, Faults, FaultyGrid, Pace, RoundFaults, Straggle
from simulations.grid import InProcessGrid, simulated_holder
from simulations.results import document
from simulations.sweep import Sweep
from tests.commands import sotto
from tests.fakes import Answer, FakeGrid, pulls_towards
from tests.tiny import TinyTask

CPU = torch.device("cpu")
ENGINES = ("batched", "opacus")
PACE = Pace(10.0, 1.0)


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"no_dp": True, "rounds": 6, **settings})


def simulate(
    holders: int = 10, faults: Faults | None = None, engine: str = "batched", **settings: object
) -> ExperimentResult:
    chosen = plan(**settings)
    return run_experiment(Experiment(TinyTask(), chosen, (0,), holders, CPU, engine, faults=faults))


def buffered(holders: int = 10, engine: str = "batched", **settings: object) -> ExperimentResult:
    wanted = {"strategy": "fedbuff", "buffer": 4, "min_holders": 4, **settings}
    return simulate(holders, Faults(pace=PACE), engine, **wanted)


def same(one: ExperimentResult, other: ExperimentResult) -> bool:
    """Whether two experiments agree in every bit of the model and in whose updates made it."""
    (first,), (second,) = one.runs, other.runs
    told = [[(each.accepted, each.staleness) for each in run.history] for run in (first, second)]
    return bool(np.array_equal(first.parameters, second.parameters)) and told[0] == told[1]


# -- pace -----------------------------------------------------------------------------------------


def test_paces_are_log_normal_over_holders() -> None:
    logs = np.array([math.log(PACE.seconds(0, f"h{i}") / 10.0) for i in range(4000)])
    assert abs(logs.mean()) < 4 / math.sqrt(4000)
    assert abs(logs.std() - 1.0) < 4 / math.sqrt(2 * 4000)
    shares = np.sort([NormalDist().cdf(each) for each in logs])
    # Kolmogorov–Smirnov at 1e-4: 2.23/√n.
    assert np.abs(shares - np.arange(4000) / 4000).max() < 2.23 / math.sqrt(4000)


def test_a_holder_keeps_its_pace_and_another_seed_has_others() -> None:
    faults = Faults(straggle=Straggle(1.0, 5.0), pace=PACE)
    extra = [faults.delay(0, number, "h1") - PACE.seconds(0, "h1") for number in range(1, 5)]
    assert extra == pytest.approx([Straggle(1.0, 5.0).delay(0, n, "h1") for n in range(1, 5)])
    assert PACE.seconds(0, "h1") != PACE.seconds(1, "h1") != PACE.seconds(1, "h2")
    assert Pace(30.0).seconds(3, "h7") == 30.0


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "SECONDS"), ("0:1", "positive"), ("5:-1", "SIGMA"), ("5:x", "SIGMA"), ("5:9", "SIGMA")],
)
def test_what_is_no_pace_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=f"pace: .*{why}"):
        Pace.parsed(text)
    assert Pace.parsed("30:0.5") == Pace(30.0, 0.5)
    assert Pace.parsed("30") == Pace(30.0)


# -- asynchronous rounds --------------------------------------------------------------------------


def test_a_seed_gives_the_same_bits_every_time() -> None:
    one = buffered(12, epsilon=3.0, no_dp=None)
    assert same(one, buffered(12, epsilon=3.0, no_dp=None))
    assert one.clocks == buffered(12).clocks  # noise takes no time


def test_every_engine_has_the_same_order_and_nearly_the_same_model() -> None:
    blocks, single = (buffered(engine=engine) for engine in ENGINES)
    assert blocks.clocks == single.clocks
    assert [each.accepted for each in blocks.runs[0].history] == [
        each.accepted for each in single.runs[0].history
    ]
    assert np.allclose(blocks.runs[0].parameters, single.runs[0].parameters, atol=1e-5)


def test_models_come_when_the_answers_that_make_them_do() -> None:
    """By hand: everybody is asked at 0, and again when there is a model that is new to it."""
    result = buffered(5, buffer=2, min_holders=2, rounds=8)
    pace = {f"h{i}": PACE.seconds(0, f"h{i}") for i in range(5)}
    works_on = dict.fromkeys(pace, 1)
    due, now = dict(pace), 0.0
    for summary, end in zip(result.runs[0].history, result.clocks[0], strict=True):
        for name in pace.keys() - due.keys():
            due[name], works_on[name] = now + pace[name], summary.round
        counted = []
        while len(counted) < 2:
            now, name = min((moment, name) for name, moment in due.items())
            counted.append((name, summary.round - works_on[name]))
            del due[name]
            if works_on[name] < summary.round and len(counted) < 2:
                due[name], works_on[name] = now + pace[name], summary.round
        assert sorted(counted) == list(zip(summary.accepted, summary.staleness, strict=True))
        assert end == pytest.approx(now)


def test_the_slow_keep_nobody_waiting() -> None:
    """Rounds take as long as the slowest of ten; half a buffer's holders are fast ones."""
    in_rounds = simulate(10, Faults(pace=PACE), min_holders=10)
    slowest = max(PACE.seconds(0, f"h{i}") for i in range(10))
    assert in_rounds.clocks[0] == pytest.approx([slowest * number for number in range(1, 7)])
    assert buffered(10).clocks[0][-1] < in_rounds.clocks[0][-1] / 4


def test_without_a_pace_all_are_alike_and_take_turns() -> None:
    result = simulate(6, None, strategy="fedbuff", buffer=3, min_holders=3, rounds=4)
    first, second, *_ = (summary.accepted for summary in result.runs[0].history)
    assert {*first, *second} == {f"h{i}" for i in range(6)}
    assert result.clocks == [[0.0] * 4]
    assert "simulated_seconds" not in document(result)


def test_dropouts_and_stragglers_are_shown_and_the_run_goes_on() -> None:
    faults = Faults(0.2, Straggle(0.3, 400.0), Byzantine(0.2, "scale", 2.0), PACE)
    settings = {"strategy": "fedbuff", "buffer": 4, "min_holders": 4, "rounds": 30}
    one, other = (
        simulate(12, faults, engine, round_deadline=60.0, **settings) for engine in ENGINES
    )
    told = {why for each in one.runs[0].history for why in each.missed.values()}
    assert told == {"no reply within 60 s"}
    assert one.faults == other.faults
    for what in ("dropped", "late", "attacked"):
        assert sum(getattr(each, what) for each in one.faults) > 0
    assert np.allclose(one.runs[0].parameters, other.runs[0].parameters, atol=1e-4)


def test_a_hundred_holders_are_trained_in_blocks() -> None:
    """Half of them make a model; those who are asked for the same one are computed at once."""
    calls = []

    class Counting(FakeGrid):
        def individually(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            asked = list(messages)
            calls.append(len(asked))
            return super().send_and_receive(asked, timeout=timeout)

    chosen = plan(strategy="fedbuff", buffer=50, min_holders=50)
    inner = Counting({f"h{i}": pulls_towards(1.0) for i in range(100)})
    grid = AsynchronousGrid(inner, Faults(pace=PACE), 0, [])
    state = RunState("run", 0, np.zeros(5, np.float32))
    list(buffered_rounds(grid, chosen, build_strategy(chosen), state))
    assert sum(calls) > 300
    assert len(calls) < 20


def test_what_happened_to_whom_is_counted() -> None:
    result = buffered(10, rounds=20)
    assert len(result.faults) == 20
    assert 6 <= result.faults[-1].spare < 10  # at work when the last model was made
    waited = [each.waited for each in result.faults]
    assert sum(waited) == pytest.approx(result.clocks[0][-1])
    written = document(result)
    assert written["simulated_seconds"]["total"] == pytest.approx(result.clocks[0][-1])
    assert written["faults"]["pace"] == {"median_seconds": 10.0, "sigma": 1.0}


# -- what it costs --------------------------------------------------------------------------------


@contextmanager
def holders_of(chosen: TrainingPlan, count: int) -> Iterator[dict[str, Holder]]:
    data = TinyTask().holder_data(count)
    holders = {name: simulated_holder(name, TinyTask(), data[name], chosen, CPU) for name in data}
    try:
        yield holders
    finally:
        for holder in holders.values():
            holder.state.close()


def releases(holders: Mapping[str, Holder]) -> Counter[tuple[str, int]]:
    """Holder and round → how often it was charged."""
    return Counter(
        (name, entry.release.round)
        for name, holder in holders.items()
        for entry in holder.state.ledger.entries()
        if entry.release
    )


class Crash(Exception):
    """Stands for a process that is gone."""


def last_before_a_crash(training: Iterator[tuple[RunState, RoundSummary]]) -> RunState:
    """The newest state that a checkpoint would hold."""
    states = []
    with suppress(Crash):
        states.extend(state for state, _ in training)
    return states[-1]


def test_a_restart_in_the_middle_of_a_buffer_charges_no_round_twice() -> None:
    chosen = plan(strategy="fedbuff", buffer=3, min_holders=3, epsilon=3.0, no_dp=None, rounds=8)

    class Dying(AsynchronousGrid):
        def pull_messages(self, message_ids):  # type: ignore[no-untyped-def]
            if self.now() > 20.0:
                raise Crash
            return super().pull_messages(message_ids)

    state = RunState("run", 0, initial_parameters(TinyTask(), 0))
    with holders_of(chosen, 6) as holders:
        faults = Faults(pace=PACE)
        dying = Dying(InProcessGrid(holders), faults, 0, [])
        state = last_before_a_crash(buffered_rounds(dying, chosen, build_strategy(chosen), state))
        before = releases(holders)
        assert 0 < state.round < 8
        grid = AsynchronousGrid(InProcessGrid(holders), faults, 0, [])
        found = list(buffered_rounds(grid, chosen, build_strategy(chosen), state))
        after = releases(holders)
    assert found[-1][0].round == 8
    # Some had answered for the current model before the crash, and answered again for nothing.
    again = {(name, state.round + 1) for name in holders}
    assert again & before.keys()
    assert again <= after.keys()
    assert set(after.values()) == {1}


def test_no_holder_releases_more_often_than_the_plan_has_rounds() -> None:
    """The composition that noise is calibrated for is of so many; a fast holder needs them all."""
    chosen = plan(strategy="fedbuff", buffer=1, min_holders=1, epsilon=3.0, no_dp=None, rounds=10)
    state = RunState("run", 0, initial_parameters(TinyTask(), 0))
    with holders_of(chosen, 4) as holders:
        # In this seed one holder is ten times as fast as the next.
        grid = AsynchronousGrid(InProcessGrid(holders), Faults(pace=Pace(10.0, 5.0)), 5, [])
        list(buffered_rounds(grid, chosen, build_strategy(chosen), state))
        charged = Counter(name for name, _ in releases(holders).elements())
        spent = {name: holder.spent() for name, holder in holders.items()}
    assert max(charged.values()) == 10
    assert min(charged.values()) < 5
    assert max(spent.values()) <= 3.0


# -- over-selection -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["fedavg", "fedmedian"])
def test_the_first_updates_of_a_cohort_count_and_the_others_are_told(
    engine: str, strategy: str
) -> None:
    result = simulate(
        20, Faults(pace=PACE), engine, strategy=strategy, cohort=8, over_selection=0.3
    )
    pace = {f"h{i}": PACE.seconds(0, f"h{i}") for i in range(20)}
    before = 0.0
    for summary, end in zip(result.runs[0].history, result.clocks[0], strict=True):
        assert len(summary.accepted) == 8
        assert set(summary.missed.values()) == {"not among the first 8"}
        assert len(summary.missed) == math.ceil(0.3 * 8)
        last = max(pace[name] for name in summary.accepted)
        assert last < min(pace[name] for name in summary.missed)
        assert end - before == pytest.approx(last)
        before = end
    assert sum(each.spare for each in result.faults) == 6 * 3


def test_over_selection_saves_the_time_of_the_slowest() -> None:
    usual, more = (
        simulate(40, Faults(pace=PACE), cohort=10, over_selection=share, rounds=20)
        for share in (0.0, 0.3)
    )
    assert more.clocks[0][-1] < 0.7 * usual.clocks[0][-1]


def test_dropouts_are_made_up_for_without_waiting_for_the_deadline() -> None:
    faults = Faults(0.1, pace=PACE)
    settings = {"cohort": 10, "rounds": 12, "min_holders": 1, "round_deadline": 300.0}
    usual = simulate(40, faults, over_selection=0.0, **settings)
    more = simulate(40, faults, over_selection=0.6, **settings)
    assert max(np.diff(usual.clocks[0])) == pytest.approx(300.0)
    assert max(np.diff(more.clocks[0])) < 100.0
    assert all(len(each.accepted) == 10 for each in more.runs[0].history)


def test_those_who_come_too_late_have_worked_and_pay() -> None:
    chosen = plan(cohort=3, over_selection=1.0, epsilon=3.0, no_dp=None, rounds=1)
    with holders_of(chosen, 8) as holders:
        grid = FaultyGrid(InProcessGrid(holders), Faults(pace=PACE), 0, happened := [])
        state = RunState("run", 0, initial_parameters(TinyTask(), 0))
        ((_, summary),) = rounds(grid, chosen, build_strategy(chosen), state)
        charged = {name for name, _ in releases(holders)}
    assert charged == {*summary.accepted, *summary.missed}
    assert len(charged) == 6
    assert happened == [RoundFaults(0, 0, 0, happened[0].waited, spare=3)]


def test_an_error_takes_nobodys_place() -> None:
    """The fastest of a cohort declines: the cohort is complete all the same."""
    chosen = plan(cohort=8, over_selection=0.5)
    state = RunState("run", 0, np.zeros(5, np.float32))
    refusal = refusal_error(Refusal("budget", "nothing is left"))

    def first_round(**unwilling: Answer) -> RoundSummary:
        people = {f"h{i}": pulls_towards(1.0) for i in range(20)} | unwilling
        grid = FaultyGrid(FakeGrid(people), Faults(pace=PACE), 0, [])
        return next(rounds(grid, chosen, build_strategy(chosen), state))[1]

    fastest = min(first_round().accepted, key=lambda name: PACE.seconds(0, name))
    summary = first_round(**{fastest: lambda _: refusal})
    assert len(summary.accepted) == 8
    assert summary.missed[fastest] == "declined: budget: nothing is left"


def test_where_all_are_as_fast_chance_decides_and_not_the_order_of_names() -> None:
    grid = FaultyGrid(FakeGrid({f"h{i}": pulls_towards(1.0) for i in range(20)}), Faults(), 0, [])
    times = Counter[int]()
    for number in range(1, 201):
        request = RoundRequest("run", number, plan(rounds=200), np.zeros(5, np.float32))
        messages = [Message(request.records(), node, "train") for node in grid.get_node_ids()]
        first = list(grid.replies(messages, enough=10))
        times.update(reply.metadata.src_node_id for reply in first)
        assert len(first) == 10
    # 20 are asked each time and 10 count: each with probability ½; 4.5 deviations.
    assert len(times) == 20
    assert all(abs(count - 100) < 4.5 * math.sqrt(200) / 2 for count in times.values())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "must be 0 without a cohort"),
        ({"cohort": 3, "aggregation": "secure"}, "where updates are masked"),
        (
            {"cohort": 3, "unit": "holder", "epsilon": 1.0, "no_dp": None},
            "where holders are the unit",
        ),
    ],
)
def test_over_selection_is_refused_where_who_is_fast_must_not_matter(
    settings: dict[str, object], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        plan(over_selection=0.3, **settings)


@pytest.mark.parametrize(
    ("cohort", "share", "asked"), [(10, 0.3, 13), (30, 0.1, 33), (3, 0.1, 4), (7, 0.0, 7)]
)
def test_so_many_are_asked_as_the_share_says(cohort: int, share: float, asked: int) -> None:
    assert plan(cohort=cohort, over_selection=share).asked == asked


@pytest.mark.parametrize(
    "settings", [{"strategy": "fedbuff"}, {"cohort": 2, "over_selection": 0.5}]
)
def test_a_sweep_has_no_time_and_says_so(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="a sweep has no time"):
        Sweep.over(TinyTask(), {"epsilon": 3.0, **settings})


def test_the_command_says_how_long_it_takes_in_simulated_time(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    said = sotto(
        "simulate", "medical-diagnosis", "--holders", 8, "--rounds", 6, "--no-dp", "--quiet",
        "--strategy", "fedbuff", "--pace", "30:1", "--out", tmp_path / "run", "--json", target,
    )  # fmt: skip
    assert said.code == 0, said.err
    written = json.loads(target.read_text())
    total = written["simulated_seconds"]["total"]
    assert f"In simulated time the run takes {total:.4g} seconds" in " ".join(said.out.split())
    kept = TrainingPlan.from_toml((tmp_path / "run" / "plan.toml").read_text())
    assert (kept.strategy.buffer, kept.min_holders) == (4, 4)  # half of those that there are
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["staleness"]) for line in lines] == [4] * 6
