"""Who signs in secure aggregation, and whom a holder believes.

Every holder has a long-term Ed25519 key beside the key of its TLS certificate. What it shows to
other holders, through the coordinator, is a :class:`Credential`: its name, its signing key and the
certificate whose key has signed for both. Two things can be asked of a credential, and a
:class:`Trust` asks them:

* that the federation's authority vouches for it. That keeps strangers out. The authority's key is
  in the coordinator's hands, so it does not keep a dishonest coordinator from making holders up;
* that its signing key is one of those that the holder has pinned, having compared fingerprints
  with the others' people. That holds against the coordinator too.

Renewing or rotating the certificate keeps the signing key, so it touches nobody's pins.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import ConfigurationError, LinkError, Refusal, WireError
from common.link import certificates as certs
from common.link.identity import bare_fingerprint, fingerprint_of
from common.link.keys import HolderKeys

__all__ = ["Credential", "Identity", "Signer", "Trust", "signing_fingerprint"]

_BINDING_DOMAIN = b"sotto signing key of a certificate, version 1\0"
_MAGIC = b"sotto credential 1\0"
_LONGEST_NAME, _LONGEST_CERTIFICATE, _LONGEST_BINDING = 255, 8192, 128  # bytes
_KEY_BYTES = 32
_LENGTH_BYTES = 2
_LONGEST = 2 * (_LONGEST_NAME + _LONGEST_CERTIFICATE)  # bytes of all of it, roughly


@dataclass(frozen=True)
class Credential:
    """What a holder shows to others so that they can check its signatures.

    Args:
        name: the holder's.
        signing_key: its raw Ed25519 public key, 32 bytes.
        certificate: its certificate as PEM; empty where there is no TLS.
        binding: signature by the certificate's key for the name and the signing key, ECDSA with
            SHA-256; empty where there is no certificate.

    Raises:
        WireError: a field is longer, or the key shorter, than it can be.
    """

    name: str
    signing_key: bytes
    certificate: bytes = b""
    binding: bytes = b""

    def __post_init__(self) -> None:
        if not (
            self.name.isprintable()
            and 0 < len(self.name.encode()) <= _LONGEST_NAME
            and len(self.signing_key) == _KEY_BYTES
            and len(self.certificate) <= _LONGEST_CERTIFICATE
            and len(self.binding) <= _LONGEST_BINDING
        ):
            raise WireError(
                f"a credential must hold a printable name of at most {_LONGEST_NAME} bytes, a key "
                f"of {_KEY_BYTES}, a certificate of at most {_LONGEST_CERTIFICATE} and a signature "
                f"of at most {_LONGEST_BINDING}"
            )

    def to_bytes(self) -> bytes:
        """The one way to write it: a magic string, then each field behind its length."""
        fields = (self.name.encode(), self.signing_key, self.certificate, self.binding)
        return _MAGIC + b"".join(len(f).to_bytes(_LENGTH_BYTES, "big") + f for f in fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What :meth:`to_bytes` wrote.

        Raises:
            WireError: it wrote something else.
        """
        fields = _fields(data)
        if len(fields) != 4:
            raise WireError(f"a credential has 4 fields, got {len(fields)}")
        name, signing_key, certificate, binding = fields
        try:
            return cls(name.decode(), signing_key, certificate, binding)
        except UnicodeDecodeError:
            raise WireError("the name in a credential is not UTF-8") from None


@dataclass(frozen=True)
class Identity:
    """A holder's own credential and the private key to it.

    Args:
        credential: what others get to see.
        key: signs.
    """

    credential: Credential
    key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def of(cls, keys: HolderKeys) -> Self:
        """The identity in a holder's state folder.

        Raises:
            LinkError: a key or the certificate is not readable.
        """
        key_pem, certificate = keys.identity()
        key = keys.signing_key
        public = key.public_key().public_bytes_raw()
        # Deterministic (RFC 6979): others verify a credential once, not in every round anew.
        binding = certs.key_from_pem(key_pem).sign(
            _binding_message(keys.name, public),
            ec.ECDSA(hashes.SHA256(), deterministic_signing=True),
        )
        return cls(Credential(keys.name, public, certificate, binding), key)

    @classmethod
    def unsigned(cls, name: str) -> Self:
        """A fresh identity that nobody vouches for: simulations, and plain text on loopback."""
        key = certs.new_signing_key()
        return cls(Credential(name, key.public_key().public_bytes_raw()), key)

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes.

        Args:
            message: must begin with a string that no other kind of message begins with.
        """
        return self.key.sign(message)


@dataclass(frozen=True)
class Signer:
    """Somebody whose credential was found good.

    Args:
        name: the holder's.
        key: verifies its signatures.
    """

    name: str
    key: Ed25519PublicKey

    def verify(self, signature: bytes, data: bytes) -> None:
        """As ``Ed25519PublicKey.verify``.

        Raises:
            cryptography.exceptions.InvalidSignature: the holder did not sign that.
        """
        self.key.verify(signature, data)


@dataclass(frozen=True)
class Trust:
    """Whom a holder believes.

    Args:
        authority: of the federation; None where there is no TLS, and names are believed.
        pins: fingerprints of the signing keys that may take part; empty for whomever the
            authority vouches for.

    Raises:
        ConfigurationError: a pin is no fingerprint.
    """

    authority: x509.Certificate | None = None
    pins: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for pin in sorted(self.pins):
            if not bare_fingerprint(pin):
                raise ConfigurationError(
                    f"{pin!r} is no fingerprint of a signing key; write 'sha256:' and 64 "
                    "hexadecimal digits, as 'sotto keys list' shows it on that holder"
                )

    def of(self, identity: Identity) -> Trust:
        """The same trust, as the holder itself has it: its own key counts as pinned."""
        if not self.pins:
            return self
        return replace(self, pins=self.pins | {signing_fingerprint(identity.credential)})

    def check(self, credential: Credential) -> Signer:
        """Whose signatures a credential lets one verify.

        Signatures are verified once for each credential; whether the certificate has expired is
        looked at every time.

        Raises:
            Refusal: ``"identity"``: the certificate is missing, of another authority, expired or
                not for that name and key; ``"roster"``: the signing key is not pinned.
        """
        signer, certificate = _verified(credential, self.authority)
        if certificate is not None and not certs.valid_now(certificate):
            raise Refusal(
                "identity",
                f"the certificate of {credential.name!r} is not valid now: it is from "
                f"{certificate.not_valid_before_utc:%Y-%m-%d} to "
                f"{certificate.not_valid_after_utc:%Y-%m-%d}; have that holder run `sotto keys "
                "request` again, or set the clock right",
            )
        if self.pins and bare_fingerprint(signing_fingerprint(credential)) not in self._pinned:
            raise Refusal(
                "roster",
                f"{credential.name!r} signs with a key that this holder has not pinned, "
                f"{signing_fingerprint(credential)}; if its people confirm that fingerprint over "
                "another channel, add it to the pins, else ask the coordinator who that is",
            )
        return signer

    @cached_property
    def _pinned(self) -> frozenset[str]:
        return frozenset(map(bare_fingerprint, self.pins))


def signing_fingerprint(credential: Credential) -> str:
    """The SHA-256 of a signing key: what other holders pin.

    >>> signing_fingerprint(Credential("north", bytes(32)))[:25]
    'sha256:66:68:7a:ad:f8:62:'
    """
    return fingerprint_of(credential.signing_key)


@lru_cache(maxsize=4096)
def _verified(
    credential: Credential, authority: x509.Certificate | None
) -> tuple[Signer, x509.Certificate | None]:
    """What does not change with time: authority, name and signatures."""
    key = Ed25519PublicKey.from_public_bytes(credential.signing_key)
    signer = Signer(credential.name, key)
    if authority is None:
        if credential.certificate or credential.binding:
            raise _not_believed(credential, "shows a certificate where there is no authority")
        return signer, None
    if not credential.certificate:
        raise _not_believed(credential, "shows no certificate")
    return signer, _bound_certificate(credential, authority)


def _bound_certificate(credential: Credential, authority: x509.Certificate) -> x509.Certificate:
    """The certificate, which must be good for the name and have signed for the signing key."""
    try:
        certificate = x509.load_pem_x509_certificate(credential.certificate)
    except ValueError:
        raise _not_believed(credential, "shows a certificate that is not readable") from None
    if not (certs.signed_by(certificate, authority) and certs.is_for_holders(certificate)):
        raise _not_believed(credential, "shows a certificate of another authority")
    if certs.common_name(certificate) != credential.name:
        raise _not_believed(credential, "shows a certificate for another name")
    if not _is_bound(credential, certificate):
        raise _not_believed(credential, "shows a signing key that is not its certificate's")
    return certificate


def _is_bound(credential: Credential, certificate: x509.Certificate) -> bool:
    """Whether a certificate's key signed for the signing key, and the certificate names no other.

    An authority can sign anything, so nothing about the certificate is taken for granted.
    """
    message = _binding_message(credential.name, credential.signing_key)
    try:
        public_key = certificate.public_key()
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            return False
        public_key.verify(credential.binding, message, ec.ECDSA(hashes.SHA256()))
        return certs.signing_key_of(certificate) in (None, credential.signing_key)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, LinkError):
        return False


def _not_believed(credential: Credential, what: str) -> Refusal:
    return Refusal(
        "identity",
        f"{credential.name!r} {what}; every holder of a secure round must have joined the same "
        "federation as this one, with `sotto keys request`, `approve` and `install`",
    )


def _binding_message(name: str, signing_key: bytes) -> bytes:
    # Printable names hold no zero byte, so no two pairs give the same message.
    return _BINDING_DOMAIN + name.encode() + b"\0" + signing_key


def _fields(data: bytes) -> list[bytes]:
    """The fields behind the magic string, each with its length before it."""
    if not data.startswith(_MAGIC) or len(data) > _LONGEST:
        raise WireError(
            f"a credential begins with {_MAGIC!r} and has at most {_LONGEST} bytes; install the "
            "same release of sotto everywhere"
        )
    fields: list[bytes] = []
    at = len(_MAGIC)
    while at < len(data):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(data[at:start], "big")
        if max(start, at) > len(data):
            raise WireError("a credential is cut off")
        fields.append(data[start:at])
    return fields
