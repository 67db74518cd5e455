from __future__ import annotations

import pytest

from common.link.tls import connection_failure

# What gRPC 1.85 says, word for word.
_CONNECTING = "failed to connect to all addresses; last error: "
_HANDSHAKE = (
    f"{_CONNECTING}UNKNOWN: ipv4:127.0.0.1:38183: Tls handshake failed (TSI_PROTOCOL_FAILURE): "
    "SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: "
)


@pytest.mark.parametrize(
    ("details", "sentence", "final"),
    [
        (f"{_HANDSHAKE}unable to get local issuer certificate: OK", "not that of this", True),
        (f"{_HANDSHAKE}certificate has expired: OK", "`sotto keys rotate`", False),
        (
            f"{_CONNECTING}UNKNOWN: ipv4:127.0.0.2:38183: Custom verification check failed with "
            "error: UNAUTHENTICATED: Hostname Verification Check failed.",
            "not for the host name hub.example.org",
            True,
        ),
        (
            f"{_CONNECTING}UNAVAILABLE: ipv4:127.0.0.1:38183: Socket closed",
            "does not accept this holder's certificate",
            False,
        ),
        (
            f"{_CONNECTING}UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: "
            "Connection refused",
            "no coordinator answers at hub.example.org:7443",
            False,
        ),
    ],
    ids=["authority", "expired", "host", "closed", "nobody"],
)
def test_what_grpc_says_in_words_of_ours(details: str, sentence: str, final: bool) -> None:
    failure = connection_failure("hub.example.org:7443", details)

    assert failure is not None
    assert sentence in failure.sentence
    assert failure.final is final


@pytest.mark.parametrize(
    ("details", "sentence"),
    [
        ("UNKNOWN: ipv4:192.0.2.1:3128: HTTP proxy returned response code 403", "allow CONNECT to"),
        ("UNKNOWN: ipv4:192.0.2.1:3128: HTTP proxy returned response code 407", "NAME:PASSWORD@"),
        ("UNAVAILABLE: ipv4:192.0.2.1:3128: Socket closed", "or at the proxy proxy:3128"),
        ("UNKNOWN: ipv4:192.0.2.1:3128: Connection refused", "or at the proxy proxy:3128"),
    ],
    ids=["forbidden", "password", "closed", "nobody"],
)
def test_what_a_proxy_says_in_words_of_ours(details: str, sentence: str) -> None:
    failure = connection_failure("hub.example.org:7443", _CONNECTING + details, "proxy:3128")

    assert failure is not None
    assert sentence in failure.sentence
    assert not failure.final


@pytest.mark.parametrize(("proxy", "name"), [(None, "hub.example.org"), ("proxy:3128", "proxy")])
def test_a_name_that_nobody_knows_is_said(proxy: str | None, name: str) -> None:
    details = "errors resolving hub.example.org:7443: [field:hostname lookup error: not found]"

    failure = connection_failure("hub.example.org:7443", details, proxy)

    assert failure is not None
    assert f"the name {name} is not known" in failure.sentence


@pytest.mark.parametrize("details", ["Socket closed", "recvmsg:Connection reset by peer", ""])
def test_a_connection_that_stood_is_not_explained_by_certificates(details: str) -> None:
    assert connection_failure("hub.example.org:7443", details) is None
