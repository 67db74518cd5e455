"""The head beside a ledger: whole lines count, the last one wins, and a crash costs one at most."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import StateError
from common.privacy.anchor import Anchor, Head, contradiction

GENESIS, *LATER = (f"{number:064x}" for number in range(10))


@pytest.fixture
def anchor(tmp_path: Path) -> Anchor:
    return Anchor(tmp_path / "ledger.head")


def test_the_last_head_is_the_one(anchor: Anchor) -> None:
    assert anchor.read() is None
    for number, digest in enumerate(LATER, start=1):
        anchor.write(Head(number, digest), durable=number % 2 == 0)
        assert anchor.read() == Head(number, digest)


def test_any_half_of_a_line_is_passed_over_and_written_over(anchor: Anchor) -> None:
    first, second = Head(1, LATER[0]), Head(2, LATER[1])
    for length in range(len(second.line())):
        anchor.path.write_bytes(first.line() + second.line()[:length])
        assert anchor.read() == first
        anchor.write(second, durable=True)
        assert anchor.read() == second
        assert anchor.path.read_bytes() == first.line() + second.line()


@pytest.mark.parametrize("damage", [b"\0", b"x", b"\xff"])
def test_a_damaged_line_counts_as_not_written(anchor: Anchor, damage: bytes) -> None:
    first, second = Head(1, LATER[0]), Head(2, LATER[1])
    anchor.path.write_bytes(first.line() + second.line()[:-1] + damage)
    assert anchor.read() == first
    anchor.path.write_bytes(damage * 500)
    assert anchor.read() is None


def test_only_the_end_is_read(anchor: Anchor) -> None:
    with anchor.path.open("wb") as file:
        for number in range(1, 1001):
            file.write(Head(number, LATER[0]).line())
    assert anchor.read() == Head(1000, LATER[0])


def test_a_head_that_cannot_be_written_says_what_to_check(tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "unplugged" / "ledger.head")
    with pytest.raises(StateError, match=r"nothing is released without it\. Check that its disk"):
        anchor.write(Head(1, LATER[0]), durable=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StateError, match="cannot be used"):
        Anchor(tmp_path / "folder").read()


@pytest.mark.parametrize(
    ("head", "entries", "how"),
    [
        (None, 0, ""),
        (None, 3, "is missing or damaged, and should know of 3 entries"),
        (Head(0, GENESIS), 3, ""),
        (Head(2, LATER[1]), 3, ""),
        (Head(3, LATER[2]), 3, ""),
        (Head(4, LATER[3]), 3, "knows of entry 4 and the ledger ends at entry 3"),
        (Head(2, LATER[2]), 3, "knows another entry 2 than the ledger has"),
    ],
)
def test_a_chain_may_be_ahead_of_its_head_and_nothing_else(
    anchor: Anchor, head: Head | None, entries: int, how: str
) -> None:
    if head is not None:
        anchor.write(head, durable=True)
    digests = [GENESIS, *LATER[:entries]]
    found = contradiction([anchor], Head(entries, digests[-1]), digests.__getitem__)
    assert found == (f"{anchor.path} {how}" if how else "")
