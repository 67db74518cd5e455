"""The budget's rule in the form that does not grow with runs, against the form that says it."""

from __future__ import annotations

from contextlib import closing, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BudgetExceeded, StorageError
from common.privacy.account import Account
from common.privacy.events import Composition, Event, SubsampledGaussian, Unprotected
from common.privacy.index import Index
from common.privacy.releases import Budget, Entry, Release, Remark

DELTA = 1e-5
MECHANISMS = (SubsampledGaussian(1.0, 8.0, 1), SubsampledGaussian(1.0, 9.0, 1))
BUDGET = Budget(1.0, DELTA)

events = st.builds(lambda mechanism, n: mechanism.times(n), st.sampled_from(MECHANISMS), st.just(2))
runs = st.sampled_from("abc")


def release(name: str, run: str, event: Event) -> Release:
    return Release(name, "clinic", "task", "hub", run, "plan", 1, event)


def reserve(account: Account, number: int, run: str, event: Event) -> None:
    item = release(str(number), run, event)
    account.apply(Entry(number, "reserved", "2026-03-01", str(number), item), f"digest {number}")


class Asked(Account):
    """Tells which total it is asked to afford."""

    total = Composition()

    def affords(self, data_set: str, budget: Budget, total: Composition) -> bool:
        self.total = total
        return super().affords(data_set, budget, total)


@given(st.lists(st.tuples(runs, events), max_size=12), runs, events, st.lists(events, max_size=3))
def test_what_must_fit_is_other_runs_and_this_one_joined_with_its_plan(
    spent: list[tuple[str, Event]], run: str, event: Event, planned: list[Event]
) -> None:
    plan = Composition.of(*planned)
    with closing(Asked()) as account:
        for number, (name, one) in enumerate(spent, start=1):
            reserve(account, number, name, one)
        others = Composition.of(*(one for name, one in spent if name != run))
        this_run = Composition.of(event, *(one for name, one in spent if name == run))
        with suppress(BudgetExceeded):
            account.check(release("new", run, event), BUDGET, plan)
        assert account.total == others + this_run.join(plan)


@pytest.mark.parametrize("who", ["this", "other"])
def test_an_unprotected_release_of_any_run_leaves_no_budget(who: str) -> None:
    with closing(Account()) as account:
        reserve(account, 1, who, Unprotected())
        with pytest.raises(BudgetExceeded, match="infinite"):
            account.check(release("2", "this", MECHANISMS[0]), BUDGET, Composition())


def test_a_thousand_runs_are_added_up_once() -> None:
    """The sum over runs is kept, not made for every request; control: each run is still known."""
    with closing(Account()) as account:
        for number in range(1, 1001):
            reserve(account, number, f"run-{number}", MECHANISMS[0])
        assert account.spent("clinic") == Composition.of(MECHANISMS[0]) * 1000
        assert account.spent("clinic") is account.spent("clinic")
        assert account.spent("clinic", "run-500") == Composition.of(MECHANISMS[0])


class Full(Index):
    """There is no room."""

    def reserve(self, *_: object) -> None:
        raise StorageError("full")


def test_an_entry_that_there_is_no_room_for_counts_not_by_half() -> None:
    with closing(Account()) as account:
        reserve(account, 1, "run", MECHANISMS[0])
        kept = account._index
        account._index = Full()
        with pytest.raises(StorageError):
            reserve(account, 2, "run", MECHANISMS[0])
        account._index.close()
        account._index = kept
        one = Composition.of(MECHANISMS[0])
        assert account.spent("clinic") == account.spent("clinic", "run") == one
        reserve(account, 2, "run", MECHANISMS[0])
        assert account.spent("clinic") == account.spent("clinic", "run") == one * 2


def test_a_request_is_reserved_once_and_committed_once() -> None:
    with closing(Account()) as account:
        reserve(account, 1, "run", MECHANISMS[0])
        with pytest.raises(ValueError, match="is reserved and is reserved again"):
            reserve(account, 1, "run", MECHANISMS[0])
        committed = Entry(2, "committed", "2026-03-01", "1", reply_digest="d")
        account.apply(committed, "digest 2")
        with pytest.raises(ValueError, match="is committed, it cannot be committed"):
            account.apply(committed, "digest 3")
        with pytest.raises(ValueError, match="is committed and is reserved again"):
            reserve(account, 1, "run", MECHANISMS[0])
        assert account.spent("clinic") == Composition.of(MECHANISMS[0])


def test_a_data_set_is_known_by_a_note_alone() -> None:
    with closing(Account()) as account:
        remark = Remark("officer", ("fresh",), "set")
        account.apply(Entry(1, "budget", "2026-03-01", budget=BUDGET, remark=remark), "digest")
        assert account.data_sets() == ["fresh"]
        assert account.spent("fresh") == Composition()
