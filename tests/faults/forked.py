"""Real processes that start in a fraction of a second: copies of one that has imported everything.

``sotto`` takes four seconds of a processor to import torch, Flower and Opacus; hundreds of starts
need a shorter way. multiprocessing's fork server imports them once (:mod:`tests.faults.zygote`) and
forks a process for every start. Such a process is as real as any: it has a pid, a session and a log
of its own, shares no memory that is written to, and SIGKILL ends it at whatever instant. Its exit
code comes back through the fork server, which is its parent. What a module draws by chance when it
is imported would be the same in all of them, and is drawn anew (:func:`_draw_anew`).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import common.flower
from tests.integration.processes import Process
from tests.mutants import MUTANTS

__all__ = ["Fault", "Program", "started", "warm_up"]

Program = Callable[..., object]
"""A function of a module; what it raises or exits with is the process's exit code."""

Fault = Callable[[], object]
"""Called in a new process before its program: what is to go wrong with it, from inside."""

MUTANT: str | None = None
"""Of :mod:`tests.mutants`: how the code of every process that starts is broken."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.zygote"])

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Handle:
    """What :class:`tests.integration.processes.Process` needs of a process.

    Args:
        process: started.
    """

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended in this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def started(
    name: str, folder: Path, program: Program, *arguments: Any, faults: Iterable[Fault] = ()
) -> Process:
    """Run a function in a process of its own.

    Args:
        name: of the process; its output goes to ``NAME.log`` in ``folder``.
        folder: of the log.
        program: to run.
        arguments: of it.
        faults: what goes wrong with it.
    """
    log = folder / f"{name}.log"
    log.touch()
    # A daemon in multiprocessing's sense: ended, and not waited for, when pytest ends.
    process = _CONTEXT.Process(
        target=_run,
        args=(log, MUTANT, tuple(faults), program, arguments),
        name=name,
        daemon=True,
    )
    process.start()
    return Process(name, _Handle(process), log)


def warm_up() -> None:
    """Wait until the fork server has imported everything, where seconds are to be measured."""
    process = _CONTEXT.Process(target=int)
    process.start()
    process.join()


def _run(
    log: Path,
    mutant: str | None,
    faults: tuple[Fault, ...],
    program: Program,
    arguments: tuple[Any, ...],
) -> None:
    os.setsid()
    # Dies with the fork server, which dies with pytest: a test that is killed leaves nothing.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    _draw_anew()
    if mutant is not None:
        MUTANTS[mutant].apply(pytest.MonkeyPatch())  # never undone: the process ends
    for fault in faults:
        fault()
    program(*arguments)


def _draw_anew() -> None:
    """Message ids begin with a name that a process draws for itself."""
    assert hasattr(common.flower, "_PROCESS")
    common.flower._PROCESS = uuid4().hex
