"""Updates that are combined as they come: each counts once, with the weight of its age."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError, Refusal, RunError
from common.flower import Around, BaseGrid
from common.plan import TrainingPlan
from common.settings import plan_for
from common.wire import FAILED, RoundRequest, TrainReply, refusal_error
from server.aggregation import build_strategy
from server.app import federate
from server.buffered import buffered_rounds, staleness_weight
from server.checkpoints import RunState
from server.runs import RunFolder
from server.summaries import RoundSummary
from tests.fakes import Answer, FakeGrid, pulls_towards
from tests.tiny import TinyTask

TASK = TinyTask()
D = 5

Open = Sequence[tuple[str, int]]
"""Name and round of the requests that are not answered, in the order in which they were made."""
Pick = Callable[[Open], int | None]
"""Which of them is answered next; None if nobody answers in this second."""


class OneASecond(FakeGrid):
    """Whoever waits gets one answer a second, in an order that the test gives.

    Args:
        holders: what each answers.
        pick: whose turn it is.
    """

    def __init__(self, holders: dict[str, Answer], pick: Pick) -> None:
        super().__init__(holders)
        self.pick, self.seconds = pick, 0.0
        self.open: dict[str, tuple[str, int, float]] = {}
        self.forgotten: list[tuple[str, int]] = []
        self.most_open = 0
        self._answers: dict[str, Message] = {}

    def push_messages(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[str]:
        keys = []
        for message in messages:
            replies = self.send_and_receive([message])
            keys.append(message.metadata.message_id)
            name, _, number = self.asked[-1]
            self.open[keys[-1]] = (name, number, self.seconds + (timeout or math.inf))
            self._answers |= dict.fromkeys(keys[-1:], *replies) if replies else {}
        self.most_open = max(self.most_open, len(self.open))
        return keys

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        keys = [key for key in message_ids if key in self.open]
        self.seconds += 1
        place = self.pick([self.open[key][:2] for key in keys])
        if place is not None and keys[place] in self._answers:
            self._replies[keys[place]] = self._answers.pop(keys[place])
            del self.open[keys[place]]

    def overdue(self, message_ids: Iterable[str]) -> list[str]:
        over = [
            key for key in message_ids if key in self.open and self.open[key][2] <= self.seconds
        ]
        for key in over:
            del self.open[key]
        return over

    def forget(self, message_ids: Iterable[str]) -> None:
        self.forgotten += [self.open.pop(key)[:2] for key in message_ids if key in self.open]


def plan(**chosen: object) -> TrainingPlan:
    return plan_for(TASK, {"no_dp": True, "rounds": 6, "strategy": "fedbuff", **chosen})


def start(dimension: int = D) -> RunState:
    return RunState("run", 0, np.linspace(-1, 1, dimension, dtype=np.float32))


def train(
    grid: BaseGrid, chosen: TrainingPlan, state: RunState | None = None
) -> Iterator[tuple[RunState, RoundSummary]]:
    return buffered_rounds(grid, chosen, build_strategy(chosen), state or start())


def in_turn(names: Sequence[str]) -> Pick:
    """These holders answer one after the other."""
    coming = iter(names)
    return lambda waiting: [name for name, _ in waiting].index(next(coming))


def first_come(waiting: Open) -> int:
    del waiting
    return 0


def at_random(seed: int) -> Pick:
    chance = random.Random(seed)
    return lambda waiting: chance.randrange(len(waiting))


def crowd(count: int, pick: Pick = first_come, **others: Answer) -> OneASecond:
    return OneASecond({**{f"h{i}": pulls_towards(float(i)) for i in range(count)}, **others}, pick)


# -- the paper's algorithm ------------------------------------------------------------------------


def test_an_update_weighs_less_with_every_model_that_was_made_since() -> None:
    """s(τ) of Nguyen et al. 2022: 1, 0.71, 0.58, ½."""
    weights = [staleness_weight(age) for age in range(4)]
    assert weights == pytest.approx([1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5], rel=1e-15)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_models_are_those_of_the_paper(rate: float) -> None:
    """Three models of two updates each, by hand: w + η/K · Σ s(τ)Δ.

    float32 has 24 bits, and each of some ten operations on numbers up to 2 loses half of the last
    one: 1e-5 is ten times that. The weights without their root differ by a thousand times more.
    """
    order = ["h0", "h1", "h0", "h2", "h3", "h1"]
    chosen = plan(buffer=2, min_holders=2, rounds=3, server_learning_rate=rate)
    grid = crowd(4, in_turn(order))
    models = [start().parameters.astype(float)]
    made = [state.parameters for state, _ in train(grid, chosen)]

    def update(target: float, of: int) -> np.ndarray:
        return 0.1 * (target - models[of])

    models.append(models[0] + rate / 2 * (update(0, of=0) + update(1, of=0)))
    models.append(models[1] + rate / 2 * (update(0, of=1) + update(2, of=0) / math.sqrt(2)))
    # h3 was asked for the first model only, and h1 for the second.
    aged = update(3, of=0) / math.sqrt(3) + update(1, of=1) / math.sqrt(2)
    models.append(models[2] + rate / 2 * aged)
    for found, expected in zip(made, models[1:], strict=True):
        assert np.allclose(found, expected, atol=1e-5)
    unaged = models[2] + rate / 2 * (update(3, of=0) + update(1, of=1))
    assert not np.allclose(made[-1], unaged, atol=1e-2)  # the tolerance tells them apart


def test_a_summary_says_whose_updates_count_and_how_old_they_are() -> None:
    chosen = plan(buffer=2, min_holders=2, rounds=3)
    grid = crowd(4, in_turn(["h0", "h1", "h0", "h2", "h3", "h1"]))
    summaries = [summary for _, summary in train(grid, chosen)]
    assert [summary.accepted for summary in summaries] == [("h0", "h1"), ("h0", "h2"), ("h1", "h3")]
    assert [summary.staleness for summary in summaries] == [(0, 0), (0, 1), (1, 2)]
    assert [RoundSummary.from_json(each.to_json()) for each in summaries] == summaries


def test_declared_sizes_weigh_beside_age() -> None:
    def of_weight(weight: float, value: float) -> Answer:
        return lambda _: TrainReply(np.full(D, value, np.float32), weight).records()

    chosen = plan(buffer=2, min_holders=2, rounds=1, weighting="size")
    grid = OneASecond({"small": of_weight(1.0, 1.0), "large": of_weight(3.0, 5.0)}, first_come)
    ((state, _),) = train(grid, chosen)
    assert np.allclose(state.parameters, start().parameters + (1 * 1 + 3 * 5) / 4, atol=1e-5)


# -- any order of arrival -------------------------------------------------------------------------

HOLDERS, ROUNDS, BUFFER = 4, 6, 3


def traced(name: str) -> Answer:
    """An update that says where it is from: a one at the place of its holder and round."""

    def answer(request: RoundRequest) -> RecordDict:
        update = np.zeros(HOLDERS * ROUNDS, np.float32)
        update[place_of(name, request.round)] = 1.0
        return TrainReply(update, 1.0).records()

    return answer


def place_of(name: str, number: int) -> int:
    return int(name[1:]) * ROUNDS + number - 1


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_every_accepted_update_counts_exactly_once_in_whatever_order_they_come(seed: int) -> None:
    names = [f"h{number}" for number in range(HOLDERS)]
    grid = OneASecond({name: traced(name) for name in names}, at_random(seed))
    chosen = plan(buffer=BUFFER, min_holders=BUFFER, rounds=ROUNDS)
    zero = RunState("run", 0, np.zeros(HOLDERS * ROUNDS, np.float32))
    expected = np.zeros(HOLDERS * ROUNDS)
    counted = []
    for state, summary in train(grid, chosen, zero):
        assert len(summary.accepted) == BUFFER
        for name, age in zip(summary.accepted, summary.staleness, strict=True):
            place = place_of(name, summary.round - age)
            expected[place] += staleness_weight(age) / BUFFER
            counted.append(place)
        assert np.allclose(state.parameters, expected, atol=1e-6)
    assert len(set(counted)) == len(counted) == ROUNDS * BUFFER
    # And nobody was asked twice for a model.
    assert max(Counter(grid.asked).values()) == 1


@given(st.permutations(["h0", "h1", "h2"]))
def test_the_order_within_a_buffer_changes_no_bit(order: list[str]) -> None:
    chosen = plan(buffer=3, min_holders=3, rounds=1)
    ((state, _),) = train(crowd(3, in_turn(order)), chosen)
    ((straight, _),) = train(crowd(3, in_turn(["h0", "h1", "h2"])), chosen)
    assert np.array_equal(state.parameters, straight.parameters)


def test_the_same_order_gives_the_same_bits() -> None:
    chosen = plan(buffer=2, min_holders=2, cohort=3)
    one, other = (list(train(crowd(6, at_random(4)), chosen)) for _ in range(2))
    assert all(
        np.array_equal(a.parameters, b.parameters)
        for (a, _), (b, _) in zip(one, other, strict=True)
    )


def test_a_grid_around_another_is_asked_as_the_other_is() -> None:
    chosen = plan(buffer=2, min_holders=2)
    direct, around = crowd(4, at_random(2)), crowd(4, at_random(2))
    straight, wrapped = list(train(direct, chosen)), list(train(Around(around), chosen))
    assert around.asked == direct.asked
    assert around.forgotten == direct.forgotten
    assert np.array_equal(wrapped[-1][0].parameters, straight[-1][0].parameters)


# -- who is at work -------------------------------------------------------------------------------


def test_a_slow_holder_keeps_nobody_waiting() -> None:
    def never_the_slow(waiting: Open) -> int:
        return next(place for place, (name, _) in enumerate(waiting) if name != "h0")

    grid = crowd(3, never_the_slow)
    summaries = [summary for _, summary in train(grid, plan(buffer=2, min_holders=2))]
    assert len(summaries) == 6
    assert all("h0" not in summary.accepted for summary in summaries)
    assert [number for name, _, number in grid.asked if name == "h0"] == [1]
    assert ("h0", 1) in grid.forgotten  # in the end nobody waits for it any more


def test_an_update_that_is_too_old_is_dropped_and_its_holder_named() -> None:
    slow = ["h0", "h1"] * 3 + ["h2", "h0", "h1"]
    chosen = plan(buffer=2, min_holders=2, rounds=4, max_staleness=2)
    *_, (_, last) = train(crowd(3, in_turn(slow)), chosen)
    assert last.accepted == ("h0", "h1")
    assert last.missed == {
        "h2": "update dropped: 3 models were made since its own, and max_staleness is 2"
    }
    *_, (_, last) = train(
        crowd(3, in_turn(slow)), plan(buffer=2, min_holders=2, rounds=4, max_staleness=3)
    )
    assert last.staleness == (0, 3)  # and one that is just young enough counts


def test_as_many_are_at_work_as_the_cohort_says_and_everybody_has_a_turn() -> None:
    grid = crowd(9, at_random(1))
    list(train(grid, plan(buffer=2, min_holders=2, cohort=4, rounds=40)))
    assert grid.most_open == 4
    times = Counter(name for name, _, _ in grid.asked)
    assert set(times) == {f"h{i}" for i in range(9)}
    # 80 updates and those at work, among nine: none is asked many times as often as another.
    assert max(times.values()) < 4 * min(times.values())


def test_a_frozen_holder_is_shown_as_missing_until_it_answers_again() -> None:
    frozen = {"h0"}

    def thawed_later(waiting: Open) -> int | None:
        willing = [place for place, (name, _) in enumerate(waiting) if name not in frozen]
        return willing[0] if willing else None

    grid = crowd(4, thawed_later)
    chosen = plan(buffer=3, min_holders=3, rounds=12, round_deadline=5.0)
    missing, counted = [], []
    for _, summary in train(grid, chosen):
        missing.append(summary.missed.get("h0"))
        counted.append("h0" in summary.accepted)
        if summary.round == 7:
            frozen.clear()
    assert missing[0] is None  # it was at work, and not late yet
    assert set(missing[2:7]) == {"no reply within 5 s"}
    assert not any(counted[:7])
    assert any(counted)
    assert missing[-1] is None
    numbers = [number for name, _, number in grid.asked if name == "h0"]
    assert len(numbers) > 2
    assert all(before < after for before, after in pairwise(numbers))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (refusal_error(Refusal("budget", "nothing is left")), "declined: budget: nothing is left"),
        (Error(FAILED, "OSError"), "failed: OSError"),
        (TrainReply(np.full(D, np.nan, np.float32), 1.0).records(), "NaN"),
        (RecordDict(), "one array"),
    ],
)
def test_one_bad_holder_costs_only_its_own_updates(answer: RecordDict | Error, why: str) -> None:
    chosen = plan(buffer=3, min_holders=3)
    grid = crowd(3, bad=lambda _: answer)
    *_, (state, summary) = train(grid, chosen)
    assert why in summary.missed["bad"]
    assert max(Counter(grid.asked).values()) == 1  # once a model, not again and again
    *_, (without, _) = train(crowd(3), chosen)
    assert np.array_equal(state.parameters, without.parameters)


def test_where_nobody_is_left_to_ask_the_run_ends_with_every_reason() -> None:
    grid = crowd(2, bad=lambda _: Error(FAILED, "OSError"))
    with pytest.raises(RunError, match=r"2 of the 3 updates .*bad: failed: OSError.*same state"):
        list(train(grid, plan(buffer=3, min_holders=3)))


def test_where_nobody_answers_the_run_ends_after_a_deadline() -> None:
    grid = crowd(3, lambda _: None)
    with pytest.raises(RunError, match=r"0 of the 2 .*h2: no reply within 30 s"):
        list(train(grid, plan(buffer=2, min_holders=2, round_deadline=30.0)))
    assert grid.seconds == 30


def test_a_holder_that_comes_later_is_asked_at_once() -> None:
    class Growing(OneASecond):
        def get_node_ids(self) -> list[int]:
            return super().get_node_ids()[: 2 if self.seconds < 5 else 3]

    grid = Growing({f"h{i}": pulls_towards(float(i)) for i in range(3)}, first_come)
    summaries = [summary for _, summary in train(grid, plan(buffer=2, min_holders=2))]
    assert "h2" not in {name for each in summaries[:2] for name in each.accepted}
    assert "h2" in {name for each in summaries for name in each.accepted}


def test_a_holder_that_is_away_is_named() -> None:
    class Incomplete(OneASecond):
        def away(self) -> list[str]:
            return ["gone"]

    grid = Incomplete({"a": pulls_towards(1.0), "b": pulls_towards(2.0)}, first_come)
    _, summary = next(train(grid, plan(buffer=2, min_holders=2)))
    assert summary.missed == {"gone": "away"}


# -- a restart ------------------------------------------------------------------------------------


class Crash(Exception):
    """Stands for a process that is gone."""


def test_a_restart_in_the_middle_of_a_buffer_asks_everybody_for_the_current_model() -> None:
    def crashing(waiting: Open) -> int:
        if crowded.seconds == 8:  # two models are made, and one update of the third is there
            raise Crash
        return first_come(waiting)

    chosen = plan(buffer=3, min_holders=3)
    crowded = crowd(4, crashing)
    training = train(crowded, chosen)
    states = [next(training)[0] for _ in range(2)]
    with pytest.raises(Crash):
        next(training)
    assert crowded.open == {}  # whoever gives up wants nothing any more

    again = crowd(4)
    summaries = [summary for _, summary in train(again, chosen, states[-1])]
    assert [name for name, _, number in again.asked if number == 3] == ["h0", "h1", "h2", "h3"]
    assert min(number for _, _, number in again.asked) == 3
    assert [summary.round for summary in summaries] == [3, 4, 5, 6]
    assert summaries[0].staleness == (0, 0, 0)  # what was computed on older models is lost


def test_a_run_on_disk_goes_on_from_its_last_model(tmp_path: Path) -> None:
    def crash_in(number: int) -> Callable[[RoundSummary], None]:
        def on_round(summary: RoundSummary) -> None:
            if summary.round == number:
                raise Crash

        return on_round

    folder = RunFolder.begin(tmp_path, plan(buffer=2, min_holders=2))
    with pytest.raises(Crash):
        federate(crowd(3), folder.plan, TASK, folder, crash_in(3))
    again = crowd(3)
    result = federate(again, folder.plan, TASK, folder)
    asked = [number for _, kind, number in again.asked if kind == "train"]
    assert min(asked) == 4, "what is in a checkpoint is not asked for again"
    assert [summary.round for summary in result.history] == [1, 2, 3, 4, 5, 6]
    assert all(len(summary.staleness) == 2 for summary in result.history)
    assert (tmp_path / "model.safetensors").exists()


def test_the_rounds_of_a_damaged_checkpoint_are_left_out_and_no_round_has_two_models(
    tmp_path: Path,
) -> None:
    """A holder that answered sends what it computed on the model that the round had then."""
    chosen = plan(buffer=2, min_holders=2, evaluate="never")
    folder = RunFolder.begin(tmp_path, chosen)
    shown: dict[int, set[bytes]] = defaultdict(set)

    def looking(target: float) -> Answer:
        def answer(request: RoundRequest) -> RecordDict | Error | None:
            shown[request.round].add(request.parameters.tobytes())
            return pulls_towards(target)(request)

        return answer

    def people(pick: Pick) -> OneASecond:
        return OneASecond({f"h{i}": looking(float(i)) for i in range(4)}, pick)

    def in_round_4(waiting: Open) -> int:
        if any(number == 4 for _, number in waiting):
            raise Crash
        return first_come(waiting)

    with pytest.raises(Crash):
        federate(people(in_round_4), chosen, TASK, folder)
    newest = max(tmp_path.glob("checkpoint-*.safetensors"))
    newest.write_bytes(b"")
    # In another order than before: round 3 would be made of others.
    result = federate(people(lambda waiting: len(waiting) - 1), chosen, TASK, folder)
    assert all(len(models) == 1 for models in shown.values())
    assert [summary.round for summary in result.history] == [1, 2, 3, 4, 5, 6]
    lost = [summary.round for summary in result.history if summary.lost]
    assert lost == [3, 4]
    assert [summary.round for summary in folder.history() if summary.lost] == lost


def test_forgetting_the_models_that_were_averaged_would_be_noticed(tmp_path: Path) -> None:
    chosen = plan(buffer=2, min_holders=2, rounds=4, average_from=0.5)
    states = [state for state, _ in train(crowd(3), chosen)]
    mean = (states[2].parameters.astype(float) + states[3].parameters) / 2
    assert np.allclose(states[-1].released, mean, atol=1e-6)


# -- where it is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"aggregation": "secure", "cohort": 3}, "looks at single updates and their age"),
        ({"unit": "holder", "epsilon": 1.0, "no_dp": None}, "only their noised sum"),
        ({"buffer": 4, "min_holders": 3}, "buffer=4 needs at least 4 holders"),
        ({"cohort": 3, "over_selection": 0.3}, "waits for nobody"),
    ],
)
def test_it_is_refused_with_a_sentence_where_it_would_be_wrong(
    chosen: dict[str, object], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        build_strategy(plan(**chosen))


def test_its_settings_are_for_it_alone() -> None:
    with pytest.raises(ConfigurationError, match=r"buffer.*give strategy 'fedbuff'"):
        plan(strategy="fedavg", buffer=3)


def test_unless_set_half_of_those_at_work_make_a_model_and_ten_at_most() -> None:
    def chosen(holders: int, **others: object) -> tuple[int, int]:
        asked = {"no_dp": True, "strategy": "fedbuff", **others}
        made = plan_for(TASK, asked, holders=holders)
        return made.strategy.buffer, made.min_holders

    assert chosen(5) == (3, 3)
    assert chosen(100) == (10, 10)
    assert chosen(100, cohort=8) == (4, 4)
    assert chosen(100, min_holders=6) == (6, 6)
    assert chosen(5, buffer=2, min_holders=4) == (2, 4)
