"""An experiment: reproducible to the bit, and fair to what it compares the federation with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from common.data.medical import BreastCancer
from common.errors import ConfigurationError, RunError
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, HolderTables, Task
from server.aggregation import STRATEGIES
from server.runs import RunFolder, RunResult
from server.summaries import RoundSummary
from simulations.experiment import Experiment, ExperimentResult, run_experiment
from tests.tiny import TinyTask


def experiment(task: Task | None = None, **settings: object) -> Experiment:
    task = task or TinyTask()
    return Experiment(task, plan_for(task, {"epsilon": 5.0, **settings}))


def simulate(
    task: Task | None = None,
    seeds: tuple[int, ...] = (0,),
    folder: Path | None = None,
    baselines: bool = False,
    engine: str = "batched",
    **settings: object,
) -> ExperimentResult:
    asked = experiment(task, **settings)
    return run_experiment(
        Experiment(
            task or asked.task,
            asked.plan,
            seeds,
            baselines=baselines,
            folder=folder,
            engine=engine,
        )
    )


def same(one: RunResult, other: RunResult) -> bool:
    """Whether two runs agree in every bit of the model and in every figure."""
    figures = [[each.metrics for each in run.history] for run in (one, other)]
    return bool(np.array_equal(one.parameters, other.parameters)) and figures[0] == figures[1]


# -- reproducible ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"batch_size": 10, "local_steps": 3}, {"cohort": 2}])
def test_a_seed_gives_the_same_bits_every_time(settings: dict[str, object]) -> None:
    first, second = (simulate(seeds=(0, 1), **settings) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first.runs, second.runs, strict=True))
    assert not np.array_equal(first.runs[0].parameters, first.runs[1].parameters)


def test_a_seed_gives_the_same_bits_whatever_ran_before() -> None:
    alone = simulate(seeds=(1,)).runs[0]
    torch.manual_seed(99)
    after = simulate(seeds=(0, 1), baselines=True).runs[1]
    assert same(alone, after)


def test_every_seed_has_a_split_of_its_own() -> None:
    task = load("medical-diagnosis", "breast-cancer")
    accuracy = [
        final["clinic-1"]["brier"]
        for final in simulate(task, seeds=(0, 1), rounds=1, learning_rate=1e-9).finals
    ]
    assert accuracy[0] != pytest.approx(accuracy[1], abs=1e-12)  # hardly trained, other patients


def test_training_learns_what_there_is_to_learn() -> None:
    def mean_accuracy(rounds: int) -> float:
        (final,) = simulate(no_dp=True, epsilon=None, rounds=rounds).finals
        return float(np.mean([figures["accuracy"] for figures in final.values()]))

    assert mean_accuracy(rounds=40) > 0.8 > mean_accuracy(rounds=1)


# -- what an experiment leaves --------------------------------------------------------------------


def test_the_first_seed_is_kept_in_the_folder(tmp_path: Path) -> None:
    result = simulate(seeds=(7, 8), folder=tmp_path)
    kept = RunFolder(tmp_path).result(TinyTask())
    assert kept.plan.seed == 7
    assert same(kept, result.runs[0])


def test_a_folder_of_an_interrupted_experiment_begins_anew(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(stage: str, seed: int, summary: RoundSummary) -> None:
        if summary.round == 2:
            raise Interrupted

    asked = experiment()
    asked = Experiment(asked.task, asked.plan, folder=tmp_path)
    with pytest.raises(Interrupted):
        run_experiment(asked, interrupt)
    assert list(tmp_path.glob("checkpoint-*"))

    again = run_experiment(asked)
    assert same(again.runs[0], simulate().runs[0])
    assert [line.round for line in RunFolder(tmp_path).history()] == [1, 2, 3, 4]


def test_progress_names_stage_seed_and_round() -> None:
    told: list[tuple[str, int, int]] = []
    asked = experiment(rounds=2)
    run_experiment(
        Experiment(asked.task, asked.plan, (5,), baselines=True),
        lambda stage, seed, summary: told.append((stage, seed, summary.round)),
    )
    stages = ("federation", "h0 alone", "h1 alone", "h2 alone", "pooled")
    assert told == [(stage, 5, number) for stage in stages for number in (1, 2)]


# -- baselines ------------------------------------------------------------------------------------


def test_baselines_judge_every_holder_on_its_own_rows() -> None:
    result = simulate(no_dp=True, epsilon=None, baselines=True, rounds=20)
    assert result.baselines is not None
    (alone,), (pooled,) = result.baselines.local, result.baselines.pooled
    assert set(alone) == set(pooled) == {"h0", "h1", "h2"}
    for figures in (*alone.values(), *pooled.values()):
        assert 0.7 < figures["accuracy"] <= 1


class Alike(TinyTask):
    """Every holder has the very same rows."""

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        halves = super().split(self.source.tables(1)["h0"], holder=holder, seed=seed)
        return HolderTables(halves.train.copy(), halves.test.copy())

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        return self.loss(model, units)

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        return {"loss": float(predictions.mean())}


@pytest.mark.parametrize(
    "settings", [{"no_dp": True, "epsilon": None}, {"epsilon": 1e5, "clip_norm": 10.0}]
)
def test_with_all_rows_alike_one_more_holder_changes_nothing(settings: dict[str, object]) -> None:
    """The pooled sum has more terms and is divided by as much more: the steps stay as long."""
    result = simulate(Alike(), baselines=True, strategy="fedavg", rounds=10, **settings)
    assert result.baselines is not None
    federated, alone, pooled = (
        [figures["loss"] for figures in found.values()]
        for found in (result.finals[0], result.baselines.local[0], result.baselines.pooled[0])
    )
    assert pooled == pytest.approx(federated, rel=1e-2)
    assert alone == pytest.approx(federated, rel=1e-2)
    untrained = simulate(Alike(), strategy="fedavg", rounds=1, **settings).finals[0]["h0"]["loss"]
    assert federated[0] < 0.9 * untrained


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_has_baselines(strategy: str) -> None:
    """One holder alone is no crowd: robust strategies give way to the mean there."""
    result = simulate(strategy=strategy, min_holders=3, rounds=1, baselines=True)
    assert result.runs[0].plan.strategy.name == strategy
    assert result.baselines is not None
    assert set(result.baselines.local[0]) == {"h0", "h1", "h2"}
    means = [figures["accuracy"] for figures in result.baselines.pooled[0].values()]
    assert not any(math.isnan(value) for value in means)


def test_pooled_baseline_has_central_noise_and_so_beats_the_holders_alone() -> None:
    """At ε=0.5 a clinic alone drowns in its noise; the same noise on four times the rows less."""
    task = load("medical-diagnosis", "breast-cancer")
    result = simulate(task, seeds=(0, 1, 2), epsilon=0.5, baselines=True)
    assert result.baselines is not None

    def mean(kind: list[dict[str, dict[str, float]]]) -> float:
        return float(np.mean([f["brier"] for seed in kind for f in seed.values()]))

    assert mean(list(result.baselines.pooled)) < mean(list(result.baselines.local))


# -- holders that fail ----------------------------------------------------------------------------


class Fragile(TinyTask):
    """Like the tiny task, but the loss breaks on the holder whose rows carry the mark."""

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        halves = super().split(table, holder=holder, seed=seed)
        if holder != "h1":
            return halves
        return HolderTables(halves.train.assign(x2=9.0), halves.test)

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        if (batch["x"][:, 2] == 9.0).any():
            raise ValueError("patient 17 is marked")
        return super().loss(model, batch)


def test_a_holder_that_fails_costs_its_rounds_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (run,) = simulate(Fragile(), min_holders=2).runs
    for summary in run.history:
        assert summary.accepted == ("h0", "h2")
        assert summary.missed == {"h1": "failed: ValueError"}  # the type, and not the text
    assert "patient 17" in caplog.text  # which its own log has


def test_too_few_that_work_end_the_run() -> None:
    with pytest.raises(RunError, match=r"round 1: 2 of at least 3 .*h1: failed: ValueError"):
        simulate(Fragile(), min_holders=3)


def test_a_strategy_that_cannot_work_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs at least 7 holders"):
        simulate(folder=tmp_path / "run", strategy="krum", malicious=2, min_holders=3)
    assert not (tmp_path / "run").exists()


def test_the_number_of_holders_is_the_experiments_to_choose() -> None:
    task = load("medical-diagnosis", "breast-cancer")
    assert isinstance(task.source, BreastCancer)
    plan = plan_for(task, {"rounds": 1, "epsilon": 5.0}, holders=2)
    result = run_experiment(Experiment(task, plan, holders=2))
    assert list(result.holders) == ["clinic-1", "clinic-2"]
    assert set(result.finals[0]) == {"clinic-1", "clinic-2"}


# -- what a holder's policy says ------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["batched", "opacus"])
def test_a_delta_that_means_nothing_is_refused(engine: str) -> None:
    with pytest.raises(ConfigurationError, match="must be below 1/n"):
        simulate(engine=engine, delta=0.5)


@pytest.mark.parametrize("engine", ["batched", "opacus"])
def test_a_plan_for_far_smaller_holders_is_declined(engine: str) -> None:
    with pytest.raises(RunError, match="declined: holder_size"):
        simulate(engine=engine, holder_size=2)


def test_where_holders_are_the_unit_there_are_no_baselines() -> None:
    with pytest.raises(ConfigurationError, match="nothing about one holder can be learned"):
        simulate(unit="holder", baselines=True)
