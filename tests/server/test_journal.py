"""A round that a crash cut short goes on with what had come in, and asks only for the rest."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, MessageType
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StateError
from common.flower import stamp
from common.settings import plan_for
from common.wire import RoundRequest, TrainReply
from server.journal import Journal, JournalGrid, RoundJournal
from tests.fakes import FakeGrid, pulls_towards
from tests.tiny import TinyTask

PLAN = plan_for(TinyTask(), {"no_dp": True, "rounds": 9})


class Killed(Exception):
    """Stands for a process that is gone."""


class Cut(FakeGrid):
    """Its coordinator is killed once so many replies have been handed out.

    Args:
        holders: as of :class:`FakeGrid`.
        after: replies until then; None for never.
    """

    def __init__(self, holders: dict[str, object], after: int | None = None) -> None:
        super().__init__(holders)  # type: ignore[arg-type]
        self.after = after

    def replies(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Iterator[Message]:
        for reply in super().replies(messages, timeout=timeout, enough=enough):
            if self.after == 0:
                raise Killed
            self.after = None if self.after is None else self.after - 1
            yield reply


def crowd(after: int | None = None, count: int = 4) -> Cut:
    return Cut({f"h{i}": pulls_towards(float(i)) for i in range(count)}, after)


def requests(
    grid: FakeGrid, number: int = 1, kind: str = MessageType.TRAIN, fill: float = 0.0
) -> list[Message]:
    content = RoundRequest("run", number, PLAN, np.full(3, fill, np.float32)).records()
    messages = [Message(content, node, kind) for node in grid.get_node_ids()]
    for message in messages:
        stamp(message)
    return messages


def updates(replies: Iterable[Message]) -> dict[int, np.ndarray]:
    return {
        reply.metadata.src_node_id: TrainReply.of(reply.content, PLAN, 3).update
        for reply in replies
        if not reply.has_error()
    }


def same(first: dict[int, np.ndarray], second: dict[int, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[node], second[node]) for node in first
    )


@given(st.integers(0, 3))
def test_only_what_is_missing_is_asked_for_again(
    tmp_path_factory: pytest.TempPathFactory, after: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    undisturbed = updates(crowd().send_and_receive(requests(crowd())))
    cut = crowd(after)
    with pytest.raises(Killed):
        JournalGrid(cut, Journal(folder)).send_and_receive(requests(cut))

    again = crowd()
    replies = JournalGrid(again, Journal(folder)).send_and_receive(requests(again))
    assert same(updates(replies), undisturbed)
    assert [name for name, _, _ in again.asked] == [f"h{i}" for i in range(after, 4)]


def test_replies_come_in_the_order_of_requests_and_answer_them(tmp_path: Path) -> None:
    cut = crowd(2)
    with pytest.raises(Killed):
        JournalGrid(cut, Journal(tmp_path)).send_and_receive(requests(cut))
    asked = requests(crowd())
    asked.reverse()
    replies = JournalGrid(crowd(), Journal(tmp_path)).send_and_receive(asked)
    assert [reply.metadata.reply_to_message_id for reply in replies] == [
        message.metadata.message_id for message in asked
    ]


def test_an_exchange_that_was_over_takes_nobody_more(tmp_path: Path) -> None:
    silent = FakeGrid({"h0": pulls_towards(0.0), "h1": lambda _: None})
    first = updates(JournalGrid(silent, Journal(tmp_path)).send_and_receive(requests(silent)))
    awake = FakeGrid({"h0": pulls_towards(0.0), "h1": pulls_towards(1.0)})
    again = updates(JournalGrid(awake, Journal(tmp_path)).send_and_receive(requests(awake)))
    assert same(again, first)
    assert not awake.asked


def test_what_a_holder_declined_it_declined(tmp_path: Path) -> None:
    grid = FakeGrid({"h0": lambda _: Error(1000, "budget: nothing is left")})
    JournalGrid(grid, Journal(tmp_path)).send_and_receive(requests(grid))
    again = FakeGrid({"h0": pulls_towards(0.0)})
    (reply,) = JournalGrid(again, Journal(tmp_path)).send_and_receive(requests(again))
    assert reply.error.reason == "budget: nothing is left"


def test_another_question_is_asked_anew(tmp_path: Path) -> None:
    """Or a model would be trained with updates that were computed on another."""
    grid = crowd()
    JournalGrid(grid, Journal(tmp_path)).send_and_receive(requests(grid))
    again = crowd()
    other = requests(again, fill=5.0)
    replies = updates(JournalGrid(again, Journal(tmp_path)).send_and_receive(other))
    assert same(replies, updates(crowd().send_and_receive(requests(crowd(), fill=5.0))))
    assert len(again.asked) == 4
    # ... and this is what the file says from now on.
    third = crowd()
    replies = JournalGrid(third, Journal(tmp_path)).send_and_receive(requests(third, fill=5.0))
    assert not third.asked
    assert len(replies) == 4


def test_another_question_is_not_asked_under_a_key_that_was_drawn(tmp_path: Path) -> None:
    """The same noise on two sums would show their difference."""
    written(tmp_path)
    again = crowd()
    with pytest.raises(StateError, match="another version of sotto wrote it"):
        JournalGrid(again, Journal(tmp_path)).send_and_receive(requests(again, fill=5.0))
    assert not again.asked


def test_an_evaluation_alone_is_found_behind_the_training(tmp_path: Path) -> None:
    grid = crowd()
    first = JournalGrid(grid, Journal(tmp_path))
    first.send_and_receive(requests(grid))
    first.send_and_receive(requests(grid, kind=MessageType.EVALUATE))
    again = crowd()
    grid_again = JournalGrid(again, Journal(tmp_path))
    assert grid_again.begun(1, evaluation=True) == again.get_node_ids()
    grid_again.send_and_receive(requests(again, kind=MessageType.EVALUATE))
    assert not again.asked


def test_who_has_replied_counts_as_there_and_keeps_its_name(tmp_path: Path) -> None:
    cut = crowd(2)
    with pytest.raises(Killed):
        JournalGrid(cut, Journal(tmp_path)).send_and_receive(requests(cut))

    class Nobody(FakeGrid):
        def get_node_ids(self) -> list[int]:
            return []

        def holder_name(self, node_id: int) -> str:
            return f"node {node_id}"

    grid = JournalGrid(Nobody({}), Journal(tmp_path), known=("h0", "gone"))
    assert grid.begun(1) == [2, 3, 4, 5]
    assert [grid.holder_name(node) for node in grid.get_node_ids()] == ["h0", "h1"]
    assert grid.away() == ["gone"]
    assert grid.begun(2) is None
    assert grid.get_node_ids() == []


def test_enough_is_enough_over_a_restart(tmp_path: Path) -> None:
    cut = crowd(2)
    with pytest.raises(Killed):
        list(JournalGrid(cut, Journal(tmp_path)).replies(requests(cut), enough=3))
    again = crowd()
    replies = list(JournalGrid(again, Journal(tmp_path)).replies(requests(again), enough=3))
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4]
    third = crowd()
    replies = list(JournalGrid(third, Journal(tmp_path)).replies(requests(third), enough=3))
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4]
    assert not third.asked


def test_a_rounds_own_randomness_is_the_same_after_a_restart_and_no_other_rounds(
    tmp_path: Path,
) -> None:
    first, again = Journal(tmp_path), Journal(tmp_path)
    drawn = first.randomness(1)
    noise, coins = drawn.normal((50,), std=1.0), drawn.uniform(50)
    repeated = again.randomness(1)
    # The other way round: neither moves the other.
    assert np.array_equal(repeated.uniform(50), coins)
    assert np.array_equal(repeated.normal((50,), std=1.0), noise)
    assert not np.array_equal(again.randomness(2).normal((50,), std=1.0), noise)
    assert not drawn.predictable
    again.discard(1)
    assert not np.array_equal(again.randomness(1).normal((50,), std=1.0), noise)


# -- the file -------------------------------------------------------------------------------------


def written(folder: Path) -> Path:
    grid = crowd()
    journal = Journal(folder)
    journal.randomness(1)
    JournalGrid(grid, journal).send_and_receive(requests(grid))
    journal.close()
    (path,) = folder.glob("journal-*.bin")
    return path


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    assert written(tmp_path).stat().st_mode & 0o077 == 0


EVERY = os.environ.get("SOTTO_CORRUPTION") == "all"


def test_a_flip_of_any_byte_is_found_and_the_round_comes_out_the_same(tmp_path: Path) -> None:
    """Each byte in turn, by any of the 255 others; in the suite one byte in 11."""
    path = written(tmp_path)
    honest = path.read_bytes()
    undisturbed = updates(crowd().send_and_receive(requests(crowd())))
    draws = random.Random(6)
    for place in range(0, len(honest), 1 if EVERY else 11):
        flipped = bytearray(honest)
        flipped[place] ^= draws.randrange(1, 256)
        path.write_bytes(flipped)
        grid = crowd()
        journal = Journal(tmp_path)
        replies = JournalGrid(grid, journal).send_and_receive(requests(grid))
        journal.close()
        assert same(updates(replies), undisturbed), place
        whole = RoundJournal(path)  # what was asked for again is written after what was whole
        assert whole.recalled(evaluation=False) == {2, 3, 4, 5}
        whole.close()


@settings(max_examples=30)
@given(st.data())
def test_a_file_that_is_cut_anywhere_is_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = written(folder)
    honest = path.read_bytes()
    path.write_bytes(honest[: data.draw(st.integers(0, len(honest)))])
    grid = crowd()
    replies = JournalGrid(grid, Journal(folder)).send_and_receive(requests(grid))
    assert same(updates(replies), updates(crowd().send_and_receive(requests(crowd()))))


def test_journals_go_with_the_checkpoints_that_could_need_them(tmp_path: Path) -> None:
    journal, grid = Journal(tmp_path), crowd()
    for number in (1, 2, 3, 4):
        JournalGrid(grid, journal).send_and_receive(requests(grid, number))
    journal.complete(3)
    journal.drop(up_to=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "journal-000003.bin",
        "journal-000004.bin",
    ]
    assert journal.has_trained(3)
    assert not journal.has_trained(2)
    journal.clear()
    assert not list(tmp_path.iterdir())
