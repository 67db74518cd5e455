"""A federation on loopback whose processes may be killed, frozen and started again.

with World(folder, ("clinic-1", "clinic-2")) as world:
    world.serve("--rounds", 20)
    world.join("clinic-1")
    world.join("clinic-2")
    world.wait_for_round(3)
    world.kill("clinic-1")
    world.join("clinic-1")
    assert world.end_of(COORDINATOR) == 0
    world.leave()
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from common.tasks import load
from server.runs import RunFolder
from tests.faults.forked import Fault, Program, started
from tests.faults.holder import Seat, join
from tests.integration.federation import PATIENCE, SOURCE, Federation, lines
from tests.integration.processes import Process, wait_until

__all__ = ["COORDINATOR", "ENDED_BY_KILL", "TASK", "World", "sotto_main"]

COORDINATOR = "coordinator"
TASK = "medical-diagnosis"
ENDED_BY_KILL = -signal.SIGKILL
"""The exit code, as the standard library has it."""


class World:
    """One federation, and the processes that run for it.

    Args:
        folder: for everything.
        names: of the holders; each plays the source's part of its name.
        policy: what holders allow, beside a budget that fits all that tests ask.
        seed: of the holders' randomness.
        parts: a folder for what holders give to masked sums; None to keep nothing.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        policy: dict[str, Any] | None = None,
        seed: int = 0,
        parts: Path | None = None,
    ) -> None:
        self.names = tuple(names)
        self.federation = Federation(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.federation.enrol(*names)
        self.processes: dict[str, Process] = {}
        self._policy = policy or {}
        self._seed = seed
        self._parts = parts
        self._starts = count(1)

    # -- processes ---------------------------------------------------------------------------

    def serve(self, *flags: object, faults: Iterable[Fault] = ()) -> Process:
        """Start the coordinator: `sotto serve`, as it is.

        Args:
            flags: of the plan.
            faults: what goes wrong with the process, from inside.
        """
        words = (
            "serve", TASK, "--source", SOURCE, "--state", self.federation.coordinator,
            "--listen", f"127.0.0.1:{self.federation.port}", *flags,
        )  # fmt: skip
        arguments = [str(word) for word in words]
        return self.start(COORDINATOR, sotto_main, arguments, faults=faults)

    def join(self, name: str, *, faults: Iterable[Fault] = (), **different: Any) -> Process:
        """Start a holder.

        Args:
            name: of it.
            faults: what goes wrong with the process, from inside.
            different: fields of its :class:`Seat`, such as ``server``.
        """
        return self.start(name, join, replace(self.seat(name), **different), faults=faults)

    def seat(self, name: str) -> Seat:
        """What a holder is started with."""
        return Seat(
            name,
            f"127.0.0.1:{self.federation.port}",
            self.federation.holder(name),
            self._notes(name),
            TASK,
            SOURCE,
            self._policy,
            self._seed,
            parts=self._parts,
        )

    def start(
        self, name: str, program: Program, *arguments: Any, faults: Iterable[Fault] = ()
    ) -> Process:
        """Start any program as the coordinator or one of the holders.

        Args:
            name: whom it stands for.
            program: a function of a module.
            arguments: of it.
            faults: what goes wrong with the process, from inside.
        """
        log, folder = f"{name}-{next(self._starts)}", self.federation.folder
        running = started(log, folder, program, *arguments, faults=faults)
        self.pid_file(name).write_text(str(running.handle.pid))
        self.processes[name] = running
        return running

    def pid_file(self, name: str) -> Path:
        """A file with the pid that a coordinator or holder has now."""
        return self.federation.folder / f"{name}.pid"

    def kill(self, *names: str) -> None:
        """SIGKILL, to all of them before any is waited for."""
        for name in names:
            self.processes[name].handle.kill()
        for name in names:
            self.processes[name].handle.wait()

    def freeze(self, name: str) -> None:
        """SIGSTOP: it does nothing until :meth:`thaw`, and its connections stay."""
        self.processes[name].handle.send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        self.processes[name].handle.send_signal(signal.SIGCONT)

    def is_frozen(self, name: str) -> bool:
        """Whether a process has stopped at SIGSTOP."""
        stat = Path(f"/proc/{self.processes[name].handle.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"  # proc(5): the state is field 3

    def end_of(self, name: str, timeout: float = PATIENCE) -> int:
        """Wait until a process has ended by itself, and return its exit code."""
        running = self.processes[name]
        wait_until(
            lambda: running.handle.poll() is not None, f"the end of {running.name}",
            timeout=timeout,
        )  # fmt: skip
        return running.wait(0)

    def leave(self) -> None:
        """End every holder as an operator would; each must end well."""
        staying = [self.processes[name] for name in self.names if name in self.processes]
        for holder in staying:  # one that has just been started knows no signals yet
            wait_until(partial(getattr, holder, "output"), f"a word of {holder.name}")
            holder.handle.send_signal(signal.SIGTERM)
        for holder in staying:
            assert holder.wait(PATIENCE) == 0, holder.last_words()

    def wait_for_round(self, number: int, timeout: float = PATIENCE) -> None:
        """Wait until a round is in ``metrics.jsonl``."""
        wait_until(
            lambda: any(line["round"] >= number for line in self.rounds()), f"round {number}",
            timeout=timeout, watching=[self.processes[COORDINATOR]],
        )  # fmt: skip

    def said(self, name: str) -> str:
        """Everything that a coordinator or holder said, over all its starts."""
        logs = sorted(self.federation.folder.glob(f"{name}-*.log"), key=_start_of)
        return "".join(log.read_text(errors="replace") for log in logs)

    def close(self) -> None:
        """End whatever still runs."""
        for running in self.processes.values():
            running.handle.kill()
        for running in self.processes.values():
            running.handle.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is not None:
            for running in self.processes.values():
                error.add_note(f"--- {running.name} said last:\n{running.last_words()}")

    # -- what they left ----------------------------------------------------------------------

    @property
    def everybody(self) -> tuple[str, ...]:
        """Names of all that may run."""
        return (COORDINATOR, *self.names)

    @property
    def run(self) -> RunFolder:
        """The run; there must be one, and one only."""
        (run,) = self._begun
        return run

    @property
    def finished(self) -> bool:
        """Whether a run is over: its model is there, and what a restart would need is gone."""
        return any(
            (run.path / "model.safetensors").exists() and not run.rounds_done for run in self._begun
        )

    @property
    def _begun(self) -> list[RunFolder]:
        """A coordinator that is killed before it has written the plan has begun nothing."""
        return [run for run in self.federation.runs if (run.path / "plan.toml").exists()]

    def rounds(self) -> list[dict[str, Any]]:
        """The run's complete lines of ``metrics.jsonl``."""
        return [line for run in self._begun for line in lines(run.path / "metrics.jsonl")]

    def parameters(self) -> npt.NDArray[np.float32]:
        """Of the run's released model."""
        return np.asarray(self.run.result(load(TASK, SOURCE)).parameters)

    def shown(self, name: str) -> list[dict[str, Any]]:
        """Every model that a holder was shown: kind of request, round, sha256."""
        return lines(self._notes(name))

    def _notes(self, name: str) -> Path:
        """Not in the holder's own folder, which some tests fill or take away."""
        return self.federation.folder / f"{name}.shown.jsonl"


def sotto_main(words: Iterable[str]) -> None:
    """The ``sotto`` command."""
    from sotto.cli import main

    main(list(words))


def _start_of(log: Path) -> int:
    return int(log.stem.rpartition("-")[2])
