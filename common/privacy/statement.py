"""What a ledger says, for people: of a data set its releases, ε, what is left, and its audit.

Everything here is derived from the entries; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from common.privacy.accounting import affordable, epsilon
from common.privacy.events import Composition
from common.privacy.ledger import Budget, Entry, Kind, Ledger, Release

__all__ = [
    "Cost",
    "Line",
    "Statement",
    "cost",
    "last_budget",
    "owners",
    "passed_budgets",
    "statement",
]


@dataclass(frozen=True, slots=True)
class Line:
    """The releases of one kind in one run.

    Args:
        run_id: the run.
        task: what was learned.
        coordinator: to whom they went.
        kind: what left.
        rounds: of the run, ascending, each once.
        releases: how many.
        reserved: how many of them nothing has resolved; they count as spent.
        first: time of the first reservation, UTC, ISO 8601.
        last: time of the last one.
        epsilon: of these releases alone; None if no δ is known.
    """

    run_id: str
    task: str
    coordinator: str
    kind: Kind
    rounds: tuple[int, ...]
    releases: int
    reserved: int
    first: str
    last: str
    epsilon: float | None


@dataclass(frozen=True, slots=True)
class Statement:
    """A data set's account at one time.

    Args:
        data_set: its name.
        budget: that holds; None if none is known.
        delta: δ at which every ε here is measured; None if none is known.
        spent: ε of everything reserved or committed; infinite if anything was unprotected or is
            not known any more; None without δ.
        lines: what was released, in order of time.
        unresolved: ids of the requests that are reserved and not committed.
        remarks: entries that tell what people did: budgets set, losses accepted.
    """

    data_set: str
    budget: Budget | None
    delta: float | None
    spent: float | None
    lines: tuple[Line, ...]
    unresolved: tuple[str, ...]
    remarks: tuple[Entry, ...]

    @property
    def left(self) -> float | None:
        """ε that may still be released, at least 0; None without a budget."""
        if self.budget is None or self.spent is None:
            return None
        return max(0.0, self.budget.epsilon - self.spent)

    @property
    def restored(self) -> bool:
        """Whether somebody accepted that entries are lost."""
        return any(entry.state == "restored" for entry in self.remarks)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one more run would cost.

    Args:
        epsilon: how much larger ε would be after it; infinite for a run without privacy.
        fits: whether the budget allows it; None if there is no budget.
    """

    epsilon: float
    fits: bool | None


def statement(
    ledger: Ledger, data_set: str, budget: Budget | None = None, delta: float | None = None
) -> Statement:
    """A data set's account.

    Args:
        ledger: to read.
        data_set: its name.
        budget: that holds.
        delta: at which to measure where there is no budget.
    """
    at = budget.delta if budget else delta
    entries = ledger.entries(data_set)
    unresolved = tuple(item.release.request_id for item in ledger.reserved(data_set))
    return Statement(
        data_set=data_set,
        budget=budget,
        delta=at,
        spent=None if at is None else ledger.epsilon(data_set, at),
        lines=_lines(entries, frozenset(unresolved), at),
        unresolved=unresolved,
        remarks=tuple(entry for entry in entries if entry.remark is not None),
    )


def cost(
    ledger: Ledger, data_set: str, planned: Composition, delta: float, budget: Budget | None
) -> Cost:
    """What a run that has not begun would cost on top of everything so far.

    Args:
        ledger: to read.
        data_set: it would run on.
        planned: what the whole run releases.
        delta: at which ε is measured, the budget's where there is one.
        budget: that holds.
    """
    before = ledger.composition(data_set)
    after = before + planned
    spent = epsilon(before, delta)
    more = float("inf") if after.unprotected else max(0.0, epsilon(after, delta) - spent)
    fits = None if budget is None else affordable(after, budget.epsilon, budget.delta)
    return Cost(more, fits)


def owners(ledger: Ledger) -> tuple[Entry, ...]:
    """The entries that say whose the ledger is and which keys it showed, oldest first."""
    return tuple(entry for entry in ledger.entries() if entry.state == "holder")


def last_budget(ledger: Ledger, data_set: str) -> Budget | None:
    """The budget that the chain knows last: set by somebody, or one that was granted under."""
    known = [entry.budget for entry in ledger.entries(data_set) if entry.budget is not None]
    return known[-1] if known else None


def passed_budgets(ledger: Ledger, data_set: str) -> list[str]:
    """Releases that today's accountant would not have granted, one sentence each.

    Every reservation has the budget that it was granted under. As long as one budget holds, the
    account only grows, so the last reservation under it stands for those before.
    """
    account, sentences = Composition(), []
    grants = [entry for entry in ledger.entries(data_set) if entry.release is not None]
    for budget, group in groupby(grants, key=lambda entry: entry.budget):
        granted = list(group)
        events = (entry.release.event for entry in granted if entry.release is not None)
        account += Composition.of(*events)
        if budget is not None and not affordable(account, budget.epsilon, budget.delta):
            sentences.append(
                f"data set {data_set!r}: by entry {granted[-1].number} its ε was "
                f"{epsilon(account, budget.delta):.4g}, and the budget that it was granted under "
                f"{budget.epsilon:g} (δ={budget.delta:g})"
            )
    return sentences


def _lines(
    entries: Sequence[Entry], unresolved: frozenset[str], delta: float | None
) -> tuple[Line, ...]:
    groups: dict[tuple[str, str, str, Kind], list[tuple[Release, str]]] = {}
    for entry in entries:
        if (release := entry.release) is not None:
            key = (release.run_id, release.task, release.coordinator, release.kind)
            groups.setdefault(key, []).append((release, entry.time))
    return tuple(
        Line(
            *key,
            rounds=tuple(sorted({release.round for release, _ in group})),
            releases=len(group),
            reserved=sum(release.request_id in unresolved for release, _ in group),
            first=group[0][1],
            last=group[-1][1],
            epsilon=None
            if delta is None
            else epsilon(Composition.of(*(release.event for release, _ in group)), delta),
        )
        for key, group in groups.items()
    )
