"""The dangerous instants of a process, counted: so that it can be killed at the seventeenth.

A power cut hurts between two changes of the disk. Each change that a process is about to make is a
*moment*: a file opened for writing, written to, cut, synced, renamed or removed, a folder made, a
statement of SQL. Left alone, a process goes through nearly the same moments in every run, so that
"killed at moment 17" can be played again, which "killed after 1.3 seconds" cannot.

The kill is SIGKILL, sent by the process to itself: nothing of Python or C runs after it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

__all__ = ["Counted", "KilledAt", "KilledIn"]

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class KilledAt:
    """A fault: the process ends at its ``number``-th moment, before what it was about to do.

    Args:
        number: from 1.
    """

    number: int

    def __call__(self) -> None:
        """Lay the fuse."""
        seen = 0

        def moment() -> None:
            nonlocal seen
            seen += 1
            if seen == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

        _watch(moment)


@dataclass(frozen=True)
class KilledIn:
    """A fault: the process ends as it calls a method.

    Args:
        owner: ``module:Class``.
        method: of the class.
        call: which one, from 1.
    """

    owner: str
    method: str
    call: int

    def __call__(self) -> None:
        """Lay the fuse."""
        module, _, name = self.owner.partition(":")
        owner, calls = getattr(import_module(module), name), count(1)
        real = getattr(owner, self.method)

        def method(*arguments: Any, **options: Any) -> Any:
            if next(calls) == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, self.method, method)


@dataclass(frozen=True)
class Counted:
    """No fault: notes how many moments a process has been through.

    Args:
        path: of a file that holds the number, always.
    """

    path: Path

    def __call__(self) -> None:
        """Begin to count."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        seen, write = 0, os.pwrite

        def moment() -> None:
            nonlocal seen
            seen += 1
            write(handle, b"%d" % seen, 0)

        _watch(moment)

    def read(self) -> int:
        """The number."""
        return int(self.path.read_bytes())


def _watch(moment: Callable[[], None]) -> None:
    """Have ``moment`` called before every change of the disk that this process makes."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & _WRITING):
            moment()

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real_connect(*arguments, **options)
        connection.set_trace_callback(lambda _: moment())
        return connection

    # There are no audit events of the rest.
    real_connect, sqlite3.connect = sqlite3.connect, connect  # type: ignore[assignment]
    for name in ("write", "fsync"):
        setattr(os, name, _watched(getattr(os, name), moment))
    sys.addaudithook(audit)


def _watched(real: Callable[..., Any], moment: Callable[[], None]) -> Callable[..., Any]:
    def watched(handle: int, *arguments: Any) -> Any:
        mode = os.fstat(handle).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # and not a pipe or a socket
            moment()
        return real(handle, *arguments)

    return watched
