"""Requests that wait for their replies, by holder.

No I/O and no threads: everything here is called from one event loop. Requests belong to a
holder's identity and not to a connection, so a holder that comes back finds what it still owes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import Error

from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.codec import Incoming, Payload

__all__ = ["Mailroom", "Reply", "Request"]

Reply = Incoming | Error
"""What came back, or why nothing readable did."""


@dataclass(eq=False)
class Request:
    """One message to one holder, and its reply once there is one.

    Args:
        node_id: the holder.
        header: announces the message.
        payload: its content; shared by all requests with the same content.
        reply: None until settled.
        carried_by: the session that has sent it, or is sending it.
    """

    node_id: int
    header: pb.Header
    payload: Payload
    reply: Reply | None = None
    carried_by: object | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        """The message's id."""
        return self.header.message_id


class Mailroom:
    """All requests that are open: not answered and not withdrawn."""

    def __init__(self) -> None:
        self._open: dict[str, Request] = {}
        self._queues: dict[int, dict[str, Request]] = {}

    def post(self, requests: Iterable[Request]) -> None:
        """Open requests.

        Raises:
            LinkError: two open requests would have the same id.
        """
        for request in requests:
            if request.id in self._open:
                raise LinkError(
                    f"request {request.id!r} is waiting for its reply already; give every message "
                    "an id of its own"
                )
            self._open[request.id] = request
            self._queues.setdefault(request.node_id, {})[request.id] = request

    def next_for(self, node_id: int, session: object) -> Request | None:
        """The oldest open request of a holder that ``session`` has not carried."""
        queue = self._queues.get(node_id, {})
        return next((r for r in queue.values() if r.carried_by is not session), None)

    def owed_by(self, node_id: int) -> list[Request]:
        """All open requests of a holder."""
        return list(self._queues.get(node_id, {}).values())

    def is_open(self, request: Request) -> bool:
        """Whether a request still waits for its reply."""
        return self._open.get(request.id) is request

    def find(self, message_id: str, node_id: int) -> Request | None:
        """The open request that a reply from ``node_id`` may answer."""
        return self._queues.get(node_id, {}).get(message_id)

    def is_known(self, message_id: str) -> bool:
        """Whether a request with this id is open, whoever it is for."""
        return message_id in self._open

    def settle(self, request: Request, reply: Reply) -> None:
        """Answer an open request."""
        if self.withdraw(request):
            request.reply = reply

    def withdraw(self, request: Request) -> bool:
        """Close a request, so that no later reply can count; False if it was closed already."""
        if self._open.pop(request.id, None) is None:
            return False
        queue = self._queues[request.node_id]
        del queue[request.id]
        if not queue:
            del self._queues[request.node_id]
        request.done.set()
        return True
