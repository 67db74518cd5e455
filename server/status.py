"""What a coordinator is doing, as one frozen picture for people, probes and metrics.

It is put together when somebody asks, on the asker's thread, from what is known anyway: the round
loop only hands over the summary of each round. Everything in it is the coordinator's own knowledge.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

from common.errors import LinkError
from common.link import certificates as certs
from common.link.roster import Roster
from common.link.traffic import Traffic

if TYPE_CHECKING:  # they need torch and Flower, which whoever only asks need not wait for
    from common.plan import TrainingPlan
    from server.link.mailroom import Errand
    from server.link.sessions import Holder
    from server.summaries import RoundSummary

__all__ = [
    "KINDS_OF_MISSES",
    "HolderState",
    "HolderStatus",
    "Phase",
    "RoundStatus",
    "Status",
    "Watch",
    "Watched",
    "kind_of_miss",
]

Phase = Literal["waiting", "asking", "aggregating", "evaluating", "finished", "stopping"]
HolderState = Literal["working", "answered", "connected", "away", "never_joined", "revoked"]

RECENT = 10
"""Rounds that a status speaks of one by one."""

KINDS_OF_MISSES = ("away", "silent", "declined", "failed", "rejected", "other")
"""Classes of the reasons in a summary, for metrics: a reason itself may name rounds and figures."""

_BEGINNINGS = {
    "away": "away",
    "no reply": "silent",
    "silent": "silent",
    "declined": "declined",
    "failed": "failed",
    "reply rejected": "rejected",
    "evaluation rejected": "rejected",
}


def kind_of_miss(reason: str) -> str:
    """The class of a reason why a holder missed a round.

    >>> kind_of_miss("declined: budget: ...")
    'declined'
    """
    found = (kind for words, kind in _BEGINNINGS.items() if reason.startswith(words))
    return next(found, "other")


@dataclass(frozen=True)
class HolderStatus:
    """A holder, as the coordinator sees it.

    Args:
        name: in its certificate.
        state: ``working`` on a request; ``answered`` what it was asked in this round; ``connected``
            and asked nothing; ``away`` and here before; ``never_joined`` since the coordinator
            was started, though on the roster; ``revoked``.
        since: when it left, in seconds since 1970; None where it is not away.
        address: that it comes from, while it is connected.
        software: that it says it runs.
        missed_in_a_row: rounds up to the last one that it missed.
        last_reason: why it missed the last of them.
        enrolled: whether it is on the roster.
    """

    name: str
    state: HolderState
    since: float | None = None
    address: str = ""
    software: str = ""
    missed_in_a_row: int = 0
    last_reason: str = ""
    enrolled: bool = False


@dataclass(frozen=True)
class RoundStatus:
    """A round that is over.

    Args:
        round: 1-based.
        seconds: wall time.
        accepted: updates that count.
        missed: holder → reason.
        lost: why it gave nothing; empty if it did not.
        phases: phase → seconds.
    """

    round: int
    seconds: float
    accepted: int
    missed: Mapping[str, str] = field(default_factory=dict)
    lost: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """A coordinator at one moment.

    Args:
        run: id of the run.
        task: its name.
        plan: digest of the plan.
        listen: address that holders use.
        software: name and version.
        pid: of the process.
        started: the process, in seconds since 1970.
        uptime_seconds: since then.
        phase: ``waiting`` for enough holders; ``asking`` for updates; ``aggregating``, with the
            checkpoint; ``evaluating``; ``finished``; ``stopping``.
        round: that is on; the last one when the run is over.
        rounds: of the plan.
        round_seconds: since the last round was over, or since the start.
        min_holders: updates that a round needs.
        recent: the last rounds, oldest first.
        holders: by name.
        traffic: of the link, since the start.
        reconnections: of holders that had joined before, since the start.
    """

    run: str
    task: str
    plan: str
    listen: str
    software: str
    pid: int
    started: float
    uptime_seconds: float
    phase: Phase
    round: int
    rounds: int
    round_seconds: float
    min_holders: int
    recent: Sequence[RoundStatus]
    holders: Sequence[HolderStatus]
    traffic: Traffic
    reconnections: int

    def document(self) -> dict[str, Any]:
        """As JSON; times are ISO 8601."""
        written = asdict(self)
        written["started"] = _iso(self.started)
        for holder in written["holders"]:
            holder["since"] = None if holder["since"] is None else _iso(holder["since"])
        return written

    def counted(self) -> dict[HolderState, int]:
        """State → how many holders are in it."""
        states: tuple[HolderState, ...] = HolderState.__args__  # type: ignore[attr-defined]
        return {state: sum(h.state == state for h in self.holders) for state in states}


class Watched(Protocol):
    """What is looked at of a Grid over the link; every name may be read on any thread."""

    @property
    def holders(self) -> Sequence[Holder]:
        """Who is connected."""
        ...

    @property
    def left(self) -> Mapping[str, float]:
        """When those who are not connected now left."""
        ...

    @property
    def errands(self) -> Mapping[str, Errand]:
        """What each holder was asked last."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Counts since the start."""
        ...

    @property
    def draining(self) -> bool:
        """Whether it has begun to stop."""
        ...


class Watch:
    """Watches one run on one Grid.

    Args:
        grid: over the link.
        plan: of the run.
        run: its id.
        listen: address that holders use.
        roster: who may join; None where there are no certificates.
        software: name and version.
        history: rounds before this process was started.
        done: rounds that are done already.
    """

    def __init__(
        self,
        grid: Watched,
        plan: TrainingPlan,
        run: str,
        listen: str,
        *,
        roster: Roster | None = None,
        software: str = "sotto",
        history: Iterable[RoundSummary] = (),
        done: int = 0,
    ) -> None:
        self._grid, self._plan, self._run, self._listen = grid, plan, run, listen
        self._roster, self._software = roster, software
        self._started, self._begin = time.time(), time.monotonic()
        self._lock = threading.Lock()
        self._recent = deque(history, RECENT)
        self._done = done
        self._since = self._begin
        self._old: frozenset[str] = frozenset()
        self._finished = False

    def note(self, summary: RoundSummary) -> None:
        """A round is over; called with its summary."""
        old = frozenset(e.id for e in self._grid.errands.values() if e.state != "open")
        with self._lock:
            self._recent.append(summary)
            self._done, self._old, self._since = summary.round, old, time.monotonic()

    def finish(self) -> None:
        """The run is over."""
        self._finished = True

    def status(self) -> Status:
        """What there is to see now."""
        with self._lock:
            recent, done, old, since = tuple(self._recent), self._done, self._old, self._since
        now = time.monotonic()
        connected = {holder.name: holder for holder in self._grid.holders}
        errands = {n: e for n, e in self._grid.errands.items() if e.id not in old}
        return Status(
            run=self._run,
            task=self._plan.task,
            plan=self._plan.digest,
            listen=self._listen,
            software=self._software,
            pid=os.getpid(),
            started=self._started,
            uptime_seconds=now - self._begin,
            phase=self._phase(len(connected), errands.values()),
            round=min(done + 1, self._plan.rounds),
            rounds=self._plan.rounds,
            round_seconds=now - since,
            min_holders=self._plan.min_holders,
            recent=tuple(map(_round_status, recent)),
            holders=self._holders(connected, errands, recent),
            traffic=(traffic := self._grid.traffic),
            reconnections=max(0, traffic.connections - len({*connected, *self._grid.left})),
        )

    def _phase(self, connected: int, errands: Iterable[Errand]) -> Phase:
        """What goes on, from what is open: the round loop need not say."""
        if self._finished:
            return "finished"
        if self._grid.draining:
            return "stopping"
        waits_for = {errand.message_type for errand in errands if errand.state == "open"}
        if "evaluate" in waits_for:
            return "evaluating"
        if waits_for:
            return "asking"
        return "waiting" if connected < self._plan.min_holders else "aggregating"

    def _holders(
        self,
        connected: Mapping[str, Holder],
        errands: Mapping[str, Errand],
        recent: Sequence[RoundSummary],
    ) -> tuple[HolderStatus, ...]:
        approved, revoked = self._names()
        left = self._grid.left
        missed = _missed_in_a_row(recent)
        names = sorted({*connected, *left, *approved, *revoked})

        def state(name: str) -> HolderState:
            if name in revoked:
                return "revoked"
            if name not in connected:
                return "away" if name in left else "never_joined"
            errand = errands.get(name)
            if errand is None or errand.state == "withdrawn":
                return "connected"
            return "working" if errand.state == "open" else "answered"

        return tuple(
            HolderStatus(
                name,
                state(name),
                left.get(name) if name not in connected else None,
                connected[name].address if name in connected else "",
                connected[name].software if name in connected else "",
                *missed.get(name, (0, "")),
                enrolled=name in approved,
            )
            for name in names
        )

    def _names(self) -> tuple[set[str], set[str]]:
        """Who may join, and who may not any more."""
        if self._roster is None:
            return set(), set()
        try:
            approved = set(map(certs.common_name, self._roster.approved()))
            revoked = set(map(certs.common_name, self._roster.revoked()))
        except (LinkError, OSError):  # a file that is being replaced, or was damaged meanwhile
            return set(), set()
        return approved, revoked - approved


def _round_status(summary: RoundSummary) -> RoundStatus:
    return RoundStatus(
        summary.round,
        summary.seconds,
        len(summary.accepted),
        dict(summary.missed),
        summary.lost,
        dict(summary.phases),
    )


def _missed_in_a_row(recent: Sequence[RoundSummary]) -> dict[str, tuple[int, str]]:
    """Name → rounds in a row up to the last one, and the last reason."""
    last = recent[-1] if recent else None
    if last is None:
        return {}
    reasons = {name: why for summary in recent for name, why in summary.missed.items()}
    return {name: (count, reasons.get(name, "")) for name, count in last.missed_in_a_row.items()}


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
