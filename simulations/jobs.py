"""What workers are given and give back: a round cut into jobs, and what comes of each.

How holders are cut into jobs depends on the round only, never on how many workers there are, and
sums are exact (:mod:`simulations.sums`), so any number of workers gives the same bits in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from torch import Tensor

from common.plan import TrainingPlan
from simulations.sums import ExactSum
from simulations.travel import Travels

__all__ = [
    "Assignment",
    "Cut",
    "Figures",
    "Job",
    "Judged",
    "Outcome",
    "Private",
    "Total",
    "Totals",
    "gather",
    "jobs_of",
    "merged",
]

Private = Mapping[str, Tensor]
"""One holder's private parameters by name."""

FEWEST, SEVERAL = 64, 2
"""Holders that are worth two jobs; jobs come in twos."""

USUAL = 64
"""Numbers that layers keep of one unit, where that could not be measured."""


@dataclass(frozen=True)
class Assignment:
    """One holder's part in a round.

    Args:
        holder: its name; its random streams are named after it.
        data: key of its data.
        plan: what it is asked to do.
        point: which model it starts from, and whose sum its update enters; a sweep has several.
    """

    holder: str
    data: str
    plan: TrainingPlan
    point: int = 0


@dataclass(frozen=True)
class Cut:
    """How to cut a round into jobs, for holders like the one that was looked at.

    Args:
        holders: in a job at most.
        a_unit: numbers that the model's layers keep of one unit during a pass, roughly.
    """

    holders: int
    a_unit: int


@dataclass(frozen=True)
class Job(Travels):
    """What one worker does at a time.

    Args:
        assignments: of one round, all with or all without privacy and with one optimizer.
        number: of the round.
        parameters: shared, of each point: [P, D] float32.
        private: private parameters of those assignments that have some already, by position.
        individually: whether every update is wanted, or only their sum.
        a_unit: as in :class:`Cut`.
        clip_norm: L2 bound of whole updates, where holders are the unit.
    """

    assignments: Sequence[Assignment]
    number: int
    parameters: Tensor
    private: Mapping[int, Private] = field(default_factory=dict)
    individually: bool = False
    a_unit: int = USUAL
    clip_norm: float | None = None


@dataclass
class Total:
    """A weighted sum of updates; neither order nor grouping of the terms changes a bit.

    Args:
        sum: Σ weight · update, [D].
        weight: Σ weight.
        within: how many of the updates needed no clipping, where whole updates are clipped.
    """

    sum: ExactSum
    weight: Fraction = Fraction(0)
    within: int = 0

    def add(self, vector: Tensor, weight: float, within: int = 0) -> None:
        """Add a term.

        Args:
            vector: some weighted updates' sum, [D] float64.
            weight: the sum of their weights.
            within: how many of them needed no clipping.
        """
        self.sum.add(vector)
        self.weight += Fraction(weight)
        self.within += within

    def merge(self, other: Total) -> None:
        """Add another's terms."""
        self.sum.merge(other.sum)
        self.weight += other.weight
        self.within += other.within

    def mean(self) -> Tensor:
        """The weighted mean, [D] float64."""
        return self.sum.total() / float(self.weight)


Totals = dict[int, Total]
"""Weighted sums by point."""


def gather(into: Totals, more: Totals) -> None:
    """Add terms in place; what ``into`` has nothing of yet it takes as it is."""
    for point, total in more.items():
        if point in into:
            into[point].merge(total)
        else:
            into[point] = total


def merged(parts: Iterable[Totals]) -> Totals:
    """The sums of all terms, in new objects."""
    together: Totals = {}
    for part in parts:
        for point, total in part.items():
            if point not in together:
                together[point] = Total(ExactSum(total.sum.dimension))
            together[point].merge(total)
    return together


@dataclass(frozen=True)
class Outcome(Travels):
    """What came of a job.

    Args:
        totals: by point. Workers may hand over the totals of several jobs with the last of these:
            only the sum over all jobs of a call means something.
        singles: position of an assignment → its update [D], where it is not in a total: because
            it was wanted, or because it is not one that the plan allows.
        weights: of these, by position.
        within: 1 or 0 for each of these that needed no clipping or did, by position.
        private: position of an assignment → its private parameters.
        failed: position of an assignment whose data or loss broke → the error's type.
        declined: position of an assignment whose holder does not allow it → rule and sentence.
    """

    totals: Totals = field(default_factory=dict)
    singles: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)
    within: dict[int, int] = field(default_factory=dict)
    private: dict[int, Private] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    declined: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """What came of a holder's evaluation.

    Args:
        metrics: exact ones, for the experimenter.
        histogram: the noised counts that would leave the holder; empty where the plan asks for
            none.
    """

    metrics: Mapping[str, float]
    histogram: tuple[int, ...] = ()


Judged = Figures | str
"""A holder's figures, or the type of the error that they ended in."""


def jobs_of(
    assignments: Sequence[Assignment],
    cut: Cut,
    number: int,
    parameters: Tensor,
    private: Mapping[int, Private] | None = None,
    *,
    individually: bool = False,
    clip_norm: float | None = None,
) -> list[Job]:
    """Cut a round's assignments into jobs of about equal size.

    Args:
        assignments: of the whole round.
        cut: how large jobs may be.
        number: of the round.
        parameters: [P, D].
        private: private parameters by position in ``assignments``.
        individually: see :class:`Job`.
        clip_norm: see :class:`Job`.
    """
    count = math.ceil(len(assignments) / cut.holders)
    if count > 1 or len(assignments) >= FEWEST:
        # A multiple of the usual numbers of workers, so that none waits for another's last job.
        count = SEVERAL * math.ceil(count / SEVERAL)
    ends = [round(place * len(assignments) / max(1, count)) for place in range(count + 1)]
    known = private or {}
    return [
        Job(
            assignments[start:end],
            number,
            parameters,
            {place - start: known[place] for place in range(start, end) if place in known},
            individually,
            cut.a_unit,
            clip_norm,
        )
        for start, end in pairwise(ends)
        if start < end
    ]
