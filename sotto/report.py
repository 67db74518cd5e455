"""report.html: one self-contained page about a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.guarantees import DistributedPrivacy, Privacy
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.events import Composition
from common.tasks.base import Task
from common.tasks.histograms import undefined
from server.runs import RunResult
from server.summaries import RoundSummary
from simulations.results import mean_over_holders
from sotto.page import ACCENT, INK, MUTED, page, svg, table, tidy
from sotto.show import evaluation_note, evaluation_rows, figure, guarantee
from sotto.sums import (
    aggregation_rows,
    coalition_note,
    coalition_rows,
    lost_rows,
    lost_sentence,
    masks_sentence,
    missed,
)

__all__ = ["epsilon_curve", "write_report"]


def write_report(
    folder: Path | None,
    result: RunResult,
    task: Task,
    written: Mapping[str, Any],
    *,
    simulated: bool = True,
) -> Path | None:
    """Write ``report.html`` into a run's folder.

    Args:
        folder: of the run; None writes nothing.
        result: whose curves are drawn.
        task: for the headline metric and the caveat.
        written: the JSON document, for the comparison.
        simulated: whether the noise was seeded, which the page then says.

    Returns:
        The page's path.
    """
    if folder is None:
        return None
    plan = result.plan
    sections = [
        _heading(plan, written),
        f"<blockquote>{escape(guarantee(plan, task, simulated=simulated))}</blockquote>",
        _sums(written),
        _curves(result, task),
        _comparison(written),
        _from_histograms(written),
        _holders(written, task.headline),
        _lost(written),
        _rounds(result.history),
        f"<h2>Plan</h2><pre>{escape(plan.to_toml())}</pre>",
    ]
    path = folder / "report.html"
    path.write_text(page(plan.task, sections))
    return path


def epsilon_curve(plan: TrainingPlan, points: int = 20) -> tuple[Sequence[int], Sequence[float]]:
    """ε that one holder has released after so many rounds, at up to ``points`` of them."""
    if not isinstance(plan.privacy, Privacy | DistributedPrivacy):
        return [], []
    numbers = sorted({round(x) for x in np.linspace(1, plan.rounds, min(points, plan.rounds))})
    return numbers, [epsilon(_released(plan, number), plan.privacy.delta) for number in numbers]


def _released(plan: TrainingPlan, number: int) -> Composition:
    """What one holder has released after so many rounds."""
    updates = Composition.of(plan.round_event()) * number
    evaluations = sum(map(plan.evaluates, range(1, number + 1)))
    return updates + plan.evaluation.composition(evaluations) if evaluations else updates


def _heading(plan: TrainingPlan, written: Mapping[str, Any]) -> str:
    seeds, level = len(written["seeds"]), plan.aggregation.kind
    return (
        f"<h1>{escape(plan.task)}</h1><p class=lead>{escape(plan.source)} "
        f"({escape(plan.preprocessing)}) · {written['holders']} holders · {plan.rounds} rounds of "
        f"{plan.local_steps} local step{'s' * (plan.local_steps > 1)} · "
        f"{escape(plan.strategy.name)} · {'' if level == 'plain' else f'{level} aggregation · '}"
        f"{seeds} seed{'s' * (seeds > 1)}</p>"
    )


def _sums(written: Mapping[str, Any]) -> str:
    """What the coordinator saw, where it saw sums."""
    about = written["aggregation"]
    if about["kind"] == "plain":
        return ""
    words = [masks_sentence(about), lost_sentence(written)]
    parts = [
        f"<h2>What the coordinator saw</h2><p>{escape(' '.join(filter(None, words)))}</p>",
        table(*aggregation_rows(about)),
    ]
    if "coalitions" in about:
        parts += [
            "<h2>If holders tell the coordinator their noise</h2>",
            table(*coalition_rows(about)),
            f"<p>{escape(coalition_note(about))}</p>",
        ]
    return "".join(parts)


def _curves(result: RunResult, task: Task) -> str:
    evaluated = [summary for summary in result.history if summary.metrics]
    released = [
        summary
        for summary in result.history
        if not math.isnan(summary.evaluation.get(task.headline, undefined()).value)
    ]
    numbers, epsilons = epsilon_curve(result.plan)
    panels = sum(map(bool, (evaluated, released, numbers)))
    if not panels:
        return ""
    drawing = Figure(figsize=(4.6 * panels, 3.1), layout="constrained")
    axes = iter(np.atleast_1d(drawing.subplots(1, panels)))
    if evaluated:
        _draw_metric(next(axes), evaluated, task.headline)
    if released:
        _draw_estimates(next(axes), released, task.headline)
    if numbers:
        axis = next(axes)
        axis.plot(numbers, epsilons, color=ACCENT, linewidth=2)
        _label(axis, "ε of a holder that took part in every round")
    return f"<h2>Over the rounds (seed {result.plan.seed})</h2>{svg(drawing)}"


def _draw_metric(axis: Any, evaluated: Sequence[RoundSummary], headline: str) -> None:
    at = [summary.round for summary in evaluated]
    last = {}
    for holder in evaluated[-1].metrics:
        own = [summary.metrics.get(holder, {}).get(headline, np.nan) for summary in evaluated]
        axis.plot(at, own, color=MUTED, linewidth=0.8, alpha=0.7)
        last[holder] = own[-1]
    mean = [mean_over_holders(summary.metrics, headline) for summary in evaluated]
    axis.plot(at, mean, color=ACCENT, linewidth=2.2)
    _label(axis, f"{headline}: mean, and each holder")
    if len(last) <= 8:
        _name_lines(axis, at[-1], {name: y for name, y in last.items() if not np.isnan(y)})


def _draw_estimates(axis: Any, released: Sequence[RoundSummary], headline: str) -> None:
    """What the noised histograms of all holders together show, with error bars."""
    at = [summary.round for summary in released]
    found = [summary.evaluation.get(headline, undefined()) for summary in released]
    values = np.array([estimate.value for estimate in found])
    ends = np.array([[estimate.low, estimate.high] for estimate in found]).T
    bars = np.abs(ends - values)
    axis.errorbar(at, values, bars, color=ACCENT, marker="o", markersize=4, capsize=3, linewidth=1)
    _label(axis, f"{headline}: all holders' histograms")


def _name_lines(axis: Any, x: int, ends: Mapping[str, float]) -> None:
    """Write each holder's name at the end of its line, apart where lines end close together."""
    low, high = axis.get_ylim()
    place = np.inf
    for name, y in sorted(ends.items(), key=lambda item: -item[1]):
        place = min(y, place - 0.05 * (high - low))
        axis.annotate(f" {name}", (x, place), color=MUTED, fontsize=7, va="center")


def _label(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel("round", color=MUTED, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axis)


def _comparison(written: Mapping[str, Any]) -> str:
    if not written["metrics"]:
        return (
            "<h2>Results</h2><p>The holders keep their exact figures: evaluation is noted on each "
            "holder's own machine and was not shared.</p>"
        )
    baselines = written.get("baselines", {})
    several = len(written["seeds"]) > 1
    titles = {"local": "each holder alone", "pooled": "pooled data"}
    head = ["metric", "this federation", *(titles[kind] for kind in baselines)]
    rows = [
        [
            name,
            figure(value["mean"]) + (f" ± {figure(value['sd'])}" if several else ""),
            *(figure(baselines[kind].get(name)) for kind in baselines),
        ]
        for name, value in written["metrics"].items()
    ]
    return f"<h2>Results</h2>{table(head, rows)}"


def _from_histograms(written: Mapping[str, Any]) -> str:
    """The figures that holders released at a price, if they did."""
    if "evaluation" not in written:
        return ""
    price = written.get("evaluation_price", {})
    return (
        "<h2>From noised histograms</h2><p>Of all holders' held-out units together. "
        f"All evaluations of the run are ({price.get('epsilon', math.nan):g}, "
        f"{price.get('delta', math.nan):g})-differentially private. The error bars cover the noise "
        f"and the cells' width. {evaluation_note(written)}</p>{table(*evaluation_rows(written))}"
    )


def _holders(written: Mapping[str, Any], headline: str) -> str:
    per_holder = written["metrics"].get(headline, {}).get("per_holder", {})
    if not per_holder or len(per_holder) > 50:
        return ""
    rows = [[name, figure(value)] for name, value in per_holder.items()]
    return f"<h2>Each holder</h2>{table(['holder', headline], rows)}"


def _lost(written: Mapping[str, Any]) -> str:
    """Rounds that came to nothing, if there are any."""
    if not written.get("lost_rounds"):
        return ""
    columns, rows = lost_rows(written)
    more = f"<p>… and {len(rows) - 50} more.</p>" if len(rows) > 50 else ""
    return f"<h2>Lost rounds</h2>{table(columns, rows[:50])}{more}"


def _rounds(history: Sequence[RoundSummary]) -> str:
    rows = [
        [name, str(summary.round), why]
        for summary in history
        for name, why in missed(summary).items()
    ]
    if not rows:
        return ""
    more = f"<p>… and {len(rows) - 50} more.</p>" if len(rows) > 50 else ""
    rows = rows[:50]
    return f"<h2>Missed rounds</h2>{table(['holder', 'round', 'why'], rows)}{more}"
