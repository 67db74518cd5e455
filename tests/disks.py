"""Disks that let a process down: each of its writes in turn fails, or is its last.

The functions of :mod:`os` that write are replaced, so what is broken is the disk and not the code
on top of it. SQLite writes by itself; :class:`BrokenLedger` breaks around it.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import StorageError
from common.privacy.ledger import Ledger

__all__ = ["BrokenLedger", "Crash", "Disk", "filled", "small_disk"]

WRITES = ("open", "write", "pwrite", "fsync", "ftruncate", "replace", "mkdir", "posix_fallocate")
CLEANING = ("unlink", "rmdir", "rename", "utime", "close")


class Crash(BaseException):
    """The process is gone: nothing that it would have done next is done."""


class Disk:
    """Counts writes, and fails from a given one on, or at this one only.

    Args:
        patch: replaces the functions.
        folder: whose files are on this disk; others are not touched.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = str(folder)
        self._handles: set[int] = set()
        self.writes = 0
        self.fails: Callable[[int], BaseException | None] = lambda number: None
        for name in (*WRITES, *CLEANING):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    def full_at(self, number: int, code: int = errno.ENOSPC) -> None:
        """The write of this number finds no room, and all after it do."""
        failure = OSError(code, os.strerror(code))
        self._from(lambda n: failure if n == number else None)

    def crash_at(self, number: int) -> None:
        """The process dies before the write of this number."""
        self._from(lambda n: Crash() if n >= number else None)

    def works(self) -> None:
        """Everything can be written again."""
        self._from(lambda n: None)

    def _from(self, fails: Callable[[int], BaseException | None]) -> None:
        self.writes, self.fails = 0, fails

    def step(self) -> None:
        """A write."""
        self.writes += 1
        if (failure := self.fails(self.writes)) is not None:
            raise failure

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **rest: Any) -> Any:
            mine = target in self._handles if isinstance(target, int) else self._is_here(target)
            harmless = name == "close" or (
                name == "open" and not args[0] & (os.O_WRONLY | os.O_RDWR)
            )
            if mine and not harmless:
                self.step()
            result = real(target, *args, **rest)
            if name == "open" and mine:
                self._handles.add(result)
            if name == "close":
                self._handles.discard(target)
            return result

        return call

    def _is_here(self, target: Any) -> bool:
        return os.fspath(target).startswith(self._folder)


class BrokenLedger:
    """A ledger on such a disk: each transaction is a write before it, and one after it.

    Args:
        ledger: the real one.
        disk: that it is on.
    """

    def __init__(self, ledger: Ledger, disk: Disk) -> None:
        self._ledger, self._disk = ledger, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    def reserve(self, *args: Any) -> Any:
        return self._between(self._ledger.reserve, *args)

    def commit(self, *args: Any) -> Any:
        return self._between(self._ledger.commit, *args)

    def _between(self, act: Callable[..., Any], *args: Any) -> Any:
        self._write()
        result = act(*args)
        self._write()
        return result

    def _write(self) -> None:
        try:
            self._disk.step()
        except OSError as error:
            raise StorageError(f"the ledger cannot be used ({error})") from error


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of its own that is soon full; skips where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "sotto-test", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs; an injected ENOSPC is tested beside")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def filled(disk: Path) -> Path:
    """A file that takes all the room that is left."""
    path = disk / "filler"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    return path
