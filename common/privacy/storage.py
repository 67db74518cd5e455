"""Where entries are kept: one SQLite file, append-only, each row chained to the one before."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from common.errors import StateError
from common.privacy.releases import Entry, chain

__all__ = ["EntryStore", "rolled_back"]

APPLICATION_ID = 0x536F7474
"""``Sott`` in SQLite's header, so that another program's database is not taken for a ledger."""

BUSY_SECONDS = 60.0
"""How long one process waits for another's transaction, which may hold seconds of accounting."""

_SCHEMA = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER entries_never_go BEFORE DELETE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    f"PRAGMA application_id = {APPLICATION_ID}",
)

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
    def open(cls, path: Path | str) -> Self:
        """Open or create the file.

        Args:
            path: of the file, or ``":memory:"``.

        Raises:
            StateError: it cannot be opened, or is something else.
        """
        name = str(path)
        with _sqlite_errors(name):
            connection = sqlite3.connect(
                name, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
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

    def after(self, last: int, digest: str) -> Iterator[tuple[Entry, str]]:
        """Entries after number ``last``, whose digest was ``digest``, each with its own digest.

        Raises:
            StateError: naming the first that the chain does not bear out.
        """
        with _sqlite_errors(self.name):
            rows = self._connection.execute(
                "SELECT number, body, digest FROM entries WHERE number > ? ORDER BY number", (last,)
            )
            for expected, (number, body, stored) in enumerate(rows, start=last + 1):
                if number != expected:
                    raise self.broken(expected, "is missing")
                digest = chain(digest, str(body))
                if digest != stored:
                    raise self.broken(number, "is not what was written")
                yield self._entry(number, body), digest

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
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode = WAL")
    # Our digests cover what entries say; this, the pages that the next ones are put into.
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(" ".join(found.split()))
    connection.execute("BEGIN IMMEDIATE")
    (identity,) = connection.execute("PRAGMA application_id").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if objects and identity != APPLICATION_ID:
        raise StateError(f"{name} is a database but not a ledger; choose another state folder")
    if not objects:  # new, or its maker was killed; whether entries are gone is told by its head
        for statement in _SCHEMA:
            connection.execute(statement)
    connection.execute("COMMIT")


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
    """SQLite's errors as ours; a programming error stays what it is."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.OperationalError as error:
        raise StateError(
            f"the ledger {name} cannot be used ({error}); check that its folder is there and "
            "writable, that the disk is not full and that no other process holds it"
        ) from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # Python decodes what SQLite says of a damaged schema, and the damage is in it.
        raise StateError(f"the ledger {name} is damaged ({error}); {_REMEDY}") from error
