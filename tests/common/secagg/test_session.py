from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.secagg.session import Session
from tests.common.secagg.rounds import session_of

parts = st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=4), st.integers()), max_size=4)
calls = st.tuples(st.text(max_size=4), parts)


@given(calls, calls)
def test_no_two_contexts_are_alike(one: Any, other: Any) -> None:
    session = session_of(4)
    contexts = [session.context(label, *rest) for label, rest in (one, other)]

    assert (contexts[0] == contexts[1]) == (one == other)


def test_what_is_joined_is_not_what_its_parts_spell() -> None:
    session = session_of(4)

    assert session.context("a", "bc") != session.context("a", "b", "c")
    assert session.context("a", "bc") != session.context("ab", "c")
    assert len({session.context("a", part) for part in ("1", b"1", 1)}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "other"},
        {"plan_digest": "other"},
        {"round": 2},
        {"threshold": 31},
        {"cohort": 41},
        {"neighbours": 12, "share_threshold": 12},
        {"run_id": "rundigest", "plan_digest": ""},
    ],
)
def test_every_field_is_in_the_digest(change: dict[str, Any]) -> None:
    session = Session("run", "digest", 1, 30, 40)

    assert replace(session, **change).digest != session.digest


@pytest.mark.parametrize("cohort", range(2, 200))
def test_the_least_threshold_keeps_two_lists_apart(cohort: int) -> None:
    """2t > n + n_C for n_C = ⌈n/3⌉ - 1; one less does not, or may not be asked for."""
    least = max(2, 2 * cohort // 3 + 1)
    corrupted = -(-cohort // 3) - 1

    assert session_of(cohort, least).shares_needed == least
    assert 2 * least > cohort + corrupted
    assert cohort - least <= cohort / 3
    with pytest.raises(ConfigurationError):
        session_of(cohort, least - 1)


def test_a_cohort_that_no_message_could_list() -> None:
    with pytest.raises(ConfigurationError, match="at most 65535"):
        session_of(2**16)
