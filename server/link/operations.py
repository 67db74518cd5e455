"""A socket in the coordinator's state folder, for the people who run it.

The coordinator answers there what it is doing (``operations.proto``), and whether it is well
(:mod:`server.link.health`). The file is its owner's alone; there is no port. It runs on threads of
its own, so that nobody who asks holds up the link.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from common.errors import RunError, StateError
from common.link import operations_pb2 as pb
from common.link.operations_pb2_grpc import (
    OperationsServicer,
    OperationsStub,
    add_OperationsServicer_to_server,
)
from common.link.traffic import Traffic
from server.link.health import Health, OpenProbes
from server.status import HolderStatus, RoundStatus, Status

__all__ = ["Operations", "ask"]

SOCKET = "serve.socket"
ADDRESS = "serve.address"
"""Names the socket where the state folder's own path is too long for one."""

_LONGEST = 100
"""Bytes of a socket's path; Linux takes 107, macOS 103."""
_WORKERS = 12  # health's watchers keep one each
_PATIENCE = 5.0  # seconds for an answer


class Operations:
    """Answers on a socket in a state folder. Use it as a context manager.

    A socket that a killed process has left there is replaced; so only one coordinator may run in a
    folder, which its lock sees to.

    Args:
        state: the coordinator's folder.
        look: what to answer; called on any thread.
        health: of the link.
    """

    def __init__(self, state: Path, look: Callable[[], Status], health: Health) -> None:
        self._state = state.absolute()
        self._room: Path | None = None
        self._server = grpc.server(
            ThreadPoolExecutor(_WORKERS, thread_name_prefix="sotto-operations"),
            options=(("grpc.so_reuseport", 0),),
            maximum_concurrent_rpcs=2 * _WORKERS,
        )
        add_OperationsServicer_to_server(_Answers(look), self._server)  # type: ignore[no-untyped-call]
        add_HealthServicer_to_server(OpenProbes(health), self._server)

    def __enter__(self) -> Self:
        """Listen.

        Raises:
            StateError: no socket can be made.
        """
        try:
            self._listen()
        except (OSError, RuntimeError) as error:
            raise StateError(
                f"no socket for `sotto status` can be made in {self._state} "
                f"({type(error).__name__}); keep the state folder on a local disk"
            ) from None
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop(None).wait()
        self._remove_old()
        if self._room is not None:
            shutil.rmtree(self._room, ignore_errors=True)

    def _listen(self) -> None:
        self._remove_old()
        path = self._state / SOCKET
        if len(os.fsencode(path)) > _LONGEST:
            self._room = Path(tempfile.mkdtemp(prefix="sotto-"))  # its owner's alone
            path = self._room / SOCKET
            (self._state / ADDRESS).write_text(f"{path}\n")
        before = os.umask(0o177)  # from its first moment on nobody else may connect
        try:
            self._server.add_insecure_port(_target(path))
        finally:
            os.umask(before)
        path.chmod(0o600)

    def _remove_old(self) -> None:
        for name in (SOCKET, ADDRESS):
            (self._state / name).unlink(missing_ok=True)


class _Answers(OperationsServicer):
    def __init__(self, look: Callable[[], Status]) -> None:
        self._look = look

    def GetStatus(  # noqa: N802
        self, request: pb.StatusRequest, context: grpc.ServicerContext
    ) -> pb.Status:
        """What there is to see now."""
        del request, context
        return _to_message(self._look())


def ask(state: Path) -> Status:
    """What the coordinator of a state folder is doing.

    Args:
        state: its folder, on this machine.

    Raises:
        StateError: there is no such folder, or it may not be read.
        RunError: no coordinator runs there, or it does not answer.
    """
    path = _socket_of(state)
    with grpc.insecure_channel(_target(path)) as channel:
        stub = OperationsStub(channel)  # type: ignore[no-untyped-call]
        try:
            answer = stub.GetStatus(pb.StatusRequest(), timeout=_PATIENCE)
        except grpc.RpcError as error:
            raise _failure(state, error.code()) from None
    return _of_message(answer)


def _target(path: Path) -> str:
    """A socket as gRPC wants it named."""
    return f"unix:{quote(os.fsencode(path))}"


def _socket_of(state: Path) -> Path:
    if not state.is_dir():
        raise StateError(f"there is no folder {state}; give the --state of `sotto serve`")
    state = state.absolute()
    try:
        if (state / ADDRESS).exists():
            path = Path((state / ADDRESS).read_text().strip())
        else:
            path = state / SOCKET
        there = path.exists()
    except OSError as error:
        raise StateError(f"{state} cannot be read ({error.strerror})") from None
    if not there:
        raise _nobody(state)
    if not os.access(path, os.R_OK | os.W_OK):
        raise StateError(f"{path} is not yours; ask as the user that runs `sotto serve`")
    return path


def _failure(state: Path, code: grpc.StatusCode) -> RunError:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RunError(
            f"the coordinator of {state} is there and does not answer within {_PATIENCE:g} s; it "
            "is stopped, or its machine is overloaded"
        )
    return _nobody(state)  # the socket of a process that was killed


def _nobody(state: Path) -> RunError:
    return RunError(
        f"no coordinator runs with {state}; start one with `sotto serve`, or give its --state"
    )


# -- the message ----------------------------------------------------------------------------------


def _to_message(status: Status) -> pb.Status:
    written = {
        name: value
        for name, value in vars(status).items()
        if name not in ("recent", "holders", "traffic")
    }
    return pb.Status(
        **written,
        recent=[pb.Round(**vars(summary)) for summary in status.recent],
        holders=[pb.Holder(**vars(holder)) for holder in status.holders],
        traffic=pb.Traffic(**vars(status.traffic)),
    )


def _of_message(message: pb.Status) -> Status:
    return Status(
        **{
            field.name: getattr(message, field.name)
            for field in message.DESCRIPTOR.fields
            if field.name not in ("recent", "holders", "traffic")
        },
        recent=tuple(_round_of(summary) for summary in message.recent),
        holders=tuple(_holder_of(holder) for holder in message.holders),
        traffic=Traffic(**_values(message.traffic)),
    )


def _round_of(message: pb.Round) -> RoundStatus:
    values = _values(message)
    return RoundStatus(**{**values, "missed": dict(message.missed), "phases": dict(message.phases)})


def _holder_of(message: pb.Holder) -> HolderStatus:
    return HolderStatus(
        **{**_values(message), "since": message.since if message.HasField("since") else None}
    )


def _values(message: pb.Round | pb.Holder | pb.Traffic) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
