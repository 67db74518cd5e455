"""What a holder allows within its budget: the price of one run, and rounds in a day.

Both need the account, so the ledger keeps them as it keeps the budget: in the transaction that
reserves, against every other process and over restarts.

They guard against mistakes and haste, not against malice: a coordinator that wants more out of one
run can call it two. What holds against that is the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.errors import ConfigurationError, Refusal
from common.privacy.account import Account
from common.privacy.accounting import epsilon
from common.privacy.events import Composition
from common.privacy.releases import Budget, Entry, Release

__all__ = ["NO_LIMITS", "Limits", "refusals"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on one run and on one day.

    Args:
        per_run: ε, and the δ at which it is measured, that one run may cost; None for any.
        rounds_per_day: rounds, of whatever runs, that are answered between two midnights UTC;
            None for any number. What is released for the same round on the same day counts once.
    """

    per_run: Budget | None = None
    rounds_per_day: int | None = None

    def __post_init__(self) -> None:
        if self.rounds_per_day is not None and self.rounds_per_day < 1:
            raise ConfigurationError(
                f"rounds_per_day must be at least 1, got {self.rounds_per_day}; None sets no limit"
            )

    def check_run(self, account: Account, release: Release, planned: Composition) -> None:
        """Whether a release, joined with its whole plan, stays within the price of a run.

        Raises:
            Refusal: it does not.
        """
        if self.per_run is None:
            return
        spent = account.spent(release.data_set, release.run_id) + Composition.of(release.event)
        total = spent.join(planned)
        if not account.affords(release.data_set, self.per_run, total):
            raise Refusal(
                "run",
                f"this run would cost ε={epsilon(total, self.per_run.delta):.4g} "
                f"(δ={self.per_run.delta:g}), the holder allows {self.per_run.epsilon:g} a run "
                "(epsilon_per_run); lower the plan's ε",
            )

    def check_day(self, account: Account, release: Release, today: str) -> None:
        """Whether one more round may be answered today.

        Args:
            account: so far.
            release: that is asked for.
            today: UTC, ``YYYY-MM-DD``.

        Raises:
            Refusal: it may not.
        """
        if self.rounds_per_day is None:
            return
        if account.answered_since(release, today):
            return
        if account.rounds_since(release.data_set, today) >= self.rounds_per_day:
            raise Refusal(
                "rounds",
                f"the holder answers {self.rounds_per_day} rounds a day (max_rounds_per_day) and "
                "has answered as many since midnight UTC; go on tomorrow, with fewer rounds a day",
            )


NO_LIMITS = Limits()
"""The budget alone."""


def refusals(
    account: Account,
    release: Release,
    budget: Budget | None,
    planned: Composition,
    limits: Limits,
    now: str | None = None,
) -> Iterator[Refusal]:
    """Everything in the account that speaks against a release.

    Args:
        account: so far.
        release: that is asked for.
        budget: of its data set; None for no limit.
        planned: what its whole run will release.
        limits: besides the budget. A release without privacy has no price that they could bound.
        now: UTC, ISO 8601; the present time if left out.
    """
    today = (now or Entry.now())[:10]
    rules: tuple[Callable[[], None], ...] = (
        lambda: account.check(release, budget, planned),
        lambda: None if budget is None else limits.check_run(account, release, planned),
        lambda: limits.check_day(account, release, today),
    )
    for rule in rules:
        try:
            rule()
        except Refusal as refusal:
            yield refusal
