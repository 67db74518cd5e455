from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.link.deadline import PROGRESS_EVERY, Deadline


def end_of(deadline: Deadline, signs: list[float]) -> float:
    """When a request is over whose holder shows progress at ``signs``, looked at when it is due."""
    signs = sorted(signs)
    while True:
        now = deadline.due
        while signs and signs[0] <= now:
            deadline.progressed(signs.pop(0))
        if deadline.passed(now):
            return now


def test_a_silent_holder_has_the_time_of_the_call() -> None:
    deadline = Deadline(100.0, 8.0, extensions=9)

    assert not deadline.passed(107.9)
    assert deadline.passed(108.0)


@pytest.mark.parametrize(
    ("signs", "end"),
    [
        ([105.9], 108.0),  # not within the last quarter
        ([106.0], 110.0),
        ([107.0, 109.0, 110.5], 114.0),
        ([107.0, 110.1], 110.0),  # the second came too late
    ],
)
def test_progress_within_the_last_quarter_gives_another_one(signs: list[float], end: float) -> None:
    assert end_of(Deadline(100.0, 8.0, extensions=9), signs) == end


def test_a_holder_that_claims_progress_for_ever_is_waited_for_so_long_and_no_longer() -> None:
    for extensions in (0, 1, 9):
        signs = [100.0 + 0.5 * number for number in range(1000)]
        assert end_of(Deadline(100.0, 8.0, extensions), signs) == 108.0 + 8.0 * extensions


@given(
    st.floats(0.01, 1e5),
    st.integers(0, 20),
    st.lists(st.floats(0.0, 3e6), max_size=50),
)
def test_the_end_is_never_before_the_time_nor_after_the_cap(
    timeout: float, extensions: int, signs: list[float]
) -> None:
    end = end_of(Deadline(0.0, timeout, extensions), signs)

    assert timeout <= end <= (1 + extensions) * timeout * (1 + 1e-9)


def test_without_a_time_nothing_is_over_and_no_sign_is_asked_for() -> None:
    deadline = Deadline(0.0, None, extensions=9)

    assert deadline.due == math.inf
    assert not deadline.passed(1e12)
    assert deadline.progress_every == 0.0


def test_signs_are_asked_for_often_enough_to_be_seen_and_only_where_they_help() -> None:
    assert Deadline(0.0, 8.0, extensions=1).progress_every == 8.0 * PROGRESS_EVERY < 8.0 / 4 / 2
    assert Deadline(0.0, 8.0, extensions=0).progress_every == 0.0


def test_signs_that_come_more_often_than_asked_do_not_count() -> None:
    deadline = Deadline(0.0, 32.0, extensions=9)  # one a second is asked for

    assert [deadline.heard(now) for now in (1.0, 1.2, 1.6, 1.9, 2.2)] == [
        *(True, False, True, False, True)
    ]
    assert not Deadline(0.0, 32.0).heard(1.0), "none was asked for"


def test_a_coordinator_that_stood_still_reads_what_came_meanwhile() -> None:
    """A machine that was suspended would otherwise drop every reply that waits for it."""
    deadline = Deadline(0.0, 10.0)
    deadline.excuse(3600.0, 3590.0)
    assert not deadline.passed(3600.0)
    assert not deadline.passed(3602.4)
    assert deadline.passed(3602.5), "a quarter of the deadline is enough for that"
    brief = Deadline(0.0, 10.0)
    brief.excuse(11.0, 1.0)
    assert brief.passed(12.0), "and no longer than it stood still"
