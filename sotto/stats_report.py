"""What statistics look like: tables for people, and a page with a drawing of each column."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sotto.page import ACCENT, INK, MUTED, page, svg, table, tidy
from sotto.show import write_json

__all__ = ["category_rows", "number_rows", "write_statistics"]

Rows = tuple[list[str], list[list[str]]]

MOST_VALUES = 12
"""Values of a category that a table or drawing shows: the most frequent ones, if there are more."""

ACROSS = 4
"""Drawings side by side."""

QUARTILES = (0.25, 0.5, 0.75)


def write_statistics(folder: Path, written: Mapping[str, Any]) -> Path:
    """Write ``statistics.json`` and ``report.html``.

    Args:
        folder: made if it is not there.
        written: the JSON document.

    Returns:
        The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(str(folder / "statistics.json"), written)
    path = folder / "report.html"
    path.write_text(page(f"statistics of {written['task']}", list(_sections(written))))
    return path


def number_rows(
    written: Mapping[str, Any], probabilities: Sequence[float] = (0.5,), *, missing: bool = False
) -> Rows:
    """Columns and rows of the table of numbers.

    Args:
        written: the JSON document.
        probabilities: of the quantiles to show.
        missing: whether to show how many have no value.
    """
    numbers = _of_kind(written, "number")
    histograms = any(column["quantiles"] for column in numbers.values())
    quarters = [
        "median" if probability == 0.5 else f"{100 * probability:.0f} %"
        for probability in probabilities
    ]
    head = [
        "column",
        "mean",
        "deviation",
        *(quarters if histograms else []),
        *(["missing"] if missing else []),
        "looked in",
    ]
    rows = [
        [
            _named(name, column["unit"]),
            with_error(column["mean"]),
            with_error(column["deviation"]),
            *(_quantiles(column, probabilities) if histograms else []),
            *([with_error(column["missing"])] if missing else []),
            "…".join(_plain(bound) for bound in column["range"]),
        ]
        for name, column in numbers.items()
    ]
    return head, rows


def category_rows(written: Mapping[str, Any]) -> Rows:
    """Columns and rows of the table of categories."""
    rows = [
        [
            f"{name} = {entry['value']}",
            with_error(entry["count"]),
            with_error(entry["share"], factor=100.0) + " %",
        ]
        for name, column in _of_kind(written, "category").items()
        for entry in _shown(column)
    ]
    return ["column", "count", "share"], rows


def with_error(estimate: Mapping[str, float | None], factor: float = 1.0) -> str:
    """A figure and its error, in as many digits as the error leaves.

    >>> with_error({"value": 54.7482, "error": 3.012})
    '54.7 ± 3.0'
    """
    value, error = estimate["value"], estimate["error"]
    if value is None:
        return "–"
    if error is None or not error > 0:
        return f"{value * factor:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error * factor)))
    return f"{value * factor:,.{digits}f} ± {error * factor:,.{digits}f}"


# -- rows -----------------------------------------------------------------------------------------


def _of_kind(written: Mapping[str, Any], kind: str) -> dict[str, Any]:
    columns = written["statistics"]["columns"]
    return {name: column for name, column in columns.items() if column["kind"] == kind}


def _named(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _quantiles(column: Mapping[str, Any], probabilities: Sequence[float]) -> Iterator[str]:
    known = {entry["probability"]: entry for entry in column["quantiles"]}
    for probability in probabilities:
        entry = known.get(probability)
        if entry is None:
            yield "–"
        else:
            value, low, high = (_plain(entry[key]) for key in ("value", "low", "high"))
            yield f"{value} [{low}, {high}]"


def _plain(value: float) -> str:
    """A number in four digits, or whole where it has more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _shown(column: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    entries: Sequence[Mapping[str, Any]] = column["values"]
    if len(entries) <= MOST_VALUES:
        return entries
    return sorted(entries, key=lambda entry: -float(entry["count"]["value"]))[:MOST_VALUES]


# -- the page -------------------------------------------------------------------------------------


def _sections(written: Mapping[str, Any]) -> Iterator[str]:
    units = written["statistics"]["units"]
    yield (
        f"<h1>Statistics of {escape(written['task'])}</h1><p class=lead>"
        f"{escape(written['source'])} ({escape(written['preprocessing'])}) · "
        f"{len(written['holders'])} holders · about {units['value']:,.0f} ± "
        f"{units['error']:,.0f} {escape(written['unit'])}s · ε={written['epsilon']:g}, "
        f"δ={written['delta']:g}</p>"
    )
    yield f"<blockquote>{escape(written['guarantee'])}</blockquote>"
    if drawn := _drawings(written):
        yield f"<h2>Distributions</h2>{svg(drawn)}<p class=caption>{CAPTION}</p>"
    for title, (head, rows) in (
        ("Numbers", number_rows(written, QUARTILES, missing=True)),
        ("Categories", category_rows(written)),
    ):
        if rows:
            whole = [[cell.replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in rows]
            yield f"<h2>{title}</h2>{table(head, whole)}"
    if missed := written["missed"]:
        rows = [[name, why] for name, why in missed.items()]
        yield f"<h2>Did not answer</h2>{table(['holder', 'why'], rows)}"


CAPTION = (
    "Shares of all units. Thin lines are 95 % of the noise: they say what the holders' rows would "
    "give exactly, not whom these rows stand for. Noise can make a share negative; nothing is "
    "hidden by rounding it up. Values beyond the range looked in count at its ends."
)


def _drawings(written: Mapping[str, Any]) -> Figure | None:
    columns = {
        name: column
        for name, column in written["statistics"]["columns"].items()
        if column["kind"] == "category" or column["edges"]
    }
    if not columns:
        return None
    across = min(ACROSS, len(columns))
    down = math.ceil(len(columns) / across)
    drawing = Figure(figsize=(2.5 * across, 1.9 * down), layout="constrained")
    axes = np.atleast_1d(drawing.subplots(down, across)).flatten()
    total = written["statistics"]["units"]["value"]
    for axis, (name, column) in zip(axes, columns.items(), strict=False):
        draw = _draw_category if column["kind"] == "category" else _draw_number
        draw(axis, column, total)
        title = _named(name, column.get("unit", ""))
        axis.set_title(title if len(title) < 30 else title[:28] + "…", fontsize=8, color=INK)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        tidy(axis)
        axis.tick_params(labelsize=6)
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
    return drawing


def _draw_number(axis: Any, column: Mapping[str, Any], total: float) -> None:
    edges = np.asarray(column["edges"])
    heights, errors = _shares(column["counts"], total)
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    _bars(axis, middles, heights, errors, widths * 0.92)


def _draw_category(axis: Any, column: Mapping[str, Any], total: float) -> None:
    entries = _shown(column)
    heights, errors = _shares([entry["count"] for entry in entries], total)
    places = np.arange(len(entries))
    _bars(axis, places, heights, errors, 0.7)
    labels = [str(entry["value"]) for entry in entries]
    turned = sum(map(len, labels)) > 22
    axis.set_xticks(places, labels, rotation=90 if turned else 0)


def _shares(counts: Sequence[Mapping[str, float]], total: float) -> tuple[Any, Any]:
    return (
        np.array([count["value"] for count in counts]) / total,
        np.array([count["error"] for count in counts]) / total,
    )


def _bars(axis: Any, at: Any, heights: Any, errors: Any, width: Any) -> None:
    axis.bar(at, heights, width, color=ACCENT, alpha=0.75)
    axis.errorbar(at, heights, errors, fmt="none", ecolor=MUTED, elinewidth=0.8)
    axis.axhline(0.0, color=MUTED, linewidth=0.6)
