"""What a holder answers to a request for statistics: its training rows, summed and noised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from common.errors import ConfigurationError, Refusal
from common.privacy.noise import Randomness
from common.privacy.statistics import Layout, noised, sums
from common.statistics_plan import NumberQuestion, StatisticsPlan, input_name
from common.tasks.base import Examples, Task
from common.wire import StatisticsReply

__all__ = ["check_questions", "statistics_reply"]


def check_questions(
    plan: StatisticsPlan, task: Task, train: Examples, rows: pd.DataFrame | None
) -> None:
    """Refuse questions that this holder cannot answer, before anything is charged.

    Whether and why depends on the plan, the task and its schema, never on the rows.

    Args:
        plan: as the coordinator sent it.
        task: what this holder has data for.
        train: the training units, encoded; only their shapes matter.
        rows: the training rows before encoding; None where they are not kept.

    Raises:
        Refusal: with the rule's name.
    """
    try:
        Layout.of(plan).noise(plan)
    except ConfigurationError as error:  # in figures of the plan only
        raise Refusal("noise", str(error)) from None
    if plan.subject == "columns" and rows is None:
        raise Refusal("questions", "this holder keeps encoded rows only; ask about inputs")
    known = set(_input_names(task, train)) if plan.subject == "inputs" else _askable(task)
    if strange := sorted({question.name for question in plan.questions} - known):
        raise Refusal(
            "questions",
            f"this holder has no {plan.subject} named {', '.join(strange)[:100]} to ask about; the "
            "two sides need the same version of the task",
        )
    numbers = known if plan.subject == "inputs" else _number_columns(task)
    for question in plan.questions:
        # Text where a number was asked for would fail, or not, depending on the rows.
        if isinstance(question, NumberQuestion) and question.name not in numbers:
            raise Refusal("questions", f"{question.name[:100]!r} is no number; ask for its values")


def statistics_reply(
    plan: StatisticsPlan,
    task: Task,
    train: Examples,
    rows: pd.DataFrame | None,
    randomness: Randomness,
) -> StatisticsReply:
    """The noised answer; see :mod:`common.privacy.statistics` for its guarantee.

    Args:
        plan: calibrated, and checked.
        task: what the rows are for.
        train: the training units, encoded.
        rows: the training rows before encoding; needed for questions about columns.
        randomness: of the noise.
    """
    layout = Layout.of(plan)
    if plan.subject == "inputs":
        exact = sums(layout, _inputs(task, train))  # one row of each tensor is one unit
    else:
        assert rows is not None, "check_questions comes first"
        exact = sums(layout, _columns(plan, task, rows), _users(task, rows))
    return StatisticsReply(noised(exact, plan, randomness))


def _columns(plan: StatisticsPlan, task: Task, rows: pd.DataFrame) -> Mapping[str, pd.Series]:
    table = task.measured(rows)
    return {question.name: table[question.name] for question in plan.questions}


def _users(task: Task, rows: pd.DataFrame) -> pd.Series | None:
    """Whose each record is; None where every record is a unit."""
    key = _user_column(task)
    return rows[key] if key else None


def _user_column(task: Task) -> str:
    """The column that says whose a record is, where a unit is a user; empty otherwise."""
    keys = task.schema.of_kind("id") if task.unit == "user" else []
    return keys[0].name if keys else ""


def _askable(task: Task) -> set[str]:
    return set(task.schema.names) - {_user_column(task)}


def _number_columns(task: Task) -> set[str]:
    return {column.name for column in task.schema.of_kind("number", "integer")}


def _input_names(task: Task, train: Examples) -> Iterator[str]:
    for tensor in task.scalable:
        yield from (input_name(tensor, number) for number in range(train[tensor].shape[1]))


def _inputs(task: Task, train: Examples) -> Mapping[str, pd.Series]:
    """Every number that a plan may scale, under the name that a plan calls it: [units] each."""
    numbers = [column for tensor in task.scalable for column in train[tensor].double().cpu().T]
    names = _input_names(task, train)
    return {name: pd.Series(column.numpy()) for name, column in zip(names, numbers, strict=True)}
