"""The resident process of a holder: stays joined, answers what it is asked, comes back.

One thread, the one that calls :meth:`Node.run`, decides everything; it takes events out of one
inbox. The connection reads and writes on threads of its own and the handler works on another, so
that minutes of training hold up neither keep-alive nor a signal.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from client.link.stream import Asked, Ended, Stream, Welcomed, Withdrawn
from client.link.worker import Finished, Handler, Job, Worker, failure
from common.link import federation_pb2 as pb
from common.link.codec import Incoming
from common.link.identity import check_holder_name, host_of
from common.link.keys import HolderKeys
from common.link.tls import require_loopback
from common.link.transfer import DEFAULT_MAX_MESSAGE_BYTES, PROTOCOL
from common.words import shown

__all__ = [
    "Backoff",
    "Connected",
    "Disconnected",
    "Handler",
    "Node",
    "NodeEvent",
    "Replied",
    "Requested",
]

_MOST_WAITING = 4  # requests beside the one at work; an honest coordinator has one
_FAREWELL_TIMEOUT = 5.0  # seconds to wait for the coordinator's answer to a goodbye


@dataclass(frozen=True)
class Backoff:
    """How long to wait before the next attempt to connect: exponential, with full jitter.

    Args:
        first: upper bound of the first wait, in seconds.
        longest: upper bound of every wait, in seconds.
    """

    first: float = 0.5
    longest: float = 30.0

    def delay(self, attempt: int) -> float:
        """Seconds to wait before attempt ``attempt``, counted from 0."""
        return random.uniform(0.0, min(self.longest, self.first * 2.0 ** min(attempt, 30)))


@dataclass(frozen=True)
class Connected:
    """The coordinator knows this holder as ``holder`` and may ask it from now on."""

    holder: str
    federation: str


@dataclass(frozen=True)
class Disconnected:
    """The connection is gone; the next attempt comes in ``retry_in`` seconds."""

    reason: str
    retry_in: float


@dataclass(frozen=True)
class Requested:
    """A request has arrived."""

    message_type: str
    group_id: str


@dataclass(frozen=True)
class Replied:
    """A request was answered, after ``seconds``; ``error`` is why not, if it could not be."""

    message_type: str
    group_id: str
    seconds: float
    error: str | None = None


NodeEvent = Connected | Disconnected | Requested | Replied


@dataclass(frozen=True)
class _Stop:
    now: bool


class _Abandoned(Exception):
    """Ends :meth:`Node.run` without waiting for anything."""


class Node:
    """Keeps a holder joined to its coordinator.

    Args:
        server: the coordinator's ``HOST:PORT``.
        handler: answers requests, one at a time, on a thread of its own.
        keys: the holder's certificate; None for plain text, which is allowed on loopback only.
        name: the holder's name; needed without ``keys`` and ignored with them.
        task: what the holder has data for; shown on the coordinator.
        software: name and version of this software; shown on the coordinator.
        on_event: told what happens, on the thread of :meth:`run`.
        backoff: how long to wait between attempts to connect.
        max_message_bytes: the longest request that is accepted; see
            :func:`common.link.transfer.message_bytes`.

    Raises:
        LinkError: the address, or a name without certificate, cannot be used.
    """

    def __init__(
        self,
        server: str,
        handler: Handler,
        *,
        keys: HolderKeys | None,
        name: str = "",
        task: str = "",
        software: str = "sotto",
        on_event: Callable[[NodeEvent], None] | None = None,
        backoff: Backoff | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        host_of(server)
        if keys is None:
            require_loopback(server)
            check_holder_name(name)
        self._server = server
        self._keys = keys
        self._hello = pb.Hello(protocol=PROTOCOL, software=software, name=name, task=task)
        self._on_event = on_event or _ignore
        self._backoff = backoff or Backoff()
        self._max_message_bytes = max_message_bytes

        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._worker = Worker(handler, self._inbox)
        self._jobs: dict[str, Job] = {}
        self._last: Job | None = None
        self._stream: Stream | None = None
        self._welcome: pb.Welcome | None = None
        self._attempt = 0
        self._leaving = False

    def run(self) -> None:
        """Stay joined until :meth:`stop`.

        Raises:
            LinkError: the coordinator refuses this holder, another process has taken its place,
                or the coordinator cannot be trusted. Everything else is tried again.
        """
        self._worker.start()
        try:
            while not self._leaving:
                ended = self._stay_joined()
                self._wait_to_retry(ended)
        except _Abandoned:
            pass
        finally:
            self._worker.stop()

    def stop(self, *, now: bool = False) -> None:
        """Leave; safe to call from a signal handler and from any thread.

        A handler at work may finish and its reply is sent, unless ``now`` is set or ``stop`` is
        called again. The process may end then; the thread at work does not keep it alive.
        """
        # SimpleQueue.put is reentrant: a signal may well arrive while run() is inside get().
        self._inbox.put(_Stop(now))

    # Connecting

    def _stay_joined(self) -> Ended:
        """Connect and serve until the connection has ended."""
        self._stream = stream = Stream(
            self._server,
            keys=self._keys,
            hello=self._hello,
            inbox=self._inbox,
            max_message_bytes=self._max_message_bytes,
        )
        try:
            return self._serve(stream)
        finally:
            self._stream = self._welcome = None
            stream.close()

    def _serve(self, stream: Stream) -> Ended:
        while True:
            try:
                idle = self._leaving and not self._jobs
                event = self._inbox.get(timeout=_FAREWELL_TIMEOUT if idle else None)
            except queue.Empty:
                raise _Abandoned from None
            if isinstance(event, Ended) and event.stream is stream:
                return event
            self._handle(event)

    def _wait_to_retry(self, ended: Ended) -> None:
        """Wait for the next attempt; when leaving, for the handler to finish."""
        if ended.final is not None and not self._leaving:
            raise ended.final
        delay = self._backoff.delay(self._attempt)
        self._attempt += 1
        if not self._leaving:
            self._on_event(Disconnected(ended.reason, delay))
        due = time.monotonic() + delay
        while self._jobs if self._leaving else time.monotonic() < due:
            left = None if self._leaving else max(0.0, due - time.monotonic())
            try:
                self._handle(self._inbox.get(timeout=left))
            except queue.Empty:
                return

    # Events

    def _handle(self, event: object) -> None:
        if isinstance(event, Welcomed | Asked | Withdrawn):
            event.stream.taken()
        match event:
            case Welcomed(stream, welcome) if stream is self._stream:
                self._welcome = welcome
                self._on_event(Connected(shown(welcome.holder), shown(welcome.federation)))
            case Asked(stream, request) if stream is self._stream and not self._leaving:
                self._attempt = 0
                self._take(stream, request, self._welcome.node_id if self._welcome else 0)
            case Withdrawn(_, message_id) if message_id in self._jobs:
                self._forget(self._jobs[message_id])
            case Finished(job):
                self._finish(job)
            case _Stop(now):
                self._leave(now)
            case _:
                pass  # the rest of a stream that is gone, or a withdrawal that came too late

    def _take(self, stream: Stream, request: Incoming, node_id: int) -> None:
        header = request.header
        if (job := self._jobs.get(header.message_id)) is not None:
            job.withdrawn = False  # asked again after a reconnect, and in hand already
        elif self._last is not None and self._last.id == header.message_id:
            self._send(self._last)
        elif len(self._jobs) > _MOST_WAITING:
            stream.refuse(f"more than {_MOST_WAITING} requests wait")
        else:
            job = Job(request, node_id)
            self._jobs[job.id] = job
            self._start_next()
            self._on_event(Requested(shown(header.message_type), shown(header.group_id)))

    def _start_next(self) -> None:
        """Have the oldest job done, unless one is at work."""
        job = next(iter(self._jobs.values()), None)
        if job is not None and not job.started:
            self._worker.put(job)

    def _forget(self, job: Job) -> None:
        """Nobody wants a reply: one that is not begun need not be."""
        if job.started:
            job.withdrawn = True
        else:
            del self._jobs[job.id]

    def _finish(self, job: Job) -> None:
        del self._jobs[job.id]
        self._start_next()
        if job.reply is not None:
            self._last = job  # kept: if it does not arrive, the coordinator asks again
        if not job.withdrawn:
            self._send(job)
        if self._leaving:
            self._say_goodbye()

    def _leave(self, now: bool) -> None:
        if now or self._leaving:
            raise _Abandoned
        self._leaving = True
        for job in [job for job in self._jobs.values() if not job.started]:
            self._forget(job)
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        if self._stream is not None and not self._jobs:
            self._stream.leave("the holder leaves")

    def _send(self, job: Job) -> None:
        """Send a reply now, or keep it until the coordinator asks again."""
        reply = job.reply
        if self._stream is None or self._welcome is None or reply is None:
            return
        limit = self._welcome.max_message_bytes
        if reply.header.payload_bytes > limit:
            reply = failure(job, f"the reply is longer than {limit} bytes")
        self._stream.send(reply)
        asked, failed = job.request.header, reply.header.HasField("failure")
        error = reply.header.failure.reason if failed else None
        seconds = time.monotonic() - job.arrived
        kind, group = shown(asked.message_type), shown(asked.group_id)
        self._on_event(Replied(kind, group, seconds, error))


def _ignore(event: NodeEvent) -> None:
    """Nobody wants to know."""
