"""Replies as they come: asking without waiting, progress, and what is left open when it ends."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import grpc
import pytest
from flwr.app import Message

from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.codec import CHUNK_BYTES
from common.link.identity import node_id_of
from server.grid import LinkGrid
from tests.integration.processes import wait_until
from tests.linking import (
    PATIENCE,
    Exchange,
    RawHolder,
    ask,
    reply_frames,
    running,
    sign_with,
    text_of,
)

LARGE = 3 * CHUNK_BYTES // 4  # numbers of a message of three chunks


@pytest.fixture
def grid() -> Iterator[LinkGrid]:
    with LinkGrid("localhost:0", keys=None, max_message_bytes=8 * CHUNK_BYTES) as grid:
        yield grid


@contextmanager
def joined(grid: LinkGrid, *names: str) -> Iterator[list[RawHolder]]:
    with ExitStack() as stack:
        holders = [stack.enter_context(RawHolder(grid.port, name)) for name in names]
        for holder in holders:
            holder.receive("welcome")
        yield holders


def asked(holders: list[RawHolder]) -> list[str]:
    """Ids of the requests that holders have received."""
    return [holder.receive_request().message_id for holder in holders]


class Consumer:
    """Takes replies one by one on a thread."""

    def __init__(self, replies: Iterator[Message]) -> None:
        self.texts: list[object] = []
        self.error: LinkError | None = None
        self._replies = replies
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            for reply in self._replies:
                self.texts.append(reply.error.reason if reply.has_error() else text_of(reply))
        except LinkError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


# As they come


def test_a_reply_is_handed_out_while_others_are_open(grid: LinkGrid) -> None:
    with joined(grid, "a", "b") as holders:
        replies = Consumer(grid.replies([ask("a"), ask("b")], timeout=PATIENCE))
        to_a, to_b = asked(holders)

        holders[1].reply(to_b, "b is first")
        wait_until(lambda: replies.texts == ["b is first"], "the reply of b")
        holders[0].reply(to_a, "then a")
        replies.join()

        assert replies.texts == ["b is first", "then a"]


def test_what_is_open_when_enough_have_answered_is_withdrawn(grid: LinkGrid) -> None:
    with joined(grid, "a", "b", "c") as holders:
        messages = [ask(name) for name in "abc"]
        replies = Consumer(grid.replies(messages, timeout=PATIENCE, enough=1))
        to_a, to_b, to_c = asked(holders)

        failure = pb.Failure(code=2, reason="ValueError")
        holders[0].send(header=pb.Header(reply_to=to_a, message_type="train", failure=failure))
        wait_until(lambda: replies.texts == ["ValueError"], "an error, which is not enough")
        holders[1].reply(to_b, "enough")
        replies.join()

        assert replies.texts == ["ValueError", "enough"]
        assert holders[2].receive("withdraw").message_id == to_c


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_an_iterator_that_is_left_withdraws_its_requests(grid: LinkGrid, how: str) -> None:
    with joined(grid, "a", "b") as holders:
        replies = grid.replies([ask("a"), ask("b")], timeout=PATIENCE)
        answering = Answering(holders[1])
        assert text_of(next(iter(replies))) == "at once"
        answering.join()
        if how == "closed":
            replies.close()  # type: ignore[attr-defined]
        else:
            del replies
            gc.collect()

        assert holders[0].receive_request().message_id == holders[0].receive("withdraw").message_id


class Answering(threading.Thread):
    """A raw holder that answers one request."""

    def __init__(self, holder: RawHolder) -> None:
        super().__init__(daemon=True)
        self._holder = holder
        self.start()

    def run(self) -> None:
        self._holder.reply(self._holder.receive_request().message_id, "at once")


def test_an_iterator_that_nobody_begins_asks_nobody(grid: LinkGrid) -> None:
    with joined(grid, "a") as holders:
        grid.replies([ask("a", "never")], timeout=PATIENCE)
        exchange = Exchange(grid, ask("a", "only"))
        holders[0].reply(holders[0].receive_request().message_id, "only")
        assert [text_of(reply) for reply in exchange.replies()] == ["only"]
    assert grid.traffic.requests == 1


def test_one_id_is_asked_once_at_a_time(grid: LinkGrid) -> None:
    message = ask("a")
    exchange = Exchange(grid, message)
    wait_until(lambda: grid.traffic.requests == 1, "the first")
    with pytest.raises(LinkError, match="an id of its own"):
        grid.send_and_receive([ask("b"), message], timeout=PATIENCE)
    with running(grid.port, sign_with("a"), name="a"):
        assert len(exchange.replies()) == 1
    assert grid.traffic.requests == 1, "nothing of the second was posted"


# Without waiting


def test_what_is_pushed_is_pulled_once_it_has_come(grid: LinkGrid) -> None:
    with joined(grid, "a", "b") as holders:
        ids = grid.push_messages([ask("a"), ask("b")])
        assert asked(holders) == ids
        assert grid.pull_messages(ids) == []
        grid.wait(ids, timeout=0.0)

        holders[1].reply(ids[1], "b")
        grid.wait(ids, timeout=PATIENCE)
        assert [text_of(reply) for reply in grid.pull_messages(ids)] == ["b"]
        assert grid.pull_messages(ids) == []
        assert grid.overdue(ids) == []

        grid.forget(ids)
        assert holders[0].receive("withdraw").message_id == ids[0]
        holders[0].reply(ids[0], "too late")
        wait_until(lambda: grid.traffic.replies_dropped == 1, "the late reply")
        assert grid.pull_messages(ids) == []


def test_what_is_overdue_is_named_once(grid: LinkGrid) -> None:
    with joined(grid, "a") as holders:
        ids = grid.push_messages([ask("a")], timeout=0.05)
        grid.wait(ids, timeout=PATIENCE)
        assert grid.pull_messages(ids) == []
        assert grid.overdue(ids) == ids
        assert grid.overdue(ids) == []
        assert [holders[0].receive_request().message_id] == ids


# The end


def test_who_waits_is_let_go_when_the_grid_stops(grid: LinkGrid) -> None:
    errors: list[LinkError] = []

    def begin(work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=_note_error, args=(errors, work), daemon=True)
        thread.start()
        return thread

    with joined(grid, "a") as holders:
        replies = Consumer(grid.replies([ask("a")]))
        pushed = grid.push_messages([ask("a")])
        holders[0].receive_request()
        waiting = [
            begin(lambda: grid.wait(pushed, PATIENCE)),
            begin(lambda: grid.wait_for_change([node_id_of("a")])),
            begin(lambda: grid.wait_for_holders(2)),
        ]
        grid.stop()
        for thread in waiting:
            thread.join(PATIENCE)
        replies.join()

    assert "stopped while a request was open" in str(replies.error)
    assert len(errors) == len(waiting)
    with pytest.raises(LinkError, match="stopping"):
        grid.get_node_ids()


def _note_error(errors: list[LinkError], work: Callable[[], object]) -> None:
    try:
        work()
    except LinkError as error:
        errors.append(error)


def test_replies_that_are_coming_in_are_completed_before_the_grid_stops(grid: LinkGrid) -> None:
    with joined(grid, "a", "b") as holders:
        replies = Consumer(grid.replies([ask("a"), ask("b")]))
        to_a, _ = asked(holders)
        header, chunks = reply_frames(to_a, "in time", LARGE)
        holders[0].send(header=header)
        holders[0].send(chunk=chunks[0])
        wait_until(lambda: grid.held_bytes == CHUNK_BYTES, "the beginning of a reply")

        grid.drain(grace=PATIENCE)
        assert grid.draining
        assert holders[1].receive("goodbye").code == pb.Goodbye.DRAINING
        with RawHolder(grid.port, "late") as late:
            assert late.failure().code() is grpc.StatusCode.UNAVAILABLE
        assert replies.texts == []
        for chunk in chunks[1:]:
            holders[0].send(chunk=chunk)
        assert holders[0].receive("goodbye").code == pb.Goodbye.DRAINING
        replies.join()

    assert replies.texts == ["in time"]
    assert "stopped while a request was open" in str(replies.error)
    with pytest.raises(LinkError, match="the link is stopping"):
        grid.send_and_receive([ask("a")])


def test_a_reply_that_does_not_go_on_is_waited_for_as_long_as_the_grace(grid: LinkGrid) -> None:
    with joined(grid, "a") as holders:
        replies = Consumer(grid.replies([ask("a")]))
        header, chunks = reply_frames(*asked(holders), "", LARGE)
        holders[0].send(header=header)
        holders[0].send(chunk=chunks[0])
        wait_until(lambda: grid.held_bytes == CHUNK_BYTES, "the beginning of a reply")

        grid.drain(grace=0.1)
        grid.drain(grace=PATIENCE)  # once is enough
        replies.join()

    assert replies.texts == []
    assert replies.error is not None


# Progress


@pytest.fixture
def patient() -> Iterator[LinkGrid]:
    with LinkGrid("localhost:0", keys=None, deadline_extensions=9) as grid:
        yield grid


def say_progress(holder: RawHolder, message_id: str, every: float, times: int) -> None:
    for _ in range(times):
        time.sleep(every)
        holder.send(progress=pb.Progress(message_id=message_id))


def test_a_holder_that_shows_progress_has_more_time(patient: LinkGrid) -> None:
    with joined(patient, "a") as holders:
        # A quarter is half a second, so that a busy machine may well be late by some ticks.
        replies = Consumer(patient.replies([ask("a")], timeout=2.0))
        request = holders[0].receive_request()
        assert request.progress_every == 2.0 / 32

        say_progress(holders[0], request.message_id, 2 * request.progress_every, 20)
        holders[0].reply(request.message_id, "after 2.5 seconds")
        replies.join()

    assert replies.texts == ["after 2.5 seconds"]


def test_without_extensions_no_progress_is_asked_for_and_none_counts(grid: LinkGrid) -> None:
    with joined(grid, "a") as holders:
        replies = Consumer(grid.replies([ask("a")], timeout=0.3))
        request = holders[0].receive_request()
        assert request.progress_every == 0.0
        say_progress(holders[0], request.message_id, 0.05, 10)
        replies.join()

    assert replies.texts == []


def test_a_liar_is_waited_for_so_long_and_no_longer() -> None:
    with (
        LinkGrid("localhost:0", keys=None, deadline_extensions=1) as grid,
        joined(grid, "a") as holders,
    ):
        replies = Consumer(grid.replies([ask("a")], timeout=0.4))
        request = holders[0].receive_request()
        while replies._thread.is_alive():
            say_progress(holders[0], request.message_id, 2 * request.progress_every, 1)

    assert replies.texts == []


@pytest.mark.parametrize("which", ["unknown", "open"])
def test_a_flood_of_signs_of_life_ends_the_stream(patient: LinkGrid, which: str) -> None:
    with joined(patient, "a") as holders:
        replies = Consumer(patient.replies([ask("a")], timeout=PATIENCE))
        request = holders[0].receive_request()
        message_id = request.message_id if which == "open" else "made up"
        say_progress(holders[0], message_id, 0.0, 100)

        failure = holders[0].failure()
        assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "signs of life keep coming" in (failure.details() or "")
        with RawHolder(patient.port, "a") as again:
            again.receive("welcome")
            again.reply(again.receive_request().message_id, "the request is still open")
            replies.join()

    assert replies.texts == ["the request is still open"]


def test_a_reply_that_trickles_in_has_more_time(patient: LinkGrid) -> None:
    with joined(patient, "a") as holders:
        replies = Consumer(patient.replies([ask("a")], timeout=2.0))
        header, chunks = reply_frames(*asked(holders), "slow", 12 * CHUNK_BYTES // 4)
        holders[0].send(header=header)
        for chunk in chunks:
            time.sleep(0.2)  # thirteen of them take longer than the time of the call
            holders[0].send(chunk=chunk)
        replies.join()

    assert replies.texts == ["slow"]


# Counts


def test_traffic_is_counted(grid: LinkGrid) -> None:
    with joined(grid, "a") as holders:
        exchange = Exchange(grid, ask("a"))
        request = holders[0].receive_request()
        holders[0].reply(request.message_id, "counts", LARGE)
        holders[0].reply(request.message_id, "does not")
        exchange.replies()
        wait_until(lambda: grid.traffic.replies_dropped == 1, "the second reply")
        with RawHolder(grid.port, hello=pb.Hello(protocol=1, name="old")) as old:
            old.failure()
        reply, _ = reply_frames(request.message_id, "counts", LARGE)
        dropped, _ = reply_frames(request.message_id, "does not")

        traffic = grid.traffic
        assert (traffic.requests, traffic.replies, traffic.connections) == (1, 1, 1)
        assert traffic.refused == 1
        assert traffic.bytes_sent == request.payload_bytes
        wait_until(
            lambda: grid.traffic.bytes_received == reply.payload_bytes + dropped.payload_bytes,
            "what was dropped has been counted, too",
        )
