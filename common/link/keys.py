"""Keys and certificates as files under ``STATE/keys``, on the coordinator and on holders.

::

    coordinator                              holder
    ca.key, ca.pem                           holder.key, signing.key
    server.key, server.pem                   NAME.request.pem   -> to the coordinator
    holders/, retiring/, revoked/  roster    holder.pem, ca.pem    from the bundle
    bundles/NAME.pem   -> to the holder

Private keys are made where they are used and never leave. How one follows another is in
:mod:`common.link.keyfile`, what the roster is in :mod:`common.link.roster`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import LinkError
from common.link import certificates as certs
from common.link import pem
from common.link.identity import check_holder_name
from common.link.keyfile import KeyFile
from common.link.roster import Roster

__all__ = ["CoordinatorKeys", "HolderKeys", "is_coordinator"]


@dataclass(frozen=True)
class CoordinatorKeys:
    """The authority, the server's identity and the roster.

    Args:
        folder: ``STATE/keys``.
    """

    folder: Path

    @classmethod
    def create_or_load(
        cls, state: Path, host_names: Iterable[str] = (), *, federation: str = "sotto"
    ) -> CoordinatorKeys:
        """Use the keys of a state folder, making what is missing.

        Args:
            state: the coordinator's state folder.
            host_names: names and addresses under which holders reach it; the server certificate
                is made anew when one is not in it yet, or when it expires within a month.
            federation: name of a new federation.
        """
        keys = cls(state / "keys")
        if not keys._ca_path.exists():
            key = certs.new_key()
            pem.write_private(keys.folder / "ca.key", certs.key_to_pem(key))
            pem.write(keys._ca_path, certs.to_pem(certs.authority(key, federation)))
        keys._refresh_server_certificate(frozenset(host_names))
        return keys

    @classmethod
    def load(cls, state: Path) -> CoordinatorKeys:
        """Use the keys of a state folder.

        Raises:
            LinkError: there are none.
        """
        if not is_coordinator(state):
            raise LinkError(
                f"{state} is not a coordinator's state folder: it has no keys/ca.key; start "
                "`sotto serve` with it once, or name the right folder with --state"
            )
        return cls(state / "keys")

    @property
    def authority(self) -> x509.Certificate:
        """The federation's authority."""
        return pem.read_certificate(self._ca_path)

    @property
    def server_certificate(self) -> x509.Certificate:
        """What the coordinator shows."""
        return pem.read_certificate(self._server_path)

    @property
    def roster(self) -> Roster:
        """Who may join."""
        return Roster(self.folder)

    def server_identity(self) -> tuple[bytes, bytes]:
        """Private key and certificate of the server, as PEM."""
        certificate = self.server_certificate
        key = self._server_key.key_of(certificate.public_key())
        return certs.key_to_pem(key), certs.to_pem(certificate)

    def server_stamp(self) -> object:
        """Something that changes whenever :meth:`server_identity` does; cheap."""
        return pem.stamps((self._server_path,))

    def approve(self, request: Path, *, replace: bool = False) -> Path:
        """Sign a holder's request and enter it into the roster.

        Args:
            request: the file that ``sotto keys request`` or ``sotto keys rotate`` made.
            replace: allow a name that is in the roster to get keys that nothing vouches for.

        Returns:
            The bundle to bring to the holder.

        Raises:
            LinkError: the request is not acceptable, or its name belongs to other keys.
        """
        csr = pem.read_request(request)
        certificate = certs.holder_certificate(self.authority, self._ca_key(), csr)
        self.roster.enter(certificate, replace=replace)
        bundle = self._bundle_path(certs.common_name(certificate))
        pem.write(bundle, certs.to_pem(certificate) + pem.read(self._ca_path))
        return bundle

    def revoke(self, name: str) -> list[x509.Certificate]:
        """Bar a holder from now on, on live connections too.

        Returns:
            The certificates that it can no longer use.

        Raises:
            LinkError: nobody on the roster is called that.
        """
        revoked = self.roster.revoke(name)
        self._bundle_path(name).unlink(missing_ok=True)
        return revoked

    def rotate(self) -> x509.Certificate:
        """Make a new key and certificate for the server, under the same authority.

        Holders trust the authority, so none of them notices. A running server shows it to whoever
        connects next.
        """
        hosts = certs.hosts_of(self.server_certificate)
        self._certify_server(self._server_key.next(), hosts)
        return self.server_certificate

    @property
    def _ca_path(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def _server_path(self) -> Path:
        return self.folder / "server.pem"

    @property
    def _server_key(self) -> KeyFile[certs.Key]:
        return KeyFile(self.folder / "server.key", certs.new_key, certs.key_from_pem)

    def _bundle_path(self, name: str) -> Path:
        return self.folder / "bundles" / f"{name}.pem"

    def _ca_key(self) -> certs.Key:
        return certs.key_from_pem(pem.read(self.folder / "ca.key"))

    def _refresh_server_certificate(self, hosts: frozenset[str]) -> None:
        if not self._server_path.exists():
            self._server_key.ensure()
            self._certify_server(self._server_key.first(), hosts)
            return
        current = self.server_certificate
        known = certs.hosts_of(current)
        if not hosts <= known or certs.expired(current, within=certs.EXPIRES_SOON):
            self._certify_server(self._server_key.key_of(current.public_key()), hosts | known)

    def _certify_server(self, key: certs.Key, hosts: Iterable[str]) -> None:
        certificate = certs.server_certificate(
            self.authority, self._ca_key(), key.public_key(), sorted(hosts)
        )
        pem.write(self._server_path, certs.to_pem(certificate))
        self._server_key.settle(key.public_key())


@dataclass(frozen=True)
class HolderKeys:
    """A holder's own keys and, once installed, its certificate.

    Args:
        folder: ``STATE/keys``.
    """

    folder: Path

    @classmethod
    def request(cls, state: Path, name: str) -> Path:
        """Make keys, unless there are some, and ask for a certificate.

        Args:
            state: the holder's state folder.
            name: what the holder is to be called.

        Returns:
            The request to bring to the coordinator. The keys stay.

        Raises:
            LinkError: the name is not allowed, or the folder belongs to a coordinator.
        """
        check_holder_name(name)
        if is_coordinator(state):
            raise LinkError(
                f"{state} is a coordinator's state folder; give the holder a folder of its own "
                "with --state"
            )
        keys = cls(state / "keys")
        keys._key.ensure()
        keys._signing.ensure()
        return keys._ask(name, keys._own_key(), keys._own_signing_key())

    @classmethod
    def rotate(cls, state: Path, *, key: bool = True, signing_key: bool = False) -> Path:
        """Make new keys beside those in use, and ask for a certificate for them.

        Nothing changes until its bundle is installed. The key that stays vouches for the one that
        is new; where both are new, the coordinator has to approve with ``--replace``.

        Args:
            state: the holder's state folder.
            key: make a new key of the certificate.
            signing_key: make a new key that signs in secure aggregation, which other holders have
                to pin anew.

        Returns:
            The request to bring to the coordinator. The keys stay.

        Raises:
            LinkError: there is no certificate whose keys could be changed.
        """
        keys = cls.open(state)
        lost = key and signing_key  # then one that waits in the same folder may be lost, too
        return keys._ask(
            keys.name,
            keys._key.next(afresh=lost) if key else keys._own_key(),
            keys._signing.next(afresh=lost) if signing_key else keys._own_signing_key(),
        )

    @classmethod
    def load(cls, state: Path) -> HolderKeys:
        """Use the installed certificate of a state folder.

        Raises:
            LinkError: there is none, or it has expired.
        """
        keys = cls.open(state)
        keys.require_valid()
        return keys

    @classmethod
    def open(cls, state: Path) -> HolderKeys:
        """Look at the installed certificate of a state folder, also at one that has expired.

        Raises:
            LinkError: there is none.
        """
        keys = cls(state / "keys")
        if not keys._certificate_path.exists():
            raise LinkError(
                f"{state} has no certificate: run `sotto keys request`, have the coordinator "
                "approve it, then run `sotto keys install`"
            )
        if certs.signing_key_of(keys.certificate) is None:
            keys._signing.ensure()  # the folder was made by a release that had none
        keys._settle()
        return keys

    @classmethod
    def install(cls, state: Path, bundle: Path) -> HolderKeys:
        """Take the certificate and the authority out of a bundle.

        Args:
            state: the holder's state folder.
            bundle: the file that ``sotto keys approve`` made.

        Returns:
            The keys, complete now.

        Raises:
            LinkError: the bundle is not for these keys, not signed by its authority, or expired.
        """
        keys = cls(state / "keys")
        certificate, ca = pem.read_bundle(bundle)
        if not keys._key.exists:
            raise LinkError("there is no key here yet; run `sotto keys request` first")
        signing_key = _certified_signing_key(certificate)
        if keys._key.find(certificate.public_key()) is None or (
            signing_key is not None and keys._signing.find(signing_key) is None
        ):
            raise LinkError(
                f"{bundle} is for another key: install it where its request was made, or send "
                "the coordinator the request of this folder"
            )
        if not certs.signed_by(certificate, ca) or certs.expired(certificate):
            raise LinkError(
                f"{bundle} is not signed by the authority it carries, or has expired; ask the "
                "coordinator to approve the request again"
            )
        pem.write(keys._authority_path, certs.to_pem(ca))
        pem.write(keys._certificate_path, certs.to_pem(certificate))
        keys._settle()
        return keys

    @property
    def certificate(self) -> x509.Certificate:
        """The holder's certificate."""
        return pem.read_certificate(self._certificate_path)

    @property
    def authority(self) -> x509.Certificate:
        """The authority that the holder trusts to name the coordinator."""
        return pem.read_certificate(self._authority_path)

    @property
    def name(self) -> str:
        """The holder's name."""
        return certs.common_name(self.certificate)

    @property
    def signing_key(self) -> Ed25519PrivateKey:
        """The key that signs in secure aggregation."""
        certified = _certified_signing_key(self.certificate)
        return self._signing.first() if certified is None else self._signing.key_of(certified)

    def identity(self) -> tuple[bytes, bytes]:
        """Private key and certificate of the holder, as PEM."""
        certificate = self.certificate
        key = self._key.key_of(certificate.public_key())
        return certs.key_to_pem(key), certs.to_pem(certificate)

    def require_valid(self) -> None:
        """Raise a LinkError if the certificate has expired."""
        certificate = self.certificate
        if certs.expired(certificate):
            raise LinkError(
                f"the certificate of {certs.common_name(certificate)!r} expired on "
                f"{certs.last_day(certificate)}; run `sotto keys request` again and have the "
                "coordinator approve it"
            )

    @property
    def _key(self) -> KeyFile[certs.Key]:
        return KeyFile(self.folder / "holder.key", certs.new_key, certs.key_from_pem)

    @property
    def _signing(self) -> KeyFile[Ed25519PrivateKey]:
        return KeyFile(
            self.folder / "signing.key", certs.new_signing_key, certs.signing_key_from_pem
        )

    @property
    def _certificate_path(self) -> Path:
        return self.folder / "holder.pem"

    @property
    def _authority_path(self) -> Path:
        return self.folder / "ca.pem"

    def _own_key(self) -> certs.Key:
        """The key in use; the only one where no certificate is, or none fits."""
        if self._certificate_path.exists():
            found = self._key.find(self.certificate.public_key())
            if found is not None:
                return found
        return self._key.first()

    def _own_signing_key(self) -> Ed25519PrivateKey:
        if self._certificate_path.exists():
            certified = _certified_signing_key(self.certificate)
            found = None if certified is None else self._signing.find(certified)
            if found is not None:
                return found
        return self._signing.first()

    def _ask(self, name: str, key: certs.Key, signing_key: Ed25519PrivateKey) -> Path:
        request = self.folder / f"{name}.request.pem"
        pem.write(request, certs.to_pem(certs.signing_request(key, name, signing_key)))
        return request

    def _settle(self) -> None:
        certificate = self.certificate
        self._key.settle(certificate.public_key())
        if (signing_key := _certified_signing_key(certificate)) is not None:
            self._signing.settle(signing_key)


def is_coordinator(state: Path) -> bool:
    """Whether a state folder holds a federation's authority."""
    return (state / "keys" / "ca.key").exists()


def _certified_signing_key(certificate: x509.Certificate) -> Ed25519PublicKey | None:
    raw = certs.signing_key_of(certificate)
    return None if raw is None else Ed25519PublicKey.from_public_bytes(raw)
