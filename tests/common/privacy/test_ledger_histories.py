"""Thousands of histories with crashes at every write: nothing leaves that the account lacks.

The machine plays holders: they reserve, compute, store, commit and send, are asked again, and die
before or after any write to ledger, head or stored answer. Two processes share the files, and one
may do a whole request between any two steps of the other. What the account is checked against is
the machine's own list of what was sent; who checks is a process of its own.

The same machine runs over holders that do it wrongly, and must catch each: see the last test.
``SOTTO_HISTORIES=5000`` makes it play more, and another selection every time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.errors import BudgetExceeded, StateError
from common.privacy.accounting import epsilon
from common.privacy.anchor import Anchor, Head
from common.privacy.events import Composition, Event, SubsampledGaussian
from common.privacy.index import Known
from common.privacy.ledger import Budget, Entry, Kind, Ledger, Release, Reservation
from common.privacy.storage import EntryStore

HISTORIES = int(os.environ.get("SOTTO_HISTORIES", "200"))
STEPS = 30
CRASHES = st.none() | st.integers(0, 16)
# In memory where there is such a folder: a fused crash loses no sectors, so none need be synced.
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None

DELTA = 1e-5
# Without sampling, ε has a closed form: the accountant takes microseconds.
EVENTS: dict[Kind, Event] = {
    "update": SubsampledGaussian(1.0, 10.0, 2),
    "evaluation": SubsampledGaussian(1.0, 9.0, 1),
    "statistics": SubsampledGaussian(1.0, 8.0, 1),
}
# For two and a half updates, and for one and a half: no sum of events meets either exactly.
FULL = Budget(epsilon(Composition.of(SubsampledGaussian(1.0, 10.0, 5)), DELTA), DELTA)
LOW = Budget(epsilon(Composition.of(SubsampledGaussian(1.0, 10.0, 3)), DELTA), DELTA)


class Crash(BaseException):
    """The process is gone: nothing that it would have done next is done."""


@dataclass
class Fuse:
    """Counts a process' writes and its steps, and does something at one of them.

    Args:
        writes: half-writes until the crash; None for never.
        steps: steps until ``meanwhile``.
        meanwhile: what another process does then, and once.
    """

    writes: int | None = None
    steps: int = 0
    meanwhile: Callable[[], None] | None = None

    def write(self) -> None:
        """Before, in the midst of or after a write."""
        if self.writes is not None:
            self.writes -= 1
            if self.writes < 0:
                raise Crash

    def step(self) -> None:
        """Between two steps of a request, where no lock is held."""
        self.steps -= 1
        if self.steps < 0 and (act := self.meanwhile) is not None:
            self.meanwhile = None
            act()


class FusedStore(EntryStore):
    """Dies before or after a transaction reaches the disk."""

    fuse = Fuse()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with super().transaction():
            yield
            self.fuse.write()  # not committed: SQLite rolls back
        self.fuse.write()


class FusedAnchor(Anchor):
    """Dies before, in the middle of, or after writing a head."""

    def __init__(self, path: Path, fuse: Fuse) -> None:
        super().__init__(path)
        self.fuse = fuse

    def write(self, head: Head, *, durable: bool) -> None:
        self.fuse.write()
        try:
            self.fuse.write()
        except Crash:
            with self.path.open("ab") as file:
                file.write(head.line()[:40])
            raise
        super().write(head, durable=durable)
        self.fuse.write()


class Holder:
    """One process on a state folder: what ``client/holder.py`` does, in its order.

    Args:
        folder: of ledger and answers.
        fuse: of all its writes.
        sent: what left, by request; shared by all processes.
    """

    heads: Sequence[str] = ("ledger.head", "elsewhere.head")
    kind = Ledger

    def __init__(self, folder: Path, fuse: Fuse, sent: dict[str, tuple[Release, str]]) -> None:
        self.folder, self.fuse, self.sent = folder, fuse, sent
        store = FusedStore.open(folder / "ledger.sqlite")
        store.fuse = fuse
        anchors = [FusedAnchor(folder / name, fuse) for name in self.heads]
        self.ledger = self.kind.checked(store, anchors)
        self.ledger.resolve(self.stored)

    def ask(self, release: Release, budget: Budget, planned: Composition, coin: int) -> None:
        """One request: answered from the store, refused, or computed and sent."""
        before = self.ledger.find(release.request_id)
        self.fuse.step()
        if before is not None and before.state == "committed":
            reply = self.stored(release.request_id)
            if reply != before.reply_digest:
                raise StateError("another process has stored another answer")
            self.send(release, reply)
        else:
            self.answer(release, budget, planned, sha256(bytes([coin])).hexdigest())

    def answer(self, release: Release, budget: Budget, planned: Composition, reply: str) -> None:
        """Reserve, compute, store, commit, send."""
        self.reserve(release, budget, planned)
        self.store(release.request_id, reply)
        self.commit(release.request_id, reply)
        self.send(release, reply)

    def reserve(self, release: Release, budget: Budget, planned: Composition) -> None:
        self.ledger.reserve(release, budget, planned)
        self.fuse.step()

    def store(self, request_id: str, reply: str) -> None:
        self.fuse.write()
        self.path(request_id).write_text(reply)
        self.fuse.write()
        self.fuse.step()

    def commit(self, request_id: str, reply: str) -> None:
        self.ledger.commit(request_id, reply)
        self.fuse.step()

    def send(self, release: Release, reply: str) -> None:
        # The same request has one reply, ever: two would be two releases at the price of one.
        earlier = self.sent.setdefault(release.request_id, (release, reply))
        assert earlier == (release, reply), "one price, two replies"
        self.fuse.write()
        self.fuse.step()

    def stored(self, request_id: str) -> str | None:
        path = self.path(request_id)
        return path.read_text() if path.exists() else None

    def path(self, request_id: str) -> Path:
        return self.folder / request_id.replace("/", "-")


@st.composite
def requests(draw: st.DrawFn, data_sets: str = "ab") -> Release:
    """One of 24 requests: two data sets, two runs on each, three kinds, two rounds."""
    data_set, run = draw(st.sampled_from(data_sets)), draw(st.sampled_from("12"))
    kind, number = draw(st.sampled_from(sorted(EVENTS))), draw(st.integers(1, 2))
    run_id = f"{data_set}{run}"
    return Release(
        f"{run_id}/{kind}/{number}",
        data_set,
        "task",
        "hub",
        run_id,
        "plan",
        number,
        EVENTS[kind],
        kind,
    )


class Histories(RuleBasedStateMachine):
    """Any order of requests, crashes, restarts and second processes. See the module."""

    make: type[Holder] = Holder

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=SCRATCH))
        self.sent: dict[str, tuple[Release, str]] = {}
        self.entries: list[Entry] = []
        self.granted = dict.fromkeys("ab", Composition())
        self.copies: list[int] = []
        self.budget = FULL
        self.coins = 0
        self.holders = [self.new_process(), self.new_process()]
        self.opened = [holder.ledger for holder in self.holders]
        self.auditor = self.open(self.folder)

    def new_process(self, writes: int | None = None) -> Holder:
        return self.make(self.folder, Fuse(writes), self.sent)

    def open(self, folder: Path) -> Ledger:
        """What a process without fuses would open."""
        anchors = [Anchor(folder / name) for name in self.make.heads]
        return Ledger.checked(EntryStore.open(folder / "ledger.sqlite"), anchors)

    def teardown(self) -> None:
        try:
            self.auditor.verify()
        finally:
            for ledger in [self.auditor, *self.opened]:
                ledger.close()
            shutil.rmtree(self.folder)

    # -- what happens ------------------------------------------------------------------------

    @rule(which=st.integers(0, 1), release=requests(), crash_at=CRASHES)
    def ask(self, which: int, release: Release, crash_at: int | None) -> None:
        """A request, perhaps one that was made before, and perhaps the process' last."""
        self.holders[which].fuse.writes = crash_at
        try:
            self.answer(self.holders[which], release)
        except Crash:
            self.restart(which)
        self.holders[which].fuse.writes = None

    @rule(
        which=st.integers(0, 1),
        first=requests("a"),
        step=st.integers(0, 3),
        second=requests("a"),
        crash_at=CRASHES,
    )
    def ask_both(
        self, which: int, first: Release, step: int, second: Release, crash_at: int | None
    ) -> None:
        """A request, and the other process' whole request between two of its steps."""
        fuse, other = self.holders[which].fuse, self.holders[1 - which]
        fuse.steps, fuse.meanwhile = step, lambda: self.answer(other, second)
        self.ask(which, first, crash_at)
        fuse.meanwhile = None

    def answer(self, holder: Holder, release: Release) -> None:
        self.coins += 1
        planned = Composition.of(release.event) * release.round
        # Refused, or answered by the other process in between: nothing was sent.
        with suppress(BudgetExceeded, StateError):
            holder.ask(release, self.budget, planned, self.coins % 256)

    @rule(which=st.integers(0, 1), dies_at=st.none() | st.integers(0, 8))
    def restart(self, which: int, dies_at: int | None = None) -> None:
        """The process dies without closing, and perhaps the next one does while it opens."""
        try:
            self.holders[which] = self.new_process(dies_at)
        except Crash:
            self.holders[which] = self.new_process()
        self.holders[which].fuse.writes = None
        self.opened.append(self.holders[which].ledger)

    @rule(budget=st.sampled_from([FULL, LOW]))
    def set_budget(self, budget: Budget) -> None:
        self.budget = budget
        self.auditor.note_budget("a", budget, by="officer", sentence="set")

    @rule()
    def copy_the_ledger(self) -> None:
        """As a nightly backup would."""
        number = len(self.auditor.entries())
        (self.folder / f"copy-{number}").mkdir(exist_ok=True)
        for file in self.folder.glob("ledger.sqlite*"):
            shutil.copy(file, self.folder / f"copy-{number}")
        self.copies.append(number)

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 10))
    def put_a_copy_back(self, which: int) -> None:
        """Beside the present heads: it must be refused, unless nothing has happened since."""
        number = self.copies[which % len(self.copies)]
        there = self.folder / "put-back"
        shutil.copytree(self.folder / f"copy-{number}", there)
        for name in self.make.heads:
            shutil.copy(self.folder / name, there)
        try:
            self.open(there).close()
        except StateError:
            assert number < len(self.entries), "the newest ledger is refused"
        else:
            assert number == len(self.entries), "an older copy is taken for the ledger"
        shutil.rmtree(there)

    # -- what must hold ----------------------------------------------------------------------

    @invariant()
    def the_account_holds(self) -> None:
        entries = self.auditor.entries()  # recomputes the chain
        assert entries[: len(self.entries)] == self.entries, "an entry is gone"
        for entry in entries[len(self.entries) :]:
            self.check_grant(entry)
        self.entries = entries
        for data_set in ("a", "b"):
            sent = [release for release, _ in self.sent.values() if release.data_set == data_set]
            left = Composition.of(*(release.event for release in sent))
            assert self.auditor.composition(data_set).covers(left), "something left unaccounted"

    def check_grant(self, entry: Entry) -> None:
        """By the budget in force when it was granted, lowered ones included."""
        if entry.release is not None and entry.budget is not None:
            data_set = entry.release.data_set
            self.granted[data_set] += Composition.of(entry.release.event)
            spent = epsilon(self.granted[data_set], DELTA)
            assert spent <= entry.budget.epsilon, "budget passed"


def play(make: type[Holder], histories: int) -> None:
    """Run the machine over holders of one kind; controls are not shrunk, it is enough they fail."""
    Machine = type("Machine", (Histories,), {"make": make})  # noqa: N806
    control = make is not Holder
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=STEPS,
            derandomize=control or "SOTTO_HISTORIES" not in os.environ,
            deadline=None,
            database=None,
            phases=(Phase.generate,) if control else (Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


def test_no_history_of_crashes_lets_anything_leave_unaccounted() -> None:
    play(Holder, HISTORIES)


# -- negative controls -------------------------------------------------------------------------


class PaysAfterwards(Holder):
    """The ledger is written after sending."""

    def answer(self, release: Release, budget: Budget, planned: Composition, reply: str) -> None:
        self.send(release, reply)
        self.reserve(release, budget, planned)
        self.store(release.request_id, reply)
        self.commit(release.request_id, reply)


class StoresAfterwards(Holder):
    """Reserves in time, and stores and commits after sending: a crash has it answer twice."""

    def answer(self, release: Release, budget: Budget, planned: Composition, reply: str) -> None:
        self.reserve(release, budget, planned)
        self.send(release, reply)
        self.store(release.request_id, reply)
        self.commit(release.request_id, reply)


class LooksThenLeaps(Holder):
    """Checks the budget in one transaction and writes in the next."""

    def reserve(self, release: Release, budget: Budget, planned: Composition) -> None:
        with self.ledger._reading() as account:
            known = account.find(release.request_id)
            if known is None:
                account.check(release, budget, planned)
        self.fuse.step()
        with self.ledger._writing():
            if self.ledger._account.find(release.request_id) is None:
                name = release.request_id
                self.ledger._append("reserved", name, release=release, budget=budget)


class KeepsNoHead(Holder):
    """As ledgers were before they had anchors."""

    heads = ()


class HeadFirst(Holder):
    """Notes the head before the entry is committed: after a crash it refuses a good ledger."""

    class Hasty(Ledger):
        def _append(self, *arguments: Any, **terms: Any) -> None:
            super()._append(*arguments, **terms)
            (row,) = self._store.after(self._head)
            for anchor in self._anchors:
                anchor.write(Head(row[0].number, row[1]), durable=True)

    kind = Hasty


class ForgetsCommits(Holder):
    """Knows of a request that it was charged, and no more that its reply has left."""

    class Forgetful(Ledger):
        def _reservation(self, known: Known) -> Reservation:
            found = super()._reservation(known)
            return replace(found, state="reserved", reply_digest="")

    kind = Forgetful


class ForgetsRequests(Holder):
    """As if a line were missing from an index: what was charged looks as if it never was."""

    class Forgetful(Ledger):
        def _find(self, request_id: str) -> Reservation | None:
            found = super()._find(request_id)
            return None if found is None or found.release.round == 1 else found

    kind = Forgetful


@pytest.mark.parametrize(
    ("wrong", "how"),
    [
        (PaysAfterwards, "something left unaccounted|two replies"),
        (StoresAfterwards, "one price, two replies"),
        (LooksThenLeaps, "budget passed"),
        (KeepsNoHead, "an older copy is taken for the ledger"),
        (HeadFirst, "knows of entry"),
        (ForgetsCommits, "one price, two replies|does not follow"),
        (ForgetsRequests, "one price, two replies|does not follow"),
    ],
)
def test_the_machine_catches_a_holder_that_does_it_wrongly(wrong: type[Holder], how: str) -> None:
    with pytest.raises((AssertionError, StateError), match=how):
        play(wrong, 1000)  # it ends with the first that fails
