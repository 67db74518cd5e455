"""The holder's durable account of releases. ε is derived from it, never stored.

What it protects: each *unit* (record or user) of a data set, against an *adversary* who sees
everything that ever left the holder about it and who may have chosen what to ask. Neighbouring
data sets differ by one unit added or removed. See :mod:`common.privacy.events`.

How it holds:

* A price is *reserved* before anything is computed and *committed* before anything is sent. What
  a crash leaves reserved counts as spent; a stored reply resolves it, and so does the same request
  made again. Nothing is ever given back.
* Reserving checks the budget and writes in one transaction that excludes every other process, so
  two of them cannot spend the same budget.
* Entries are only ever added. Triggers forbid the rest to honest programs, and a hash chain shows
  what a dishonest one did.
* An older copy of a ledger is a sound chain too, so the last entry is noted beside it after every
  write (:mod:`common.privacy.anchor`), and the two are compared before every write. A ledger that
  was rolled back is refused until somebody says, in the chain, that its end is lost.
* What it needs of old entries it reads again, and believes only what fits a digest that it knows:
  memory does not grow with the number of entries (:mod:`common.privacy.account`).
* SQLite in WAL mode with ``synchronous=FULL``: an entry that was returned from is on the disk.

One :class:`Ledger` may be used by several threads. It must not be carried across ``fork``: SQLite's
connections cannot be; open another in the child.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from common.errors import ConfigurationError, Refusal, StateError
from common.privacy.account import Account
from common.privacy.accounting import epsilon
from common.privacy.anchor import EMPTY, Anchor, Head, contradiction
from common.privacy.events import Composition
from common.privacy.index import Known
from common.privacy.limits import NO_LIMITS, Limits, refusals
from common.privacy.releases import (
    Budget,
    Entry,
    Kind,
    Release,
    Remark,
    Reservation,
    State,
)
from common.privacy.storage import EntryStore, rolled_back

__all__ = ["Budget", "Entry", "Kind", "Ledger", "Release", "Remark", "Reservation"]

HEAD_SUFFIX = ".head"
"""``ledger.sqlite`` has its head in ``ledger.head``."""


class Ledger:
    """An append-only account in one file. Use :meth:`open`.

    Args:
        store: of the entries.
        anchors: where the last entry is noted; none for a ledger in memory.
    """

    def __init__(self, store: EntryStore, anchors: Sequence[Anchor] = ()) -> None:
        self._store = store
        self._anchors = tuple(anchors)
        self._lock = threading.RLock()
        self._account = Account()
        # The last entry folded in. Its digest stands for all before it: no other entries have it.
        self._head = EMPTY

    @classmethod
    def open(cls, path: Path | str, anchors: Iterable[Path] = ()) -> Self:
        """Open or create a ledger, and check all of it.

        Args:
            path: of the file, or ``":memory:"`` for one that is gone when closed (simulations).
            anchors: files that note the last entry, besides the one next to the ledger; best on
                another disk. A ledger with entries must have been introduced to each
                (:meth:`add_anchor`).

        Raises:
            StateError: the file is damaged, older than a head or not a ledger; the message says
                what to do.
        """
        named = list(anchors)
        _require_there(named)
        places = _anchors(path, named)
        if places and not Path(path).exists():
            # Before a file is made: a new account must not begin where one was.
            _compare(places, EMPTY, lambda _: None, str(path))
        return cls.checked(EntryStore.open(path), places)

    @classmethod
    def checked(cls, store: EntryStore, anchors: Sequence[Anchor] = ()) -> Self:
        """The ledger in a store, once chain and anchors are found in order.

        Anchors that are behind, because of a crash, are brought up to date.

        Raises:
            StateError: they are not in order; the store is closed then.
        """
        ledger = cls(store, anchors)
        try:
            with ledger._writing():
                pass
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def accept_loss(
        cls,
        path: Path | str,
        anchors: Iterable[Path] = (),
        *,
        data_sets: Iterable[str] = (),
        by: str,
    ) -> Self:
        """Open a ledger whose end is lost, and count its data sets' budgets as spent for ever.

        What was released after this copy was made is not known, so ε of every data set in it
        becomes infinite. An entry says so, and the anchors go on from it.

        Args:
            path: of the file; one that is gone begins anew.
            anchors: as for :meth:`open`.
            data_sets: that may have been released from since the copy was made, besides those in
                it.
            by: who says so.

        Raises:
            StateError: the chain itself is broken, or nothing is lost.
            ConfigurationError: no data set is in the copy and none is named.
        """
        places = _anchors(path, anchors)
        ledger = cls(EntryStore.open(path), places)
        try:
            ledger._accept_loss(frozenset(data_sets), by)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file. Nothing is lost by not doing so."""
        with self._lock:
            self._store.close()
            self._account.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- spending ----------------------------------------------------------------------------

    def reserve(
        self,
        release: Release,
        budget: Budget | None,
        planned: Composition,
        limits: Limits = NO_LIMITS,
    ) -> Reservation:
        """Charge a release, before anything is computed for it.

        The same request made again costs nothing again and is returned as ``repeated``.

        Args:
            release: what is asked for.
            budget: of its data set; None where the holder's policy sets no limit.
            planned: what the *whole* run will release by its plan. All of it must fit beside what
                other runs have released, see :meth:`Account.check`.
            limits: within the budget, on one run and on one day.

        Raises:
            BudgetExceeded: it does not fit; nothing was written.
            Refusal: a limit does not allow it, or ``request_id`` was used for a release with other
                terms.
        """
        # A power cut may lose the head of a reservation: nothing has left for it.
        with self._writing(durable_head=False):
            before = self._find(release.request_id)
            if before is not None:
                _check_same(before.release, release)
                return replace(before, repeated=True)
            for refusal in refusals(self._account, release, budget, planned, limits):
                raise refusal
            self._append("reserved", release.request_id, release=release, budget=budget)
            return Reservation(release, "reserved")

    def commit(self, request_id: str, reply_digest: str = "") -> Reservation:
        """Note that the reply is stored and about to leave. Committing twice is the same as once.

        Args:
            request_id: of a reserved release.
            reply_digest: sha256 of the stored reply.

        Raises:
            StateError: it is not reserved, or was committed with another reply.
        """
        with self._writing():
            before = self._find(request_id)
            if before is not None and before.state == "committed":
                if before.reply_digest == reply_digest:
                    return before
                raise StateError(
                    f"request {request_id!r} was committed with another reply; send the stored one"
                )
            if before is None:
                raise StateError(f"request {request_id!r} was never made; reserve it first")
            self._append("committed", request_id, reply_digest=reply_digest)
            return replace(before, state="committed", reply_digest=reply_digest)

    def resolve(self, stored: Callable[[str], str | None]) -> list[Reservation]:
        """Commit what a crash left reserved with its reply already stored.

        A reply is stored whole before the commit, so it was computed under this reservation, and
        it had not left. Committed, it is what the same request gets when it is made again. A
        reservation without a stored reply stays as it is: spent, and free to compute again.

        Args:
            stored: request id → sha256 of the stored reply, or None if there is none.

        Returns:
            Those that were committed.
        """
        resolved = []
        for item in self.reserved():
            name = item.release.request_id
            with self._writing():
                # Another process may have committed its own answer since.
                now = self._account.find(name)
                digest = stored(name) if now and not now.committed else None
                if digest is None:
                    continue
                self._append("committed", name, reply_digest=digest)
            resolved.append(replace(item, state="committed", reply_digest=digest))
        return resolved

    def note_budget(self, data_set: str, budget: Budget, *, by: str, sentence: str) -> None:
        """Write down that somebody set a budget. What holds is what :meth:`reserve` is told.

        Args:
            data_set: whose.
            budget: from now on.
            by: who did it.
            sentence: what was done.
        """
        with self._writing():
            self._append("budget", budget=budget, remark=Remark(by, (data_set,), sentence))

    def note_holder(self, name: str, sentence: str) -> None:
        """Write down whose account this is, unless the last entry about that says the same.

        Args:
            name: of the holder.
            sentence: which keys it shows from now on.
        """
        remark = Remark(name, (), sentence)
        with self._writing():
            if self._account.holder != remark:
                self._append("holder", remark=remark)

    def add_anchor(self, path: Path) -> None:
        """Note the last entry in one more file from now on; its folder must be there.

        Args:
            path: of the file. :meth:`open` must be told of it from then on.

        Raises:
            StateError: there is such a file already, or it cannot be written.
        """
        anchor = Anchor(path)
        with self._writing():
            if path.exists():
                raise StateError(f"{path} is there already; name a file that is not")
            # An anchor of an empty ledger says nothing that a missing one would not.
            anchor.write(self._head, durable=True)
        self._anchors += (anchor,)

    # -- reading -----------------------------------------------------------------------------

    def refusals(
        self,
        release: Release,
        budget: Budget | None,
        planned: Composition,
        limits: Limits = NO_LIMITS,
    ) -> list[Refusal]:
        """Everything for which :meth:`reserve` would refuse; nothing is written."""
        with self._reading() as account:
            before = self._find(release.request_id)
            if before is None:
                return list(refusals(account, release, budget, planned, limits))
            different = before.release.differences(release)
            return [_reused(release, different)] if different else []

    def rounds_since(self, data_set: str, day: str) -> int:
        """How many rounds anything was reserved for on a day (UTC, ``YYYY-MM-DD``) or later."""
        with self._reading() as account:
            return account.rounds_since(data_set, day)

    def find(self, request_id: str) -> Reservation | None:
        """Where a request stands; None if it was never made."""
        with self._reading():
            return self._find(request_id)

    def data_sets(self) -> list[str]:
        """Names of the data sets that any entry is about."""
        with self._reading() as account:
            return account.data_sets()

    def reserved(self, data_set: str | None = None) -> list[Reservation]:
        """Reservations that nothing has resolved, of every data set or of one, oldest first."""
        with self._reading() as account:
            items = [self._reservation(known) for known in account.unresolved()]
        return [item for item in items if data_set in (None, item.release.data_set)]

    def composition(self, data_set: str, *, run_id: str | None = None) -> Composition:
        """Everything reserved or committed on a data set, or by one run on it."""
        with self._reading() as account:
            return account.spent(data_set, run_id)

    def epsilon(self, data_set: str, delta: float) -> float:
        """ε of everything reserved or committed on a data set, at ``delta``."""
        return epsilon(self.composition(data_set), delta)

    def entries(self, data_set: str | None = None) -> list[Entry]:
        """The entries in order, of every data set or of one."""
        with self._lock:
            entries = (entry for entry, _ in self._store.after(EMPTY))
            return list(entries if data_set is None else _about(entries, data_set))

    def verify(self) -> None:
        """Recompute the whole chain from the file, and compare the anchors.

        Raises:
            StateError: naming the first entry that is not as it was written, or the anchor that
                knows of more.
        """
        with self._lock, self._store.transaction(), closing(Account()) as account:
            end = EMPTY
            for entry, digest in self._store.after(EMPTY):
                self._fold(account, entry, digest)
                end = Head(entry.number, digest)
                # What was folded in before is what is there now if its last digest is.
                if end.number == self._head.number and end != self._head:
                    raise self._store.broken(end.number, "or one before it is another than it was")
            if end.number < self._head.number:
                raise self._store.broken(end.number + 1, "is gone")
            self._compare_anchors(end)

    def heads(self) -> list[tuple[Path, Head | None]]:
        """Each anchor's file and what it says."""
        return [(anchor.path, anchor.read()) for anchor in self._anchors]

    # -- inside ------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, *, durable_head: bool = True) -> Iterator[None]:
        """A transaction that no other process can write beside, with all entries folded in."""
        with self._lock:
            with self._store.transaction():
                self._catch_up()
                self._compare_anchors(self._head)
                yield
            # Only now is what was written part of the account: the commit may have failed.
            self._catch_up()
            if self._anchors:
                self._note_head(durable=durable_head)

    def _note_head(self, *, durable: bool = True) -> None:
        """Bring the anchors up to date, under the lock that orders entries: none ever goes back.

        After the entry's own transaction, so that a crash between the two leaves the ledger ahead
        of its head and never behind.
        """
        with self._store.transaction():
            self._catch_up()
            for anchor in self._anchors:
                if anchor.read() != self._head:
                    anchor.write(self._head, durable=durable)

    def _accept_loss(self, data_sets: frozenset[str], by: str) -> None:
        with self._lock, self._store.transaction():
            self._catch_up()
            why = contradiction(self._anchors, self._head, self._store.digest_at)
            if not why:
                raise StateError("the ledger is whole and as new as its head; nothing is lost")
            lost = data_sets.union(self._account.data_sets())
            if not lost:
                raise ConfigurationError(
                    "this copy of the ledger has no data set in it; name those that were released "
                    "from, so that they are not taken for untouched"
                )
            self._append("restored", remark=Remark(by, tuple(sorted(lost)), why))
        self._note_head()

    @contextmanager
    def _reading(self) -> Iterator[Account]:
        with self._lock:
            self._catch_up()
            yield self._account

    def _catch_up(self) -> None:
        """Fold in entries that were added since, by whatever process, checking the chain."""
        for entry, digest in self._store.after(self._head):
            self._fold(self._account, entry, digest)
            self._head = Head(entry.number, digest)

    def _fold(self, account: Account, entry: Entry, digest: str) -> None:
        try:
            account.apply(entry, digest)
        except ValueError as error:
            how = f"does not follow from those before it ({error})"
            raise self._store.broken(entry.number, how) from None

    def _compare_anchors(self, end: Head) -> None:
        _compare(self._anchors, end, self._store.digest_at, self._store.name)

    def _find(self, request_id: str) -> Reservation | None:
        known = self._account.find(request_id)
        return None if known is None else self._reservation(known)

    def _reservation(self, known: Known) -> Reservation:
        """With its terms, read again: they must fit the digest that was noted of them."""
        release = self._store.read(known.number, known.digest).release
        assert release is not None  # an entry with that digest was folded in as a reservation
        state: State = "committed" if known.committed else "reserved"
        return Reservation(release, state, known.reply_digest or "")

    def _append(
        self,
        state: Literal["reserved", "committed", "budget", "restored", "holder"],
        request_id: str = "",
        *,
        release: Release | None = None,
        budget: Budget | None = None,
        reply_digest: str = "",
        remark: Remark | None = None,
    ) -> None:
        entry = Entry(
            self._head.number + 1,
            state,
            Entry.now(),
            request_id,
            release,
            budget,
            reply_digest,
            remark,
        )
        self._store.append(entry, self._head.digest)


def _anchors(path: Path | str, more: Iterable[Path]) -> tuple[Anchor, ...]:
    """The anchor beside the ledger, and others; none of a ledger in memory."""
    if str(path) == ":memory:":
        return ()
    return tuple(map(Anchor, (Path(path).with_suffix(HEAD_SUFFIX), *more)))


def _require_there(named: Iterable[Path]) -> None:
    """A path that was mistyped, or a disk that is not mounted, is no sign of an older copy."""
    for path in named:
        if not path.exists():
            raise StateError(
                f"the anchor {path} is missing or damaged: there is no such file. Check its path, "
                "and that its disk is there; 'sotto ledger anchor FILE' makes a new one"
            )


def _compare(
    anchors: Iterable[Anchor], end: Head, digest_at: Callable[[int], str | None], name: str
) -> None:
    if how := contradiction(anchors, end, digest_at):
        raise rolled_back(name, how)


def _about(entries: Iterable[Entry], data_set: str) -> Iterator[Entry]:
    """Those that are about one data set; what commits a reservation is about what that was."""
    reserved = set()
    for entry in entries:
        if entry.release is not None and entry.release.data_set == data_set:
            reserved.add(entry.request_id)
        about_it = entry.remark is not None and data_set in entry.remark.data_sets
        if about_it or entry.request_id in reserved:
            yield entry


def _check_same(before: Release, now: Release) -> None:
    """Refuse a request id that stands for something else: its price was for other terms."""
    if different := before.differences(now):
        raise _reused(now, different)


def _reused(release: Release, different: list[str]) -> Refusal:
    return Refusal(
        "request",
        f"request {release.request_id!r} was made before with another {', '.join(different)}; "
        "use a new request id",
    )
