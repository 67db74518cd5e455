"""Two hundred holders of one coordinator: rounds per second, memory, and what a frozen one delays.

    python benchmarks/many_holders.py --json -
    python benchmarks/many_holders.py --holders 40 --processes 4 --rounds 20 --json -

The coordinator is this process: the round loop, checkpoint, journal and metrics of every round, and
mutual TLS with a certificate for each holder. Holders live several to a process, each with a
connection of its own, and answer every request at once with an update of zeros. Three runs follow
one another:

* ``all``: everybody answers;
* ``stopped``: one process with its holders stands still (SIGSTOP) for a few rounds in the middle;
* ``frozen``: one holder takes every request and answers none.

The program fails where a round waits longer than the plan's deadline and --slack for its replies,
where an update that was sent does not count, or where a silent holder is not named in the summary
of a round.

This module is also the holders: ``python -m benchmarks.many_holders HOST:PORT FOLDER NAME ...``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.footprint import Footprint
from benchmarks.loopback import ROOT, Loopback
from benchmarks.noop import NoTask
from client.node import Node
from common.flower import quiet_flower, set_identity
from common.link.keys import HolderKeys
from common.plan import TrainingPlan
from common.settings import plan_for
from common.wire import TrainReply, round_of
from server.app import federate
from server.grid import LinkGrid
from server.runs import RunFolder
from server.summaries import RoundSummary
from tests.integration.processes import Process, process

PARAMETERS = 31
"""As many as the logistic regression of the soak has."""

FROZEN = "frozen"
"""The run in which the first holder answers nothing."""

MEGABYTE = 2**20
WARM_UP = 5


# -- holders ---------------------------------------------------------------------------------------


def answer(message: Message, *, freezes: bool) -> Message:
    """An update of zeros; or, of a holder that freezes, in that run, nothing for ever.

    Args:
        message: the request.
        freezes: whether this holder does.
    """
    run_id, _ = round_of(message.content.config_records["config"])
    if freezes and run_id == FROZEN:
        threading.Event().wait()
    reply = TrainReply(np.zeros(PARAMETERS, dtype=np.float32), 1.0)
    return Message(reply.records(), reply_to=message)


def be_holders(server: str, folder: Path, names: Sequence[str]) -> None:
    """Be several holders until SIGTERM, each with its own certificate and connection."""
    set_identity(1)
    nodes = []
    for name in names:
        keys = HolderKeys.load(folder / name)
        handler = partial(answer, freezes=name == holder_names(1)[0])
        nodes.append(Node(server, handler, keys=keys))
    threads = [threading.Thread(target=node.run, daemon=True) for node in nodes]
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # one of them may never end
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def holder_names(count: int) -> list[str]:
    """Of so many holders."""
    return [f"holder-{number:03d}" for number in range(1, count + 1)]


# -- the coordinator -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silence:
    """Who does not answer, and when.

    Args:
        names: of holders.
        rounds: in which they are silent from the beginning.
    """

    names: frozenset[str] = frozenset()
    rounds: range = range(0)


@dataclass
class Run:
    """What a run came to.

    Args:
        silence: that was made.
        summaries: of its rounds.
        ends: when each was over, in seconds; the first is when the first round began.
        processor: seconds of this process's threads, by then.
        resident: bytes that this process held, before and after.
    """

    silence: Silence
    summaries: list[RoundSummary] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def note(self) -> None:
        """Another round is over, or the first begins."""
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())

    def weigh(self) -> None:
        """Note what this process holds; it takes as long as a small round."""
        self.resident.append(Footprint.of(os.getpid()).resident)

    @property
    def seconds(self) -> list[float]:
        """Of each round, from one durable checkpoint to the next."""
        return [end - begin for begin, end in pairwise(self.ends)]

    def faults(self, names: Sequence[str], deadline: float, slack: float) -> list[str]:
        """What is not as it should be; none where all is well.

        Args:
            names: of all holders.
            deadline: seconds, of the plan.
            slack: seconds more that the system may take.
        """
        found = []
        for summary in self.summaries:
            silent = self.silence.names if summary.round in self.silence.rounds else frozenset()
            if (seconds := _waited(summary)) > deadline + slack:
                found.append(f"round {summary.round} waited for {seconds:.2f} s")
            if unnamed := silent - summary.missed.keys():
                found.append(f"round {summary.round} does not say that {min(unnamed)} missed it")
            # Those that were stopped may take a round or two to come back.
            lost = set(names) - self.silence.names - set(summary.accepted)
            if lost:
                why = summary.missed.get(min(lost), "no reason given")
                found.append(f"round {summary.round} lost {min(lost)}: {why}")
        return found

    def document(self, names: Sequence[str], deadline: float, slack: float) -> dict[str, Any]:
        """For JSON: seconds and megabytes."""
        seconds = self.seconds[min(WARM_UP, len(self.seconds) // 2) :]
        silent = [s for s in self.summaries if s.round in self.silence.rounds]
        processor = (self.processor[-1] - self.processor[0]) / len(self.seconds)
        return {
            "rounds": len(self.seconds),
            "silent": len(self.silence.names),
            "rounds_with_silence": len(silent),
            "rounds_per_second": round(len(seconds) / sum(seconds), 2),
            "median_s": round(statistics.median(seconds), 4),
            "p95_s": round(float(np.percentile(seconds, 95)), 4),
            "longest_s": round(max(self.seconds), 4),
            "longest_waited_s": round(max(map(_waited, self.summaries)), 4),
            "phases_median_s": self._phases(),
            "coordinator_processor_s_a_round": round(processor, 4),
            "accepted_fewest": min(len(summary.accepted) for summary in self.summaries),
            "accepted_last": len(self.summaries[-1].accepted),
            "resident_mb": [round(held / MEGABYTE, 1) for held in self.resident],
            "faults": self.faults(names, deadline, slack),
        }

    def _phases(self) -> dict[str, float]:
        """Median seconds of each phase."""
        names = {name for summary in self.summaries for name in summary.phases}
        return {
            name: round(statistics.median(s.phases.get(name, 0.0) for s in self.summaries), 4)
            for name in sorted(names)
        }


def _waited(summary: RoundSummary) -> float:
    """Seconds that a round waited for holders: all that a silent one can make longer."""
    return summary.phases["wait"] + summary.phases["exchange"]


@dataclass(frozen=True)
class Crowd:
    """A coordinator in this process, and the holders that have joined it.

    Args:
        loopback: everybody's keys and folders.
        grid: reaches the holders.
        plan: of every run.
        processes: the holders', each with the names that live in it.
    """

    loopback: Loopback
    grid: LinkGrid
    plan: TrainingPlan
    processes: tuple[tuple[Process, tuple[str, ...]], ...]

    @classmethod
    @contextmanager
    def started(
        cls, folder: Path, plan: TrainingPlan, names: Sequence[str], processes: int
    ) -> Iterator[Crowd]:
        """Start the processes, and stop them when the block ends.

        Args:
            folder: for everything durable.
            plan: of every run.
            names: of the holders.
            processes: that they are spread over.
        """
        quiet_flower()
        loopback = Loopback.under(folder, names)
        extensions = plan.deadline_extensions
        with ExitStack() as stack:
            grid = LinkGrid("127.0.0.1:0", keys=loopback.keys, deadline_extensions=extensions)
            port = grid.start()
            stack.callback(grid.stop)
            running = []
            for number in range(processes):
                several = tuple(names[number::processes])
                role = (sys.executable, "-m", "benchmarks.many_holders")
                command = (*role, f"127.0.0.1:{port}", str(folder), *several)
                started = process(f"holders-{number + 1}", command, folder, working=ROOT)
                running.append((stack.enter_context(started), several))
            grid.wait_for_holders(len(names), timeout=600.0)
            yield cls(loopback, grid, plan, tuple(running))

    def run(self, name: str, rounds: int, silence: Silence | None = None) -> Run:
        """Have everybody take part in a run.

        Args:
            name: of the run; of :data:`FROZEN`, in which the first holder never answers.
            rounds: of it.
            silence: who will not answer in it.
        """
        plan = self.plan.model_copy(update={"rounds": rounds})
        folder = RunFolder.begin(self.loopback.coordinator / "runs" / name, plan)
        run = Run(silence or Silence())

        def on_round(summary: RoundSummary) -> None:
            run.summaries.append(summary)
            if name != FROZEN:
                self._stop(run.silence, summary.round + 1)
            run.note()

        run.weigh()
        run.note()
        federate(self.grid, plan, NoTask(PARAMETERS), folder, on_round)
        run.weigh()
        return run

    def _stop(self, silence: Silence, number: int) -> None:
        """Stop or continue whole processes, as they should be in a round."""
        for running, names in self.processes:
            if silence.names >= set(names):
                if number == silence.rounds.start:
                    running.handle.send_signal(signal.SIGSTOP)
                elif number == silence.rounds.stop:
                    running.handle.send_signal(signal.SIGCONT)


def measure(
    folder: Path, holders: int, processes: int, rounds: int, hindered: int, deadline: float
) -> dict[str, Run]:
    """The three runs, by name.

    Args:
        folder: for everything durable.
        holders: how many.
        processes: that they are spread over.
        rounds: of the first run, in which everybody answers.
        hindered: rounds of each of the others.
        deadline: seconds, of a round.
    """
    names = holder_names(holders)
    settings = {
        "rounds": rounds,
        "epsilon": 8.0,
        "evaluate": "never",
        "min_holders": holders // 2,
        "round_deadline": deadline,
    }
    plan = plan_for(NoTask(PARAMETERS), settings, holders=holders)
    with Crowd.started(folder, plan, names, processes) as crowd:
        quiet = crowd.run("all", rounds)
        together = frozenset(crowd.processes[-1][1])
        middle = range(hindered // 3 + 1, 2 * hindered // 3 + 1)
        stopped = crowd.run("stopped", hindered, Silence(together, middle))
        crowd.grid.wait_for_holders(holders, timeout=600.0)
        alone = Silence(frozenset(names[:1]), range(1, hindered + 1))
        return {"all": quiet, "stopped": stopped, FROZEN: crowd.run(FROZEN, hindered, alone)}


# -- the program -----------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:] and ":" in sys.argv[1]:
        be_holders(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--holders", type=int, default=200)
    parser.add_argument("--processes", type=int, default=8, help="that they are spread over")
    parser.add_argument("--rounds", type=int, default=100, help="in which everybody answers")
    parser.add_argument("--hindered", type=int, default=12, help="of each of the other two runs")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds, of a round")
    parser.add_argument("--slack", type=float, default=1.0, help="seconds beyond, for the system")
    parser.add_argument("--json", help="write there; - for standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sotto-many-") as folder:
        runs = measure(
            Path(folder), options.holders, options.processes, options.rounds, options.hindered,
            options.deadline,
        )  # fmt: skip
    judged = {"deadline": options.deadline, "slack": options.slack}
    names = holder_names(options.holders)
    document = {
        "holders": options.holders,
        "processes": options.processes,
        "deadline_s": options.deadline,
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "runs": {name: run.document(names, **judged) for name, run in runs.items()},
    }
    text = json.dumps(document, indent=2) + "\n"
    if options.json and options.json != "-":
        Path(options.json).write_text(text)
    else:
        sys.stdout.write(text)
    faults = [
        f"{name}: {each}" for name, run in runs.items() for each in run.faults(names, **judged)
    ]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
