"""What the tests of the link share: enrolled holders, running nodes, holders driven by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client.node import Backoff, Handler, Node, NodeEvent
from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.channels import channel_options
from common.link.codec import encode
from common.link.federation_pb2_grpc import FederationStub
from common.link.identity import node_id_of
from common.link.keepalive import KEEPALIVE
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.tls import channel_credentials
from common.link.versions import NEWEST
from server.grid import LinkGrid

PATIENCE = 30.0  # seconds after which a test that waits for an event has failed
QUICK = Backoff(first=0.01, short=0.05, longest=0.05)


def enrol(state: Path, coordinator: CoordinatorKeys, name: str) -> HolderKeys:
    """Take a holder through request, approve and install."""
    bundle = coordinator.approve(HolderKeys.request(state, name))
    return HolderKeys.install(state, bundle)


def content(text: str = "", size: int = 4) -> RecordDict:
    vector = np.arange(size, dtype=np.float32)
    arrays = ArrayRecord({"update": Array(vector)})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"text": text})})


def ask(name: str, text: str = "") -> Message:
    return Message(content(text), node_id_of(name), "train", group_id="1")


def text_of(message: Message) -> object:
    return message.content.config_records["config"]["text"]


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def sign_with(name: str) -> Handler:
    """A handler whose replies carry the request's text and a name."""
    return lambda message: Message(content(f"{text_of(message)} {name}"), reply_to=message)


class Runner:
    """A node on a thread, its events, and what ended it."""

    def __init__(self, node: Node, events: SimpleQueue[NodeEvent]) -> None:
        self.node = node
        self.events = events
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.node.run()
        except Exception as error:
            self.error = error

    def wait_for(self, kind: type[NodeEvent]) -> NodeEvent:
        """The next event of a kind."""
        while not isinstance(event := self.events.get(timeout=PATIENCE), kind):
            pass
        return event

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the node did not end"


@contextmanager
def running(
    port: int,
    handler: Handler = echo,
    *,
    keys: HolderKeys | None = None,
    name: str = "",
    host: str = "localhost",
    max_message_bytes: int = 1 << 30,
    keepalive: float = KEEPALIVE,
) -> Iterator[Runner]:
    """A node that is stopped at the end."""
    events: SimpleQueue[NodeEvent] = SimpleQueue()
    node = Node(
        f"{host}:{port}",
        handler,
        keys=keys,
        name=name,
        on_event=events.put,
        backoff=QUICK,
        max_message_bytes=max_message_bytes,
        keepalive=keepalive,
    )
    runner = Runner(node, events)
    try:
        yield runner
    finally:
        node.stop()
        runner.join()


class Exchange:
    """A ``send_and_receive`` under way on a thread."""

    def __init__(self, grid: LinkGrid, *messages: Message) -> None:
        self.error: LinkError | None = None
        self._replies: list[Message] = []
        self._thread = threading.Thread(target=self._run, args=(grid, messages), daemon=True)
        self._thread.start()

    def _run(self, grid: LinkGrid, messages: tuple[Message, ...]) -> None:
        try:
            self._replies = grid.send_and_receive(messages, timeout=PATIENCE)
        except LinkError as error:
            self.error = error

    def replies(self) -> list[Message]:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self._replies


def reply_frames(
    message_id: str, text: str = "", size: int = 4, offset: int = 0
) -> tuple[pb.Header, list[pb.Chunk]]:
    """A reply to a request, or the rest of it."""
    payload = encode(content(text, size))
    header = pb.Header(
        message_id=f"reply to {message_id}",
        reply_to=message_id,
        message_type="train",
        layout_bytes=payload.layout_bytes,
        payload_bytes=payload.size,
        offset=offset,
    )
    return header, list(payload.chunks(offset=offset))


class RawHolder:
    """A holder driven frame by frame, so that it can do what no honest one does."""

    def __init__(
        self,
        port: int,
        name: str = "",
        *,
        keys: HolderKeys | None = None,
        hello: pb.Hello | None = None,
    ) -> None:
        target = f"localhost:{port}"
        if keys is None:
            self._channel = grpc.insecure_channel(target, options=channel_options())
        else:
            credentials = channel_credentials(keys)
            self._channel = grpc.secure_channel(target, credentials, options=channel_options())
        self._outbox: SimpleQueue[pb.HolderFrame | None] = SimpleQueue()
        self._call = FederationStub(self._channel).Join(
            iter(self._outbox.get, None), timeout=PATIENCE
        )
        self.send(hello=hello or pb.Hello(protocol=NEWEST, name=name))

    def send(self, **frame: object) -> None:
        self._outbox.put(pb.HolderFrame(**frame))

    def receive(self, kind: str) -> object:
        """The next frame, which must be of a kind."""
        frame = next(self._call)
        assert frame.WhichOneof("kind") == kind, frame
        return getattr(frame, kind)

    def receive_request(self) -> pb.Header:
        header = self.receive("header")
        received = 0
        while received < header.payload_bytes:
            received += len(self.receive("chunk").data)
        return header

    def reply(self, message_id: str, text: str = "", size: int = 4) -> None:
        header, chunks = reply_frames(message_id, text, size)
        self.send(header=header)
        for chunk in chunks:
            self.send(chunk=chunk)

    def failure(self) -> grpc.RpcError:
        """The error that ends the stream; frames before it are skipped."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            return error
        raise AssertionError("the stream ended well")

    def close(self) -> None:
        self._call.cancel()
        self._outbox.put(None)
        self._channel.close()

    def __enter__(self) -> RawHolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
