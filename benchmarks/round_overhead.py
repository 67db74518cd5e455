"""Seconds of a federated round in which nobody trains: Sotto, stock Flower, and a bare stream.

    python benchmarks/round_overhead.py                  # everything, a few minutes
    python benchmarks/round_overhead.py --only sotto --size small --json -
    python benchmarks/round_overhead.py --aggregation secure --holders 8 --size small --json -

Each has two holder processes on loopback and one float32 tensor as its model. Sotto runs with
certificates on both sides, a durable account, answers and checkpoints on disk; Flower in plain
text and in memory. A round is timed on the server: Sotto's from one checkpoint to the next,
Flower's from ``configure_train`` to the end of ``aggregate_train``.

With ``--aggregation secure``, Sotto's secure rounds are timed beside its plain ones: the same
processes take a few rounds of each in turn, so that other work on the machine burdens both alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.echo import echo_rounds
from benchmarks.noop import Federation, sotto_rounds
from benchmarks.stock_flower import flower_rounds

Measure = Callable[[Path, int, int], list[float]]
"""Folder, parameters and rounds → seconds of each round."""

SYSTEMS: Mapping[str, Measure] = {
    "sotto": sotto_rounds,
    "flower": flower_rounds,
    "grpc-stream": echo_rounds,
}
SPEED_UP_TARGET = 100.0
"""Of the small model's rounds over stock Flower's."""

SECURE_TARGET = 5.0
"""Of the small model's secure rounds over its plain ones, at most."""

IN_TURN = 10
"""Rounds of one kind before the other's turn."""


@dataclass(frozen=True)
class Size:
    """A model, how often each system is to exchange it, and what Sotto should need.

    Args:
        label: for people.
        parameters: float32 numbers.
        rounds: system → rounds to time.
        target: most seconds of Sotto's median round.
    """

    label: str
    parameters: int
    rounds: Mapping[str, int]
    target: float


SIZES: Mapping[str, Size] = {
    "small": Size("4 KB", 1_000, {"sotto": 50, "flower": 5, "grpc-stream": 50}, 0.03),
    "large": Size("40 MB", 10_000_000, {"sotto": 10, "flower": 3, "grpc-stream": 10}, 1.0),
}


def measure(size: Size, systems: Sequence[str], rounds: int | None) -> dict[str, Any]:
    """Every system on one size, one after the other."""
    result: dict[str, Any] = {"parameters": size.parameters, "target": size.target}
    for name in systems:
        with tempfile.TemporaryDirectory(prefix="sotto-benchmark-") as folder:
            count = rounds or size.rounds[name]
            seconds = SYSTEMS[name](Path(folder), size.parameters, count)
        result[name] = _summary(seconds)
    if "sotto" in result and "flower" in result:
        result["ratio"] = round(result["flower"]["median"] / result["sotto"]["median"], 1)
    return result


def measure_levels(size: Size, holders: int, rounds: int) -> dict[str, Any]:
    """Plain and secure rounds of one size, in turn, with the same processes.

    Args:
        size: of the model.
        holders: how many processes.
        rounds: of each kind, a few more if no multiple of :data:`IN_TURN`.
    """
    turns = math.ceil(rounds / IN_TURN)
    seconds: dict[str, list[float]] = {"plain": [], "secure": []}
    with (
        tempfile.TemporaryDirectory(prefix="sotto-benchmark-") as folder,
        Federation.started(Path(folder), size.parameters, holders, runs=2 * turns) as federation,
    ):
        for turn in range(turns):
            for level, found in seconds.items():
                found += federation.rounds(level, IN_TURN, f"{level}-{turn}")
    result: dict[str, Any] = {"parameters": size.parameters}
    result |= {level: _summary(found) for level, found in seconds.items()}
    result["ratio"] = round(result["secure"]["median"] / result["plain"]["median"], 2)
    return result


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(seconds), 5),
        "rounds": [round(value, 5) for value in seconds],
    }


def document(sizes: Mapping[str, Mapping[str, Any]], holders: int) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "benchmark": "round_overhead",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {name: version(name) for name in ("sotto", "flwr", "grpcio", "torch")},
        "holders": holders,
        "sizes": sizes,
    }


def show(console: Console, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """The medians and the targets, for people."""
    table = Table(title="Seconds a round, two holders, no training (medians)")
    for column in ("model", "Sotto", "target", "stock Flower", "Flower / Sotto", "bare stream"):
        table.add_column(column, justify="right")
    for name, result in sizes.items():
        table.add_row(
            SIZES[name].label,
            _median(result, "sotto"),
            f"≤ {result['target']:g}",
            _median(result, "flower"),
            f"{result['ratio']:.0f}×" if "ratio" in result else "-",
            _median(result, "grpc-stream"),
        )
    console.print(table)
    console.print(f"Target for the small model: at least {SPEED_UP_TARGET:g}× stock Flower.")


def show_levels(console: Console, sizes: Mapping[str, Mapping[str, Any]], holders: int) -> None:
    """The same for :func:`measure_levels`."""
    table = Table(title=f"Seconds a round, {holders} holders, no training (medians)")
    for column in ("model", "plain", "secure", "secure / plain"):
        table.add_column(column, justify="right")
    for name, result in sizes.items():
        medians = _median(result, "plain"), _median(result, "secure")
        table.add_row(SIZES[name].label, *medians, f"{result['ratio']:.2f}×")
    console.print(table)
    console.print(f"Target for the small model: at most {SECURE_TARGET:g}× a plain round.")


def _median(result: Mapping[str, Any], system: str) -> str:
    return f"{result[system]['median']:.4f}" if system in result else "-"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for stdout")
    parser.add_argument("--only", choices=SYSTEMS, action="append", help="may be repeated")
    parser.add_argument("--size", choices=SIZES, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, help="for every system, instead of its own number")
    parser.add_argument(
        "--aggregation", choices=("plain", "secure"), default="plain", help="Sotto's level of trust"
    )
    parser.add_argument("--holders", type=int, default=2, help="with --aggregation secure")
    arguments = parser.parse_args()
    if arguments.aggregation == "plain" and arguments.holders != 2:
        parser.error("--holders is for --aggregation secure; the other systems have two")
    if arguments.aggregation == "secure" and arguments.only:
        parser.error("--only is for --aggregation plain; masked rounds are Sotto's own")
    return arguments


def _exit(*_: object) -> None:
    """End as an exception does, so that every process started here is stopped."""
    sys.exit(1)


def main() -> None:
    """Measure, show, write."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _exit)
    console = Console(stderr=arguments.json == "-")
    secure, holders = arguments.aggregation == "secure", arguments.holders
    sizes = {}
    for name in arguments.size or SIZES:
        size = SIZES[name]
        console.print(f"Measuring the {size.label} model ...")
        if secure:
            sizes[name] = measure_levels(size, holders, arguments.rounds or size.rounds["sotto"])
        else:
            sizes[name] = measure(size, arguments.only or list(SYSTEMS), arguments.rounds)
    show_levels(console, sizes, holders) if secure else show(console, sizes)
    text = json.dumps(document(sizes, holders), indent=2) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()
