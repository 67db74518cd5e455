"""An audit: attack a plan as it runs, and see whether more comes out than it claims.

Two attackers. The coordinator's view is attacked with canaries (:mod:`simulations.canaries`), which
gives lower bounds on ε at a stated confidence (:mod:`simulations.lower_bounds`): one above the
claim shows that the claim is false. The released model is attacked as anybody could who gets it
(:mod:`simulations.membership`), which shows what the claim is worth in practice and bounds nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from common.errors import ConfigurationError
from common.guarantees import Privacy
from common.plan import TrainingPlan
from common.privacy.gaussian import gaussian_epsilon, gaussian_mu
from common.tasks.base import HolderTables, Task, generator
from simulations.canaries import (
    MakeHolder,
    canary_scores,
    claimed_privacy,
    deployed_holder,
)
from simulations.lower_bounds import (
    Bools,
    Floats,
    confusion_of,
    fdp_mu,
    gdp_mu,
    guesses_of,
    one_run_epsilon,
    planned_guesses,
)
from simulations.membership import (
    MODELS,
    RATES,
    Attack,
    Estimate,
    allowed,
    allowed_auc,
    auc,
    membership_attacks,
)
from simulations.results import privacy_document

__all__ = [
    "METHODS",
    "THRESHOLD",
    "Audit",
    "AuditResult",
    "LowerBound",
    "audit_document",
    "audited",
]

METHODS = {
    "one-run": "nothing",
    "f-dp": "Gaussian curve",
    "gdp": "Gaussian curve, independence",
}
"""Ways to a lower bound, and what each assumes of the mechanism; the first cannot be wrong about
it. All bounds hold at once with the confidence that was asked for."""

THRESHOLD = 0.5
"""Of the scores, between what excluded and included canaries have on average."""


@dataclass(frozen=True)
class Audit:
    """What to audit.

    Args:
        task: on its source.
        plan: calibrated, with privacy.
        holder: whose units the canaries join; None for the first.
        holders: how many the source is cut into; None for its own number.
        canaries: m, of each run.
        runs: with canaries; they count together, each with a seed of its own from the plan's on.
        confidence: with which all bounds hold together.
        device: where models live.
        membership: whether to attack the released model too.
        make_holder: the holder to audit; tests give broken ones.

    Raises:
        ConfigurationError: the plan claims nothing, or a number is out of its range.
    """

    task: Task
    plan: TrainingPlan
    holder: str | None = None
    holders: int | None = None
    canaries: int = 1000
    runs: int = 1
    confidence: float = 0.95
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    membership: bool = True
    make_holder: MakeHolder = deployed_holder

    def __post_init__(self) -> None:
        claimed_privacy(self.plan)
        if self.canaries < 2:
            raise ConfigurationError(f"canaries must be at least 2, got {self.canaries}")
        if self.runs < 1:
            raise ConfigurationError(f"seeds must be at least 1, got {self.runs}")
        if not 0.5 <= self.confidence < 1:
            raise ConfigurationError(
                f"confidence must be at least 0.5 and below 1, got {self.confidence:g}"
            )

    @property
    def mu(self) -> float:
        """Of the Gaussian mechanism that just meets the claim."""
        privacy = claimed_privacy(self.plan)
        return gaussian_mu(privacy.epsilon, privacy.delta)

    @property
    def seeds(self) -> range:
        """Of the runs."""
        return range(self.plan.seed, self.plan.seed + self.runs)


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on ε at the claim's δ.

    Args:
        method: one of :data:`METHODS`.
        epsilon: in nats; 0 where nothing was shown.
        mu: of the Gaussian curve behind it; None for the one-run method.
        guesses: that the attacker made.
        correct: of these.
    """

    method: str
    epsilon: float
    mu: float | None
    guesses: int
    correct: int


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Args:
        audit: what was asked.
        holder: whose units the canaries joined.
        units: training units of that holder, without canaries.
        scores: of all runs' canaries, [runs · m]; see :func:`simulations.canaries.canary_scores`.
        included: the coins, [runs · m].
        bounds: in the order of :data:`METHODS`.
        attacks: on the released model; empty if none was asked for.
        seconds: wall time.
    """

    audit: Audit
    holder: str
    units: int
    scores: Floats
    included: Bools
    bounds: Sequence[LowerBound]
    attacks: Sequence[Attack]
    seconds: float

    @property
    def best(self) -> LowerBound:
        """The largest lower bound."""
        return max(self.bounds, key=lambda bound: bound.epsilon)

    @property
    def contradicted(self) -> bool:
        """Whether a lower bound is above the claim."""
        return self.best.epsilon > claimed_privacy(self.audit.plan).epsilon


OnProgress = Callable[[str], None]
"""Called after every round with what is being done."""


def audited(audit: Audit, on_progress: OnProgress = lambda _: None) -> AuditResult:
    """Run an audit.

    Raises:
        ConfigurationError: there is no such holder, or δ does not fit so many units.
        RunError: a run with canaries did not come to its end.
    """
    begin = time.perf_counter()
    name, tables = _holder_of(audit)
    units = len(audit.task.prepare(tables).train)
    runs = [_run(audit, name, tables, seed, on_progress) for seed in audit.seeds]
    scores, included = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    attacks: Sequence[Attack] = ()
    if audit.membership:
        report = partial(on_progress, "models to attack")
        attacks = membership_attacks(
            audit.task, name, tables, audit.plan, device=audit.device, on_round=report
        )
    seconds = time.perf_counter() - begin
    bounds = _bounds(audit, scores, included)
    return AuditResult(audit, name, units, scores, included, bounds, attacks, seconds)


def _holder_of(audit: Audit) -> tuple[str, HolderTables]:
    tables = audit.task.source.tables(audit.holders)
    name = audit.holder or next(iter(tables))
    if name not in tables:
        raise ConfigurationError(
            f"there is no holder {name!r}; there are {', '.join(list(tables)[:20])}"
        )
    return name, audit.task.split(tables[name], holder=name, seed=audit.plan.seed)


def _run(
    audit: Audit, name: str, tables: HolderTables, seed: int, on_progress: OnProgress
) -> tuple[Floats, Bools]:
    """One run's scores and coins."""
    included = generator("audit", "canaries", seed, name).random(audit.canaries) < 0.5
    scores = canary_scores(
        audit.task,
        name,
        audit.task.prepare(tables),
        audit.plan.model_copy(update={"seed": seed}),
        included,
        device=audit.device,
        make_holder=audit.make_holder,
        on_round=partial(on_progress, f"canaries, seed {seed}"),
    )
    return scores, included


def _bounds(audit: Audit, scores: Floats, included: Bools) -> list[LowerBound]:
    """Every method's bound.

    The chance that any of them is wrong is at most the sum of the chances of each (Bonferroni).
    Runs are independent and each canary is in one of them, so all canaries count as those of one
    mechanism with the same guarantee.
    """
    delta, mu = claimed_privacy(audit.plan).delta, audit.mu
    confidence = 1 - (1 - audit.confidence) / len(METHODS)
    one_run = partial(one_run_epsilon, delta=delta, confidence=confidence)
    fdp = partial(fdp_mu, confidence=confidence)
    first = guesses_of(scores, included, planned_guesses(one_run, mu, len(scores)))
    second = guesses_of(scores, included, planned_guesses(fdp, mu, len(scores)))
    confusion = confusion_of(scores, included, THRESHOLD)
    right = len(scores) - confusion.missed - confusion.accused
    return [
        LowerBound("one-run", one_run(first), None, first.made, first.correct),
        _gaussian("f-dp", fdp(second), delta, second.made, second.correct),
        _gaussian("gdp", gdp_mu(confusion, confidence), delta, len(scores), right),
    ]


def _gaussian(method: str, mu: float, delta: float, guesses: int, correct: int) -> LowerBound:
    epsilon = gaussian_epsilon(mu, delta) if mu > 0 else 0.0
    return LowerBound(method, epsilon, mu, guesses, correct)


# -- the document ---------------------------------------------------------------------------------


def audit_document(result: AuditResult) -> dict[str, Any]:
    """The document that ``sotto audit --json`` writes; its field names are a contract."""
    audit, plan = result.audit, result.audit.plan
    privacy = claimed_privacy(plan)
    return {
        "task": plan.task,
        "source": plan.source,
        "preprocessing": plan.preprocessing,
        "holder": result.holder,
        "units": result.units,
        "rounds": plan.rounds,
        "local_steps": plan.local_steps,
        "sampling_rate": plan.sampling_rate,
        "seeds": list(audit.seeds),
        "privacy": privacy_document(privacy),
        "claim": {
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "mu": audit.mu,
            "allows": {"any": _allowed(privacy), "gaussian": _allowed(privacy, audit.mu)},
        },
        "confidence": audit.confidence,
        "canaries": {
            "planted": len(result.scores),
            "included": int(result.included.sum()),
            "auc": auc(result.scores, result.included),
        },
        "bounds": [
            {
                "method": bound.method,
                "epsilon": bound.epsilon,
                "mu": bound.mu,
                "guesses": bound.guesses,
                "correct": bound.correct,
                "assumes": METHODS[bound.method],
            }
            for bound in result.bounds
        ],
        "lower_bound": result.best.epsilon,
        "contradicted": result.contradicted,
        "membership": [_attack_document(attack) for attack in result.attacks],
        "seconds": {"total": round(result.seconds, 3)},
    }


def _allowed(privacy: Privacy, mu: float | None = None) -> dict[str, Any]:
    """What the claim allows the best attack there could be."""
    limits = allowed(np.array(RATES), privacy.epsilon, privacy.delta, mu).tolist()
    return {
        "auc": allowed_auc(privacy.epsilon, privacy.delta, mu),
        "tpr": [{"fpr": rate, "value": limit} for rate, limit in zip(RATES, limits, strict=True)],
    }


def _attack_document(attack: Attack) -> dict[str, Any]:
    return {
        "attack": attack.name,
        "models": MODELS,
        "members": int(attack.member.sum()),
        "others": int((~attack.member).sum()),
        "auc": _estimate(attack.auc),
        "tpr": [{"fpr": rate, **_estimate(found)} for rate, found in attack.tpr.items()],
    }


def _estimate(figure: Estimate) -> dict[str, float]:
    return {"value": figure.value, "error": figure.error}
