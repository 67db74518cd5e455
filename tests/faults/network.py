"""What the tests of network faults and ``benchmarks/recovery.py`` share: faults, and one link.

A fault is played against real sockets, says whether it was survived by raising or not, and returns
how long it took to recover.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client.node import Handler, Node, NodeEvent
from common.link.identity import node_id_of
from common.link.keepalive import KEEPALIVE
from server.grid import LinkGrid
from tests.faults.proxy import Proxy
from tests.linking import Runner

__all__ = ["PATIENCE", "Counted", "Line", "NetworkFault", "linked", "until"]

PATIENCE = 60.0
"""Seconds after which a test that waits for something has failed, on however slow a machine."""

EXTENSIONS = 9
"""Of a round's deadline; the default of plans."""

_POLL = 0.002  # seconds; part of every figure


@dataclass(frozen=True)
class NetworkFault:
    """One way in which networks fail.

    Args:
        name: short.
        injected: what the network does.
        survived: what must come of it.
        since: the instant that the recovery is counted from; it lasts to the next reply, or to the
            next round where whole processes take part.
        bound: most seconds that it should take on a machine with nothing else to do.
        play: does it, in a folder of its own, and returns the seconds; raises AssertionError where
            the fault was not survived.
    """

    name: str
    injected: str
    survived: str
    since: str
    bound: float
    play: Callable[[Path], float]


def until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> float:
    """Wait for a condition; the seconds that took.

    Raises:
        AssertionError: the time is over.
    """
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + patience, f"waited {patience:g} s in vain for {what}"
        time.sleep(_POLL)
    return time.monotonic() - begin


class Counted:
    """A holder's work: sends back what it gets, after a while, and counts.

    Args:
        seconds: that it takes.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.calls = 0
        self.ended = 0.0

    def __call__(self, message: Message) -> Message:
        self.calls += 1
        time.sleep(self.seconds)
        self.ended = time.monotonic()
        return Message(message.content, reply_to=message)


class Asked:
    """One request under way, on a thread.

    Args:
        grid: to ask by.
        name: of the holder.
        numbers: float32 numbers in the request, and in the reply.
        timeout: the round's deadline, in seconds.
    """

    def __init__(self, grid: LinkGrid, name: str, numbers: int, timeout: float) -> None:
        self._vector = np.random.default_rng(0).random(numbers, np.float32)
        content = RecordDict(
            {"arrays": ArrayRecord({"x": Array(self._vector)}), "config": ConfigRecord()}
        )
        self._message = Message(content, node_id_of(name), "train", group_id="1")
        self._grid, self._timeout = grid, timeout
        self._replies: list[Message] = []
        self._error: Exception | None = None
        self.began = time.monotonic()
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._replies = self._grid.send_and_receive([self._message], timeout=self._timeout)
        except Exception as error:
            self._error = error
        self.ended = time.monotonic()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def answered(self) -> float:
        """Wait for the reply, which must be whole; when it came, on the monotonic clock."""
        self._thread.join(self._timeout + PATIENCE)
        assert self.done, "the request never ended"
        if self._error is not None:
            raise self._error
        assert len(self._replies) == 1, "no reply came in time"
        (reply,) = self._replies
        assert not reply.has_error(), reply.error
        assert np.array_equal(reply.content.array_records["arrays"]["x"].numpy(), self._vector)
        return self.ended


@dataclass(frozen=True)
class Line:
    """A coordinator's link and one holder, with a proxy between them.

    Args:
        grid: the coordinator's.
        proxy: the holder's way there.
        work: the holder's.
        holder: its node.
    """

    grid: LinkGrid
    proxy: Proxy
    work: Counted
    holder: Runner

    def begin(self, numbers: int = 1000, timeout: float = PATIENCE) -> Asked:
        """Ask, without waiting."""
        return Asked(self.grid, "a", numbers, timeout)

    def ask(self, numbers: int = 1000, timeout: float = PATIENCE) -> float:
        """Ask, wait for the reply, and return the seconds."""
        asked = self.begin(numbers, timeout)
        return asked.answered() - asked.began


@contextmanager
def linked(
    work: Counted | None = None, *, idle_limit: float | None = None, keepalive: float = KEEPALIVE
) -> Iterator[Line]:
    """A holder that has joined through a proxy and has answered once.

    Args:
        work: the holder's.
        idle_limit: of the proxy.
        keepalive: seconds, at both ends.
    """
    work = work or Counted()
    with ExitStack() as stack:
        grid = stack.enter_context(
            LinkGrid("127.0.0.1:0", keys=None, keepalive=keepalive, deadline_extensions=EXTENSIONS)
        )
        proxy = stack.enter_context(Proxy(("127.0.0.1", grid.port), idle_limit=idle_limit))
        holder = stack.enter_context(joined(proxy.port, work, keepalive=keepalive))
        line = Line(grid, proxy, work, holder)
        seconds, work.seconds = work.seconds, 0.0
        line.ask()
        work.seconds, work.calls = seconds, 0
        yield line


@contextmanager
def joined(
    port: int, work: Handler, host: str = "127.0.0.1", keepalive: float = KEEPALIVE
) -> Iterator[Runner]:
    """A holder, with the back-off that is shipped, until the end of the block."""
    events: SimpleQueue[NodeEvent] = SimpleQueue()
    node = Node(
        f"{host}:{port}", work, keys=None, name="a", on_event=events.put, keepalive=keepalive
    )
    runner = Runner(node, events)
    try:
        yield runner
    finally:
        node.stop(now=True)
        runner.join()
