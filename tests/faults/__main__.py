"""``make faults``: hundreds of runs that are killed again and again, and a table of them.

``SOTTO_FAULTS_SEED=1234 python -m tests.faults --only 17`` plays one of them again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tests.faults.kills import disturbed, setting_of
from tests.faults.seeds import VARIABLE, seed


@dataclass(frozen=True)
class Result:
    """Of one run.

    Args:
        run: its number.
        setting: what was run.
        kills: processes that were killed.
        recoveries: processes that were started again and went on.
        seconds: that it took.
        failure: what was wrong with what it left; empty for nothing.
    """

    run: int
    setting: str
    kills: int = 0
    recoveries: int = 0
    seconds: float = 0.0
    failure: str = ""


def played(number: int) -> Result:
    """Play one run."""
    with TemporaryDirectory() as folder:
        try:
            tally = disturbed(number, Path(folder))
        except AssertionError as error:
            failure = "\n".join([str(error), *getattr(error, "__notes__", [])])
            return Result(number, setting_of(number), failure=failure)
    return Result(number, setting_of(number), **asdict(tally))


def shard(numbers: Sequence[int]) -> Iterator[Result]:
    """Play runs in a process of their own, as multiprocessing's fork server serves one thread."""
    command = [sys.executable, "-m", "tests.faults", "--play", *map(str, numbers)]
    environment = {**os.environ, VARIABLE: str(seed())}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield show(Result(**json.loads(line)))
    assert process.returncode == 0, f"a worker ended with {process.returncode}"


def show(result: Result) -> Result:
    """A line for each run as it ends; what failed, in full."""
    outcome = "FAILED" if result.failure else f"{result.kills} kills, {result.seconds:.1f} s"
    print(f"run {result.run} ({result.setting}): {outcome}", result.failure, flush=True)
    return result


def table(results: Iterable[Result]) -> str:
    """The runs by setting."""
    by_setting: dict[str, list[Result]] = {}
    for result in results:
        by_setting.setdefault(result.setting, []).append(result)
        by_setting.setdefault("all", []).append(result)
    all_of_them = by_setting.pop("all")
    lines = ["| setting | runs | failed | kills | recoveries | seconds, median | most |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, runs in [*sorted(by_setting.items()), ("all", all_of_them)]:
        seconds = [run.seconds for run in runs if not run.failure] or [0.0]
        figures = (
            len(runs),
            sum(bool(run.failure) for run in runs),
            sum(run.kills for run in runs),
            sum(run.recoveries for run in runs),
            f"{median(seconds):.1f}",
            f"{max(seconds):.1f}",
        )
        lines.append(f"| {name} | " + " | ".join(map(str, figures)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Play runs on several cores; the exit code is 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of runs")
    parser.add_argument("--play", type=int, nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.play is not None:
        for number in asked.play:
            print(json.dumps(asdict(played(number))), flush=True)
        return 0
    print(f"{VARIABLE}={seed()}", flush=True)
    numbers = range(asked.runs) if asked.only is None else asked.only
    shards = [numbers[first :: asked.workers] for first in range(asked.workers)]
    with ThreadPoolExecutor(asked.workers) as pool:
        parts = pool.map(lambda part: list(shard(part)), filter(None, shards))
        results = list(chain.from_iterable(parts))
    print(table(results))
    return int(any(result.failure for result in results))


if __name__ == "__main__":
    sys.exit(main())
