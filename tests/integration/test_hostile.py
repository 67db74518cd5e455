"""Strangers and dishonest holders against a real coordinator; honest holders must not notice.

What each limit is, and where it is enforced: docs/hostile-input.md. Peers of the link that break
its contract in single frames are in ``tests/server/test_grid.py``, decoders in ``tests/fuzz``.
``benchmarks/hostile.py`` does the same to `sotto serve` with a thousand connections.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from common.link import federation_pb2 as pb
from common.link.channels import channel_options
from common.link.codec import CHUNK_BYTES
from common.link.federation_pb2_grpc import FederationStub
from common.link.identity import node_id_of
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.tls import channel_credentials
from common.link.transfer import MAX_HEADER_BYTES
from common.link.versions import NEWEST
from server.grid import LinkGrid
from tests.hostile import STRANGERS, Crowd, Target
from tests.integration.processes import wait_until
from tests.linking import PATIENCE, Exchange, RawHolder, ask, enrol, running, sign_with, text_of

CROWD = 50
HONEST = ("a", "b")
MOST = 4 * CHUNK_BYTES  # the longest message of these tests


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator")


@pytest.fixture
def mallory(coordinator: CoordinatorKeys, tmp_path: Path) -> HolderKeys:
    """The keys of a holder that is on the roster and means no good."""
    return enrol(tmp_path / "mallory", coordinator, "mallory")


@pytest.fixture
def stranger(tmp_path: Path) -> HolderKeys:
    """The keys of a holder of another federation."""
    other = CoordinatorKeys.create_or_load(tmp_path / "other")
    return enrol(tmp_path / "stranger", other, "stranger")


@pytest.fixture
def grid(coordinator: CoordinatorKeys) -> Iterator[LinkGrid]:
    with LinkGrid(
        "localhost:0", keys=coordinator, max_message_bytes=MOST, handshake_timeout=1.0
    ) as grid:
        yield grid


@pytest.fixture
def honest(grid: LinkGrid, coordinator: CoordinatorKeys, tmp_path: Path) -> Iterator[None]:
    """Two holders that answer whatever they are asked."""
    with ExitStack() as nodes:
        for name in HONEST:
            keys = enrol(tmp_path / name, coordinator, name)
            nodes.enter_context(running(grid.port, sign_with(name), keys=keys))
        grid.wait_for_holders(len(HONEST), PATIENCE)
        yield


def require_undisturbed(grid: LinkGrid, rounds: int = 3) -> None:
    """The honest holders are there and answer."""
    for number in range(rounds):
        messages = [ask(name, str(number)) for name in HONEST]
        replies = grid.send_and_receive(messages, timeout=PATIENCE)
        assert [text_of(reply) for reply in replies] == [f"{number} {name}" for name in HONEST]


def large(name: str, chunks: int) -> Message:
    """A request of some megabytes."""
    vector = np.zeros(chunks * CHUNK_BYTES // 4 - 1000, np.float32)
    arrays = ArrayRecord({"update": Array(vector)})
    return Message(RecordDict({"arrays": arrays}), node_id_of(name), "train", group_id="1")


@contextmanager
def joined(grid: LinkGrid, keys: HolderKeys) -> Iterator[RawHolder]:
    with RawHolder(grid.port, keys=keys) as holder:
        holder.receive("welcome")
        yield holder


# Strangers


@pytest.mark.usefixtures("honest")
def test_rounds_go_on_among_strangers(grid: LinkGrid, stranger: HolderKeys) -> None:
    with Crowd(Target.of(grid.port, stranger), CROWD) as crowd:
        wait_until(lambda: sum(crowd.attempts.values()) >= CROWD, "the crowd")
        require_undisturbed(grid)
        wait_until(lambda: set(crowd.ended) == set(STRANGERS), "everybody to be thrown out")
        require_undisturbed(grid)

    assert [holder.name for holder in grid.holders] == list(HONEST)


@pytest.mark.parametrize("kind", STRANGERS)
def test_every_stranger_is_thrown_out(kind: str, grid: LinkGrid, stranger: HolderKeys) -> None:
    target = Target.of(grid.port, stranger)
    with Crowd(target, 3, {kind: STRANGERS[kind]}, again=False) as crowd:
        wait_until(lambda: crowd.ended[kind] == 3, "the end of all connections")


@pytest.mark.usefixtures("honest")
def test_a_revoked_holder_gets_as_far_as_a_sentence(
    grid: LinkGrid, coordinator: CoordinatorKeys, mallory: HolderKeys
) -> None:
    coordinator.revoke("mallory")
    with RawHolder(grid.port, keys=mallory) as holder:
        assert holder.failure().code() is grpc.StatusCode.PERMISSION_DENIED
    with Crowd(Target.of(grid.port, mallory), 10, again=False) as crowd:
        wait_until(lambda: sum(crowd.attempts.values()) == 10, "the crowd")
        require_undisturbed(grid)


def test_no_more_connections_than_there_may_be(
    coordinator: CoordinatorKeys, mallory: HolderKeys
) -> None:
    with (
        LinkGrid("localhost:0", keys=coordinator, max_connections=5) as grid,
        joined(grid, mallory) as holder,
    ):
        half_open = {"half_open": STRANGERS["half_open"]}
        with Crowd(Target.of(grid.port, mallory), 20, half_open, again=False) as crowd:
            wait_until(lambda: crowd.ended["half_open"] >= 15, "those beyond the limit")
            exchange = Exchange(grid, ask("mallory"))
            holder.reply(holder.receive_request().message_id, "still here")
            assert [text_of(reply) for reply in exchange.replies()] == ["still here"]


# Holders that are on the roster


def test_a_connection_that_opens_no_stream_is_closed(grid: LinkGrid, mallory: HolderKeys) -> None:
    channel = grpc.secure_channel(
        f"localhost:{grid.port}", channel_credentials(mallory), options=channel_options()
    )
    states: list[grpc.ChannelConnectivity] = []
    channel.subscribe(states.append, try_to_connect=True)
    wait_until(lambda: grpc.ChannelConnectivity.READY in states, "the connection")
    wait_until(lambda: states[-1] is not grpc.ChannelConnectivity.READY, "its end")
    channel.close()


def test_a_stream_that_does_not_say_hello_is_closed(grid: LinkGrid, mallory: HolderKeys) -> None:
    with Silent(grid.port, mallory) as silent:
        wait_until(lambda: silent.code, "the end of the stream")
        assert silent.code is grpc.StatusCode.INVALID_ARGUMENT


def test_one_identity_has_few_streams(
    coordinator: CoordinatorKeys, mallory: HolderKeys, tmp_path: Path
) -> None:
    keys = enrol(tmp_path / "a", coordinator, "a")
    with LinkGrid("localhost:0", keys=coordinator) as grid, ExitStack() as stack:
        stack.enter_context(running(grid.port, sign_with("a"), keys=keys))
        silent = [stack.enter_context(Silent(grid.port, mallory)) for _ in range(6)]
        wait_until(lambda: len([s for s in silent if s.code]) == 2, "all beyond four to end")
        codes = {stream.code for stream in silent}
        assert codes == {None, grpc.StatusCode.RESOURCE_EXHAUSTED}
        (reply,) = grid.send_and_receive([ask("a", "still")], timeout=PATIENCE)
        assert text_of(reply) == "still a"


class Silent:
    """A stream without a Hello; ``code`` is how it ended."""

    def __init__(self, port: int, keys: HolderKeys) -> None:
        self.code: grpc.StatusCode | None = None
        self._outbox: SimpleQueue[pb.HolderFrame | None] = SimpleQueue()
        self._channel = grpc.secure_channel(
            f"localhost:{port}", channel_credentials(keys), options=channel_options()
        )
        self._call = FederationStub(self._channel).Join(iter(self._outbox.get, None))
        self._call.add_callback(self._ended)

    def _ended(self) -> None:
        self.code = self._call.code()

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        self._call.cancel()
        self._outbox.put(None)
        self._channel.close()


def unreadable(holder: RawHolder) -> None:
    holder.send(chunk=pb.Chunk(data=b"out of nowhere"))


def long_header(holder: RawHolder) -> None:
    holder.send(header=pb.Header(reply_to="x", group_id="g" * MAX_HEADER_BYTES))


def oversized(holder: RawHolder) -> None:
    holder.send(header=pb.Header(reply_to="x", payload_bytes=MOST + 1))


def tiny_chunks(holder: RawHolder) -> None:
    holder.send(header=pb.Header(reply_to="x", payload_bytes=MOST))
    holder.send(chunk=pb.Chunk(data=b"x"))


def second_hello(holder: RawHolder) -> None:
    holder.send(hello=pb.Hello(protocol=NEWEST, name="somebody-else"))


def unasked(holder: RawHolder) -> None:
    for number in range(1000):
        holder.send(header=pb.Header(reply_to=f"made up {number}\n\x1b[2J"))


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize(
    "nuisance", [unreadable, long_header, oversized, tiny_chunks, second_hello, unasked]
)
def test_a_holder_that_breaks_the_contract_is_cut_off(
    grid: LinkGrid,
    mallory: HolderKeys,
    nuisance: Callable[[RawHolder], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), joined(grid, mallory) as holder:
        nuisance(holder)
        assert holder.failure().code() is grpc.StatusCode.INVALID_ARGUMENT
        require_undisturbed(grid)

    about = [record.getMessage() for record in caplog.records if "mallory" in record.getMessage()]
    assert 0 < len(about) < 12, "rationed"
    assert all(line.isprintable() and len(line) < 700 for line in about)
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.usefixtures("honest")
def test_a_frame_that_is_none_ends_its_stream_without_a_traceback(
    grid: LinkGrid, mallory: HolderKeys, caplog: pytest.LogCaptureFixture
) -> None:
    channel = grpc.secure_channel(
        f"localhost:{grid.port}", channel_credentials(mallory), options=channel_options()
    )
    hello = pb.HolderFrame(hello=pb.Hello(protocol=NEWEST)).SerializeToString()
    for frames in ([b"\xff\xff\xff"], [hello, b"\xff\xff\xff"]):
        with pytest.raises(grpc.RpcError) as ended:
            list(channel.stream_stream("/sotto.link.v1.Federation/Join")(iter(frames)))
        assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    channel.close()
    assert not any(record.exc_info for record in caplog.records)
    require_undisturbed(grid)


@pytest.mark.usefixtures("honest")
def test_replays_duplicates_and_replies_for_others_count_for_nothing(
    grid: LinkGrid, mallory: HolderKeys, caplog: pytest.LogCaptureFixture
) -> None:
    with joined(grid, mallory) as holder:
        first = Exchange(grid, ask("mallory"))
        old = holder.receive_request().message_id
        holder.reply(old, "once")
        holder.reply(old, "twice")
        assert [text_of(reply) for reply in first.replies()] == ["once"]

        own, others = ask("mallory"), ask("b", "question")
        second = Exchange(grid, own, others)
        new = holder.receive_request().message_id
        holder.reply(old, "a replay")
        holder.reply(others.metadata.message_id or "unknown", "in b's name")
        holder.reply(new, "new")
        assert [text_of(reply) for reply in second.replies()] == ["new", "question b"]
        require_undisturbed(grid)

    assert caplog.text.count("dropped a reply of mallory") == 3


@pytest.mark.usefixtures("honest")
def test_a_slow_writer_holds_memory_until_the_round_ends_and_no_longer(
    grid: LinkGrid, mallory: HolderKeys
) -> None:
    with joined(grid, mallory) as holder:
        exchange = Timed(grid, ask("mallory"), seconds=1.0)
        asked = holder.receive_request()
        holder.send(header=pb.Header(reply_to=asked.message_id, payload_bytes=MOST))
        holder.send(chunk=pb.Chunk(data=bytes(CHUNK_BYTES)))
        wait_until(lambda: grid.held_bytes == CHUNK_BYTES, "the first chunk")

        assert exchange.replies() == []
        assert grid.held_bytes == 0
        holder.send(chunk=pb.Chunk(offset=CHUNK_BYTES, data=bytes(CHUNK_BYTES)))
        holder.receive("withdraw")
        require_undisturbed(grid)
        assert grid.held_bytes == 0


class Timed(Exchange):
    """An exchange with a deadline of its own."""

    def __init__(self, grid: LinkGrid, message: Message, seconds: float) -> None:
        self._seconds = seconds
        super().__init__(grid, message)

    def _run(self, grid: LinkGrid, messages: tuple[Message, ...]) -> None:
        self._replies = grid.send_and_receive(messages, timeout=self._seconds)


@pytest.mark.usefixtures("honest")
def test_what_is_held_is_bounded_by_holders_times_model(
    grid: LinkGrid, coordinator: CoordinatorKeys, tmp_path: Path
) -> None:
    names = ("m1", "m2", "m3")
    with ExitStack() as stack:
        holders = [
            stack.enter_context(joined(grid, enrol(tmp_path / name, coordinator, name)))
            for name in names
        ]
        exchange = Exchange(grid, *(ask(name) for name in names))
        asked = [holder.receive_request() for holder in holders]
        for holder, request in zip(holders, asked, strict=True):
            holder.send(header=pb.Header(reply_to=request.message_id, payload_bytes=MOST))
            for offset in range(0, MOST - CHUNK_BYTES, CHUNK_BYTES):
                holder.send(chunk=pb.Chunk(offset=offset, data=bytes(CHUNK_BYTES)))
        most = len(names) * (MOST - CHUNK_BYTES)
        wait_until(lambda: grid.held_bytes == most, "all chunks")
        require_undisturbed(grid)
        for holder in holders:
            holder.send(chunk=pb.Chunk(offset=MOST, data=b"x"))  # beyond its place: cut off
        assert all(reply.has_error() for reply in exchange.replies())
        wait_until(lambda: grid.held_bytes == 0, "nothing to be held")


@pytest.mark.usefixtures("honest")
def test_a_slow_reader_suspends_its_writer_and_nobody_else(
    grid: LinkGrid, mallory: HolderKeys
) -> None:
    with joined(grid, mallory) as holder:
        request = large("mallory", 64)
        before = resident_bytes()
        exchange = Timed(grid, request, seconds=2.0)
        require_undisturbed(grid)
        assert exchange.replies() == []
        require_undisturbed(grid)
        # Its encoding's layout, a few chunks on their way, what other threads need; not a copy.
        assert resident_bytes() - before < 48 * CHUNK_BYTES
        assert holder.receive("header").payload_bytes > 63 * CHUNK_BYTES


@pytest.mark.usefixtures("honest")
def test_a_truncated_reply_counts_for_nothing_and_may_be_made_good(
    grid: LinkGrid, mallory: HolderKeys
) -> None:
    exchange = Exchange(grid, ask("mallory"))
    with joined(grid, mallory) as holder:
        asked = holder.receive_request()
        holder.send(header=pb.Header(reply_to=asked.message_id, payload_bytes=MOST))
        holder.send(chunk=pb.Chunk(data=bytes(CHUNK_BYTES)))
        wait_until(lambda: grid.held_bytes == CHUNK_BYTES, "the first chunk")
    require_undisturbed(grid)
    assert grid.held_bytes == CHUNK_BYTES, "it may go on where it broke"
    with joined(grid, mallory) as holder:
        holder.reply(holder.receive_request().message_id, "whole")
        assert [text_of(reply) for reply in exchange.replies()] == ["whole"]
    assert grid.held_bytes == 0


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
