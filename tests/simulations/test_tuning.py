"""Choosing settings: one release with one price, whose winner is the best by noised scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.errors import ConfigurationError, RunError
from common.privacy.accounting import epsilon
from common.privacy.events import Composition
from common.privacy.noise import SeededRandomness
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import HolderData, Task
from common.tasks.histograms import Estimate
from simulations.tuning import Candidate, Trial, Tuning

CPU = torch.device("cpu")
RATES = {"learning_rate": [1e-6, 0.5]}
"""Of two candidates, one learns nothing."""


@pytest.fixture(scope="module")
def bank() -> tuple[Task, HolderData]:
    """Four banks in one, so that a score is worth its noise."""
    task = load("credit-risk")
    return task, task.holder_data(1)["bank-1"]


def search(task: Task, price: float, expected_runs: float = 6.0) -> Tuning:
    return Tuning.over(task, RATES, price=price, delta=1e-5, expected_runs=expected_runs)


def test_the_winner_costs_what_was_asked_and_each_run_less() -> None:
    tuning = search(load("credit-risk"), 3.0)
    assert 0.99 * 3.0 < tuning.cost <= 3.0
    for candidate in tuning.candidates:
        alone = epsilon(candidate.plan.composition(), 1e-5)
        # A choice is dearer than one run, and cheaper than the runs that it takes on average.
        assert alone < tuning.cost < epsilon(candidate.plan.composition() * 6, 1e-5)


def test_the_event_holds_every_candidates_training_and_score() -> None:
    tuning = search(load("credit-risk"), 3.0)
    mechanisms = {event.to_dict()["mechanism"] for event in tuning.event.candidates[0]}
    assert mechanisms == {"subsampled-gaussian", "discrete-gaussian"}
    costs = {candidate.plan.composition() for candidate in tuning.candidates}
    assert set(tuning.event.candidates) == costs


def test_more_runs_at_one_price_leave_less_for_each() -> None:
    few, many = (search(load("credit-risk"), 3.0, runs) for runs in (3.0, 30.0))
    each = [
        epsilon(Composition.sum([tuning.candidates[0].plan.composition()]), 1e-5)
        for tuning in (few, many)
    ]
    assert each[0] > each[1]


def test_the_best_candidate_wins(bank: tuple[Task, HolderData]) -> None:
    """A model that learned reaches .7 and a bar of ±.03; one that did not, .5 and any bar."""
    task, data = bank
    number = 0

    def randomness() -> SeededRandomness:
        nonlocal number
        number += 1
        return SeededRandomness("search", number)

    trials: list[None] = []
    tuning = Tuning.over(task, RATES, price=8.0, delta=1e-5, expected_runs=6.0)
    best = tuning.run(data, randomness, CPU, lambda: trials.append(None))
    assert len(trials) >= 2  # of this seed: the geometric draw may be 1
    assert best.candidate.values == {"learning_rate": 0.5}
    assert best.score.value > 0.65
    assert np.abs(best.parameters).max() > 1e-3


def test_a_score_that_is_lost_in_noise_loses() -> None:
    plan = plan_for(load("credit-risk"), {"epsilon": 1.0})
    lost = Estimate(math.nan, math.nan, math.nan)
    vague, found = Estimate(0.8, 0.1, 1.0), Estimate(0.7, 0.65, 0.75)
    nothing = np.zeros(1, dtype=np.float32)
    ranks = [Trial(Candidate({}, plan), score, nothing).rank for score in (lost, vague, found)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rate": [0.1]}, "one candidate"),
        ({**RATES, "epsilon": 1.0}, "epsilon cannot be tuned"),
        ({**RATES, "no_dp": True}, "no_dp cannot be tuned"),
        ({"learning_rat": [0.1, 0.2]}, "learning_rate"),
    ],
)
def test_what_cannot_be_tuned_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Tuning.over(load("credit-risk"), settings, price=3.0, delta=1e-5)


def test_where_holders_are_the_unit_there_is_nothing_to_tune_on() -> None:
    lists = {**RATES, "unit": ["holder"]}
    with pytest.raises(ConfigurationError, match="nothing about one holder can be learned"):
        Tuning.over(load("credit-risk"), lists, price=3.0, delta=1e-5)


def test_a_candidate_that_diverges_loses_and_ends_nothing(bank: tuple[Task, HolderData]) -> None:
    task, data = bank
    number = 0

    def randomness() -> SeededRandomness:
        nonlocal number
        number += 1
        return SeededRandomness("search", number)

    wild = {"learning_rate": [1e30, 0.5], "rounds": 3}
    tuning = Tuning.over(task, wild, price=8.0, delta=1e-5, expected_runs=6.0)
    assert tuning.run(data, randomness, CPU).candidate.values == {"learning_rate": 0.5}

    worse = Tuning.over(task, {"learning_rate": [1e30, 1e31], "rounds": 3}, price=8.0, delta=1e-5)
    with pytest.raises(RunError, match="no run of the search"):
        worse.run(data, randomness, CPU)
