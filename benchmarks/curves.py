"""What privacy costs: the sweeps, tables and figures of docs/results.md, from one command.

    python benchmarks/curves.py                # everything, about 15 minutes on two idle cores
    python benchmarks/curves.py --only heart   # the curves whose name begins so

Each curve is a ``sotto sweep`` command, which is printed. Runs that are already in the folder are
not computed again, so a second call redraws. Real data sets must be there: `sotto data get NAME`,
or SOTTO_DATA.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import sotto
from benchmarks.flamby_epsilon import PUBLISHED, spent_everywhere
from benchmarks.flamby_epsilon import table as flamby_table
from sotto.page import INK, tidy
from sotto.show import setting_text
from sotto.sweep_figure import draw

ROOT = Path(__file__).resolve().parents[1]
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One sweep over ε.

    Args:
        name: of its files.
        command: arguments of ``sotto sweep``.
        metrics: columns of its table, for the federation and each baseline.
        seeds: of the federation.
        baseline_seeds: of each holder alone and of all data pooled, the first of the seeds.
    """

    name: str
    command: str
    metrics: tuple[str, ...]
    seeds: int = 20
    baseline_seeds: int = 20

    def commands(self) -> list[str]:
        """Arguments of the sweeps: one, or one without baselines and a smaller one with them."""
        full = f"{self.command} --seeds {self.baseline_seeds}"
        if self.seeds == self.baseline_seeds:
            return [full]
        return [f"{self.command} --seeds {self.seeds} --no-baselines", full]


_HEART = "medical-diagnosis --source heart-disease --delta 1e-4 --epsilon 0.1,1,5,10,50,inf"
_CREDIT = "--epsilon 0.5,1,3,8,inf"
CURVES = (
    Curve("heart-flamby", f"{_HEART} --preprocessing flamby", ("accuracy", "auc")),
    Curve("heart-public", f"{_HEART} --preprocessing public", ("accuracy", "auc")),
    Curve("credit-german", f"credit-risk --source german {_CREDIT}", ("auc",)),
    Curve(
        "credit-uci-default",
        f"credit-risk --source uci-default {_CREDIT}",
        ("auc",),
        baseline_seeds=5,
    ),
)
_NAMES = {"accuracy": "accuracy", "auc": "AUC"}
_KINDS = {"federation": "", "local": "each alone", "pooled": "pooled"}
"""Kind → heading of its column; the federation's is the metric."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, print the tables, draw the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="curves whose name begins so")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), help="where runs are kept")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs", help="where PNGs go")
    chosen = parser.parse_args(arguments)
    written = {
        curve.name: swept(curve, chosen.out)
        for curve in CURVES
        if curve.name.startswith(chosen.only)
    }
    for curve in CURVES:
        if curve.name in written:
            print(f"\n## {curve.name}\n\n{sizes(written[curve.name])}\n")
            print(curve_table(written[curve.name], curve.metrics))
    for name, document in written.items():
        if name.startswith("credit"):
            save(draw(document), chosen.figures / f"results-{name.removeprefix('credit-')}.png")
    if {"heart-flamby", "heart-public"} <= written.keys():
        print(f"\n## FLamby's curve\n\n{flamby_table()}")
        drawn = heart_figure(written["heart-public"], written["heart-flamby"])
        save(drawn, chosen.figures / "results-heart.png")
    return 0


def swept(curve: Curve, folder: Path) -> Document:
    """The curve's document, from ``sotto sweep``; ``more`` is one of more seeds, or None."""
    out = folder / curve.name
    documents = []
    for arguments in curve.commands():
        command = [*shlex.split(arguments), "--out", str(out)]
        print(f"$ sotto sweep {' '.join(command)}", flush=True)
        subprocess.run(
            [sys.executable, "-m", "sotto.cli", "sweep", *command, "--quiet"], check=True
        )
        documents.append(json.loads((out / "sweep.json").read_text()))
    *more, document = documents
    return {**document, "more": more[0] if more else None}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


# -- tables ---------------------------------------------------------------------------------------


def sizes(document: Document) -> str:
    """How many rows each holder trains on and is judged by, in the first split."""
    task = sotto.load(document["task"], document["source"], document["preprocessing"])
    held = task.holder_data()
    return "train/test rows: " + ", ".join(
        f"{name} {len(data.train)}/{len(data.test)}" for name, data in held.items()
    )


def curve_table(document: Document, metrics: Sequence[str]) -> str:
    """A row for each ε, as Markdown: mean over holders, ± the deviation over seeds.

    Columns beside each other are of the same seeds, and so of the same splits; what more seeds
    gave comes last.
    """
    more = document["more"]
    columns = [(metric, kind) for metric in metrics for kind in _KINDS]
    head = ["ε", "rounds", *(_KINDS[kind] or _NAMES[metric] for metric, kind in columns)]
    if more:
        head += [f"{_NAMES[metric]}, {len(more['seeds'])} seeds" for metric in metrics]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for place, point in enumerate(document["points"]):
        cells = [setting_text("epsilon", point["settings"]["epsilon"]), str(point["rounds"])]
        cells += [figure_text(figures(point, kind)[metric]) for metric, kind in columns]
        if more:
            federation = more["points"][place]["metrics"]
            cells += [figure_text(federation[metric]) for metric in metrics]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(point: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (
        point["metrics"] if kind == "federation" else point["baselines"][kind]
    )
    return found


def figure_text(summary: Mapping[str, float]) -> str:
    return f"{summary['mean']:.3f} ± {summary['sd']:.3f}".replace("0.", ".")


# -- the heart figure -----------------------------------------------------------------------------

_LINES = (  # label, colour, marker
    ("Sotto, public clinical ranges", "#2f6f8f", "o"),
    ("Sotto, FLamby's preparation", "#d55e00", "s"),
)
_TITLES = {
    "accuracy": "Accuracy, mean over four hospitals",
    "auc": "AUC, mean over four hospitals (FLamby publishes none)",
}
_PUBLISHED_COLOUR = "#5b6478"
_NO_DP = 1200.0
"""Where no privacy stands on the axis of ε."""


def heart_figure(public: Document, flamby: Document) -> Figure:
    """Accuracy beside FLamby's published curve at its real ε, and AUC."""
    figure = Figure(figsize=(9.4, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for metric, axes in zip(("accuracy", "auc"), panels, strict=True):
        if metric == "accuracy":
            published_curve(axes)
        for document, (_, colour, marker), aside in zip(
            (public, flamby), _LINES, (0.95, 1.05), strict=True
        ):
            sotto_curve(axes, document, metric, colour, marker, aside)
        _axis_of_epsilon(axes)
        axes.set_title(_TITLES[metric], loc="left", fontsize=10, color=INK)
    _heart_legend(figure)
    figure.suptitle(
        "heart-disease, δ = 1e-4: mean of 20 seeds (FLamby: 5), bars: ± 1 standard deviation",
        fontsize=8.5,
        color=INK,
        x=0.01,
        ha="left",
    )
    return figure


def sotto_curve(
    axes: Any, document: Document, metric: str, colour: str, marker: str, aside: float
) -> None:
    """Our points, a little aside of ε so that bars do not cover each other."""
    points = document["points"]
    places = np.array([point["settings"]["epsilon"] or _NO_DP for point in points]) * aside
    means = np.array([point["metrics"][metric]["mean"] for point in points])
    sds = np.array([point["metrics"][metric]["sd"] for point in points])
    private = np.array([point["settings"]["epsilon"] is not None for point in points])
    for chosen in (private, ~private):
        axes.errorbar(
            places[chosen],
            means[chosen],
            yerr=sds[chosen],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2,
            elinewidth=1.1,
            capsize=3,
            zorder=4,
        )


def published_curve(axes: Any) -> None:
    """FLamby's points: hollow at the nominal ε, filled at what the most exposed hospital spends."""
    real, accuracy = [], []
    for point in PUBLISHED:
        if point.nominal is None:
            _published_point(axes, _NO_DP * 1.2, point.accuracy, point.spread)
            continue
        worst = max(each.if_poisson for each in spent_everywhere(point.nominal).values())
        axes.annotate(
            "",
            xy=(worst, point.accuracy),
            xytext=(point.nominal, point.accuracy),
            arrowprops={
                "arrowstyle": "->",
                "color": _PUBLISHED_COLOUR,
                "linewidth": 1.0,
                "connectionstyle": "arc3,rad=-0.3",
                "shrinkA": 4,
                "shrinkB": 4,
            },
        )
        axes.plot(
            [point.nominal],
            [point.accuracy],
            marker="D",
            markersize=5,
            color=_PUBLISHED_COLOUR,
            markerfacecolor="white",
            zorder=3,
        )
        _published_point(axes, worst, point.accuracy, point.spread)
        real.append(worst)
        accuracy.append(point.accuracy)
    axes.plot(real, accuracy, color=_PUBLISHED_COLOUR, linewidth=1.4, zorder=2)


def _published_point(axes: Any, place: float, accuracy: float, spread: float) -> None:
    axes.errorbar(
        [place],
        [accuracy],
        yerr=[spread],
        color=_PUBLISHED_COLOUR,
        marker="D",
        markersize=5,
        elinewidth=0.9,
        capsize=3,
        zorder=3,
    )


def _axis_of_epsilon(axes: Any) -> None:
    tidy(axes)
    axes.set_xscale("log")
    values = (0.1, 1, 5, 10, 50, 250)
    axes.set_xticks([*values, _NO_DP], [*(f"{value:g}" for value in values), "no DP"])
    axes.set_xticks([], minor=True)
    axes.axvline(560, color="#cfd5e0", linewidth=0.9, linestyle=(0, (2, 3)))
    axes.set_xlabel("ε of the run, for each hospital (logarithmic)", color=INK, fontsize=9)


def _heart_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=2, label=label)
        for label, colour, marker in _LINES
    ]
    for fill, width, label in (
        (_PUBLISHED_COLOUR, 1.4, "FLamby's, at the ε that its most exposed hospital spends"),
        ("white", 0.0, "FLamby's, at its nominal ε"),
    ):
        handles.append(
            Line2D(
                [],
                [],
                color=_PUBLISHED_COLOUR,
                marker="D",
                markersize=5,
                markerfacecolor=fill,
                linewidth=width,
                label=label,
            )
        )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.8,
    )


if __name__ == "__main__":
    sys.exit(main())
