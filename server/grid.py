"""A Flower Grid over the link: the round loop's way to holders on other machines."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from cryptography.x509 import Certificate
from flwr.app import Error, Message, RecordDict

from common.errors import LinkError, WireError
from common.flower import COORDINATOR_NODE_ID, BaseGrid, incoming_message, stamp
from common.link import federation_pb2 as pb
from common.link.codec import Payload, decode, encode, header_for
from common.link.federation_pb2_grpc import add_FederationServicer_to_server
from common.link.identity import host_of
from common.link.keys import CoordinatorKeys
from common.link.tls import require_loopback, server_credentials
from common.link.transfer import DEFAULT_MAX_MESSAGE_BYTES, SERVER_OPTIONS
from server.link.files import room_for_files
from server.link.mailroom import Request
from server.link.sessions import Holder
from server.link.switchboard import UNREADABLE_REPLY, Switchboard

__all__ = ["Holder", "LinkGrid"]

_log = logging.getLogger("sotto.link")
_T = TypeVar("_T")

MAX_CONNECTIONS = 4096
"""A few times the holders that one coordinator serves. A silent connection takes 10 kB of memory
and a file descriptor, and ends after ten seconds."""

HANDSHAKE_TIMEOUT = 10.0

_SPARE_FILES = 128  # for checkpoints, rosters and everything else that is no connection

PATIENCE = 40.0
"""Seconds; holders try to connect at least every 30 s (``client.node.Backoff``)."""


class LinkGrid(BaseGrid):
    """Asks holders that joined over gRPC.

    The server runs on an event loop of its own thread; every public method may be called from
    any other thread. Use it as a context manager, or call :meth:`start` and :meth:`stop`.

    Args:
        listen: ``HOST:PORT``; port 0 takes a free one.
        keys: certificates and roster; None means plain text, which is allowed on loopback only.
        federation: the federation's name, for people.
        software: name and version of this software, for people.
        max_message_bytes: the longest reply that is accepted; see
            :func:`common.link.transfer.message_bytes`.
        max_connections: that may stand at the same time, holders' and strangers' together; fewer
            where the system lets a process open fewer files.
        handshake_timeout: seconds until a connection is closed that has not got through TLS and
            the first frames of HTTP/2, or a stream that has not said Hello; three times as long
            until a connection without a stream is.
        run_id: the run that messages belong to.

    Raises:
        LinkError: plain text is asked for where others could listen.
    """

    def __init__(
        self,
        listen: str,
        *,
        keys: CoordinatorKeys | None,
        federation: str = "sotto",
        software: str = "sotto",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_connections: int = MAX_CONNECTIONS,
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
        run_id: int = 1,
    ) -> None:
        super().__init__(run_id)
        self._max_connections = max_connections
        self._handshake_timeout = handshake_timeout
        if keys is None:
            require_loopback(listen)
        self._listen = listen
        self._keys = keys
        self._holders: Mapping[int, Holder] = {}
        self._names: dict[int, str] = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="sotto-link", daemon=True
        )
        self._running = False
        self._submitting = threading.Lock()
        self._server: grpc.aio.Server | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._port = 0
        self._board = Switchboard(
            keys=keys,
            federation=federation,
            software=software,
            max_message_bytes=max_message_bytes,
            hello_timeout=handshake_timeout,
            on_change=self._take_note,
        )

    # Life

    def start(self) -> int:
        """Listen.

        Returns:
            The port.

        Raises:
            LinkError: the address cannot be used.
        """
        self._thread.start()
        self._running = True
        try:
            self._port = self._call(self._serve())
        except BaseException:
            self._end_loop()
            raise
        if self._keys is None:
            _log.warning(
                "INSECURE: plain text and no certificates on port %d; any program on this machine "
                "can join under any name",
                self._port,
            )
        return self._port

    @property
    def port(self) -> int:
        """The port that :meth:`start` took; 0 before."""
        return self._port

    def stop(self, grace: float = 2.0) -> None:
        """Tell the holders to come back later and close; who still waits gets a LinkError.

        Args:
            grace: seconds that streams may take to end.
        """
        if not self._loop.is_closed():
            self._call(self._close(grace))
            self._end_loop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Holders

    def get_node_ids(self) -> list[int]:
        """Node ids of the holders that are connected now, in ascending order."""
        return sorted(self._holders)

    def holder_name(self, node_id: int) -> str:
        """The name of a holder that has ever joined this Grid."""
        return self._names.get(node_id, f"node {node_id}")

    def away(self) -> list[str]:
        """Names of holders that have joined this Grid and are not connected now."""
        return sorted(self._names[node] for node in set(self._names) - set(self._holders))

    @property
    def held_bytes(self) -> int:
        """Bytes of replies that have begun to come in and are not complete.

        At most ``max_message_bytes`` for each holder that has an open request, however slowly,
        often or from how many connections it writes.
        """
        return self._board.held_bytes

    @property
    def authority(self) -> Certificate | None:
        """The federation's; None without TLS."""
        return None if self._keys is None else self._keys.authority

    @property
    def patience(self) -> float:
        """Longer than a holder waits between two attempts to connect."""
        return PATIENCE

    @property
    def holders(self) -> list[Holder]:
        """Who is connected now, by name."""
        return sorted(self._holders.values(), key=lambda holder: holder.name)

    def wait_for_holders(
        self,
        count: int,
        timeout: float | None = None,
        on_progress: Callable[[list[Holder]], None] | None = None,
    ) -> list[int]:
        """Wait until enough holders are connected.

        Args:
            count: how many are enough.
            timeout: seconds to wait; None for as long as it takes.
            on_progress: called with those connected, at once and whenever that changes.

        Returns:
            Node ids of those connected, in ascending order.

        Raises:
            LinkError: fewer came in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        seen: Mapping[int, Holder] | None = None
        while True:
            with self._changed:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                self._changed.wait_for(lambda seen=seen: self._holders is not seen, left)  # type: ignore[misc]
                late, seen = self._holders is seen, self._holders
            if on_progress is not None and not late:
                on_progress(self.holders)
            if len(seen) >= count:
                return sorted(seen)
            if late:
                raise LinkError(
                    f"{len(seen)} of {count} holders joined within {timeout:g} s "
                    f"({', '.join(h.name for h in self.holders) or 'none'}); start `sotto join` "
                    "on the others, or ask for fewer with --min-holders"
                )

    # Messages

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Ask holders and wait for what they say.

        A holder that is away, or comes back before it has answered, is sent its request then.

        Args:
            messages: requests; one without an id gets a fresh one.
            timeout: seconds; requests without a reply by then are withdrawn, and a later reply is
                dropped. None waits for all.

        Returns:
            The replies, in the order of the requests. A reply that breaks the contract of the
            link is replaced by one with an error.

        Raises:
            LinkError: the Grid is not running, or was stopped meanwhile.
            WireError: a message cannot be encoded.
        """
        requests = _requests(messages)
        self._call(self._board.exchange(requests, timeout))
        return [self._reply(request) for request in requests if request.reply is not None]

    def _reply(self, request: Request) -> Message:
        # Taken off, so that no reply is in memory twice but the one that is being decoded.
        reply, request.reply = request.reply, None
        assert reply is not None  # the caller's filter
        if isinstance(reply, Error):
            return _error_reply(request, reply)
        try:
            return decode(reply, src_node_id=request.node_id, dst_node_id=COORDINATOR_NODE_ID)
        except WireError as error:
            _log.warning(
                "%s sent an unreadable reply: %s", self.holder_name(request.node_id), error
            )
            return _error_reply(request, Error(UNREADABLE_REPLY, f"unreadable reply: {error}"))

    # The event loop's thread

    async def _serve(self) -> int:
        most = min(self._max_connections, room_for_files(self._max_connections) - _SPARE_FILES)
        options = (
            *SERVER_OPTIONS,
            ("grpc.max_allowed_incoming_connections", max(1, most)),
            ("grpc.server_handshake_timeout_ms", round(1000 * self._handshake_timeout)),
            ("grpc.max_connection_idle_ms", round(3000 * self._handshake_timeout)),
        )
        server = grpc.aio.server(options=options)
        add_FederationServicer_to_server(self._board, server)  # type: ignore[no-untyped-call]
        try:
            nameless = self._board.admission.nameless
            if self._keys is None or nameless is None:
                port = server.add_insecure_port(self._listen)
            else:
                credentials = server_credentials(self._keys, nameless.begin)
                port = server.add_secure_port(self._listen, credentials)
                self._reporter = asyncio.create_task(nameless.report())
        except RuntimeError:
            raise LinkError(
                f"cannot listen on {self._listen}: the port is taken, or {host_of(self._listen)} "
                "is not an address of this machine; choose another with --listen"
            ) from None
        await server.start()
        self._server = server
        return port

    async def _close(self, grace: float) -> None:
        self._board.drain("the coordinator stops")
        if self._server is not None:
            await self._server.stop(grace)

    def _take_note(self, holders: Mapping[int, Holder]) -> None:
        with self._changed:
            self._holders = holders
            self._names.update((key, holder.name) for key, holder in holders.items())
            self._changed.notify_all()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the loop and wait for it."""
        with self._submitting:
            if not self._running:
                work.close()
                raise LinkError("the link is not running; call start() first, and not after stop()")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise LinkError("the link was stopped while a request was open") from None
        finally:
            future.cancel()  # an interrupted caller leaves no request open

    def _end_loop(self) -> None:
        with self._submitting:
            self._running = False  # what was submitted before is a task when the others are listed
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    """Cancel every other task of the loop, so that nobody waits for one that will never end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _requests(messages: Iterable[Message]) -> list[Request]:
    """Encode messages; a content that several of them share is encoded once."""
    payloads: dict[int, tuple[RecordDict, Payload]] = {}
    requests = []
    for message in messages:
        content = message.content
        # The content is kept beside its payload so that no other object can get its id().
        if id(content) not in payloads:
            payloads[id(content)] = (content, encode(content))
        payload = payloads[id(content)][1]
        stamp(message, message.metadata.message_id or None)
        header: pb.Header = header_for(message, payload)
        requests.append(Request(message.metadata.dst_node_id, header, payload))
    return requests


def _error_reply(request: Request, error: Error) -> Message:
    asked = request.header
    return incoming_message(
        None,
        error,
        message_id="",
        message_type=asked.message_type,
        src_node_id=request.node_id,
        dst_node_id=COORDINATOR_NODE_ID,
        reply_to=request.id,
        group_id=asked.group_id,
        run_id=asked.run_id,
        created_at=time.time(),
        ttl=asked.ttl,
    )
