"""A holder's account in memory: entries folded into compositions, and the budget's rule."""

from __future__ import annotations

import math
from dataclasses import replace

from common.errors import BudgetExceeded
from common.privacy.accounting import affordable, epsilon
from common.privacy.events import Composition, Unprotected
from common.privacy.releases import Budget, Entry, Release, Remark, Reservation

__all__ = ["Account"]

_RESTORED = "(restored)"
"""Stands among a data set's runs for what an older copy of the ledger does not know."""


class Account:
    """What the entries so far add up to. The ledger feeds it each entry once, in order."""

    def __init__(self) -> None:
        self._reservations: dict[str, Reservation] = {}
        # Data set → run → what that run released.
        self._spent: dict[str, dict[str, Composition]] = {}
        self._affordable: dict[tuple[str, Budget], Composition] = {}
        # Data set → day, YYYY-MM-DD in UTC → the rounds of runs that anything was released for.
        self._days: dict[str, dict[str, set[tuple[str, int]]]] = {}
        self._holder: Remark | None = None

    def apply(self, entry: Entry) -> None:
        """Take in the next entry.

        Raises:
            ValueError: it does not follow from those before; the ledger is not one we wrote.
        """
        if entry.state == "holder":
            self._holder = entry.remark
            return
        if entry.remark is not None:
            self._take_note(entry.remark, lost=entry.state == "restored")
            return
        before = self._reservations.get(entry.request_id)
        if entry.state == "reserved":
            self._reserve(entry, before)
            return
        if before is None or before.state != "reserved":
            state = before.state if before else "not reserved"
            raise ValueError(f"{entry.request_id!r} is {state}, it cannot become {entry.state}")
        self._reservations[entry.request_id] = replace(
            before, state="committed", reply_digest=entry.reply_digest
        )

    @property
    def holder(self) -> Remark | None:
        """Whose the account is, as it was said last; None if it never was."""
        return self._holder

    def find(self, request_id: str) -> Reservation | None:
        """Where a request stands; None if it was never made."""
        return self._reservations.get(request_id)

    def reservations(self) -> list[Reservation]:
        """Every release, in the order of reserving."""
        return list(self._reservations.values())

    def data_sets(self) -> list[str]:
        """Names of the data sets that any entry is about."""
        return sorted(self._spent)

    def spent(self, data_set: str, run_id: str | None = None) -> Composition:
        """Everything reserved or committed on a data set, or by one run on it."""
        runs = self._spent.get(data_set, {})
        return Composition.sum(runs.values()) if run_id is None else runs.get(run_id, Composition())

    def rounds_since(self, data_set: str, day: str) -> set[tuple[str, int]]:
        """Run and number of the rounds that anything was reserved for on a day or later.

        Later days count so that a clock that was set back gives nothing away.

        Args:
            data_set: whose.
            day: UTC, ``YYYY-MM-DD``.
        """
        days = self._days.get(data_set, {})
        return set().union(*(rounds for found, rounds in days.items() if found >= day))

    def check(self, release: Release, budget: Budget | None, planned: Composition) -> None:
        """Whether a release fits the budget together with the rest of its run.

        What must fit is: everything of *other* runs, and of this run whatever it has released
        with this release, joined with what its whole plan will release. So a run that would pass
        the budget is refused before its first step, and one that departs from its plan is held to
        what it really does. Other runs count with what they have released, not with their plans:
        a budget is nobody's until it is spent.

        Raises:
            BudgetExceeded: it does not fit, or no budget can hold.
        """
        if budget is None:
            return
        data_set, run_id = release.data_set, release.run_id
        if isinstance(release.event, Unprotected):
            raise self._unprotected_asked(release, budget)
        runs = self._spent.get(data_set, {})
        others = Composition.sum(spent for run, spent in runs.items() if run != run_id)
        this_run = runs.get(run_id, Composition()) + Composition.of(release.event)
        total = others + this_run.join(planned)
        if not self.affords(data_set, budget, total):
            raise self._exceeded(release, budget, total)

    def affords(self, data_set: str, budget: Budget, total: Composition) -> bool:
        """Whether ``total`` costs at most ``budget``.

        ε of a part is at most ε of the whole. Rounds of a run within its plan ask about the same
        total each time, so only the first needs the accountant; the others take microseconds.
        """
        known = self._affordable.get((data_set, budget))
        if known is not None and known.covers(total):
            return True
        if not affordable(total, budget.epsilon, budget.delta):
            return False
        self._affordable[data_set, budget] = total
        return True

    def _reserve(self, entry: Entry, before: Reservation | None) -> None:
        if entry.release is None or entry.release.request_id != entry.request_id:
            raise ValueError(f"{entry.request_id!r} is reserved without its terms")
        if before is not None:
            raise ValueError(f"{entry.request_id!r} is {before.state} and is reserved again")
        release = entry.release
        self._reservations[entry.request_id] = Reservation(release, "reserved")
        runs = self._spent.setdefault(release.data_set, {})
        spent = runs.get(release.run_id, Composition())
        runs[release.run_id] = spent + Composition.of(release.event)
        days = self._days.setdefault(release.data_set, {})
        days.setdefault(entry.time[:10], set()).add((release.run_id, release.round))

    def _take_note(self, remark: Remark, *, lost: bool) -> None:
        for data_set in remark.data_sets:
            runs = self._spent.setdefault(data_set, {})
            if lost:  # anything may have been released: no guarantee can be derived any more
                runs[_RESTORED] = Composition.of(Unprotected())

    # -- sentences ---------------------------------------------------------------------------

    def _left(self, data_set: str, budget: Budget) -> float:
        return max(0.0, budget.epsilon - epsilon(self.spent(data_set), budget.delta))

    def _unprotected_asked(self, release: Release, budget: Budget) -> BudgetExceeded:
        return BudgetExceeded(
            f"data set {release.data_set!r} has a budget of ε={budget.epsilon:g} "
            f"(δ={budget.delta:g}) and this request has no privacy guarantee, which costs ε=∞; "
            "give the plan an epsilon",
            left=self._left(release.data_set, budget),
        )

    def _exceeded(self, release: Release, budget: Budget, total: Composition) -> BudgetExceeded:
        data_set = release.data_set
        spent = self.spent(data_set)
        if spent.unprotected:
            return self._infinite(data_set, budget)
        before = epsilon(spent, budget.delta)
        left = max(0.0, budget.epsilon - before)
        needs = epsilon(total, budget.delta) - before
        # Rounded so that the sentence never reads as if what is left were enough.
        places = max(2, 2 - math.floor(math.log10(budget.epsilon)))
        return BudgetExceeded(
            f"data set {data_set!r}: this run needs ε={_up(needs, places)} more, "
            f"{_down(left, places)} of {budget.epsilon:.{places}f} is left "
            f"(δ={budget.delta:g}); lower the plan's ε or raise the budget",
            left=left,
        )

    def _infinite(self, data_set: str, budget: Budget) -> BudgetExceeded:
        why = "something was released from it without a privacy guarantee"
        if _RESTORED in self._spent[data_set]:
            why = "the ledger was restored from an older copy, and what that lacks is not known"
        return BudgetExceeded(
            f"data set {data_set!r}: {why}, so its ε is infinite and no budget can hold "
            f"(δ={budget.delta:g}); use another data set, or a plan and a policy without privacy",
            left=0.0,
        )


def _up(value: float, places: int) -> str:
    if math.isinf(value):
        return "∞"
    return f"{math.ceil(value * 10**places) / 10**places:.{places}f}"


def _down(value: float, places: int) -> str:
    return f"{math.floor(value * 10**places) / 10**places:.{places}f}"
