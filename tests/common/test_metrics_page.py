from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.error import HTTPError

import pytest

from common.errors import LinkError
from common.metrics_page import MetricsPage

PATIENCE = 20.0


@contextmanager
def serving(
    listen: str = "0", text: bytes = b"figures 1\n", patience: float = PATIENCE
) -> Iterator[str]:
    page = MetricsPage(listen, lambda: text, "text/plain", patience)
    try:
        yield page.start()
    finally:
        page.stop()


def read(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=PATIENCE) as response:
        assert response.headers["Content-Type"] == "text/plain"
        return response.read()


def test_the_page_is_read_again_and_again() -> None:
    with serving() as address:
        assert [read(address), read(address)] == [b"figures 1\n"] * 2


def test_a_port_alone_is_of_loopback() -> None:
    with serving("0") as address:
        assert address.startswith("http://127.0.0.1:")
        assert address.endswith("/metrics")


def test_nothing_else_is_there() -> None:
    with serving() as address:
        with pytest.raises(HTTPError, match="404") as missing:
            urllib.request.urlopen(address.replace("metrics", "keys"), timeout=PATIENCE)
        missing.value.close()
        assert read(address + "?format=text") == b"figures 1\n"


def port_of(address: str) -> int:
    return int(address.removesuffix("/metrics").rpartition(":")[2])


def test_whoever_says_nothing_does_not_keep_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        serving(patience=0.2) as address,
        socket.create_connection(("127.0.0.1", port_of(address))) as silent,
    ):
        silent.sendall(b"GET /metr")
        assert read(address) == b"figures 1\n"
    assert capsys.readouterr().err == ""


def test_nor_does_whoever_says_a_little_at_a_time() -> None:
    """A reader before the honest one drips bytes of a header that never ends."""
    over = threading.Event()

    def drip(reader: socket.socket) -> None:
        with suppress(OSError):  # hung up on
            reader.sendall(b"GET /metrics HTTP/1.1\r\n")
            while not over.wait(0.05):
                reader.sendall(b"a")

    with (
        serving(patience=0.5) as address,
        socket.create_connection(("127.0.0.1", port_of(address))) as reader,
    ):
        dripping = threading.Thread(target=drip, args=(reader,), daemon=True)
        dripping.start()
        try:
            assert read(address) == b"figures 1\n"
        finally:
            over.set()
            dripping.join()


def test_a_page_that_is_closed_waits_for_no_reader() -> None:
    """One that asked, and takes nothing of a text that is larger than all buffers between."""
    asked = threading.Event()

    def render() -> bytes:
        asked.set()
        return bytes(2**26)

    page = MetricsPage("0", render, "text/plain", patience=600.0)
    with socket.create_connection(("127.0.0.1", port_of(page.start()))) as reader:
        reader.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert asked.wait(PATIENCE)
        stopping = threading.Thread(target=page.stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()


@pytest.mark.parametrize("listen", ["here", "host:", ":80", "host:99999"])
def test_an_address_that_is_none_is_a_sentence(listen: str) -> None:
    with pytest.raises(LinkError, match="is not an address"):
        MetricsPage(listen, bytes, "text/plain")


def test_an_address_that_is_taken_is_a_sentence() -> None:
    with serving() as address:
        taken = address.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(LinkError, match="choose another address with --metrics"):
            MetricsPage(taken, bytes, "text/plain").start()
