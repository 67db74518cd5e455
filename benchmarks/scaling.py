"""Does scaling inputs by private statistics pay? The same total ε, with and without.

    python -m benchmarks.scaling medical-diagnosis heart-disease --epsilon 1 --seeds 20

A part of the budget goes to the statistics, so the training that uses them has more noise. Both
are full-batch Gaussian mechanisms, whose squared μ add up (Dong, Roth & Su 2022, "Gaussian
differential privacy", corollary 3.3), so the total is exactly the same. Learning rate and clip norm
suit inputs of one size, so each variant tries the same grid of both and all results are printed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from statistics import mean, stdev

from common.plan import TrainingPlan
from common.privacy.gaussian import gaussian_epsilon, gaussian_mu
from common.settings import plan_for
from common.statistics import scaling_of
from common.statistics_plan import statistics_plan_for
from common.tasks import load
from common.tasks.base import Task
from common.tasks.scaling import InputScaling
from simulations.experiment import Experiment, run_experiment
from simulations.statistics import simulate_statistics

CLIP_NORMS, RATE_FACTORS = "0.5,1,2", "0.3,1"
"""Learning rates are these factors times the task's recommended one."""


ALMOST_EXACT = 1e6
"""ε of statistics for comparison, which are private in name only."""


@dataclass(frozen=True)
class Result:
    """One variant at one point of the grid, over seeds."""

    variant: str
    clip_norm: float
    learning_rate: float
    mean: float
    sd: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("source")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.1, help="of μ² that statistics take")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--clip-norms", type=numbers, default=CLIP_NORMS)
    parser.add_argument("--rate-factors", type=numbers, default=RATE_FACTORS)
    asked = parser.parse_args()
    task = load(asked.task, asked.source)
    mu = gaussian_mu(asked.epsilon, task.source.delta)
    told = gaussian_epsilon(mu * math.sqrt(asked.share), task.source.delta)
    rest = gaussian_epsilon(mu * math.sqrt(1 - asked.share), task.source.delta)
    seeds = range(asked.seeds)
    results = []
    base = plan_for(task, {"epsilon": asked.epsilon})
    variants = (
        ("as encoded", asked.epsilon, 0.0),
        ("scaled", rest, told),
        ("exactly scaled", rest, ALMOST_EXACT),
    )
    for variant, price, noise in variants:
        for clip, factor in product(asked.clip_norms, asked.rate_factors):
            rate = factor * base.learning_rate
            plan = plan_for(
                task,
                {
                    **task.recommended(asked.epsilon),
                    "epsilon": price,
                    "clip_norm": clip,
                    "learning_rate": rate,
                    "evaluate": "final",
                },
            )
            found = [headline(task, plan, noise, seed) for seed in seeds]
            results.append(Result(variant, clip, rate, mean(found), stdev(found)))
            print(json.dumps(asdict(results[-1])), flush=True)
    print(json.dumps(summary(results, asked.epsilon, told, rest), indent=2))


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def headline(task: Task, plan: TrainingPlan, noise: float, seed: int) -> float:
    """The task's metric, mean over holders, of one seed."""
    scaling = scaling_at(task, noise, seed) if noise else ()
    chosen = plan.model_copy(update={"scaling": scaling})
    (final,) = run_experiment(Experiment(task, chosen, seeds=[seed])).finals
    values = [metrics[task.headline] for metrics in final.values()]
    return mean(value for value in values if not math.isnan(value))


@cache
def scaling_at(task: Task, epsilon: float, seed: int) -> tuple[InputScaling, ...]:
    """What private statistics of the training rows of this seed's split give."""
    plan = statistics_plan_for(task, epsilon, subject="inputs", seed=seed)
    gathered = simulate_statistics(task, plan, seed=seed)
    return tuple(scaling_of(gathered.statistics, task.scalable))


def summary(
    results: Sequence[Result], epsilon: float, told: float, rest: float
) -> dict[str, object]:
    """The best point of each variant; choosing it is not in ε."""
    variants = dict.fromkeys(result.variant for result in results)
    best = {
        name: asdict(max((r for r in results if r.variant == name), key=lambda r: r.mean))
        for name in variants
    }
    prices = {"total": epsilon, "statistics": told, "training": rest}
    return {"epsilon": prices, "best": best}


if __name__ == "__main__":
    main()
