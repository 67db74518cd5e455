"""The standard health service of gRPC (``grpc.health.v1``), for probes.

It says one thing: whether holders may join. ``SERVING`` while a run is on, ``NOT_SERVING`` once the
coordinator drains. grpcio-health-checking brings servicers too; they keep every name that a peer
asks about for ever, and as many watchers as come, so ours are other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthServicer, add_HealthServicer_to_server

from common.errors import LinkError
from common.link.identity import host_of
from server.link.admission import Admission
from server.link.door import Crowded, Door

__all__ = ["SERVICES", "AdmittedProbes", "Health", "HealthPage", "OpenProbes"]

SERVICES = ("", "sotto.link.v1.Federation")
"""Names that may be asked about: everything, and the service that holders join."""

LOOK_EVERY = 0.5  # seconds between two looks of a watcher
_MOST_WATCHERS = 8  # that stay; more are turned away
_MOST_OF_ONE = 2  # of one holder
_WORKERS = _MOST_WATCHERS + 4  # a watcher keeps a thread, and who only checks needs one, too

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 16384),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_allowed_incoming_connections", 64),
    ("grpc.server_handshake_timeout_ms", 5000),
    ("grpc.max_connection_idle_ms", 30000),
    ("grpc.compression_enabled_algorithms_bitset", 1),
)
"""Of a port where anybody may knock; a probe needs one short stream."""


_AioContext = grpc.aio.ServicerContext[Any, Any]


class Health:
    """Whether holders may join: at first not. Safe on any thread and in a signal handler."""

    def __init__(self) -> None:
        self._serving = False

    def serve(self) -> None:
        """From now on they may."""
        self._serving = True

    def drain(self) -> None:
        """From now on they may not any more."""
        self._serving = False

    def of(self, service: str) -> pb.HealthCheckResponse | None:
        """The answer about a service; None where there is none of that name."""
        if service not in SERVICES:
            return None
        response = pb.HealthCheckResponse
        status = response.SERVING if self._serving else response.NOT_SERVING
        return response(status=status)


def _unknown() -> pb.HealthCheckResponse:
    return pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN)


class AdmittedProbes(HealthServicer):  # type: ignore[misc]
    """The service on the coordinator's own port: for holders on the roster, as their certificate.

    Args:
        health: what to say.
        admission: who may ask.
    """

    def __init__(self, health: Health, admission: Admission) -> None:
        self._health, self._admission = health, admission
        self._watchers, self._of_one = Door(_MOST_WATCHERS), Door(_MOST_OF_ONE)

    async def Check(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: _AioContext
    ) -> pb.HealthCheckResponse:
        """One answer."""
        await self._admit(context)
        response = self._health.of(request.service)
        if response is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return response

    async def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: _AioContext
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """An answer now and at every change."""
        name = await self._admit(context) or context.peer()
        try:
            with self._watchers.entered(""), self._of_one.entered(name):
                before = None
                while before is None or before.status != before.SERVICE_UNKNOWN:
                    response = self._health.of(request.service) or _unknown()
                    if response != before:
                        yield response
                    before = response
                    await asyncio.sleep(LOOK_EVERY)
        except Crowded:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watch already")

    async def _admit(self, context: _AioContext) -> str:
        try:
            return self._admission.admit(context.auth_context()).name
        except LinkError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise  # not reached: abort() raises


class OpenProbes(HealthServicer):  # type: ignore[misc]
    """The service for whoever reaches a port of its own, or a socket.

    Args:
        health: what to say.
    """

    def __init__(self, health: Health) -> None:
        self._health = health
        self._room = threading.Semaphore(_MOST_WATCHERS)

    def Check(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> pb.HealthCheckResponse:
        """One answer."""
        response = self._health.of(request.service)
        if response is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return response

    def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.HealthCheckResponse]:
        """An answer now and at every change."""
        if not self._room.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watch already")
        try:
            before = None
            while context.is_active() and (
                before is None or before.status != before.SERVICE_UNKNOWN
            ):
                response = self._health.of(request.service) or _unknown()
                if response != before:
                    yield response
                before = response
                time.sleep(LOOK_EVERY)
        finally:
            self._room.release()


class HealthPage:
    """A port of its own for probes without a certificate, in plain text.

    It runs on threads of its own, so that whoever knocks there does not hold up holders.

    Args:
        listen: ``HOST:PORT``; port 0 takes a free one.
        health: what to say.
    """

    def __init__(self, listen: str, health: Health) -> None:
        self._listen = listen
        self._server = grpc.server(
            ThreadPoolExecutor(_WORKERS, thread_name_prefix="sotto-health"),
            options=_OPTIONS,
            maximum_concurrent_rpcs=2 * _WORKERS,
        )
        add_HealthServicer_to_server(OpenProbes(health), self._server)

    def start(self) -> str:
        """Listen.

        Returns:
            The address.

        Raises:
            LinkError: it cannot be used.
        """
        host = host_of(self._listen)
        try:
            port = self._server.add_insecure_port(self._listen)
        except RuntimeError:
            raise LinkError(
                f"cannot listen on {self._listen} for health probes: the port is taken, or {host} "
                "is not an address of this machine; choose another with --health"
            ) from None
        self._server.start()
        return f"{host}:{port}"

    def stop(self) -> None:
        """Close at once."""
        self._server.stop(None).wait()
