"""What a holder says of its rows: one vector of whole numbers, of bounded sensitivity, and noise.

The questions of a plan lay the vector out (:class:`Layout`). A record fills, for each question,

* of a number: one cell of the histogram, or the cell for "missing"; and where it is there, the pair
  (x, 1 − x²) with x in [−1, 1] from the low to the high end of the public range. The pair's L2 norm
  is √(x² + (1 − x²)²) = √(1 − x²(1 − x²)) ≤ 1, so that sum and sum of squares together cost no more
  than the sum alone;
* of a category: the cell of its value, or the cell for "missing";

and the cell that counts units. So one record's vector has a squared norm of at most 1 for the
count, 1 for each category, and 2 for each number (1 without a histogram): whatever the record.

**Unit and neighbours.** A unit is one record, or one user with all records: then each of a user's m
records counts 1/m, and the vector of the unit is their mean, whose norm is no larger than the
largest of theirs. However many records, a user counts as one, and nothing is sampled or clipped.
Neighbouring data differ by one unit more or less, which moves the sum by that unit's vector.

**Arithmetic.** Everything is a whole number of 2⁻²⁰ths (:data:`ONE`), rounded towards zero, so that
the norm holds in exact integer arithmetic and sums are exact.

**Mechanism and event.** The noise is N(0, (σC)²) in each coordinate, C the bound of a unit's norm,
rounded to a whole number and added to the exact sum. The sum is whole, so this is what rounding the
sum with Gaussian noise in it would give: post-processing of the Gaussian mechanism, whose price is
exactly that of the event ``gaussian(σ, 1)`` (Dong, Roth & Su 2022, "Gaussian differential privacy",
theorem 2.7), and what leaves is a whole number that has no low bits to tell anything (Mironov 2012,
"On significance of the least significant bits for differential privacy"). The event
``DiscreteGaussian`` does not fit: a unit moves many coordinates here, and its exact price
(:mod:`common.privacy.events`) is for one cell that moves by one. The noise's steps are 2⁻²⁰ of a
unit, where rounding adds 1/12 of a squared step to its variance and nothing that anybody would see.
Noise that is far too large is refused (:data:`LARGEST_DEVIATION`): its floats lie too far apart.

**Adversary.** Whoever sees the noised vector, and knows every other unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from common.errors import ConfigurationError
from common.privacy.noise import Randomness
from common.statistics_plan import CategoryQuestion, NumberQuestion, StatisticsPlan

__all__ = [
    "LARGEST_DEVIATION",
    "ONE",
    "CategoryCells",
    "Cells",
    "Layout",
    "NumberCells",
    "noised",
    "sums",
]

ONE = 2**20
"""What stands for 1 in the vector."""

LARGEST_DEVIATION = 2.0**34
"""Of the noise in each number, in steps of 1/ONE: σC up to 16,384.

Floats of size y lie 2⁻⁵²·y apart, so that of draws near y one whole number gets y·2⁻⁵² more or less
than its share. Over the C² coordinates that a unit moves fully that is a privacy loss of some
σC²·2⁻³² beside the 1/σ that is paid for: 6 % of it at this bound, and less by the square below.
Past 2⁵³ all noise is even and shows what it was added to; past 2⁶³ it is no int64, and none.
"""

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NumberCells:
    """Where a number's figures are: the bins, then missing, then x and 1 − x².

    Args:
        question: what was asked.
        start: of the bins.
    """

    question: NumberQuestion
    start: int

    @property
    def missing(self) -> int:
        """Of the records without the number."""
        return self.start + self.question.bins

    @property
    def first(self) -> int:
        """Of Σ x."""
        return self.missing + 1

    @property
    def second(self) -> int:
        """Of Σ (1 − x²)."""
        return self.missing + 2

    @property
    def end(self) -> int:
        """After the last."""
        return self.missing + 3

    @property
    def either(self) -> range:
        """Of these each record fills exactly one; empty without a histogram."""
        return range(self.start, self.first) if self.question.bins else range(0)

    @property
    def square_norm(self) -> int:
        """What one record adds to the squared norm at most."""
        return 2 if self.question.bins else 1

    @property
    def edges(self) -> Numbers:
        """Of the bins, in the number's own unit: [bins + 1]."""
        return np.linspace(self.question.low, self.question.high, self.question.bins + 1)

    def add(self, column: pd.Series, weights: Integers, into: Integers) -> None:
        """Add the records' figures in place.

        Args:
            column: [N] numbers, NaN where there is none.
            weights: [N] what stands for 1 in each record, at most :data:`ONE`.
            into: [D], the vector.
        """
        low, high = self.question.low, self.question.high
        values = column.to_numpy(dtype=np.float64)
        missing = np.isnan(values)
        into[self.missing] += weights[missing].sum()
        there, share = np.clip(values[~missing], low, high), weights[~missing]
        if self.question.bins:
            within = (there - low) / (high - low) * self.question.bins
            place = np.clip(within.astype(np.int64), 0, self.question.bins - 1)
            np.add.at(into, self.start + place, share)
        half = (high - low) / 2
        scaled = np.clip((there - low) / half - 1, -1.0, 1.0)
        x = np.trunc(scaled * ONE).astype(np.int64)
        # Rounded down, and only now multiplied by the share, so that the norm cannot grow.
        rest = (ONE * ONE - x * x) // ONE
        into[self.first] += _shared(x, share).sum()
        into[self.second] += _shared(rest, share).sum()


@dataclass(frozen=True)
class CategoryCells:
    """Where a category's counts are: the values in their order, then missing.

    Args:
        question: what was asked.
        start: of the values.
    """

    question: CategoryQuestion
    start: int

    @property
    def missing(self) -> int:
        """Of the records without a value, or with one that was not asked about."""
        return self.start + len(self.question.values)

    @property
    def end(self) -> int:
        """After the last."""
        return self.missing + 1

    @property
    def either(self) -> range:
        """Of these each record fills exactly one."""
        return range(self.start, self.end)

    @property
    def square_norm(self) -> int:
        """What one record adds to the squared norm at most."""
        return 1

    def add(self, column: pd.Series, weights: Integers, into: Integers) -> None:
        """Add the records' counts in place; see :meth:`NumberCells.add`."""
        codes = pd.Index(self.question.values).get_indexer(pd.Index(column))
        place = np.where(codes < 0, len(self.question.values), codes)
        np.add.at(into, self.start + place, weights)


Cells = NumberCells | CategoryCells


@dataclass(frozen=True)
class Layout:
    """Where everything is in the vector; the count of units is the first number.

    Args:
        cells: of each question, in the plan's order.
    """

    cells: tuple[Cells, ...]

    @classmethod
    def of(cls, plan: StatisticsPlan) -> Self:
        """The layout of a plan's answer."""
        return cls(tuple(_laid_out(plan)))

    @property
    def units(self) -> int:
        """Of the count of units."""
        return 0

    @property
    def dimension(self) -> int:
        """D, the length of the vector."""
        return self.cells[-1].end

    @cached_property
    def square_norm(self) -> int:
        """C², in squares of :data:`ONE`: no unit's vector has a larger squared norm."""
        return 1 + sum(cells.square_norm for cells in self.cells)

    def noise(self, plan: StatisticsPlan) -> float:
        """σC in steps of 1/ONE: the standard deviation of each number's noise.

        Raises:
            ConfigurationError: it is above :data:`LARGEST_DEVIATION`.
        """
        deviation = plan.event().noise_multiplier * math.sqrt(self.square_norm) * ONE
        if not deviation <= LARGEST_DEVIATION:
            raise ConfigurationError(
                f"each figure would get noise of {deviation / ONE:.3g} {plan.unit}s, and at most "
                f"{LARGEST_DEVIATION / ONE:g} can be drawn soundly; raise epsilon, or ask about "
                "less"
            )
        return deviation


def _laid_out(plan: StatisticsPlan) -> Iterator[Cells]:
    start = 1
    for question in plan.questions:
        cells: Cells = (
            NumberCells(question, start)
            if isinstance(question, NumberQuestion)
            else CategoryCells(question, start)
        )
        yield cells
        start = cells.end


def sums(
    layout: Layout, columns: Mapping[str, pd.Series], users: npt.ArrayLike | None = None
) -> Integers:
    """The exact vector of a holder's rows; adding or removing a unit moves it by at most C.

    Args:
        layout: of the plan's answer.
        columns: name → [N] values, for every question.
        users: [N] whose each record is; None where every record is a unit.

    Returns:
        [D] int64 in steps of 1/ONE.
    """
    into = np.zeros(layout.dimension, dtype=np.int64)
    count, weights = _units(columns[layout.cells[0].question.name], users)
    into[layout.units] = count * ONE
    for cells in layout.cells:
        cells.add(columns[cells.question.name], weights, into)
    return into


def noised(exact: Integers, plan: StatisticsPlan, randomness: Randomness) -> Integers:
    """What leaves: the exact vector with the plan's noise in every number.

    Args:
        exact: [D] of :func:`sums`.
        plan: calibrated.
        randomness: of the noise.

    Returns:
        [D] int64.
    """
    std = Layout.of(plan).noise(plan)
    noise = randomness.normal([len(exact)], std=std, dtype=torch.float64).numpy()
    # Rounded by itself: what is added is whole and knows nothing of what it is added to.
    whole: Integers = np.rint(noise).astype(np.int64)
    return exact + whole


def _units(column: pd.Series, users: npt.ArrayLike | None) -> tuple[int, Integers]:
    """How many units there are, and what stands for 1 in each record: ONE, or a user's share."""
    if users is None:
        return len(column), np.full(len(column), ONE, dtype=np.int64)
    _, user, records = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    return len(records), (ONE // records)[user].astype(np.int64)


def _shared(values: Integers, weights: Integers) -> Integers:
    """Values (in 1/ONE) times weights (in 1/ONE), rounded towards zero: in 1/ONE."""
    return np.sign(values) * (np.abs(values) * weights // ONE)
