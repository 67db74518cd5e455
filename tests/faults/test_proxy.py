"""The proxy does to plain sockets what it is told, and nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.faults.network import until
from tests.faults.proxy import Cut, Proxy, Way

PATIENCE = 20.0  # seconds after which a peer that should have heard something has failed
SILENT = 0.2  # seconds in which a peer must hear nothing


class Peers:
    """Both ends of one connection through a proxy."""

    def __init__(self, proxy: Proxy, listener: socket.socket) -> None:
        self.near = socket.create_connection(("127.0.0.1", proxy.port), PATIENCE)
        self.far, _ = listener.accept()
        self.far.settimeout(PATIENCE)

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    with Proxy(listener.getsockname()) as proxy:
        yield proxy


@pytest.fixture
def peers(proxy: Proxy, listener: socket.socket) -> Iterator[Peers]:
    peers = Peers(proxy, listener)
    yield peers
    peers.close()


def heard(peer: socket.socket, count: int) -> bytes:
    """The next ``count`` bytes, fewer if the connection ends before."""
    pieces = b""
    while len(pieces) < count and (piece := peer.recv(count - len(pieces))):
        pieces += piece
    return pieces


def hears_nothing(peer: socket.socket) -> bool:
    """Neither a byte nor an end."""
    peer.settimeout(SILENT)
    try:
        peer.recv(1)
    except TimeoutError:
        return True
    finally:
        peer.settimeout(PATIENCE)
    return False


def is_reset(peer: socket.socket) -> bool:
    try:
        while peer.recv(1024):
            pass
    except ConnectionResetError:
        return True
    return False


# What it carries


def test_bytes_and_ends_pass_both_ways_unchanged(proxy: Proxy, peers: Peers) -> None:
    blob = bytes(range(256)) * 4096  # 1 MiB: more than all buffers on the way
    for source, sink in ((peers.near, peers.far), (peers.far, peers.near)):
        sending = threading.Thread(target=source.sendall, args=(blob,))
        sending.start()
        assert heard(sink, len(blob)) == blob
        sending.join()
    peers.near.shutdown(socket.SHUT_WR)
    assert peers.far.recv(1) == b""
    peers.far.sendall(b"last words")
    peers.far.close()
    assert heard(peers.near, 100) == b"last words"
    until(lambda: proxy.standing == 0, "the end of the connection")
    (traffic,) = proxy.connections
    assert (traffic.up, traffic.down, traffic.ended) == (len(blob), len(blob) + 10, True)
    assert proxy.carried(Way.DOWN) == len(blob) + 10


def test_a_reset_passes(peers: Peers, proxy: Proxy) -> None:
    peers.near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peers.near.close()
    assert is_reset(peers.far)


def test_an_upstream_that_refuses_resets(proxy: Proxy, listener: socket.socket) -> None:
    listener.close()
    address = ("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionResetError), socket.create_connection(address, PATIENCE) as near:
        near.recv(1)  # connecting may already have failed


# Cuts


@pytest.mark.parametrize("way", Way)
def test_a_cut_after_n_bytes_is_exact(proxy: Proxy, peers: Peers, way: Way) -> None:
    source, sink = (peers.near, peers.far) if way is Way.UP else (peers.far, peers.near)
    source.sendall(b"before")
    assert heard(sink, 6) == b"before"
    proxy.cut_after(way, 70_001, Cut.FIN)
    blob = bytes(200) * 1000
    sending = threading.Thread(target=send, args=(source, blob), daemon=True)
    sending.start()
    assert heard(sink, len(blob)) == blob[:70_001]
    assert getattr(proxy.connections[0], way.value) == 70_007
    assert proxy.standing == 0


def test_a_cut_counts_all_connections_and_ends_one(
    proxy: Proxy, peers: Peers, listener: socket.socket
) -> None:
    other = Peers(proxy, listener)
    proxy.cut_after(Way.UP, 10)
    peers.near.sendall(b"123456")
    assert heard(peers.far, 6) == b"123456"
    other.near.sendall(b"123456")
    assert is_reset(other.near)
    assert is_reset(other.far)
    assert proxy.carried(Way.UP) == 10
    peers.near.sendall(b"once only")
    assert heard(peers.far, 9) == b"once only"
    other.close()


def test_a_cut_is_heard_at_both_ends_as_it_was_meant(proxy: Proxy, listener: socket.socket) -> None:
    reset = Peers(proxy, listener)
    assert proxy.cut() == 1
    assert is_reset(reset.near)
    assert is_reset(reset.far)
    finished = Peers(proxy, listener)
    assert proxy.cut(Cut.FIN) == 1
    assert finished.near.recv(1) == finished.far.recv(1) == b""
    silent = Peers(proxy, listener)
    assert proxy.cut(Cut.SILENCE) == 1
    silent.near.sendall(b"anybody?")
    assert hears_nothing(silent.far)
    assert hears_nothing(silent.near)
    assert proxy.cut() == proxy.standing == 0
    for peers in (reset, finished, silent):
        peers.close()


@pytest.mark.parametrize("dead", Way)
def test_half_open_means_that_one_end_is_not_told(proxy: Proxy, peers: Peers, dead: Way) -> None:
    told, untold = (peers.far, peers.near) if dead is Way.UP else (peers.near, peers.far)
    assert proxy.half_open(dead) == 1
    assert is_reset(told)
    untold.sendall(b"anybody?")
    assert hears_nothing(untold)


def test_an_idle_connection_is_cut_and_a_busy_one_is_not(listener: socket.socket) -> None:
    with Proxy(listener.getsockname(), idle_limit=0.3) as proxy:
        idle, busy = Peers(proxy, listener), Peers(proxy, listener)
        idle.near.settimeout(0.01)
        ended = False
        while not ended:
            busy.near.sendall(b".")
            assert heard(busy.far, 1) == b"."
            try:
                idle.near.recv(1)
            except TimeoutError:
                continue
            except ConnectionResetError:
                ended = True
        busy.far.sendall(b"still here")
        assert heard(busy.near, 10) == b"still here"
        idle.close()
        busy.close()


# Slow and frozen


def test_what_is_frozen_waits_and_arrives(proxy: Proxy, peers: Peers) -> None:
    proxy.freeze(Way.UP)
    peers.near.sendall(b"waits")
    peers.near.shutdown(socket.SHUT_WR)
    assert hears_nothing(peers.far)
    peers.far.sendall(b"the other way is open")
    assert heard(peers.near, 21) == b"the other way is open"
    proxy.thaw()
    assert heard(peers.far, 100) == b"waits"


def test_no_reset_passes_a_partition(proxy: Proxy, peers: Peers) -> None:
    proxy.freeze()
    peers.near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peers.near.close()
    assert hears_nothing(peers.far)
    proxy.thaw()
    assert is_reset(peers.far)


def test_who_connects_in_a_partition_is_heard_after_it(
    proxy: Proxy, listener: socket.socket
) -> None:
    proxy.freeze()
    with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE) as near:
        near.sendall(b"hello")
        listener.settimeout(SILENT)
        with pytest.raises(TimeoutError):
            listener.accept()
        listener.settimeout(PATIENCE)
        proxy.thaw()
        far, _ = listener.accept()
        with far:
            assert heard(far, 5) == b"hello"


def test_a_delay_holds_up_each_piece_and_a_rate_all_of_them(proxy: Proxy, peers: Peers) -> None:
    # Lower bounds only: a slow machine cannot break them.
    proxy.slow(Way.UP, delay=0.1, jitter=0.1)
    begin = time.monotonic()
    peers.near.sendall(b"1")
    assert heard(peers.far, 1) == b"1"
    assert time.monotonic() - begin >= 0.1
    proxy.slow()
    proxy.slow(Way.DOWN, rate=20_000)
    begin = time.monotonic()
    peers.far.sendall(bytes(6000))
    assert len(heard(peers.near, 6000)) == 6000
    assert time.monotonic() - begin >= 0.2  # 5000 bytes of it; after the last one nobody waits


def test_pieces_stay_in_order_whatever_the_jitter(proxy: Proxy, peers: Peers) -> None:
    proxy.slow(jitter=0.02)
    for number in range(50):
        peers.near.sendall(bytes([number]))
    assert heard(peers.far, 50) == bytes(range(50))


# Connecting


def test_it_refuses_stalls_and_listens_again_on_its_port(
    proxy: Proxy, peers: Peers, listener: socket.socket
) -> None:
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), PATIENCE)
    peers.near.sendall(b"stands")
    assert heard(peers.far, 6) == b"stands"
    proxy.listen()
    proxy.stall()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as near:
        near.sendall(b"hello")
        assert hears_nothing(near)
        proxy.listen()
        far, _ = listener.accept()
        with far:
            assert heard(far, 5) == b"hello"
    assert proxy.port == port


def test_later_connections_go_where_the_upstream_has_moved(proxy: Proxy, peers: Peers) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as elsewhere:
        proxy.move(elsewhere.getsockname()[:2])
        moved = Peers(proxy, elsewhere)
        moved.near.sendall(b"new")
        peers.near.sendall(b"old")
        assert heard(moved.far, 3) == b"new"
        assert heard(peers.far, 3) == b"old"
        moved.close()


def test_an_http_proxy_goes_where_it_is_asked_to(listener: socket.socket) -> None:
    host, port = listener.getsockname()
    with (
        Proxy(None) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), PATIENCE) as near,
    ):
        near.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\n\r\nhello".encode())
        far, _ = listener.accept()
        with far:
            assert heard(far, 5) == b"hello"
            far.sendall(b"there")
        assert near.recv(12) == b"HTTP/1.1 200"
        assert heard(near, 1000).endswith(b"\r\n\r\nthere")


def test_an_http_proxy_says_that_nobody_is_there(listener: socket.socket) -> None:
    host, port = listener.getsockname()
    listener.close()
    with (
        Proxy(None) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), PATIENCE) as near,
    ):
        near.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\n\r\n".encode())
        assert heard(near, 1000).startswith(b"HTTP/1.1 502")


def test_an_http_proxy_does_nothing_else() -> None:
    with (
        Proxy(None) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), PATIENCE) as near,
    ):
        near.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert is_reset(near)


def send(peer: socket.socket, data: bytes) -> None:
    """Send as much as can be sent."""
    with suppress(OSError):
        peer.sendall(data)
