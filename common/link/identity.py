"""Names of holders, and the node ids that Flower wants for them."""

from __future__ import annotations

import hashlib
import ipaddress
import re

from common.errors import LinkError

__all__ = ["check_holder_name", "host_of", "is_loopback", "node_id_of", "short_fingerprint"]

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


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


def short_fingerprint(name: str) -> str:
    """Enough of a certificate's fingerprint to tell it from others in a table; a short name whole.

    >>> short_fingerprint("sha256:66:d2:5f:52:30:45:78:c2")
    '66:d2:5f:52…'
    """
    bare = name.removeprefix("sha256:")
    return bare if len(bare) <= 16 else f"{bare[:11]}…"
