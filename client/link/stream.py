"""One connection to the coordinator: frames in, whole messages out, and the other way round.

gRPC reads and writes on threads of its own; what arrives becomes an event in the node's inbox.
The coordinator is not trusted to be modest: it is read no faster than the node takes its events,
and it cannot make replies pile up that it does not read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import grpc

from common.errors import LinkError, WireError
from common.link import federation_pb2 as pb
from common.link.channels import channel_options
from common.link.codec import CHUNK_BYTES, Incoming, Payload
from common.link.federation_pb2_grpc import FederationStub
from common.link.keepalive import KEEPALIVE
from common.link.keys import HolderKeys
from common.link.proxies import proxy_for
from common.link.tls import channel_credentials, connection_failure
from common.link.traffic import Counts
from common.link.transfer import Assembler, Beginning, continued
from common.link.versions import require_spoken
from common.words import shown

__all__ = ["Again", "Asked", "Ended", "Outgoing", "Stream", "Welcomed", "Withdrawn"]

_MOST_EVENTS = 16  # that wait for the node
_MOST_REPLIES = 8  # that wait for the coordinator to take them

# gRPC's Python side writes a traceback for every frame that cannot be read.
logging.getLogger("grpc._common").setLevel(logging.CRITICAL)

_REFUSALS = frozenset(
    (
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
)


@dataclass(frozen=True)
class Outgoing:
    """A reply, ready to be sent."""

    header: pb.Header
    payload: Payload

    def frames(self, begun: pb.Begun, counts: Counts) -> Iterator[pb.HolderFrame]:
        """The frames of it, made one by one as the connection takes them.

        Args:
            begun: what the coordinator has of it already.
            counts: of what was sent.
        """
        header = continued(self.header, begun)
        yield pb.HolderFrame(header=header)
        for chunk in self.payload.chunks(offset=header.offset):
            yield pb.HolderFrame(chunk=chunk)
            counts["bytes_sent"] += min(CHUNK_BYTES, header.payload_bytes - chunk.offset)


@dataclass(frozen=True)
class Welcomed:
    """The coordinator has admitted this holder."""

    stream: Stream
    welcome: pb.Welcome


@dataclass(frozen=True)
class Asked:
    """A request has arrived completely."""

    stream: Stream
    request: Incoming


@dataclass(frozen=True)
class Again:
    """The coordinator still wants the reply to a request that is in hand."""

    stream: Stream
    message_id: str


@dataclass(frozen=True)
class Withdrawn:
    """The coordinator no longer wants a reply."""

    stream: Stream
    message_id: str


@dataclass(frozen=True)
class Ended:
    """The stream is over.

    Args:
        stream: which one.
        reason: why, for people.
        final: set when trying again is of no use.
        nobody_there: nothing listens at the address; to find that out costs next to nothing.
    """

    stream: Stream
    reason: str
    final: LinkError | None = None
    nobody_there: bool = False


class Stream:
    """A connection, from its Hello until it has ended.

    Args:
        server: ``HOST:PORT``.
        keys: certificates; None for plain text.
        hello: the first frame.
        inbox: gets :class:`Welcomed`, :class:`Asked`, :class:`Again`, :class:`Withdrawn` and at
            last one :class:`Ended`.
        max_message_bytes: the longest request that is accepted.
        beginning: of a request that the stream before this one broke off.
        keepalive: seconds of silence after which the coordinator is asked whether it is there.
        counts: of what goes over it.

    The node calls :meth:`taken` for every event that it takes out of the inbox, but not for the
    last one.
    """

    def __init__(
        self,
        server: str,
        *,
        keys: HolderKeys | None,
        hello: pb.Hello,
        inbox: SimpleQueue[Any],
        max_message_bytes: int,
        beginning: Beginning | None = None,
        keepalive: float = KEEPALIVE,
        counts: Counts | None = None,
    ) -> None:
        self._server = server
        self.proxy = None if keys is None else proxy_for(server)
        """``HOST:PORT`` of the HTTP proxy on the way."""
        self._inbox = inbox
        self._assembler = Assembler(max_message_bytes, beginning)
        self._software = hello.software
        self._counts = Counts() if counts is None else counts
        self._begun = pb.Begun()
        self._welcomed = False
        self._refused = ""
        self._closed = False
        self._room = threading.Semaphore(_MOST_EVENTS)
        self._goodbye: pb.Goodbye | None = None
        self._outbox: SimpleQueue[Iterable[pb.HolderFrame] | None] = SimpleQueue()
        self._outbox.put([pb.HolderFrame(hello=hello)])
        self._channel = _channel(server, keys, keepalive)
        stub = FederationStub(self._channel)  # type: ignore[no-untyped-call]
        self._call = stub.Join(self._outgoing())
        self._reader = threading.Thread(target=self._read, name="sotto-link", daemon=True)
        self._reader.start()

    def send(self, reply: Outgoing) -> None:
        """Send a reply after those before it."""
        if self._outbox.qsize() >= _MOST_REPLIES:
            self.refuse("the coordinator asks again and again and takes no reply")
        # Only the first one goes on where it broke; another has the coordinator forget the rest.
        begun, self._begun = self._begun, pb.Begun()
        self._outbox.put(reply.frames(begun, self._counts))

    def progressed(self, message_ids: Iterable[str]) -> None:
        """Say that work on requests goes on, unless there is something to send before that."""
        if self._outbox.empty():
            signs = (pb.Progress(message_id=message_id) for message_id in message_ids)
            self._outbox.put([pb.HolderFrame(progress=sign) for sign in signs])

    def taken(self) -> None:
        """The node has taken an event out of the inbox: there is room for another one."""
        self._room.release()

    def refuse(self, reason: str) -> None:
        """End the connection because the coordinator broke the link's contract."""
        self.cut(f"the coordinator broke the link's contract: {reason}")

    def cut(self, reason: str) -> None:
        """End the connection."""
        self._refused = reason
        self._call.cancel()

    def leave(self, reason: str) -> None:
        """Send what is waiting, say goodbye, and let the coordinator end the stream."""
        goodbye = pb.Goodbye(code=pb.Goodbye.LEAVING, reason=reason)
        self._outbox.put([pb.HolderFrame(goodbye=goodbye)])
        self._outbox.put(None)

    def close(self) -> Beginning | None:
        """Cut the connection, if it still stands, and free what it holds.

        Returns:
            What has come of a request whose rest another stream may bring.
        """
        self._closed = True
        self._room.release()  # the reader may be waiting
        self._call.cancel()
        self._outbox.put(None)
        self._reader.join()
        self._channel.close()
        return None if self._refused else self._assembler.break_off()

    def _outgoing(self) -> Iterator[pb.HolderFrame]:
        for frames in iter(self._outbox.get, None):
            yield from frames

    def _read(self) -> None:
        ended = Ended(self, "the coordinator closed the connection")
        try:
            for frame in self._call:
                self._take(frame)
                if self._goodbye is not None:  # nothing may follow, and nobody need wait for it
                    self._call.cancel()
                    break
        except grpc.RpcError as error:
            ended = self._failure(error)
        except WireError as error:
            self.refuse(str(error))
        except LinkError as error:  # it speaks another version
            self._call.cancel()
            ended = Ended(self, str(error), error)
        if self._refused:
            ended = Ended(self, shown(self._refused))
        self._inbox.put(self._farewell() or ended)
        self._outbox.put(None)

    def _tell(self, event: Welcomed | Asked | Again | Withdrawn) -> None:
        """Put an event into the inbox once the node has taken enough of those before it."""
        if not self._closed:
            self._room.acquire()
        self._inbox.put(event)

    def _take(self, frame: pb.CoordinatorFrame) -> None:
        request: Incoming | None = None
        kind = frame.WhichOneof("kind")
        if kind in ("header", "chunk", "again", "withdraw") and not self._welcomed:
            raise WireError(f"a frame of kind {kind} came before Welcome")
        match kind:
            case "chunk":
                request = self._add(frame.chunk)
            case "header":
                request = self._assembler.begin(frame.header)
            case "withdraw":
                self._assembler.withdraw(frame.withdraw.message_id)
                self._tell(Withdrawn(self, frame.withdraw.message_id))
            case "again":
                self._tell(Again(self, frame.again.message_id))
            case "welcome":
                self._welcome(frame.welcome)
            case "goodbye":
                self._goodbye = frame.goodbye
            case _:
                raise WireError("a frame of unknown kind came; update sotto")
        if request is not None:
            self._counts["requests"] += 1
            self._tell(Asked(self, request))

    def _welcome(self, welcome: pb.Welcome) -> None:
        if self._welcomed:
            raise WireError("a second Welcome came")
        require_spoken(welcome, self._software)
        self._welcomed = True
        self._begun = welcome.begun
        self._tell(Welcomed(self, welcome))

    def _add(self, chunk: pb.Chunk) -> Incoming | None:
        before = self._assembler.taken
        request = self._assembler.add(chunk)
        self._counts["bytes_received"] += self._assembler.taken - before
        return request

    def _farewell(self) -> Ended | None:
        goodbye = self._goodbye
        if goodbye is None:
            return None
        reason = shown(goodbye.reason)
        final = LinkError(reason) if goodbye.code == pb.Goodbye.REPLACED else None
        return Ended(self, reason, final)

    def _failure(self, error: grpc.RpcError) -> Ended:
        code, details = error.code(), shown(error.details() or "", 1000)
        nobody_there = "Connection refused" in details
        final = None
        if code in _REFUSALS:
            final = LinkError(f"the coordinator at {self._server} refuses this holder: {details}")
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            final = LinkError(
                f"what answers at {self._server} is not a Sotto coordinator; check --server"
            )
        elif code is grpc.StatusCode.UNAVAILABLE:
            failure = connection_failure(self._server, details, self.proxy)
            if failure is not None:
                details = failure.sentence
                final = LinkError(details) if failure.final else None
            else:  # gRPC's own words are for whoever looks for a fault
                details = f"the connection broke ({details})"
        return Ended(self, details or code.name, final, nobody_there)


def _channel(server: str, keys: HolderKeys | None, keepalive: float) -> grpc.Channel:
    if keys is None:
        # Plain text stays on this machine; a proxy would carry it elsewhere.
        return grpc.insecure_channel(server, channel_options(keepalive, proxies=False))
    return grpc.secure_channel(server, channel_credentials(keys), channel_options(keepalive))
