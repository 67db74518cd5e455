from __future__ import annotations

import pytest

from common.link.proxies import proxy_for

SERVER = "hub.example.org:7443"


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({}, None),
        ({"https_proxy": "http://p:3128"}, "p:3128"),
        ({"https_proxy": "http://p"}, "p:443"),
        ({"https_proxy": "http://[2001:db8::1]:3128/"}, "[2001:db8::1]:3128"),
        ({"https_proxy": "http://name:secret@p:3128"}, "p:3128"),
        ({"http_proxy": "http://third:1", "https_proxy": "http://second:1"}, "second:1"),
        ({"grpc_proxy": "http://first:1", "https_proxy": "http://second:1"}, "first:1"),
        ({"grpc_proxy": "", "https_proxy": "http://second:1"}, None),
        ({"HTTPS_PROXY": "http://p:3128"}, None),
        ({"https_proxy": "p:3128"}, None),
        ({"https_proxy": "https://p:3128"}, None),
        ({"https_proxy": "socks5://p:3128"}, None),
        ({"https_proxy": "http://[half:1"}, None),
        ({"https_proxy": "http://p:none"}, None),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(
    environment: dict[str, str], proxy: str | None
) -> None:
    assert proxy_for(SERVER, environment) == proxy


@pytest.mark.parametrize(
    ("direct", "proxied"),
    [
        ({"no_proxy": "hub.example.org"}, False),
        ({"no_proxy": "other.example.org, example.org"}, False),
        ({"no_proxy": "EXAMPLE.org"}, False),
        ({"no_proxy": "example.com,,"}, True),
        ({"no_grpc_proxy": "example.com", "no_proxy": "example.org"}, True),
    ],
)
def test_who_is_connected_to_directly(direct: dict[str, str], proxied: bool) -> None:
    proxy = proxy_for(SERVER, {"https_proxy": "http://p:3128", **direct})

    assert (proxy is not None) is proxied
