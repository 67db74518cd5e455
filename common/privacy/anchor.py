"""How far a ledger had come, written down beside it, so that an older copy of it is noticed.

A chain of digests shows what was changed in it and cannot show that its end was taken off: an older
copy of a ledger is a sound ledger. So the number and the digest of the last entry, the *head*, go
into a small file as well, after every entry. A ledger that is behind its head, or has another
entry there, is not the one that the head was written for.

A head may be behind its ledger: a crash fell between the two writes. That is harmless and is made
up for at the next opening. What nobody can notice is that the ledger and all its heads were put
back together; an anchor on another disk makes that harder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from common.durable import sync_folder
from common.errors import StorageError
from common.privacy.releases import GENESIS

__all__ = ["EMPTY", "Anchor", "Head", "contradiction"]

_NUMBER, _DIGEST = 15, 64
_LINE = _NUMBER + 1 + _DIGEST + 1
_TAIL = 64
"""Lines that are read, from the end."""


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a ledger at some time.

    Args:
        number: of the last entry; 0 for an empty ledger.
        digest: of that entry, sha256 in hex.
    """

    number: int
    digest: str

    def line(self) -> bytes:
        """As an anchor keeps it: fixed width, so that half a line is known as one."""
        return f"{self.number:0{_NUMBER}d} {self.digest}\n".encode()

    @classmethod
    def from_line(cls, line: bytes) -> Head | None:
        """The head that :meth:`line` wrote; None if it is not whole."""
        number, digest = line[:_NUMBER], line[_NUMBER + 1 : -1]
        if not (number.isdigit() and set(digest) <= set(b"0123456789abcdef")):
            return None
        head = cls(int(number), digest.decode())
        return head if head.line() == line else None


EMPTY = Head(0, GENESIS)
"""Of a ledger without entries."""


class Anchor:
    """Heads in a file, one to a line; the last whole line counts.

    Lines are only added, so a crash leaves the line before. The ledger writes while it holds its
    own lock against other processes, so that lines are in the order of entries.

    Args:
        path: of the file; on another disk than the ledger it says more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Head | None:
        """The last head; None where there is no file, or not one whole line in it.

        A torn or damaged end is passed over, which is as if the head were a little older.

        Raises:
            StorageError: the file is there and cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                whole = os.fstat(file.fileno()).st_size // _LINE
                first = max(0, whole - _TAIL)
                file.seek(first * _LINE)
                lines = [file.read(_LINE) for _ in range(first, whole)]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from None
        heads = (Head.from_line(line) for line in reversed(lines))
        return next((head for head in heads if head is not None), None)

    def write(self, head: Head, *, durable: bool) -> None:
        """Add a head.

        Args:
            head: the ledger's.
            durable: whether to return only when it is on the disk. Otherwise a power cut, though no
                crash of a process, may lose it.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                size = os.fstat(handle).st_size
                # Over a torn line, if there is one.
                os.pwrite(handle, head.line(), size // _LINE * _LINE)
                if durable:
                    os.fsync(handle)
            finally:
                os.close(handle)
            if size == 0:
                sync_folder(self.path.parent)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(
            f"the ledger's head {self.path} cannot be used ({error.strerror}); nothing is released "
            "without it. Check that its disk is there, writable and not full"
        )


def contradiction(
    anchors: Iterable[Anchor], end: Head, digest_at: Callable[[int], str | None]
) -> str:
    """How the first anchor that does not bear a chain out differs from it; empty if all do.

    An anchor that is behind is compared with the digest that the ledger's file has for its entry,
    which was found to follow from those before it when the file was opened. If somebody changed
    it since, then the anchor contradicts it, or was changed along with it; and whoever can do that
    could have cut the anchor's last lines off instead.

    Args:
        anchors: of a ledger.
        end: its last entry, as the process knows it; :data:`EMPTY` if there is none.
        digest_at: an entry before that → its digest in the file; None if there is none.

    Raises:
        StorageError: an anchor cannot be read.
    """
    return next(filter(None, (_differs(anchor, end, digest_at) for anchor in anchors)), "")


def _differs(anchor: Anchor, end: Head, digest_at: Callable[[int], str | None]) -> str:
    head = anchor.read()
    if head is None:
        # A new ledger has no head yet, and gets it before its first entry.
        missing = f"{anchor.path} is missing or damaged, and should know of {end.number} entries"
        return missing if end.number else ""
    if head.number > end.number:
        return (
            f"{anchor.path} knows of entry {head.number} and the ledger ends at entry {end.number}"
        )
    known = end.digest if head.number == end.number else digest_at(head.number)
    if known != head.digest:
        return f"{anchor.path} knows another entry {head.number} than the ledger has"
    return ""
