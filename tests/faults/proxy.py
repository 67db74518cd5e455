"""A TCP proxy that does to connections what networks do.

It stands between holders and their coordinator on loopback, on a thread of the test's process.
Everything it does is ordered by the test, by byte count where that matters; what is random
follows a seed::

    with Proxy(("127.0.0.1", grid.port)) as proxy:
        ...                                   # holders join at proxy.port
        proxy.cut_after(Way.DOWN, 1_000_000)  # a reset within a chunk of the next request
        proxy.freeze()                        # a cable is pulled; nobody is told
        proxy.thaw()                          # and put back: what waited arrives

A *connection* is accepted from one peer, the near one, and continued to the upstream, the far one.
Bytes go *up* from near to far, and *down* from far to near.
"""

from __future__ import annotations

import asyncio
import fcntl
import random
import socket
import struct
import termios
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self, TypeVar

__all__ = ["Address", "Cut", "Proxy", "Traffic", "Way"]

_T = TypeVar("_T")
Address = tuple[str, int]

_PIECE = 8 * 1024  # bytes that are read at once
_PIECES = 8  # that wait in a connection, each way
_ROOM = 16 * 1024  # bytes of each socket's buffer: what is under way must not hide in the kernel
_SEGMENT = 1400  # bytes; as on an ordinary network
_BACKLOG = 64
_TICK = 0.05  # seconds between two pieces where the rate is limited
_DRAIN = 2.0  # seconds for the last bytes before a cut to reach their peer
_MOST_HEAD = 16 * 1024  # bytes of a CONNECT request
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing discards what waits and sends RST


class Way(Enum):
    """A direction, and the end that it leads to."""

    UP = "up"
    DOWN = "down"

    @property
    def back(self) -> Way:
        """The other one."""
        return Way.DOWN if self is Way.UP else Way.UP


class Cut(Enum):
    """What a peer hears of the end of its connection.

    RESET and FIN are what TCP says aloud. SILENCE says nothing: the peer goes on as if the
    connection stood, and nothing that it writes arrives.
    """

    RESET = "reset"
    FIN = "fin"
    SILENCE = "silence"


@dataclass(frozen=True)
class Traffic:
    """What one connection has carried.

    Args:
        up: bytes that were handed to the far peer.
        down: bytes that were handed to the near peer.
        ended: whether it is over.
    """

    up: int
    down: int
    ended: bool


class Proxy:
    """Forwards connections until told otherwise. All methods may be called from any thread.

    Args:
        upstream: where connections are continued; None for an HTTP proxy, which continues each to
            the address that it asks for with CONNECT.
        seed: of the jitter.
        idle_limit: seconds without a byte either way after which a connection is cut.
        idle_cut: how.
    """

    def __init__(
        self,
        upstream: Address | None,
        *,
        seed: int = 0,
        idle_limit: float | None = None,
        idle_cut: Cut = Cut.RESET,
    ) -> None:
        self._upstream = upstream
        self._seed = seed
        self._idle_limit = idle_limit
        self._idle_cut = idle_cut
        self._port = 0
        self._lanes = {way: _Lane() for way in Way}
        self._connections: list[_Connection] = []
        self._listener: socket.socket | None = None
        self._acceptor: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="fault-proxy", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        self.thaw()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # What is seen

    @property
    def port(self) -> int:
        """Where it listens, at 127.0.0.1; the same after :meth:`refuse` and :meth:`listen`."""
        return self._port

    @property
    def connections(self) -> list[Traffic]:
        """Every connection that was accepted, oldest first."""
        return [connection.traffic for connection in list(self._connections)]

    @property
    def standing(self) -> int:
        """How many connections stand."""
        return sum(not each.ended for each in self.connections)

    def carried(self, way: Way) -> int:
        """Bytes that all connections together have handed on, one way."""
        return sum(getattr(each, way.value) for each in self.connections)

    # What is done to all connections, those that stand and later ones

    def slow(
        self, *ways: Way, delay: float = 0.0, jitter: float = 0.0, rate: float | None = None
    ) -> None:
        """Slow bytes down; without figures, undo that.

        Args:
            ways: which; both if left out.
            delay: seconds that each piece is under way.
            jitter: upper bound of what is added to that, drawn uniformly for each piece; pieces
                stay in order.
            rate: bytes a second, of each connection; None for as fast as the peers are.
        """
        for way in ways or Way:
            lane = self._lanes[way]
            lane.delay, lane.jitter, lane.rate = delay, jitter, rate

    def freeze(self, *ways: Way) -> None:
        """Let nothing through, not even the end of a connection, until :meth:`thaw`.

        Who connects meanwhile is heard by nobody before that either.
        """
        self._do(lambda: self._open(ways, False))

    def thaw(self, *ways: Way) -> None:
        """Let everything through that has waited."""
        self._do(lambda: self._open(ways, True))

    def cut_after(self, way: Way, count: int, cut: Cut = Cut.RESET) -> None:
        """Cut one connection as soon as exactly ``count`` more bytes have gone one way.

        The bytes of all connections count; the one that carries the last of them is cut.
        """

        def order() -> None:
            self._lanes[way].left, self._lanes[way].cut = count, cut

        self._do(order)

    # What is done to connections that stand

    def cut(self, cut: Cut = Cut.RESET) -> int:
        """Cut every connection; how many these were."""
        return self._call(self._end({Way.UP: cut, Way.DOWN: cut}))

    def half_open(self, dead: Way) -> int:
        """Reset every connection at one end; the other end is left talking to nobody.

        Args:
            dead: the end that is told.

        Returns:
            How many connections these were.
        """
        return self._call(self._end({dead: Cut.RESET, dead.back: Cut.SILENCE}))

    # What is done to later connections

    def refuse(self) -> None:
        """Stop listening: who connects is refused. Connections that stand are left alone."""
        self._do(self._stop_listening)

    def listen(self) -> None:
        """Listen, again or at all, and accept."""
        self._do(self._begin_listening)

    def stall(self) -> None:
        """Listen and accept nothing: who connects sees a connection on which nothing happens."""
        self._do(self._stop_accepting)

    def move(self, upstream: Address) -> None:
        """Continue later connections elsewhere."""
        self._upstream = upstream

    # The proxy's thread

    def _do(self, action: Callable[[], _T]) -> _T:
        async def act() -> _T:
            return action()

        return self._call(act())

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _open(self, ways: Iterable[Way], wanted: bool) -> None:
        for way in ways or Way:
            event = self._lanes[way].open
            event.set() if wanted else event.clear()

    def _begin_listening(self) -> None:
        if self._listener is None:
            self._listener = listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _shrink(listener)  # what it accepts inherits that
            listener.bind(("127.0.0.1", self._port))
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            self._port = listener.getsockname()[1]
        if self._acceptor is None:
            self._acceptor = self._loop.create_task(self._accept(self._listener))

    def _stop_accepting(self) -> None:
        if self._acceptor is not None:
            self._acceptor.cancel()
            self._acceptor = None

    def _stop_listening(self) -> None:
        self._stop_accepting()
        if self._listener is not None:
            self._loop.remove_reader(self._listener)  # before its number is another's
            self._listener.close()
            self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            near, _ = await self._loop.sock_accept(listener)
            connection = _Connection(near, self._lanes, f"{self._seed}/{len(self._connections)}")
            connection.task = self._loop.create_task(self._carry(connection))
            self._connections.append(connection)

    async def _carry(self, connection: _Connection) -> None:
        await connection.carry(lambda: self._upstream, self._idle_limit, self._idle_cut)

    async def _end(self, cuts: Mapping[Way, Cut]) -> int:
        ending = [each for each in self._connections if not each.traffic.ended]
        for connection in ending:
            connection.end(cuts)
        await asyncio.gather(*(each.task for each in ending if each.task is not None))
        return len(ending)

    async def _close(self) -> None:
        self._stop_listening()
        await self._end(dict.fromkeys(Way, Cut.RESET))
        for connection in self._connections:
            connection.close()


@dataclass
class _Lane:
    """One direction, of all connections; see :class:`Proxy` for the first three.

    Args:
        delay: seconds.
        jitter: seconds.
        rate: bytes a second, or None.
        open: cleared while nothing moves.
        left: bytes until the cut that was ordered; None without one.
        cut: how that one ends the connection.
    """

    delay: float = 0.0
    jitter: float = 0.0
    rate: float | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)
    left: int | None = None
    cut: Cut = Cut.RESET

    def take(self, waiting: int) -> tuple[int, bool]:
        """How many of the bytes that wait may go now, and whether a cut was ordered after them."""
        count = waiting if self.rate is None else min(waiting, max(1, int(self.rate * _TICK)))
        if self.left is None:
            return count, False
        count = min(count, self.left)
        self.left = self.left - count or None
        return count, self.left is None


class _CutHere(Exception):
    """Ends a connection from within."""

    def __init__(self, cut: Cut) -> None:
        super().__init__(cut)
        self.cuts = dict.fromkeys(Way, cut)


class _Connection:
    """Two sockets, and the bytes between them."""

    def __init__(self, near: socket.socket, lanes: Mapping[Way, _Lane], seed: str) -> None:
        self.task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._lanes = lanes
        self._random = {way: random.Random(f"{seed}/{way.value}") for way in Way}
        self._sockets = {Way.DOWN: near}  # by the way that leads there
        self._carried = dict.fromkeys(Way, 0)
        self._free = dict.fromkeys(Way, 0.0)  # when the next piece may go, where there is a rate
        self._last = self._loop.time()
        self._ordered: Mapping[Way, Cut] = {}
        self._ended = False

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._carried[Way.UP], self._carried[Way.DOWN], self._ended)

    def end(self, cuts: Mapping[Way, Cut]) -> None:
        """Cut the connection, which stands; done when its task is."""
        self._ordered = cuts
        assert self.task is not None
        self.task.cancel()

    def close(self) -> None:
        """Free the sockets of a connection that has ended."""
        for each in self._sockets.values():
            each.close()

    async def carry(
        self, upstream: Callable[[], Address | None], idle_limit: float | None, idle_cut: Cut
    ) -> None:
        """Forward both ways until both peers have ended, or one has failed, or it is cut.

        Args:
            upstream: where to; None for where the near peer asks.
            idle_limit: seconds; see :class:`Proxy`.
            idle_cut: how it ends then.
        """
        cuts: Mapping[Way, Cut] = dict.fromkeys(Way, Cut.RESET)
        try:
            await self._opened()
            await self._reach(upstream())
            watch = self._watch(idle_limit, idle_cut)
            await _until_first(_all(*map(self._pump, Way)), watch)
            cuts = dict.fromkeys(Way, Cut.FIN)
        except _CutHere as here:
            cuts = here.cuts
        except OSError:
            await self._opened()  # a reset is news too, and does not pass while nothing does
        except asyncio.CancelledError:
            cuts = self._ordered
        self._ended = True
        for way, cut in cuts.items():
            if way in self._sockets:
                _end(self._sockets[way], cut)

    async def _opened(self) -> None:
        for lane in self._lanes.values():
            await lane.open.wait()

    async def _reach(self, upstream: Address | None) -> None:
        if upstream is not None:
            await self._connect(upstream)
            return
        wanted = await self._asked_for()
        try:
            await self._connect(wanted)
        except OSError:
            await self._say(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            raise _CutHere(Cut.FIN) from None
        await self._say(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def _asked_for(self) -> Address:
        """Read a CONNECT request."""
        near, head = self._sockets[Way.DOWN], b""
        while b"\r\n\r\n" not in head:
            # One by one: what follows the request is not the proxy's.
            byte = await self._loop.sock_recv(near, 1)
            if not byte or len(head) > _MOST_HEAD:
                raise ConnectionError("no CONNECT request came")
            head += byte
        method, target, _ = head.split(maxsplit=2)
        if method != b"CONNECT":
            raise ConnectionError(f"{method!r} was asked for instead of CONNECT")
        host, _, port = target.decode().rpartition(":")
        return host.strip("[]"), int(port)

    async def _say(self, answer: bytes) -> None:
        await self._loop.sock_sendall(self._sockets[Way.DOWN], answer)

    async def _connect(self, upstream: Address) -> None:
        far = socket.socket(socket.AF_INET6 if ":" in upstream[0] else socket.AF_INET)
        self._sockets[Way.UP] = far
        far.setblocking(False)
        for each in self._sockets.values():
            _shrink(each)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._loop.sock_connect(far, upstream)

    async def _watch(self, limit: float | None, cut: Cut) -> None:
        while True:
            left = _LONG if limit is None else self._last + limit - self._loop.time()
            if left <= 0:
                raise _CutHere(cut)
            await asyncio.sleep(left)

    async def _pump(self, way: Way) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PIECES)
        await _all(self._read(way, pieces), self._write(way, pieces))

    async def _read(self, way: Way, pieces: asyncio.Queue[tuple[float, bytes]]) -> None:
        lane, due, piece = self._lanes[way], 0.0, b"-"
        while piece:
            piece = await self._loop.sock_recv(self._sockets[way.back], _PIECE)
            late = lane.delay + self._random[way].uniform(0.0, lane.jitter)
            due = max(due, self._loop.time() + late)
            await pieces.put((due, piece))

    async def _write(self, way: Way, pieces: asyncio.Queue[tuple[float, bytes]]) -> None:
        while True:
            due, piece = await pieces.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            if not piece:
                break
            await self._hand_on(way, memoryview(piece))
        await self._lanes[way].open.wait()
        self._sockets[way].shutdown(socket.SHUT_WR)

    async def _hand_on(self, way: Way, waiting: memoryview) -> None:
        lane, sink = self._lanes[way], self._sockets[way]
        while waiting:
            await lane.open.wait()
            count, last = lane.take(len(waiting))
            await self._loop.sock_sendall(sink, waiting[:count])
            self._carried[way] += count
            self._last = self._loop.time()
            waiting = waiting[count:]
            if last:
                await _drained(sink)
                raise _CutHere(lane.cut)
            if lane.rate is not None:
                # By a timetable: what one pause is too long, the next one is shorter.
                self._free[way] = max(self._free[way], self._last - _TICK) + count / lane.rate
                await asyncio.sleep(max(0.0, self._free[way] - self._last))


_LONG = 3600.0


def _shrink(each: socket.socket) -> None:
    """Have a peer's bytes wait with the peer and not in the kernel.

    Loopback's segments of 64 kB would make the peer's own send buffer as large as megabytes, too.
    """
    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        each.setsockopt(socket.SOL_SOCKET, option, _ROOM)


def _end(each: socket.socket, cut: Cut) -> None:
    """Have a peer hear of the end what ``cut`` says."""
    if cut is Cut.RESET:
        with suppress(OSError):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        each.close()
    elif cut is Cut.FIN:
        # To close it, with bytes of the peer unread, would reset it.
        with suppress(OSError):
            each.shutdown(socket.SHUT_WR)


async def _drained(each: socket.socket) -> None:
    """Wait until the peer's kernel has all bytes, which a reset would discard."""
    loop = asyncio.get_running_loop()
    patience = loop.time() + _DRAIN
    while loop.time() < patience:
        (waiting,) = struct.unpack("i", fcntl.ioctl(each, termios.TIOCOUTQ, b"\0" * 4))
        if not waiting:
            return
        await asyncio.sleep(0.001)


async def _all(*work: Coroutine[Any, Any, None]) -> None:
    """Run together until all have ended; the first failure cancels the others."""
    await _run(asyncio.FIRST_EXCEPTION, *work)


async def _until_first(*work: Coroutine[Any, Any, None]) -> None:
    """Run together until the first one ends or fails; the others are cancelled."""
    await _run(asyncio.FIRST_COMPLETED, *work)


async def _run(until: str, *work: Coroutine[Any, Any, None]) -> None:
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=until)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
