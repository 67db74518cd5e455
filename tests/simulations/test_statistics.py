"""Simulated statistics are those of a deployment; a scaling is the same in every engine."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from common.privacy.statistics import ONE, Layout, sums
from common.settings import plan_for
from common.statistics import NumberStatistics, scaling_of
from common.statistics_plan import StatisticsPlan, statistics_plan_for
from common.tasks import load
from common.tasks.base import Task
from common.tasks.scaling import InputScaling, scaled
from simulations.experiment import Experiment, run_experiment
from simulations.statistics import simulate_statistics
from tests.tiny import TinyTask

SCALING = (InputScaling(input="x", shift=(0.5, -0.5, 0.0), scale=(2.0, 0.5, 1.5)),)


HARDLY_NOISED = 1e8
"""An ε at which noise is too small to matter; less noise than its budget no holder would allow."""


def exact(task: Task, plan: StatisticsPlan) -> np.ndarray:
    layout = Layout.of(plan)
    tables = [task.split(rows, holder="", seed=0).train for rows in task.source.tables().values()]
    return sum(sums(layout, {q.name: rows[q.name] for q in plan.questions}) for rows in tables)


def test_every_holders_training_rows_are_in_the_sum() -> None:
    task = TinyTask()
    plan = statistics_plan_for(task, HARDLY_NOISED)
    gathered = simulate_statistics(task, plan)
    # 61 sums of three normal draws: beyond 7 deviations is one of them once in 10⁹ runs.
    largest = 7 * np.sqrt(3) * Layout.of(plan).noise(plan)
    assert np.abs(gathered.total - exact(task, plan)).max() <= largest < ONE / 100
    assert gathered.holders == ("h0", "h1", "h2")


def test_a_simulation_repeats_and_another_seed_has_other_noise() -> None:
    task = TinyTask()
    totals = [
        simulate_statistics(task, statistics_plan_for(task, 5.0, seed=seed)).total
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(totals[0], totals[1])
    assert not np.array_equal(totals[0], totals[2])


def test_holders_noise_is_their_own() -> None:
    """Three independent draws add up to √3 of one; the same draw three times to 3."""
    task = TinyTask()
    plan = statistics_plan_for(task, 5.0)
    layout = Layout.of(plan)
    noise = (simulate_statistics(task, plan).total - exact(task, plan)) / layout.noise(plan)
    # The root mean square of n draws has a relative deviation of 1/√(2n): 9 % for these 61.
    assert layout.dimension == 61
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(np.sqrt(3), rel=0.3)
    assert np.sqrt(3) * 1.3 < 3


def test_unmeasured_values_are_missing_and_not_zero() -> None:
    """Switzerland's cholesterol is 0 in the file; its patients have none, not little."""
    task = load("medical-diagnosis", "heart-disease")
    rows = pd.DataFrame({"age": [50.0, 60.0], "chol": [0.0, 210.0], "trestbps": [120.0, 0.0]})
    measured = task.measured(rows)
    assert measured["chol"].isna().tolist() == [True, False]
    assert measured["trestbps"].isna().tolist() == [False, True]
    assert measured["age"].tolist() == [50.0, 60.0]
    assert rows["chol"][0] == 0.0, "the rows themselves stay as they are"


@pytest.mark.parametrize("settings", [{"no_dp": True}, {"epsilon": 4.0, "batch_size": 20}])
def test_a_scaled_plan_trains_the_same_model_in_every_engine(settings: dict[str, object]) -> None:
    task = TinyTask()
    plan = plan_for(task, {**settings, "rounds": 3})
    changed = plan.model_copy(update={"scaling": SCALING})

    def run(chosen: object, engine: str) -> tuple[np.ndarray, object]:
        (result,) = run_experiment(Experiment(task, chosen, engine=engine)).runs  # type: ignore[arg-type]
        return result.parameters, result.final.metrics

    batched, opacus = run(changed, "batched"), run(changed, "opacus")
    # float32 sums in another order: a few units in the last place of numbers about 1.
    assert batched[0] == pytest.approx(opacus[0], abs=1e-5)
    assert batched[1] == opacus[1]
    assert np.abs(batched[0] - run(plan, "batched")[0]).max() > 0.01, "scaling changes something"


def test_a_scaled_model_is_judged_on_scaled_inputs() -> None:
    """Training on the scaled inputs is the same as a task that encodes them so."""

    class ScaledTask(TinyTask):
        def examples(self, table):  # type: ignore[no-untyped-def]

            return scaled(super().examples(table), SCALING)

    plan = plan_for(TinyTask(), {"no_dp": True, "rounds": 3})
    one = run_experiment(
        Experiment(TinyTask(), plan.model_copy(update={"scaling": SCALING}), baselines=True)
    )
    other = run_experiment(Experiment(ScaledTask(), plan, baselines=True))
    assert torch.equal(torch.tensor(one.runs[0].parameters), torch.tensor(other.runs[0].parameters))
    assert one.finals == other.finals
    assert one.baselines == other.baselines


def test_scaled_inputs_have_mean_zero_and_deviation_one() -> None:
    task = load("medical-diagnosis", "breast-cancer")
    plan = statistics_plan_for(task, HARDLY_NOISED, subject="inputs")
    statistics = simulate_statistics(task, plan).statistics
    (scaling,) = scaling_of(statistics, task.scalable)
    data = task.holder_data()
    features = torch.cat([own.train["features"] for own in data.values()])
    inside = features.clamp(-1, 1)
    assert all(isinstance(column, NumberStatistics) for column in statistics.columns)
    # To four digits, and a scale no smaller than a tenth of the reach.
    assert torch.tensor(scaling.shift) == pytest.approx(inside.mean(0), abs=1e-3)
    expected = inside.std(0, correction=0).clamp(min=0.1)
    assert torch.tensor(scaling.scale) == pytest.approx(expected, abs=1e-3)
