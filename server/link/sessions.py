"""Who is connected: holders and their live streams."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from common.link import federation_pb2 as pb
from common.link.transfer import Assembler
from common.link.versions import NEWEST
from server.link.admission import Admitted

__all__ = ["Holder", "Session"]

_FAREWELL_TIMEOUT = 2.0  # seconds for the last frame to a holder that may be gone


@dataclass(frozen=True)
class Holder:
    """A holder as the coordinator knows it."""

    node_id: int
    name: str
    task: str = ""
    software: str = ""
    address: str = ""


@dataclass(eq=False)
class Session:
    """One live stream.

    Args:
        holder: who it is.
        assembler: holds the one reply that is coming in.
        admitted: with which certificate, if any.
        hello: what it said first: which request it has in part, and which it has in hand.
        version: of the link that is spoken on it.
        control: frames that go before the next message.
        wake: set when there may be something to write.
        ending: set when nothing may be written after ``control``.
        limit: how long the stream may still last; without limit until it is ending.
        asked: requests that were sent on it.
        unwanted: replies and signs of life that came on it and counted for nothing.
    """

    holder: Holder
    assembler: Assembler
    admitted: Admitted = field(default_factory=Admitted)
    hello: pb.Hello = field(default_factory=pb.Hello)
    version: int = NEWEST
    control: deque[pb.CoordinatorFrame] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ending: bool = False
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    asked: int = 0
    unwanted: int = 0

    def say(self, frame: pb.CoordinatorFrame) -> None:
        """Send a control frame soon, unless goodbye was said."""
        if not self.ending:
            self.control.append(frame)
            self.wake.set()

    def end(self, code: pb.Goodbye.Code, reason: str) -> None:
        """Say goodbye and nothing more, not even that to a peer that no longer listens.

        What it still sends of a reply passes by: the rest belongs on the stream that comes after
        this one.
        """
        if not self.ending:
            self.say(pb.CoordinatorFrame(goodbye=pb.Goodbye(code=code, reason=reason)))
            self.ending = True
            self.assembler.discard()
            self.limit.reschedule(asyncio.get_running_loop().time() + _FAREWELL_TIMEOUT)
