from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WireError
from common.link.signing import Credential
from common.secagg.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Delivery,
    EncryptedShares,
    Roster,
    Survivors,
    Unmasking,
)
from common.secagg.shamir import PRIME
from tests.common.secagg.rounds import session_of

SESSION = session_of(8)


def exactly(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=length, max_size=length)


names = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=20)
keys = exactly(32)
advertisements = st.builds(
    Advertisement,
    session=exactly(16),
    credential=st.builds(Credential, names, keys, st.binary(max_size=40), st.binary(max_size=80)),
    box_key=keys,
    mask_key=keys,
    signature=exactly(64),
)


def by_name(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(names, values, max_size=8)


shares = by_name(st.integers(0, PRIME - 1))
messages = st.one_of(
    advertisements,
    st.lists(advertisements, max_size=8).map(lambda entries: Roster(tuple(entries))),
    st.builds(EncryptedShares, keys, by_name(exactly(82))),
    by_name(exactly(82)).map(Delivery),
    st.frozensets(names, max_size=8).map(Survivors),
    exactly(64).map(Confirmation),
    by_name(exactly(64)).map(Confirmations),
    st.builds(Unmasking, shares, shares),
)


@given(messages)
def test_messages_survive_the_wire(message: Any) -> None:
    assert type(message).from_bytes(message.to_bytes(), SESSION) == message


@given(messages, st.data())
def test_what_was_cut_off_lengthened_or_relabelled_is_refused(
    message: Any, data: st.DataObject
) -> None:
    whole = message.to_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))

    for damaged in (whole[:cut], whole + b"\0", b"?" + whole[1:]):
        with pytest.raises(WireError):
            type(message).from_bytes(damaged, SESSION)


KINDS = [
    Advertisement,
    Roster,
    EncryptedShares,
    Delivery,
    Survivors,
    Confirmation,
    Confirmations,
    Unmasking,
]


@settings(max_examples=300)
@given(st.sampled_from(KINDS), messages.map(lambda message: message.to_bytes()), st.data())
def test_any_bytes_are_a_message_in_its_one_form_or_a_wire_error(
    kind: Any, written: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(written) - 1))
    changed = written[:at] + data.draw(st.binary(max_size=8)) + written[at + 1 :]
    try:
        message = kind.from_bytes(changed, SESSION)
    except WireError:
        return

    assert message.to_bytes() == changed


@pytest.mark.parametrize(
    "message",
    [
        Survivors(frozenset("abcdefghi")),
        Delivery(dict.fromkeys("abcdefghi", bytes(82))),
        Confirmations(dict.fromkeys("abcdefghi", bytes(64))),
    ],
)
def test_a_list_longer_than_the_cohort_is_refused(message: Any) -> None:
    with pytest.raises(WireError, match="says 9 where 8 is the most"):
        type(message).from_bytes(message.to_bytes(), SESSION)


def test_a_share_outside_the_field_is_refused() -> None:
    with pytest.raises(WireError, match="field"):
        Unmasking.from_bytes(Unmasking({"a": PRIME}, {}).to_bytes(), SESSION)


def test_names_twice_or_out_of_order_are_refused() -> None:
    entry = b"\0\1b"
    for wrong in (entry + entry, entry + b"\0\1a"):
        with pytest.raises(WireError, match="order"):
            Survivors.from_bytes(b"S\0\2" + wrong, SESSION)


def test_messages_are_small() -> None:
    """Eight holders with names of 12 bytes; credentials are the certificates' business."""
    peers = [f"hospital-{i:03d}" for i in range(8)]
    sent = EncryptedShares(bytes(32), dict.fromkeys(peers[1:], bytes(82)))
    shared = Unmasking(dict.fromkeys(peers, 1), {})

    assert len(sent.to_bytes()) == 1 + 32 + 2 + 7 * (2 + 12 + 82)
    assert len(shared.to_bytes()) == 1 + 2 + 8 * (2 + 12 + 33) + 2
