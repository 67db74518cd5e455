"""What is asked of the holders' rows: questions with public answers' ranges, and their price.

Everything in a :class:`StatisticsPlan` is public, and it says everything: ranges, bins and
categories are written out, so that holder and coordinator lay the same vector out from the plan
alone (:mod:`common.privacy.statistics`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal, Self

import pandas as pd
from pydantic import Field, model_validator

from common.data.schema import Column, Schema
from common.errors import ConfigurationError
from common.frozen import Frozen, PublicPlan, validated
from common.privacy.accounting import noise_multiplier
from common.privacy.events import Composition, SubsampledGaussian, gaussian
from common.tasks.base import Task, Unit

__all__ = [
    "DEFAULT_BINS",
    "CategoryQuestion",
    "NumberQuestion",
    "Question",
    "StatisticsPlan",
    "Subject",
    "input_name",
    "statistics_plan_for",
]

Subject = Literal["columns", "inputs"]
"""Columns of the holders' tables, or the numbers that a task makes of them for its model."""

DEFAULT_BINS = 16
MOST_CELLS = 100_000
"""Numbers in one answer; each is noised and sent."""


class NumberQuestion(Frozen):
    """How one number is distributed: its mean and variance, and a histogram.

    Args:
        name: of the column or input.
        low: values below it count as it; public.
        high: values above it count as it; public.
        bins: of equal width from ``low`` to ``high``; 0 for mean and variance only.
        unit: the physical unit, for people.
    """

    kind: Literal["number"] = "number"
    name: str
    low: float
    high: float
    bins: int = Field(default=DEFAULT_BINS, ge=0, le=1024)
    unit: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0.0 < (self.high - self.low) / 2 < math.inf:
            raise ValueError(
                "low must be below high, and both be numbers that can be told apart, got "
                f"{self.low:g} and {self.high:g}"
            )
        return self


class CategoryQuestion(Frozen):
    """How many have each value of a category.

    Args:
        name: of the column.
        values: that there are; public.
    """

    kind: Literal["category"] = "category"
    name: str
    values: tuple[int | str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"values of {self.name!r} must be different from each other")
        return self


Question = Annotated[NumberQuestion | CategoryQuestion, Field(discriminator="kind")]


class StatisticsPlan(PublicPlan):
    """One exchange of statistics, described completely.

    Args:
        task: registered name of the task.
        source: whose schema the holders' tables follow.
        preprocessing: the preparation of that source.
        subject: what the questions are about.
        questions: at least one; each name once.
        epsilon: the price of the answer, for each holder.
        delta: δ of it; below 1/n of the unit.
        unit: whose privacy is counted.
        noise_multiplier: σ, the noise's standard deviation over the L2 norm by which one unit
            moves the answer at most; None until calibrated.
        min_holders: with fewer answers there is no result.
        round_deadline: seconds until a silent holder is left out.
        seed: of a simulation's noise; holders that are real draw theirs unpredictably.
    """

    task: str
    source: str
    preprocessing: str = "default"
    subject: Subject = "columns"
    questions: tuple[Question, ...] = Field(min_length=1)
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    unit: Unit
    noise_multiplier: float | None = Field(default=None, gt=0)
    min_holders: int = Field(default=1, ge=1)
    round_deadline: float = Field(default=600.0, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        names = [question.name for question in self.questions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"questions must have different names, got twice: {', '.join(twice)}")
        cells = sum(
            question.bins if isinstance(question, NumberQuestion) else len(question.values)
            for question in self.questions
        )
        if cells + len(self.questions) > MOST_CELLS:
            raise ValueError(
                f"questions, bins and values must be at most {MOST_CELLS} in all, got "
                f"{cells + len(self.questions)}"
            )
        return self

    # -- privacy -----------------------------------------------------------------------------

    def calibrated(self) -> StatisticsPlan:
        """The same plan with the least noise that meets its ε."""
        sigma = noise_multiplier(1.0, 1, self.epsilon, self.delta)
        return self.model_copy(update={"noise_multiplier": sigma})

    def event(self) -> SubsampledGaussian:
        """The accountant's event of one answer; see :mod:`common.privacy.statistics` for why."""
        if self.noise_multiplier is None:
            raise ConfigurationError(
                "this plan is not calibrated: noise_multiplier is missing; build it with "
                "statistics_plan_for"
            )
        return gaussian(self.noise_multiplier, 1)

    def composition(self) -> Composition:
        """What one holder releases in all."""
        return Composition.of(self.event())

    def guarantee(self) -> str:
        """The guarantee in one sentence: unit, neighbouring relation, δ, adversary."""
        return (
            f"For each {self.unit} at each holder, the holder's answer is ({self.epsilon:g}, "
            f"{self.delta:g})-differentially private under adding or removing that {self.unit} "
            "of its training rows, against a coordinator that sees every answer and against "
            "whoever gets the statistics."
        )


def input_name(tensor: str, number: int) -> str:
    """What one entry of a task's input tensor is called in a plan.

    >>> input_name("features", 3)
    'features[3]'
    """
    return f"{tensor}[{number}]"


def statistics_plan_for(
    task: Task,
    epsilon: float,
    delta: float | None = None,
    *,
    subject: Subject = "columns",
    columns: Collection[str] = (),
    ranges: Mapping[str, tuple[float, float]] | None = None,
    bins: int | None = None,
    min_holders: int = 1,
    round_deadline: float = 600.0,
    seed: int = 0,
) -> StatisticsPlan:
    """A calibrated plan that asks about a task's columns or inputs.

    Args:
        task: on its source.
        epsilon: the price, in nats.
        delta: δ of it; None for the source's own.
        subject: what to ask about.
        columns: which; none for all numbers, categories and the label. Fewer make each answer
            more exact at the same price. Of ``id`` columns, which are asked about only if they are
            named, the values are counted.
        ranges: column → the public range in which to look, over the task's own and the schema's.
        bins: of histograms; None for 16 of columns, and for none of inputs.
        min_holders: with fewer answers there is no result.
        round_deadline: seconds.
        seed: of a simulation's noise.

    Raises:
        ConfigurationError: a column that is not there, a value out of bounds, an ε out of reach.
    """
    own = {**task.usual_ranges, **(ranges or {})}
    if subject == "columns":
        asked = _about_columns(
            task, columns, own, DEFAULT_BINS if bins is None else bins, frozenset(ranges or {})
        )
    else:
        _refuse_for_inputs(columns, ranges)
        asked = list(_about_inputs(task, bins or 0))
    plan = validated(
        StatisticsPlan,
        {
            "task": task.name,
            "source": task.source.name,
            "preprocessing": task.preprocessing,
            "subject": subject,
            "questions": asked,
            "epsilon": epsilon,
            "delta": task.source.delta if delta is None else delta,
            "unit": task.unit,
            "min_holders": min_holders,
            "round_deadline": round_deadline,
            "seed": seed,
        },
    )
    return plan.calibrated()


def _about_columns(
    task: Task,
    columns: Collection[str],
    ranges: Mapping[str, tuple[float, float]],
    bins: int,
    named: Collection[str],
) -> list[NumberQuestion | CategoryQuestion]:
    schema = task.schema
    usual = [column.name for column in schema.columns if column.kind != "id"]
    chosen = list(dict.fromkeys(columns)) or usual
    keys = [column.name for column in schema.of_kind("id")][:1] if task.unit == "user" else []
    for name in (*chosen, *named):
        if name not in schema.names or name in keys:
            there = ", ".join(known for known in schema.names if known not in keys)
            raise ConfigurationError(f"there is no column {name!r} to ask about; there are {there}")
    return [_about(schema[name], ranges, bins) for name in chosen]


def _about(
    column: Column, ranges: Mapping[str, tuple[float, float]], bins: int
) -> NumberQuestion | CategoryQuestion:
    if column.categories:
        return CategoryQuestion(name=column.name, values=column.categories)
    assert column.low is not None
    assert column.high is not None
    if column.kind == "id":
        count = column.high - column.low + 1
        if count > MOST_CELLS:
            raise ConfigurationError(
                f"column {column.name!r} may have {count:.0f} values; at most {MOST_CELLS} can be "
                "counted"
            )
        values = tuple(range(int(column.low), int(column.high) + 1))
        return CategoryQuestion(name=column.name, values=values)
    low, high = ranges.get(column.name, (column.low, column.high))
    return validated(
        NumberQuestion,
        {"name": column.name, "low": low, "high": high, "bins": bins, "unit": column.unit},
    )


def _refuse_for_inputs(
    columns: Collection[str], ranges: Mapping[str, tuple[float, float]] | None
) -> None:
    if columns or ranges:
        raise ConfigurationError(
            "a scaling needs every input, in the range that the task states; leave columns and "
            "ranges out"
        )


def _about_inputs(task: Task, bins: int) -> Iterator[NumberQuestion]:
    if not task.scalable:
        raise ConfigurationError(
            f"task {task.name!r} names no inputs that may be scaled (its `scalable` is empty)"
        )
    specimen = task.examples(_specimen(task.schema))
    for tensor, reach in task.scalable.items():
        for number in range(specimen[tensor].shape[1]):
            yield NumberQuestion(name=input_name(tensor, number), low=-reach, high=reach, bins=bins)


def _specimen(schema: Schema) -> pd.DataFrame:
    """One made-up row that fits the schema, to see the shapes that a task encodes it to."""
    cells = {
        column.name: [column.categories[0] if column.categories else column.low]
        for column in schema.columns
    }
    whole = {column.name: "int64" for column in schema.columns if column.kind in ("integer", "id")}
    return pd.DataFrame(cells).astype(whole)
