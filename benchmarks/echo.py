"""The floor: bytes to two processes and back over gRPC streams with TLS, and nothing else.

What remains of a round when everything but the network is taken away. This module is also the
process at the other end: ``python -m benchmarks.echo HOST:PORT STATE``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

from benchmarks.loopback import HOLDERS, Loopback
from common.link.channels import channel_options, server_options
from common.link.codec import CHUNK_BYTES
from common.link.keys import HolderKeys
from common.link.tls import channel_credentials, server_credentials

__all__ = ["echo_rounds"]

_SERVICE, _METHOD = "sotto.benchmarks.Echo", "Join"
_END = b""  # ends a message
_SECONDS = 60.0  # to join, and for any chunk to arrive


@dataclass(frozen=True)
class _Line:
    """One connected process."""

    outbox: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)
    inbox: SimpleQueue[bytes] = field(default_factory=SimpleQueue)

    def send(self, chunks: Iterable[bytes]) -> None:
        for chunk in (*chunks, _END):
            self.outbox.put(chunk)

    def receive(self) -> int:
        return sum(map(len, iter(lambda: self.inbox.get(timeout=_SECONDS), _END)))

    def close(self) -> None:
        self.outbox.put(None)


def echo_rounds(folder: Path, parameters: int, rounds: int) -> list[float]:
    """Seconds from sending ``4 * parameters`` bytes to both processes until both are back.

    Args:
        folder: for keys and logs.
        parameters: float32 numbers in the message.
        rounds: how many to time; one more is run before them, to warm up.
    """
    loopback = Loopback.under(folder)
    joined: SimpleQueue[_Line] = SimpleQueue()
    chunks = _chunks(bytes(4 * parameters))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(HOLDERS)))
        server = grpc.server(pool, options=server_options())
        server.add_generic_rpc_handlers((_handler(joined),))
        port = server.add_secure_port("127.0.0.1:0", server_credentials(loopback.keys))
        server.start()
        stack.callback(lambda: server.stop(None).wait())
        stack.enter_context(loopback.holders("benchmarks.echo", port))
        lines = [joined.get(timeout=_SECONDS) for _ in HOLDERS]
        for line in lines:
            stack.callback(line.close)
        return [_exchange(lines, chunks, 4 * parameters) for _ in range(rounds + 1)][1:]


def _exchange(lines: list[_Line], chunks: list[bytes], size: int) -> float:
    begin = time.perf_counter()
    for line in lines:
        line.send(chunks)
    received = [line.receive() for line in lines]
    seconds = time.perf_counter() - begin
    assert received == [size] * len(lines), f"{received} of {size} bytes came back"
    return seconds


def _handler(joined: SimpleQueue[_Line]) -> Any:
    def join(incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        del context
        line = _Line()
        threading.Thread(target=_drain, args=(incoming, line.inbox), daemon=True).start()
        joined.put(line)
        yield from iter(line.outbox.get, None)

    method: Any = grpc.stream_stream_rpc_method_handler(join)
    return grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method})


def _drain(incoming: Iterator[bytes], inbox: SimpleQueue[bytes]) -> None:
    try:
        for chunk in incoming:
            inbox.put(chunk)
    except grpc.RpcError:
        pass  # the end of the benchmark


def _chunks(message: bytes) -> list[bytes]:
    return [message[start : start + CHUNK_BYTES] for start in range(0, len(message), CHUNK_BYTES)]


def serve_echo(server: str, state: Path) -> None:
    """Send every message back once it is complete, as a holder does."""
    credentials = channel_credentials(HolderKeys.load(state))
    outbox: SimpleQueue[bytes] = SimpleQueue()
    with grpc.secure_channel(server, credentials, options=channel_options()) as channel:
        join: Any = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")
        message: list[bytes] = []
        for chunk in join(iter(outbox.get, None)):
            message.append(chunk)
            if chunk == _END:
                for each in message:
                    outbox.put(each)
                message = []


if __name__ == "__main__":
    serve_echo(sys.argv[1], Path(sys.argv[2]))
