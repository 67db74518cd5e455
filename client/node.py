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

from client.link.pulse import LEAST_EVERY, Pulse
from client.link.stream import Again, Asked, Ended, Stream, Welcomed, Withdrawn
from client.link.worker import Finished, Handler, Job, Worker, failure
from common.link import federation_pb2 as pb
from common.link.codec import Incoming
from common.link.identity import check_holder_name, host_of
from common.link.keepalive import KEEPALIVE, check_keepalive
from common.link.keys import HolderKeys
from common.link.tls import require_loopback
from common.link.traffic import Counts, Traffic
from common.link.transfer import DEFAULT_MAX_MESSAGE_BYTES, Beginning
from common.link.versions import OWN
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
_OUTAGE_OVER_WAIT = 80.0
_LONGEST_ID = 256  # of a request that a Hello names; ours have 40 characters


@dataclass(frozen=True)
class Backoff:
    """How long to wait before the next attempt to connect.

    Exponential with full jitter (Brooker, "Exponential backoff and jitter", 2015), so that many
    holders do not come back at the same instant. A coordinator that was restarted finds its holders
    within two seconds. Where something answers that is no coordinator, or nothing does, for a whole
    night, it is not hammered: a wait is at most ``short`` seconds, or an eightieth of the outage so
    far if that is longer, and never more than ``longest``.

    Args:
        first: upper bound of the first wait, in seconds.
        short: upper bound of waits in the first two minutes of an outage, in seconds.
        longest: upper bound of every wait, in seconds.
    """

    first: float = 0.1
    short: float = 1.5
    longest: float = 30.0

    def delay(self, attempt: int, outage: float) -> float:
        """Seconds to wait before an attempt.

        Args:
            attempt: counted from 0.
            outage: seconds since the holder was last connected; 0 where nobody listens.
        """
        patient = max(self.short, outage / _OUTAGE_OVER_WAIT)
        bound = min(self.longest, patient, self.first * 2.0 ** min(attempt, 30))
        return random.uniform(0.0, bound)


@dataclass(frozen=True)
class Connected:
    """The coordinator knows this holder as ``holder`` and may ask it from now on.

    ``proxy`` is the HTTP proxy on the way, as ``HOST:PORT``.
    """

    holder: str
    federation: str
    proxy: str | None = None


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
    message_id: str = ""


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
        keepalive: seconds of silence after which the coordinator is asked whether it is there;
            less than the shortest idle time-out of any proxy on the way.
        progress_every: seconds between two signs of life at least, whatever the coordinator asks
            for; see :class:`client.link.pulse.Pulse`.

    Raises:
        LinkError: the address, or a name without certificate, cannot be used.
        ConfigurationError: keep-alive is out of range.
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
        keepalive: float = KEEPALIVE,
        progress_every: float = LEAST_EVERY,
    ) -> None:
        host_of(server)
        if keys is None:
            require_loopback(server)
            check_holder_name(name)
        self._server = server
        self._keys = keys
        self._about = {"software": software, "name": name, "task": task}
        self._keepalive = check_keepalive(keepalive)
        self._on_event = on_event or _ignore
        self._backoff = backoff or Backoff()
        self._max_message_bytes = max_message_bytes

        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._worker = Worker(handler, self._inbox)
        self._jobs: dict[str, Job] = {}
        self._last: Job | None = None
        self._stream: Stream | None = None
        self._welcome: pb.Welcome | None = None
        self._beginning: Beginning | None = None
        self._attempt = 0
        self._connected_at = time.monotonic()
        self._leaving = False
        self._pulse = Pulse(progress_every)
        self._counts = Counts()

    @property
    def traffic(self) -> Traffic:
        """What has gone over the link since the start."""
        return Traffic.of(self._counts)

    def progressed(self) -> None:
        """The handler has completed a local step; it may say so as often as it likes.

        The coordinator learns of it at the next tick of a fixed clock, and nothing more than that
        there was at least one step since the last: see :class:`client.link.pulse.Pulse`.
        """
        self._pulse.step()

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
            hello=self._hello(),
            inbox=self._inbox,
            max_message_bytes=self._max_message_bytes,
            beginning=self._beginning,
            keepalive=self._keepalive,
            counts=self._counts,
        )
        self._beginning = None  # the stream has it, so that it is in memory once
        try:
            return self._serve(stream)
        finally:
            if self._welcome is None:
                self._counts["refused"] += 1
            else:
                self._connected_at = time.monotonic()
            self._stream = self._welcome = None
            self._beginning = stream.close()

    def _hello(self) -> pb.Hello:
        """Who this is, and what it has of requests, complete and not."""
        in_hand = [*self._jobs.values(), *([self._last] if self._last is not None else [])]
        begun = self._beginning.named if self._beginning is not None else pb.Begun()
        return pb.Hello(
            protocol=OWN.newest,
            oldest=OWN.oldest,
            begun=begun if len(begun.message_id) <= _LONGEST_ID else None,
            in_hand=[job.id for job in in_hand if len(job.id) <= _LONGEST_ID],
            **self._about,
        )

    def _serve(self, stream: Stream) -> Ended:
        while True:
            try:
                event = self._inbox.get(timeout=self._patience())
            except queue.Empty:
                self._tick(stream)
                continue
            if isinstance(event, Ended) and event.stream is stream:
                return event
            self._handle(event)

    def _patience(self) -> float | None:
        """Seconds that may pass without an event."""
        if self._leaving and not self._jobs:
            return _FAREWELL_TIMEOUT
        return self._pulse.wait(time.monotonic())

    def _tick(self, stream: Stream) -> None:
        """Nothing happened for so long: say that work goes on, or leave without an answer."""
        if self._leaving and not self._jobs:
            raise _Abandoned
        if self._pulse.ticked(time.monotonic()) and self._welcome is not None:
            # Those in line, too: after a restart the coordinator asks anew, under another id, for
            # what is being worked on, and that answers both.
            stream.progressed([job.id for job in self._jobs.values() if not job.withdrawn])

    def _wait_to_retry(self, ended: Ended) -> None:
        """Wait for the next attempt; when leaving, for the handler to finish."""
        if ended.final is not None and not self._leaving:
            raise ended.final
        # To find out that nobody listens costs one packet each way, however often it is done.
        outage = 0.0 if ended.nobody_there else time.monotonic() - self._connected_at
        delay = self._backoff.delay(self._attempt, outage)
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
        if isinstance(event, Welcomed | Asked | Again | Withdrawn):
            event.stream.taken()
        match event:
            case Welcomed(stream, welcome) if stream is self._stream:
                self._welcome = welcome
                self._counts["connections"] += 1
                holder, federation = shown(welcome.holder), shown(welcome.federation)
                self._on_event(Connected(holder, federation, stream.proxy))
            case Asked(stream, request) if stream is self._stream and not self._leaving:
                self._attempt = 0
                self._take(stream, request, self._welcome.node_id if self._welcome else 0)
            case Again(stream, message_id) if stream is self._stream and not self._leaving:
                self._attempt = 0
                if not self._is_in_hand(message_id):
                    # Another reply has taken its place since Hello; the next one will say so.
                    stream.cut("a reply that was asked for again is no longer here")
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
        if self._is_in_hand(header.message_id):
            pass  # asked again after a reconnect
        elif len(self._jobs) > _MOST_WAITING:
            stream.refuse(f"more than {_MOST_WAITING} requests wait")
        else:
            job = Job(request, node_id)
            self._jobs[job.id] = job
            self._start_next()
            self._on_event(Requested(shown(header.message_type), shown(header.group_id)))

    def _is_in_hand(self, message_id: str) -> bool:
        """Whether a request is being worked on, or its reply is here; that is then sent again."""
        if (job := self._jobs.get(message_id)) is not None:
            job.withdrawn = False
        elif self._last is not None and self._last.id == message_id:
            self._send(self._last)
        else:
            return False
        return True

    def _start_next(self) -> None:
        """Have the oldest job done, unless one is at work."""
        job = next(iter(self._jobs.values()), None)
        if job is None:
            self._pulse.end()
        elif not job.started:
            self._pulse.begin(job.progress_every, time.monotonic())
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
        self._counts["replies"] += 1
        asked, failed = job.request.header, reply.header.HasField("failure")
        error = reply.header.failure.reason if failed else None
        seconds = time.monotonic() - job.arrived
        kind, group = shown(asked.message_type), shown(asked.group_id)
        self._on_event(Replied(kind, group, seconds, error, job.id))


def _ignore(event: NodeEvent) -> None:
    """Nobody wants to know."""
