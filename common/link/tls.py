"""TLS with certificates on both sides, in gRPC's terms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import grpc

from common.errors import LinkError
from common.link.certificates import to_pem
from common.link.identity import host_of, is_loopback
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.proxies import refusal_of

__all__ = [
    "ConnectionFailure",
    "channel_credentials",
    "connection_failure",
    "peer_certificate",
    "require_loopback",
    "server_credentials",
]

_log = logging.getLogger("sotto.link")


def server_credentials(
    keys: CoordinatorKeys, on_connection: Callable[[], None] | None = None
) -> grpc.ServerCredentials:
    """What the coordinator shows, and that it asks every peer for a certificate of its own.

    A certificate that is replaced meanwhile (``sotto keys rotate``) is shown to whoever connects
    next; connections that stand are not touched.

    Args:
        keys: of the coordinator.
        on_connection: called for every connection before its handshake, on any thread.
    """
    shown = _Shown(keys, on_connection or _nothing)
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        shown.configuration(),
        shown,  # type: ignore[arg-type]  # the stubs leave out None, "no change"
        require_client_authentication=True,
    )
    return credentials


class _Shown:
    """What gRPC asks for at every connection: what to show from now on, or None for no change."""

    def __init__(self, keys: CoordinatorKeys, on_connection: Callable[[], None]) -> None:
        self._keys = keys
        self._on_connection = on_connection
        self._stamp = keys.server_stamp()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        self._on_connection()
        stamp = self._keys.server_stamp()
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            return self.configuration()
        except LinkError as error:
            _log.error("goes on with the server certificate it has: %s", error)
            return None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """As the files are now."""
        return grpc.ssl_server_certificate_configuration(
            [self._keys.server_identity()], root_certificates=to_pem(self._keys.authority)
        )


def _nothing() -> None:
    """Nobody wants to know."""


def channel_credentials(keys: HolderKeys) -> grpc.ChannelCredentials:
    """What a holder shows, and whom it believes: its federation's authority, nobody else.

    Raises:
        LinkError: the certificate has expired. The coordinator would close the connection without
            a word, so this is the place to say it.
    """
    keys.require_valid()
    key, certificate = keys.identity()
    credentials: grpc.ChannelCredentials = grpc.ssl_channel_credentials(
        to_pem(keys.authority), key, certificate
    )
    return credentials


@dataclass(frozen=True)
class ConnectionFailure:
    """Why a connection could not be made.

    Args:
        sentence: what it is and what to do.
        final: trying again is of no use before somebody has done that.
    """

    sentence: str
    final: bool = False


def connection_failure(
    server: str, details: str, proxy: str | None = None
) -> ConnectionFailure | None:
    """What gRPC's words about a failed connection mean to a holder.

    Args:
        server: ``HOST:PORT`` that it tried.
        details: of gRPC's error.
        proxy: ``HOST:PORT`` of the HTTP proxy on the way, if there is one.

    Returns:
        None where they are not about connecting.
    """
    if "certificate has expired" in details:
        return ConnectionFailure(
            f"the certificate of the coordinator at {server} has expired, or this machine's clock "
            "is wrong; ask the coordinator to run `sotto keys rotate`"
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return ConnectionFailure(
            f"the certificate shown at {server} is not that of this holder's federation; check "
            "--server, compare the authority in `sotto keys list` on both sides, or install the "
            "bundle of the right federation",
            final=True,
        )
    if "Hostname Verification Check failed" in details:
        return ConnectionFailure(
            f"the certificate shown at {server} is this federation's, but not for the host name "
            f"{host_of(server)}; use a name that is in it, or have the coordinator add this one "
            "with `sotto serve --host-name`",
            final=True,
        )
    if "errors resolving" in details or "DNS resolution failed" in details:
        return ConnectionFailure(
            f"the name {host_of(proxy or server)} is not known to this machine's resolver"
        )
    if "failed to connect to all addresses" not in details:  # gRPC's words, with every address
        return None
    if proxy is not None:
        return ConnectionFailure(
            refusal_of(proxy, server, details)
            or f"no coordinator answers at {server}, or at the proxy {proxy} on the way there"
        )
    if any(words in details for words in ("Socket closed", "Connection reset", "Broken pipe")):
        return ConnectionFailure(
            f"{server} takes the connection and closes it before it has begun: it does not accept "
            "this holder's certificate, because another federation's authority signed it, or one "
            "of the two was started with --insecure, or it is stopping; compare the authority in "
            "`sotto keys list` on both sides"
        )
    return ConnectionFailure(f"no coordinator answers at {server}")


def peer_certificate(auth_context: Mapping[str, Iterable[bytes]]) -> bytes:
    """The certificate, as PEM, that the peer proved to own.

    Raises:
        LinkError: the connection has none.
    """
    for certificate in auth_context.get("x509_pem_cert", ()):
        return certificate
    raise LinkError("the connection shows no certificate; join with one, over TLS")


def require_loopback(address: str) -> None:
    """Allow plain text where nobody else can listen.

    Raises:
        LinkError: ``address`` can be reached from other machines.
    """
    if not is_loopback(address):
        raise LinkError(
            f"plain text is allowed on loopback only, and {address} is not; leave --insecure out "
            "and use certificates (`sotto keys`), or listen on 127.0.0.1"
        )
