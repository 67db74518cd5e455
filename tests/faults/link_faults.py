"""Faults that concern the link alone: a Grid and a node in this process, a proxy between them."""

from __future__ import annotations

import time
from pathlib import Path

from common.link.codec import CHUNK_BYTES
from server.grid import LinkGrid
from tests.faults.network import PATIENCE, Counted, joined, linked, until
from tests.faults.proxy import Cut, Proxy, Way

LARGE = 2_000_000  # float32 numbers: eight chunks
_LARGE_BYTES = 4 * LARGE
_BESIDE = 256 * 1024  # bytes of headers, acknowledgements and keep-alive beside a payload


def reset_while_idle(_: Path) -> float:
    """Reset between two rounds."""
    with linked() as line:
        line.proxy.cut()
        return line.ask()


def _reset_within(way: Way) -> float:
    with linked() as line:
        before = line.proxy.carried(way)
        line.proxy.cut_after(way, _LARGE_BYTES * 5 // 8)
        asked = line.begin(LARGE)
        until(lambda: line.proxy.connections[0].ended, "the cut")
        cut = time.monotonic()
        seconds = asked.answered() - cut
        carried = line.proxy.carried(way) - before
        assert carried < _LARGE_BYTES + CHUNK_BYTES + _BESIDE, f"{carried} bytes went {way.value}"
        assert line.work.calls == 1
        return seconds


def reset_within_request(_: Path) -> float:
    """Reset within a chunk of a request."""
    return _reset_within(Way.DOWN)


def reset_within_reply(_: Path) -> float:
    """Reset within a chunk of a reply."""
    return _reset_within(Way.UP)


def _cut_both_ways(proxy: Proxy) -> None:
    for way in Way:
        proxy.cut_after(way, 3 * CHUNK_BYTES)


def resets_again_and_again(_: Path) -> float:
    """Reset every three chunks, both ways: no message of eight ever gets through in one piece."""
    with linked() as line:
        proxy = line.proxy
        _cut_both_ways(proxy)
        asked, cuts = line.begin(LARGE), 0
        while not asked.done:
            if proxy.standing == 0:
                cuts += 1
                _cut_both_ways(proxy)
                until(lambda: proxy.standing, "a new connection")
            time.sleep(0.001)
        asked.answered()
        assert cuts >= 4
        assert line.work.calls == 1
        return (asked.ended - asked.began) / (cuts + 1)


def holder_told(_: Path) -> float:
    """The holder's end is reset, the coordinator's stays open: it comes back as a second one."""
    with linked() as line:
        line.proxy.half_open(Way.DOWN)
        return line.ask()


def coordinator_told(_: Path) -> float:
    """The coordinator's end is reset, the holder's stays open: only keep-alive can tell it."""
    with linked(keepalive=1.0) as line:
        line.proxy.half_open(Way.UP)
        return line.ask()


def nobody_told(_: Path) -> float:
    """Both ends stay open while a reply is due."""
    with linked(keepalive=1.0) as line:
        line.work.seconds = 0.5
        asked = line.begin()
        until(lambda: line.work.calls == 1, "the request")
        line.proxy.cut(Cut.SILENCE)
        cut = time.monotonic()
        seconds = asked.answered() - cut
        assert line.work.calls == 1
        return seconds


def silence_within_request(_: Path) -> float:
    """A middlebox forgets the connection within a chunk; nobody is told."""
    with linked(keepalive=1.0) as line:
        before = line.proxy.carried(Way.DOWN)
        line.proxy.cut_after(Way.DOWN, _LARGE_BYTES * 5 // 8, Cut.SILENCE)
        asked = line.begin(LARGE)
        until(lambda: line.proxy.connections[0].ended, "the silence")
        cut = time.monotonic()
        seconds = asked.answered() - cut
        carried = line.proxy.carried(Way.DOWN) - before
        assert carried < _LARGE_BYTES + CHUNK_BYTES + _BESIDE, f"{carried} bytes went down"
        assert line.work.calls == 1
        return seconds


def trickle(_: Path) -> float:
    """Twelve chunks a deadline: request and reply, of sixteen each, take nearly three of them."""
    deadline = 2.0
    with linked() as line:
        line.proxy.slow(rate=12 * CHUNK_BYTES / deadline)
        asked = line.begin(2 * LARGE, timeout=deadline)
        seconds = asked.answered() - asked.began
        assert seconds > 2 * deadline
        return seconds


def delay(_: Path) -> float:
    """300 ms each way, and up to 200 more."""
    with linked() as line:
        line.proxy.slow(delay=0.3, jitter=0.2)
        seconds = max(line.ask() for _ in range(2))
        assert len(line.proxy.connections) == 1
        return seconds


def idle_and_kept_alive(_: Path) -> float:
    """A middlebox cuts what is idle for two seconds; keep-alive is below that."""
    with linked(Counted(4.5), idle_limit=2.0, keepalive=1.0) as line:
        asked = line.begin()
        seconds = asked.answered() - line.work.ended
        assert len(line.proxy.connections) == 1, "it was cut"
        return seconds


def idle_and_cut(_: Path) -> float:
    """The same with keep-alive above that: cut in mid round, and the round is not lost."""
    with linked(Counted(3.0), idle_limit=1.0) as line:
        asked = line.begin()
        seconds = asked.answered() - line.work.ended
        assert len(line.proxy.connections) > 1, "it was not cut"
        assert line.work.calls == 1
        return seconds


def tarpit(_: Path) -> float:
    """What answers at the address accepts and says nothing; then the coordinator is back."""
    with linked() as line:
        line.proxy.freeze()
        line.proxy.cut(Cut.RESET)
        until(lambda: line.proxy.standing > 0, "an attempt to connect")
        line.proxy.cut(Cut.SILENCE)  # the attempt stays where it is
        line.proxy.thaw()
        return line.ask()


def new_address(_: Path) -> float:
    """A name leads from 127.0.0.1 to ::1."""
    with LinkGrid("127.0.0.1:0", keys=None) as old, joined(old.port, Counted(), "localhost"):
        old.wait_for_holders(1, PATIENCE)
        old.stop()
        with LinkGrid(f"[::1]:{old.port}", keys=None) as new:
            begin = time.monotonic()
            new.wait_for_holders(1, PATIENCE)
            return time.monotonic() - begin
