"""What a sweep leaves in its folder: sweep.json, sweep.png and report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from common.guarantees import DistributedPrivacy, Privacy
from common.plan import TrainingPlan
from simulations.sweep import Setting, Sweep
from sotto.page import details, page, svg, table
from sotto.show import SEEDED, setting_text, spread, sweep_rows, write_json
from sotto.sums import MASKS_LEFT_OUT
from sotto.sweep_figure import Series, across, draw, series_of

__all__ = ["findings", "guarantees", "write_sweep"]

DOTS_PER_INCH = 200

SEARCH = (
    "Choosing the best of these settings by its result on private data is itself a release about "
    "these data, and no ε above covers it: each ε is that of one run by itself. Choose on public "
    "or synthetic data, or account for every run of the search."
)


def write_sweep(folder: Path, sweep: Sweep, written: Mapping[str, Any]) -> Path:
    """Write the document, the figure and the page.

    Args:
        folder: of the sweep; it exists.
        sweep: for the plans and what they guarantee.
        written: the JSON document.

    Returns:
        The page's path.
    """
    write_json(str(folder / "sweep.json"), written)
    drawing = draw(written)
    drawing.savefig(folder / "sweep.png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    path = folder / "report.html"
    path.write_text(page(f"sweep of {written['task']}", _sections(sweep, written, svg(drawing))))
    return path


def findings(written: Mapping[str, Any]) -> list[str]:
    """What was found, in words: a sentence or two for each line of the figure."""
    return [_finding(written, series) for series in series_of(written)]


def guarantees(sweep: Sweep) -> str:
    """What each ε means, and that it is of one run; said once, not once for each ε."""
    plans = [setting.plan for setting in sweep.settings]
    private = [plan for plan in plans if isinstance(plan.privacy, Privacy | DistributedPrivacy)]
    parts = _promises(private)
    if len({plan.privacy for plan in private}) > 1:
        parts.append("ε is that of the row.")
    without = [plan.privacy.guarantee() for plan in plans if plan.privacy.kind == "none"]
    if without:
        parts.append(without[0] if not private else f"Where it says no DP: {without[0]}")
    if any(plan.aggregation.kind != "plain" for plan in plans):
        parts.append(MASKS_LEFT_OUT)
    return " ".join(part for part in (*parts, sweep.task.caveat, SEEDED) if part)


def _promises(plans: Sequence[TrainingPlan]) -> list[str]:
    """The guarantees of plans, and where they differ, at which level of aggregation."""
    levels: dict[str, list[str]] = {}
    for plan in plans:
        assert isinstance(plan.privacy, Privacy | DistributedPrivacy)
        of_sentence = levels.setdefault(plan.privacy.guarantee("ε"), [])
        if plan.aggregation.kind not in of_sentence:
            of_sentence.append(plan.aggregation.kind)
    if len({plan.privacy.kind for plan in plans}) == 1:
        return list(levels)
    return [f"With aggregation {' or '.join(own)}: {said}" for said, own in levels.items()]


# -- in words -------------------------------------------------------------------------------------


def _finding(written: Mapping[str, Any], series: Series) -> str:
    along, headline = across(written), written["headline"]
    points = [
        point
        for point, own in zip(series.points, series.summaries("federation", headline), strict=True)
        if own is not None and own["mean"] is not None
    ]
    said = f"{series.name}: " if series.name else ""
    if not points:
        return f"{said}no run came to an end."
    if "baselines" not in points[0]:
        return said + _best(written, points, along)
    ahead = [_is_ahead(point, headline) for point in points]
    if along == "epsilon":
        first = ahead.index(True) if any(ahead) else len(points) - 1
        telling = points[first]  # the smallest ε at which joining is worth it
    else:
        telling = max(points, key=lambda point: point["metrics"][headline]["mean"])
    compared = _compared(telling, headline, _at(telling, along), several=_several(written))
    if len(points) == 1:
        return said + compared
    clearly = ", by more than twice the standard error over seeds," if _several(written) else ""
    where = _where(points, ahead, along)
    return f"{said}{compared} It is above each holder alone{clearly} {where}."


def _where(points: Sequence[Mapping[str, Any]], ahead: Sequence[bool], along: str | None) -> str:
    """At which points, in words: ``at ε = 1, 2, and without DP``."""
    where = [point for point, above in zip(points, ahead, strict=True) if above]
    if len(where) in (0, len(points)) or along is None:
        return "everywhere that was tried" if where else "nowhere that was tried"
    values = [point["settings"][along] for point in where]
    told = [
        setting_text(along, value) for value in values if value is not None or along != "epsilon"
    ]
    begin = "at ε =" if along == "epsilon" else f"with {along.replace('_', ' ')}"
    parts = [f"{begin} {', '.join(told)}"] if told else []
    return " and ".join([*parts, *(["without DP"] if len(told) < len(values) else [])])


def _best(
    written: Mapping[str, Any], points: Sequence[Mapping[str, Any]], along: str | None
) -> str:
    headline = written["headline"]
    best = max(points, key=lambda point: point["metrics"][headline]["mean"])
    value = spread(best["metrics"][headline], several=_several(written))
    where = f" {_at(best, along)}" if along is not None else ""
    most = "highest " if len(points) > 1 else ""
    return f"The federation's {most}{headline} is {value}{where}."


def _compared(point: Mapping[str, Any], headline: str, at: str, *, several: bool) -> str:
    """The federation's figure beside those of the baselines."""
    own, local, pooled = (
        summaries.get(headline)
        for summaries in (
            point["metrics"],
            point["baselines"]["local"],
            point["baselines"]["pooled"],
        )
    )
    pairs = _pairs(own, local)
    ahead = sum(mine > other for mine, other in pairs)
    wins = f" and is below it in {ahead} of {len(pairs)} seeds" if pairs else ""
    begin = f"{at[:1].upper()}{at[1:]} the" if at else "The"
    return (
        f"{begin} federation's {headline} is {spread(own, several=several)}; each holder alone "
        f"has {spread(local, several=several)}{wins if several else ''}; pooled data would give "
        f"{spread(pooled, several=several)}."
    )


def _is_ahead(point: Mapping[str, Any], headline: str) -> bool:
    """Whether the federation is above the holders alone by more than chance over seeds makes it.

    Seeds are paired: both had the same split. Unknown is not ahead.
    """
    own, local = point["metrics"][headline], point["baselines"]["local"].get(headline)
    differences = np.array([mine - other for mine, other in _pairs(own, local)])
    if not len(differences):
        return False
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return bool(differences.mean() > 2 * error)


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> list[tuple[float, float]]:
    """Both figures of each seed that has both."""
    if other is None:
        return []
    both = zip(one["per_seed"], other["per_seed"], strict=True)
    return [(mine, its) for mine, its in both if mine is not None and its is not None]


def _several(written: Mapping[str, Any]) -> bool:
    return len(written["seeds"]) > 1


def _at(point: Mapping[str, Any], along: str | None) -> str:
    """Where on the axis a point lies, in words."""
    if along is None:
        return ""
    value = point["settings"][along]
    if along == "epsilon":
        return "without DP" if value is None else f"at ε = {setting_text(along, value)}"
    return f"with {along.replace('_', ' ')} {setting_text(along, value)}"


# -- the page -------------------------------------------------------------------------------------


def _sections(sweep: Sweep, written: Mapping[str, Any], drawing: str) -> list[str]:
    return [
        _heading(written),
        *(f"<p class=finding>{escape(sentence)}</p>" for sentence in findings(written)),
        f"<figure style='margin:1.4rem 0'>{drawing}</figure>",
        f"<h2>{escape(written['headline'])}</h2>{table(*sweep_rows(written))}",
        f"<h2>What is guaranteed</h2><blockquote>{escape(guarantees(sweep))}</blockquote>",
        f"<p><strong>What is not.</strong> {escape(SEARCH)}</p>",
        *_others(written),
        *_failures(written),
        f"<h2>Plans</h2>{''.join(_plan(setting) for setting in sweep.settings)}",
    ]


def _heading(written: Mapping[str, Any]) -> str:
    seeds, points = len(written["seeds"]), len(written["points"])
    swept = ", ".join("ε" if name == "epsilon" else name for name in written["swept"])
    return (
        f"<h1>Sweep of {escape(written['task'])}</h1><p class=lead>{escape(written['source'])} "
        f"({escape(written['preprocessing'])}) · {written['holders']} holders · {points} "
        f"setting{'s' * (points > 1)}{escape(f' of {swept}' if swept else '')} · {seeds} "
        f"seed{'s' * (seeds > 1)}</p>"
    )


def _others(written: Mapping[str, Any]) -> list[str]:
    """The federation's other metrics."""
    several = len(written["seeds"]) > 1
    names = list(
        dict.fromkeys(
            name
            for point in written["points"]
            for name in point["metrics"]
            if name != written["headline"]
        )
    )
    if not names:
        return []
    swept = ["ε" if name == "epsilon" else name.replace("_", " ") for name in written["swept"]]
    rows = [
        [
            *(setting_text(name, value) for name, value in point["settings"].items()),
            *(spread(point["metrics"].get(name), several=several) for name in names),
        ]
        for point in written["points"]
    ]
    return [f"<h2>Other metrics of the federation</h2>{table([*swept, *names], rows)}"]


def _failures(written: Mapping[str, Any]) -> list[str]:
    failed = [
        [_settings_text(point["settings"]) or "–", str(one["seed"]), one["kind"], one["why"]]
        for point in written["points"]
        for one in point["failed"]
    ]
    if not failed:
        return []
    more = f"<p>… and {len(failed) - 50} more.</p>" if len(failed) > 50 else ""
    head = ["setting", "seed", "run", "why"]
    return [f"<h2>Failed runs</h2>{table(head, failed[:50])}{more}"]


def _plan(setting: Setting) -> str:
    values = {name: None if value == math.inf else value for name, value in setting.values.items()}
    return details(_settings_text(values) or "the plan", setting.plan.to_toml())


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{'ε' if name == 'epsilon' else name.replace('_', ' ')} {setting_text(name, value)}"
        for name, value in settings.items()
    )
