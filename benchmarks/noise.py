"""What unpredictable noise costs: beside ``torch.randn``, and in a holder's DP-SGD step.

    python benchmarks/noise.py                       # every task and source, about two minutes
    python benchmarks/noise.py --only credit --json -

For each task on each of its sources: the seconds that :class:`~common.privacy.noise.OsRandomness`
takes for the D numbers of a step, that ``torch.randn`` takes for as many, and that the whole step
takes in :class:`~client.trainer.Trainer`, noise included. The steps are those recommended at ε = 5,
and ones with an expected batch of 64. The holder is the source's smallest, so that its step is the
shortest. The target is noise of at most a quarter of a step. Beside them, the seconds of exact
discrete noise for a histogram of 10,000 cells. Seconds are of processor time on one
thread, so that other work on the machine counts for little. Real data sets must be there:
`sotto data get NAME`, or SOTTO_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from client.trainer import Trainer
from common.plan import TrainingPlan
from common.privacy.discrete_noise import discrete_gaussian
from common.privacy.noise import OsRandomness
from common.settings import plan_for
from common.tasks import load as load_task
from common.tasks.base import HolderData, Task

SOURCES: Mapping[str, tuple[str, ...]] = {
    "medical-diagnosis": ("breast-cancer", "heart-disease"),
    "credit-risk": ("synthetic", "uci-default", "german"),
    "recommendation": ("synthetic", "movielens-100k", "movielens-1m"),
}
EPSILON = 5.0
SMALL_BATCH = 64
TARGET = 0.25
"""Most of a step's time that noise may take."""
CELLS, CELL_SIGMA = 10_000, 7.8


def cases(task: Task) -> Iterator[tuple[str, TrainingPlan]]:
    """The steps to time: by name, and the plan that takes them."""
    yield "recommended", plan_for(task, {"epsilon": EPSILON})
    yield f"batch {SMALL_BATCH}", plan_for(task, {"epsilon": EPSILON, "batch_size": SMALL_BATCH})


def measure(name: str, source: str, repeats: int, steps: int) -> list[dict[str, Any]]:
    """Both kinds of step of a task on a source.

    Args:
        name: of the task.
        source: of its data.
        repeats: of each measurement; the median counts.
        steps: in one call of the trainer; what a round does beside its steps is spread over them.
    """
    task = load_task(name, source)
    trainer = Trainer(task, _smallest(task).train, torch.device("cpu"), seed=0)
    return [
        {"task": name, "source": source, "step": step, **_measured(trainer, plan, repeats, steps)}
        for step, plan in cases(task)
    ]


def _measured(trainer: Trainer, plan: TrainingPlan, repeats: int, steps: int) -> dict[str, Any]:
    randomness, shape = OsRandomness(), (trainer.dimension,)
    long = plan.model_copy(update={"local_steps": steps})
    divisor = plan.expected_batch_size
    start = torch.zeros(shape)
    own = _seconds(lambda: randomness.normal(shape, std=1.0), repeats)
    torchs = _seconds(lambda: torch.randn(shape), repeats)
    step = _seconds(
        lambda: trainer.train(long, start, None, randomness, divisor=divisor), repeats, steps
    )
    return {
        "parameters": trainer.dimension,
        "units": trainer.units,
        "expected_batch": round(plan.sampling_rate * trainer.units, 1),
        "seconds": {"noise": own, "randn": torchs, "step": step},
        "noise_over_randn": round(own / torchs, 1),
        "noise_over_step": round(own / step, 4),
        "met": own <= TARGET * step,
    }


def _smallest(task: Task) -> HolderData:
    """The data of the holder with the fewest training units."""
    return min(task.holder_data().values(), key=lambda data: len(data.train))


def _seconds(call: Callable[[], object], repeats: int, units: int = 1) -> float:
    """Median seconds of processor time of one of a call's ``units``, once it is warm."""
    call()
    measured = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        measured.append(time.process_time() - begin)
    return float(f"{statistics.median(measured) / units:.4g}")


def histogram_seconds(repeats: int) -> float:
    """Of exact noise for a histogram."""
    randomness = OsRandomness()
    return _seconds(lambda: discrete_gaussian(CELLS, CELL_SIGMA, randomness), repeats)


def document(results: list[dict[str, Any]], histogram: float) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "benchmark": "noise",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {name: version(name) for name in ("torch", "cryptography", "opacus")},
        "target": TARGET,
        "cases": results,
        "histogram": {"cells": CELLS, "sigma": CELL_SIGMA, "seconds": histogram},
    }


def table(results: list[dict[str, Any]]) -> Table:
    """The medians, for people."""
    made = Table(
        title="Noise in a DP-SGD step, milliseconds of one core (medians)", title_justify="left"
    )
    for column in ("task", "source", "step", "D", "batch", "noise", "torch.randn", "whole step"):
        made.add_column(column, justify="left" if column in ("task", "source", "step") else "right")
    for column in ("noise / randn", "noise / step"):
        made.add_column(column, justify="right")
    for result in results:
        colour = "green" if result["met"] else "red"
        made.add_row(
            *(result[name] for name in ("task", "source", "step")),
            str(result["parameters"]),
            f"{result['expected_batch']:g}",
            *(f"{1e3 * result['seconds'][name]:.3f}" for name in ("noise", "randn", "step")),
            f"{result['noise_over_randn']:g}",
            f"[{colour}]{result['noise_over_step']:.1%}[/]",
        )
    return made


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for stdout")
    parser.add_argument("--only", default="", help="tasks whose name begins so")
    parser.add_argument("--repeats", type=int, default=9, help="of each measurement")
    parser.add_argument("--steps", type=int, default=20, help="in a call of the trainer")
    return parser.parse_args()


def main() -> int:
    """Measure, show, write; exit 1 if noise takes more of a step than it may."""
    arguments = _arguments()
    torch.set_num_threads(1)
    console = Console(stderr=arguments.json == "-")
    results = []
    for name, sources in SOURCES.items():
        for source in sources if name.startswith(arguments.only) else ():
            console.print(f"Measuring {name} on {source} ...")
            results += measure(name, source, arguments.repeats, arguments.steps)
    console.print(table(results))
    histogram = histogram_seconds(arguments.repeats)
    console.print(f"Exact discrete noise in {CELLS} cells: {1e3 * histogram:.1f} ms")
    text = json.dumps(document(results, histogram), indent=2) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)
    return 0 if all(result["met"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
