"""A holder's account: entries folded into compositions, and the budget's rule.

What is in memory grows with the number of data sets, of runs, and of different mechanisms within a
run; a run of ten thousand rounds is one composition of one mechanism. What grows with the number of
requests is kept by :mod:`common.privacy.index`.
"""

from __future__ import annotations

import math

from common.errors import BudgetExceeded
from common.privacy.accounting import affordable, epsilon
from common.privacy.events import Composition, Unprotected
from common.privacy.index import Index, Known
from common.privacy.releases import Budget, Entry, Release, Remark

__all__ = ["Account"]


class Account:
    """What the entries so far add up to. The ledger feeds it each entry once, in order."""

    def __init__(self) -> None:
        self._index = Index()
        # Data set → what was released about it, by all runs, and by each.
        self._totals: dict[str, Composition] = {}
        self._runs: dict[tuple[str, str], Composition] = {}
        self._affordable: dict[tuple[str, Budget], Composition] = {}
        self._restored: set[str] = set()
        self._holder: Remark | None = None

    def close(self) -> None:
        """Forget everything."""
        self._index.close()

    def apply(self, entry: Entry, digest: str) -> None:
        """Take in the next entry. What fails changes nothing.

        Args:
            entry: that follows the last one.
            digest: of it.

        Raises:
            ValueError: it does not follow from those before; the ledger is not one we wrote.
            StorageError: there is no room to remember it.
        """
        if entry.state == "holder":
            self._holder = entry.remark
        elif entry.remark is not None:
            self._take_note(entry.remark, lost=entry.state == "restored")
        elif entry.state == "reserved":
            self._reserve(entry, digest)
        else:
            self._commit(entry)

    @property
    def holder(self) -> Remark | None:
        """Whose the account is, as it was said last; None if it never was."""
        return self._holder

    def find(self, request_id: str) -> Known | None:
        """Where a request stands; None if it was never made."""
        return self._index.find(request_id)

    def unresolved(self) -> list[Known]:
        """Requests that are reserved and not committed, in the order of reserving."""
        return self._index.unresolved()

    def data_sets(self) -> list[str]:
        """Names of the data sets that any entry is about."""
        return sorted(self._totals)

    def spent(self, data_set: str, run_id: str | None = None) -> Composition:
        """Everything reserved or committed on a data set, or by one run on it."""
        if run_id is None:
            return self._totals.get(data_set, Composition())
        return self._runs.get((data_set, run_id), Composition())

    def rounds_since(self, data_set: str, day: str) -> int:
        """How many rounds anything was reserved for on a day or later; each counts once.

        Later days count so that a clock that was set back gives nothing away.

        Args:
            data_set: whose.
            day: UTC, ``YYYY-MM-DD``.
        """
        return self._index.rounds_since(data_set, day)

    def answered_since(self, release: Release, day: str) -> bool:
        """Whether a release's round is among those."""
        last = self._index.last_day(release)
        return last is not None and last >= day

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
        data_set = release.data_set
        if isinstance(release.event, Unprotected):
            raise self._unprotected_asked(release, budget)
        event = Composition.of(release.event)
        this_run = self.spent(data_set, release.run_id) + event
        # With others = spent - this run, others + this_run.join(planned) is just this; and it
        # takes no longer for the thousandth run than for the first.
        total = self.spent(data_set) + event + planned.beyond(this_run)
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

    def _reserve(self, entry: Entry, digest: str) -> None:
        name, release = entry.request_id, entry.release
        if release is None or release.request_id != name:
            raise ValueError(f"{name!r} is reserved without its terms")
        if (before := self.find(name)) is not None:
            raise ValueError(f"{name!r} is {_state(before)} and is reserved again")
        event = Composition.of(release.event)
        total = self.spent(release.data_set) + event
        this_run = self.spent(release.data_set, release.run_id) + event
        # First what may fail, for want of room: half of an entry must not count.
        known = Known(name, entry.number, digest, None)
        self._index.reserve(known, release, entry.time[:10])
        self._totals[release.data_set] = total
        self._runs[release.data_set, release.run_id] = this_run

    def _commit(self, entry: Entry) -> None:
        before = self.find(entry.request_id)
        if before is None or before.committed:
            raise ValueError(f"{entry.request_id!r} is {_state(before)}, it cannot be committed")
        self._index.commit(entry.request_id, entry.reply_digest)

    def _take_note(self, remark: Remark, *, lost: bool) -> None:
        for data_set in remark.data_sets:
            total = self.spent(data_set)
            if lost:  # anything may have been released: no guarantee can be derived any more
                total += Composition.of(Unprotected())
                self._restored.add(data_set)
            self._totals[data_set] = total

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
        if data_set in self._restored:
            why = "the ledger was restored from an older copy, and what that lacks is not known"
        return BudgetExceeded(
            f"data set {data_set!r}: {why}, so its ε is infinite and no budget can hold "
            f"(δ={budget.delta:g}); use another data set, or a plan and a policy without privacy",
            left=0.0,
        )


def _state(known: Known | None) -> str:
    if known is None:
        return "not reserved"
    return "committed" if known.committed else "reserved"


def _up(value: float, places: int) -> str:
    if math.isinf(value):
        return "∞"
    return f"{math.ceil(value * 10**places) / 10**places:.{places}f}"


def _down(value: float, places: int) -> str:
    return f"{math.floor(value * 10**places) / 10**places:.{places}f}"
