"""What is remembered of requests, against the plain dicts and sets that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StorageError
from common.privacy.events import Unprotected
from common.privacy.index import Index, Known
from common.privacy.releases import Release

DAYS = ("2026-02-27", "2026-02-28", "2026-03-01", "2026-03-02")


def release(name: str, data_set: str = "clinic", run: str = "run", number: int = 1) -> Release:
    return Release(name, data_set, "task", "hub", run, "plan", number, Unprotected())


def known(name: str, number: int = 1) -> Known:
    return Known(name, number, f"digest of {name}", None)


@pytest.fixture
def index() -> Iterator[Index]:
    made = Index()
    yield made
    made.close()


def test_a_request_is_unknown_then_reserved_then_committed(index: Index) -> None:
    assert index.find("a") is None
    index.reserve(known("a"), release("a"), DAYS[0])
    assert index.find("a") == known("a")
    assert index.unresolved() == [known("a")]
    index.commit("a", "reply")
    assert index.find("a") == Known("a", 1, "digest of a", "reply")
    assert index.unresolved() == []


def test_an_empty_reply_digest_is_a_commit(index: Index) -> None:
    index.reserve(known("a"), release("a"), DAYS[0])
    index.commit("a", "")
    found = index.find("a")
    assert found is not None
    assert found.committed


def test_unresolved_requests_come_in_the_order_of_reserving(index: Index) -> None:
    names = ["m", "b", "z", "a"]
    for number, name in enumerate(names, start=1):
        index.reserve(known(name, number), release(name), DAYS[0])
    assert [item.request_id for item in index.unresolved()] == names


# Data set, run, round and day of each reservation, in any order: clocks may be set back.
histories = st.lists(
    st.tuples(
        st.sampled_from("xy"),
        st.sampled_from("ab"),
        st.integers(1, 2) | st.just(2**70),
        st.sampled_from(DAYS),
    ),
    max_size=20,
)


@given(histories)
def test_rounds_since_a_day_are_those_with_anything_on_it_or_later(
    history: list[tuple[str, str, int, str]],
) -> None:
    index = Index()
    for number, (data_set, run, round_number, day) in enumerate(history):
        item = release(str(number), data_set, run, round_number)
        index.reserve(known(str(number), number), item, day)
    for data_set in "xy":
        for since in DAYS:
            rounds = {
                (run, round_number)
                for found, run, round_number, day in history
                if found == data_set and day >= since
            }
            assert index.rounds_since(data_set, since) == len(rounds)
            for run, round_number in rounds:
                last = index.last_day(release("any", data_set, run, round_number))
                assert last is not None
                assert last >= since
    index.close()


def test_what_there_is_no_room_for_changes_nothing_and_can_be_done_later(index: Index) -> None:
    pragma = index._connection.execute
    (pages,) = pragma("PRAGMA page_count").fetchone()
    pragma(f"PRAGMA max_page_count = {pages + 3}")

    def reserve(number: int) -> None:
        item = release(f"{number}", number=number)
        index.reserve(known(f"{number}", number), item, DAYS[0])

    full = 0
    with suppress(StorageError):
        for full in range(1000):
            reserve(full)
    assert 0 < full < 999
    with pytest.raises(StorageError, match=r"full.*TMPDIR"):
        reserve(full)
    assert index.find(f"{full}") is None
    assert index.rounds_since("clinic", DAYS[0]) == len(index.unresolved()) == full
    pragma(f"PRAGMA max_page_count = {pages + 1000}")
    reserve(full)
    assert index.rounds_since("clinic", DAYS[0]) == len(index.unresolved()) == full + 1


def test_it_is_in_no_file_that_has_a_name_and_in_little_memory(index: Index) -> None:
    pragma = index._connection.execute
    assert [row[2] for row in pragma("PRAGMA database_list")] == [""]
    (pages,), (size,) = (
        pragma(f"PRAGMA {name}").fetchone() for name in ("cache_size", "page_size")
    )
    assert pages * size <= 2**16
