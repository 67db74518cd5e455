"""What ``sotto ledger`` shows of an account: to people, to programs, to auditors."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TextIO

from common.link.identity import short_fingerprint
from sotto.show import Screen, figure

if TYPE_CHECKING:  # they take a second to import
    from common.plan import TrainingPlan
    from common.privacy.ledger import Entry, Ledger
    from common.privacy.statement import Cost, Line, Statement

__all__ = [
    "Format",
    "account_document",
    "costs_of",
    "export_entries",
    "owner_document",
    "owner_sentence",
    "show_account",
    "verdict",
]


class Format(StrEnum):
    """Of an export."""

    CSV = "csv"
    JSONL = "jsonl"


# -- words and tables ----------------------------------------------------------------------------


def costs_of(
    ledger: Ledger, account: Statement, plans: Mapping[str, TrainingPlan]
) -> dict[str, Cost]:
    """What each plan would cost a data set more: name → cost; none where no δ is known."""
    from common.privacy.statement import cost

    costs = {}
    for name, plan in plans.items():
        own = plan.privacy.delta if plan.privacy.kind in ("dp", "distributed") else None
        delta = account.delta or own
        if delta is not None:
            planned = plan.composition()
            costs[name] = cost(ledger, account.data_set, planned, delta, account.budget)
    return costs


_COLUMNS = ("run", "what", "rounds", "times", "when", "ε alone")
"""Together they fit into 80 columns: an id that is cut names nothing."""


def show_account(screen: Screen, account: Statement, costs: Mapping[str, Cost]) -> None:
    """A data set's account as a table, and in sentences what a table does not hold."""
    if account.lines:
        screen.table(_title(account), _COLUMNS, list(_rows(account.lines)))
    else:
        screen.say(_title(account))
    if account.unresolved:
        screen.say(f"Reserved and not resolved, counted as spent: {', '.join(account.unresolved)}.")
    for entry in account.remarks:
        if entry.remark is not None:
            what = "counted as spent for ever" if entry.state == "restored" else ""
            screen.say(f"{entry.time[:16]} by {entry.remark.by}: {what or entry.remark.sentence}.")
    for name, planned in costs.items():
        screen.say(f"{name} would cost ε={figure(planned.epsilon)} more{_fits(planned)}.")


def _title(account: Statement) -> str:
    if account.delta is None:
        return f"{account.data_set}: no budget is known, so no δ to measure at; give --delta"
    limit = f" of {account.budget.epsilon:g}" if account.budget else ""
    left = f", {figure(account.left)} left" if account.budget else ""
    at = f" (δ={account.delta:g})"
    return f"{account.data_set}: ε {figure(account.spent)}{limit} spent{left}{at}"


def _rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """A row for each line; what a run is called, and for whom it was, stands once."""
    before = ""
    for line in lines:
        run = f"{line.run_id}\n{line.task}\nto {short_fingerprint(line.coordinator)}"
        yield (
            run if run != before else "",
            line.kind,
            _ranges(line.rounds),
            str(line.releases),
            _days(line.first, line.last),
            figure(line.epsilon),
        )
        before = run


def _days(first: str, last: str) -> str:
    return first[:10] if first[:10] == last[:10] else f"{first[:10]}\nto {last[:10]}"


def _ranges(numbers: Sequence[int]) -> str:
    """``1–5, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _fits(planned: Cost) -> str:
    return {True: ", which fits", False: ", which does not fit", None: ""}[planned.fits]


def owner_sentence(entry: Entry) -> str:
    """Whose the ledger is since an entry, and which keys it shows."""
    assert entry.remark is not None  # as in every such entry
    return (
        f"holder {entry.remark.by!r}: {entry.remark.sentence}; since entry {entry.number}, "
        f"{entry.time[:16]}"
    )


def verdict(account: Statement) -> str:
    """A data set's account in one line, as ``verify`` says it."""
    what = sum(line.releases for line in account.lines)
    spent = "no δ is known" if account.delta is None else f"ε={figure(account.spent)}"
    at = "" if account.delta is None else f" at δ={account.delta:g}"
    limit = f" of {account.budget.epsilon:g}" if account.budget else ""
    lost = "; entries before it was restored are lost" if account.restored else ""
    return (
        f"data set {account.data_set!r}: {spent}{limit}{at} from {what} releases, "
        f"{len(account.unresolved)} of them not resolved{lost}"
    )


# -- for machines ------------------------------------------------------------------------------


def account_document(account: Statement, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """A data set's account as JSON; infinite figures are null, with ``unprotected`` true."""
    return {
        "data_set": account.data_set,
        "delta": account.delta,
        "epsilon_spent": _finite(account.spent),
        "epsilon_budget": account.budget.epsilon if account.budget else None,
        "epsilon_left": account.left,
        "unprotected": account.spent == float("inf"),
        "restored": account.restored,
        "releases": [
            asdict(line) | {"rounds": list(line.rounds), "epsilon": _finite(line.epsilon)}
            for line in account.lines
        ],
        "unresolved": list(account.unresolved),
        "remarks": [
            {
                "number": entry.number,
                "time": entry.time,
                "what": entry.state,
                "by": entry.remark.by,
                "sentence": entry.remark.sentence,
                "budget": asdict(entry.budget) if entry.budget else None,
            }
            for entry in account.remarks
            if entry.remark is not None
        ],
        "plans": [
            {"plan": name, "epsilon": _finite(planned.epsilon), "fits": planned.fits}
            for name, planned in costs.items()
        ],
    }


def owner_document(entry: Entry) -> dict[str, Any]:
    """Who the holder is since an entry, as JSON."""
    assert entry.remark is not None  # as in every such entry
    return {
        "number": entry.number,
        "time": entry.time,
        "name": entry.remark.by,
        "sentence": entry.remark.sentence,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None


_FIELDS = (
    "number",
    "time",
    "state",
    "request_id",
    "data_set",
    "kind",
    "task",
    "coordinator",
    "run_id",
    "round",
    "event",
    "budget",
    "by",
    "sentence",
    "body",
    "digest",
)


def export_entries(file: TextIO, entries: Sequence[Entry], form: Format) -> None:
    """Every entry with its digest, so that somebody else can recompute the chain."""
    from common.privacy.releases import GENESIS

    digest, written = GENESIS, csv.DictWriter(file, _FIELDS, lineterminator="\n")
    if form is Format.CSV:
        written.writeheader()
    for entry in entries:
        digest, body = entry.digest(digest), entry.body()
        if form is Format.CSV:
            written.writerow({**_cells(entry), "body": body, "digest": digest})
        else:
            line = {"number": entry.number, "body": body, "digest": digest}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _cells(entry: Entry) -> dict[str, str]:
    """An entry's fields for a table of cells, none of which a spreadsheet would compute."""
    values: dict[str, object] = {
        "number": entry.number,
        "time": entry.time,
        "state": entry.state,
        "request_id": entry.request_id,
    }
    if (release := entry.release) is not None:
        values |= {name: getattr(release, name) for name in _FIELDS if hasattr(release, name)}
        values["event"] = json.dumps(release.event.to_dict())
    if entry.budget is not None:
        values["budget"] = json.dumps(asdict(entry.budget))
    if (remark := entry.remark) is not None:
        values |= {
            "data_set": ", ".join(remark.data_sets),
            "by": remark.by,
            "sentence": remark.sentence,
        }
    return {name: _inert(str(value)) for name, value in values.items()}


def _inert(text: str) -> str:
    """Run ids come from the coordinator: a cell must not begin as a formula does."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
