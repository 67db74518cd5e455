"""ε by three accountants, point by point: how far apart they are, and how long each takes.

    python -m benchmarks.accounting                  # a table, about a minute on two cores
    python -m benchmarks.accounting --json FILE      # and as JSON; - for standard output

Sixty points: a grid of sampling rate, noise multiplier and steps, and seeded mixtures of trainings,
evaluations and statistics. ``rdp`` is the Rényi bound, ``prv`` what Sotto reports, ``pld`` Google's
dp-accounting, the worse of adding and removing a unit. A point is in order if RDP ≥ PRV and PRV is
at most 2 % above PLD and not below it by more than what PLD rounds up. Exit 1 if one is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.privacy.accounting import epsilon
from common.privacy.bounds import renyi_bound
from common.privacy.events import Composition, SubsampledGaussian
from tests.common.privacy.points import (
    GRID,
    MIXTURES,
    fine_interval,
    in_order,
    mixture,
    pld_epsilon,
)


def points() -> list[tuple[str, Composition, float]]:
    """Name, composition and δ of every point."""
    grid = [
        (
            f"q={step.sampling_rate:g} σ={step.noise_multiplier:g} k={step.steps}",
            Composition.of(step),
            1e-5,
        )
        for step in GRID
    ]
    return grid + [(f"mixture {seed}", mixture(seed), delta) for seed, delta in MIXTURES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every point; exit 1 if one is out of order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")
    chosen = parser.parse_args(arguments)
    screen = Console(file=sys.stderr if chosen.json == "-" else sys.stdout)
    epsilon(Composition.of(SubsampledGaussian(0.1, 3.0, 3)), 1e-5)  # imports
    results = [_measured(*point) for point in points()]
    screen.print(_table(results))
    document = {"date": datetime.now(UTC).date().isoformat(), "points": results}
    if chosen.json == "-":
        print(json.dumps(document, indent=2))
    elif chosen.json:
        with open(chosen.json, "w") as file:  # noqa: PTH123
            json.dump(document, file, indent=2)
    return 0 if all(result["in_order"] for result in results) else 1


def _measured(name: str, composition: Composition, delta: float) -> dict[str, Any]:
    rdp, rdp_seconds = _timed(lambda: renyi_bound(composition, delta))
    prv, prv_seconds = _timed(lambda: epsilon(composition, delta))
    interval = fine_interval(composition, prv)
    pld, pld_seconds = _timed(lambda: pld_epsilon(composition, delta, interval))
    return {
        "name": name,
        "events": composition.to_list(),
        "delta": delta,
        "rdp": rdp,
        "prv": prv,
        "pld": pld,
        "prv_over_pld": prv / pld,
        "in_order": in_order(rdp, prv, pld),
        "seconds": {"rdp": rdp_seconds, "prv": prv_seconds, "pld": pld_seconds},
    }


def _timed(compute: Callable[[], float]) -> tuple[float, float]:
    begun = time.perf_counter()
    found = compute()
    return found, time.perf_counter() - begun


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title="ε by three accountants", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in ("point", "δ", "RDP", "PRV", "PLD", "PRV/PLD"):
        table.add_column(column, justify="left" if column == "point" else "right", no_wrap=True)
    for result in results:
        colour = "green" if result["in_order"] else "red"
        table.add_row(
            result["name"],
            f"{result['delta']:.0e}",
            *(f"{result[name]:.4f}" for name in ("rdp", "prv", "pld")),
            f"[{colour}]{result['prv_over_pld']:.4f}[/]",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
