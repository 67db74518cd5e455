"""The JSON document: its fields are a contract, and an undefined figure is null, not zero."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from common.guarantees import NonPrivate
from common.settings import plan_for
from common.tasks.base import Examples
from simulations.experiment import Experiment, ExperimentResult, run_experiment
from simulations.results import document, mean_over_holders, privacy_document, summarise
from sotto.show import write_json
from tests.tiny import TinyTask

NAN = math.nan


def simulate(task: TinyTask, *, baselines: bool = False, **settings: object) -> ExperimentResult:
    plan = plan_for(task, {"rounds": 2, "epsilon": 2.0, "strategy": "fedavgm", **settings})
    return run_experiment(Experiment(task, plan, seeds=(3, 4), baselines=baselines))


def test_the_document_has_the_fields_of_the_contract() -> None:
    result = simulate(TinyTask(), baselines=True)
    written = document(result)
    assert set(written) == {
        "task", "source", "preprocessing", "holders", "rounds", "engine", "device", "strategy",
        "seeds", "privacy", "aggregation", "metrics", "baselines", "seconds",
    }  # fmt: skip
    assert (written["task"], written["source"]) == ("tiny", "tiny")
    assert (written["holders"], written["rounds"], written["seeds"]) == (3, 2, [3, 4])
    assert (written["engine"], written["device"]) == ("batched", "cpu")
    assert written["strategy"] == "fedavgm"
    plan = result.experiment.plan
    assert written["privacy"] == {
        "kind": "dp",
        "epsilon": 2.0,
        "delta": plan.privacy.delta,
        "unit": "record",
        "adversary": "coordinator",
        "noise_multiplier": plan.privacy.noise_multiplier,
        "clip_norm": 1.0,
    }
    assert written["aggregation"] == {"kind": "plain"}
    assert set(written["metrics"]) == {"accuracy"}
    accuracy = written["metrics"]["accuracy"]
    assert set(accuracy) == {"mean", "sd", "per_seed", "per_holder"}
    assert set(accuracy["per_holder"]) == {"h0", "h1", "h2"}
    assert len(accuracy["per_seed"]) == 2
    assert {kind: set(means) for kind, means in written["baselines"].items()} == {
        "local": {"accuracy"},
        "pooled": {"accuracy"},
    }
    assert set(written["seconds"]) == {"total", "round_median"}
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_baselines_are_there_only_where_they_were_asked_for() -> None:
    assert "baselines" not in document(simulate(TinyTask()))


def test_no_privacy_has_no_figures() -> None:
    fields = ("epsilon", "delta", "unit", "adversary", "noise_multiplier", "clip_norm")
    assert privacy_document(NonPrivate()) == {"kind": "none", **dict.fromkeys(fields)}


def test_means_and_deviations_by_hand() -> None:
    seeds = [{"a": {"m": 0.2}, "b": {"m": 0.4}}, {"a": {"m": 0.6}, "b": {"m": 0.8}}]
    summary = summarise(seeds)["m"]
    assert summary["per_seed"] == pytest.approx([0.3, 0.7])
    assert summary["mean"] == pytest.approx(0.5)
    assert summary["sd"] == pytest.approx(math.sqrt(0.08))  # of the sample: over n - 1
    assert summary["per_holder"] == pytest.approx({"a": 0.4, "b": 0.6})


def test_one_seed_has_no_deviation() -> None:
    assert summarise([{"a": {"m": 0.2}}])["m"]["sd"] == 0.0


def test_an_undefined_figure_is_left_out_of_every_mean() -> None:
    assert mean_over_holders({"a": {"m": NAN}, "b": {"m": 0.4}}, "m") == 0.4
    assert math.isnan(mean_over_holders({"a": {"m": NAN}}, "m"))
    seeds = [{"a": {"m": NAN}, "b": {"m": 0.4}}, {"a": {"m": NAN}, "b": {"m": 0.8}}]
    assert summarise(seeds)["m"] == {
        "mean": pytest.approx(0.6),
        "sd": pytest.approx(math.sqrt(0.08)),
        "per_seed": [0.4, 0.8],
        "per_holder": {"a": None, "b": pytest.approx(0.6)},
    }
    assert summarise([{"a": {"m": NAN}}])["m"]["mean"] is None


def test_a_holder_that_missed_the_evaluation_of_one_seed_counts_in_the_others() -> None:
    seeds = [{"a": {"m": 0.2}}, {"a": {"m": 0.4}, "b": {"m": 1.0}}]
    for order in (seeds, seeds[::-1]):
        summary = summarise(order)["m"]
        assert summary["per_holder"] == pytest.approx({"a": 0.3, "b": 1.0})


class OneClass(TinyTask):
    """Holder h1 has one label only in what it holds out, so its AUC is undefined."""

    def metrics(self, predictions: torch.Tensor, test: Examples) -> dict[str, float]:
        both = test["y"].unique().numel() > 1
        return {"auc": 0.75 if both else NAN, "f1": NAN}

    def split(self, table, *, holder, seed):
        halves = super().split(table, holder=holder, seed=seed)
        if holder == "h1":
            halves.test["y"] = 1
        return halves

    def examples(self, table):
        return super().examples(table.copy())


def test_a_holder_with_a_single_class_is_null_and_does_not_spoil_the_mean(tmp_path: Path) -> None:
    written = document(simulate(OneClass(), baselines=True))
    auc = written["metrics"]["auc"]
    assert auc["per_holder"] == {"h0": 0.75, "h1": None, "h2": 0.75}
    assert auc["mean"] == 0.75
    assert auc["per_seed"] == [0.75, 0.75]
    assert written["baselines"]["local"]["auc"] == 0.75
    nowhere = written["metrics"]["f1"]
    assert (nowhere["mean"], nowhere["per_seed"]) == (None, [None, None])
    target = tmp_path / "result.json"
    write_json(str(target), written)
    assert "NaN" not in target.read_text()
    assert json.loads(target.read_text()) == written
