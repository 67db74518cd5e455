"""Membership inference on the released model: who of a holder's units was it trained on?

Several models are trained, each on a random half of one holder's units, under the plan that is
audited. The attacker has one of them, and all units without knowing which half; the other models
are its shadow models. Two attacks: the loss of each unit (Yeom et al. 2018, "Privacy risk in
machine learning: analyzing the connection to overfitting"), and the likelihood ratio of Carlini et
al. 2022, "Membership inference attacks from first principles" (LiRA, algorithm 1, with one variance
for all units, as it advises for few shadow models). Every model is attacked in turn, which gives
the error bars.

It measures what a reader of the model finds out, which is less than the coordinator can. It is
computed by the batched engine with seeded noise, and is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit, ndtr, ndtri
from scipy.stats import rankdata
from torch import Tensor

from common.flower import quiet_flower
from common.plan import TrainingPlan
from common.tasks.base import Examples, HolderData, HolderTables, Task, derived_seed, generator
from common.tasks.parameters import load_shared
from simulations.baselines import solo_plan
from simulations.engines import workers_for
from simulations.lanes import Member, Run, stacks_of
from simulations.lower_bounds import Bools, Floats

__all__ = [
    "RATES",
    "Attack",
    "Estimate",
    "allowed",
    "allowed_auc",
    "attack",
    "auc",
    "coins",
    "likelihood_ratios",
    "logits_of",
    "membership_attacks",
    "roc",
    "tpr_at",
]

RATES = (0.01, 0.001)
"""False positive rates at which the true positive rate is reported."""

MODELS = 16
"""Trained by :func:`membership_attacks`: each is attacked with the help of the others."""

RESAMPLES = 200
"""Of the bootstrap over models."""

_LEAST = 1e-12
"""Variance of logits below which models do not differ at all."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error over the models attacked."""

    value: float
    error: float


@dataclass(frozen=True)
class Attack:
    """What an attack found, over all models.

    Args:
        name: ``loss`` or ``lira``.
        scores: [N, n], of each unit against each model; higher for what looks like a member.
        member: [N, n].
        auc: area under the ROC curve of all scores; ½ for guessing.
        tpr: at each of :data:`RATES`, the share of members found.
    """

    name: str
    scores: Floats
    member: Bools
    auc: Estimate
    tpr: Mapping[float, Estimate]


# -- figures --------------------------------------------------------------------------------------


def auc(scores: Floats, member: Bools) -> float:
    """Chance that a random member scores above a random other unit, ties counting half.

    Mann & Whitney 1947; NaN where there is no member, or no other unit.
    """
    inside, outside = int(member.sum()), int((~member).sum())
    if not inside or not outside:
        return math.nan
    ranks = rankdata(scores)
    return float((ranks[member].sum() - inside * (inside + 1) / 2) / (inside * outside))


def tpr_at(scores: Floats, member: Bools, rate: float) -> float:
    """Share of members above the lowest threshold that at most ``rate`` of the others pass.

    With fewer than 1/rate others that is a threshold which none of them passes.
    """
    if not member.any() or member.all():
        return math.nan
    others = np.sort(scores[~member])[::-1]
    threshold = others[min(math.floor(rate * len(others) + 1e-9), len(others) - 1)]
    return float((scores[member] > threshold).mean())


def roc(scores: Floats, member: Bools) -> tuple[Floats, Floats]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # ties are passed together
    hits = member[order]
    true, false = np.cumsum(hits)[last], np.cumsum(~hits)[last]
    return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def allowed(rate: Floats, epsilon: float, delta: float, mu: float | None = None) -> Floats:
    """The largest true positive rate that the claim allows at a false positive rate.

    (ε, δ)-DP: min(e^ε x + δ, 1 − e^−ε (1 − δ − x)) (Wasserman & Zhou 2010, "A statistical
    framework for differential privacy"). μ-GDP: Φ(Φ⁻¹(x) + μ) (Dong, Roth & Su 2022, "Gaussian
    differential privacy", definition 2.6).

    Args:
        rate: x, false positive rates in [0, 1].
        epsilon: of the claim.
        delta: of the claim.
        mu: of the claim as a Gaussian mechanism; None for the first formula.
    """
    if mu is not None:
        return np.asarray(ndtr(ndtri(rate) + mu), dtype=np.float64)
    low = np.exp(min(epsilon, 500.0)) * rate + delta
    high = 1 - np.exp(-epsilon) * (1 - delta - rate)
    return np.asarray(np.clip(np.minimum(low, high), 0.0, 1.0), dtype=np.float64)


def allowed_auc(epsilon: float, delta: float, mu: float | None = None) -> float:
    """The largest area under the ROC curve that the claim allows; arguments as :func:`allowed`."""
    if mu is not None:
        return float(ndtr(mu / math.sqrt(2)))
    # Both branches are straight lines; they meet at x = (1 − δ)/(1 + e^ε), where both are 1 − x.
    meet = (1 - delta) * float(expit(-epsilon))
    full = 1 - delta  # from here on everything is allowed
    first, second = meet * (delta + 1 - meet) / 2, (full - meet) * (2 - meet) / 2
    return first + second + delta


def attack(name: str, scores: Floats, member: Bools) -> Attack:
    """An attack's figures, with bootstrap errors: models are drawn with replacement.

    Args:
        name: of the attack.
        scores: [N, n].
        member: [N, n].
    """
    rng = generator("membership", "bootstrap")
    drawn = rng.integers(len(scores), size=(RESAMPLES, len(scores)))

    def estimate(figure: Callable[[Floats, Bools], float]) -> Estimate:
        again = [figure(scores[rows].ravel(), member[rows].ravel()) for rows in drawn]
        return Estimate(figure(scores.ravel(), member.ravel()), float(np.std(again, ddof=1)))

    return Attack(
        name,
        scores,
        member,
        estimate(auc),
        {rate: estimate(lambda s, inside, at=rate: tpr_at(s, inside, at)) for rate in RATES},  # type: ignore[misc]
    )


# -- attacks --------------------------------------------------------------------------------------


def coins(models: int, units: int, rng: np.random.Generator) -> Bools:
    """Who is a member of which model: [N, n], each unit of exactly half of the models."""
    ranks = rng.random((models, units)).argsort(axis=0)
    return ranks < models // 2


def logits_of(losses: Floats) -> Floats:
    """How sure a model is of each unit: ln(p/(1 − p)) with p = e^−loss; of any shape.

    Of a cross-entropy that is the logit of the right answer's probability, whose distribution is
    nearly Gaussian (Carlini et al. 2022).
    """
    losses = np.clip(losses, 1e-9, 500.0)
    return -losses - np.log(-np.expm1(-losses))


def likelihood_ratios(logits: Floats, member: Bools) -> Floats:
    """LiRA of each model with the others as shadow models: [N, n].

    ln N(φ; μ_in, σ_in²) − ln N(φ; μ_out, σ_out²), where a unit's means are over the shadow models
    with and without it, and the variances are over all units.

    Args:
        logits: φ, [N, n], of each unit under each model.
        member: [N, n].
    """
    scores = np.empty_like(logits)
    for target in range(len(logits)):
        others = np.arange(len(logits)) != target
        seen, inside = logits[others], member[others]
        within, without = (_fit(seen, which) for which in (inside, ~inside))
        scores[target] = _log_normal(logits[target], *within) - _log_normal(
            logits[target], *without
        )
    return scores


def _fit(logits: Floats, which: Bools) -> tuple[Floats, float]:
    """Mean of each unit over the models that count, [n], and the variance around it."""
    count = np.maximum(which.sum(axis=0), 1)
    mean = np.where(which, logits, 0.0).sum(axis=0) / count
    squares = np.where(which, (logits - mean) ** 2, 0.0).sum()
    return mean, max(_LEAST, float(squares / max(1, which.sum() - which.shape[1])))


def _log_normal(values: Floats, mean: Floats, variance: float) -> Floats:
    return -((values - mean) ** 2) / (2 * variance) - 0.5 * math.log(variance)


# -- models ---------------------------------------------------------------------------------------


def membership_attacks(
    task: Task,
    name: str,
    tables: HolderTables,
    plan: TrainingPlan,
    *,
    models: int = MODELS,
    device: torch.device = _CPU,
    on_round: Callable[[], None] = lambda: None,
) -> list[Attack]:
    """Attack the models that halves of one holder's units give.

    All models have the plan's start, which is public, and noise of their own.

    Args:
        task: of the plan.
        name: of the holder.
        tables: the holder's rows; only the training half is used.
        plan: calibrated; its seed names the halves and the noise.
        models: N, even.
        device: where models are trained.
        on_round: called after every round, which all models take together.

    Returns:
        ``loss`` and ``lira``.
    """
    units = task.prepare(tables).train
    member = coins(models, len(units), generator("membership", plan.seed, name))
    halves = {
        f"{name}/{number}": _half(task, tables, units, inside)
        for number, inside in enumerate(member)
    }
    released = _released(task, halves, solo_plan(plan), device, on_round)
    losses = np.stack([_losses(task, vector, units, plan.seed) for vector in released])
    ratios = likelihood_ratios(logits_of(losses), member)
    return [attack("loss", -losses, member), attack("lira", ratios, member)]


def _half(task: Task, tables: HolderTables, units: Examples, inside: Bools) -> Examples:
    """The training units of one model."""
    if not task.private_parameters:
        return units.take(torch.from_numpy(np.flatnonzero(inside)))
    # Private parameters follow the numbers of the units, so these are encoded anew.
    rows = tables.train
    key = rows[task.schema.of_kind("id")[0].name].to_numpy()
    chosen = np.unique(key)[inside]
    return task.examples(rows[np.isin(key, chosen)].reset_index(drop=True))


def _released(
    task: Task,
    halves: Mapping[str, Examples],
    plan: TrainingPlan,
    device: torch.device,
    on_round: Callable[[], None],
) -> list[Tensor]:
    """The model that each half gives, [D] each."""
    quiet_flower()
    data = {name: HolderData(half, half) for name, half in halves.items()}
    runs = [Run(name, plan, (Member(name, name),), ()) for name in data]
    workers = workers_for("batched", task, data, device)
    released: list[Tensor] = []
    try:
        for stack in stacks_of(task, runs):
            for _ in stack.train(workers):
                on_round()
            released += stack.released.cpu().unbind()
    finally:
        workers.close()
    return released


@torch.no_grad()
def _losses(task: Task, parameters: Tensor, units: Examples, seed: int) -> Floats:
    """Each unit's loss under a released model: [n].

    Private parameters are not released; the attacker has freshly drawn ones. What a task draws for
    a unit is the same for every model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("membership", "private", seed))
        model = task.model(len(units))
    load_shared(task, model, parameters)
    model.eval()
    chance = torch.Generator().manual_seed(derived_seed("membership", "draws", seed))
    draws = torch.rand(len(units), task.draws, generator=chance, dtype=torch.float64)
    size = task.units_at_a_time
    losses = [
        task.loss(model, task.batch(part, drawn))
        for part, drawn in zip(units.split(size), draws.split(size), strict=True)  # type: ignore[no-untyped-call]
    ]
    return torch.cat(losses).double().numpy()
