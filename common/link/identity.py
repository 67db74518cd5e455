"""Names of holders, the node ids that Flower wants for them, and fingerprints of their keys."""

from __future__ import annotations

import hashlib
import ipaddress
import re

from common.errors import LinkError

__all__ = [
    "bare_fingerprint",
    "check_holder_name",
    "fingerprint_of",
    "host_of",
    "is_loopback",
    "node_id_of",
    "same_fingerprint",
    "short_fingerprint",
]

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_FINGERPRINT = re.compile(r"(?:sha256:)?((?:[0-9a-f]{2}:?){31}[0-9a-f]{2})")


def check_holder_name(name: str) -> str:
    """Return ``name`` if it is one that a holder may have.

    Raises:
        LinkError: it is not; names end up in file names, certificates and logs.
    """
    if not _NAME.fullmatch(name):
        raise LinkError(
            f"{name[:80]!r} cannot name a holder: use 1 to 63 lower-case letters, digits and "
            "dashes, beginning and ending with a letter or digit, such as 'clinic-north'"
        )
    return name


def node_id_of(name: str) -> int:
    """The node id of a holder: 63 bits that depend on its name only.

    >>> node_id_of("clinic-north") == node_id_of("clinic-north")
    True
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def host_of(address: str) -> str:
    """The host in ``HOST:PORT``.

    >>> host_of("[::1]:9090")
    '::1'

    Raises:
        LinkError: there is no port, or it is not a number.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise LinkError(f"{address!r} is not an address; use HOST:PORT, such as 127.0.0.1:9090")
    return host.removeprefix("[").removesuffix("]")


def is_loopback(address: str) -> bool:
    """Whether ``HOST:PORT`` can be reached from this machine only."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def fingerprint_of(data: bytes) -> str:
    """The SHA-256 of a public key or certificate, as people compare it.

    >>> fingerprint_of(b"")[:19]
    'sha256:e3:b0:c4:42:'
    """
    return f"sha256:{hashlib.sha256(data).digest().hex(':')}"


def bare_fingerprint(text: str) -> str:
    """The 64 hexadecimal digits of a fingerprint, however it is written; ``""`` if it is none."""
    found = _FINGERPRINT.fullmatch(text.strip().lower())
    return found[1].replace(":", "") if found else ""


def same_fingerprint(one: str, other: str) -> bool:
    """Whether both are the same SHA-256 fingerprint, however it is written."""
    return bare_fingerprint(one) == bare_fingerprint(other) != ""


def short_fingerprint(name: str) -> str:
    """Enough of a certificate's fingerprint to tell it from others in a table; a short name whole.

    >>> short_fingerprint("sha256:66:d2:5f:52:30:45:78:c2")
    '66:d2:5f:52…'
    """
    bare = name.removeprefix("sha256:")
    return bare if len(bare) <= 16 else f"{bare[:11]}…"
