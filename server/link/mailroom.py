"""Requests that wait for their replies, by holder.

No I/O and no threads: everything here is called from one event loop. Requests belong to a
holder's identity and not to a connection, so a holder that comes back finds what it still owes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from flwr.app import Error

from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.codec import Incoming, Payload
from common.link.transfer import Beginning
from server.link.deadline import Deadline

__all__ = ["Errand", "Mailroom", "Reply", "Request"]

Reply = Incoming | Error
"""What came back, or why nothing readable did."""


def _ignore(request: Request) -> None:
    """Nobody waits."""


@dataclass(eq=False)
class Request:
    """One message to one holder, and its reply once there is one.

    Args:
        node_id: the holder.
        header: announces the message.
        payload: its content; shared by all requests with the same content.
        deadline: until when a reply counts.
        on_closed: called once, on the event loop, when the request is answered or withdrawn.
        reply: None until settled.
        beginning: of a reply that broke off; the rest may come on another stream.
        closed: answered or withdrawn; no later reply counts.
        carried_by: the session that has sent it, or is sending it.
    """

    node_id: int
    header: pb.Header
    payload: Payload
    deadline: Deadline = field(default_factory=lambda: Deadline(0.0, None))
    on_closed: Callable[[Request], None] = _ignore
    reply: Reply | None = None
    beginning: Beginning | None = None
    closed: bool = False
    carried_by: object | None = None

    @property
    def id(self) -> str:
        """The message's id."""
        return self.header.message_id


@dataclass(frozen=True)
class Errand:
    """What people may know of a request: what for, and what became of it.

    Args:
        id: of the request.
        message_type: of the request.
        state: withdrawn is also one that was answered too late, or not readably.
    """

    id: str
    message_type: str
    state: Literal["open", "answered", "withdrawn"] = "open"


class Mailroom:
    """All requests that are open: not answered and not withdrawn.

    Attributes:
        errands: node id → the last request that was put to this holder, for people.
    """

    def __init__(self) -> None:
        self.errands: dict[int, Errand] = {}
        self._open: dict[str, Request] = {}
        self._queues: dict[int, dict[str, Request]] = {}

    def post(self, requests: Iterable[Request]) -> None:
        """Open requests; all of them, or none.

        Raises:
            LinkError: two open requests would have the same id.
        """
        requests = list(requests)
        posted = {request.id: request for request in requests}
        for request in requests:
            if request.id in self._open or posted[request.id] is not request:
                raise LinkError(
                    f"request {request.id!r} is waiting for its reply already; give every message "
                    "an id of its own"
                )
        self._open |= posted
        for request in requests:
            self._queues.setdefault(request.node_id, {})[request.id] = request
            self.errands[request.node_id] = Errand(request.id, request.header.message_type)

    def next_for(self, node_id: int, session: object, first: str = "") -> Request | None:
        """The oldest open request of a holder that ``session`` has not carried.

        Args:
            node_id: the holder.
            session: that would carry it.
            first: id of a request that goes before older ones.
        """
        waiting = [r for r in self.owed_by(node_id) if r.carried_by is not session]
        return next((r for r in waiting if r.id == first), waiting[0] if waiting else None)

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
        if self.is_open(request):
            request.reply = reply
            self.withdraw(request)

    def withdraw(self, request: Request) -> bool:
        """Close a request, so that no later reply can count; False if it was closed already."""
        if not self.is_open(request):
            return False
        del self._open[request.id]
        queue = self._queues[request.node_id]
        del queue[request.id]
        if not queue:
            del self._queues[request.node_id]
        request.beginning = None
        request.closed = True
        self._conclude(request)
        request.on_closed(request)
        return True

    def _conclude(self, request: Request) -> None:
        errand = self.errands[request.node_id]
        if request.id == errand.id:
            answered = request.reply is not None and not isinstance(request.reply, Error)
            state: Literal["answered", "withdrawn"] = "answered" if answered else "withdrawn"
            self.errands[request.node_id] = replace(errand, state=state)

    # Replies that broke off

    @property
    def held_bytes(self) -> int:
        """Bytes of replies that broke off and may go on."""
        begun = (request.beginning for request in list(self._open.values()))
        return sum(beginning.received for beginning in begun if beginning)

    def keep(self, node_id: int, beginning: Beginning | None) -> None:
        """Keep what a stream has brought of a reply, if that is still wanted.

        It takes the place of what was kept of this holder before: one beginning, and not one for
        each of its requests.
        """
        self.take(node_id)
        if beginning is not None:
            request = self.find(beginning.header.reply_to, node_id)
            if request is not None:
                request.beginning = beginning

    def take(self, node_id: int) -> Beginning | None:
        """Hand out what was kept of a holder's reply, and keep it no longer."""
        for request in self.owed_by(node_id):
            beginning, request.beginning = request.beginning, None
            if beginning is not None:
                return beginning
        return None
