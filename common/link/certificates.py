"""X.509 certificates of a federation: pure functions from keys to certificates.

One self-signed certificate authority per federation signs one server certificate and one client
certificate per holder. Keys are ECDSA on P-256, the curve every TLS library has.

A holder's certificate also names the Ed25519 key with which that holder signs in secure
aggregation, in an extension of our own. The request proves possession of both keys: it is signed
by the one and carries a signature by the other, so neither can be put beside somebody else's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import LinkError
from common.link.identity import check_holder_name

__all__ = [
    "EXPIRES_SOON",
    "MALFORMED",
    "authority",
    "common_name",
    "expired",
    "expiry_note",
    "fingerprint",
    "from_pem",
    "holder_certificate",
    "hosts_of",
    "is_for_holders",
    "key_from_pem",
    "key_to_pem",
    "last_day",
    "new_key",
    "new_signing_key",
    "requested_signing_key",
    "server_certificate",
    "signed_by",
    "signing_key_from_pem",
    "signing_key_of",
    "signing_request",
    "to_pem",
    "valid_now",
    "whole",
]

Key = ec.EllipticCurvePrivateKey

MALFORMED = (
    *(ValueError, TypeError, KeyError, UnsupportedAlgorithm, InternalError),
    *(x509.InvalidVersion, x509.DuplicateExtension),
)
"""What ``cryptography`` raises for documents that are none."""

_Document = TypeVar("_Document", x509.Certificate, x509.CertificateSigningRequest)

EXPIRES_SOON = timedelta(days=30)
"""From then on both sides say that a certificate is about to expire."""

_AUTHORITY_LIFE = timedelta(days=3650)
_LEAF_LIFE = timedelta(days=398)
_CLOCK_SKEW = timedelta(hours=1)  # a holder whose clock is behind can join at once
_ALWAYS = ("localhost", "127.0.0.1", "::1")
# An identifier below 2.25 is a random UUID and needs nobody's registration (ITU-T X.667).
_SIGNING_KEY = x509.ObjectIdentifier("2.25.206266246453198252117230018525352207798")
_SIGNING_KEY_BYTES, _PROOF_BYTES = 32, 64
_PROOF_DOMAIN = b"sotto signing key of a request, version 1\0"


def new_key() -> Key:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def new_signing_key() -> Ed25519PrivateKey:
    """A fresh private key for signing in secure aggregation."""
    return Ed25519PrivateKey.generate()


def authority(key: Key, federation: str) -> x509.Certificate:
    """The self-signed certificate of a federation's authority."""
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    subject = _subject(federation)
    builder = _builder(subject, subject, key.public_key(), key.public_key(), _AUTHORITY_LIFE)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def server_certificate(
    ca: x509.Certificate,
    ca_key: Key,
    public_key: ec.EllipticCurvePublicKey,
    hosts: Iterable[str],
    *,
    lasts: timedelta = _LEAF_LIFE,
) -> x509.Certificate:
    """The coordinator's certificate.

    Args:
        ca: the authority.
        ca_key: its key.
        public_key: the coordinator's.
        hosts: names and addresses holders will use, beside the loopback ones.
        lasts: from now until it expires.
    """
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *_ALWAYS))]
    builder = _leaf(ca, "sotto-coordinator", public_key, ExtendedKeyUsageOID.SERVER_AUTH, lasts)
    return builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(
        ca_key, hashes.SHA256()
    )


def signing_request(
    key: Key, name: str, signing_key: Ed25519PrivateKey
) -> x509.CertificateSigningRequest:
    """A holder's request for a certificate; it holds the name and both public keys."""
    proof = signing_key.sign(_proof_message(name, key.public_key()))
    extension = _octets(signing_key.public_key().public_bytes_raw() + proof)
    builder = x509.CertificateSigningRequestBuilder(_subject(check_holder_name(name)))
    return builder.add_extension(
        x509.UnrecognizedExtension(_SIGNING_KEY, extension), critical=False
    ).sign(key, hashes.SHA256())


def holder_certificate(
    ca: x509.Certificate,
    ca_key: Key,
    request: x509.CertificateSigningRequest,
    *,
    lasts: timedelta = _LEAF_LIFE,
) -> x509.Certificate:
    """A holder's certificate.

    Args:
        ca: the authority.
        ca_key: its key.
        request: what :func:`signing_request` made.
        lasts: from now until it expires.

    Raises:
        LinkError: the request is not signed by its own keys, its key is of another kind, or its
            name is not allowed.
    """
    public_key = request.public_key()
    if not (
        isinstance(public_key, ec.EllipticCurvePublicKey)
        and isinstance(public_key.curve, ec.SECP256R1)
        and request.is_signature_valid
    ):
        raise LinkError(
            "the request is not one of `sotto keys request`: it must hold an ECDSA P-256 key "
            "and be signed by it; have the holder make it again"
        )
    name = check_holder_name(common_name(request))
    builder = _leaf(ca, name, public_key, ExtendedKeyUsageOID.CLIENT_AUTH, lasts)
    if (signing_key := requested_signing_key(request)) is not None:
        extension = x509.UnrecognizedExtension(_SIGNING_KEY, _octets(signing_key))
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def requested_signing_key(request: x509.CertificateSigningRequest) -> bytes | None:
    """The raw Ed25519 public key in a request; None in one made before there was.

    Raises:
        LinkError: it has not signed for the request's name and other key.
    """
    found = _extension(request, _SIGNING_KEY_BYTES + _PROOF_BYTES)
    if found is None:
        return None
    signing_key, proof = found[:_SIGNING_KEY_BYTES], found[_SIGNING_KEY_BYTES:]
    try:
        message = _proof_message(common_name(request), request.public_key())
        Ed25519PublicKey.from_public_bytes(signing_key).verify(proof, message)
    except (InvalidSignature, ValueError):
        raise LinkError(
            "the request names a signing key that did not sign it; have the holder make the "
            "request again with `sotto keys request`"
        ) from None
    return signing_key


def signing_key_of(certificate: x509.Certificate) -> bytes | None:
    """The raw Ed25519 public key in a holder's certificate; None in one made before there was."""
    return _extension(certificate, _SIGNING_KEY_BYTES)


def is_for_holders(certificate: x509.Certificate) -> bool:
    """Whether a certificate was made for a holder, and not for a server or an authority."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage


def common_name(document: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The name in a certificate or request, or ``""``."""
    found = document.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def hosts_of(certificate: x509.Certificate) -> frozenset[str]:
    """Names and addresses that a server certificate is valid for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return frozenset((*names.get_values_for_type(x509.DNSName), *map(str, addresses)))


def signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether ``ca`` is an authority and signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(ca)
        return ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    except x509.ExtensionNotFound:
        return False


def expired(certificate: x509.Certificate, *, within: timedelta = timedelta()) -> bool:
    """Whether a certificate has expired, or will have in a while."""
    return certificate.not_valid_after_utc <= datetime.now(UTC) + within


def last_day(certificate: x509.Certificate) -> str:
    """The day on which a certificate expires, such as ``2027-12-31``, in UTC."""
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"


def expiry_note(certificate: x509.Certificate) -> str:
    """What people should know about a certificate's end; ``""`` while that is far away."""
    if expired(certificate):
        return f"expired on {last_day(certificate)}"
    if not expired(certificate, within=EXPIRES_SOON):
        return ""
    days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    return f"expires in {days} day" + "s" * (days != 1)


def valid_now(certificate: x509.Certificate) -> bool:
    """Whether a certificate holds at this moment."""
    now = datetime.now(UTC)
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, for people to compare over another channel."""
    return certificate.fingerprint(hashes.SHA256()).hex(":")


def key_to_pem(key: Key | Ed25519PrivateKey) -> bytes:
    """A private key as unencrypted PEM."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def key_from_pem(pem: bytes) -> Key:
    """A private key from PEM.

    Raises:
        LinkError: it is not an ECDSA key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except MALFORMED:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LinkError("a key file is damaged or not one that Sotto made; restore it")
    return key


def signing_key_from_pem(pem: bytes) -> Ed25519PrivateKey:
    """A private signing key from PEM.

    Raises:
        LinkError: it is not an Ed25519 key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except MALFORMED:
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise LinkError("a signing key's file is damaged or not one that Sotto made; restore it")
    return key


def whole(document: _Document) -> _Document:
    """A document of which every part can be read.

    ``cryptography`` reads most parts of a document when they are asked for, and not before; a
    stranger's must not fail in the middle of something else.

    Raises:
        ValueError: or another one of :data:`MALFORMED`; a part cannot be read.
    """
    _ = (document.subject, document.public_key(), document.extensions)
    if isinstance(document, x509.Certificate):
        _ = (document.issuer, document.serial_number, document.not_valid_after_utc)
    return document


def from_pem(pem: bytes) -> x509.Certificate:
    """A certificate that came over a connection.

    Raises:
        LinkError: it is none.
    """
    try:
        return whole(x509.load_pem_x509_certificate(pem))
    except MALFORMED:
        raise LinkError("the certificate of the connection is not readable") from None


def to_pem(document: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """A certificate or request as PEM."""
    return document.public_bytes(serialization.Encoding.PEM)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise LinkError(
            f"{host!r} is not a host name or address; write international names in Punycode"
        ) from None


def _leaf(
    ca: x509.Certificate,
    name: str,
    public_key: ec.EllipticCurvePublicKey,
    purpose: x509.ObjectIdentifier,
    lasts: timedelta,
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    issuer_key = ca.public_key()
    assert isinstance(issuer_key, ec.EllipticCurvePublicKey)  # we made it
    return (
        _builder(_subject(name), ca.subject, public_key, issuer_key, lasts)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    lasts: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(public_key)
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lasts)
        .add_extension(identifier, critical=False)
        .add_extension(issuer_identifier, critical=False)
    )


def _proof_message(name: str, public_key: PublicKeyTypes) -> bytes:
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    # The name cannot hold a zero byte, so no two pairs give the same message.
    return _PROOF_DOMAIN + name.encode() + b"\0" + public_key.public_bytes(encoding, form)


def _extension(
    document: x509.Certificate | x509.CertificateSigningRequest, length: int
) -> bytes | None:
    """The content of our extension, which must have a length; None where there is none."""
    try:
        found = document.extensions.get_extension_for_oid(_SIGNING_KEY).value
    except x509.ExtensionNotFound:
        return None
    except ValueError:
        raise LinkError("the extensions of a certificate or request are not readable") from None
    assert isinstance(found, x509.UnrecognizedExtension)  # no library knows our identifier
    if len(found.value) != length + 2 or found.value != _octets(found.value[2:]):
        raise LinkError(
            "the signing key in a certificate or request is not readable; have the holder make "
            "the request again with `sotto keys request`, with the same release of sotto"
        )
    return found.value[2:]


def _octets(content: bytes) -> bytes:
    """A DER OCTET STRING of less than 128 bytes (ITU-T X.690, 8.1.3.4 and 8.7)."""
    return bytes((0x04, len(content))) + content
