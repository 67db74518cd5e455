"""A large transfer goes on at the chunk where it broke, and work is told of: the holder's end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.node import Connected, Disconnected, Node, Requested
from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.codec import CHUNK_BYTES, Incoming, Payload, decode, encode
from common.link.federation_pb2_grpc import FederationServicer
from common.link.identity import node_id_of
from common.link.transfer import Assembler
from common.link.versions import NEWEST
from server.grid import LinkGrid
from tests.client.test_node import scripted
from tests.faults.proxy import Cut, Proxy, Way
from tests.integration.processes import wait_until
from tests.linking import PATIENCE, QUICK, Exchange, ask, content, echo, running, text_of

LARGE = 3 * CHUNK_BYTES // 4  # numbers of a message of four chunks

Script = Iterator[pb.CoordinatorFrame]


class Acts(FederationServicer):
    """A coordinator that plays one act for each stream, and then only listens.

    An act is a generator that is given Hello and an iterator over what the holder sends.
    """

    def __init__(self, *acts: object) -> None:
        self.acts = list(acts)
        self.hellos: SimpleQueue[pb.Hello] = SimpleQueue()

    def Join(  # noqa: N802
        self, request_iterator: Iterator[pb.HolderFrame], context: grpc.ServicerContext
    ) -> Script:
        hello = next(request_iterator).hello
        self.hellos.put(hello)
        if self.acts:
            yield from self.acts.pop(0)(hello, request_iterator)  # type: ignore[operator]
        else:
            yield welcome()
            list(request_iterator)


def welcome(**fields: object) -> pb.CoordinatorFrame:
    about = {"node_id": 7, "holder": "a", "max_message_bytes": 1 << 30, "protocol": NEWEST}
    return pb.CoordinatorFrame(welcome=pb.Welcome(**{**about, **fields}))  # type: ignore[arg-type]


def request(
    message_id: str = "m", size: int = LARGE, offset: int = 0
) -> tuple[pb.CoordinatorFrame, list[pb.CoordinatorFrame]]:
    """A request's header, and its chunks from an offset on."""
    payload: Payload = encode(content("hello", size))
    header = pb.Header(
        message_id=message_id,
        message_type="train",
        layout_bytes=payload.layout_bytes,
        payload_bytes=payload.size,
        offset=offset,
    )
    chunks = [pb.CoordinatorFrame(chunk=chunk) for chunk in payload.chunks(offset=offset)]
    return pb.CoordinatorFrame(header=header), chunks


def reply_of(frames: Iterator[pb.HolderFrame]) -> Incoming:
    """The next whole reply of a holder."""
    assembler = Assembler(1 << 30)
    for frame in frames:
        if frame.HasField("header"):
            incoming = assembler.begin(frame.header)
        else:
            incoming = assembler.add(frame.chunk)
        if incoming is not None:
            return incoming
    raise AssertionError("the stream ended")


class Calls:
    """A handler that remembers what it was asked and echoes it."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(self, message: Message) -> Message:
        self.seen.append(message.content.array_records["arrays"]["update"].numpy())
        return echo(message)


# Requests


def breaks_off(after: int) -> object:
    """An act: a request ends after some chunks."""

    def act(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        header, chunks = request()
        yield welcome()
        yield header
        yield from chunks[:after]

    return act


def goes_on(**change: object) -> object:
    """An act: the rest of what the holder says that it has begun."""

    def act(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        header, chunks = request(hello.begun.message_id, offset=hello.begun.received)
        for field, value in change.items():
            setattr(header.header, field, value)
        yield welcome()
        yield header
        yield from chunks
        reply_of(frames)

    return act


@pytest.mark.parametrize("after", [1, 3])
def test_a_request_goes_on_where_it_broke(after: int) -> None:
    acts, calls = Acts(breaks_off(after), goes_on()), Calls()
    with scripted(acts) as port, running(port, calls, name="a") as runner:
        runner.wait_for(Requested)
        assert acts.hellos.get(timeout=PATIENCE).begun == pb.Begun()
        begun = pb.Begun(message_id="m", received=after * CHUNK_BYTES)
        assert acts.hellos.get(timeout=PATIENCE).begun == begun
        wait_until(lambda: calls.seen, "the handler")
        assert acts.hellos.get(timeout=PATIENCE).begun == pb.Begun()

    assert np.array_equal(calls.seen[0], np.arange(LARGE, dtype=np.float32))
    assert len(calls.seen) == 1
    # Every byte of the payload once.
    assert runner.node.traffic.bytes_received == request()[0].header.payload_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"offset": CHUNK_BYTES - 1},
        {"offset": 2 * CHUNK_BYTES},
        {"message_id": "another"},
        {"payload_bytes": 2 * CHUNK_BYTES},
        {"layout_bytes": 3},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_a_beginning_goes_with_no_other_request(change: dict[str, object]) -> None:
    acts, calls = Acts(breaks_off(1), goes_on(**change)), Calls()
    with scripted(acts) as port, running(port, calls, name="a") as runner:
        runner.wait_for(Disconnected)
        refused = runner.wait_for(Disconnected)
        assert isinstance(refused, Disconnected)
        assert "its beginning is not here" in refused.reason
        hellos = [acts.hellos.get(timeout=PATIENCE) for _ in range(3)]
        assert [hello.begun.received for hello in hellos] == [0, CHUNK_BYTES, 0]
    assert calls.seen == []


def test_a_beginning_that_was_withdrawn_is_forgotten() -> None:
    def withdraws(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        yield welcome()
        yield pb.CoordinatorFrame(withdraw=pb.Withdraw(message_id="m"))

    acts = Acts(breaks_off(1), withdraws)
    with scripted(acts) as port, running(port, name="a"):
        hellos = [acts.hellos.get(timeout=PATIENCE) for _ in range(3)]
    assert [hello.begun.received for hello in hellos] == [0, CHUNK_BYTES, 0]


# Replies


def test_a_reply_goes_on_where_it_broke() -> None:
    pieces: list[bytes] = []
    headers: list[pb.Header] = []

    def takes_a_chunk(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        header, chunks = request()
        yield welcome()
        yield header
        yield from chunks
        headers.append(next(frames).header)
        pieces.append(next(frames).chunk.data)

    def takes_the_rest(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        assert list(hello.in_hand) == ["m"]
        yield welcome(begun=pb.Begun(message_id=headers[0].message_id, received=len(pieces[0])))
        yield pb.CoordinatorFrame(again=pb.Again(message_id="m"))
        headers.append(next(frames).header)
        while sum(map(len, pieces)) < headers[0].payload_bytes:
            pieces.append(next(frames).chunk.data)
        done.set()

    done, calls = threading.Event(), Calls()
    with scripted(Acts(takes_a_chunk, takes_the_rest)) as port, running(port, calls, name="a"):
        assert done.wait(PATIENCE)

    assert headers[1].offset == len(pieces[0])
    headers[1].ClearField("offset")
    assert headers[1] == headers[0]
    reply = decode(Incoming(headers[0], tuple(pieces)), src_node_id=7, dst_node_id=1)
    update = reply.content.array_records["arrays"]["update"].numpy()
    assert np.array_equal(update, np.arange(LARGE, dtype=np.float32))
    assert len(calls.seen) == 1


@pytest.mark.parametrize("received", [0, 2**40])
def test_a_coordinator_that_has_something_else_gets_the_whole_reply(received: int) -> None:
    replies: list[Incoming] = []

    def act(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        header, chunks = request()
        yield welcome(begun=pb.Begun(message_id="made up", received=received))
        yield header
        yield from chunks
        replies.append(reply_of(frames))
        done.set()

    done = threading.Event()
    with scripted(Acts(act)) as port, running(port, name="a"):
        assert done.wait(PATIENCE)
    assert replies[0].header.offset == 0


def test_a_request_in_hand_is_asked_for_again_without_its_payload() -> None:
    entered, release, calls = threading.Event(), threading.Event(), []

    def work(message: Message) -> Message:
        calls.append(message)
        entered.set()
        assert release.wait(PATIENCE)
        return echo(message)

    def asks(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        header, chunks = request(size=4)
        yield welcome()
        yield header
        yield from chunks
        entered.wait(PATIENCE)

    def asks_again(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        assert list(hello.in_hand) == ["m"]
        yield welcome()
        yield pb.CoordinatorFrame(again=pb.Again(message_id="m"))
        release.set()
        replies.append(reply_of(frames))
        done.set()

    done = threading.Event()
    replies: list[Incoming] = []
    with scripted(Acts(asks, asks_again)) as port, running(port, work, name="a"):
        assert done.wait(PATIENCE)
    assert replies[0].header.reply_to == "m"
    assert len(calls) == 1


def test_a_reply_that_is_no_longer_here_is_not_made_up() -> None:
    def asks_for_nothing(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        yield welcome()
        yield pb.CoordinatorFrame(again=pb.Again(message_id="never heard of"))
        list(frames)

    with scripted(Acts(asks_for_nothing)) as port, running(port, name="a") as runner:
        gone = runner.wait_for(Disconnected)
        assert isinstance(gone, Disconnected)
        assert "no longer here" in gone.reason
        runner.wait_for(Connected)


# Versions


def test_a_coordinator_that_speaks_another_version_is_named_with_both_releases() -> None:
    def first_release(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        yield pb.CoordinatorFrame(welcome=pb.Welcome(software="sotto 0.1.0"))

    with scripted(Acts(first_release)) as port:
        node = Node(f"localhost:{port}", echo, keys=None, name="a", software="sotto 9.9")
        with pytest.raises(LinkError, match=r"sotto 0\.1\.0\) speaks version 1 .*sotto 9\.9"):
            node.run()


def test_an_older_coordinators_refusal_is_final_and_shown() -> None:
    """It says so in its own words, which name both releases."""
    sentence = (
        "the holder's software (sotto 9.9) speaks version 2 of the link, the coordinator's (sotto "
        "0.1.0) version 1; install the same release of sotto on both"
    )

    class First(FederationServicer):
        def Join(self, requests: Iterator[pb.HolderFrame], context: grpc.ServicerContext) -> Script:  # noqa: N802
            hello = next(requests).hello
            assert hello.protocol != 1
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, sentence)
            yield pb.CoordinatorFrame()

    with scripted(First()) as port:
        node = Node(f"localhost:{port}", echo, keys=None, name="a", software="sotto 9.9")
        with pytest.raises(LinkError) as refused:
            node.run()
    assert sentence in str(refused.value)


# Progress


class Steps:
    """A handler whose work takes longer than the time of the call, in many steps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.step = lambda: None

    def __call__(self, message: Message) -> Message:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.01)
            self.step()
        return echo(message)


@pytest.mark.parametrize("tells", [True, False])
def test_a_holder_that_completes_steps_has_more_time(tells: bool) -> None:
    handler = Steps(2.4)
    with LinkGrid("localhost:0", keys=None, deadline_extensions=9) as grid:
        node = Node(
            f"localhost:{grid.port}",
            handler,
            keys=None,
            name="a",
            backoff=QUICK,
            progress_every=0.05,
        )
        if tells:
            handler.step = node.progressed  # type: ignore[assignment]
        thread = threading.Thread(target=node.run, daemon=True)
        thread.start()
        grid.wait_for_holders(1, PATIENCE)
        replies = grid.send_and_receive([ask("a", "at last")], timeout=2.0)
        node.stop(now=True)
        thread.join(PATIENCE)

    assert [text_of(reply) for reply in replies] == (["at last"] if tells else [])


def test_a_request_in_line_behind_one_that_was_withdrawn_is_told_of() -> None:
    """As after a restart of the coordinator, which asks anew for what is being worked on."""

    def asked(message_id: str) -> Script:
        header, chunks = request(message_id, size=4)
        header.header.progress_every = 0.05
        yield header
        yield from chunks

    def asks(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        yield welcome()
        yield from asked("before")
        entered.wait(PATIENCE)

    def asks_anew(hello: pb.Hello, frames: Iterator[pb.HolderFrame]) -> Script:
        yield welcome()
        yield pb.CoordinatorFrame(withdraw=pb.Withdraw(message_id="before"))
        yield from asked("anew")
        while signs.count("anew") < 2:
            signs.append(next(frames).progress.message_id)
        done.set()

    def work(message: Message) -> Message:
        entered.set()
        while not done.wait(0.01):
            node.progressed()
        return echo(message)

    entered, done = threading.Event(), threading.Event()
    signs: list[str] = []
    with scripted(Acts(asks, asks_anew)) as port:
        node = Node(
            f"localhost:{port}", work, keys=None, name="a", backoff=QUICK, progress_every=0.05
        )
        thread = threading.Thread(target=node.run, daemon=True)
        thread.start()
        assert done.wait(PATIENCE)
        node.stop(now=True)
        thread.join(PATIENCE)
    assert signs[-2:] == ["anew", "anew"], "nobody waits for the other one"


def test_traffic_is_counted() -> None:
    with LinkGrid("localhost:0", keys=None) as grid, running(grid.port, name="a") as runner:
        exchange = Exchange(grid, ask("a"))
        (reply,) = exchange.replies()
        size = encode(reply.content).size
        traffic = runner.node.traffic
        assert (traffic.requests, traffic.replies, traffic.connections) == (1, 1, 1)
        assert traffic.bytes_received == grid.traffic.bytes_sent == size
        wait_until(lambda: runner.node.traffic.bytes_sent == size, "the reply to be counted")
        assert traffic.refused == 0


# Both ends


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(Way),
            st.integers(1, 4 * CHUNK_BYTES),
            # A silent one takes keep-alive to notice.
            st.sampled_from([Cut.RESET, Cut.FIN]),
        ),
        max_size=3,
    ),
    st.integers(0, 2**32 - 1),
)
def test_a_round_survives_cuts_at_any_byte_bit_for_bit(
    cuts: list[tuple[Way, int, Cut]], seed: int
) -> None:
    numbers = np.random.default_rng(seed).random(LARGE, np.float32)
    records = RecordDict({"arrays": ArrayRecord({"update": Array(numbers)})})
    calls = Calls()
    with (
        LinkGrid("localhost:0", keys=None) as grid,
        Proxy(("127.0.0.1", grid.port)) as proxy,
        running(proxy.port, calls, name="a", host="127.0.0.1"),
    ):
        grid.wait_for_holders(1, PATIENCE)
        for way, count, cut in cuts:
            proxy.cut_after(way, count, cut)
        (reply,) = grid.send_and_receive(
            [Message(records, node_id_of("a"), "train")], timeout=PATIENCE
        )
        traffic = grid.traffic

    assert reply.content == records
    assert len(calls.seen) == 1
    assert np.array_equal(calls.seen[0], numbers)
    # Beside each payload, what was on its way at a cut: a chunk, and two sockets' buffers.
    most = encode(records).size + len(cuts) * 3 * CHUNK_BYTES
    assert traffic.bytes_sent <= most
    assert traffic.bytes_received <= most
