"""What secure aggregation costs: Sotto's and Flower's SecAgg+ in one run, and Sotto's by cohort.

    python benchmarks/secure_aggregation.py --json -            # everything, a few minutes
    python benchmarks/secure_aggregation.py --only flower --repeats 3

*Beside Flower*: 8 holders × 1,000,000 float32 parameters, the systems in turn, medians of processor
seconds over repeats and over the holders watched. A holder's time is its whole part of a round:
keys, shares, encoding, masks, signatures and messages, with nothing remembered from other holders
of the process. The coordinator's runs from the first message to the mean, with everybody there and
with two holders that drop out after sharing keys. Sotto's protocol is the actively secure one
(signed keys, a consistency round, 256-bit seeds); Flower's is SecAgg+ with all neighbours and the
same threshold, called as it ships (benchmarks/flower_secagg.py). Every sum is checked.

*By cohort*: a round's price for one holder and for the coordinator, by stage. Above 128 holders a
plan has a neighbour graph. Dropouts are as many as the plan bears.

*Rings*: in how many bits plans count, since that is what a masked parameter takes on the wire.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.flower_secagg import free_bits, secagg_round
from benchmarks.loopback import Loopback
from benchmarks.masked_round import Cost, Meter, Vectors, masked_round
from benchmarks.noop import NoTask
from common.aggregation import Masked
from common.link.keys import HolderKeys
from common.link.signing import Identity, Trust
from common.plan import TrainingPlan
from common.secagg.keys import KEY_BYTES
from common.secagg.session import Stage
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Task

HOLDERS, PARAMETERS = 8, 1_000_000
DROPPED = (0, 2)
COHORTS = ((8, 10_000), (64, 10_000), (512, 10_000), (8, PARAMETERS), (64, PARAMETERS))
PLANS = (
    ("medical-diagnosis", "heart-disease", 4),
    ("medical-diagnosis", "breast-cancer", 8),
    ("credit-risk", "synthetic", 10),
    ("recommendation", "synthetic", 8),
)
ROUNDS = 30
PRIVATE, EXACT = {"epsilon": 5.0}, {"no_dp": True}
LEVELS: Sequence[tuple[str, Mapping[str, object]]] = (
    ("secure", PRIVATE),
    ("secure-sum", PRIVATE),
    ("secure", EXACT),
)

Figures = dict[str, Any]


# -- beside Flower ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _System:
    """What is compared.

    Args:
        bits: of a masked parameter on the wire.
        masks: unpredictable bits of the seeds that masks are made of.
        round: how many holders drop out → what the round took.
    """

    bits: int
    masks: str
    round: Callable[[int], Cost]


def beside_flower(repeats: int) -> list[Figures]:
    """Sotto in both rings and Flower, in turn, on the same vectors."""
    systems = _systems(_vectors(HOLDERS, PARAMETERS))
    costs: dict[tuple[str, int], list[Cost]] = defaultdict(list)
    for _ in range(repeats):
        for name, lost in product(systems, DROPPED):
            costs[name, lost].append(systems[name].round(lost))
    return [
        {
            "system": name,
            "dropouts": lost,
            "bits_a_parameter": systems[name].bits,
            "bits_of_masks": systems[name].masks,
            **_figures(found, PARAMETERS),
        }
        for (name, lost), found in costs.items()
    ]


def _systems(vectors: Vectors) -> Mapping[str, _System]:
    narrow, wide = (_plan(HOLDERS, PARAMETERS, settings) for settings in (PRIVATE, EXACT))
    threshold, strength = narrow.min_holders, str(8 * KEY_BYTES)
    return {
        "Sotto": _System(_bits(narrow), strength, lambda lost: masked_round(narrow, vectors, lost)),
        "Sotto, no DP": _System(
            _bits(wide), strength, lambda lost: masked_round(wide, vectors, lost)
        ),
        # A mask of a holder's own is made of 32 bits, whatever its seed.
        "Flower": _System(
            64,
            f"{free_bits()}, own 32",
            lambda lost: secagg_round(vectors, HOLDERS, threshold, lost),
        ),
    }


# -- by cohort -------------------------------------------------------------------------------------


def by_cohort(repeats: int) -> Iterator[Figures]:
    """A round of each size, with everybody and with all dropouts that the plan bears."""
    for holders, parameters in COHORTS:
        plan = _plan(holders, parameters, PRIVATE)
        vectors = _vectors(holders, parameters)
        for lost in (0, holders - plan.min_holders):
            times = 1 if holders > 64 or holders * parameters > HOLDERS * PARAMETERS else repeats
            yield {
                "holders": holders,
                "parameters": parameters,
                "neighbours": _masked(plan).neighbours,
                "dropouts": lost,
                **_figures([masked_round(plan, vectors, lost) for _ in range(times)], parameters),
            }


def first_credential(folder: Path) -> float:
    """Seconds to check a holder's credential, certificate and all, for the first time."""
    names = [f"holder-{number}" for number in range(9)]
    loopback = Loopback.under(folder, names)
    identities = [Identity.of(HolderKeys.load(folder / name)) for name in names]
    trust, seconds = Trust(loopback.keys.authority), []
    for identity in identities:
        begin = time.process_time()
        trust.check(identity.credential)
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


# -- rings -----------------------------------------------------------------------------------------


def rings() -> list[Figures]:
    """In how many bits the plans of our tasks count, and those of a model of a million numbers."""
    rows = [
        {"plan": f"{source} {task}", "holders": holders, **_widths(load(task, source), holders)}
        for task, source, holders in PLANS
    ]
    own = _widths(NoTask(PARAMETERS), HOLDERS, {"rounds": ROUNDS})
    return [*rows, {"plan": f"D = {PARAMETERS:,}", "holders": HOLDERS, **own}]


def _widths(
    task: Task, holders: int, common: Mapping[str, object] = MappingProxyType({})
) -> dict[str, int]:
    return {
        f"{level} {'no DP' if settings == EXACT else 'ε=5'}": _bits(
            _plan_of(task, holders, {**common, **settings}, level)
        )
        for level, settings in LEVELS
    }


# -- inside ----------------------------------------------------------------------------------------


def _plan(holders: int, parameters: int, settings: Mapping[str, object]) -> TrainingPlan:
    return _plan_of(NoTask(parameters), holders, {"rounds": ROUNDS, **settings}, "secure")


def _plan_of(task: Task, holders: int, settings: Mapping[str, object], level: str) -> TrainingPlan:
    return plan_for(task, {"aggregation": level, **settings}, holders=holders)


def _masked(plan: TrainingPlan) -> Masked:
    assert isinstance(plan.aggregation, Masked)
    return plan.aggregation


def _bits(plan: TrainingPlan) -> int:
    return _masked(plan).encoding(plan).width


def _vectors(holders: int, parameters: int) -> Vectors:
    """Updates of holders; they are kept where they are few, and else drawn when they are due."""

    def draw(place: int) -> Any:
        chance = np.random.default_rng(place)
        return 0.1 * chance.standard_normal(parameters, dtype=np.float32)

    if holders > HOLDERS:
        return draw
    kept = [draw(place) for place in range(holders)]
    return kept.__getitem__


def _figures(costs: Sequence[Cost], parameters: int) -> Figures:
    """Medians over repeats, and over the holders that were watched."""
    holders = [meter for cost in costs for meter in cost.holders]
    coordinators = [cost.coordinator for cost in costs]
    return {
        "holder_seconds": _median(meter.total for meter in holders),
        "holder_stages": _stages(holders),
        "coordinator_seconds": _median(meter.total for meter in coordinators),
        "coordinator_stages": _stages(coordinators),
        "bytes_sent": statistics.median(meter.sent for meter in holders),
        "bytes_received": statistics.median(meter.received for meter in holders),
        "bytes_sent_a_parameter": round(holders[0].sent / parameters, 4),
        "rounds": len(costs),
    }


def _stages(meters: Sequence[Meter]) -> dict[str, float]:
    return {stage: _median(meter.seconds[stage] for meter in meters) for stage in meters[0].seconds}


def _median(seconds: Iterable[float]) -> float:
    return round(statistics.median(seconds), 6)


# -- for people ------------------------------------------------------------------------------------


def show_flower(console: Console, rows: Sequence[Figures]) -> None:
    """One line for each system and number of dropouts."""
    table = Table(title=f"A round of {HOLDERS} holders × {PARAMETERS:,} parameters, processor time")
    columns = ("", "dropouts", "holder", "coordinator", "bytes a parameter", "bits of masks")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["system"],
            str(row["dropouts"]),
            *_milliseconds(row["holder_seconds"], row["coordinator_seconds"]),
            f"{row['bytes_sent_a_parameter']:.4f}",
            row["bits_of_masks"],
        )
    console.print(table)


def show_cohorts(console: Console, rows: Sequence[Figures]) -> None:
    """By stage, for a holder and for the coordinator: n holders with k neighbours each."""
    for part in ("holder", "coordinator"):
        table = Table(title=f"By cohort: milliseconds of the {part}'s processor time")
        sizes = ("n", "D/1000", "k", "lost")
        for column in (*sizes, "keys", "shares", "masks", "check", "unmask", "round"):
            table.add_column(column, justify="right")
        for row in rows:
            seconds = [*(row[f"{part}_stages"][stage] for stage in Stage), row[f"{part}_seconds"]]
            table.add_row(
                str(row["holders"]),
                f"{row['parameters'] // 1000:,}",
                str(row["neighbours"] or "all"),
                str(row["dropouts"]),
                *(f"{1e3 * value:.{0 if value >= 0.1 else 1}f}" for value in seconds),
            )
        console.print(table)


def show_rings(console: Console, rows: Sequence[Figures]) -> None:
    """Which plans need 4 bytes for a parameter, and which 8."""
    table = Table(title="Bits of a masked parameter")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def _milliseconds(*seconds: float) -> list[str]:
    return [f"{1e3 * value:.1f} ms" for value in seconds]


@dataclass(frozen=True)
class _Part:
    """A part of the benchmark.

    Args:
        measure: repeats → what goes into the document.
        show: that, for people.
    """

    measure: Callable[[int], Sequence[Figures]]
    show: Callable[[Console, Sequence[Figures]], None]


PARTS: Mapping[str, _Part] = {
    "flower": _Part(beside_flower, show_flower),
    "cohorts": _Part(lambda repeats: list(by_cohort(repeats)), show_cohorts),
    "rings": _Part(lambda _: rings(), show_rings),
}


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for stdout")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json == "-")
    document: Figures = {
        "benchmark": "secure_aggregation",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {name: version(name) for name in ("sotto", "flwr", "cryptography", "numpy")},
    }
    with tempfile.TemporaryDirectory(prefix="sotto-benchmark-") as folder:
        document["first_credential_seconds"] = first_credential(Path(folder))
    for name in arguments.only or PARTS:
        part = PARTS[name]
        document[name] = part.measure(arguments.repeats)
        part.show(console, document[name])
    once = 1e3 * document["first_credential_seconds"]
    console.print(f"A credential is checked once for each process, which takes {once:.2f} ms.")
    text = json.dumps(document, indent=2) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()
