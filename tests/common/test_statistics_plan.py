"""A plan for statistics is public, complete, calibrated, and refuses what cannot be asked."""

from __future__ import annotations

import pytest

from common.errors import ConfigurationError
from common.frozen import validated
from common.privacy.accounting import epsilon
from common.statistics_plan import (
    CategoryQuestion,
    NumberQuestion,
    StatisticsPlan,
    statistics_plan_for,
)
from common.tasks import load
from tests.tiny import TinyTask

TASK = TinyTask()


def test_a_plan_asks_about_every_number_and_category_in_the_schemas_order() -> None:
    plan = statistics_plan_for(TASK, 1.0)
    assert [question.name for question in plan.questions] == ["x0", "x1", "x2", "y"]
    assert plan.questions[0] == NumberQuestion(name="x0", low=-10, high=10)
    assert plan.questions[3] == CategoryQuestion(name="y", values=(0, 1))
    assert (plan.unit, plan.delta, plan.subject) == ("record", 1e-4, "columns")


def test_a_plan_costs_what_it_says() -> None:
    plan = statistics_plan_for(TASK, 0.7, 1e-6)
    assert 0.698 < epsilon(plan.composition(), 1e-6) <= 0.7


def test_ranges_are_the_users_else_the_tasks_else_the_schemas() -> None:
    task = load("medical-diagnosis", "heart-disease")
    plan = statistics_plan_for(task, 1.0, ranges={"chol": (100.0, 300.0)})
    asked = {question.name: question for question in plan.questions}
    assert (asked["chol"].low, asked["chol"].high) == (100, 300)  # type: ignore[union-attr]
    assert (asked["age"].low, asked["age"].high) == (20, 80)  # type: ignore[union-attr]
    assert asked["age"].unit == "years"  # type: ignore[union-attr]


def test_inputs_are_asked_for_their_moments_within_the_tasks_reach() -> None:
    plan = statistics_plan_for(TASK, 1.0, subject="inputs")
    assert [question.name for question in plan.questions] == ["x[0]", "x[1]", "x[2]"]
    assert plan.questions[0] == NumberQuestion(name="x[0]", low=-4, high=4, bins=0)


def test_a_users_number_is_never_asked_about_and_other_ids_only_by_name() -> None:
    task = load("recommendation")
    assert [q.name for q in statistics_plan_for(task, 1.0).questions] == ["time"]
    (items,) = statistics_plan_for(task, 1.0, columns=["item"]).questions
    assert isinstance(items, CategoryQuestion)
    assert items.values == tuple(range(1, 201))
    with pytest.raises(ConfigurationError, match="no column 'user' to ask about"):
        statistics_plan_for(task, 1.0, columns=["user"])


def test_a_plan_travels_as_it_is() -> None:
    plan = statistics_plan_for(load("credit-risk", "german"), 2.0, columns=["status", "age"])
    assert StatisticsPlan.from_json(plan.to_json()) == plan
    assert StatisticsPlan.from_json(plan.to_json()).digest == plan.digest
    other = statistics_plan_for(load("credit-risk", "german"), 2.0, columns=["age", "status"])
    assert other.digest != plan.digest


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"columns": ["x9"]}, "no column 'x9' to ask about; there are x0, x1, x2, y"),
        ({"ranges": {"x9": (0.0, 1.0)}}, "no column 'x9'"),
        ({"ranges": {"x0": (1.0, 1.0)}}, "low must be below high"),
        ({"ranges": {"x0": (0.0, 5e-324)}}, "low must be below high"),
        ({"ranges": {"x0": (-1.7e308, 1.7e308)}}, "low must be below high"),
        ({"bins": -1}, "bins"),
        ({"subject": "inputs", "columns": ["x0"]}, "needs every input"),
        ({"min_holders": 0}, "min_holders"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        statistics_plan_for(TASK, 1.0, **asked)  # type: ignore[arg-type]


def test_a_task_without_scalable_inputs_says_so() -> None:
    with pytest.raises(ConfigurationError, match="names no inputs that may be scaled"):
        statistics_plan_for(load("recommendation"), 1.0, subject="inputs")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [{"kind": "category", "name": "c", "values": [1, 1]}]}, "different"),
        ({"questions": [{"kind": "category", "name": "c", "values": [1]}] * 2}, "got twice: c"),
        (
            {"questions": [{"kind": "category", "name": "c", "values": list(range(100_001))}]},
            "at most 100000",
        ),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"suprise": 1}, "suprise"),
    ],
)
def test_a_plan_off_the_wire_is_checked(changed: dict[str, object], says: str) -> None:
    values = statistics_plan_for(TASK, 1.0).model_dump(mode="json") | changed
    with pytest.raises(ConfigurationError, match=says):
        validated(StatisticsPlan, values)


@pytest.mark.parametrize("text", ["nonsense", "[1]", "{}"])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        StatisticsPlan.from_json(text)


def test_an_uncalibrated_plan_has_no_event() -> None:
    plan = statistics_plan_for(TASK, 1.0).model_copy(update={"noise_multiplier": None})
    with pytest.raises(ConfigurationError, match="not calibrated"):
        plan.event()


def test_the_guarantee_is_said_in_words() -> None:
    sentence = statistics_plan_for(TASK, 2.0).guarantee()
    for part in ("each record", "(2, 0.0001)", "adding or removing", "every answer"):
        assert part in sentence
