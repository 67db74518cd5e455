"""What the noisy sums of several holders say: means, quantiles, shares, each with an error bar.

Everything here is computed from vectors that have left their holders, and from the public plan: it
is post-processing and costs nothing.

**Error bars** are 95 % intervals for what the holders' own rows would give exactly. They know of
the noise only, and not of whom the holders' rows stand for. Each figure is a smooth function of
numbers with independent noise of known variance; its own variance is that of its linear part there
(the delta method; van der Vaart 1998, "Asymptotic statistics", theorem 3.1), whose gradient
:class:`Noisy` carries along. That holds where the noise is small beside the count of units; a count
that noise could have made is refused (:class:`common.errors.RunError`). The interval of a quantile
ends at edges of bins: where in a bin the values are is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.isotonic import isotonic_regression

from common.errors import RunError
from common.privacy.statistics import ONE, CategoryCells, Layout, NumberCells
from common.statistics_plan import StatisticsPlan
from common.tasks.scaling import InputScaling

__all__ = [
    "QUANTILES",
    "CategoryStatistics",
    "Estimate",
    "NumberStatistics",
    "Quantile",
    "Statistics",
    "document",
    "scaling_of",
    "statistics_of",
]

Z = 1.959963984540054
"""Standard normal quantile of 0.975: an error bar reaches so many standard deviations."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

FEWEST_DEVIATIONS = 4.0
"""A count of units must be so many standard deviations of its noise; less is no count."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure, and the half-width of its 95 % interval."""

    value: float
    error: float

    def covers(self, exact: float) -> bool:
        """Whether the interval holds this value."""
        return abs(self.value - exact) <= self.error


@dataclass(frozen=True)
class Quantile:
    """A quantile, and the edges of bins between which it is, with 95 %."""

    probability: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class NumberStatistics:
    """What is known of a number.

    Args:
        name: of column or input.
        unit: the physical unit, for people.
        low: values below it counted as it.
        high: values above it counted as it.
        mean: of the values so limited.
        variance: of them; never negative.
        deviation: its root.
        missing: how many records have no value, over all.
        edges: of the histogram's bins; empty without one.
        counts: in each bin.
        quantiles: those of :data:`QUANTILES`; empty without a histogram.
    """

    name: str
    unit: str
    low: float
    high: float
    mean: Estimate
    variance: Estimate
    deviation: Estimate
    missing: Estimate
    edges: tuple[float, ...] = ()
    counts: tuple[Estimate, ...] = ()
    quantiles: tuple[Quantile, ...] = ()


@dataclass(frozen=True)
class CategoryStatistics:
    """What is known of a category.

    Args:
        name: of the column.
        counts: value → how many records have it; where a unit is a user, how many users' worth.
        shares: value → the same over all units.
        missing: how many have none.
    """

    name: str
    counts: Mapping[int | str, Estimate]
    shares: Mapping[int | str, Estimate]
    missing: Estimate


@dataclass(frozen=True)
class Statistics:
    """All figures.

    Args:
        units: how many there are.
        columns: in the plan's order.
    """

    units: Estimate
    columns: tuple[NumberStatistics | CategoryStatistics, ...]

    def __getitem__(self, name: str) -> NumberStatistics | CategoryStatistics:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    @property
    def numbers(self) -> Sequence[NumberStatistics]:
        """Those of numbers."""
        return [column for column in self.columns if isinstance(column, NumberStatistics)]

    @property
    def categories(self) -> Sequence[CategoryStatistics]:
        """Those of categories."""
        return [column for column in self.columns if isinstance(column, CategoryStatistics)]


def statistics_of(plan: StatisticsPlan, total: npt.ArrayLike, holders: int) -> Statistics:
    """What the sum of several holders' answers says.

    Args:
        plan: that they answered.
        total: [D] the sum of their vectors, in steps of 1/ONE.
        holders: how many.

    Raises:
        RunError: noise could have made the count of units, so nothing can be said.
    """
    layout = Layout.of(plan)
    # Rounding to whole steps adds 1/12 of a squared step.
    spread = math.sqrt(holders * (layout.noise(plan) ** 2 + 1 / 12)) / ONE
    cells = _Sums(np.asarray(total, dtype=np.float64) / ONE, spread)
    units = cells.combined([layout.units], *(each.either for each in layout.cells if each.either))
    if not units.value > FEWEST_DEVIATIONS * units.deviation:
        raise RunError(
            f"the noise is too large for the {holders} holders that answered: about "
            f"{units.value:.0f} ± {units.error:.0f} {plan.unit}s; raise epsilon, ask about fewer "
            "columns, or wait for more holders"
        )
    return Statistics(
        units.estimate(),
        tuple(
            _number(each, cells, units)
            if isinstance(each, NumberCells)
            else _category(each, cells, units)
            for each in layout.cells
        ),
    )


# -- numbers that carry their noise ---------------------------------------------------------------


@dataclass(frozen=True)
class Noisy:
    """A figure made of noisy numbers, and how it moves with each.

    Args:
        value: of the figure.
        gradient: [D] by the noisy numbers.
        spread: the standard deviation of each number's noise.
    """

    value: float
    gradient: Vector
    spread: float

    @property
    def deviation(self) -> float:
        """Standard deviation, from the linear part."""
        return self.spread * float(np.linalg.norm(self.gradient))

    @property
    def error(self) -> float:
        """Half-width of the 95 % interval."""
        return Z * self.deviation

    def __add__(self, other: Noisy) -> Noisy:
        return self._with(self.value + other.value, self.gradient + other.gradient)

    def __sub__(self, other: Noisy) -> Noisy:
        return self + other.times(-1.0)

    def __mul__(self, other: Noisy) -> Noisy:
        gradient = self.gradient * other.value + other.gradient * self.value
        return self._with(self.value * other.value, gradient)

    def __truediv__(self, other: Noisy) -> Noisy:
        ratio = self.value / other.value
        return self._with(ratio, (self.gradient - ratio * other.gradient) / other.value)

    def times(self, factor: float, plus: float = 0.0) -> Noisy:
        """The figure on another scale."""
        return self._with(self.value * factor + plus, self.gradient * factor)

    def estimate(self) -> Estimate:
        """The figure and its error bar."""
        return Estimate(self.value, self.error)

    def _with(self, value: float, gradient: Vector) -> Self:
        return type(self)(value, gradient, self.spread)


@dataclass(frozen=True)
class _Sums:
    """The noisy vector.

    Args:
        values: [D].
        spread: standard deviation of each one's noise.
    """

    values: Vector
    spread: float

    def one(self, place: int) -> Noisy:
        """The number at a place."""
        return self.several([place])

    def several(self, places: Sequence[int]) -> Noisy:
        """The sum of the numbers at some places."""
        gradient = np.zeros(len(self.values))
        gradient[list(places)] = 1.0
        return Noisy(float(self.values[list(places)].sum()), gradient, self.spread)

    def combined(self, *ways: Sequence[int]) -> Noisy:
        """The best of several sums of the same: each counts by how exact it is.

        Noise is independent, so a sum of k numbers has k times the variance of one, and weights in
        inverse proportion give the least variance (Aitken 1936).
        """
        precisions = [1 / len(way) for way in ways]
        parts = [
            self.several(way).times(precision / sum(precisions))
            for way, precision in zip(ways, precisions, strict=True)
        ]
        return _sum(parts)

    def agreeing(self, places: Sequence[int], total: Noisy) -> list[Noisy]:
        """The numbers at some places, moved alike so that they add up to a total.

        The least squares solution. It makes cumulative sums more exact: far from the left edge
        they are as good as from the right.
        """
        if not places:
            return []
        gap = (total - self.several(places)).times(1 / len(places))
        return [self.one(place) + gap for place in places]


def _sum(parts: Sequence[Noisy]) -> Noisy:
    together = parts[0]
    for part in parts[1:]:
        together = together + part
    return together


# -- columns --------------------------------------------------------------------------------------


def _number(cells: NumberCells, sums: _Sums, units: Noisy) -> NumberStatistics:
    asked = cells.question
    either = sums.agreeing(cells.either, units) or [sums.one(cells.missing)]
    *histogram, missing = either
    there = units - missing
    half, middle = (asked.high - asked.low) / 2, (asked.high + asked.low) / 2
    first = sums.one(cells.first) / there
    # Σ x² = (how many there are) − Σ (1 − x²).
    second = (there - sums.one(cells.second)) / there
    variance = (second - first * first).times(half * half)
    return NumberStatistics(
        name=asked.name,
        unit=asked.unit,
        low=asked.low,
        high=asked.high,
        mean=first.times(half, middle).estimate(),
        variance=Estimate(max(0.0, variance.value), variance.error),
        deviation=_root(variance),
        missing=missing.estimate(),
        edges=tuple(cells.edges.tolist()) if asked.bins else (),
        counts=tuple(count.estimate() for count in histogram),
        quantiles=tuple(_quantiles(cells.edges, histogram, there)) if asked.bins else (),
    )


def _root(variance: Noisy) -> Estimate:
    """The square root; its error bar covers that of the variance, also where that reaches 0."""
    root = math.sqrt(max(0.0, variance.value))
    most = math.sqrt(max(0.0, variance.value + variance.error))
    least = math.sqrt(max(0.0, variance.value - variance.error))
    return Estimate(root, max(most - root, root - least))


def _quantiles(edges: Vector, histogram: Sequence[Noisy], there: Noisy) -> list[Quantile]:
    """From the share below each edge, made to rise as it must.

    The isotonic fit is the closest monotone one; its largest error is no larger than that of the
    noisy shares (Robertson, Wright & Dykstra 1988, "Order restricted statistical inference",
    theorem 1.6.1), whose error bars it keeps.
    """
    shares = [_sum(histogram[:count]) / there for count in range(1, len(histogram))]
    noisy = np.array([0.0, *(share.value for share in shares), 1.0])
    errors = np.array([0.0, *(share.error for share in shares), 0.0])
    rising = np.clip(isotonic_regression(noisy), 0.0, 1.0)
    return [
        Quantile(
            probability,
            _crossing(edges, rising, probability),
            float(edges[np.flatnonzero(rising + errors <= probability)[-1]]),
            float(edges[np.flatnonzero(rising - errors >= probability)[0]]),
        )
        for probability in QUANTILES
    ]


def _crossing(edges: Vector, rising: Vector, probability: float) -> float:
    """Where a rising share reaches the probability, straight between edges."""
    after = int(np.flatnonzero(rising >= probability)[0])
    before = max(0, after - 1)
    step = rising[after] - rising[before]
    part = (probability - rising[before]) / step if step > 0 else 0.0
    return float(edges[before] + part * (edges[after] - edges[before]))


def _category(cells: CategoryCells, sums: _Sums, units: Noisy) -> CategoryStatistics:
    *counts, missing = sums.agreeing(cells.either, units)
    values = cells.question.values
    return CategoryStatistics(
        name=cells.question.name,
        counts={v: count.estimate() for v, count in zip(values, counts, strict=True)},
        shares={v: (count / units).estimate() for v, count in zip(values, counts, strict=True)},
        missing=missing.estimate(),
    )


def document(statistics: Statistics) -> dict[str, Any]:
    """The figures as JSON has them; an interval without an end is null."""
    return {
        "units": _pair(statistics.units),
        "columns": {
            column.name: _number_document(column)
            if isinstance(column, NumberStatistics)
            else _category_document(column)
            for column in statistics.columns
        },
    }


def _number_document(column: NumberStatistics) -> dict[str, Any]:
    return {
        "kind": "number",
        "unit": column.unit,
        "range": [column.low, column.high],
        "mean": _pair(column.mean),
        "variance": _pair(column.variance),
        "deviation": _pair(column.deviation),
        "missing": _pair(column.missing),
        "quantiles": [
            {"probability": q.probability, "value": q.value, "low": q.low, "high": q.high}
            for q in column.quantiles
        ],
        "edges": list(column.edges),
        "counts": [_pair(count) for count in column.counts],
    }


def _category_document(column: CategoryStatistics) -> dict[str, Any]:
    return {
        "kind": "category",
        "missing": _pair(column.missing),
        "values": [
            {
                "value": value,
                "count": _pair(count),
                "share": _pair(column.shares[value]),
            }
            for value, count in column.counts.items()
        ],
    }


def _pair(estimate: Estimate) -> dict[str, float | None]:
    error = estimate.error if math.isfinite(estimate.error) else None
    return {"value": estimate.value, "error": error}


def scaling_of(statistics: Statistics, reaches: Mapping[str, float]) -> list[InputScaling]:
    """The shifts and scales that make each input's mean about 0 and its deviation about 1.

    A scale is never below what noise could have made of the deviation, nor below a tenth of the
    input's reach: an input that hardly varies is not blown up.

    Args:
        statistics: of a task's inputs.
        reaches: the task's ``scalable``.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for column in statistics.numbers:
        tensor = column.name.partition("[")[0]
        reach = reaches[tensor]
        shift = min(max(column.mean.value, -reach), reach)
        scale = max(column.deviation.value, column.deviation.error, reach / 10)
        found.setdefault(tensor, []).append((round(shift, 4), round(scale, 4)))
    return [
        InputScaling(
            input=tensor,
            shift=tuple(shift for shift, _ in numbers),
            scale=tuple(scale for _, scale in numbers),
        )
        for tensor, numbers in found.items()
    ]
