"""The thread on which a holder works, and the jobs it works on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from flwr.app import Message

from client.link.stream import Outgoing
from common.flower import COORDINATOR_NODE_ID, stamp
from common.link import federation_pb2 as pb
from common.link.codec import Incoming, Payload, decode, encode, header_for

__all__ = ["Finished", "Handler", "Job", "Worker", "failure"]

HANDLER_FAILED = 2
"""Flower's code for a client that raised an exception."""

Handler = Callable[[Message], Message]
"""Answers a request. It should turn its own errors into replies; what it raises all the same
reaches the coordinator as the name of the exception's type, never as text."""


@dataclass(eq=False)
class Job:
    """A request in hand.

    Args:
        request: as received.
        node_id: the holder's, as the coordinator knows it.
        arrived: when, on the monotonic clock.
        started: the handler has it.
        withdrawn: nobody wants the reply any more.
        reply: the result.
    """

    request: Incoming
    node_id: int
    arrived: float = field(default_factory=time.monotonic)
    started: bool = False
    withdrawn: bool = False
    reply: Outgoing | None = None

    @property
    def progress_every(self) -> float:
        """Seconds between two signs of life that the coordinator asks for."""
        return float(self.request.header.progress_every)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.header.message_id


@dataclass(frozen=True)
class Finished:
    """A job is done."""

    job: Job


class Worker:
    """Does one job at a time, on a thread that does not keep the process alive.

    Args:
        handler: answers requests.
        inbox: gets a :class:`Finished` for every job.
    """

    def __init__(self, handler: Handler, inbox: SimpleQueue[Any]) -> None:
        self._handler = handler
        self._inbox = inbox
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="sotto-handler", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """Do ``job``; there must be none at work."""
        job.started = True
        self._jobs.put(job)

    def stop(self) -> None:
        """End after the job at work; do not wait for that."""
        self._jobs.put(None)

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            job.reply = _answer(self._handler, job)
            job.request = Incoming(job.request.header)  # its payload has served
            self._inbox.put(Finished(job))


def failure(job: Job, reason: str) -> Outgoing:
    """A reply that says that there is none."""
    asked = job.request.header
    header = pb.Header(
        reply_to=asked.message_id,
        message_type=asked.message_type,
        group_id=asked.group_id,
        run_id=asked.run_id,
        created_at=time.time(),
        ttl=asked.ttl,
        failure=pb.Failure(code=HANDLER_FAILED, reason=reason),
    )
    return Outgoing(header, Payload(()))


def _answer(handler: Handler, job: Job) -> Outgoing:
    """Decode, handle, encode; whatever goes wrong, the coordinator learns the type of it only."""
    try:
        request = decode(job.request, src_node_id=COORDINATOR_NODE_ID, dst_node_id=job.node_id)
        reply = handler(request)
        payload = encode(reply.content if reply.has_content() else None)
    except Exception as error:
        return failure(job, type(error).__name__)
    stamp(reply)
    header = header_for(reply, payload)
    header.reply_to = job.id
    return Outgoing(header, payload)
