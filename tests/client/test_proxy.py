"""Joining through an HTTP proxy, as gRPC offers it: CONNECT, and TLS from end to end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.node import Connected, Disconnected
from common.link.keys import CoordinatorKeys, HolderKeys
from server.grid import LinkGrid
from tests.faults.proxy import Proxy
from tests.linking import PATIENCE, ask, enrol, running, sign_with, text_of

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.create_or_load(tmp_path / "coordinator")


@pytest.fixture
def keys(coordinator: CoordinatorKeys, tmp_path: Path) -> HolderKeys:
    return enrol(tmp_path / "a", coordinator, "a")


@pytest.fixture
def grid(coordinator: CoordinatorKeys) -> Iterator[LinkGrid]:
    with LinkGrid("localhost:0", keys=coordinator) as grid:
        yield grid


def test_a_holder_joins_through_the_proxy_and_says_so(
    grid: LinkGrid, keys: HolderKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(None) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        with running(grid.port, sign_with("a"), keys=keys) as runner:
            connected = runner.wait_for(Connected)
            assert connected == Connected("a", "sotto", f"127.0.0.1:{proxy.port}")
            (reply,) = grid.send_and_receive([ask("a", "hello")], timeout=PATIENCE)
        assert len(proxy.connections) == 1
    # The name in the certificate was checked against the server's, not the proxy's.
    assert text_of(reply) == "hello a"


def test_a_host_in_no_proxy_is_connected_to_directly(
    grid: LinkGrid, keys: HolderKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(None) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "localhost")
        with running(grid.port, keys=keys) as runner:
            assert runner.wait_for(Connected) == Connected("a", "sotto")
        assert proxy.connections == []


def test_plain_text_never_leaves_the_machine_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Proxy(None) as proxy, LinkGrid("localhost:0", keys=None) as grid:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        with running(grid.port, name="a") as runner:
            assert runner.wait_for(Connected) == Connected("a", "sotto")
        assert proxy.connections == []


@contextmanager
def refusing(answer: bytes) -> Iterator[int]:
    """A proxy that answers every request like this."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.recv(4096)
                        peer.sendall(answer)
            except OSError:
                return  # the listener is closed

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "(it answers 403); have it allow CONNECT to"),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "wants a name and a password"),
        (b"", "or at the proxy"),
    ],
    ids=["403", "407", "closed"],
)
def test_a_proxy_that_refuses_is_a_sentence(
    answer: bytes,
    sentence: str,
    grid: LinkGrid,
    keys: HolderKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refusing(answer) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with running(grid.port, keys=keys) as runner:
            gone = runner.wait_for(Disconnected)
            assert isinstance(gone, Disconnected)
            assert sentence in gone.reason
            assert f"the proxy 127.0.0.1:{port}" in gone.reason
            # It was tried again, and goes through once the proxy lets it.
            monkeypatch.delenv("https_proxy")
            runner.wait_for(Connected)
