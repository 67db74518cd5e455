"""Holders' noised histograms: checked, summed, and turned into figures with error bars."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from common.guarantees import HistogramEvaluation
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks.histograms import Estimate, Values
from common.wire import EvaluateReply, RoundRequest
from server.checkpoints import RunState
from server.evaluation import estimates, expected_of
from server.rounds import evaluate
from server.runs import RunFolder
from server.summaries import RoundSummary
from tests.fakes import FakeGrid
from tests.tiny import CountedTask


class Watched(CountedTask):
    """Remembers what its metrics were made of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[float], float]] = []

    def metrics_of(self, histogram: Values, variance: float) -> dict[str, Estimate]:
        self.seen.append((histogram.tolist(), variance))
        return super().metrics_of(histogram, variance)


def plan(**settings: object) -> TrainingPlan:
    return plan_for(
        CountedTask(), {"epsilon": 1.0, "rounds": 1, "evaluation_epsilon": 1.0, **settings}
    )


def sigma(plan: TrainingPlan) -> float:
    assert isinstance(plan.evaluation, HistogramEvaluation)
    return plan.evaluation.event().noise_multiplier


def says(*counts: int) -> Callable[[RoundRequest], RecordDict]:
    records = EvaluateReply({}, np.array(counts, dtype=np.int64)).records
    return lambda _: records()


def evaluated(task: CountedTask, holders: dict[str, Callable[..., RecordDict]]) -> RoundSummary:
    state = RunState("run", 1, np.zeros(4, np.float32))
    summary = RoundSummary(1, tuple(holders), {}, 0.1)
    return evaluate(FakeGrid(holders), plan(), task, state, summary)


def test_counts_are_summed_and_so_is_the_noise() -> None:
    task = Watched()
    found = evaluated(task, {"a": says(-3, 60), "b": says(20, 50), "c": says(13, 70)})
    assert task.seen == [([30.0, 180.0], 3 * sigma(plan()) ** 2)]
    assert found.evaluation["accuracy"].value == pytest.approx(180 / 210, abs=0.01)
    assert found.metrics == {}, "nobody sent an exact figure"


def test_a_bad_histogram_costs_its_holder_the_evaluation_and_nobody_else() -> None:
    largest = expected_of(plan(), CountedTask())["largest"]
    task = Watched()
    found = evaluated(
        task,
        {
            "good": says(10, 90),
            "huge": says(0, largest + 1),
            "overflowing": says(2**62, 2**62),
            "short": says(5),
            "silent": lambda _: EvaluateReply({}).records(),
        },
    )
    assert task.seen == [([10.0, 90.0], sigma(plan()) ** 2)]
    assert set(found.missed) == {"huge", "overflowing", "short", "silent"}
    assert all("evaluation rejected" in why for why in found.missed.values())


def test_no_honest_holder_is_beyond_the_bound() -> None:
    """A holder declares up to ten times ``holder_size`` and has up to four times as many units."""
    wanted = plan()
    largest = expected_of(wanted, CountedTask())["largest"]
    assert largest >= 40 * wanted.holder_size + 40 * sigma(wanted)


def test_nobody_who_answers_is_no_figure_and_no_error() -> None:
    task = Watched()
    assert evaluated(task, {}).evaluation == {}
    assert estimates(plan(), task, []) == {}
    assert task.seen == []


def test_where_evaluations_stay_nothing_is_asked_and_nothing_made() -> None:
    stays = plan(evaluation_epsilon=None)
    assert expected_of(stays, CountedTask()) == {}
    assert estimates(stays, CountedTask(), [EvaluateReply({"accuracy": 0.5})]) == {}


def test_figures_are_in_the_runs_file_and_read_back(tmp_path: Path) -> None:
    folder = RunFolder.begin(tmp_path, plan())
    known, lost = Estimate(0.8, 0.7, 0.9), Estimate(math.nan, math.nan, math.nan)
    folder.note(RoundSummary(1, ("a",), {}, 0.1, {}, {"auc": known, "ks": lost}))
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written["evaluation"]["auc"] == {"value": 0.8, "low": 0.7, "high": 0.9}
    assert written["evaluation"]["ks"]["value"] is None
    (read,) = folder.history()
    assert read.evaluation["auc"] == known
    assert math.isnan(read.evaluation["ks"].high)
