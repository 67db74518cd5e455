"""A coordinator that means no good: a holder neither grows, spins nor says what it should not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from flwr.app import Message

from client.link.stream import Ended, Outgoing, Stream, Welcomed
from client.node import Connected, Disconnected, Requested
from common.link import federation_pb2 as pb
from common.link.codec import encode
from common.link.federation_pb2_grpc import FederationServicer
from common.link.transfer import MAX_HEADER_BYTES
from common.link.versions import NEWEST
from tests.client.test_node import scripted
from tests.integration.processes import wait_until
from tests.linking import PATIENCE, content, echo, running

WELCOME = pb.CoordinatorFrame(
    welcome=pb.Welcome(node_id=7, holder="a", max_message_bytes=1 << 20, protocol=NEWEST)
)


def request(number: int) -> list[pb.CoordinatorFrame]:
    """The frames of a request."""
    payload = encode(content(str(number)))
    header = pb.Header(
        message_id=f"request {number}",
        message_type="train",
        layout_bytes=payload.layout_bytes,
        payload_bytes=payload.size,
    )
    chunks = [pb.CoordinatorFrame(chunk=chunk) for chunk in payload.chunks()]
    return [pb.CoordinatorFrame(header=header), *chunks]


class Coordinator(FederationServicer):
    """Says what it is told to, and then listens until the holder goes."""

    def __init__(self, *frames: pb.CoordinatorFrame) -> None:
        self.frames = frames
        self.sent = 0
        self.heard: list[pb.HolderFrame] = []

    def Join(  # noqa: N802
        self, request_iterator: Iterator[pb.HolderFrame], context: grpc.ServicerContext
    ) -> Iterator[pb.CoordinatorFrame]:
        next(request_iterator)
        for frame in self.frames:
            self.sent += 1
            yield frame
        self.heard += request_iterator


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([WELCOME, WELCOME], "a second Welcome"),
        (request(1), "came before Welcome"),
        ([pb.CoordinatorFrame(withdraw=pb.Withdraw(message_id="x"))], "came before Welcome"),
        ([WELCOME, *request(1)[1:]], "a chunk came without a header"),
        (
            [WELCOME, pb.CoordinatorFrame(header=pb.Header(group_id="g" * MAX_HEADER_BYTES))],
            "a header of",
        ),
        (
            [WELCOME, pb.CoordinatorFrame(header=pb.Header(payload_bytes=1 << 62))],
            "bytes is announced",
        ),
    ],
    ids=["welcome twice", "request first", "withdraw first", "stray chunk", "header", "huge"],
)
def test_a_coordinator_that_breaks_the_contract_is_left(
    frames: list[pb.CoordinatorFrame], says: str
) -> None:
    with scripted(Coordinator(*frames)) as port, running(port, name="a") as runner:
        disconnected = runner.wait_for(Disconnected)
        assert isinstance(disconnected, Disconnected)
        assert says in disconnected.reason


def test_requests_do_not_pile_up() -> None:
    entered, release = threading.Event(), threading.Event()

    def work(message: Message) -> Message:
        entered.set()
        assert release.wait(PATIENCE)
        return echo(message)

    frames = [frame for number in range(20) for frame in request(number)]
    with scripted(Coordinator(WELCOME, *frames)) as port, running(port, work, name="a") as runner:
        disconnected = runner.wait_for(Disconnected)
        release.set()
        assert isinstance(disconnected, Disconnected)
        assert "more than 4 requests wait" in disconnected.reason


def test_withdrawn_requests_that_were_not_begun_are_forgotten() -> None:
    entered, release, calls = threading.Event(), threading.Event(), []

    def work(message: Message) -> Message:
        calls.append(message.metadata.message_id)
        entered.set()
        assert release.wait(PATIENCE)
        return echo(message)

    frames = [WELCOME, *request(0)]
    for number in range(1, 100):
        withdraw = pb.Withdraw(message_id=f"request {number}")
        frames += [*request(number), pb.CoordinatorFrame(withdraw=withdraw)]
    coordinator = Coordinator(*frames, *request(100))
    with scripted(coordinator) as port, running(port, work, name="a") as runner:
        for _ in range(101):
            runner.wait_for(Requested)
        release.set()
        runner.node.stop()
        runner.join()
    assert calls[0] == "request 0"
    assert set(calls) <= {"request 0", "request 100"}


@contextmanager
def stream(port: int) -> Iterator[tuple[Stream, SimpleQueue[Any]]]:
    """A connection whose events nobody takes."""
    inbox: SimpleQueue[Any] = SimpleQueue()
    hello = pb.Hello(protocol=NEWEST, name="a")
    address = f"localhost:{port}"
    one = Stream(address, keys=None, hello=hello, inbox=inbox, max_message_bytes=1 << 20)
    try:
        yield one, inbox
    finally:
        one.close()


def test_a_node_that_is_slow_is_not_flooded() -> None:
    withdraw = pb.CoordinatorFrame(withdraw=pb.Withdraw(message_id="x" * 10_000))
    coordinator = Coordinator(WELCOME, *[withdraw] * 5000)
    with scripted(coordinator) as port:
        with stream(port) as (_, inbox):
            wait_until(lambda: inbox.qsize() == 16, "as many events as may wait")
            assert inbox.qsize() == 16
        assert coordinator.sent < 5000, "the rest never left the coordinator"


def test_replies_that_nobody_takes_do_not_pile_up() -> None:
    class Deaf(FederationServicer):
        """Never reads anything after Hello."""

        def Join(  # noqa: N802
            self, request_iterator: Iterator[pb.HolderFrame], context: grpc.ServicerContext
        ) -> Iterator[pb.CoordinatorFrame]:
            next(request_iterator)
            yield WELCOME
            release.wait(PATIENCE)

    release = threading.Event()
    payload = encode(content(size=1 << 22))
    reply = Outgoing(pb.Header(payload_bytes=payload.size), payload)
    with scripted(Deaf()) as port, stream(port) as (one, inbox):
        assert isinstance(inbox.get(timeout=PATIENCE), Welcomed)
        for _ in range(20):
            one.send(reply)
        ended = inbox.get(timeout=PATIENCE)
        release.set()
    assert isinstance(ended, Ended)
    assert "takes no reply" in ended.reason


def test_what_it_says_is_one_printable_line() -> None:
    nasty = "line\n\x1b[2J" * 5000
    welcome = pb.Welcome(holder="a\x1b[31m", federation=nasty, protocol=NEWEST)
    goodbye = pb.Goodbye(code=pb.Goodbye.DRAINING, reason=nasty)
    frames = (pb.CoordinatorFrame(welcome=welcome), pb.CoordinatorFrame(goodbye=goodbye))
    with scripted(Coordinator(*frames)) as port, running(port, name="a") as runner:
        connected, gone = runner.wait_for(Connected), runner.wait_for(Disconnected)
        assert isinstance(connected, Connected)
        assert isinstance(gone, Disconnected)
        for text in (connected.holder, connected.federation, gone.reason):
            assert text.isprintable()
            assert len(text) <= 300


def test_a_frame_that_is_none_is_no_reason_for_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def join(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield b"\xff\xff\xff"

    handler = grpc.stream_stream_rpc_method_handler(join)
    methods = grpc.method_handlers_generic_handler("sotto.link.v1.Federation", {"Join": handler})
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((methods,))
        port = server.add_insecure_port("localhost:0")
        server.start()
        with running(port, name="a") as runner:
            runner.wait_for(Disconnected)
        server.stop(None).wait(PATIENCE)
    assert not any(record.exc_info for record in caplog.records)
