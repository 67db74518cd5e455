"""Simulated evaluations that have a price: as in a deployment, the same noise in each engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Message

from common.errors import ConfigurationError
from common.flower import BaseGrid
from common.guarantees import HistogramEvaluation
from common.plan import TrainingPlan
from common.privacy.noise import SeededRandomness
from common.settings import plan_for
from common.wire import EvaluateReply, RoundRequest
from simulations.experiment import Experiment, run_experiment
from simulations.grid import BatchedGrid, in_process
from simulations.randomness import evaluation_randomness
from simulations.results import document
from simulations.workers import BlockTrainer, InProcess
from sotto.show import evaluation_rows, guarantee
from tests.tiny import CountedTask, TinyTask

CPU = torch.device("cpu")
TASK = CountedTask()
PARAMETERS = np.array([1.0, 0.2, -0.1, 0.05], np.float32)


def plan(**settings: object) -> TrainingPlan:
    given = {"rounds": 3, "epsilon": 2.0, "evaluation_epsilon": 4.0}
    return plan_for(TASK, {**given, "evaluate": "every 1", **settings})


def answers(grid: BaseGrid, wanted: TrainingPlan, number: int = 1) -> list[EvaluateReply]:
    request = RoundRequest("run", number, wanted, PARAMETERS)
    asked = [Message(request.records(), node, "evaluate") for node in grid.get_node_ids()]
    cells = {"cells": 2, "largest": 10**6} if wanted.evaluation.kind == "histogram" else {}
    return [EvaluateReply.of(reply.content, **cells) for reply in grid.send_and_receive(asked)]


def batched() -> BatchedGrid:
    data = TASK.holder_data(3)
    return BatchedGrid(list(data), InProcess(BlockTrainer(TASK, data, CPU)))


def histograms(replies: list[EvaluateReply]) -> list[list[int]]:
    return [reply.histogram.tolist() for reply in replies if reply.histogram is not None]


def test_both_engines_release_the_same_counts_and_show_the_same_figures() -> None:
    with in_process(TASK, plan(), TASK.holder_data(3), CPU) as grid:
        one_by_one = answers(grid, plan())
    together = answers(batched(), plan())
    assert histograms(together) == histograms(one_by_one)
    assert len(histograms(together)) == 3
    assert [each.metrics for each in together] == [each.metrics for each in one_by_one]


def test_noise_differs_between_holders_and_rounds_and_repeats_with_the_seed() -> None:
    found = [tuple(counts) for n in (1, 2) for counts in histograms(answers(batched(), plan(), n))]
    assert len(set(found)) > 3
    again = [tuple(counts) for n in (1, 2) for counts in histograms(answers(batched(), plan(), n))]
    assert again == found


def test_an_evaluation_draws_from_no_stream_of_the_rounds_training() -> None:
    evaluation = evaluation_randomness(plan(), "h0", 1)
    training = SeededRandomness("simulation", plan().seed, "h0", 1)
    assert not torch.equal(evaluation.words(8), training.words(8))


def test_where_evaluations_stay_no_counts_are_made() -> None:
    replies = answers(batched(), plan(evaluation_epsilon=None))
    assert all(reply.histogram is None and set(reply.metrics) == {"accuracy"} for reply in replies)


@pytest.mark.parametrize("engine", ["batched", "opacus"])
def test_an_experiment_has_exact_figures_and_released_ones(engine: str) -> None:
    wanted = plan(evaluate="final", rounds=2)
    result = run_experiment(Experiment(TASK, wanted, seeds=range(2), engine=engine))
    written = document(result)
    found = written["evaluation"]["accuracy"]
    assert set(found) == {"value", "low", "high", "per_seed"}
    assert found["low"] <= found["value"] <= found["high"]
    assert found["per_seed"][0] == found["value"]
    assert set(written["metrics"]) == {"accuracy"}
    assert written["evaluation_price"]["epsilon"] == 4.0
    assert [bool(summary.evaluation) for summary in result.runs[0].history] == [False, True]
    columns, rows = evaluation_rows(written)
    assert [len(row) for row in rows] == [len(columns)]


def test_the_released_figure_is_about_the_exact_one() -> None:
    """Of 60 held-out rows in all, with σ above 1 in each of two cells: the bar says how near."""
    summary = run_experiment(Experiment(TASK, plan(rounds=2))).runs[0].final
    exact = np.mean([figures["accuracy"] for figures in summary.metrics.values()])
    found = summary.evaluation["accuracy"]
    assert found.high - found.low < 0.5
    assert abs(found.value - exact) <= 2 * (found.high - found.low)


def test_a_plan_with_a_price_for_a_task_without_cells_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"no histogram.*evaluation_epsilon"):
        plan_for(TinyTask(), {"epsilon": 1.0, "evaluation_epsilon": 0.5})


def test_the_guarantee_is_of_updates_and_evaluations_together() -> None:
    sentence = guarantee(plan(), TASK, simulated=False)
    assert "(2, 0.0001)-differentially" not in sentence, "that is of the updates alone"
    assert "3 noised histograms" in sentence
    assert isinstance(plan().evaluation, HistogramEvaluation)
    alone = guarantee(plan(evaluation_epsilon=None), TASK, simulated=False)
    assert "(2, 0.0001)-differentially" in alone
