"""The figure of a sweep: what a setting does to the headline metric, beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sotto.page import INK, tidy
from sotto.show import setting_text

__all__ = ["Series", "across", "draw", "series_of"]

# Distinguishable with any colour vision, after Okabe and Ito; markers differ too.
_COLOURS = ("#2f6f8f", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#4b3f8f", "#7f7f7f", "#56b4e9")
_MARKERS = "osD^vPX*"
_BASELINES: Mapping[str, tuple[str, Any, str]] = {
    "local": ("each holder alone", (0, (5, 2)), "#a8763e"),
    "pooled": ("pooled data", (0, (1, 1.6)), "#5b6478"),
}
"""Kind → its name, dashes and colour."""

_MOST_COLUMNS = 3
_LOGARITHMIC = 20.0
"""An axis is logarithmic if its values span more than this factor."""
_LABEL_INCHES = 0.42
"""Room that a label under the axis needs."""


@dataclass(frozen=True)
class Series:
    """Points that differ in the setting along the axis only.

    Args:
        name: what they have in common of what is swept; empty if there is nothing else.
        points: of the document, in the order of the axis.
    """

    name: str
    points: Sequence[Mapping[str, Any]]

    def summaries(self, kind: str, headline: str) -> list[Mapping[str, Any] | None]:
        """Each point's headline metric; ``kind`` is ``federation`` or a baseline."""
        return [
            (point["metrics"] if kind == "federation" else point["baselines"][kind]).get(headline)
            for point in self.points
        ]


def across(written: Mapping[str, Any]) -> str | None:
    """The setting along the axis: ε, else the first that is a number, else the first."""
    swept = written["swept"]
    if "epsilon" in swept:
        return "epsilon"
    return next((name for name in swept if _numbers(swept[name])), next(iter(swept), None))


def series_of(written: Mapping[str, Any]) -> list[Series]:
    """The points of a document by what else is swept."""
    along = across(written)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in written["points"]:
        others = {name: value for name, value in point["settings"].items() if name != along}
        groups.setdefault(_combination(others), []).append(point)
    places = _Axis.of(written).places
    return [
        Series(name, sorted(points, key=lambda point: places.get(_value(point, along), math.inf)))
        for name, points in groups.items()
    ]


def draw(written: Mapping[str, Any]) -> Figure:
    """The figure: a panel, or one for each series where each has baselines of its own."""
    series, axis = series_of(written), _Axis.of(written)
    kinds = list(written["points"][0].get("baselines", {}))
    apart = len(series) > 1 and not _same_baselines(series, kinds, written["headline"])
    panels = [[each] for each in series] if apart else [series]
    columns = min(_MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 6.4 if columns == 1 else 3.7 * columns
    figure = Figure(figsize=(width, 0.8 + (3.4 if rows == 1 else 2.7) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for number, shown in enumerate(panels):
        panel = _Panel(grid[number], axis, written["headline"], width / columns)
        for kind in kinds:
            panel.baseline(kind, shown[0])
        for place, each in enumerate(shown):
            panel.federation(each, number + place, place - (len(shown) - 1) / 2)
        panel.label(shown[0].name if apart else "", first=number % columns == 0)
    for unused in grid[len(panels) :]:
        unused.set_visible(False)
    _legend(figure, series, kinds, columns)
    _title(figure, written)
    return figure


# -- the axis -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Where the values of a setting lie.

    Args:
        name: of the setting; None if nothing is swept.
        places: value → position.
        stretches: values that lines connect; no privacy has a place of its own.
        title: of the axis.
    """

    name: str | None
    places: Mapping[Any, float]
    stretches: Sequence[Sequence[Any]]
    title: str

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> _Axis:
        name = across(written)
        if name is None:
            return cls(None, {None: 0.0}, [[None]], "")
        values = [
            value for value in written["swept"][name] if value not in _without_result(written)
        ]
        if not _numbers(values) and name != "epsilon":
            places = {value: float(place) for place, value in enumerate(values)}
            return cls(name, places, [[value] for value in values], name.replace("_", " "))
        finite = sorted((value for value in values if value is not None), key=float)
        numbers = [float(value) for value in finite]
        logarithmic = (
            bool(numbers)
            and numbers[0] > 0
            and (name == "epsilon" or numbers[-1] > _LOGARITHMIC * numbers[0])
        )
        scaled = [math.log10(each) if logarithmic else each for each in numbers]
        places = dict(zip(finite, scaled, strict=True))
        stretches = [finite] if finite else []
        if None in values:
            span = scaled[-1] - scaled[0] if scaled else 0.0
            places[None] = (scaled[-1] if scaled else 0.0) + max(0.22 * span, 0.3)
            stretches.append([None])
        title = "ε of the run, for each holder" if name == "epsilon" else name.replace("_", " ")
        return cls(name, places, stretches, title + (" (logarithmic)" if logarithmic else ""))

    @property
    def span(self) -> float:
        """From the first position to the last; 1 if there is only one."""
        return max(self.places.values()) - min(self.places.values()) or 1.0

    def labelled(self, inches: float) -> Iterator[Any]:
        """Values whose labels fit next to each other."""
        room, last = _LABEL_INCHES * self.span / inches, -math.inf
        ordered = sorted(self.places, key=lambda value: self.places[value])
        if self.places and None in self.places and self.name is not None:
            ordered.remove(None)
            yield None
        longest = max((len(setting_text(self.name or "", value)) for value in ordered), default=1)
        room *= max(1.0, longest / 5)
        for value in ordered:
            if self.places[value] >= last + room:
                last = self.places[value]
                yield value


def _without_result(written: Mapping[str, Any]) -> list[Any]:
    """Values along the axis at which no run came to an end, unless that is all of them."""
    name, headline = across(written), written["headline"]
    if name is None:
        return []
    values = written["swept"][name]
    there = {
        point["settings"][name]
        for point in written["points"]
        if point["metrics"].get(headline, {}).get("mean") is not None
    }
    return [value for value in values if value not in there] if there else []


def _numbers(values: Sequence[Any]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in values)
    except (TypeError, ValueError):
        return False


def _value(point: Mapping[str, Any], name: str | None) -> Any:
    return None if name is None else point["settings"][name]


def _combination(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value)
        if name in ("strategy", "optimizer")
        else f"{'ε' if name == 'epsilon' else name.replace('_', ' ')} {setting_text(name, value)}"
        for name, value in settings.items()
    )


# -- drawing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """One pair of axes.

    Args:
        axes: matplotlib's.
        axis: where values lie.
        headline: the metric.
        inches: width.
    """

    axes: Any
    axis: _Axis
    headline: str
    inches: float

    def baseline(self, kind: str, series: Series) -> None:
        """A quiet line with a band of one standard deviation."""
        _, dashes, colour = _BASELINES[kind]
        for places, means, sds in self._stretches(kind, series):
            if len(places) == 1:  # a short line where there is nothing to connect
                reach = 0.22 if len(self.axis.stretches) == len(self.axis.places) else 0.0
                reach = reach or 0.045 * self.axis.span
                places = places + np.array([-reach, reach])
                means, sds = means.repeat(2), sds.repeat(2)
            self.axes.plot(places, means, color=colour, linestyle=dashes, linewidth=1.4, zorder=2)
            self.axes.fill_between(
                places, means - sds, means + sds, color=colour, alpha=0.13, linewidth=0, zorder=1
            )

    def federation(self, series: Series, number: int, sideways: float) -> None:
        """A line with error bars; several stand a little apart."""
        colour, marker = _look(number)
        for places, means, sds in self._stretches("federation", series):
            self.axes.errorbar(
                places + sideways * 0.016 * self.axis.span,
                means,
                yerr=sds if sds.any() else None,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=2,
                elinewidth=1.1,
                capsize=3,
                zorder=3,
            )

    def label(self, title: str, *, first: bool) -> None:
        """Ticks at the values, names of the axes."""
        tidy(self.axes)
        places = self.axis.places
        labelled = list(self.axis.labelled(self.inches - 0.9))
        texts = [setting_text(self.axis.name or "", value) for value in labelled]
        if self.axis.name is None:
            texts = ["" for _ in labelled]
        self.axes.set_xticks([places[value] for value in labelled], texts)
        self.axes.set_xticks(list(places.values()), minor=True)
        self.axes.margins(x=0.06)
        if len(places) == 1:
            self.axes.set_xlim(-1, 1)
        if self.axis.name == "epsilon" and None in places and len(places) > 1:
            ends = sorted(places.values())[-2:]
            self.axes.axvline(sum(ends) / 2, color="#cfd5e0", linewidth=0.9, linestyle=(0, (2, 3)))
        self.axes.set_title(title, loc="left", fontsize=10, color=INK)
        self.axes.set_xlabel(self.axis.title, color=INK, fontsize=9)
        if first:
            self.axes.set_ylabel(f"{self.headline}, mean over holders", color=INK, fontsize=9)

    def _stretches(
        self, kind: str, series: Series
    ) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Positions, means and standard deviations that a line connects."""
        found = {
            _value(point, self.axis.name): summary
            for point, summary in zip(
                series.points, series.summaries(kind, self.headline), strict=True
            )
            if summary is not None and summary["mean"] is not None
        }
        for stretch in self.axis.stretches:
            there = [value for value in stretch if value in found]
            if there:
                yield (
                    np.array([self.axis.places[value] for value in there]),
                    np.array([found[value]["mean"] for value in there]),
                    np.array([found[value]["sd"] for value in there]),
                )


def _look(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]


def _same_baselines(series: Sequence[Series], kinds: Sequence[str], headline: str) -> bool:
    """Whether all series are to be compared with the same figures."""
    return all(
        each.summaries(kind, headline) == series[0].summaries(kind, headline)
        for each in series
        for kind in kinds
    )


def _legend(figure: Figure, series: Sequence[Series], kinds: Sequence[str], columns: int) -> None:
    """One for all panels, below them, where it covers nothing."""
    handles = []
    for number, each in enumerate(series):
        colour, marker = _look(number)
        name = f"federation, {each.name}" if each.name else "federation"
        handles.append(
            Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=2, label=name)
        )
    for kind in kinds:
        name, dashes, colour = _BASELINES[kind]
        handles.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=1.4, label=name))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 3 if columns == 1 else 2 + columns),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.8,
    )


def _title(figure: Figure, written: Mapping[str, Any]) -> None:
    seeds = len(written["seeds"])
    bars = f"mean of {seeds} seeds; bars and bands: ± 1 standard deviation over the seeds"
    about = f"{written['task']} on {written['source']}, {written['holders']} holders"
    name = across(written) or ""
    missing = ", ".join(setting_text(name, value) for value in _without_result(written))
    none = f"\nwithout a result: {name.replace('_', ' ')} {missing}" if missing else ""
    figure.suptitle(
        f"{about}\n{bars if seeds > 1 else 'one seed'}{none}",
        fontsize=8.5,
        color=INK,
        x=0.01,
        ha="left",
    )
