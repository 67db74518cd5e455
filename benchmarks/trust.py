"""Three levels of trust: what ε costs with noise at each holder, and with noise in the sum only.

    python benchmarks/trust.py                # both data sets, about 20 minutes on two idle cores
    python benchmarks/trust.py --only heart   # the data sets whose name begins so
    python benchmarks/trust.py --json -       # figures as JSON

Each curve is a ``sotto sweep`` command, which is printed; runs that are in the folder already are
not computed again. Beside them, for one seed, the same run with every key, share and mask of the
protocol, to show that what the sweeps leave out changes nothing. Real data sets must be there:
`sotto data get NAME`, or SOTTO_DATA.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure

import sotto
from benchmarks.curves import figure_text, save
from common.plan import TrainingPlan
from common.privacy.distributed import against_coalitions
from common.settings import plan_for
from simulations.experiment import Experiment, run_experiment
from sotto.page import INK, tidy
from sotto.show import setting_text

ROOT = Path(__file__).resolve().parents[1]
Document = Mapping[str, Any]
Point = Mapping[str, Any]

PRIVATE = "0.05,0.1,0.25,0.5,1,3,8"
LEVELS: Mapping[str, str] = {
    "plain": f"--epsilon {PRIVATE},inf --no-baselines",
    "secure": f"--epsilon {PRIVATE},inf --no-baselines --aggregation secure",
    "secure-sum": f"--epsilon {PRIVATE} --aggregation secure-sum",
}
"""Level → arguments of its sweep. Pooled data come with the last, by the same settings."""


@dataclass(frozen=True)
class Data:
    """One data set.

    Args:
        name: of its files.
        title: for people.
        task: of the sweep.
        source: of it.
        delta: δ.
        metric: that is compared.
        seeds: how many.
    """

    name: str
    title: str
    task: str
    source: str
    delta: float
    metric: str
    seeds: int

    def command(self, level: str) -> str:
        """Arguments of ``sotto sweep``."""
        return (
            f"{self.task} --source {self.source} --delta {self.delta:g} --seeds {self.seeds} "
            f"{LEVELS[level]}"
        )

    def plan(self, epsilon: float, **settings: object) -> TrainingPlan:
        """What the sweep of ``secure-sum`` runs."""
        task = sotto.load(self.task, self.source)
        chosen = {"aggregation": "secure-sum", "epsilon": epsilon, "delta": self.delta, **settings}
        return plan_for(task, chosen, holders=task.source.own_holders)


DATA = (
    Data(
        "heart",
        "Heart disease, four hospitals: accuracy",
        "medical-diagnosis",
        "heart-disease",
        1e-4,
        "accuracy",
        20,
    ),
    Data(
        "cards",
        "Credit cards, ten banks: AUC",
        "credit-risk",
        "uci-default",
        1e-5,
        "auc",
        5,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, print the tables, draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="data sets whose name begins so")
    parser.add_argument("--out", type=Path, default=Path("runs/trust"), help="where runs are kept")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs", help="where the PNG goes")
    parser.add_argument("--json", metavar="FILE", help="write figures; - for standard output")
    chosen = parser.parse_args(arguments)
    screen = sys.stderr if chosen.json == "-" else sys.stdout
    curves = {
        data: {level: swept(data, level, chosen.out, screen) for level in LEVELS}
        for data in DATA
        if data.name.startswith(chosen.only)
    }
    for data, levels in curves.items():
        print(f"\n## {data.title}\n\n{table(data, levels)}\n", file=screen)
        print(coalition_table(data), file=screen)
        print(f"\nplain and secure differ by at most {apart(data, levels):.1e}", file=screen)
        print(f"with masks, parameters differ by at most {with_masks(data):.1e}", file=screen)
    if len(curves) == len(DATA):
        save(draw(curves), chosen.figures / "results-trust.png")
    if chosen.json:
        text = json.dumps(document(curves), indent=2)
        print(text) if chosen.json == "-" else Path(chosen.json).write_text(text)
    return 0


def swept(data: Data, level: str, folder: Path, screen: Any) -> Document:
    """The document of one level, from ``sotto sweep``."""
    out = folder / f"{data.name}-{level}"
    command = [*shlex.split(data.command(level)), "--out", str(out)]
    print(f"$ sotto sweep {' '.join(command)}", flush=True, file=screen)
    subprocess.run(
        [sys.executable, "-m", "sotto.cli", "sweep", *command, "--quiet"],
        check=True,
        stdout=screen,
    )
    found: Document = json.loads((out / "sweep.json").read_text())
    return found


def with_masks(data: Data, epsilon: float = 1.0) -> float:
    """One run through the protocol and one that sums as sweeps do: how far parameters are apart."""
    task, plan = sotto.load(data.task, data.source), data.plan(epsilon, evaluate="final")
    experiment = Experiment(task, plan, engine="opacus")
    masked, summed = (
        np.asarray(run_experiment(each).runs[0].parameters)
        for each in (experiment, replace(experiment, engine="batched"))
    )
    return float(np.abs(masked - summed).max())


# -- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one ε gives; summaries over seeds, or None where there is none.

    Args:
        epsilon: None without privacy.
        own: of each holder's own noise, ``plain`` and ``secure``.
        sum: of noise in the sum.
        central: of all data in one place, by the settings of ``sum``.
        rounds: of ``own`` and of ``sum``.
    """

    epsilon: float | None
    own: Mapping[str, Any]
    sum: Mapping[str, Any] | None
    central: Mapping[str, Any] | None
    rounds: tuple[int, int | None]


def rows(data: Data, levels: Mapping[str, Document]) -> Iterator[Row]:
    """By ε, no privacy last."""
    sums = {point["settings"]["epsilon"]: point for point in levels["secure-sum"]["points"]}
    for point in levels["plain"]["points"]:
        other: Point | None = sums.get(point["settings"]["epsilon"])
        yield Row(
            point["settings"]["epsilon"],
            point["metrics"][data.metric],
            other["metrics"][data.metric] if other else None,
            other["baselines"]["pooled"][data.metric] if other else None,
            (point["rounds"], other["rounds"] if other else None),
        )


def table(data: Data, levels: Mapping[str, Document]) -> str:
    """A row for each ε, as Markdown."""
    lines = [
        "| ε | plain, secure | rounds | secure-sum | rounds | pooled (central DP-SGD) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows(data, levels):
        cells = [
            setting_text("epsilon", row.epsilon),
            figure_text(row.own),
            str(row.rounds[0]),
            figure_text(row.sum) if row.sum else "–",
            str(row.rounds[1] or "–"),
            figure_text(row.central) if row.central else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def coalition_table(data: Data, epsilon: float = 1.0) -> str:
    """What holds against the coordinator with c holders, as Markdown."""
    found = against_coalitions(data.plan(epsilon))
    return "\n".join(
        [
            f"| c | {' | '.join(str(each.holders) for each in found)} |",
            f"| --- | {' | '.join('---' for _ in found)} |",
            f"| ε | {' | '.join(f'{each.epsilon:.2f}' for each in found)} |",
        ]
    )


def apart(data: Data, levels: Mapping[str, Document]) -> float:
    """The most that masks change a seed's figure where each holder has its own noise."""
    return max(
        abs(one - other)
        for plain, secure in zip(levels["plain"]["points"], levels["secure"]["points"], strict=True)
        for one, other in zip(
            plain["metrics"][data.metric]["per_seed"],
            secure["metrics"][data.metric]["per_seed"],
            strict=True,
        )
    )


def document(curves: Mapping[Data, Mapping[str, Document]]) -> dict[str, Any]:
    """All figures, for JSON."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "data": {
            data.name: {
                "delta": data.delta,
                "seeds": data.seeds,
                "metric": data.metric,
                "levels": levels,
            }
            for data, levels in curves.items()
        },
    }


# -- the figure -----------------------------------------------------------------------------------

_LINES = (  # of a row, label, colour, marker, dashes
    ("own", "plain and secure: each holder's own noise", "#d55e00", "s", "-"),
    ("sum", "secure-sum: noise in the sum", "#2f6f8f", "o", "-"),
    ("central", "all data in one place (central DP-SGD)", "#5b6478", None, (0, (1, 1.6))),
)
_NO_DP = 24.0
"""Where no privacy stands on the axis of ε."""


def draw(curves: Mapping[Data, Mapping[str, Document]]) -> Figure:
    """A panel for each data set, with all levels."""
    figure = Figure(figsize=(9.4, 4.3), layout="constrained")
    panels = figure.subplots(1, len(curves))
    for axes, (data, levels) in zip(panels, curves.items(), strict=True):
        found = list(rows(data, levels))
        for number, (kind, label, colour, marker, dashes) in enumerate(_LINES):
            there = [row for row in found if getattr(row, kind) and row.epsilon]
            _curve(axes, there, kind, number - 1.0, label, colour, marker, dashes)
        _without_privacy(axes, next(row for row in found if row.epsilon is None))
        _axis_of_epsilon(axes, [row.epsilon for row in found if row.epsilon])
        delta = f"{data.delta:.0e}".replace("e-0", "e-")
        title = f"{data.title} (δ = {delta}, {data.seeds} seeds)"
        axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.8,
    )
    return figure


def _curve(
    axes: Any,
    found: Sequence[Row],
    kind: str,
    aside: float,
    label: str,
    colour: str,
    marker: str | None,
    dashes: Any,
) -> None:
    """Means and deviations, a little aside of ε so that bars do not cover each other."""
    places = np.array([row.epsilon for row in found]) * 1.035**aside
    means, sds = (np.array([getattr(row, kind)[name] for row in found]) for name in ("mean", "sd"))
    if marker is None:
        axes.plot(places, means, color=colour, linestyle=dashes, linewidth=1.6, label=label)
        axes.fill_between(places, means - sds, means + sds, color=colour, alpha=0.12, linewidth=0)
        return
    axes.errorbar(
        places,
        means,
        yerr=sds,
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=2,
        elinewidth=1.1,
        capsize=3,
        zorder=3,
        label=label,
    )


def _without_privacy(axes: Any, row: Row) -> None:
    axes.errorbar(
        [_NO_DP],
        [row.own["mean"]],
        yerr=[row.own["sd"]],
        color=INK,
        marker="D",
        markersize=5,
        elinewidth=1.1,
        capsize=3,
    )
    axes.axvline(_NO_DP / 1.75, color="#cfd5e0", linewidth=0.9, linestyle=(0, (2, 3)))


def _axis_of_epsilon(axes: Any, values: Sequence[float | None]) -> None:
    tidy(axes)
    axes.set_xscale("log")
    axes.set_xticks([*values, _NO_DP], [*(f"{value:g}" for value in values), "no DP"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ε of the run, against the coordinator (logarithmic)", color=INK, fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
