"""What a process remembers of each request and each round, outside its memory.

A holder may answer a million requests, and must know each of them: whether it was charged, whether
its reply has left. That would fill the memory, so it is kept in a database of SQLite's that has no
name: it belongs to one process, begins in a few pages of memory, continues in an unlinked file in
the folder for temporary files (``TMPDIR``), and is gone with the process.

Nothing of it is in the ledger's own file, on purpose. An index or a column there would be a second
place that says which requests were made: outside the chain of digests, so that one line less in it
would make a charged release look like one that never was. Here is only what was folded in from
entries that the chain bears out, by this process, since it opened the ledger.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from common.errors import StorageError
from common.privacy.releases import Release

__all__ = ["Index", "Known"]

_PREPARE = (
    # Small pages, and few of them in memory: 64 KiB for each ledger that is open.
    "PRAGMA page_size = 1024",
    "PRAGMA cache_size = 64",
    # It need not outlive the process, only a statement that fails.
    "PRAGMA journal_mode = MEMORY",
    "PRAGMA synchronous = OFF",
    "CREATE TABLE requests (request_id TEXT PRIMARY KEY, number INTEGER NOT NULL,"
    " digest TEXT NOT NULL, reply_digest TEXT) WITHOUT ROWID",
    "CREATE INDEX unresolved ON requests (number) WHERE reply_digest IS NULL",
    # The last day on which anything was reserved for a round, and how many rounds a day is that of.
    "CREATE TABLE rounds (data_set TEXT, run_id TEXT, round TEXT, day TEXT NOT NULL,"
    " PRIMARY KEY (data_set, run_id, round)) WITHOUT ROWID",
    "CREATE TABLE days (data_set TEXT, day TEXT, rounds INTEGER NOT NULL,"
    " PRIMARY KEY (data_set, day)) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of a request.

    Args:
        request_id: of the request.
        number: of the entry that reserved it, which has its terms.
        digest: of that entry; what the ledger's file has there is believed if it fits this.
        reply_digest: sha256 of the stored reply; None until it is committed.
    """

    request_id: str
    number: int
    digest: str
    reply_digest: str | None

    @property
    def committed(self) -> bool:
        """Whether its reply may have left."""
        return self.reply_digest is not None


class Index:
    """Requests by their ids, and the rounds of each day. Each method does all or nothing."""

    def __init__(self) -> None:
        # The empty name is what makes it private and temporary: https://sqlite.org/inmemorydb.html
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for statement in _PREPARE:
            self._execute(statement)

    def close(self) -> None:
        """Forget everything."""
        self._connection.close()

    def find(self, request_id: str) -> Known | None:
        """What is known of a request; None if it was never made."""
        found = self._execute("SELECT * FROM requests WHERE request_id = ?", request_id)
        return Known(*found[0]) if found else None

    def unresolved(self) -> list[Known]:
        """Requests that are reserved and not committed, oldest first."""
        found = self._execute("SELECT * FROM requests WHERE reply_digest IS NULL ORDER BY number")
        return [Known(*row) for row in found]

    def reserve(self, known: Known, release: Release, day: str) -> None:
        """Take in a request that is new.

        Args:
            known: what is to be remembered of it.
            release: its terms, of which the round is remembered.
            day: of the reservation, UTC, ``YYYY-MM-DD``.
        """
        before = self.last_day(release)
        self._execute("BEGIN")
        try:
            self._execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?)",
                known.request_id,
                known.number,
                known.digest,
                known.reply_digest,
            )
            if before is None or before < day:
                self._move(release, before, day)
            self._execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def commit(self, request_id: str, reply_digest: str) -> None:
        """Note that a known request's reply is stored, and what it is."""
        self._execute(
            "UPDATE requests SET reply_digest = ? WHERE request_id = ?", reply_digest, request_id
        )

    def last_day(self, release: Release) -> str | None:
        """The last day on which anything was reserved for a release's round; None if never."""
        found = self._execute(
            "SELECT day FROM rounds WHERE data_set = ? AND run_id = ? AND round = ?",
            *_round(release),
        )
        return str(found[0][0]) if found else None

    def rounds_since(self, data_set: str, day: str) -> int:
        """How many rounds have their last day on ``day`` or later; each counts once."""
        ((rounds,),) = self._execute(
            "SELECT coalesce(sum(rounds), 0) FROM days WHERE data_set = ? AND day >= ?",
            data_set,
            day,
        )
        return int(rounds)

    def _move(self, release: Release, before: str | None, day: str) -> None:
        """Count a round on a day, and no longer on the day before."""
        self._execute("INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?)", *_round(release), day)
        self._execute(
            "INSERT INTO days VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET rounds = rounds + 1",
            release.data_set,
            day,
        )
        if before is not None:
            self._execute(
                "UPDATE days SET rounds = rounds - 1 WHERE data_set = ? AND day = ?",
                release.data_set,
                before,
            )

    def _execute(self, statement: str, *values: object) -> list[Any]:
        """The rows of a statement; SQLite's errors as ours.

        Raises:
            StorageError: nothing but the disk can be the matter with a file of our own.
        """
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"what the ledger remembers of requests cannot be kept ({error}); check that the "
                "folder for temporary files (TMPDIR) is writable and its disk not full"
            ) from error


def _round(release: Release) -> tuple[str, str, str]:
    # As text: the number may be larger than SQLite's are.
    return release.data_set, release.run_id, str(release.round)
