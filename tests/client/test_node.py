from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from flwr.app import Message

from client.node import Backoff, Connected, Disconnected, Node, Replied, Requested
from common.errors import ConfigurationError, LinkError
from common.link import federation_pb2 as pb
from common.link.federation_pb2_grpc import (
    FederationServicer,
    add_FederationServicer_to_server,
)
from common.link.keepalive import SHORTEST_KEEPALIVE
from common.link.keys import CoordinatorKeys
from server.grid import LinkGrid
from tests.integration.processes import free_port, wait_until
from tests.linking import (
    PATIENCE,
    Exchange,
    ask,
    content,
    echo,
    enrol,
    running,
    sign_with,
    text_of,
)


class Gate:
    """A handler that works until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()
        self.calls = 0

    def __call__(self, message: Message) -> Message:
        self.calls += 1
        self.entered.release()
        assert self.release.wait(PATIENCE)
        return Message(content(f"call {self.calls}"), reply_to=message)


class Scripted(FederationServicer):
    """A coordinator that reads Hello and then does what a test wants."""

    def __init__(self, *frames: pb.CoordinatorFrame, abort: grpc.StatusCode | None = None) -> None:
        self.frames = frames
        self.abort = abort

    def Join(  # noqa: N802
        self, request_iterator: Iterator[pb.HolderFrame], context: grpc.ServicerContext
    ) -> Iterator[pb.CoordinatorFrame]:
        next(request_iterator)
        if self.abort is not None:
            context.abort(self.abort, "the reason")
        yield from self.frames


@contextmanager
def scripted(script: FederationServicer | None) -> Iterator[int]:
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        if script is not None:
            add_FederationServicer_to_server(script, server)
        port = server.add_insecure_port("localhost:0")
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait(PATIENCE)


def test_events_tell_what_happens() -> None:
    with (
        LinkGrid("localhost:0", keys=None, federation="clinics") as grid,
        running(grid.port, name="a") as runner,
    ):
        assert runner.wait_for(Connected) == Connected("a", "clinics")
        grid.send_and_receive([ask("a")], timeout=PATIENCE)
        assert runner.wait_for(Requested) == Requested("train", "1")
        replied = runner.wait_for(Replied)
        assert isinstance(replied, Replied)
        assert (replied.message_type, replied.group_id, replied.error) == ("train", "1", None)


def test_the_handler_sees_who_asks_and_who_is_asked() -> None:
    seen: list[Message] = []

    def remember(message: Message) -> Message:
        seen.append(message)
        return echo(message)

    with (
        LinkGrid("localhost:0", keys=None, run_id=7) as grid,
        running(grid.port, remember, name="a"),
    ):
        request = ask("a")
        (reply,) = grid.send_and_receive([request], timeout=PATIENCE)

    about = seen[0].metadata
    assert (about.src_node_id, about.dst_node_id) == (1, request.metadata.dst_node_id)
    assert about.run_id == reply.metadata.run_id == 7
    assert reply.metadata.reply_to_message_id == about.message_id != ""


def test_the_text_of_an_exception_stays() -> None:
    def fail(message: Message) -> Message:
        raise RuntimeError("patient 4711 has diabetes")

    with LinkGrid("localhost:0", keys=None) as grid, running(grid.port, fail, name="a") as runner:
        (reply,) = grid.send_and_receive([ask("a")], timeout=PATIENCE)
        (second,) = grid.send_and_receive([ask("a")], timeout=PATIENCE)
        assert isinstance(replied := runner.wait_for(Replied), Replied)

    assert reply.error.reason == second.error.reason == replied.error == "RuntimeError"


def test_a_reply_that_is_too_long_is_not_sent() -> None:
    def long(message: Message) -> Message:
        return Message(content(size=10_000), reply_to=message)

    with (
        LinkGrid("localhost:0", keys=None, max_message_bytes=5000) as grid,
        running(grid.port, long, name="a"),
    ):
        (reply,) = grid.send_and_receive([ask("a")], timeout=PATIENCE)

    assert reply.error.reason == "the reply is longer than 5000 bytes"


def test_a_request_that_is_too_long_breaks_the_connection() -> None:
    with (
        LinkGrid("localhost:0", keys=None) as grid,
        running(grid.port, name="a", max_message_bytes=100) as runner,
    ):
        exchange = Exchange(grid, ask("a"))
        disconnected = runner.wait_for(Disconnected)
        assert isinstance(disconnected, Disconnected)
        assert "at most 100 are allowed" in disconnected.reason
        grid.stop()
    del exchange


# Coming back


def test_a_restarted_coordinator_finds_its_holder_again() -> None:
    first = LinkGrid("localhost:0", keys=None)
    port = first.start()
    with running(port, sign_with("a"), name="a") as runner:
        runner.wait_for(Connected)
        first.stop()
        disconnected = runner.wait_for(Disconnected)
        assert isinstance(disconnected, Disconnected)
        assert disconnected.reason == "the coordinator stops"

        with LinkGrid(f"localhost:{port}", keys=None) as second:
            (reply,) = second.send_and_receive([ask("a", "again")], timeout=PATIENCE)

    assert text_of(reply) == "again a"


def test_a_reply_finished_while_disconnected_is_sent_and_not_made_again() -> None:
    gate = Gate()
    first = LinkGrid("localhost:0", keys=None)
    port = first.start()
    request = ask("a")
    with running(port, gate, name="a") as runner:
        lost = Exchange(first, request)
        assert gate.entered.acquire(timeout=PATIENCE)
        first.stop()
        assert lost.replies() == []
        assert isinstance(lost.error, LinkError)
        runner.wait_for(Disconnected)

        with LinkGrid(f"localhost:{port}", keys=None) as second:
            second.wait_for_holders(1, PATIENCE)
            exchange = Exchange(second, request)
            gate.release.set()
            (reply,) = exchange.replies()
            (repeated,) = second.send_and_receive([request], timeout=PATIENCE)

    assert text_of(reply) == text_of(repeated) == "call 1"
    assert gate.calls == 1


def test_a_withdrawn_request_is_not_worked_on() -> None:
    gate = Gate()
    with LinkGrid("localhost:0", keys=None) as grid, running(grid.port, gate, name="a") as runner:
        working = Exchange(grid, ask("a"))
        assert gate.entered.acquire(timeout=PATIENCE)
        runner.wait_for(Requested)

        assert grid.send_and_receive([ask("a")], timeout=0.0) == []
        last = Exchange(grid, ask("a"))
        # Frames arrive in order: with this request, the withdrawal has arrived.
        while isinstance(requested := runner.events.get(timeout=PATIENCE), Requested):
            if runner.events.empty():
                break
        assert isinstance(requested, Requested)
        gate.release.set()

        assert len(working.replies()) == len(last.replies()) == 1
    assert gate.calls == 2


def test_a_name_that_leads_elsewhere_is_followed() -> None:
    first = LinkGrid("127.0.0.1:0", keys=None)
    port = first.start()
    with running(port, sign_with("a"), name="a") as runner:
        runner.wait_for(Connected)
        first.stop()
        with LinkGrid(f"[::1]:{port}", keys=None) as second:
            (reply,) = second.send_and_receive([ask("a", "moved")], timeout=PATIENCE)
    assert text_of(reply) == "moved a"


def test_ends_with_different_keep_alive_get_on() -> None:
    """A server closes connections of clients that ping more often than it allows."""
    with (
        LinkGrid("localhost:0", keys=None, keepalive=3600.0) as grid,
        running(grid.port, name="a", keepalive=SHORTEST_KEEPALIVE) as runner,
    ):
        runner.wait_for(Connected)
        # gRPC forgives two pings that come too early; the default allows one in five minutes.
        with pytest.raises(LinkError, match="1 of 2"):
            grid.wait_for_holders(2, timeout=7.0 * SHORTEST_KEEPALIVE)
        assert len(grid.send_and_receive([ask("a")], timeout=PATIENCE)) == 1
    assert runner.node.traffic.connections == 1


@pytest.mark.parametrize("keepalive", [0.0, 0.5, 3601.0])
def test_keep_alive_has_bounds(keepalive: float) -> None:
    with pytest.raises(ConfigurationError, match="keepalive must be 1 to 3600 seconds"):
        Node("localhost:1", echo, keys=None, name="a", keepalive=keepalive)
    with pytest.raises(ConfigurationError, match="keepalive must be 1 to 3600 seconds"):
        LinkGrid("localhost:0", keys=None, keepalive=keepalive)


# Leaving


def test_stop_lets_the_handler_finish_and_sends_its_reply() -> None:
    gate = Gate()
    with LinkGrid("localhost:0", keys=None) as grid:
        with running(grid.port, gate, name="a") as runner:
            exchange = Exchange(grid, ask("a"))
            assert gate.entered.acquire(timeout=PATIENCE)
            runner.node.stop()
            gate.release.set()
            runner.join()
            assert [text_of(reply) for reply in exchange.replies()] == ["call 1"]
        assert runner.error is None


def test_a_second_stop_abandons_the_handler() -> None:
    gate = Gate()
    with LinkGrid("localhost:0", keys=None) as grid:
        with running(grid.port, gate, name="a") as runner:
            exchange = Exchange(grid, ask("a"))
            assert gate.entered.acquire(timeout=PATIENCE)
            runner.node.stop()
            runner.node.stop()
            runner.join()
        gate.release.set()
        with running(grid.port, sign_with("successor"), name="a"):
            assert [text_of(reply) for reply in exchange.replies()] == [" successor"]


def test_stop_ends_the_wait_for_a_coordinator() -> None:
    with scripted(None) as port:
        pass  # nobody listens there any more
    with running(port, name="a") as runner:
        runner.wait_for(Disconnected)
        runner.node.stop()
        runner.join()
    assert runner.error is None


# What is final


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
    ],
)
def test_a_refusal_is_final(code: grpc.StatusCode) -> None:
    with scripted(Scripted(abort=code)) as port:
        node = Node(f"localhost:{port}", echo, keys=None, name="a")
        with pytest.raises(LinkError, match="refuses this holder: the reason"):
            node.run()


def test_being_replaced_is_final() -> None:
    goodbye = pb.Goodbye(code=pb.Goodbye.REPLACED, reason="another process has joined")
    with scripted(Scripted(pb.CoordinatorFrame(goodbye=goodbye))) as port:
        node = Node(f"localhost:{port}", echo, keys=None, name="a")
        with pytest.raises(LinkError, match="another process has joined"):
            node.run()


def test_something_else_at_the_address_is_final() -> None:
    with scripted(None) as port:
        node = Node(f"localhost:{port}", echo, keys=None, name="a")
        with pytest.raises(LinkError, match="not a Sotto coordinator"):
            node.run()


def test_a_coordinator_of_another_federation_is_not_believed(tmp_path: Path) -> None:
    own = CoordinatorKeys.create_or_load(tmp_path / "own")
    other = CoordinatorKeys.create_or_load(tmp_path / "other")
    keys = enrol(tmp_path / "a", own, "a")
    with LinkGrid("localhost:0", keys=other) as grid:
        node = Node(f"localhost:{grid.port}", echo, keys=keys)
        with pytest.raises(LinkError, match="not that of this holder's federation"):
            node.run()


def test_an_unknown_frame_is_a_reason_to_update() -> None:
    with (
        scripted(Scripted(pb.CoordinatorFrame())) as port,
        running(port, name="a") as runner,
    ):
        disconnected = runner.wait_for(Disconnected)
        assert isinstance(disconnected, Disconnected)
        assert "update sotto" in disconnected.reason


def test_plain_text_needs_loopback_and_a_name() -> None:
    with pytest.raises(LinkError, match="loopback only"):
        Node("hub.example:9090", echo, keys=None, name="a")
    with pytest.raises(LinkError, match="cannot name a holder"):
        Node("localhost:9090", echo, keys=None)
    with pytest.raises(LinkError, match="HOST:PORT"):
        Node("localhost", echo, keys=None, name="a")


@pytest.mark.parametrize(
    ("attempt", "outage", "bound"),
    [(0, 0.1, 0.1), (3, 1.0, 0.8), (5, 119.0, 1.5), (200, 400.0, 5.0), (10_000, 1e6, 30.0)],
)
def test_waits_grow_with_the_outage_up_to_a_bound_and_differ(
    attempt: int, outage: float, bound: float
) -> None:
    # Of 200 uniform waits none above 80% or none below 20% has a chance of 0.8^200 < 1e-19.
    waits = [Backoff().delay(attempt, outage) for _ in range(200)]
    assert 0.0 <= min(waits) < 0.2 * bound
    assert 0.8 * bound < max(waits) <= bound


def test_where_nobody_listens_a_holder_goes_on_trying_as_often() -> None:
    """However long the coordinator is down; elsewhere the waits grow with the outage."""
    outages: list[float] = []

    class Noted(Backoff):
        def delay(self, attempt: int, outage: float) -> float:
            outages.append(outage)
            return 0.01

    node = Node(f"127.0.0.1:{free_port()}", echo, keys=None, name="north", backoff=Noted())
    thread = threading.Thread(target=node.run, daemon=True)
    thread.start()
    wait_until(lambda: len(outages) >= 3, "three attempts")
    node.stop()
    thread.join(PATIENCE)
    assert set(outages) == {0.0}
