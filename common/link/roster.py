"""The roster: who may join a coordinator, as certificates in three folders.

::

    holders/NAME.pem             approved: what this holder is to show
    retiring/NAME.FINGER.pem     approved before; holds until the newer one is first shown
    revoked/NAME.FINGER.pem      never again

Who connects must show exactly a certificate that lies in one of the first two under its name, so
taking a file away bars a holder and approving another key under its name is a visible decision. A
holder that makes new keys in its own time keeps its old ones in use until it has installed the new
certificate, so the one before is not barred at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from common.errors import LinkError
from common.link import certificates as certs
from common.link import pem
from common.link.identity import bare_fingerprint, check_holder_name

__all__ = ["Roster"]

_FINGER_DIGITS = 32  # hexadecimal digits of a fingerprint that tell one certificate from others


@dataclass(frozen=True)
class Roster:
    """Approved, retiring and revoked certificates.

    Args:
        folder: ``STATE/keys`` of the coordinator.
    """

    folder: Path

    def approved(self) -> list[x509.Certificate]:
        """The certificates that holders are to show, by name."""
        return self._all("holders")

    def retiring(self) -> list[x509.Certificate]:
        """Older ones that hold until the newer is first shown, by name."""
        return self._all("retiring")

    def revoked(self) -> list[x509.Certificate]:
        """Those that never hold again, by name."""
        return self._all("revoked")

    def find(self, name: str) -> x509.Certificate | None:
        """The approved certificate of a holder."""
        path = self._path(name)
        return pem.read_certificate(path) if path.exists() else None

    def enter(self, certificate: x509.Certificate, *, replace: bool = False) -> None:
        """Approve a certificate.

        If one of its two keys is that of the certificate before, the same holder asks, and both
        hold until the new one is first shown: the request was signed with both of its keys.

        Args:
            certificate: made by the authority of a request.
            replace: approve keys that nothing vouches for under a name that is, or was, another's;
                what the name had before is revoked.

        Raises:
            LinkError: the name belongs to other keys, or a key was revoked.
        """
        name = certs.common_name(certificate)
        known = self.find(name)
        self._require_fresh(certificate, replace=replace)
        if known is not None and _vouches(known, certificate):
            pem.write(self._filed("retiring", known), certs.to_pem(known))
        elif known is not None:
            if not replace:
                raise LinkError(
                    f"{name!r} is approved for other keys already (fingerprint "
                    f"{certs.fingerprint(known)}), and they did not sign this request; if that "
                    "holder lost them, approve with --replace, else have this one choose another "
                    "name"
                )
            self._bar(name)
        pem.write(self._path(name), certs.to_pem(certificate))

    def revoke(self, name: str) -> list[x509.Certificate]:
        """Bar a holder, whichever of its certificates it shows.

        Returns:
            What it can no longer use.

        Raises:
            LinkError: nobody on the roster is called that.
        """
        barred = self._bar(check_holder_name(name))
        if not barred:
            names = ", ".join(map(certs.common_name, self.approved())) or "nobody"
            raise LinkError(f"nobody called {name!r} is on the roster; on it: {names}")
        return barred

    def name_of(self, certificate: x509.Certificate) -> str:
        """The name of the holder that a certificate lets in.

        Args:
            certificate: signed by the authority, and the peer has proved to have its key.

        Raises:
            LinkError: it lets nobody in.
        """
        name = check_holder_name(certs.common_name(certificate))
        if self._filed("revoked", certificate).exists():
            raise LinkError(
                f"the certificate of {name!r} was revoked on the coordinator; if that is a "
                "mistake, or the keys were lost or stolen, make new ones with `sotto keys rotate "
                "--all` and have the coordinator approve them with --replace"
            )
        if certs.expired(certificate):
            raise LinkError(
                f"the certificate of {name!r} expired on {certs.last_day(certificate)}; run "
                "`sotto keys request` on the holder again and have the coordinator approve it"
            )
        known = self.find(name)
        if known != certificate and not self._filed("retiring", certificate).exists():
            raise LinkError(
                f"the certificate shown for {name!r} is not in the coordinator's roster: it was "
                "never approved, was replaced or was taken away; ask the coordinator to run "
                "`sotto keys approve` for your request, then `sotto keys install` the bundle"
            )
        return name

    def settle(self, certificate: x509.Certificate) -> None:
        """Let the certificates before an approved one go, now that it was shown."""
        name = certs.common_name(certificate)
        if self.find(name) == certificate:
            for path in self.folder.glob(f"retiring/{name}.*.pem"):
                path.unlink(missing_ok=True)

    def files_about(self, certificate: x509.Certificate) -> tuple[Path, ...]:
        """The files that say whether a certificate lets somebody in; whoever waits watches them."""
        return (
            self._path(certs.common_name(certificate)),
            self._filed("retiring", certificate),
            self._filed("revoked", certificate),
        )

    def _require_fresh(self, certificate: x509.Certificate, *, replace: bool) -> None:
        """Refuse keys that were revoked, and doubt a name that was."""
        name, revoked = certs.common_name(certificate), self.revoked()
        for old in revoked:
            if _vouches(old, certificate):
                raise LinkError(
                    f"a key of this request was revoked, as one of {certs.common_name(old)!r}; "
                    "have the holder make new ones with `sotto keys rotate --all`"
                )
        names = map(certs.common_name, revoked)
        if name in names and self.find(name) is None and not replace:
            raise LinkError(
                f"{name!r} was revoked before; if this is the same holder with new keys, "
                "approve with --replace, else have this one choose another name"
            )

    def _bar(self, name: str) -> list[x509.Certificate]:
        paths = [self._path(name), *self.folder.glob(f"retiring/{name}.*.pem")]
        held = [(path, pem.read_certificate(path)) for path in paths if path.exists()]
        for path, certificate in held:  # barred before it is taken off: never neither
            pem.write(self._filed("revoked", certificate), certs.to_pem(certificate))
            path.unlink()
        return [certificate for _, certificate in held]

    def _all(self, kind: str) -> list[x509.Certificate]:
        return _read(sorted(self.folder.glob(f"{kind}/*.pem")))

    def _path(self, name: str) -> Path:
        return self.folder / "holders" / f"{name}.pem"

    def _filed(self, kind: str, certificate: x509.Certificate) -> Path:
        """Where one of several certificates of a name lies."""
        finger = bare_fingerprint(certs.fingerprint(certificate))[:_FINGER_DIGITS]
        return self.folder / kind / f"{certs.common_name(certificate)}.{finger}.pem"


def _vouches(known: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether the holder of one certificate asked for another: they share a key."""
    signing_key = certs.signing_key_of(known)
    return known.public_key() == certificate.public_key() or (
        signing_key is not None and signing_key == certs.signing_key_of(certificate)
    )


def _read(paths: Iterable[Path]) -> list[x509.Certificate]:
    return [pem.read_certificate(path) for path in paths]
