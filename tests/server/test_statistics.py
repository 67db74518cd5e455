"""The coordinator adds up what holders tell, checks every reply, and can ask again for free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, MessageType, RecordDict

from common.errors import Refusal, RunError
from common.privacy.statistics import ONE, Layout
from common.statistics_plan import StatisticsPlan, statistics_plan_for
from common.wire import StatisticsReply, StatisticsRequest, array_of, refusal_error
from server.statistics import StatisticsFolder, gather
from tests.fakes import FakeGrid
from tests.tiny import TinyTask

Answer = Callable[[StatisticsRequest], RecordDict | Error | None]


def holders(answers: Mapping[str, Answer]) -> FakeGrid:
    """Holders that are functions, by name."""
    return FakeGrid(answers, StatisticsRequest.of)


def plan(**settings: object) -> StatisticsPlan:
    asked = {"columns": ["y"], "round_deadline": 0.1, **settings}
    return statistics_plan_for(TinyTask(), 1.0, **asked)  # type: ignore[arg-type]


def says(*units: float) -> Answer:
    """A holder that tells these sums, in units."""
    reply = StatisticsReply(np.array(np.array(units) * ONE, dtype=np.int64))
    return lambda _: reply.records()


HONEST = says(1000.0, 300.0, 700.0, 0.0)


def test_answers_are_added_up() -> None:
    grid = holders({"a": HONEST, "b": says(500.0, 100.0, 400.0, 0.0)})
    gathered = gather(grid, plan(), "run")
    assert gathered.holders == ("a", "b")
    assert (gathered.total / ONE).tolist() == [1500, 400, 1100, 0]
    assert gathered.statistics.units.value == pytest.approx(1500)
    assert {kind for _, kind, _ in grid.asked} == {MessageType.QUERY}


def test_more_holders_mean_more_noise_in_the_sum() -> None:
    one = gather(holders({"a": HONEST}), plan(), "run").statistics
    four = gather(holders(dict.fromkeys("abcd", HONEST)), plan(), "run").statistics
    assert four.units.error == pytest.approx(2 * one.units.error)


def record(vector: np.ndarray, name: str = "sums") -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({name: array_of(vector)})})


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda _: None, "no reply within 0.1 s"),
        (lambda _: refusal_error(Refusal("statistics", "no")), "declined: statistics: no"),
        (lambda _: Error(1001, "KeyError"), "failed: KeyError"),
        (lambda _: record(np.zeros(3, np.int64)), "3 numbers, the plan's answer has 4"),
        (lambda _: record(np.zeros(4, np.float32)), "expected a flat int64 vector"),
        (lambda _: record(np.zeros((2, 2), np.int64)), "expected a flat int64 vector"),
        (lambda _: record(np.full(4, 2**60)), "which no honest sum reaches"),
        (lambda _: record(np.full(4, -(2**63))), "which no honest sum reaches"),
        (lambda _: record(np.zeros(4, np.int64), "other"), "expected one array 'sums'"),
        (lambda _: RecordDict(), "expected one array 'sums'"),
    ],
)
def test_a_holder_that_does_not_answer_well_is_named_and_left_out(answer: Answer, why: str) -> None:
    gathered = gather(holders({"a": HONEST, "bad": answer}), plan(), "run")
    assert gathered.holders == ("a",)
    assert why in gathered.missed["bad"]


def test_too_few_answers_give_no_result() -> None:
    grid = holders({"a": HONEST, "b": lambda _: None})
    with pytest.raises(RunError, match=r"1 of at least 2 holders gave statistics.*b: no reply"):
        gather(grid, plan(min_holders=2), "run")


def test_too_much_noise_gives_no_result() -> None:
    few = says(3.0, 1.0, 2.0, 0.0)
    with pytest.raises(RunError, match="noise is too large for the 1 holders"):
        gather(holders({"a": few}), plan(), "run")


def test_an_exchange_that_broke_off_goes_on_under_its_name(tmp_path: Path) -> None:
    first = StatisticsFolder.resume_or_begin(tmp_path, plan())
    assert StatisticsFolder.resume_or_begin(tmp_path, plan()) == first
    assert StatisticsFolder.resume_or_begin(tmp_path, plan(bins=4, columns=["x0"])) != first
    first.finish({"units": 3})
    assert first.finished
    assert StatisticsFolder.resume_or_begin(tmp_path, plan()) != first


def test_the_layout_is_the_plans() -> None:
    assert Layout.of(plan()).dimension == 4
