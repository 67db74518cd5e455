"""Peers that do what no honest one does, by the dozen, on one event loop.

Strangers have no certificate that the coordinator accepts; each function is one way to be a
nuisance, from connecting until the coordinator closes the connection.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from common.link.keys import HolderKeys

__all__ = ["STRANGERS", "Crowd", "Stranger", "Target"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # 11 of 517 bytes
_PATIENCE = 60.0  # seconds that a nuisance waits for the other end to close


@dataclass(frozen=True)
class Target:
    """What strangers attack, and what they have.

    Args:
        port: of loopback.
        certificate: PEM file with a key and a certificate that the coordinator does not accept.
    """

    port: int
    certificate: Path

    def tls(self, *, certificate: bool) -> ssl.SSLContext:
        """Of a client that believes everybody."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        if certificate:
            context.load_cert_chain(self.certificate)
        return context

    @classmethod
    def of(cls, port: int, keys: HolderKeys) -> Target:
        """With a holder's certificate, which may be revoked or another federation's."""
        path = keys.folder / "both.pem"
        path.write_bytes(b"".join(keys.identity()))
        return cls(port, path)


Stranger = Callable[[Target], Awaitable[None]]


async def _connected(
    target: Target, *sent: bytes, tls: ssl.SSLContext | None = None, pause: float = 0.0
) -> None:
    """Connect, send some things, and wait until the other end closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, ssl=tls)
    try:
        for part in sent:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        async with asyncio.timeout(_PATIENCE):
            while await reader.read(65536):
                pass
    finally:
        writer.transport.abort()


async def half_open(target: Target) -> None:
    """Connects and says nothing."""
    await _connected(target)


async def garbage(target: Target) -> None:
    """Sends noise where TLS is due."""
    await _connected(target, random.Random(target.port).randbytes(4096))


async def web_browser(target: Target) -> None:
    """Speaks HTTP where TLS is due."""
    await _connected(target, b"GET / HTTP/1.1\r\nHost: coordinator\r\n\r\n")


async def plain_http2(target: Target) -> None:
    """Speaks HTTP/2 where TLS is due."""
    await _connected(target, _PREFACE + _SETTINGS)


async def slow_hello(target: Target) -> None:
    """Begins TLS a byte at a time, and never ends."""
    await _connected(target, *(bytes([byte]) for byte in _CLIENT_HELLO), pause=0.2)


async def no_certificate(target: Target) -> None:
    """Gets through TLS with nothing to show, as far as it can."""
    await _connected(target, _PREFACE + _SETTINGS, tls=target.tls(certificate=False))


async def wrong_certificate(target: Target) -> None:
    """Shows a certificate that is revoked, or of another federation."""
    await _connected(target, _PREFACE + _SETTINGS, tls=target.tls(certificate=True))


async def silent_after_tls(target: Target) -> None:
    """Gets through TLS and says nothing."""
    await _connected(target, tls=target.tls(certificate=True))


async def garbage_after_tls(target: Target) -> None:
    """Gets through TLS and sends noise where HTTP/2 is due."""
    noise = random.Random(target.port).randbytes(65536)
    await _connected(target, noise, tls=target.tls(certificate=True))


STRANGERS: Mapping[str, Stranger] = {
    stranger.__name__: stranger
    for stranger in (
        *(half_open, garbage, web_browser, plain_http2, slow_hello, no_certificate),
        *(wrong_certificate, silent_after_tls, garbage_after_tls),
    )
}
"""Name → nuisance."""


@dataclass
class Crowd:
    """Many strangers at once, who come back as soon as they are thrown out.

    Args:
        target: of all of them.
        size: how many connections at the same time.
        kinds: of strangers, in turn.
        again: whether they come back.
    """

    target: Target
    size: int
    kinds: Mapping[str, Stranger] = field(default_factory=lambda: STRANGERS)
    again: bool = True
    attempts: Counter[str] = field(default_factory=Counter)
    """Connections that were begun, by kind."""
    ended: Counter[str] = field(default_factory=Counter)
    """Connections that the other end closed or refused, by kind."""

    async def rage(self) -> None:
        """Until cancelled, or until all are thrown out and do not come back."""
        names = cycle(self.kinds)
        await asyncio.gather(*(self._one(next(names)) for _ in range(self.size)))

    async def _one(self, kind: str) -> None:
        while True:
            self.attempts[kind] += 1
            with suppress(OSError, TimeoutError):
                await self.kinds[kind](self.target)
            self.ended[kind] += 1
            if not self.again:
                return
            await asyncio.sleep(0.1)

    def __enter__(self) -> Crowd:
        """Rage on a thread until the block ends."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        self._task = self._loop.create_task(self.rage())
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(asyncio.sleep(0.1))  # transports close in the next turns
        self._loop.close()

    def __exit__(self, *_: object) -> None:
        if not self._loop.is_closed():
            with suppress(RuntimeError):  # it ended by itself just now
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(_PATIENCE)
