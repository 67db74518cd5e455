"""Flower's messages as requests of the mailroom, and closed requests as Flower's messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Error, Message, RecordDict

from common.errors import WireError
from common.flower import COORDINATOR_NODE_ID, incoming_message, stamp
from common.link.codec import Payload, decode, encode, header_for
from server.link.deadline import Deadline
from server.link.mailroom import Request

__all__ = ["UNREADABLE_REPLY", "reply_to", "requests_for"]

UNREADABLE_REPLY = 2
"""Flower's code for a client that failed; the round goes on without this holder."""


def requests_for(
    messages: Iterable[Message],
    on_closed: Callable[[Request], None],
    timeout: float | None,
    extensions: int,
) -> list[Request]:
    """Messages, ready to be posted.

    Args:
        messages: one without an id gets a fresh one.
        on_closed: of each request.
        timeout: of each request in seconds; None for never.
        extensions: of each request; see :class:`server.link.deadline.Deadline`.

    Raises:
        WireError: a message cannot be encoded.
    """
    begin = time.monotonic()
    requests = []
    for message, payload in _encoded(messages):
        deadline = Deadline(begin, timeout, extensions)
        header = header_for(message, payload)
        header.progress_every = deadline.progress_every
        node_id = message.metadata.dst_node_id
        requests.append(Request(node_id, header, payload, deadline, on_closed))
    return requests


def _encoded(messages: Iterable[Message]) -> Iterator[tuple[Message, Payload]]:
    """Messages with an id, and their payloads; a content that several share is encoded once."""
    payloads: dict[int, tuple[RecordDict, Payload]] = {}
    for message in messages:
        content = message.content
        # The content is kept beside its payload so that no other object can get its id().
        if id(content) not in payloads:
            payloads[id(content)] = (content, encode(content))
        stamp(message, message.metadata.message_id or None)
        yield message, payloads[id(content)][1]


def reply_to(request: Request, on_unreadable: Callable[[WireError], None]) -> Message:
    """The reply to a request that has one; it is taken off the request.

    So no reply is in memory twice but the one that is being decoded.

    Args:
        request: answered.
        on_unreadable: called if the reply breaks the contract; an error then takes its place.
    """
    reply, request.reply = request.reply, None
    if reply is None:
        raise ValueError(f"request {request.id!r} has no reply, or it was taken already")
    if isinstance(reply, Error):
        return _error(request, reply)
    try:
        return decode(reply, src_node_id=request.node_id, dst_node_id=COORDINATOR_NODE_ID)
    except WireError as error:
        on_unreadable(error)
        return _error(request, Error(UNREADABLE_REPLY, f"unreadable reply: {error}"))


def _error(request: Request, error: Error) -> Message:
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
