"""Real processes, for integration tests and benchmarks: started, watched, and always stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

__all__ = ["Handle", "Process", "free_port", "process", "wait_until"]

_T = TypeVar("_T")
_POLL = 0.1  # seconds
_GRACE = 15.0  # seconds between asking a process to stop and making it
_LAST_LINES = 60


def free_port() -> int:
    """A TCP port of loopback that nobody listens on.

    Another process may take it before it is used: prefer a server's own port 0 where it has one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Handle(Protocol):
    """Of a process, as :class:`subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, or None while it runs; of a signal that ended it, the negative."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; raises subprocess.TimeoutExpired."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


@dataclass(frozen=True)
class Process:
    """A running process whose output goes to a file.

    Args:
        name: for messages.
        handle: of the process; it leads a process group of its own.
        log: both of its outputs.
    """

    name: str
    handle: Handle
    log: Path

    @property
    def output(self) -> str:
        """Everything it has said so far."""
        return self.log.read_text(errors="replace")

    def says(self, text: str) -> bool:
        """Whether ``text`` is in its output."""
        return text in self.output

    def require_alive(self) -> None:
        """Raise AssertionError if it has ended."""
        code = self.handle.poll()
        assert code is None, f"{self.name} ended with exit code {code}"

    def last_words(self) -> str:
        """The end of its output."""
        return "\n".join(self.output.splitlines()[-_LAST_LINES:])

    def wait(self, timeout: float) -> int:
        """Wait for its end and return the exit code."""
        return self.handle.wait(timeout)

    def stop(self) -> None:
        """Ask it to stop, wait, and end whatever is left of its process group."""
        self.handle.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.handle.wait(_GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.handle.pid, signal.SIGKILL)
        self.handle.wait()


@contextmanager
def process(
    name: str,
    command: Sequence[str | Path],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    working: Path | None = None,
) -> Iterator[Process]:
    """Run a command until the block ends.

    An error that leaves the block takes the end of the command's output along, as a note.

    Args:
        name: for messages; its output goes to ``NAME.log`` in ``folder``.
        command: program and arguments.
        folder: of the log.
        environment: variables beside those of this process.
        working: directory to start in.
    """
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        handle = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=working,
            # A group of its own: what it starts can be stopped with it, and Ctrl-C reaches only us.
            start_new_session=True,
        )
    running = Process(name, handle, log)
    try:
        yield running
    except Exception as error:
        error.add_note(f"--- {name} said last:\n{running.last_words()}")
        raise
    finally:
        running.stop()


def wait_until(
    condition: Callable[[], _T],
    what: str,
    *,
    timeout: float = 60.0,
    watching: Sequence[Process] = (),
) -> _T:
    """Wait for a condition and return its (true) value.

    Args:
        condition: asked again and again.
        what: is awaited, for the message.
        timeout: seconds.
        watching: processes that must not end meanwhile.

    Raises:
        AssertionError: a process ended, or the time is over.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        for running in watching:
            running.require_alive()
        assert time.monotonic() < deadline, f"waited {timeout:g} s in vain for {what}"
        time.sleep(_POLL)
    return value
