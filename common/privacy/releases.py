"""What a ledger holds: releases, budgets, and the entries of the chain.

An *entry* is one line of a holder's account, written once. A release begins with a ``reserved``
entry, which has all its terms and the budget that it was granted under, and ends with a
``committed`` one. Nothing is ever given back: after a crash nobody can know that nothing left.
Two more kinds of entry tell what people did, ``budget`` and ``restored``; a last one, ``holder``,
whose account this is. Every entry's digest covers the digest before it, so no line can be changed,
dropped or slipped in without changing all that follow.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Literal, Self, get_args

from common.errors import ConfigurationError
from common.privacy.events import Event, event_from_dict

__all__ = ["GENESIS", "Budget", "Entry", "Kind", "Release", "Remark", "Reservation", "State"]

State = Literal["reserved", "committed"]
"""Of a release. Both are spent: what is reserved may have left before a crash."""

_Does = Literal["reserved", "committed", "budget", "restored", "holder"]

Kind = Literal["update", "evaluation", "statistics", "selection"]
"""What left: a training update, scores of a model, figures of the data, a choice among models."""

GENESIS = hashlib.sha256(b"sotto ledger 2").hexdigest()
"""What stands for the digest before the first entry."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may ever be released about a data set.

    Args:
        epsilon: in nats, positive.
        delta: δ at which it is measured, in (0, 1); below 1/n for n units.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon < math.inf:
            raise ConfigurationError(
                f"a budget's epsilon must be positive and finite, got {self.epsilon!r}; "
                "for no limit, set no budget"
            )
        if not 0.0 < self.delta < 1.0:
            raise ConfigurationError(
                f"a budget's delta must be above 0 and below 1, got {self.delta!r}"
            )


@dataclass(frozen=True, slots=True)
class Release:
    """Something computed from data that is to leave the holder, and its terms.

    Args:
        request_id: of the request it answers; the same request asked again is the same release.
        data_set: the name that budgets attach to.
        task: what is learned.
        coordinator: who asks.
        run_id: the run it belongs to.
        plan_digest: of the plan of that run.
        round: within the run, from 1.
        event: what the mechanism does, for the accountant.
        kind: what left, in a word.

    Raises:
        ConfigurationError: there is no such kind.
    """

    request_id: str
    data_set: str
    task: str
    coordinator: str
    run_id: str
    plan_digest: str
    round: int
    event: Event
    kind: Kind = "update"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigurationError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return asdict(self) | {"event": self.event.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The release that :meth:`to_dict` wrote."""
        event = values["event"]
        if not isinstance(event, dict):
            raise ConfigurationError(f"a release's event must be a JSON object, got {event!r}")
        _check_types(values, _TERMS)
        return cls(**(dict(values) | {"event": event_from_dict(event)}))  # type: ignore[arg-type]

    def differences(self, other: Release) -> list[str]:
        """Names of the fields in which ``other`` differs."""
        return [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Where a release stands.

    Args:
        release: its terms.
        state: of its last entry.
        reply_digest: sha256 of the stored reply, once committed.
        repeated: whether the request had been made before; it then cost nothing again. A repeated
            request that is ``committed`` is to be answered with the stored reply, one that is
            still ``reserved`` may be computed again: nothing had left.
    """

    release: Release
    state: State
    reply_digest: str = ""
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Remark:
    """What somebody did to the account, other than releasing.

    Args:
        by: who, as the operating system has it; in a ``holder`` entry, the holder's own name.
        data_sets: that it is about; none where it is about the account as a whole.
        sentence: what was done.
    """

    by: str
    data_sets: tuple[str, ...]
    sentence: str

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The remark that ``asdict`` made."""
        data_sets = values["data_sets"]
        if not isinstance(data_sets, list):
            raise ConfigurationError(f"a remark's data_sets must be a list, got {data_sets!r}")
        return cls(**(dict(values) | {"data_sets": tuple(data_sets)}))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the account.

    Args:
        number: from 1, without gaps.
        state: what it does. ``reserved`` and ``committed``: the state that a release enters.
            ``budget``: somebody set a data set's budget. ``restored``: somebody said that this is
            an older copy, so that its data sets' ε is unknown from here on. ``holder``: whose the
            account is, and the certificate that its releases leave under from here on.
        time: UTC, ISO 8601.
        request_id: of the release.
        release: its terms, in a ``reserved`` entry.
        budget: that the release was granted under, or that was set; None for no limit.
        reply_digest: sha256 of the stored reply, in a ``committed`` entry.
        remark: in a ``budget``, a ``restored`` and a ``holder`` entry.
    """

    number: int
    state: _Does
    time: str
    request_id: str = ""
    release: Release | None = None
    budget: Budget | None = None
    reply_digest: str = ""
    remark: Remark | None = None

    def __post_init__(self) -> None:
        if self.state not in get_args(_Does):
            raise ConfigurationError(f"state must be one of {get_args(_Does)}, got {self.state!r}")
        if (self.remark is None) != (self.state in get_args(State)):
            raise ConfigurationError(f"a {self.state} entry must have a remark, others none")

    @staticmethod
    def now() -> str:
        """The present time, as entries have it."""
        return datetime.now(UTC).isoformat(timespec="milliseconds")

    def body(self) -> str:
        """Canonical JSON: what is stored and hashed."""
        values = asdict(self) | {"release": self.release.to_dict() if self.release else None}
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self, previous: str) -> str:
        """Sha256 over the digest before it and its body, in hex."""
        return chain(previous, self.body())

    @classmethod
    def from_body(cls, body: str) -> Self:
        """The entry that :meth:`body` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            values = dict(json.loads(body))
            _check_types(values, _FIELDS)
            release, budget, remark = (values.pop(key) for key in ("release", "budget", "remark"))
            return cls(
                **values,
                release=Release.from_dict(release) if release else None,
                budget=Budget(**budget) if budget else None,
                remark=Remark.from_dict(remark) if remark else None,
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"not an entry: {error}") from None


_FIELDS = {"number": int, "time": str, "request_id": str, "reply_digest": str}
_TERMS = {
    "request_id": str,
    "data_set": str,
    "task": str,
    "coordinator": str,
    "run_id": str,
    "plan_digest": str,
    "round": int,
}


def _check_types(values: Mapping[str, object], types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        if not isinstance(values[name], kind):
            raise ConfigurationError(f"{name} must be {kind.__name__}, got {values[name]!r}")


def chain(previous: str, body: str) -> str:
    """The digest of an entry with this body after the entry with digest ``previous``."""
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()
