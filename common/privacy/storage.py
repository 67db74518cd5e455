"""Where entries are kept: one SQLite file, append-only, each row chained to the one before."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from common.errors import StateError, StorageError
from common.privacy.anchor import Head
from common.privacy.releases import GENESIS, Entry, chain

__all__ = ["EntryStore", "rolled_back"]

APPLICATION_ID = 0x536F7474
"""``Sott`` in SQLite's header, so that another program's database is not taken for a ledger."""

BUSY_SECONDS = 60.0
"""How long one process waits for another's transaction, which may hold seconds of accounting."""

CACHE_KIB = 256
"""Of the file, in memory. SQLite's own 2 MB would fill in the first thousand rounds."""

_SCHEMA = (
    (
        "table",
        "entries",
        "CREATE TABLE entries "
        "(number INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL)",
    ),
    (
        "trigger",
        "entries_never_change",
        "CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    ),
    (
        "trigger",
        "entries_never_go",
        "CREATE TRIGGER entries_never_go BEFORE DELETE ON entries "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    ),
)
"""Type, name and text of everything in a ledger's file, in the order of ``sqlite_schema``."""

_OBSTACLES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_INTERRUPT,
    }
)
"""Primary result codes of what may be otherwise later; https://sqlite.org/rescode.html."""

_REMEDY = (
    "stop this holder and restore the file from a backup that is no older than its last release; "
    "without one, move the file away and run `sotto ledger accept`, which counts every budget of "
    "its data sets as spent"
)


class EntryStore:
    """Rows of (number, body, digest) and SQLite's promises about them. Use :meth:`open`.

    Args:
        connection: to a prepared database, in autocommit mode.
        name: of the file, for messages.
    """

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._connection = connection
        self.name = name

    @classmethod
    def open(cls, path: Path | str, patience: float = BUSY_SECONDS) -> Self:
        """Open or create the file.

        Args:
            path: of the file, or ``":memory:"``.
            patience: seconds to wait for another process' transaction.

        Raises:
            StorageError: it cannot be opened now.
            StateError: it is damaged or something else.
        """
        name = str(path)
        with _sqlite_errors(name):
            connection = sqlite3.connect(
                name, timeout=patience, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(connection, name)
            except BaseException:
                connection.close()
                raise
        return cls(connection, name)

    def close(self) -> None:
        """Close the file. Nothing is lost by not doing so."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and on the disk when it ends. No other process writes meanwhile."""
        with _sqlite_errors(self.name):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def append(self, entry: Entry, previous: str) -> None:
        """Add a row, inside a transaction.

        Args:
            entry: the next one.
            previous: digest of the last one.
        """
        self._connection.execute(
            "INSERT INTO entries (number, body, digest) VALUES (?, ?, ?)",
            (entry.number, entry.body(), entry.digest(previous)),
        )

    def after(self, last: Head) -> Iterator[tuple[Entry, str]]:
        """The entries after one that is known, each with its digest; one is in memory at a time.

        Raises:
            StateError: naming the first that the chain does not bear out; ``last`` itself, too,
                must still be there.
        """
        digest = last.digest
        with _sqlite_errors(self.name):
            if self.digest_at(last.number) != digest:
                raise self.broken(last.number, "is gone, or another than it was")
            rows = self._connection.execute(
                "SELECT number, body, digest FROM entries WHERE number > ? ORDER BY number",
                (last.number,),
            )
            for expected, (number, body, stored) in enumerate(rows, start=last.number + 1):
                if number != expected:
                    raise self.broken(expected, "is missing")
                digest = chain(digest, str(body))
                if digest != stored:
                    raise self.broken(number, "is not what was written")
                yield self._entry(number, body), digest

    def read(self, number: int, digest: str) -> Entry:
        """One entry, if it still is the one that had ``digest``.

        The digest is the caller's own, so nothing else in the file needs to be believed.

        Raises:
            StateError: it is not.
        """
        with _sqlite_errors(self.name):
            row = self._connection.execute(
                "SELECT body FROM entries WHERE number = ?", (number,)
            ).fetchone()
            if row is None or chain(str(self.digest_at(number - 1)), str(row[0])) != digest:
                raise self.broken(number, "is not what was written")
        return self._entry(number, row[0])

    def digest_at(self, number: int) -> str | None:
        """The digest that an entry has in the file; None if there is no such entry."""
        if number == 0:
            return GENESIS
        with _sqlite_errors(self.name):
            row = self._connection.execute(
                "SELECT digest FROM entries WHERE number = ?", (number,)
            ).fetchone()
        return str(row[0]) if row else None

    def broken(self, number: int, how: str) -> StateError:
        """The error that says so, and what to do."""
        return StateError(
            f"the ledger {self.name} cannot be trusted: entry {number} {how}; {_REMEDY}"
        )

    def _entry(self, number: int, body: str) -> Entry:
        try:
            entry = Entry.from_body(body)
        except ValueError as error:
            raise self.broken(number, f"cannot be read ({error})") from None
        if entry.number != number:
            raise self.broken(number, f"says that it is entry {entry.number}")
        return entry


def _prepare(connection: sqlite3.Connection, name: str) -> None:
    """Set the connection up, and the file if it is new."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode = WAL")
    # Our digests cover what entries say; this, the pages that the next ones are put into.
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(" ".join(found.split()))
    connection.execute("BEGIN IMMEDIATE")
    # Nothing in it: new, or its maker was killed; whether entries are gone is told by its head.
    if not _is_ours(connection, name):
        for *_, statement in _SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    _check_version(connection, name)
    connection.execute("COMMIT")


def _is_ours(connection: sqlite3.Connection, name: str) -> bool:
    """Whether a database is a ledger; False if there is nothing in it yet.

    Raises:
        StateError: it is another program's, or a ledger whose own description is damaged, such
            that it might not do what we ask.
    """
    (identity,) = connection.execute("PRAGMA application_id").fetchone()
    found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    ours = found == [(kind, called, "entries", text) for kind, called, text in _SCHEMA]
    if not found or (ours and identity == APPLICATION_ID):
        return bool(found)
    if ours or identity == APPLICATION_ID:
        raise StateError(
            f"the ledger {name} is damaged (its tables are not as they were made); {_REMEDY}"
        )
    raise StateError(f"{name} is a database but not a ledger; choose another state folder")


def _check_version(connection: sqlite3.Connection, name: str) -> None:
    """Notice a header that keeps SQLite from writing to a file that may be written to.

    It does not write to a file of a newer format, which is what a flipped byte makes of ours
    (https://sqlite.org/fileformat.html, section 1.3.3). Of what is read-only it says the same at
    the first write; it can be read.
    """
    try:
        connection.execute("INSERT INTO entries SELECT * FROM entries WHERE false")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY:
            raise
        if os.access(name, os.W_OK):
            raise sqlite3.DatabaseError("its header is of a newer format") from error


def rolled_back(name: str, how: str) -> StateError:
    """The error for a ledger that is not the newest of its copies, and what to do.

    Args:
        name: of the file.
        how: it was noticed.
    """
    return StateError(
        f"the ledger {name} cannot be trusted: {how}. It may be an older copy of itself: stop this "
        "holder and put back the newest copy, with its -wal file if there is one; if there is "
        "none, run `sotto ledger accept`, which counts every budget of its data sets as spent"
    )


@contextmanager
def _sqlite_errors(name: str) -> Iterator[None]:
    """SQLite's errors as ours; a programming error stays what it is.

    Raises:
        StorageError: the disk or a lock did not let us.
        StateError: the file is not what it was.
    """
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # An extended code has the primary one in its low byte. Python decodes what SQLite says of
        # a damaged schema, and the damage is in it.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _OBSTACLES:
            raise StorageError(
                f"the ledger {name} cannot be used ({error}); check that its folder is there and "
                "writable, that the disk is not full and that no other process holds it"
            ) from error
        raise StateError(f"the ledger {name} is damaged ({error}); {_REMEDY}") from error
