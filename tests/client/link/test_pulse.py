from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.link.pulse import LEAST_EVERY, Pulse


def told(every: float, steps: list[float], end: float) -> list[float]:
    """When a holder says something that completes steps at some times, up to ``end``."""
    pulse, now, said = Pulse(), 0.0, []
    pulse.begin(every, now)
    steps = sorted(steps)
    while (wait := pulse.wait(now)) is not None and now + wait <= end:
        now += wait
        while steps and steps[0] <= now:
            pulse.step()
            steps.pop(0)
        if pulse.ticked(now):
            said.append(now)
    return said


def test_one_step_is_told_once_at_the_next_tick() -> None:
    assert told(2.0, [0.1, 0.2, 4.5], end=10.0) == [2.0, 6.0]


def test_nothing_is_told_without_a_step() -> None:
    assert told(2.0, [], end=100.0) == []


shares = st.floats(0.01, 0.99)
"""Of an interval; away from the ticks, of which rounding decides."""


@given(st.floats(1.0, 10.0), st.lists(st.integers(0, 100), min_size=1), shares, shares)
def test_what_is_told_does_not_depend_on_when_in_an_interval_a_step_ends(
    every: float, intervals: list[int], early: float, late: float
) -> None:
    first, second = (
        told(every, [every * (interval + share) for interval in intervals], 200.0 * every)
        for share in (early, late)
    )

    assert first == second
    assert len(first) == len(set(intervals)), "however many steps an interval had"
    for now in first:
        assert now / every == pytest.approx(round(now / every)), "only at ticks of the clock"


def test_a_coordinator_that_asks_for_more_gets_a_tick_a_second() -> None:
    steps = [0.001 * number for number in range(10_000)]

    assert told(1e-6, steps, end=10.0) == [LEAST_EVERY * number for number in range(1, 11)]


@pytest.mark.parametrize("every", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_no_sign_is_given_where_none_is_asked_for(every: float) -> None:
    pulse = Pulse()
    pulse.begin(every, 0.0)
    pulse.step()

    assert pulse.wait(0.0) is None
    assert not pulse.ticked(1e9)


def test_ticks_that_were_missed_are_not_made_up_for() -> None:
    pulse = Pulse()
    pulse.begin(1.0, 0.0)
    pulse.step()

    assert pulse.ticked(7.5)
    assert pulse.wait(7.5) == pytest.approx(0.5)


def test_work_that_has_ended_gives_no_sign() -> None:
    pulse = Pulse()
    pulse.begin(1.0, 0.0)
    pulse.step()
    pulse.end()

    assert pulse.wait(5.0) is None
    assert not pulse.ticked(5.0)
