"""A sweep's point is the experiment with the same plan and seed, whatever runs beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor

from common.errors import ConfigurationError, StateError
from common.tasks.base import Examples, Source
from simulations.experiment import Experiment, run_experiment
from simulations.results import Metrics, summarise, sweep_document
from simulations.sweep import FEDERATION, LOCAL, Sweep, SweepResult, run_sweep
from tests.tiny import TinySource, TinyTask, table

POOLED = "pooled"
SEEDS = (3, 4)


class FineTask(TinyTask):
    """The tiny task with a metric in which no two models agree."""

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        return {**super().metrics(predictions, test), "score": float(predictions.mean())}


def sweep(seeds: tuple[int, ...] = SEEDS, holders: int | None = None, **settings: Any) -> Sweep:
    return Sweep.over(FineTask(), settings, seeds, holders=holders)


def metrics_of(result: SweepResult, kind: str, setting: int = 0) -> list[Mapping[str, Metrics]]:
    return [run.metrics for run in result.of(setting, kind)]


def close(one: object, other: object) -> bool:
    return bool(json.loads(json.dumps(one)) == _approximately(json.loads(json.dumps(other))))


def _approximately(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _approximately(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_approximately(each) for each in value]
    return pytest.approx(value, abs=1e-6, rel=1e-6) if isinstance(value, float) else value


# -- the same as experiments ----------------------------------------------------------------------

SWEEPS: Mapping[str, Mapping[str, Any]] = {
    "epsilon": {"epsilon": [0.5, 3.0, math.inf], "batch_size": 10},
    "linear": {
        "strategy": ["fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi"],
        "server_learning_rate": 0.1,
        "proximal_mu": 0.5,
        "local_steps": 2,
        "epsilon": 3.0,
    },
    "linear, no DP": {
        "strategy": ["fedavg", "fedavgm", "fedadam"],
        "server_learning_rate": 0.1,
        "no_dp": True,
    },
    "robust": {"strategy": ["krum", "fedmedian", "fedavg"], "epsilon": [3.0, math.inf]},
    "cohort": {"cohort": [1, 2], "epsilon": 3.0, "batch_size": 10},
    "steps": {
        "local_steps": [1, 3],
        "proximal_mu": [0.0, 0.5],
        "strategy": "fedprox",
        "no_dp": True,
        "batch_size": 10,
    },
    "mixed": {
        "clip_norm": [0.3, 1.0],
        "learning_rate": [0.1, 0.5],
        "momentum": [0.0, 0.5],
        "weighting": ["equal", "size"],
        "epsilon": 3.0,
    },
    "adam": {"optimizer": ["sgd", "adam"], "learning_rate": 0.05, "epsilon": [1.0, math.inf]},
    "rounds": {"rounds": [1, 3], "average_from": [0.5, 1.0], "epsilon": 3.0},
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_point_is_the_experiment_of_its_plan(name: str) -> None:
    asked = sweep(**SWEEPS[name])
    result = run_sweep(asked)
    assert not any(run.failed for run in result.finished)
    for place, setting in enumerate(asked.settings):
        alone = run_experiment(
            Experiment(asked.task, setting.plan, SEEDS, engine="batched", baselines=True)
        )
        assert alone.baselines is not None
        for kind, figures in (
            (FEDERATION, alone.finals),
            (LOCAL, alone.baselines.local),
            (POOLED, alone.baselines.pooled),
        ):
            found = metrics_of(result, kind, place)
            assert close(list(found), list(figures)), (setting.values, kind)


def test_company_changes_nothing() -> None:
    """A run has the same bits whoever is stacked with it, but for linear lanes' float32 means."""
    together = run_sweep(sweep(epsilon=[0.5, 3.0, math.inf]))
    alone = run_sweep(sweep(epsilon=3.0))
    for kind in (FEDERATION, LOCAL, POOLED):
        assert close(metrics_of(together, kind, 1), metrics_of(alone, kind))


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [{"no_dp": True}, {"epsilon": 3.0}], ids=["plain", "dp"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedmedian"])
def test_a_run_that_diverges_fails_alone(strategy: str, privacy: Mapping[str, Any]) -> None:
    both = run_sweep(sweep(learning_rate=[0.1, 1e30], rounds=4, strategy=strategy, **privacy))
    good = run_sweep(sweep(learning_rate=0.1, rounds=4, strategy=strategy, **privacy))
    for kind in (FEDERATION, LOCAL, POOLED):
        assert not any(run.failed for run in both.of(0, kind))
        assert close(metrics_of(both, kind), metrics_of(good, kind))
    assert all("lower learning rate" in run.failed for run in both.of(1, FEDERATION))
    written = sweep_document(both)
    assert [one["seed"] for one in written["points"][1]["failed"]] == [*SEEDS] * 3
    assert written["points"][1]["metrics"] == {}
    assert json.dumps(written, allow_nan=False)


def test_a_baseline_with_one_failed_holder_counts_nothing() -> None:
    result = run_sweep(sweep(no_dp=True, learning_rate=[0.1, 1e30], rounds=1))
    (point,) = (p for p in sweep_document(result)["points"] if p["settings"]["learning_rate"] > 1)
    assert point["baselines"]["local"] == {}


# -- settings -------------------------------------------------------------------------------------


def test_the_first_list_varies_slowest() -> None:
    asked = sweep(strategy=["fedavg", "fedadam"], epsilon=[1.0, math.inf], rounds=2)
    assert [dict(setting.values) for setting in asked.settings] == [
        {"strategy": strategy, "epsilon": epsilon}
        for strategy in ("fedavg", "fedadam")
        for epsilon in (1.0, math.inf)
    ]
    assert asked.swept == {"strategy": ["fedavg", "fedadam"], "epsilon": [1.0, math.inf]}
    kinds = [setting.plan.privacy.kind for setting in asked.settings]
    assert kinds == ["dp", "none", "dp", "none"]


def test_everyone_who_is_asked_must_answer_unless_said_otherwise() -> None:
    asked = sweep(cohort=[1, 2])
    assert [setting.plan.min_holders for setting in asked.settings] == [1, 2]
    assert sweep().settings[0].plan.min_holders == 3
    assert sweep(min_holders=2).settings[0].plan.min_holders == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rounds": [2, 2]}, "rounds has 2 twice"),
        ({"rounds": []}, "rounds has no value"),
        ({"strategy": ["fedavg", "mine"]}, "there is no strategy 'mine'"),
        ({"rouns": [1, 2]}, "Did you mean 'rounds'"),
        ({"strategy": "krum", "malicious": [0, 1]}, "needs at least 5 holders"),
        ({"epsilon": [1.0, math.inf], "no_dp": True}, "contradict each other"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(
    settings: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        sweep(**settings)


# -- what is finished -----------------------------------------------------------------------------


def figures(result: SweepResult) -> list[object]:
    return [(run.setting, run.seed, run.kind, run.metrics, run.failed) for run in result.finished]


def counted(asked: Sweep, folder: Path) -> tuple[SweepResult, int, int]:
    """The result, how many runs were found, and how many there are."""
    told: list[tuple[int, int]] = []
    result = run_sweep(asked, folder=folder, on_begin=lambda *numbers: told.append(numbers))
    ((found, total),) = told
    return result, found, total


def test_finished_runs_are_not_computed_again(tmp_path: Path) -> None:
    asked = sweep(epsilon=[1.0, math.inf])
    first, found, total = counted(asked, tmp_path)
    runs = tmp_path / "runs.jsonl"
    lines = runs.read_text().splitlines(keepends=True)
    assert (found, total) == (0, len(lines)) == (0, 2 * 2 * 5)

    cut_short = "".join(lines[::2]) + lines[1][:50]  # every other one, and a half
    runs.write_text(cut_short)
    again, found, _ = counted(asked, tmp_path)
    assert found == len(lines) // 2
    assert figures(again) == figures(first)
    assert sorted(runs.read_text().splitlines(keepends=True)) == sorted(lines)

    assert counted(asked, tmp_path)[1] == total
    assert counted(sweep(epsilon=[1.0, 2.0, math.inf]), tmp_path)[1:] == (20, 30)


def test_settings_share_the_baselines_they_have_in_common(tmp_path: Path) -> None:
    result, _, total = counted(sweep(strategy=["krum", "fedmedian"], seeds=(0,)), tmp_path)
    assert total == 2 + 3 + 1
    for kind in (LOCAL, POOLED):
        assert metrics_of(result, kind, 0) == metrics_of(result, kind, 1) != []


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '{"run": "x"}', '{"run": 1, "metrics": 2}'])
def test_a_line_that_is_no_result_is_named(line: str, tmp_path: Path) -> None:
    run_sweep(sweep(), folder=tmp_path)
    runs = tmp_path / "runs.jsonl"
    runs.write_text(runs.read_text() + line + "\n")
    with pytest.raises(StateError, match=r"runs\.jsonl has a line that is not a run's result"):
        run_sweep(sweep(), folder=tmp_path)


def keys(asked: Sweep, folder: Path) -> set[str]:
    run_sweep(asked, folder=folder)
    return {json.loads(line)["run"] for line in (folder / "runs.jsonl").read_text().splitlines()}


class OtherRows(TinySource):
    """Another file under the same name."""

    def tables(self, holders: int | None = None, *, seed: int = 0) -> Mapping[str, pd.DataFrame]:
        return {f"h{i}": table(60, seed=7 + i) for i in range(holders or 3)}


def test_a_runs_name_depends_on_everything_that_decides_its_result(tmp_path: Path) -> None:
    base: dict[str, Any] = {"rounds": 1, "epsilon": 3.0}

    def asked(source: Source | None = None, **changed: Any) -> Sweep:
        task = FineTask()
        task.source = source or task.source
        seeds, holders = changed.pop("seeds", (0,)), changed.pop("holders", None)
        return Sweep.over(task, {**base, **changed}, seeds, holders=holders)

    def named(number: int, each: Sweep) -> set[str]:
        folder = tmp_path / str(number)
        folder.mkdir()
        return keys(each, folder)

    sweeps = [
        asked(),
        asked(seeds=(1,)),
        asked(epsilon=2.0),
        asked(epsilon=math.inf),
        asked(rounds=2),
        asked(learning_rate=0.1),
        asked(local_steps=2),
        asked(strategy="fedadam"),
        asked(batch_size="10"),
        asked(source=OtherRows()),
    ]
    names = [named(number, each) for number, each in enumerate(sweeps)]
    assert len(set.union(*names)) == sum(map(len, names)) == 5 * len(sweeps)
    # More holders are another federation of other pooled rows; those that were there are the same.
    assert len(named(99, asked(holders=4, holder_size=40)) & names[0]) == 3
    assert named(100, asked()) == names[0]


# -- the document ---------------------------------------------------------------------------------


def test_the_document_has_every_figure() -> None:
    result = run_sweep(sweep(epsilon=[1.0, math.inf]))
    written = sweep_document(result, device="cpu")
    assert set(written) == {
        "task", "source", "preprocessing", "holders", "engine", "device", "seeds", "swept",
        "headline", "points", "seconds",
    }  # fmt: skip
    assert written["swept"] == {"epsilon": [1.0, None]}
    assert [point["settings"] for point in written["points"]] == [
        {"epsilon": 1.0},
        {"epsilon": None},
    ]
    for place, point in enumerate(written["points"]):
        assert set(point) == {
            "settings", "rounds", "strategy", "privacy", "aggregation", "metrics", "baselines",
            "failed",
        }  # fmt: skip
        assert point["metrics"] == summarise(metrics_of(result, FEDERATION, place))
        assert point["baselines"]["pooled"] == summarise(metrics_of(result, POOLED, place))
        assert len(point["baselines"]["local"]["accuracy"]["per_seed"]) == len(SEEDS)
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_without_baselines_there_are_none() -> None:
    asked = Sweep.over(FineTask(), {"rounds": 1}, baselines=False)
    (point,) = sweep_document(run_sweep(asked))["points"]
    assert "baselines" not in point


def test_progress_grows_to_one() -> None:
    shares: list[float] = []
    run_sweep(sweep(epsilon=[1.0, math.inf]), on_progress=lambda share, _: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_where_holders_are_the_unit_there_is_no_sweep() -> None:
    with pytest.raises(ConfigurationError, match="run 'sotto simulate' for each setting"):
        sweep(unit="holder", epsilon=[1.0, 2.0])
