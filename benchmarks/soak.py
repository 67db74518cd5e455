"""Memory, descriptors and threads of `sotto serve` and four `sotto join` over thousands of rounds.

    python benchmarks/soak.py --rounds 10000 --json - --figure soak.png
    make soak                                           # 1,000 rounds

All processes are real and on this machine, with certificates on both sides, ledgers and budgets,
stored answers, checkpoints and the journal; the model is logistic regression on 30 numbers. What a
process holds is looked at again and again while rounds go by, and what it has *grown* by is found
from the rounds after the first 500: the larger of

* the median of the last tenth of the samples less that of the first tenth: a step;
* their slope (Theil and Sen's, the median of the slopes between pairs) over all rounds: a creep.

The program fails where a process grew by more than --bound, or where it came to have more
descriptors or threads: a file that is open for a moment does not count, so the fewest that were
seen in each tenth are compared. gRPC's pool of threads sizes itself, and takes one more when its
work is held up; a few more are let go.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import theilslopes

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.footprint import Footprint
from client.policy import Policy
from client.policy_file import add_policy, policy_path
from common.privacy.ledger import Budget
from common.tasks import load
from tests.integration.federation import DATA_SET, SOURCE, Federation, wait_for_words
from tests.integration.processes import Process

WARM_UP = 500
"""Rounds in which a process may grow: imports, caches, arenas of the allocator."""

MEGABYTE = 2**20
BOUND = 2.0
"""Megabytes that a process may grow by after that."""

EPSILON = 8.0
POOLED = 4
"""Threads that gRPC's pool may have more."""

COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Sample:
    """A process at one moment of the run.

    Args:
        round: rounds completed by then.
        seconds: since the beginning.
        held: by the process.
    """

    round: int
    seconds: float
    held: Footprint


@dataclass(frozen=True)
class Growth:
    """By how much a process grew, from one round to a later one.

    Args:
        step: bytes of resident memory, last tenth of the samples less the first.
        creep: bytes of resident memory, by the slope.
        descriptors: more than at first.
        threads: more than at first.
        pooled: more threads of gRPC's pool than at first.
    """

    step: float
    creep: float
    descriptors: int
    threads: int
    pooled: int

    @classmethod
    def of(cls, samples: Sequence[Sample], after: int, last: int) -> Growth:
        """Growth over the rounds beyond ``after``, up to ``last``.

        Raises:
            ValueError: there are too few samples of them.
        """
        seen = [sample for sample in samples if after < sample.round < last]
        tenth = max(1, len(seen) // 10)
        first, final = seen[:tenth], seen[-tenth:]
        if first == final:
            raise ValueError("there are too few samples; look more often, or run more rounds")
        slope = _slope([sample.held.resident for sample in seen], seen)
        return cls(
            step=_median(final) - _median(first),
            creep=slope * (last - after),
            descriptors=_fewest(final, "descriptors") - _fewest(first, "descriptors"),
            threads=_fewest(final, "threads") - _fewest(first, "threads"),
            pooled=_fewest(final, "pooled") - _fewest(first, "pooled"),
        )

    @property
    def memory(self) -> float:
        """Bytes: the larger of the two."""
        return max(self.step, self.creep)

    def faults(self, bound: float) -> list[str]:
        """What is more than it may be, in words.

        Args:
            bound: bytes of memory.
        """
        faults = []
        if self.memory > bound:
            faults.append(f"grew by {self.memory / MEGABYTE:.1f} MB")
        if self.descriptors > 0:
            faults.append(f"has {self.descriptors} descriptors more")
        if self.threads > 0:
            faults.append(f"has {self.threads} threads more")
        if self.pooled > POOLED:
            faults.append(f"has {self.pooled} threads more in gRPC's pool")
        return faults


def _slope(values: Sequence[int], samples: Sequence[Sample]) -> float:
    """Of values beside the samples' rounds."""
    return float(theilslopes(values, [sample.round for sample in samples]).slope)


def _median(samples: Sequence[Sample]) -> float:
    return float(np.median([sample.held.resident for sample in samples]))


def _fewest(samples: Sequence[Sample], what: str) -> int:
    return min(int(getattr(sample.held, what)) for sample in samples)


@dataclass(frozen=True)
class Soak:
    """A run that was watched.

    Args:
        rounds: of it.
        seconds: from the first round to the last.
        samples: name of process → what it held.
        disk: name of process → bytes in its folder, at the rounds of its samples.
        peaks: name of process → bytes of the most memory that it ever held.
        logs: name of process → bytes that it wrote to its terminal.
        missed: rounds in which an update of a holder did not count.
    """

    rounds: int
    seconds: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    disk: dict[str, list[int]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    missed: int = 0

    def growth(self, name: str, after: int) -> Growth:
        """Of one process, after its first rounds."""
        return Growth.of(self.samples[name], after, self.rounds)

    def faults(self, after: int, bound: float) -> list[str]:
        """Everything that is more than it may be; none where all is well."""
        found = [
            f"{name} {fault} after round {after}"
            for name in self.samples
            for fault in self.growth(name, after).faults(bound)
        ]
        if self.missed:
            found.append(f"{self.missed} rounds missed a holder")
        return found


# -- the run ---------------------------------------------------------------------------------------


def soak(
    folder: Path, rounds: int, holders: int, every: float, evaluate: str, flags: Sequence[str] = ()
) -> Soak:
    """Run a federation and watch it.

    Args:
        folder: for every state folder.
        rounds: of the plan.
        holders: how many.
        every: seconds between two looks.
        evaluate: of the plan.
        flags: further ones for ``sotto serve``.
    """
    federation = Federation(folder)
    names = [f"clinic-{number}" for number in range(1, holders + 1)]
    federation.enrol(*names)
    for name in names:
        add_policy(policy_path(federation.holder(name)), policy(rounds, holders))
    with _running(federation, names, rounds, evaluate, flags) as running:
        seen = _watch(federation, running, rounds, every)
    lines = federation.rounds()
    if len(lines) != rounds:
        raise RuntimeError(f"the run ended after {len(lines)} of {rounds} rounds")
    missed = sum(len(line["accepted"]) != holders for line in lines)
    return replace(seen, missed=missed)


def policy(rounds: int, holders: int) -> Policy:
    """A holder's, which lets a run have all its rounds in one day."""
    source = load("medical-diagnosis", SOURCE).source
    return Policy(
        data_set=DATA_SET,
        budget=Budget(2 * EPSILON, source.delta),
        max_rounds_per_day=2 * rounds,
        size_class=source.nominal_size(holders),
        evaluation="histogram",
    )


@contextmanager
def _running(
    federation: Federation, names: Sequence[str], rounds: int, evaluate: str, flags: Sequence[str]
) -> Iterator[dict[str, Process]]:
    """Name → process, until the block ends."""
    holders = len(names)
    plan = (
        *("--rounds", rounds, "--min-holders", holders, "--holders", holders),
        *("--epsilon", EPSILON, "--local-steps", 1, "--evaluate", evaluate),
    )
    with ExitStack() as stack:
        running = {COORDINATOR: stack.enter_context(federation.serve(*plan, *flags))}
        wait_for_words(running[COORDINATOR], "listening")
        for name in names:
            join = federation.join(name, "--holders", holders)
            running[name] = stack.enter_context(join)
        yield running


def _watch(
    federation: Federation, running: Mapping[str, Process], rounds: int, every: float
) -> Soak:
    """Look at every process until the coordinator has ended."""
    samples: dict[str, list[Sample]] = {name: [] for name in running}
    disk: dict[str, list[int]] = {name: [] for name in running}
    peaks: dict[str, int] = {}
    count, begin, coordinator = _rounds_done(federation), time.monotonic(), running[COORDINATOR]
    seconds = 0.0
    while coordinator.handle.poll() is None:
        done = next(count)
        now = time.monotonic() - begin
        if done < rounds:
            seconds = now
        for name, process in running.items():
            try:
                held = Footprint.of(process.handle.pid)
                peaks[name] = Footprint.peak(process.handle.pid)
            except (OSError, KeyError):  # it is about to end
                continue
            samples[name].append(Sample(done, now, held))
            disk[name].append(_bytes_under(federation.folder / name))
        time.sleep(every)
    if coordinator.wait(0) != 0:
        raise RuntimeError(f"the coordinator failed:\n{coordinator.last_words()}")
    logs = {name: process.log.stat().st_size for name, process in running.items()}
    return Soak(rounds, seconds, samples, disk, peaks, logs)


def _rounds_done(federation: Federation) -> Iterator[int]:
    """How many rounds the run has completed, each time it is asked."""
    lines = 0
    while not federation.runs or not (path := federation.runs[-1].path / "metrics.jsonl").exists():
        yield lines
    with path.open("rb") as file:
        while True:
            lines += file.read().count(b"\n")
            yield lines


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # answers and checkpoints come and go
            continue
    return total


# -- what is written -------------------------------------------------------------------------------


def document(run: Soak, after: int, bound: float) -> dict[str, Any]:
    """For JSON: megabytes of memory, bytes of disk."""
    return {
        "rounds": run.rounds,
        "rounds_per_second": round(run.rounds / run.seconds, 1),
        "after": after,
        "bound_mb": bound / MEGABYTE,
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "faults": run.faults(after, bound),
        "processes": {name: _figures(run, name, after) for name in run.samples},
    }


def _figures(run: Soak, name: str, after: int) -> dict[str, Any]:
    samples, growth = run.samples[name], run.growth(name, after)
    late = [sample for sample in samples if after < sample.round < run.rounds]
    disk = run.disk[name][samples.index(late[0]) : samples.index(late[-1]) + 1]
    return {
        "samples": len(late),
        "resident_mb": _megabytes(_median(late)),
        "peak_mb": _megabytes(run.peaks[name]),
        "growth_mb": _megabytes(growth.memory),
        "step_mb": _megabytes(growth.step),
        "creep_mb": _megabytes(growth.creep),
        "creep_bytes_per_round": round(growth.creep / (run.rounds - after)),
        "anonymous_first_mb": _megabytes(late[0].held.anonymous),
        "anonymous_last_mb": _megabytes(late[-1].held.anonymous),
        "descriptors": [_fewest(late, "descriptors"), max(s.held.descriptors for s in late)],
        "descriptors_more": growth.descriptors,
        "threads": [_fewest(late, "threads"), max(s.held.threads for s in late)],
        "threads_more": growth.threads,
        "pooled": [_fewest(late, "pooled"), max(s.held.pooled for s in late)],
        "disk_bytes_per_round": round(_slope(disk, late)),
        "disk_mb": _megabytes(disk[-1]),
        "log_bytes_per_round": round(run.logs[name] / run.rounds),
    }


def _megabytes(value: float) -> float:
    return round(value / MEGABYTE, 2)


def draw(run: Soak, after: int, path: Path) -> None:
    """Resident memory over rounds, of every process: all of it, and what it changed by."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    whole, change = figure.subplots(2, 1, sharex=True)
    for name, samples in run.samples.items():
        kept = [sample for sample in samples if 0 < sample.round < run.rounds]
        rounds = [sample.round for sample in kept]
        memory = np.array([sample.held.resident for sample in kept]) / MEGABYTE
        start = np.median(memory[[after < number <= 2 * after for number in rounds]])
        whole.plot(rounds, memory, label=name, linewidth=1)
        change.plot(rounds, memory - start, label=name, linewidth=1)
    change.axvline(after, color="grey", linestyle=":", linewidth=1)
    change.set_ylim(-6, 6)
    whole.set_ylim(bottom=0)
    whole.set_ylabel("resident memory, MB")
    change.set_ylabel(f"change since rounds {after}–{2 * after}, MB")
    change.set_xlabel("rounds")
    whole.legend(frameon=False, ncols=5, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--holders", type=int, default=4)
    parser.add_argument("--evaluate", default="never", help="as of sotto serve")
    parser.add_argument("--after", type=int, default=WARM_UP, help="rounds that may cost memory")
    parser.add_argument("--bound", type=float, default=BOUND, help="megabytes of growth")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two looks")
    parser.add_argument("--folder", type=Path, help="of the state folders; a temporary one")
    parser.add_argument("--json", help="write there; - for standard output")
    parser.add_argument("--samples", type=Path, help="write every sample there, as CSV")
    parser.add_argument("--figure", type=Path, help="draw memory over rounds there")
    parser.add_argument("flags", nargs="*", help="after --: further flags of sotto serve")
    options = parser.parse_args()
    if options.after >= options.rounds:
        parser.error("--after must be less than --rounds")
    place = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory()
    with place as folder:
        run = soak(
            Path(folder), options.rounds, options.holders, options.every, options.evaluate,
            options.flags,
        )  # fmt: skip
    bound = options.bound * MEGABYTE
    if options.samples:
        options.samples.write_text(table(run))
    if options.figure:
        draw(run, options.after, options.figure)
    text = json.dumps(document(run, options.after, bound), indent=2) + "\n"
    if options.json and options.json != "-":
        Path(options.json).write_text(text)
    else:
        sys.stdout.write(text)
    if faults := run.faults(options.after, bound):
        sys.exit("; ".join(faults))


def table(run: Soak) -> str:
    """Every sample as a line of CSV, bytes."""
    head = "process,round,seconds,resident,anonymous,private,descriptors,threads,pooled,disk"
    rows = chain.from_iterable(
        (
            f"{name},{sample.round},{sample.seconds:.1f},{sample.held.resident},"
            f"{sample.held.anonymous},{sample.held.private},{sample.held.descriptors},"
            f"{sample.held.threads},{sample.held.pooled},{size}"
            for sample, size in zip(samples, run.disk[name], strict=True)
        )
        for name, samples in run.samples.items()
    )
    return "\n".join((head, *rows)) + "\n"


if __name__ == "__main__":
    main()
