"""Limits within the budget: they hold over restarts, against other processes, and past midnight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError, Refusal
from common.privacy.account import Account
from common.privacy.accounting import epsilon
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Ledger, Release
from common.privacy.limits import NO_LIMITS, Limits, refusals
from common.privacy.releases import Entry

DELTA = 1e-5
ROUND = SubsampledGaussian(1.0, 10.0, 1)
ONE = Composition.of(ROUND)
WIDE = Budget(100.0, DELTA)


def release(number: int = 1, run: str = "run", data_set: str = "clinic") -> Release:
    name = f"{data_set}/{run}/{number:06d}"
    return Release(name, data_set, "task", "hub", run, "plan", number, ROUND)


def account(*made: tuple[str, Release]) -> Account:
    """An account of releases, each reserved at a time."""
    found = Account()
    for number, (time, item) in enumerate(made, start=1):
        reserve(found, number, time, item)
    return found


def reserve(found: Account, number: int, time: str, item: Release) -> None:
    found.apply(Entry(number, "reserved", time, item.request_id, item), f"digest {number}")


def codes(found: Account, asked: Release, limits: Limits, now: str) -> list[str]:
    return [each.code for each in refusals(found, asked, WIDE, ONE, limits, now)]


def test_a_day_ends_at_midnight_utc() -> None:
    late = account(("2026-03-01T23:59:59.999+00:00", release(1)))
    one = Limits(rounds_per_day=1)
    assert codes(late, release(2), one, "2026-03-01T23:59:59.999+00:00") == ["rounds"]
    assert codes(late, release(2), one, "2026-03-02T00:00:00.000+00:00") == []


def test_a_clock_that_was_set_back_gives_no_rounds_away() -> None:
    ahead = account(("2026-03-05T12:00:00.000+00:00", release(1)))
    assert codes(ahead, release(2), Limits(rounds_per_day=1), "2026-03-01T08:00") == ["rounds"]


def test_data_sets_have_days_of_their_own() -> None:
    busy = account(("2026-03-01T08:00", release(1)))
    other = release(2, data_set="another")
    assert codes(busy, other, Limits(rounds_per_day=1), "2026-03-01T09:00") == []


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from("ab")), max_size=12), st.integers(1, 5)
)
def test_no_order_of_requests_gets_more_rounds_in_a_day(
    asked: list[tuple[int, str]], most: int
) -> None:
    """Each round of each run counts once, whatever else is released for it."""
    found, granted = Account(), []
    for number, (round_number, run) in enumerate(asked, start=1):
        item = Release(
            f"{number}", "clinic", "task", "hub", run, "plan", round_number, ROUND, "evaluation"
        )
        if not codes(found, item, Limits(rounds_per_day=most), "2026-03-01"):
            reserve(found, number, "2026-03-01T01:00", item)
            granted.append((round_number, run))
        else:
            assert (round_number, run) not in granted, "a round that was answered costs no more"
    assert len(set(granted)) <= most
    # And none is refused that the limit allows.
    assert len(set(granted)) == min(most, len(set(asked)))


def test_a_run_is_judged_by_its_whole_plan_before_its_first_round(tmp_path: Path) -> None:
    limits = Limits(per_run=Budget(epsilon(ONE * 3, DELTA), DELTA))
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(Refusal, match=r"epsilon_per_run"):
            ledger.reserve(release(), WIDE, ONE * 4, limits)
        assert ledger.entries() == []
        for run in ("one", "two"):  # runs do not add up here
            for number in (1, 2, 3):
                ledger.reserve(release(number, run), WIDE, ONE * 3, limits)
        with pytest.raises(Refusal) as refused:
            ledger.reserve(release(4, "two"), WIDE, ONE * 3, limits)
        assert refused.value.code == "run"


def test_a_release_without_a_budget_has_no_price_per_run() -> None:
    found, limits = Account(), Limits(per_run=Budget(1e-6, DELTA), rounds_per_day=1)
    assert not list(refusals(found, release(), None, ONE, limits))


def test_what_the_ledger_would_say_is_what_it_says_and_costs_nothing(tmp_path: Path) -> None:
    tight = Limits(per_run=Budget(0.01, DELTA), rounds_per_day=1)
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.reserve(release(1, "first"), WIDE, ONE)
        terms = (release(1, "second"), Budget(0.02, DELTA), ONE, tight)
        said = ledger.refusals(*terms)
        assert [each.code for each in said] == ["budget", "run", "rounds"]
        with pytest.raises(Refusal) as refused:
            ledger.reserve(*terms)
        assert refused.value.sentence == said[0].sentence
        assert ledger.refusals(release(1, "second"), WIDE, ONE) == []
        assert len(ledger.entries()) == 1


def test_a_repeated_request_is_within_every_limit(tmp_path: Path) -> None:
    one = Limits(rounds_per_day=1)
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.reserve(release(), WIDE, ONE, one)
        assert ledger.refusals(release(), WIDE, ONE, one) == []
        assert ledger.reserve(release(), WIDE, ONE, one).repeated


def test_a_limit_of_no_rounds_is_no_limit_that_anybody_means() -> None:
    with pytest.raises(ConfigurationError, match="at least 1, got 0"):
        Limits(rounds_per_day=0)
    assert Limits(None, None) == NO_LIMITS


# Asks for rounds of its own until it is refused, and says how many it got.
ASKER = f"""
import sys
from common.errors import Refusal
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Ledger, Release
from common.privacy.limits import Limits

path, name, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
step = SubsampledGaussian(1.0, 10.0, 1)
ledger, got = Ledger.open(path), 0
print("ready", flush=True)
sys.stdin.readline()
try:
    for number in range(1, 100):
        item = Release(f"{{name}}/{{number}}", "clinic", "task", "hub", name, "plan", number, step)
        ledger.reserve(item, Budget(100.0, {DELTA}), Composition.of(step), Limits(None, most))
        got += 1
except Refusal as refusal:
    print(refusal.code, got, flush=True)
"""


@pytest.mark.slow
def test_four_processes_at_once_get_no_more_rounds_than_one(tmp_path: Path) -> None:
    path, most = tmp_path / "ledger.sqlite", 23
    Ledger.open(path).close()
    askers = [
        subprocess.Popen(
            [sys.executable, "-c", ASKER, str(path), f"run-{number}", str(most)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for asker in askers:
        assert asker.stdout is not None
        assert asker.stdout.readline() == "ready\n"
    for asker in askers:
        assert asker.stdin is not None
        asker.stdin.write("go\n")
        asker.stdin.flush()
    said = [asker.communicate()[0].split() for asker in askers]
    assert [code for code, _ in said] == ["rounds"] * 4
    assert sum(int(got) for _, got in said) == most
