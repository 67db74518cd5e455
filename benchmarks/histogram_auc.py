"""How near metrics from noised histograms come to exact ones, and whether error bars hold.

    python benchmarks/histogram_auc.py --json -      # everything, about two minutes on two cores
    python benchmarks/histogram_auc.py --seeds 20    # fewer draws of noise

Ten holders of uci-default train a model by the recommended plan; it is then evaluated many times
at a price of ε=0.5 for one evaluation, once with each holder's own noise in the sum and once with
one holder's noise in it, as a secure sum would have. The exact figures are those of all holders'
held-out rows together. Models trained without privacy and at other ε are judged as well, to see
whether error bars cover the exact figures as often as they say. The data must be there:
`sotto data get uci-default`, or SOTTO_DATA.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.plan import TrainingPlan
from common.privacy.discrete_noise import discrete_gaussian
from common.privacy.noise import SeededRandomness
from common.settings import plan_for
from common.tasks import load
from common.tasks.base import Examples, Task
from common.tasks.histograms import CONFIDENCE, Estimate
from common.tasks.metrics import classification_metrics
from common.tasks.parameters import load_shared
from simulations.experiment import Experiment, run_experiment

PRICE = 0.5
"""ε of the evaluation."""

HOLDERS = 10

METRICS = ("auc", "ks", "brier", "accuracy", "recall", "f1", "calibration")

WITHIN = {"each holder's noise": 0.03, "noise in the sum only": 0.01}
"""How near the AUC must come to the exact one, in 95 % of the draws of noise."""


@dataclass(frozen=True)
class Judged:
    """A model, and what it is on all holders' held-out rows.

    Args:
        plan: that it was trained by.
        sigma: of the noise in each cell of a holder's histogram.
        counts: [cells] int64, the exact histogram of all holders together.
        exact: the exact metrics of all rows together.
    """

    plan: TrainingPlan
    sigma: float
    counts: Tensor
    exact: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge every model; exit 1 if the AUC at ε=3 is not near enough, or a bar does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")
    parser.add_argument("--seeds", type=int, default=100, help="draws of noise")
    parser.add_argument("--source", default="uci-default", help="of credit-risk")
    chosen = parser.parse_args(arguments)
    screen = Console(file=sys.stderr if chosen.json == "-" else sys.stdout)
    results = []
    for epsilon in (3.0, None, 8.0, 1.0, 0.5):
        for seed in (0, 1):
            model = trained(load("credit-risk", chosen.source), epsilon, seed)
            for kind in WITHIN:
                results.append(coverage(model, kind, chosen.seeds))
                screen.print(table(results[-1]))
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "price": PRICE,
        "covered_by_all": {kind: pooled(results, kind) for kind in WITHIN},
        "results": results,
    }
    screen.print(document["covered_by_all"])
    text = json.dumps(document, indent=2) + "\n"
    if chosen.json == "-":
        sys.stdout.write(text)
    elif chosen.json:
        with open(chosen.json, "w") as file:  # noqa: PTH123
            file.write(text)
    return 0 if all(result["reached"] for result in results) else 1


def trained(task: Task, epsilon: float | None, seed: int) -> Judged:
    """A model of the recommended plan, on the split and with the noise of ``seed``."""
    target = {"no_dp": True} if epsilon is None else {"epsilon": epsilon}
    settings = {**target, "seed": seed, "evaluation_epsilon": PRICE}
    plan = plan_for(task, settings, holders=HOLDERS)
    run = run_experiment(Experiment(task, plan, seeds=[seed], holders=HOLDERS)).runs[0]
    model = task.model(1)
    load_shared(task, model, torch.tensor(run.parameters))
    model.eval()
    data = task.holder_data(HOLDERS, seed=seed)
    test = Examples.concatenate([own.test for own in data.values()], task.padding)
    predictions = task.predictions(model, test)
    exact = classification_metrics(test["label"].numpy(), predictions.numpy(), METRICS)
    assert plan.evaluation.kind == "histogram"
    sigma = plan.evaluation.event().noise_multiplier
    return Judged(plan, sigma, task.histogram(predictions, test), exact)


def coverage(model: Judged, kind: str, seeds: int) -> dict[str, Any]:
    """How near estimates are to the exact figures, over draws of noise, and how often bars hold."""
    draws = HOLDERS if kind == "each holder's noise" else 1
    task = load("credit-risk", model.plan.source)
    found = [noised(model, task, draws, seed) for seed in range(seeds)]
    errors = np.array([estimate["auc"].value - model.exact["auc"] for estimate in found])
    near = float(np.mean(np.abs(errors) <= WITHIN[kind]))
    covered = {
        name: float(
            np.mean([one[name].low <= model.exact[name] <= one[name].high for one in found])
        )
        for name in METRICS
    }
    # Below it, fewer bars hold than binomial chance allows in one case of a thousand.
    least = CONFIDENCE - 3.1 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / seeds)
    recommended = model.plan.privacy.kind == "dp" and model.plan.privacy.epsilon == 3.0
    return {
        "trained_epsilon": getattr(model.plan.privacy, "epsilon", None),
        "seed": model.plan.seed,
        "noise": kind,
        "sigma": model.sigma,
        "draws": seeds,
        "units": int(model.counts.sum()),
        "exact": model.exact,
        "auc_within": WITHIN[kind],
        "auc_near": near,
        "auc_bias": float(errors.mean()),
        "auc_deviation": float(errors.std(ddof=1)),
        "covered": covered,
        "bar": {
            name: float(np.mean([one[name].high - one[name].low for one in found]))
            for name in METRICS
        },
        "least_coverage": least,
        "reached": (near >= 0.95 or not recommended) and covered["auc"] >= least,
    }


def pooled(results: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    """How often bars hold, over all models and draws of noise together."""
    own = [result["covered"] for result in results if result["noise"] == kind]
    return {name: round(float(np.mean([each[name] for each in own])), 4) for name in METRICS}


def noised(model: Judged, task: Task, draws: int, seed: int) -> dict[str, Estimate]:
    """What the sum of ``draws`` holders' noise and all holders' counts shows."""
    noise = [
        discrete_gaussian(
            len(model.counts),
            model.sigma,
            SeededRandomness("benchmark", model.plan.digest, seed, draw),
        )
        for draw in range(draws)
    ]
    histogram = (model.counts + torch.stack(noise).sum(0)).numpy().astype(np.float64)
    return task.metrics_of(histogram, draws * model.sigma**2)


def table(result: dict[str, Any]) -> Table:
    """One case, for people."""
    title = (
        f"trained at ε={result['trained_epsilon']}, seed {result['seed']}, {result['noise']}: AUC "
        f"within {result['auc_within']} in {result['auc_near']:.0%} of {result['draws']} draws"
    )
    drawn = Table(title=title, title_justify="left")
    for column in ("metric", "exact", "bar covers it", "width of the bar"):
        drawn.add_column(column, justify="left" if column == "metric" else "right")
    for name in METRICS:
        drawn.add_row(
            name,
            f"{result['exact'][name]:.4f}",
            f"{result['covered'][name]:.0%}",
            f"{result['bar'][name]:.4f}",
        )
    return drawn


if __name__ == "__main__":
    sys.exit(main())
