from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.identity import node_id_of
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.versions import NEWEST
from server.grid import LinkGrid
from server.link.switchboard import Switchboard
from tests.integration.processes import wait_until
from tests.linking import (
    PATIENCE,
    Exchange,
    RawHolder,
    ask,
    content,
    enrol,
    running,
    sign_with,
    text_of,
)


@pytest.fixture
def grid() -> Iterator[LinkGrid]:
    with LinkGrid("localhost:0", keys=None, max_message_bytes=10_000) as grid:
        yield grid


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator")


@contextmanager
def raw(grid: LinkGrid, name: str) -> Iterator[RawHolder]:
    with RawHolder(grid.port, name) as holder:
        holder.receive("welcome")
        yield holder


def test_requests_go_to_their_holders_and_replies_come_in_order(grid: LinkGrid) -> None:
    with ExitStack() as nodes:
        for name in ("a", "b", "c"):
            nodes.enter_context(running(grid.port, sign_with(name), name=name))
        assert grid.wait_for_holders(3, PATIENCE) == sorted(map(node_id_of, "abc"))

        replies = grid.send_and_receive([ask(name, "hello") for name in "cab"], timeout=PATIENCE)

        assert [text_of(reply) for reply in replies] == ["hello c", "hello a", "hello b"]
        assert [reply.metadata.src_node_id for reply in replies] == [*map(node_id_of, "cab")]
        assert [holder.name for holder in grid.holders] == ["a", "b", "c"]
        assert grid.holder_name(node_id_of("a")) == "a"
        assert grid.holder_name(3) == "node 3"


def test_two_requests_to_one_holder_are_answered_in_turn(grid: LinkGrid) -> None:
    with running(grid.port, sign_with("a"), name="a"):
        replies = grid.send_and_receive([ask("a", "1"), ask("a", "2")], timeout=PATIENCE)

    assert [text_of(reply) for reply in replies] == ["1 a", "2 a"]


def test_a_request_waits_for_a_holder_that_is_away(grid: LinkGrid) -> None:
    exchange = Exchange(grid, ask("a", "hello"))
    with running(grid.port, sign_with("a"), name="a"):
        assert [text_of(reply) for reply in exchange.replies()] == ["hello a"]


def test_a_holder_that_comes_back_is_asked_again(grid: LinkGrid) -> None:
    with raw(grid, "a") as holder:
        exchange = Exchange(grid, ask("a"))
        first = holder.receive_request()
    with raw(grid, "a") as holder:
        assert holder.receive_request() == first
        holder.reply(first.message_id, "at last")
        assert [text_of(reply) for reply in exchange.replies()] == ["at last"]


def test_twenty_holders_at_once(grid: LinkGrid) -> None:
    names = [f"clinic-{number}" for number in range(20)]
    with ExitStack() as nodes:
        for name in names:
            nodes.enter_context(running(grid.port, sign_with(name), name=name))
        grid.wait_for_holders(20, PATIENCE)
        for _ in range(3):
            replies = grid.send_and_receive([ask(name) for name in names], timeout=PATIENCE)
            assert [text_of(reply) for reply in replies] == [f" {name}" for name in names]


def test_a_large_array_survives() -> None:
    vector = np.random.default_rng(0).random(2_000_000, np.float32)
    records = RecordDict({"arrays": ArrayRecord({"update": Array(vector)})})
    with LinkGrid("localhost:0", keys=None) as grid, running(grid.port, name="a"):
        message = Message(records, node_id_of("a"), "train")
        (reply,) = grid.send_and_receive([message], timeout=PATIENCE)

    assert np.array_equal(reply.content.array_records["arrays"]["update"].numpy(), vector)


# Replies that must not count


def test_a_reply_after_the_timeout_is_dropped(
    grid: LinkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(grid, "a") as holder:
        assert grid.send_and_receive([ask("a", "early")], timeout=0.05) == []
        late = holder.receive_request()
        assert holder.receive("withdraw").message_id == late.message_id

        exchange = Exchange(grid, ask("a", "next"))
        following = holder.receive_request()
        holder.reply(late.message_id, "too late")
        holder.reply(following.message_id, "in time")

        assert [text_of(reply) for reply in exchange.replies()] == ["in time"]
    assert "dropped a reply of a" in caplog.text


def test_a_reply_from_another_holder_is_dropped(
    grid: LinkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(grid, "honest") as honest, raw(grid, "mallory") as mallory:
        exchange = Exchange(grid, ask("honest"), ask("mallory"))
        asked = honest.receive_request()
        mallory.reply(asked.message_id, "forged")
        mallory.reply(mallory.receive_request().message_id, "own")
        honest.reply(asked.message_id, "true")

        assert [text_of(reply) for reply in exchange.replies()] == ["true", "own"]
    assert "dropped a reply of mallory" in caplog.text
    assert "put to another holder" in caplog.text


def test_duplicates_and_unknown_replies_are_dropped(
    grid: LinkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(grid, "a") as holder:
        exchange = Exchange(grid, ask("a"), ask("a"))
        first, second = holder.receive_request(), holder.receive_request()
        holder.reply("never asked", "x")
        holder.reply(first.message_id, "first")
        holder.reply(first.message_id, "first again")
        holder.reply(second.message_id, "second")

        assert [text_of(reply) for reply in exchange.replies()] == ["first", "second"]
    assert caplog.text.count("dropped a reply of a") == 2


# Holders that break the contract


def test_an_oversized_reply_is_refused_by_its_header(grid: LinkGrid) -> None:
    with raw(grid, "a") as holder:
        exchange = Exchange(grid, ask("a"))
        asked = holder.receive_request()
        holder.send(header=pb.Header(reply_to=asked.message_id, payload_bytes=10_001))

        (reply,) = exchange.replies()
        assert "10001 bytes is announced, at most 10000" in (reply.error.reason or "")
        assert reply.metadata.reply_to_message_id == asked.message_id
        assert holder.failure().code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unreadable_reply_costs_its_holder_the_round_and_not_the_stream(grid: LinkGrid) -> None:
    with raw(grid, "a") as holder:
        exchange = Exchange(grid, ask("a"))
        asked = holder.receive_request()
        bad = pb.Header(reply_to=asked.message_id, message_type="train", payload_bytes=1)
        holder.send(header=bad)
        holder.send(chunk=pb.Chunk(data=b"x"))
        (reply,) = exchange.replies()
        assert (reply.error.reason or "").startswith("unreadable reply")

        exchange = Exchange(grid, ask("a"))
        holder.reply(holder.receive_request().message_id, "good")
        assert [text_of(reply) for reply in exchange.replies()] == ["good"]


@pytest.mark.parametrize(
    "frame",
    [{"chunk": pb.Chunk(data=b"x")}, {"hello": pb.Hello(protocol=NEWEST)}, {}],
    ids=["stray chunk", "second hello", "empty"],
)
def test_frames_out_of_place_end_the_stream(grid: LinkGrid, frame: dict[str, object]) -> None:
    with raw(grid, "a") as holder:
        holder.send(**frame)
        assert holder.failure().code() is grpc.StatusCode.INVALID_ARGUMENT


def test_another_version_of_the_protocol_is_told_so(grid: LinkGrid) -> None:
    hello = pb.Hello(protocol=NEWEST + 1, oldest=NEWEST + 1, software="sotto 9", name="a")
    with RawHolder(grid.port, hello=hello) as holder:
        failure = holder.failure()

    assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "sotto 9" in (failure.details() or "")
    assert "install the same release" in (failure.details() or "")


def test_a_bad_name_is_told_so(grid: LinkGrid) -> None:
    with RawHolder(grid.port, "../a") as holder:
        assert holder.failure().code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_second_connection_replaces_the_first(grid: LinkGrid) -> None:
    with raw(grid, "a") as first:
        exchange = Exchange(grid, ask("a"))
        asked = first.receive_request()
        with raw(grid, "a") as second:
            goodbye = first.receive("goodbye")
            assert goodbye.code == pb.Goodbye.REPLACED
            assert "another process has joined as 'a'" in goodbye.reason

            assert second.receive_request() == asked
            second.reply(asked.message_id, "from the second")
            assert [text_of(reply) for reply in exchange.replies()] == ["from the second"]
            assert grid.get_node_ids() == [node_id_of("a")]


# Certificates


def test_mutual_tls(coordinator: CoordinatorKeys, tmp_path: Path) -> None:
    keys = enrol(tmp_path / "a", coordinator, "a")
    with LinkGrid("localhost:0", keys=coordinator) as grid, running(grid.port, keys=keys):
        (reply,) = grid.send_and_receive([ask("a", "hello")], timeout=PATIENCE)

    assert text_of(reply) == "hello"


def test_the_name_is_that_of_the_certificate(coordinator: CoordinatorKeys, tmp_path: Path) -> None:
    keys = enrol(tmp_path / "a", coordinator, "a")
    with (
        LinkGrid("localhost:0", keys=coordinator, federation="clinics") as grid,
        RawHolder(grid.port, "somebody-else", keys=keys) as holder,
    ):
        welcome = holder.receive("welcome")

    assert (welcome.holder, welcome.federation) == ("a", "clinics")


def test_a_holder_outside_the_roster_is_refused(
    coordinator: CoordinatorKeys, tmp_path: Path
) -> None:
    keys = enrol(tmp_path / "a", coordinator, "a")
    (coordinator.folder / "holders" / "a.pem").unlink()

    with (
        LinkGrid("localhost:0", keys=coordinator) as grid,
        RawHolder(grid.port, keys=keys) as holder,
    ):
        failure = holder.failure()

    assert failure.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "not in the coordinator's roster" in (failure.details() or "")


def test_a_certificate_of_another_authority_is_refused(
    coordinator: CoordinatorKeys, tmp_path: Path
) -> None:
    elsewhere = CoordinatorKeys.create_or_load(tmp_path / "elsewhere")
    keys = enrol(tmp_path / "a", elsewhere, "a")
    # It trusts the right coordinator; only what it shows is foreign.
    (keys.folder / "ca.pem").write_bytes((coordinator.folder / "ca.pem").read_bytes())
    enrol(tmp_path / "real", coordinator, "a")

    with (
        LinkGrid("localhost:0", keys=coordinator) as grid,
        RawHolder(grid.port, keys=keys) as holder,
    ):
        assert holder.failure().code() is grpc.StatusCode.UNAVAILABLE
        assert grid.get_node_ids() == []


def test_a_peer_without_certificate_is_refused(coordinator: CoordinatorKeys) -> None:
    with (
        LinkGrid("localhost:0", keys=coordinator) as grid,
        RawHolder(grid.port, "a") as holder,
    ):
        assert holder.failure().code() is grpc.StatusCode.UNAVAILABLE
        assert grid.get_node_ids() == []


def test_a_newly_approved_holder_joins_a_running_coordinator(
    coordinator: CoordinatorKeys, tmp_path: Path
) -> None:
    with LinkGrid("localhost:0", keys=coordinator) as grid:
        keys: HolderKeys = enrol(tmp_path / "a", coordinator, "a")
        with running(grid.port, keys=keys):
            assert grid.wait_for_holders(1, PATIENCE) == [node_id_of("a")]


def test_a_holder_that_is_revoked_while_it_is_away_is_not_waited_for(
    coordinator: CoordinatorKeys, tmp_path: Path
) -> None:
    keys = enrol(tmp_path / "a", coordinator, "a")
    enrol(tmp_path / "b", coordinator, "b")
    with LinkGrid("localhost:0", keys=coordinator) as grid:
        with RawHolder(grid.port, keys=keys) as holder:
            holder.receive("welcome")
            asked_before = Exchange(grid, ask("a"))
            holder.receive_request()
        wait_until(lambda: not grid.holders, "the end of the stream")
        asked_after = Exchange(grid, ask("a"))
        wait_until(lambda: grid.traffic.requests == 2, "the second request")

        coordinator.revoke("a")

        for exchange in (asked_before, asked_after):
            (reply,) = exchange.replies()
            assert "revoked" in (reply.error.reason or "")
        again = Exchange(grid, ask("a"))  # whoever asks later learns it as well
        assert "revoked" in (again.replies()[0].error.reason or "")


def test_a_holder_that_changes_its_certificate_while_it_is_away_is_waited_for(
    coordinator: CoordinatorKeys, tmp_path: Path
) -> None:
    keys = enrol(tmp_path / "a", coordinator, "a")
    with LinkGrid("localhost:0", keys=coordinator) as grid:
        with RawHolder(grid.port, keys=keys) as holder:
            holder.receive("welcome")
            exchange = Exchange(grid, ask("a", "still wanted"))
            holder.receive_request()
        wait_until(lambda: not grid.holders, "the end of the stream")
        other = HolderKeys.request(tmp_path / "other", "a")
        newer = HolderKeys.install(tmp_path / "other", coordinator.approve(other, replace=True))
        with pytest.raises(LinkError, match="0 of 1"):
            grid.wait_for_holders(1, timeout=1.2)  # the roster is looked at twice a second
        with running(grid.port, keys=newer):
            assert [text_of(reply) for reply in exchange.replies()] == ["still wanted"]


# Life


def test_plain_text_is_for_loopback_only_and_loud(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LinkError, match="plain text is allowed on loopback only"):
        LinkGrid("0.0.0.0:0", keys=None)
    with (
        caplog.at_level(logging.WARNING, "sotto.link"),
        LinkGrid("127.0.0.1:0", keys=None),
    ):
        assert "INSECURE" in caplog.text


def test_a_taken_port_is_said(grid: LinkGrid) -> None:
    other = LinkGrid(f"localhost:{grid.port}", keys=None)
    with pytest.raises(LinkError, match="the port is taken"):
        other.start()


def test_waiting_reports_progress_and_who_is_missing(grid: LinkGrid) -> None:
    seen: list[list[str]] = []
    with (
        raw(grid, "a"),
        pytest.raises(LinkError, match=r"1 of 2 holders joined within 0.1 s \(a\)"),
    ):
        grid.wait_for_holders(2, 0.1, lambda holders: seen.append([h.name for h in holders]))
    assert seen[-1] == ["a"]


def test_a_stopped_grid_says_so() -> None:
    grid = LinkGrid("localhost:0", keys=None)
    grid.start()
    grid.stop()
    grid.stop()

    with pytest.raises(LinkError, match="not running"):
        grid.send_and_receive([ask("a")])


def test_a_request_after_draining_began_is_refused() -> None:
    async def ask_late() -> None:
        board = Switchboard(
            keys=None, federation="", software="", max_message_bytes=1, on_change=lambda _: None
        )
        await board.drain("the coordinator stops", grace=0.0)
        await board.post([])

    with pytest.raises(LinkError, match="the link is stopping"):
        asyncio.run(ask_late())


def test_nobody_waits_for_a_loop_that_has_ended() -> None:
    class Abrupt(LinkGrid):
        """Cancels no exchange before its loop ends."""

        async def _close(self, grace: float) -> None:
            assert self._server is not None
            await self._server.stop(grace)

    with Abrupt("localhost:0", keys=None) as grid, raw(grid, "a") as holder:
        exchange = Exchange(grid, ask("a"))
        holder.receive_request()
        grid.stop(grace=0.0)

        assert exchange.replies() == []
        assert "stopped while a request was open" in str(exchange.error)


def test_a_grid_that_nobody_stops_lets_the_process_end() -> None:
    program = "from server.grid import LinkGrid; LinkGrid('localhost:0', keys=None).start()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_grid_that_was_stopped_leaves_nothing_behind(
    secure: bool, coordinator: CoordinatorKeys, tmp_path: Path
) -> None:
    keys = enrol(tmp_path / "a", coordinator, "a") if secure else None

    def live() -> None:
        with LinkGrid("localhost:0", keys=coordinator if secure else None) as grid:
            with RawHolder(grid.port, "a", keys=keys) as holder:
                holder.receive("welcome")
                exchange = Exchange(grid, ask("a"))
                holder.receive_request()
                grid.push_messages([ask("a"), ask("b")], timeout=PATIENCE)
                grid.stop()
                assert exchange.replies() == []
            assert isinstance(exchange.error, LinkError)

    for _ in range(3):  # whatever is made once
        live()
    threads, files = threading.active_count(), open_files()
    for _ in range(5):
        live()
    wait_until(lambda: threading.active_count() <= threads, "all threads to end")
    wait_until(lambda: open_files() <= files, "all files to be closed")


def open_files() -> int:
    """File descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_content_for_many_is_encoded_once(grid: LinkGrid) -> None:
    class Counting(RecordDict):
        reads = 0

        def items(self) -> object:  # type: ignore[override]
            self.__class__.reads += 1
            return super().items()

    shared = Counting(dict(content("model")))
    Counting.reads = 0
    messages = [Message(shared, node_id_of(name), "train") for name in "abcd"]

    grid.send_and_receive(messages, timeout=0.0)

    assert Counting.reads == 1


def test_a_holders_error_is_passed_on(grid: LinkGrid) -> None:
    def refuse(message: Message) -> Message:
        return Message(Error(6, "budget: 0.1 of 3.0 left"), reply_to=message)

    with running(grid.port, refuse, name="a"):
        (reply,) = grid.send_and_receive([ask("a")], timeout=PATIENCE)

    assert reply.error == Error(6, "budget: 0.1 of 3.0 left")


def test_what_each_holder_was_asked_and_when_it_left_can_be_seen(grid: LinkGrid) -> None:
    with raw(grid, "a") as holder:
        exchange = Exchange(grid, ask("a"))
        header = holder.receive_request()
        assert grid.errands["a"].state == "open"
        assert grid.errands["a"].message_type == "train"
        assert grid.left == {}
        holder.reply(header.message_id)
        assert len(exchange.replies()) == 1
        assert grid.errands["a"].state == "answered"
    before = time.time()
    while not grid.left:
        assert time.time() < before + PATIENCE
        time.sleep(0.01)

    assert grid.left.keys() == {"a"}
    with raw(grid, "a"):
        assert grid.left == {}
