"""What malicious holders do to a model, and what strategies and norm bounds do about it.

    python benchmarks/poisoning.py --json poisoning.json   # about 12 minutes on two idle cores
    python benchmarks/poisoning.py --quick                 # made-up data, one seed, seconds

Twenty banks share a model of uci-default; none, two, four or six of them lie in every round. The
AUC is the mean over the fourteen banks that are honest in all of these cases, so that the cases
differ in nothing but the attack; ± is the standard deviation over seeds, which decide the split,
the model's start, the noise and who lies. The tables and the figure are those of docs/results.md.
uci-default must be there: `sotto data get uci-default`, or SOTTO_DATA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.progress import track

import sotto
from common.errors import RunError
from common.flower import quiet_flower
from common.tasks.base import Source, Task
from simulations.experiment import Experiment, run_experiment
from simulations.faults import Byzantine, Faults
from simulations.results import mean_over_holders
from sotto.page import INK, tidy

HOLDERS, SHARES = 20, (0.1, 0.2, 0.3)
MOST = max(SHARES)
CPU = torch.device("cpu")
FITTED = 2.0
"""An L2 bound on updates that fits these data: without privacy honest ones are 0.3 to 1 long."""

# -- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Defence:
    """What the coordinator does with updates, and what holders do to theirs.

    Args:
        name: in tables.
        settings: of the plan, besides :data:`TRAINING`.
        colour: in the figure.
        marker: in the figure.
    """

    name: str
    settings: Mapping[str, Any]
    colour: str
    marker: str


TRAINING: Mapping[str, Any] = {
    "rounds": 40,
    "local_steps": 1,
    "learning_rate": 2.0,
    "strategy": "fedavg",
    "average_from": 0.5,
    "evaluate": "final",
}
"""Of every run: one step on all rows a round, as the task recommends, but without the server's
momentum, which the robust strategies do not have."""

_PLAIN: Mapping[str, Any] = {"no_dp": True}
DEFENCES = (
    Defence("mean", _PLAIN, "#d55e00", "o"),
    Defence(f"mean, ≤ {FITTED:g}", {**_PLAIN, "max_update_norm": FITTED}, "#e69f00", "s"),
    Defence("median", {**_PLAIN, "strategy": "fedmedian"}, "#2f6f8f", "D"),
    Defence("trimmed mean", {**_PLAIN, "strategy": "fedtrimmedavg", "trim": 0.3}, "#009e73", "^"),
    Defence(
        "Krum",
        {**_PLAIN, "strategy": "krum", "malicious": 6, "min_holders": 15},
        "#4b3f8f",
        "v",
    ),
    Defence("mean, ε = 8", {"epsilon": 8.0}, "#cc79a7", "P"),
    Defence("mean, ε = 3", {"epsilon": 3.0}, "#7f7f7f", "X"),
    Defence("median, ε = 8", {"epsilon": 8.0, "strategy": "fedmedian"}, "#56b4e9", "*"),
)
ATTACKS: Mapping[str, str] = {
    "sign-flip": "sign flip",
    "scale:10": "× 10",
    "scale:-10": "× −10",
    "label-flip": "label flip",
    "little": "a little is enough, z = 1.5",
    "noise:100": "Gaussian, 100 × as long",
    "longest": "as long as is accepted",
}
"""As ``--byzantine`` takes it → heading."""

BOUNDED = ("mean", "mean, ε = 8", f"mean, ≤ {FITTED:g}")
"""Defences by the norm alone, the loosest bound first."""
FACTORS = (1, 3, 10, 30, 100, 300, 1000)
"""Two of twenty holders send so many times −u."""


@dataclass(frozen=True)
class Case:
    """One attack on one defence.

    Args:
        defence: name of one of :data:`DEFENCES`.
        attack: as ``--byzantine`` takes it; empty for none.
        share: of holders that lie.
    """

    defence: str
    attack: str = ""
    share: float = 0.0

    @property
    def faults(self) -> Faults | None:
        """Who lies, and how."""
        if not self.attack:
            return None
        return Faults(byzantine=Byzantine.parsed(f"{self.share}:{self.attack}"))


@dataclass(frozen=True)
class Setup:
    """What all cases have in common.

    Args:
        source: of credit-risk.
        seeds: of each case.
        settings: of the plan, over :data:`TRAINING`.
    """

    source: str = "uci-default"
    seeds: Sequence[int] = range(5)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """One run: means over the holders that are honest at every share.

    Args:
        auc: of the final model; NaN if the run ended before.
        brier: mean squared error of its probabilities.
        rejected: share of malicious updates that the coordinator refused.
        honest_rejected: share of honest updates that it refused.
    """

    auc: float = math.nan
    brier: float = math.nan
    rejected: float = math.nan
    honest_rejected: float = math.nan


def cases(shares: Sequence[float]) -> list[Case]:
    """All of both tables, each once."""
    honest = [Case(defence.name) for defence in DEFENCES]
    attacked = [
        Case(defence.name, attack, share)
        for defence in DEFENCES
        for attack in ATTACKS
        for share in shares
    ]
    scaled = [Case(name, f"scale:{-factor}", shares[0]) for name in BOUNDED for factor in FACTORS]
    longest = [Case(name, "longest", shares[0]) for name in BOUNDED]
    return list(dict.fromkeys([*honest, *attacked, *scaled, *longest]))


@cache
def _task(source: str) -> Task:
    """The task; its rows are read once, and divided among the holders."""
    quiet_flower()
    task = sotto.load("credit-risk", source)
    task.source = _Divided(task.source)
    return task


class _Divided(Source):
    """Another source's holders, kept: hundreds of runs begin with the same rows."""

    def __init__(self, source: Source) -> None:
        self.name = source.name  # type: ignore[misc]
        self.own_holders = source.own_holders  # type: ignore[misc]
        self.schema, self.delta = source.schema, source.delta
        self.holder_size = source.holder_size
        self._tables = source.tables(HOLDERS)

    def tables(self, holders: int | None = None, *, seed: int = 0) -> Mapping[str, Any]:
        return self._tables


def run(case: Case, setup: Setup) -> list[Figures]:
    """Every seed of a case."""
    torch.set_num_threads(1)  # cases share the cores
    task = _task(setup.source)
    (defence,) = (each for each in DEFENCES if each.name == case.defence)
    plan = sotto.plan_for(task, {**TRAINING, **defence.settings, **setup.settings}, holders=HOLDERS)
    figures = []
    for seed in setup.seeds:
        experiment = Experiment(task, plan, (seed,), HOLDERS, CPU, faults=case.faults)
        try:
            (finished,) = run_experiment(experiment).runs
        except RunError:  # too few updates were accepted in a round
            figures.append(Figures())
            continue
        names = set(finished.final.metrics)
        judged = names - Byzantine(MOST, "zero").malicious(names, seed)
        liars = Byzantine(case.share, "zero").malicious(names, seed)
        metrics = {name: finished.final.metrics[name] for name in judged}
        missed = [set(summary.missed) for summary in finished.history]
        figures.append(
            Figures(
                mean_over_holders(metrics, "auc"),
                mean_over_holders(metrics, "brier"),
                _share([len(each & liars) for each in missed], len(liars)),
                _share([len(each - liars) for each in missed], len(names - liars)),
            )
        )
    return figures


def _share(counts: Sequence[int], of: int) -> float:
    return float(np.mean(counts)) / of if of else 0.0


# -- tables ---------------------------------------------------------------------------------------

Results = Mapping[Case, Sequence[Figures]]


def cell(figures: Sequence[Figures]) -> str:
    """AUC, mean ± deviation over seeds."""
    values = np.array([each.auc for each in figures])
    if np.isnan(values).any():
        return "ended"
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{values.mean():.3f} ± {deviation:.3f}".replace("0.", ".")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def strategies_table(results: Results, shares: Sequence[float]) -> str:
    """Attack and share down, defences across."""

    def row(attack: str, share: float, *name: str) -> list[str]:
        return [*name, *(cell(results[Case(each.name, attack, share)]) for each in DEFENCES)]

    rows = [row("", 0.0, "none", "0")]
    for attack, title in ATTACKS.items():
        for share in shares:
            name = title if share == shares[0] else ""
            rows.append(row(attack, share, name, f"{100 * share:.0f} %"))
    return markdown(["attack", "liars", *(each.name for each in DEFENCES)], rows)


def bounds_table(results: Results, share: float) -> str:
    """Factor down, defences by the norm across: AUC, and what was rejected of the lies."""

    def row(title: str, attack: str) -> list[str]:
        found = [results[Case(name, attack, share)] for name in BOUNDED]
        return [
            title,
            *(
                f"{cell(figures)} ({100 * np.mean([each.rejected for each in figures]):.0f} %)"
                for figures in found
            ),
        ]

    rows = [row(f"−{factor}", f"scale:{-factor}") for factor in FACTORS]
    rows.append(row("longest", "longest"))
    return markdown(["factor", *BOUNDED], rows)


def honest_costs(results: Results) -> str:
    """What each strategy loses where nobody lies, by the same seeds, against the mean."""

    def difference(name: str, other: str) -> str:
        pairs = zip(results[Case(name)], results[Case(other)], strict=True)
        values = np.array([one.auc - two.auc for one, two in pairs])
        return f"{values.mean():+.4f} ± {np.std(values):.4f}"

    return markdown(
        ["nobody lies", "AUC against the mean"],
        [[each.name, difference(each.name, "mean")] for each in DEFENCES[1:]],
    )


def document(results: Results, setup: Setup, seconds: float) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "task": "credit-risk",
        "source": setup.source,
        "holders": HOLDERS,
        "seeds": list(setup.seeds),
        "training": {**TRAINING, **setup.settings},
        "seconds": seconds,
        "cases": [
            {
                "defence": case.defence,
                "attack": case.attack or None,
                "share": case.share,
                **{
                    name: [_number(getattr(each, name)) for each in figures]
                    for name in ("auc", "brier", "rejected", "honest_rejected")
                },
            }
            for case, figures in results.items()
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- the figure -----------------------------------------------------------------------------------


def draw(results: Results, shares: Sequence[float]) -> Figure:
    """A panel for each attack, and one for what bounds on the norm let through."""
    figure = Figure(figsize=(11.4, 6.2), layout="constrained")
    *panels, last = figure.subplots(2, 4, sharey=True).flatten()
    for axes, (attack, title) in zip(panels, ATTACKS.items(), strict=True):
        for place, defence in enumerate(DEFENCES):
            chosen = [Case(defence.name), *(Case(defence.name, attack, one) for one in shares)]
            aside = 0.5 * (place - (len(DEFENCES) - 1) / 2)  # so that none hides another
            places = [100 * case.share + aside for case in chosen]
            _line(axes, places, chosen, results, defence)
        _finish(axes, title, "malicious holders, %")
        axes.set_xticks([0, *(100 * share for share in shares)])
    for name in BOUNDED:
        (defence,) = (each for each in DEFENCES if each.name == name)
        chosen = [Case(name, f"scale:{-factor}", shares[0]) for factor in FACTORS]
        _line(last, list(FACTORS), chosen, results, defence)
    last.set_xscale("log")
    _finish(last, f"× −factor, {100 * shares[0]:.0f} % malicious", "factor")
    figure.axes[0].set_ylabel("AUC of honest holders", color=INK, fontsize=9)
    figure.axes[4].set_ylabel("AUC of honest holders", color=INK, fontsize=9)
    figure.legend(
        handles=[
            Line2D([], [], color=each.colour, marker=each.marker, markersize=6, label=each.name)
            for each in DEFENCES
        ],
        loc="outside lower center",
        ncols=len(DEFENCES),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return figure


def _line(
    axes: Any, places: Sequence[float], chosen: Sequence[Case], results: Results, defence: Defence
) -> None:
    means = [float(np.mean([each.auc for each in results[case]])) for case in chosen]
    axes.plot(
        places,
        means,
        color=defence.colour,
        marker=defence.marker,
        markersize=5,
        linewidth=1.6,
        alpha=0.9,
    )


def _finish(axes: Any, title: str, below: str) -> None:
    tidy(axes)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(below, color=INK, fontsize=9)
    axes.set_ylim(0.36, 0.82)


# -- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")
    parser.add_argument("--quick", action="store_true", help="made-up data, one seed, few rounds")
    parser.add_argument("--figure", type=Path, help="write the figure, a PNG")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once")
    chosen = parser.parse_args(arguments)
    screen = Console(file=sys.stderr if chosen.json == "-" else sys.stdout)
    setup, shares = Setup(), SHARES
    if chosen.quick:
        setup, shares = Setup("synthetic", (0,), {"rounds": 10}), (MOST,)
    begin = time.perf_counter()
    results = dict(measured(cases(shares), setup, chosen.processes))
    seconds = time.perf_counter() - begin
    for table in (
        strategies_table(results, shares),
        bounds_table(results, shares[0]),
        honest_costs(results),
    ):
        screen.print(table, "", markup=False, soft_wrap=True)
    screen.print(f"{len(results) * len(setup.seeds)} runs in {seconds:.0f} s")
    if chosen.figure:
        draw(results, shares).savefig(chosen.figure, dpi=130)
    written = json.dumps(document(results, setup, seconds), indent=2)
    if chosen.json == "-":
        print(written)
    elif chosen.json:
        Path(chosen.json).write_text(written + "\n")
    return 0


def measured(
    wanted: Sequence[Case], setup: Setup, processes: int
) -> Iterator[tuple[Case, list[Figures]]]:
    """Each case with its figures, several cases at once."""
    with ProcessPoolExecutor(processes) as pool:
        found = pool.map(partial(run, setup=setup), wanted)
        progress = Console(stderr=True)
        yield from track(
            zip(wanted, found, strict=True), total=len(wanted), console=progress, transient=True
        )


if __name__ == "__main__":
    sys.exit(main())
