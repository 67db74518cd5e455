"""What holder-level privacy costs: fixed and adaptive clipping and banded noise at equal ε.

    python benchmarks/central.py --json -            # everything, about two minutes on two cores
    python benchmarks/central.py --seeds 1 --epsilons 2

The 30,000 clients of uci-default (`sotto data get uci-default`, or SOTTO_DATA) are dealt at random
among 2,000 banks, 12 for training in each, and 6,000 are held out for everybody. Every round about
100 banks take part: each by a coin of its own, or (banded) in turn. Whole banks are the unit, and
the coordinator is trusted: see docs/central.md. The bound C is set well, and ten times too small
and too large. The figure is the AUC on the held-out clients.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.flower import quiet_flower
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, HolderData, Task, generator
from common.tasks.parameters import load_shared
from server.app import federate
from simulations.experiment import seeded_combination
from simulations.grid import BatchedGrid
from simulations.workers import BlockTrainer, InProcess

HOLDERS, EACH, HELD_OUT = 2000, 12, 6000
ROUNDS, COHORT, DELTA = 60, 100, 1e-4
CLIP_NORMS = (0.02, 0.2, 2.0)
COINS: Mapping[str, Any] = {"cohort": COHORT}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "fixed": COINS,
    "adaptive": {**COINS, "clipping": "adaptive"},
    "banded": {"mechanism": "banded", "bands": HOLDERS // COHORT},
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One plan.

    Args:
        kind: a key of :data:`KINDS`, or ``no privacy``.
        epsilon: of the run; None without privacy.
        clip_norm: C at the beginning; None without privacy.
        settings: for ``plan_for``.
    """

    kind: str
    epsilon: float | None
    clip_norm: float | None
    settings: Mapping[str, Any]


def cases(epsilons: Sequence[float]) -> Iterator[Case]:
    """Everything that is compared."""
    yield Case("no privacy", None, None, {"no_dp": True, **COINS})
    for epsilon in epsilons:
        for clip_norm in CLIP_NORMS:
            for kind, own in KINDS.items():
                chosen = {"unit": "holder", "epsilon": epsilon, "clip_norm": clip_norm, **own}
                yield Case(kind, epsilon, clip_norm, chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every case with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")
    parser.add_argument("--seeds", type=int, default=5, help="of division, noise and coins")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 2.0, 8.0])
    chosen = parser.parse_args(arguments)
    screen = Console(file=sys.stderr if chosen.json == "-" else sys.stdout)
    quiet_flower()
    begin, task = time.perf_counter(), load("credit-risk", "uci-default")
    everybody = task.examples(task.source.table())  # type: ignore[attr-defined]
    found = list(cases(chosen.epsilons))
    scores: list[list[float]] = [[] for _ in found]
    for seed in range(chosen.seeds):
        data, held_out = _dealt(everybody, seed)
        for case, own in zip(found, scores, strict=True):
            own.append(_auc(task, _plan(task, case, seed), data, held_out))
        screen.print(f"seed {seed}: {time.perf_counter() - begin:.0f} s", highlight=False)
    results = [_result(case, own) for case, own in zip(found, scores, strict=True)]
    screen.print(_table(results))
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "holders": HOLDERS,
        "cohort": COHORT,
        "rounds": ROUNDS,
        "delta": DELTA,
        "seeds": chosen.seeds,
        "seconds": time.perf_counter() - begin,
        "cases": results,
    }
    if chosen.json == "-":
        print(json.dumps(document, indent=2))
    elif chosen.json:
        with open(chosen.json, "w") as file:  # noqa: PTH123
            json.dump(document, file, indent=2)
    return 0


def _plan(task: Task, case: Case, seed: int) -> TrainingPlan:
    common = {"rounds": ROUNDS, "delta": DELTA, "evaluate": "never", "holder_size": EACH}
    return plan_for(task, {**common, "seed": seed, **case.settings}, holders=HOLDERS)


def _dealt(everybody: Examples, seed: int) -> tuple[dict[str, HolderData], Examples]:
    """Every bank's clients, and those that are held out."""
    order = torch.from_numpy(generator("central", seed).permutation(len(everybody)))
    nobody = everybody.take(order[:0])
    banks = order[HELD_OUT:].split(EACH)[:HOLDERS]
    data = {
        f"bank-{number:04d}": HolderData(train=everybody.take(rows), test=nobody)
        for number, rows in enumerate(banks)
    }
    return data, everybody.take(order[:HELD_OUT])


def _auc(
    task: Task, plan: TrainingPlan, data: Mapping[str, HolderData], held_out: Examples
) -> float:
    grid = BatchedGrid(list(data), InProcess(BlockTrainer(task, data, CPU)))
    result = federate(grid, plan, task, combination=seeded_combination(plan))
    model = task.model(1)
    load_shared(task, model, torch.tensor(result.parameters))
    model.eval()
    return task.evaluate(model, held_out)["auc"]


def _result(case: Case, aucs: Sequence[float]) -> dict[str, Any]:
    return {
        "kind": case.kind,
        "epsilon": case.epsilon,
        "clip_norm": case.clip_norm,
        "settings": dict(case.settings),
        "auc": {
            "mean": mean(aucs),
            "sd": stdev(aucs) if len(aucs) > 1 else 0.0,
            "per_seed": list(aucs),
        },
    }


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"AUC, {HOLDERS} holders, {ROUNDS} rounds", title_justify="left")
    for column in ("ε", "C", *KINDS):
        table.add_column(column, justify="right")
    free, *rest = results
    table.add_row("∞", "", _figure(free), "", "")
    for start in range(0, len(rest), len(KINDS)):
        row = rest[start : start + len(KINDS)]
        table.add_row(f"{row[0]['epsilon']:g}", f"{row[0]['clip_norm']:g}", *map(_figure, row))
    return table


def _figure(result: Mapping[str, Any]) -> str:
    return f"{result['auc']['mean']:.3f} ± {result['auc']['sd']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
