"""Time to accuracy where holders differ in speed: rounds, over-selection, and updates as they come.

    python benchmarks/asynchronous.py --seeds 3             # some five minutes on two idle cores
    python benchmarks/asynchronous.py --seeds 3 --figure docs/simulate-time.png --json -

A hundred banks of the UCI credit data, each with a pace of its own: log-normal, a minute in the
middle, σ = 1. Every way of training has the same ε, the same number of models and the same seeds;
time is simulated. The data must be there: `sotto data get uci-credit-default`, or SOTTO_DATA.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

import sotto
from common.settings import plan_for
from simulations.experiment import Experiment, ExperimentResult, run_experiment
from simulations.faults import Faults, Pace
from simulations.results import mean_over_holders
from sotto.page import INK, tidy

HOLDERS, ROUNDS, EPSILON = 100, 60, 8.0
PACE = Pace(60.0, 1.0)
METRIC, TARGET = "auc", 0.75
COMMON: Mapping[str, Any] = {
    "epsilon": EPSILON, "delta": 1e-5, "rounds": ROUNDS, "learning_rate": 2.0,
    "strategy": "fedavg", "min_holders": 20,
}  # fmt: skip

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Simulated hours, and the metric then."""


@dataclass(frozen=True)
class Way:
    """One way of training.

    Args:
        name: for people.
        color: of its curve.
        settings: of its plan, beside what all have in common.
    """

    name: str
    color: str
    settings: Mapping[str, Any]


WAYS = (
    Way("everybody, every round", "#8a93a6", {}),
    Way("20 of them", "#1d2433", {"cohort": 20}),
    Way("the first 20 of 26", "#2f6f8f", {"cohort": 20, "over_selection": 0.3}),
    Way("fedbuff, 20 of 26", "#d55e00", {"strategy": "fedbuff", "buffer": 20, "cohort": 26}),
    Way("fedbuff, 20 of all", "#e69f00", {"strategy": "fedbuff", "buffer": 20}),
)


@dataclass(frozen=True)
class Row:
    """What came of one way, means over the seeds.

    Args:
        way: its name.
        round_seconds: simulated seconds of a round, the median.
        hours: simulated, of the whole run.
        hours_to_target: until the mean curve first reaches the target; None if it never does.
        final: metric of the last model.
        deviation: of it, over seeds.
        slow_share: of the updates that count, from the slower half of the holders.
        spare_share: of the updates that were computed, that do not count.
    """

    way: str
    round_seconds: float
    hours: float
    hours_to_target: float | None
    final: float
    deviation: float
    slow_share: float
    spare_share: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in every way, print the table, draw the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figure", type=Path, help="where the PNG goes")
    parser.add_argument("--json", metavar="FILE", help="write figures; - for standard output")
    chosen = parser.parse_args(arguments)
    screen = sys.stderr if chosen.json == "-" else sys.stdout
    curves, rows = list[Curve](), list[Row]()
    for way in WAYS:
        result = trained(way, chosen.seeds)
        curves.append(mean_curve(result))
        rows.append(row_of(way, result))
        print(line_of(rows[-1]), file=screen, flush=True)
    if chosen.figure:
        drawn(curves).savefig(chosen.figure, dpi=150)
    if chosen.json:
        text = json.dumps([asdict(row) for row in rows], indent=2)
        print(text) if chosen.json == "-" else Path(chosen.json).write_text(text)
    return 0


def trained(way: Way, seeds: int) -> ExperimentResult:
    """Every seed of one way."""
    task = sotto.load("credit-risk", "uci-default")
    plan = plan_for(task, {**COMMON, **way.settings}, holders=HOLDERS)
    plan = plan.model_copy(update={"evaluate_every": 3})
    return run_experiment(Experiment(task, plan, range(seeds), HOLDERS, faults=Faults(pace=PACE)))


def mean_curve(result: ExperimentResult) -> Curve:
    """The mean over seeds of what the metric is at a moment: that of the newest model judged."""
    judged = [
        [
            (hours, mean_over_holders(summary.metrics, METRIC))
            for hours, summary in zip(np.array(clock) / 3600, run.history, strict=True)
            if summary.metrics
        ]
        for clock, run in zip(result.clocks, result.runs, strict=True)
    ]
    moments = np.unique([hours for seed in judged for hours, _ in seed])
    moments = moments[moments >= max(seed[0][0] for seed in judged)]
    values = []
    for seed in judged:
        hours, metrics = np.array(seed).T
        values.append(metrics[np.searchsorted(hours, moments, side="right") - 1])
    return moments, np.mean(values, axis=0)


def row_of(way: Way, result: ExperimentResult) -> Row:
    """The figures of one way."""
    moments, values = mean_curve(result)
    there = np.flatnonzero(values >= TARGET)
    finals = [mean_over_holders(run.final.metrics, METRIC) for run in result.runs]
    counted = sum(len(each.accepted) for run in result.runs for each in run.history)
    spare = sum(each.spare + each.late for each in result.faults)
    rounds = np.concatenate([np.diff(clock, prepend=0.0) for clock in result.clocks])
    return Row(
        way.name,
        float(np.median(rounds)),
        float(np.mean([clock[-1] for clock in result.clocks])) / 3600,
        float(moments[there[0]]) if len(there) else None,
        float(np.mean(finals)),
        float(np.std(finals, ddof=1)) if len(finals) > 1 else 0.0,
        slow_share(result),
        spare / (spare + counted),
    )


def slow_share(result: ExperimentResult) -> float:
    """Of the updates that count, the share that is from the slower half of the holders."""
    shares = []
    for run in result.runs:
        paces = {name: PACE.seconds(run.plan.seed, name) for name in result.holders}
        middle = np.median(list(paces.values()))
        shares += [paces[name] > middle for each in run.history for name in each.accepted]
    return float(np.mean(shares))


def line_of(row: Row) -> str:
    """A row of the table."""
    reached = "–" if row.hours_to_target is None else f"{row.hours_to_target:.2f}"
    cells = (
        row.way, f"{row.round_seconds:.0f}", f"{row.hours:.2g}", reached,
        f"{row.final:.3f} ± {row.deviation:.3f}".replace("0.", "."),
        f"{row.slow_share:.0%}", f"{row.spare_share:.0%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def drawn(curves: Sequence[Curve]) -> Figure:
    """Metric over simulated time, which is on a logarithmic axis; a curve for each way."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for way, (moments, values) in zip(WAYS, curves, strict=True):
        axis.step(moments, values, where="post", color=way.color, linewidth=1.6, label=way.name)
    axis.axhline(TARGET, color=INK, linewidth=0.6, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("simulated hours", color=INK, fontsize=9)
    axis.set_ylabel("AUC, mean over banks and seeds", color=INK, fontsize=9)
    tidy(axis)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    sys.exit(main())
