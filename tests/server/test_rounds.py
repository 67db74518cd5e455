"""A bad reply costs its holder the round, never the run; a restart changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, MetricRecord, RecordDict

from common.errors import Refusal, RunError
from common.plan import TrainingPlan
from common.settings import plan_for
from common.wire import FAILED, refusal_error
from server.aggregation import STRATEGIES, build_strategy
from server.checkpoints import Checkpoints, RunState
from server.rounds import evaluate, rounds
from server.summaries import RoundSummary
from tests.fakes import Answer, FakeGrid, pulls_towards
from tests.tiny import TinyTask

D = 5


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"no_dp": True, "rounds": 6, **settings})


def start(dimension: int = D) -> RunState:
    return RunState("run", 0, np.linspace(-1, 1, dimension, dtype=np.float32))


def train(
    grid: FakeGrid, plan: TrainingPlan, state: RunState
) -> Iterator[tuple[RunState, RoundSummary]]:
    return rounds(grid, plan, build_strategy(plan), state)


def crowd(count: int = 5) -> FakeGrid:
    return FakeGrid({f"h{i}": pulls_towards(float(i)) for i in range(count)})


def test_fedavg_is_the_mean_of_the_updates() -> None:
    state, summary = next(train(crowd(3), plan(), start()))
    old = start().parameters
    assert np.allclose(state.parameters, old + 0.1 * (1.0 - old), atol=1e-6)
    assert summary.accepted == ("h0", "h1", "h2")
    assert not summary.missed


def broken(update: np.ndarray, weight: float = 1.0) -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"update": Array(update)}),
            "metrics": MetricRecord({"weight": weight}),
        }
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (broken(np.full(D, np.nan, np.float32)), "NaN"),
        (broken(np.full(D + 1, 1, np.float32)), "6 parameters"),
        (broken(np.full(D, 1e30, np.float32)), "above"),
        (broken(np.zeros(D, np.float32), weight=-1.0), "weight"),
        (RecordDict(), "one array"),
        (Error(FAILED, "ValueError"), "failed: ValueError"),
        (None, "no reply within"),
    ],
)
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_one_bad_holder_costs_only_its_own_round(
    answer: RecordDict | Error | None, says: str, name: str
) -> None:
    chosen = plan(strategy=name, min_holders=4)
    honest = {f"h{i}": pulls_towards(float(i)) for i in range(5)}
    with_bad = FakeGrid({**honest, "bad": lambda _: answer})
    state, summary = next(train(with_bad, chosen, start()))
    assert says in summary.missed["bad"]
    assert "bad" not in summary.accepted
    without, _ = next(train(FakeGrid(honest), chosen, start()))
    assert np.array_equal(state.parameters, without.parameters)


class Late(FakeGrid):
    """Its second holder is away until it has been looked for a few times."""

    def __init__(self, looks: int) -> None:
        super().__init__({"a": pulls_towards(1.0), "b": pulls_towards(2.0)})
        self.looks = looks

    def get_node_ids(self) -> list[int]:
        self.looks -= 1
        return super().get_node_ids()[: 1 if self.looks >= 0 else 2]


def test_a_round_waits_for_a_holder_that_is_needed_and_not_there() -> None:
    _, summary = next(train(Late(looks=3), plan(min_holders=2), start()))
    assert summary.accepted == ("a", "b")
    _, summary = next(train(Late(looks=3), plan(min_holders=1), start()))
    assert summary.accepted == ("a",)  # enough without it


class Declined(FakeGrid):
    """Two holders are there, one of which declines; a third comes when it has been looked for."""

    def __init__(self, looks: int, patience: float) -> None:
        refusal = refusal_error(Refusal("budget", "nothing is left"))
        super().__init__(
            {"a": pulls_towards(1.0), "no": lambda _: refusal, "late": pulls_towards(2.0)}
        )
        self.looks, self._patience = looks, patience

    @property
    def patience(self) -> float:
        return self._patience

    def get_node_ids(self) -> list[int]:
        self.looks -= 1
        return super().get_node_ids()[: 2 if self.looks >= 0 else 3]


def test_a_holder_that_declines_does_not_hold_up_those_who_would_not() -> None:
    state, summary = next(train(Declined(5, patience=60.0), plan(min_holders=2), start()))
    assert summary.accepted == ("a", "late")
    assert summary.missed == {"no": "declined: budget: nothing is left"}
    both = FakeGrid({"a": pulls_towards(1.0), "late": pulls_towards(2.0)})
    without, _ = next(train(both, plan(min_holders=2), start()))
    assert np.array_equal(state.parameters, without.parameters)


def test_nobody_is_waited_for_where_nobody_can_come() -> None:
    grid = Declined(10**9, patience=0.0)
    with pytest.raises(RunError, match="1 of at least 2 updates"):
        next(train(grid, plan(min_holders=2), start()))
    assert [name for name, _, _ in grid.asked] == ["a", "no"]  # and each once


def test_of_a_cohort_that_falls_short_only_as_many_others_are_asked_as_are_lacking() -> None:
    refusal = refusal_error(Refusal("budget", "nothing is left"))
    unwilling = {f"no{number}": (lambda _: refusal) for number in range(4)}
    grid = FakeGrid({**unwilling, **{f"h{number}": pulls_towards(1.0) for number in range(50)}})
    _, summary = next(train(grid, plan(min_holders=10, cohort=10), start()))
    assert len(summary.accepted) == 10
    assert len(grid.asked) == 10 + len(summary.missed)


def test_a_holder_that_does_not_come_in_time_is_not_waited_for_any_longer() -> None:
    short = plan(min_holders=2, round_deadline=0.1)
    with pytest.raises(RunError, match="1 of at least 2 updates"):
        next(train(Late(looks=10**9), short, start()))


def test_too_few_updates_end_the_run_with_every_reason() -> None:
    grid = FakeGrid({"a": pulls_towards(1.0), "b": lambda _: Error(FAILED, "OSError")})
    with pytest.raises(RunError, match=r"1 of at least 2 .*b: failed: OSError.*same state"):
        next(train(grid, plan(min_holders=2), start()))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_restart_from_a_checkpoint_changes_no_bit(name: str, tmp_path: Path) -> None:
    """Fails for a strategy whose memory is not all in the checkpoint (e.g. momentum)."""
    chosen = plan(strategy=name, min_holders=4, average_from=0.3)
    *_, (undisturbed, _) = train(crowd(), chosen, start())

    training = train(crowd(), chosen, start())
    for _ in range(3):
        half_way, summary = next(training)
    Checkpoints(tmp_path).save(half_way, chosen, summary)
    resumed, _ = Checkpoints(tmp_path).load(chosen)
    assert resumed is not None
    *_, (state, _) = train(crowd(), chosen, resumed.state)
    assert np.array_equal(state.released, undisturbed.released)
    assert np.array_equal(state.parameters, undisturbed.parameters)


def test_forgetting_the_momentum_would_be_noticed(tmp_path: Path) -> None:
    """Negative control of the test above."""
    chosen = plan(strategy="fedavgm", server_momentum=0.9)
    *_, (undisturbed, _) = train(crowd(), chosen, start())
    training = train(crowd(), chosen, start())
    for _ in range(3):
        half_way, _ = next(training)
    forgetful = RunState("run", 3, half_way.parameters)
    *_, (state, _) = train(crowd(), chosen, forgetful)
    assert not np.array_equal(state.parameters, undisturbed.parameters)


def test_the_order_of_replies_does_not_matter() -> None:
    class Shuffled(FakeGrid):
        def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            return list(reversed(super().send_and_receive(messages, timeout=timeout)))

    holders = {f"h{i}": pulls_towards(1e-3 * 7.0**i) for i in range(7)}
    *_, (straight, _) = train(FakeGrid(holders), plan(), start(400))
    *_, (reversed_, _) = train(Shuffled(holders), plan(), start(400))
    assert np.array_equal(straight.parameters, reversed_.parameters)


def test_a_cohort_is_drawn_anew_each_round_and_the_same_after_a_restart() -> None:
    chosen = plan(cohort=2, rounds=12)
    first, second = crowd(6), crowd(6)
    list(train(first, chosen, start()))
    list(train(second, chosen, start()))
    assert first.asked == second.asked
    by_round = {number: {n for n, _, r in first.asked if r == number} for number in range(1, 13)}
    assert all(len(names) == 2 for names in by_round.values())
    assert len({frozenset(names) for names in by_round.values()}) > 1


def test_an_over_selected_round_closes_with_the_first_updates_and_names_the_others() -> None:
    chosen = plan(cohort=3, over_selection=0.5, min_holders=2)
    grid = crowd(20)
    _, summary = next(train(grid, chosen, start()))
    asked = {name for name, _, _ in grid.asked}
    assert len(asked) == 5
    assert len(summary.accepted) == 3
    assert set(summary.missed) == asked - set(summary.accepted)
    assert set(summary.missed.values()) == {"not among the first 3"}


def test_an_over_selected_round_that_lacks_updates_waits_for_all_of_them() -> None:
    silent: dict[str, Answer] = {f"s{i}": lambda _: None for i in range(3)}
    grid = FakeGrid({"a": pulls_towards(1.0), "b": pulls_towards(2.0), **silent})
    chosen = plan(cohort=3, over_selection=2.0, min_holders=2)
    _, summary = next(train(grid, chosen, start()))
    assert summary.accepted == ("a", "b")
    assert set(summary.missed.values()) == {"no reply within 600 s"}


def test_a_holder_that_is_away_is_named_and_not_dropped_in_silence() -> None:
    class Incomplete(FakeGrid):
        def away(self) -> list[str]:
            return ["gone"]

    grid = Incomplete({"here": pulls_towards(1.0)})
    _, summary = next(train(grid, plan(), start()))
    assert summary.accepted == ("here",)
    assert summary.missed == {"gone": "away when the round began"}


def test_averaging_releases_the_mean_of_the_later_models() -> None:
    chosen = plan(rounds=4, average_from=0.5)
    states = [state for state, _ in train(crowd(), chosen, start())]
    expected = (states[2].parameters.astype(float) + states[3].parameters) / 2
    assert np.allclose(states[-1].released, expected, atol=1e-6)
    assert np.array_equal(states[1].released, states[1].parameters)


def test_evaluation_shows_only_what_holders_share() -> None:
    metrics = RecordDict({"metrics": MetricRecord({"weight": 1.0, "auc": 0.7})})
    silent = RecordDict({"metrics": MetricRecord({"weight": 1.0})})
    grid = FakeGrid(
        {"open": lambda _: metrics, "closed": lambda _: silent, "odd": lambda _: RecordDict()}
    )
    summary = RoundSummary(1, ("open",), {}, 0.1)
    state = RunState("run", 1, np.zeros(D, np.float32))
    evaluated = evaluate(grid, plan(), TinyTask(), state, summary)
    assert evaluated.metrics == {"open": {"auc": 0.7}}
    assert "rejected" in evaluated.missed["odd"]
