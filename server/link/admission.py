"""Whom the coordinator lets in, for how long, and who never got as far as a name."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from common.errors import LinkError
from common.link import certificates as certs
from common.link import pem
from common.link.keys import CoordinatorKeys
from common.link.tls import peer_certificate

__all__ = ["Admission", "Admitted", "Nameless", "nameless_sentence"]

_MOST_COUNTED = 100_000  # connections without a name at the same time; more are not counted
_LOOK_EVERY = 0.5  # seconds between two looks at the roster for a live connection

_log = logging.getLogger("sotto.link")


@dataclass(frozen=True)
class Admitted:
    """Who is at the other end of a connection.

    Args:
        name: of the holder; empty where there is no TLS, and the holder says it itself.
        certificate: that it showed; None where there is no TLS.
        files: of the roster that are about this certificate.
        stamp: of those when it was let in.
    """

    name: str = ""
    certificate: x509.Certificate | None = None
    files: tuple[Path, ...] = ()
    stamp: object = None

    @property
    def expiry_note(self) -> str:
        """What people should know about the certificate's end; ``""`` while that is far away."""
        return "" if self.certificate is None else certs.expiry_note(self.certificate)


class Admission:
    """The coordinator's roster, asked for every connection and for as long as it stands.

    Args:
        keys: certificates and roster; None for plain text on loopback, where names are believed.
    """

    def __init__(self, keys: CoordinatorKeys | None) -> None:
        self._keys = keys
        self.nameless = None if keys is None else Nameless(keys)

    def admit(self, auth_context: Mapping[str, Iterable[bytes]]) -> Admitted:
        """Who may come in.

        Args:
            auth_context: of the connection, as gRPC gives it.

        Raises:
            LinkError: whoever it is may not; the message is for both ends.
        """
        if self._keys is None or self.nameless is None:
            return Admitted()
        self.nameless.name()
        certificate = certs.from_pem(peer_certificate(auth_context))
        roster = self._keys.roster
        files = roster.files_about(certificate)
        stamp = pem.stamps(files)  # before the look, so that no change falls between
        name = roster.name_of(certificate)
        try:
            roster.settle(certificate)
        except OSError as error:  # a folder that this process may only read
            _log.warning("the older certificates of %s stay valid: %s", name, error)
        return Admitted(name, certificate, files, stamp)

    def has_other(self, admitted: Admitted) -> bool:
        """Whether a holder may come back with another certificate than the one it showed."""
        if self._keys is None or admitted.certificate is None:
            return False
        approved = self._keys.roster.find(admitted.name)
        return approved is not None and approved != admitted.certificate

    async def barred(self, admitted: Admitted) -> str:
        """Wait until a holder that was let in may no longer stay, and say why.

        A change of the roster (``sotto keys revoke``) is seen within a second, and so is the end of
        the certificate.
        """
        if self._keys is None or admitted.certificate is None:
            never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            return await never
        roster, stamp = self._keys.roster, admitted.stamp
        while True:
            now = pem.stamps(admitted.files)
            if now != stamp or certs.expired(admitted.certificate):
                try:
                    roster.name_of(admitted.certificate)
                except LinkError as error:
                    return str(error)
                stamp = now
            await asyncio.sleep(_LOOK_EVERY)


class Nameless:
    """Notices connections that end before TLS has said whose they are.

    gRPC refuses what is wrong with a certificate before any of our code runs, and does not tell
    who was there. So connections are counted when they begin and when they have a name, and what
    is missing after a while is said, with everything that can be the reason.

    Args:
        keys: of the coordinator.
        patience: seconds after which a connection will not get a name any more.
        quiet: seconds between two lines in the log.
    """

    def __init__(
        self, keys: CoordinatorKeys, *, patience: float = 3.0, quiet: float = 60.0
    ) -> None:
        self._keys = keys
        self._patience = patience
        self._quiet = quiet
        self._begun: deque[float] = deque(maxlen=_MOST_COUNTED)

    def begin(self) -> None:
        """A connection begins; called on gRPC's threads."""
        self._begun.append(time.monotonic())

    def name(self) -> None:
        """A connection has got a name."""
        if self._begun:
            self._begun.popleft()

    async def report(self) -> None:
        """Say so in the log, for ever."""
        lost = 0
        while True:
            await asyncio.sleep(self._patience / 2)
            lost += self._lost()
            if lost:
                _log.warning("%s", self._sentence(lost))
                lost = 0
                await asyncio.sleep(self._quiet)

    def _sentence(self, lost: int) -> str:
        try:
            return nameless_sentence(lost, self._keys)
        except LinkError as error:  # a file was damaged meanwhile
            return f"{lost} connections ended before TLS could say whose; {error}"

    def _lost(self) -> int:
        """How many, since the last call, will never have a name."""
        count, now = 0, time.monotonic()
        while self._begun and now - self._begun[0] > self._patience:
            self._begun.popleft()
            count += 1
        return count


def nameless_sentence(count: int, keys: CoordinatorKeys) -> str:
    """What may be behind connections that ended without a name, and where to look.

    Args:
        count: of such connections.
        keys: of the coordinator.
    """
    server = keys.server_certificate
    gone = [c for c in keys.roster.approved() if certs.expired(c)]
    whose = ", ".join(f"{certs.common_name(c)} on {certs.last_day(c)}" for c in gone) or "nobody's"
    connections = "1 connection" if count == 1 else f"{count} connections"
    return (
        f"{connections} ended before TLS could say whose: the peer showed no certificate of this "
        f"federation or an expired one (expired on the roster: {whose}), or does not believe this "
        f"coordinator's, which is for {', '.join(sorted(certs.hosts_of(server)))} until "
        f"{certs.last_day(server)}, or is no Sotto at all; the holder's own terminal says which, "
        "and `sotto keys list` must show the same authority on both sides"
    )
