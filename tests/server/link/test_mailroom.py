from __future__ import annotations

import pytest
from flwr.app import Error

from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.link.codec import Payload
from server.link.mailroom import Mailroom, Request

ERROR = Error(2, "ValueError")


def request(message_id: str, node_id: int = 5) -> Request:
    return Request(node_id, pb.Header(message_id=message_id), Payload(()))


def test_requests_come_in_order_once_per_session() -> None:
    mailroom, first, second = Mailroom(), request("a"), request("b")
    mailroom.post([first, second])
    session, other = object(), object()

    assert mailroom.next_for(6, session) is None
    for expected in (first, second):
        following = mailroom.next_for(5, session)
        assert following is expected
        following.carried_by = session
    assert mailroom.next_for(5, session) is None
    assert mailroom.next_for(5, other) is first


def test_a_reply_counts_once_and_from_its_holder_only() -> None:
    mailroom, asked = Mailroom(), request("a")
    mailroom.post([asked])

    assert mailroom.find("a", 6) is None
    assert mailroom.is_known("a")
    assert mailroom.find("a", 5) is asked

    mailroom.settle(asked, ERROR)
    mailroom.settle(asked, Error(2, "too late"))
    assert asked.reply is ERROR
    assert asked.closed
    assert mailroom.find("a", 5) is None
    assert not mailroom.is_known("a")


def test_a_withdrawn_request_takes_no_reply() -> None:
    mailroom, asked = Mailroom(), request("a")
    mailroom.post([asked])

    assert mailroom.withdraw(asked)
    assert not mailroom.withdraw(asked)
    mailroom.settle(asked, ERROR)

    assert asked.reply is None
    assert asked.closed
    assert mailroom.next_for(5, object()) is None


def test_ids_are_unique_among_open_requests() -> None:
    mailroom = Mailroom()
    mailroom.post([request("a")])

    with pytest.raises(LinkError, match="an id of its own"):
        mailroom.post([request("a", node_id=6)])
