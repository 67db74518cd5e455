"""Seconds until federated learning goes on after a network fault.

    python benchmarks/recovery.py                      # every fault five times, a few minutes
    python benchmarks/recovery.py --only restart --times 10 --json -

Plays the faults of ``tests/faults/test_network.py`` on loopback, with holders and coordinators as
shipped: their back-off, keep-alive and deadlines are the defaults unless a fault says otherwise.
The coordinator's restart is played with several outages, for a holder that has waited longer tries
less often.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults import run_faults
from tests.faults.network import NetworkFault
from tests.faults.test_network import FAULTS

OUTAGES = (0.5, 5.0, 20.0)  # seconds


def faults() -> list[NetworkFault]:
    """The table of the tests, with an outage of each length for every one that has an outage."""
    outages = {
        run_faults.restarted,
        run_faults.moved,
        run_faults.http_proxy_restarted,
        run_faults.restarted_behind_http_proxy,
    }
    found: list[NetworkFault] = []
    for fault in FAULTS:
        if fault.play in outages:
            found += (
                replace(
                    fault,
                    name=f"{fault.name}, after {outage:g} s",
                    play=partial(fault.play, outage=outage),
                )
                for outage in OUTAGES
            )
        else:
            found.append(fault)
    return found


def measure(fault: NetworkFault, times: int) -> list[float]:
    """Seconds to recover, each time; it is survived every time or this raises."""
    seconds = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(prefix="sotto-recovery-") as folder:
            seconds.append(fault.play(Path(folder)))
    return seconds


def document(results: Sequence[tuple[NetworkFault, list[float]]]) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "benchmark": "recovery",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {name: version(name) for name in ("sotto", "grpcio")},
        "faults": [
            {
                "name": fault.name,
                "since": fault.since,
                "bound": fault.bound,
                "median": round(statistics.median(seconds), 3),
                "worst": round(max(seconds), 3),
                "seconds": [round(value, 3) for value in seconds],
            }
            for fault, seconds in results
        ],
    }


def show(console: Console, results: Sequence[tuple[NetworkFault, list[float]]]) -> None:
    """The medians and the worst cases, for people."""
    table = Table(title="Seconds to recover")
    for column in ("fault", "since", "median", "worst", "bound"):
        table.add_column(column, justify="left" if column in ("fault", "since") else "right")
    for fault, seconds in results:
        worst = max(seconds)
        mark = "" if worst <= fault.bound else " !"
        table.add_row(
            fault.name,
            fault.since,
            f"{statistics.median(seconds):.2f}",
            f"{worst:.2f}{mark}",
            f"{fault.bound:g}",
        )
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for stdout")
    parser.add_argument("--only", metavar="WORDS", action="append", help="faults with these words")
    parser.add_argument("--times", type=int, default=5, help="to play each fault")
    return parser.parse_args()


def main() -> None:
    """Measure, show, write."""
    arguments = _arguments()
    logging.getLogger("sotto").setLevel(logging.ERROR)  # each fault is news to a coordinator
    console = Console(stderr=arguments.json == "-")
    results = []
    for fault in faults():
        if any(words in fault.name for words in arguments.only or [""]):
            console.print(f"Playing: {fault.name} ...", end=" ")
            results.append((fault, measure(fault, arguments.times)))
            console.print(" ".join(f"{seconds:.2f}" for seconds in results[-1][1]))
    show(console, results)
    text = json.dumps(document(results), indent=2) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()
