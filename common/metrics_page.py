"""A page of figures that a monitoring system reads over HTTP."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

from common.errors import LinkError
from common.link.identity import host_of

__all__ = ["MetricsPage"]

PATH = "/metrics"
_PATIENCE = 5.0  # seconds for a reader, so that nobody keeps the page to himself


class MetricsPage:
    """Serves one text at ``/metrics``, on a thread of its own, to one reader after the other.

    Args:
        listen: ``HOST:PORT``, or a port alone, which is then of loopback; 0 takes a free one.
        render: makes the text, on that thread.
        content_type: of the text.
        patience: seconds that a reader has, from its connection to the last byte of the text.

    Raises:
        LinkError: the address is none.
    """

    def __init__(
        self,
        listen: str,
        render: Callable[[], bytes],
        content_type: str,
        patience: float = _PATIENCE,
    ) -> None:
        self._listen = f"127.0.0.1:{listen}" if listen.isdecimal() else listen
        self._host = host_of(self._listen)
        self._handler = _handler(render, content_type)
        self._patience = patience
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Listen.

        Returns:
            The page's address.

        Raises:
            LinkError: it cannot be used.
        """
        port = int(self._listen.rpartition(":")[2])
        kind = _Server6 if ":" in self._host else _Server
        try:
            self._server = kind((self._host, port), self._handler, self._patience)
        except OSError as error:
            raise LinkError(
                f"cannot listen on {self._listen} for metrics ({error.strerror or error}); choose "
                "another address with --metrics"
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="sotto-metrics", daemon=True
        )
        self._thread.start()
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._server.server_address[1]}{PATH}"

    def stop(self) -> None:
        """Close, whoever is reading; safe if it was never started."""
        if self._server is not None and self._thread is not None:
            self._server.dismiss()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class _Server(socketserver.TCPServer):
    """Hangs up on a reader whose time is over.

    A time for each read or write would not do: a byte now and then keeps a connection for ever.
    """

    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[socketserver.BaseRequestHandler],
        patience: float,
    ) -> None:
        self._patience = patience
        self._lock = threading.Lock()
        self._reader: socket.socket | None = None
        self._dismissed = False
        super().__init__(address, handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if self._dismissed:
                return
            self._reader = request
        timer = threading.Timer(self._patience, self._hang_up, [request])
        timer.daemon = True
        timer.start()
        try:
            super().finish_request(request, client_address)
        finally:
            timer.cancel()
            with self._lock:
                self._reader = None

    def dismiss(self) -> None:
        """Hang up on the reader, and on all that come."""
        with self._lock:
            self._dismissed, reader = True, self._reader
        if reader is not None:
            self._hang_up(reader)

    def _hang_up(self, reader: socket.socket) -> None:
        with self._lock:  # a socket that is closed may have given its number to another
            if self._reader is reader:
                with suppress(OSError):  # the reader was faster
                    reader.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away, or is too slow, is nobody's business."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def _handler(render: Callable[[], bytes], content_type: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "sotto", ""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != PATH:
                self.send_error(404, f"the figures are at {PATH}")
                return
            text = render()
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            """A scrape is no news."""

    return Handler
