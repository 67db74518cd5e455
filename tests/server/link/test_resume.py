"""A large transfer goes on at the chunk where it broke: the coordinator's end."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from flwr.app import Message

from common.link import federation_pb2 as pb
from common.link.codec import CHUNK_BYTES
from common.link.identity import node_id_of
from common.link.versions import NEWEST
from server.grid import LinkGrid
from tests.integration.processes import wait_until
from tests.linking import (
    Exchange,
    RawHolder,
    ask,
    content,
    reply_frames,
    text_of,
)

LARGE = 3 * CHUNK_BYTES // 4  # numbers of a message of four chunks
MOST = 8 * CHUNK_BYTES


@pytest.fixture
def grid() -> Iterator[LinkGrid]:
    with LinkGrid("localhost:0", keys=None, max_message_bytes=MOST) as grid:
        yield grid


def hello(**fields: object) -> pb.Hello:
    return pb.Hello(protocol=NEWEST, name="a", **fields)  # type: ignore[arg-type]


def large(text: str = "") -> Message:
    return Message(content(text, LARGE), node_id_of("a"), "train", group_id="1")


def gone(grid: LinkGrid) -> None:
    wait_until(lambda: not grid.holders, "the coordinator to see that the stream has ended")


# Requests


def begin_request(grid: LinkGrid) -> tuple[Exchange, pb.Header, list[bytes]]:
    """A request of which two chunks have come when the stream ends."""
    exchange = Exchange(grid, large("once"))
    with RawHolder(grid.port, "a") as holder:
        holder.receive("welcome")
        header = holder.receive("header")
        assert isinstance(header, pb.Header)
        chunks = [holder.receive("chunk").data for _ in range(2)]  # type: ignore[attr-defined]
    gone(grid)
    return exchange, header, chunks


def test_a_request_goes_on_where_it_broke(grid: LinkGrid) -> None:
    exchange, header, chunks = begin_request(grid)
    begun = pb.Begun(message_id=header.message_id, received=2 * CHUNK_BYTES)
    with RawHolder(grid.port, hello=hello(begun=begun)) as holder:
        holder.receive("welcome")
        rest = holder.receive("header")
        assert isinstance(rest, pb.Header)
        assert rest.offset == 2 * CHUNK_BYTES
        rest.ClearField("offset")
        assert rest == header
        while sum(map(len, chunks)) < header.payload_bytes:
            chunk = holder.receive("chunk")
            assert isinstance(chunk, pb.Chunk)
            assert chunk.offset == sum(map(len, chunks))
            chunks.append(chunk.data)
        holder.reply(header.message_id, "whole")
        assert [text_of(reply) for reply in exchange.replies()] == ["whole"]

    whole = b"".join(chunks)
    assert np.arange(LARGE, dtype=np.float32).tobytes() in whole
    assert len(whole) == header.payload_bytes


@pytest.mark.parametrize(
    ("message_id", "received"),
    [
        ("another", CHUNK_BYTES),
        ("", CHUNK_BYTES),
        ("same", 0),
        ("same", 4 * CHUNK_BYTES),
        ("same", 2**63),
    ],
)
def test_a_holder_that_has_something_else_gets_the_whole_request(
    grid: LinkGrid, message_id: str, received: int
) -> None:
    exchange, header, _ = begin_request(grid)
    begun = pb.Begun(message_id=message_id, received=received)
    if message_id == "same":
        begun.message_id = header.message_id
        begun.received = min(received, header.payload_bytes + received // 2**62)
    with RawHolder(grid.port, hello=hello(begun=begun)) as holder:
        holder.receive("welcome")
        frame = next(holder._call)
        if message_id == "another":  # which was withdrawn, for all it knows
            assert frame.withdraw.message_id == "another"
            frame = next(holder._call)
        assert frame.header == header
        assert frame.header.offset == 0
    del exchange


def test_a_request_that_a_holder_has_is_not_sent_again(grid: LinkGrid) -> None:
    exchange = Exchange(grid, large())
    with RawHolder(grid.port, "a") as holder:
        holder.receive("welcome")
        header = holder.receive_request()
    gone(grid)
    before = grid.traffic.bytes_sent
    with RawHolder(grid.port, hello=hello(in_hand=[header.message_id])) as holder:
        holder.receive("welcome")
        again = holder.receive("again")
        assert isinstance(again, pb.Again)
        assert again.message_id == header.message_id
        holder.reply(header.message_id, "answered")
        assert [text_of(reply) for reply in exchange.replies()] == ["answered"]
    assert grid.traffic.bytes_sent == before


def test_what_was_withdrawn_meanwhile_may_be_forgotten(grid: LinkGrid) -> None:
    begun = pb.Begun(message_id="half", received=CHUNK_BYTES)
    with RawHolder(grid.port, hello=hello(begun=begun, in_hand=["one", "two"])) as holder:
        holder.receive("welcome")
        withdrawn = [holder.receive("withdraw").message_id for _ in range(3)]  # type: ignore[attr-defined]
    assert withdrawn == ["half", "one", "two"]


def test_what_a_holder_has_in_part_comes_before_older_requests(grid: LinkGrid) -> None:
    """Another message would have it forget the beginning."""
    older, newer = ask("a", "older"), large("newer")
    exchange = Exchange(grid, older, newer)
    with RawHolder(grid.port, "a") as holder:
        holder.receive("welcome")
        holder.receive_request()
        header = holder.receive("header")
        assert isinstance(header, pb.Header)
        holder.receive("chunk")
    gone(grid)
    begun = pb.Begun(message_id=header.message_id, received=CHUNK_BYTES)
    with RawHolder(grid.port, hello=hello(begun=begun)) as holder:
        holder.receive("welcome")
        first = holder.receive("header")
        assert isinstance(first, pb.Header)
        assert (first.message_id, first.offset) == (header.message_id, CHUNK_BYTES)
    del exchange


# Replies


class Broken:
    """A reply of which one chunk has come when the stream ends."""

    def __init__(self, grid: LinkGrid, *messages: Message) -> None:
        self.exchange = Exchange(grid, *(messages or [ask("a")]))
        with RawHolder(grid.port, "a") as holder:
            holder.receive("welcome")
            self.asked = holder.receive_request()
            self.header, self.chunks = reply_frames(self.asked.message_id, "resumed", LARGE)
            holder.send(header=self.header)
            holder.send(chunk=self.chunks[0])
            wait_until(lambda: grid.held_bytes == CHUNK_BYTES, "the first chunk")
        gone(grid)

    def rest(self, offset: int = CHUNK_BYTES) -> pb.Header:
        header = pb.Header()
        header.CopyFrom(self.header)
        header.offset = offset
        return header


def welcomed(holder: RawHolder) -> pb.Begun:
    welcome = holder.receive("welcome")
    assert isinstance(welcome, pb.Welcome)
    return welcome.begun


def test_a_reply_goes_on_where_it_broke(grid: LinkGrid) -> None:
    broken = Broken(grid)
    assert grid.held_bytes == CHUNK_BYTES, "what is kept across a break counts"
    with RawHolder(grid.port, "a") as holder:
        begun = welcomed(holder)
        assert begun == pb.Begun(message_id=broken.header.message_id, received=CHUNK_BYTES)
        assert grid.held_bytes == CHUNK_BYTES
        holder.send(header=broken.rest())
        for chunk in broken.chunks[1:]:
            holder.send(chunk=chunk)
        (reply,) = broken.exchange.replies()

    assert text_of(reply) == "resumed"
    update = reply.content.array_records["arrays"]["update"].numpy()
    assert np.array_equal(update, np.arange(LARGE, dtype=np.float32))
    assert grid.held_bytes == 0
    assert grid.traffic.bytes_received == broken.header.payload_bytes, "every byte once"


def test_a_reply_goes_on_where_an_older_stream_still_seems_to_stand(grid: LinkGrid) -> None:
    """As after a cut cable, of which the coordinator knows nothing yet."""
    exchange = Exchange(grid, ask("a"))
    with RawHolder(grid.port, "a") as first:
        first.receive("welcome")
        asked = first.receive_request()
        header, chunks = reply_frames(asked.message_id, "resumed", LARGE)
        first.send(header=header)
        first.send(chunk=chunks[0])
        wait_until(lambda: grid.held_bytes == CHUNK_BYTES, "the first chunk")
        with RawHolder(grid.port, "a") as second:
            assert welcomed(second).received == CHUNK_BYTES
            first.send(chunk=chunks[1])  # from the grave: it must count for nothing
            header.offset = CHUNK_BYTES
            second.send(header=header)
            for chunk in chunks[1:]:
                second.send(chunk=chunk)
            assert [text_of(reply) for reply in exchange.replies()] == ["resumed"]


@pytest.mark.parametrize("break_after", [0, 1])
def test_it_may_break_again_and_again(grid: LinkGrid, break_after: int) -> None:
    broken, received = Broken(grid), CHUNK_BYTES
    while received < broken.header.payload_bytes:
        with RawHolder(grid.port, "a") as holder:
            assert welcomed(holder).received == received
            holder.send(header=broken.rest(received))
            chunks = [chunk for chunk in broken.chunks if chunk.offset >= received]
            for chunk in chunks[:break_after] or chunks[:1]:
                holder.send(chunk=chunk)
                received += len(chunk.data)
            whole = received == broken.header.payload_bytes
            wait_until(
                lambda seen=received, whole=whole: grid.held_bytes == (0 if whole else seen),
                "all of that",
            )
        gone(grid)
    assert [text_of(reply) for reply in broken.exchange.replies()] == ["resumed"]


@pytest.mark.parametrize(
    "change",
    [
        {"offset": CHUNK_BYTES - 1},
        {"offset": CHUNK_BYTES + 1},
        {"offset": 2 * CHUNK_BYTES},
        {"offset": MOST + 1},
        {"message_id": "another"},
        {"payload_bytes": 2 * CHUNK_BYTES},
        {"layout_bytes": 1},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_a_beginning_goes_with_no_other_reply(grid: LinkGrid, change: dict[str, object]) -> None:
    broken = Broken(grid)
    with RawHolder(grid.port, "a") as holder:
        holder.receive("welcome")
        header = broken.rest()
        for field, value in change.items():
            setattr(header, field, value)
        holder.send(header=header)
        (reply,) = broken.exchange.replies()
        assert (reply.error.reason or "").startswith("unreadable reply")
        assert holder.failure().code() is grpc.StatusCode.INVALID_ARGUMENT
    wait_until(lambda: grid.held_bytes == 0, "nothing to be held")


def test_an_offset_where_nothing_has_begun_is_refused(grid: LinkGrid) -> None:
    exchange = Exchange(grid, ask("a"))
    with RawHolder(grid.port, "a") as holder:
        holder.receive("welcome")
        header, _ = reply_frames(holder.receive_request().message_id, "", LARGE)
        header.offset = CHUNK_BYTES
        holder.send(header=header)
        assert exchange.replies()[0].has_error()
        assert holder.failure().code() is grpc.StatusCode.INVALID_ARGUMENT


def test_another_holder_has_begun_nothing(grid: LinkGrid) -> None:
    broken = Broken(grid)
    with RawHolder(grid.port, "b") as mallory:
        assert welcomed(mallory) == pb.Begun()
        mallory.send(header=broken.rest())  # to a request of a: dropped, unkept
        for chunk in broken.chunks[1:]:
            mallory.send(chunk=chunk)
        wait_until(lambda: grid.traffic.replies_dropped == 1, "the forgery")
        assert grid.held_bytes == CHUNK_BYTES
    with RawHolder(grid.port, "a") as holder:
        assert welcomed(holder).received == CHUNK_BYTES
        holder.reply(broken.asked.message_id, "whole again")
        assert [text_of(reply) for reply in broken.exchange.replies()] == ["whole again"]


def test_a_holder_keeps_one_beginning_however_many_requests_it_has(grid: LinkGrid) -> None:
    broken = Broken(grid, ask("a"), ask("a"))
    with RawHolder(grid.port, "a") as holder:
        holder.receive("welcome")
        ids = {holder.receive_request().message_id for _ in range(2)}
        (other,) = ids - {broken.asked.message_id}
        header, chunks = reply_frames(other, "the other", LARGE)
        holder.send(header=header)
        for chunk in chunks[:2]:
            holder.send(chunk=chunk)
        wait_until(lambda: grid.held_bytes == 2 * CHUNK_BYTES, "the other's, and only that")
    gone(grid)
    assert grid.held_bytes == 2 * CHUNK_BYTES
    with RawHolder(grid.port, "a") as holder:
        assert welcomed(holder).message_id == header.message_id


@pytest.mark.parametrize("away", [True, False])
def test_nothing_is_kept_of_a_reply_that_nobody_waits_for(grid: LinkGrid, away: bool) -> None:
    (message_id,) = grid.push_messages([ask("a")])
    with RawHolder(grid.port, "a") as holder:
        holder.receive("welcome")
        header, chunks = reply_frames(holder.receive_request().message_id, "", LARGE)
        holder.send(header=header)
        holder.send(chunk=chunks[0])
        wait_until(lambda: grid.held_bytes == CHUNK_BYTES, "the first chunk")
    gone(grid)
    if away:
        grid.forget([message_id])
        wait_until(lambda: grid.held_bytes == 0, "nothing to be held")
    with RawHolder(grid.port, "a") as holder:
        begun = welcomed(holder)
        assert begun.received == (0 if away else CHUNK_BYTES)
        grid.forget([message_id])
        wait_until(lambda: grid.held_bytes == 0, "nothing to be held")
        header.offset = CHUNK_BYTES  # it was on its way when the request was withdrawn
        holder.send(header=header)
        for chunk in chunks[1:]:
            holder.send(chunk=chunk)
        exchange = Exchange(grid, ask("a"))
        frame = next(holder._call)
        while frame.header.message_id in ("", message_id):
            frame = next(holder._call)
        holder.reply(frame.header.message_id, "the stream is sound")
        assert [text_of(reply) for reply in exchange.replies()] == ["the stream is sound"]
