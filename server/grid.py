"""A Flower Grid over the link: the round loop's way to holders on other machines."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from cryptography.x509 import Certificate
from flwr.app import Message
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from common.errors import LinkError, WireError
from common.flower import BaseGrid
from common.link.channels import server_options
from common.link.federation_pb2_grpc import add_FederationServicer_to_server
from common.link.identity import host_of
from common.link.keepalive import KEEPALIVE, check_keepalive
from common.link.keys import CoordinatorKeys
from common.link.tls import require_loopback, server_credentials
from common.link.traffic import Traffic
from common.link.transfer import DEFAULT_MAX_MESSAGE_BYTES
from server.link.files import room_for_files
from server.link.health import AdmittedProbes, Health
from server.link.mailroom import Errand, Request
from server.link.posting import reply_to, requests_for
from server.link.sessions import Holder
from server.link.switchboard import STOPPING, Switchboard

__all__ = ["Holder", "LinkGrid", "Traffic"]

_log = logging.getLogger("sotto.link")
_T = TypeVar("_T")

_Settled = SimpleQueue[Request | None]
"""Closed requests, as they are; None once the Grid stops."""

MAX_CONNECTIONS = 4096
"""A few times the holders that one coordinator serves. A silent connection takes 10 kB of memory
and a file descriptor, and ends after ten seconds."""

HANDSHAKE_TIMEOUT = 10.0

_SPARE_FILES = 128  # for checkpoints, rosters and everything else that is no connection

PATIENCE = 40.0
"""Seconds; holders try to connect at least every 30 s (``client.node.Backoff``)."""

STOPS = "the coordinator stops"
STOPPED = "the link was stopped while a request was open"

GRACE = 3.0
"""Seconds in which a reply that is coming in may be completed when the coordinator stops."""


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
        keepalive: seconds of silence after which a holder is asked whether it is still there.
        deadline_extensions: how many times the time of a call may be added to it for a holder that
            shows progress; see :class:`server.link.deadline.Deadline`.
        run_id: the run that messages belong to.

    Raises:
        LinkError: plain text is asked for where others could listen.
        ConfigurationError: keep-alive is out of range.
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
        keepalive: float = KEEPALIVE,
        deadline_extensions: int = 0,
        run_id: int = 1,
    ) -> None:
        super().__init__(run_id)
        self._keepalive = check_keepalive(keepalive)
        self._deadline_extensions = deadline_extensions
        self._pushed: dict[str, Request] = {}
        self._waiting: set[_Settled] = set()
        self._max_connections = max_connections
        self._handshake_timeout = handshake_timeout
        if keys is None:
            require_loopback(listen)
        self._listen = listen
        self._keys = keys
        self._holders: Mapping[int, Holder] = {}
        self._names: dict[int, str] = {}
        self._left: Mapping[int, float] = {}
        self.health = Health()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="sotto-link", daemon=True
        )
        self._running = self._draining = self._over = False
        self._draining_task: asyncio.Task[None] | None = None
        self._submitting = threading.RLock()  # a generator may be collected while it is held
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

    def drain(self, grace: float = GRACE) -> None:
        """Begin to stop, and return at once; a signal handler may call it.

        Holders are told to come back later. Replies that are coming in may be completed and are
        handed out; whoever still waits then gets a LinkError, and so does whoever asks again.

        Args:
            grace: seconds for that.
        """
        if self._running and not self._draining:
            self._draining = True
            self.health.drain()
            self._loop.call_soon_threadsafe(self._drain, grace)

    @property
    def draining(self) -> bool:
        """Whether :meth:`drain` was called."""
        return self._draining

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
        """Node ids of the holders that are connected now, in ascending order.

        Raises:
            LinkError: the Grid has stopped, so that nobody will come any more.
        """
        if self._over:
            raise LinkError(STOPPING)
        return sorted(self._holders)

    def holder_name(self, node_id: int) -> str:
        """The name of a holder that has ever joined this Grid."""
        return self._names.get(node_id, f"node {node_id}")

    def away(self) -> list[str]:
        """Names of holders that have joined this Grid and are not connected now."""
        return sorted(self._names[node] for node in set(self._names) - set(self._holders))

    @property
    def left(self) -> Mapping[str, float]:
        """When each holder of :meth:`away` was seen last, in seconds since 1970."""
        return {self._names[node]: moment for node, moment in self._left.items()}

    @property
    def errands(self) -> Mapping[str, Errand]:
        """What each holder was asked last, and what became of it."""
        names = dict(self._names)
        return {names[key]: errand for key, errand in self._board.errands.items() if key in names}

    @property
    def held_bytes(self) -> int:
        """Bytes of replies that have begun to come in and are not complete.

        At most ``max_message_bytes`` for each holder that has an open request, however slowly,
        often or from how many connections it writes.
        """
        return self._board.held_bytes

    @property
    def traffic(self) -> Traffic:
        """What has gone over the link since the start."""
        return self._board.traffic

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
            LinkError: fewer came in time, or the Grid stops.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        present = self.get_node_ids()
        while True:
            if on_progress is not None:
                on_progress(self.holders)
            if len(present) >= count:
                return present
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            seen, present = present, self.wait_for_change(present, left)
            if seen == present:
                raise LinkError(
                    f"{len(seen)} of {count} holders joined within {timeout:g} s "
                    f"({', '.join(h.name for h in self.holders) or 'none'}); start `sotto join` "
                    "on the others, or ask for fewer with --min-holders"
                )

    def wait_for_change(self, present: Collection[int], timeout: float | None = None) -> list[int]:
        """Wait until others are connected than ``present``.

        Args:
            present: node ids of who was there at the last look.
            timeout: seconds; None for as long as it takes.

        Returns:
            Node ids of those connected, in ascending order; the same as ``present`` if the time is
            over.

        Raises:
            LinkError: the Grid stops.
        """
        known = set(present)
        with self._changed:
            self._changed.wait_for(lambda: self._over or set(self._holders) != known, timeout)
        if self._over:
            raise LinkError(STOPPING)
        return self.get_node_ids()

    # Messages

    def replies(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Iterator[Message]:
        """Ask holders, and hand out what they say as it comes in.

        A holder that is away, or comes back before it has answered, is sent its request then. When
        the iterator ends or is closed, what is still open is withdrawn, and a later reply dropped.

        Args:
            messages: requests; one without an id gets a fresh one.
            timeout: seconds, which a holder that shows progress extends; None waits for all.
            enough: replies without an error that suffice; None for all.

        Returns:
            The replies, in the order in which they came in. A reply that breaks the contract of the
            link is replaced by one with an error.

        Raises:
            LinkError: the Grid is not running, or stops meanwhile.
            WireError: a message cannot be encoded.
        """
        settled: _Settled = SimpleQueue()
        requests = self._requests(messages, timeout, settled.put)
        self._waiting.add(settled)
        found = 0
        try:
            self._call(self._board.post(requests))
            for _ in requests:
                if (request := settled.get()) is None:
                    raise LinkError(STOPPED)
                if request.reply is None:
                    continue  # its time is over
                reply = self._reply(request)
                found += not reply.has_error()
                yield reply
                if enough is not None and found >= enough:
                    return
        finally:
            self._waiting.discard(settled)
            self._withdraw(requests)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Ask holders and wait for what they say: :meth:`replies`, in the order of the requests."""
        asked = list(messages)
        came = {
            reply.metadata.reply_to_message_id: reply
            for reply in self.replies(asked, timeout=timeout)
        }
        order = (message.metadata.message_id for message in asked)
        return [came[message_id] for message_id in order if message_id in came]

    def push_messages(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[str]:
        """Ask holders and return at once; see ``flwr.serverapp.Grid.push_messages``.

        Args:
            messages: requests; one without an id gets a fresh one.
            timeout: seconds until a request is overdue, which a holder that shows progress extends;
                None for never.
        """
        requests = self._requests(messages, timeout, self._note_closed)
        try:
            self._call(self._board.post(requests))
        except BaseException:
            self._withdraw(requests)
            raise
        self._pushed |= {request.id: request for request in requests}
        return [request.id for request in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to :meth:`push_messages` that have come, each handed out once."""
        return [self._reply(request) for request in self._pop_closed(message_ids, answered=True)]

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Return as soon as one of the requests is answered or overdue, or the time is over.

        Args:
            message_ids: of requests that were pushed.
            timeout: seconds.

        Raises:
            LinkError: the Grid stops, and none of them is.
        """
        asked = [self._pushed[key] for key in list(message_ids) if key in self._pushed]
        with self._changed:
            self._changed.wait_for(
                lambda: self._over or any(request.closed for request in asked), timeout
            )
        if self._over and not any(request.closed for request in asked):
            raise LinkError(STOPPED)

    def overdue(self, message_ids: Iterable[str]) -> list[str]:
        """Those requests that were pushed and whose time is over: no reply to them will come.

        Args:
            message_ids: of requests whose replies were not pulled; each is named once.
        """
        return [request.id for request in self._pop_closed(message_ids, answered=False)]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Withdraw requests that were pushed: their replies are no longer wanted."""
        known = [key for key in list(message_ids) if key in self._pushed]
        self._withdraw([self._pushed.pop(key) for key in known])

    def _pop_closed(self, message_ids: Iterable[str], *, answered: bool) -> list[Request]:
        """Take requests that were pushed and are closed, with a reply or without one."""
        known = [self._pushed[key] for key in list(message_ids) if key in self._pushed]
        closed = [r for r in known if r.closed and (r.reply is not None) == answered]
        for request in closed:
            del self._pushed[request.id]
        return closed

    def _note_closed(self, request: Request) -> None:
        """One of those that were pushed; on the event loop."""
        del request
        with self._changed:
            self._changed.notify_all()

    def _requests(
        self,
        messages: Iterable[Message],
        timeout: float | None,
        on_closed: Callable[[Request], None],
    ) -> list[Request]:
        """Messages, ready to be posted."""
        return requests_for(messages, on_closed, timeout, self._deadline_extensions)

    def _withdraw(self, requests: Iterable[Request]) -> None:
        """Have what is still open closed soon; an iterator may be closed on any thread."""
        still_open = [request for request in requests if not request.closed]
        with self._submitting:
            if still_open and self._running:
                self._loop.call_soon_threadsafe(self._board.withdraw, still_open)

    def _reply(self, request: Request) -> Message:
        def note(error: WireError) -> None:
            name = self.holder_name(request.node_id)
            _log.warning("%s sent an unreadable reply: %s", name, error)

        return reply_to(request, note)

    # The event loop's thread

    async def _serve(self) -> int:
        most = min(self._max_connections, room_for_files(self._max_connections) - _SPARE_FILES)
        options = (
            *server_options(self._keepalive),
            ("grpc.max_allowed_incoming_connections", max(1, most)),
            ("grpc.server_handshake_timeout_ms", round(1000 * self._handshake_timeout)),
            ("grpc.max_connection_idle_ms", round(3000 * self._handshake_timeout)),
        )
        server = grpc.aio.server(options=options)
        add_FederationServicer_to_server(self._board, server)  # type: ignore[no-untyped-call]
        add_HealthServicer_to_server(AdmittedProbes(self.health, self._board.admission), server)
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
        self.health.serve()
        self._server = server
        return port

    def _drain(self, grace: float) -> None:
        self._draining_task = asyncio.create_task(self._drain_and_tell(grace))

    async def _drain_and_tell(self, grace: float) -> None:
        await self._board.drain(STOPS, grace)
        self._tell_waiting()

    async def _close(self, grace: float) -> None:
        self.health.drain()
        if self._draining_task is not None:
            self._draining_task.cancel()
        await self._board.drain(STOPS, 0.0)
        self._tell_waiting()
        if self._server is not None:
            await self._server.stop(grace)

    def _tell_waiting(self) -> None:
        """Let everybody who waits for a reply or a holder go."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for settled in list(self._waiting):
            settled.put(None)

    def _take_note(self, holders: Mapping[int, Holder]) -> None:
        with self._changed:
            left = {**dict.fromkeys(self._holders, time.time()), **self._left}
            self._left = {key: moment for key, moment in left.items() if key not in holders}
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
            raise LinkError(STOPPED) from None
        finally:
            future.cancel()  # an interrupted caller leaves no request open

    def _end_loop(self) -> None:
        with self._submitting:
            self._running = False  # what was submitted before is a task when the others are listed
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._tell_waiting()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    """Cancel every other task of the loop, so that nobody waits for one that will never end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
