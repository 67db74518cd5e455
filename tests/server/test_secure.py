"""Masked rounds on a Grid: exact sums, dropouts at every exchange, and rounds that are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.holder import Holder
from common.aggregation import Masked
from common.errors import ConfigurationError, Refusal, RunError
from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.secagg.wire import STEPS, MaskedReply, message_type_of
from common.tasks.parameters import initial_parameters
from common.wire import FAILED, refusal_error
from server.aggregation import STRATEGIES, build_strategy
from server.app import federate
from server.checkpoints import RunState
from server.rounds import MOST_LOST_IN_A_ROW, next_round
from server.runs import RunFolder
from server.secure import TRAINING_SHARE, secured
from server.summaries import RoundSummary
from simulations.grid import InProcessGrid, in_process
from tests.masked import masked_plan
from tests.tiny import TinyTask

TASK = TinyTask()
EXCHANGES = (*map(message_type_of, STEPS[:2]), "train", *map(message_type_of, STEPS[2:]))
"""Message types of a masked round, in order."""

Interference = Callable[[str, Message, Message], Message | None]
"""Name, request and reply → what arrives instead; None for nothing."""


class Between(BaseGrid):
    """A Grid whose replies are interfered with."""

    def __init__(self, grid: InProcessGrid, interfere: Interference) -> None:
        super().__init__(1)
        self._grid, self._interfere = grid, interfere
        self.seen: list[tuple[str, str]] = []

    def get_node_ids(self) -> list[int]:
        return self._grid.get_node_ids()

    def holder_name(self, node_id: int) -> str:
        return self._grid.holder_name(node_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        replies = []
        for message, reply in zip(asked, self._grid.send_and_receive(asked), strict=True):
            name = self.holder_name(message.metadata.dst_node_id)
            self.seen.append((name, message.metadata.message_type))
            if (arrived := self._interfere(name, message, reply)) is not None:
                replies.append(arrived)
        return replies


def silent(*who: tuple[str, str]) -> Interference:
    """Nothing arrives of these names' answers to these kinds of message, nor after that."""
    gone: set[str] = set()

    def interfere(name: str, request: Message, reply: Message) -> Message | None:
        if (name, request.metadata.message_type) in who:
            gone.add(name)
        return None if name in gone else reply

    return interfere


def honest(name: str, request: Message, reply: Message) -> Message:
    return reply


def one_round(
    plan: TrainingPlan, interfere: Interference = honest, holders: int = 8
) -> tuple[RunState, RoundSummary]:
    data = TASK.holder_data(holders)
    with in_process(TASK, plan, data, torch.device("cpu")) as grid:
        strategy = build_strategy(plan)
        state = RunState("run", 0, initial_parameters(TASK, 0))
        return next_round(secured(Between(grid, interfere), plan), plan, strategy, state)


def eight(kind: str = "secure", **chosen: object) -> TrainingPlan:
    return masked_plan(kind, 8, no_dp=True, **chosen)


def of_survivors(names: Iterable[str]) -> np.ndarray:
    """What plain aggregation makes of the same holders."""
    present = set(names)
    plan = masked_plan("plain", 8, no_dp=True, min_holders=1)

    def only(name: str, request: Message, reply: Message) -> Message | None:
        return reply if name in present else None

    state, _ = one_round(plan, only)
    return state.parameters


def test_a_masked_round_gives_what_a_plain_one_gives() -> None:
    state, summary = one_round(eight())
    assert summary.accepted == tuple(f"h{i}" for i in range(8))
    assert not summary.missed
    assert np.abs(state.parameters - of_survivors(summary.accepted)).max() < 2e-6


@settings(max_examples=12, deadline=None)
@given(
    dropped=st.dictionaries(
        st.sampled_from([f"h{i}" for i in range(8)]), st.sampled_from(EXCHANGES), max_size=2
    )
)
def test_up_to_the_threshold_the_sum_of_those_whose_part_arrived_comes_out(
    dropped: dict[str, str],
) -> None:
    state, summary = one_round(eight(), silent(*dropped.items()))
    after = EXCHANGES.index("train") + 1
    wanted = {
        f"h{i}"
        for i in range(8)
        if EXCHANGES.index(dropped.get(f"h{i}", "query.unmasking")) >= after
    }
    assert not summary.lost
    assert set(summary.accepted) == wanted
    assert set(summary.missed) == {f"h{i}" for i in range(8)} - wanted
    assert np.abs(state.parameters - of_survivors(wanted)).max() < 2e-6


@pytest.mark.parametrize("kind", EXCHANGES)
def test_below_the_threshold_the_round_is_lost_and_says_where(kind: str) -> None:
    begin = initial_parameters(TASK, 0)
    state, summary = one_round(eight(), silent(("h0", kind), ("h3", kind), ("h6", kind)))
    assert summary.accepted == ()
    assert "fewer than 6 holders remained" in summary.lost
    assert np.array_equal(state.parameters, begin)
    assert state.round == 1, "the run goes on with the next"
    assert all("no reply within" in summary.missed[name] for name in ("h0", "h3", "h6"))
    others = {summary.missed[f"h{i}"] for i in (1, 2, 4, 5, 7)}
    (sentence,) = others
    assert sentence.startswith("lost: secure aggregation: 5 of 8 holders remained at ")
    assert sentence.endswith(", 6 are needed")


def test_a_run_goes_on_after_a_lost_round() -> None:
    plan = eight(rounds=4)
    third = iter(range(10**6))

    def interfere(name: str, request: Message, reply: Message) -> Message | None:
        if request.metadata.message_type != "train" or name in ("h0", "h1", "h2", "h3", "h4"):
            return reply
        return reply if next(third) // 3 != 1 else None  # of the second round

    with in_process(TASK, plan, TASK.holder_data(8), torch.device("cpu")) as grid:
        result = federate(Between(grid, interfere), plan, TASK)
    assert [bool(each.lost) for each in result.history] == [False, True, False, False]
    assert [len(each.accepted) for each in result.history] == [8, 0, 8, 8]


def test_a_run_whose_every_round_is_lost_stops_and_says_so() -> None:
    plan = eight(rounds=40)
    gone = silent(*((f"h{i}", "train") for i in range(5)))
    done: list[RoundSummary] = []
    with (
        in_process(TASK, plan, TASK.holder_data(8), torch.device("cpu")) as grid,
        pytest.raises(RunError, match=f"{MOST_LOST_IN_A_ROW} rounds in a row gave nothing"),
    ):
        federate(Between(grid, gone), plan, TASK, on_round=done.append)
    assert [bool(each.lost) for each in done] == [True] * MOST_LOST_IN_A_ROW


@pytest.mark.parametrize("count", [MOST_LOST_IN_A_ROW - 1, 2 * MOST_LOST_IN_A_ROW - 1])
def test_a_run_of_lost_rounds_only_does_not_end_well_however_often_it_is_started(
    count: int, tmp_path: Path
) -> None:
    """Its model would be the one that it began with, and its holders have paid for parts."""
    plan = masked_plan("secure", 8, rounds=count, evaluate="never")
    folder = RunFolder.begin(tmp_path, plan)

    def refusing(name: str, request: Message, reply: Message) -> Message:
        return Message(refusal_error(Refusal("roster", "not pinned")), reply_to=request)

    with in_process(TASK, plan, TASK.holder_data(8), torch.device("cpu")) as grid:
        for _ in range(4):
            with pytest.raises(RunError, match="gave nothing"):
                federate(Between(grid, refusing), plan, TASK, folder)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_simulation_that_lacks_holders_says_so_at_once() -> None:
    """Nobody will come, so nobody is waited for: the deadline of a round is ten minutes."""
    plan = masked_plan("secure", 9, no_dp=True)
    with (
        in_process(TASK, plan, TASK.holder_data(4), torch.device("cpu")) as grid,
        pytest.raises(RunError, match="4 of at least 7 holders are there"),
    ):
        federate(grid, plan, TASK)


def test_a_refusal_is_shown_as_it_was_said() -> None:
    """Three of eight holders have no budget left; the others do not pay for that."""
    plan = masked_plan("secure", 8)
    data = TASK.holder_data(8)
    with in_process(TASK, plan, data, torch.device("cpu")) as grid:
        for name in ("h1", "h2", "h5"):
            holder = _holder(grid, name)
            holder.policy = holder.policy.model_copy(update={"aggregation": ("plain",)})
        between = Between(grid, honest)
        state = RunState("run", 0, initial_parameters(TASK, 0))
        _, summary = next_round(secured(between, plan), plan, build_strategy(plan), state)
        assert summary.lost
        assert summary.missed["h1"].startswith("declined: aggregation: ")
        assert {kind for _, kind in between.seen} == {"query.advertise_keys"}
        assert all(_holder(grid, f"h{i}").spent() == 0 for i in range(8))


def _holder(grid: InProcessGrid, name: str) -> Holder:
    return grid.holders[name]


def tampered(kind: str, change: Callable[[RecordDict], RecordDict]) -> Interference:
    """h4's replies of one kind are changed on the way."""

    def interfere(name: str, request: Message, reply: Message) -> Message | None:
        if name == "h4" and request.metadata.message_type == kind and reply.has_content():
            return Message(change(reply.content), reply_to=request)
        return reply

    return interfere


def _garbage(content: RecordDict) -> RecordDict:
    return RecordDict({"secagg": ConfigRecord({"body": b"garbage"})})


@pytest.mark.parametrize("kind", EXCHANGES)
@pytest.mark.parametrize("change", [_garbage, lambda _: RecordDict()], ids=["garbage", "empty"])
def test_a_bad_message_costs_its_holder_the_round_and_nobody_else(
    kind: str, change: Callable[[RecordDict], RecordDict]
) -> None:
    state, summary = one_round(eight(), tampered(kind, change))
    inside = EXCHANGES.index(kind) > EXCHANGES.index("train")
    assert ("h4" in summary.accepted) is inside
    assert not summary.lost
    assert inside or "reply rejected" in summary.missed["h4"]
    assert np.abs(state.parameters - of_survivors(summary.accepted)).max() < 2e-6


def test_an_error_in_training_is_a_dropout() -> None:
    def interfere(name: str, request: Message, reply: Message) -> Message | None:
        if name == "h2" and request.metadata.message_type == "train":
            return Message(Error(FAILED, "ValueError"), reply_to=request)
        return reply

    _, summary = one_round(eight(), interfere)
    assert summary.missed == {"h2": "failed: ValueError"}
    assert len(summary.accepted) == 7


def test_a_lie_under_masks_counts_up_to_the_bound_of_a_mean_and_then_costs_everybody() -> None:
    """Nobody sees whose it is. The mean of eight may be as long as one honest update."""
    plan = eight()
    bound = plan.largest_update_norm(len(initial_parameters(TASK, 0)))
    aggregation = plan.aggregation
    assert isinstance(aggregation, Masked)
    ring = aggregation.encoding(plan)

    def lie(length: float) -> Interference:
        def change(content: RecordDict) -> RecordDict:
            reply = MaskedReply.of(content, plan, aggregation)
            vector = reply.vector.copy()
            vector[0] += int(length / ring.step)
            return replace(reply, vector=vector).records()

        return tampered("train", change)

    honest_state, _ = one_round(plan)
    state, summary = one_round(plan, lie(4 * bound))
    assert "h4" in summary.accepted
    moved = (state.parameters - honest_state.parameters)[0]
    assert moved == pytest.approx(4 * bound / 8, rel=1e-4)

    state, summary = one_round(plan, lie(16 * bound))
    assert summary.lost
    assert all("norm" in summary.missed[f"h{i}"] for i in range(8))
    assert np.array_equal(state.parameters, initial_parameters(TASK, 0))


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if kind.linear])
def test_every_linear_strategy_works_on_sums(name: str) -> None:
    for level in ("secure", "secure-sum"):
        settings = {"strategy": name, "rounds": 2, "server_learning_rate": 0.5}
        plan = masked_plan(level, 4, **settings)
        with in_process(TASK, plan, TASK.holder_data(4), torch.device("cpu")) as grid:
            result = federate(grid, plan, TASK)
        assert [len(each.accepted) for each in result.history] == [4, 4]
        assert np.isfinite(result.parameters).all()


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if not kind.linear])
def test_a_robust_strategy_refuses_at_construction(name: str) -> None:
    plan = masked_plan("secure", 8, strategy=name)
    with pytest.raises(ConfigurationError, match="looks at single updates"):
        build_strategy(plan)


def test_weights_by_size_class_are_in_the_sum() -> None:
    plan = eight(weighting="size")
    state, _ = one_round(plan)
    plain, _ = one_round(masked_plan("plain", 8, no_dp=True, weighting="size", min_holders=1))
    assert np.abs(state.parameters - plain.parameters).max() < 2e-6


def test_an_evaluation_goes_through_as_it_is() -> None:
    plan = eight(rounds=1)
    with in_process(TASK, plan, TASK.holder_data(8), torch.device("cpu")) as grid:
        between = Between(grid, honest)
        result = federate(between, plan, TASK)
    assert ("h0", "evaluate") in between.seen
    assert len(result.final.metrics) == 8


def test_the_coordinator_never_gets_an_update_in_the_clear() -> None:
    """Whatever passes the Grid in a masked round: no reply holds the holder's float update."""
    kinds: dict[str, set[str]] = {}

    def watch(name: str, request: Message, reply: Message) -> Message | None:
        arrays = [
            array for record in reply.content.array_records.values() for array in record.values()
        ]
        kinds.setdefault(request.metadata.message_type, set()).update(a.dtype for a in arrays)
        return reply

    one_round(eight(), watch)
    assert kinds == {kind: {"uint64"} if kind == "train" else set() for kind in EXCHANGES}


# -- time -----------------------------------------------------------------------------------------


class Timed(Between):
    """Notes how long each exchange may take."""

    def __init__(self, grid: InProcessGrid) -> None:
        super().__init__(grid, honest)
        self.seconds: dict[str, float | None] = {}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        self.seconds[asked[0].metadata.message_type] = timeout
        return super().send_and_receive(asked, timeout=timeout)


def test_waiting_for_one_that_trains_leaves_time_for_what_comes_after() -> None:
    plan = eight(round_deadline=100.0)
    with in_process(TASK, plan, TASK.holder_data(8), torch.device("cpu")) as inner:
        grid = Timed(inner)
        state = RunState("run", 0, initial_parameters(TASK, 0))
        next_round(secured(grid, plan), plan, build_strategy(plan), state)
    assert set(grid.seconds) == set(EXCHANGES)
    assert grid.seconds["train"] <= TRAINING_SHARE * 100.0
    light = [grid.seconds[kind] for kind in EXCHANGES if kind != "train"]
    assert all(2 * each <= (1 - TRAINING_SHARE) * 100.0 + 1e-9 for each in light)


class Joining(Between):
    """A Grid of some of its holders, until somebody waits for another one."""

    def __init__(self, grid: InProcessGrid, present: int) -> None:
        super().__init__(grid, honest)
        self.present, self.waited = present, 0

    @property
    def patience(self) -> float:
        self.waited += 1
        self.present += 1  # the next one comes as soon as it is waited for
        return 30.0

    def get_node_ids(self) -> list[int]:
        return super().get_node_ids()[: self.present]


def test_after_a_lost_round_those_who_have_not_joined_yet_are_waited_for() -> None:
    """Rounds that somebody declines are lost in no time: three would be over before they come."""
    plan = eight(rounds=4)
    with in_process(TASK, plan, TASK.holder_data(8), torch.device("cpu")) as inner:
        grid = Joining(inner, plan.min_holders)

        def declines(name: str, request: Message, reply: Message) -> Message | None:
            return None if name == "h0" else reply

        grid._interfere = declines
        result = federate(grid, plan, TASK)
    assert [bool(each.lost) for each in result.history] == [True, False, False, False]
    assert grid.waited == 1
