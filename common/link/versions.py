"""Which versions of the link a release of Sotto speaks, and what two ends make of that.

A holder's Hello names its newest and its oldest version; the coordinator takes the newest that both
speak and says so in Welcome. A version that nobody wants to speak any more is dropped by raising
:data:`OLDEST`; until then, both ends branch on the version of their stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from common.errors import LinkError
from common.link import federation_pb2 as pb
from common.words import shown

__all__ = ["NEWEST", "OLDEST", "OWN", "Versions", "offered", "require_spoken", "spoken"]

NEWEST: Final = 2
"""1 had no Progress, no Again, and began every message from its first byte."""

OLDEST: Final = 2


@dataclass(frozen=True)
class Versions:
    """A range of versions that an end speaks, both ends included."""

    oldest: int
    newest: int

    def common(self, other: Versions) -> int | None:
        """The newest version that both speak; None if there is none.

        >>> Versions(1, 3).common(Versions(2, 5)), Versions(1, 1).common(Versions(2, 2))
        (3, None)
        """
        newest = min(self.newest, other.newest)
        return newest if newest >= max(self.oldest, other.oldest) else None

    def __str__(self) -> str:
        if self.oldest == self.newest:
            return f"version {self.newest}"
        return f"versions {self.oldest} to {self.newest}"


OWN: Final = Versions(OLDEST, NEWEST)


def offered(hello: pb.Hello) -> Versions:
    """What a holder says that it speaks; the first release named its only version."""
    return Versions(hello.oldest or hello.protocol, hello.protocol)


def spoken(hello: pb.Hello, software: str, own: Versions = OWN) -> int:
    """The version for a holder's stream, as the coordinator chooses it.

    Args:
        hello: the holder's.
        software: the coordinator's name and version, for people.
        own: what the coordinator speaks.

    Raises:
        LinkError: they have no version in common; the sentence is for both ends.
    """
    theirs = offered(hello)
    version = own.common(theirs)
    if version is None:
        older = "holder's" if theirs.newest < own.oldest else "coordinator's"
        raise LinkError(
            f"the holder's software ({shown(hello.software, 64)}) speaks {theirs} of the link, the "
            f"coordinator's ({software}) {own}; update the {older}, or install the same release of "
            "sotto on both"
        )
    return version


def require_spoken(welcome: pb.Welcome, software: str, own: Versions = OWN) -> None:
    """Check the version that a coordinator chose, as the holder does.

    Args:
        welcome: the coordinator's.
        software: the holder's name and version, for people.
        own: what the holder speaks.

    Raises:
        LinkError: the holder does not speak it.
    """
    version = welcome.protocol or 1
    if own.common(Versions(version, version)) is None:
        raise LinkError(
            f"the coordinator's software ({shown(welcome.software, 64)}) speaks version {version} "
            f"of the link, the holder's ({software}) {own}; install the same release of sotto on "
            "both"
        )
