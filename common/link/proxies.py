"""Through which HTTP proxy gRPC connects, and what a refusal of it means, in words for people."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from common.link.identity import host_of

__all__ = ["proxy_for", "refusal_of"]

# As gRPC's core looks for them ("default_http_proxy_mapper" in its documentation): the first one
# that is set holds, even if it is empty.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_DIRECT = ("no_grpc_proxy", "no_proxy")

_DEFAULT_PORT = 443
_CODE = re.compile(r"HTTP proxy returned response code (\d+)")
_WANTS_PASSWORD = "407"


def proxy_for(server: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The HTTP proxy through which gRPC connects to a server, as ``HOST:PORT``.

    For people to see; gRPC decides itself, by the same variables. Address ranges in ``no_proxy``
    are not looked at here.

    Args:
        server: ``HOST:PORT``.
        environment: its variables.

    Returns:
        The proxy without name and password; None where gRPC connects directly.

    >>> proxy_for("hub.example.org:7443", {"https_proxy": "http://proxy.example.org:3128"})
    'proxy.example.org:3128'
    >>> proxy_for("localhost:7443", {"https_proxy": "http://proxy:3128", "no_proxy": "localhost"})
    """
    proxy = _split(_first(_PROXIES, environment))
    if proxy is None:
        return None
    host = host_of(server)
    direct = (ending.strip() for ending in _first(_DIRECT, environment).split(","))
    if any(ending and host.lower().endswith(ending.lower()) for ending in direct):
        return None
    name = f"[{proxy.hostname}]" if ":" in (proxy.hostname or "") else proxy.hostname
    return f"{name}:{proxy.port or _DEFAULT_PORT}"


def refusal_of(proxy: str, server: str, details: str) -> str | None:
    """What a proxy's refusal means; None if ``details`` of gRPC's error tell of none."""
    found = _CODE.search(details)
    if found is None:
        return None
    if found[1] == _WANTS_PASSWORD:
        return (
            f"the proxy {proxy} wants a name and a password (it answers {_WANTS_PASSWORD}); set "
            "https_proxy to http://NAME:PASSWORD@HOST:PORT"
        )
    return (
        f"the proxy {proxy} does not connect this holder to {server} (it answers {found[1]}); have "
        f"it allow CONNECT to that address, or put {host_of(server)} into no_proxy"
    )


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> str:
    return next((environment[name] for name in names if name in environment), "")


def _split(address: str) -> SplitResult | None:
    """A proxy that gRPC can use: plain HTTP, with a host."""
    try:
        proxy = urlsplit(address)
        usable = proxy.scheme == "http" and bool(proxy.hostname) and proxy.port != 0
    except ValueError:  # a port that is none, or half an IPv6 address
        return None
    return proxy if usable else None
