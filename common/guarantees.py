"""What a run promises, and at what price: of its updates, and of its evaluations.

Each is a part of the plan, which calibrates it (:class:`common.plan.TrainingPlan`). "No privacy" is
one of them, not a flag that code asks about.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from common.errors import ConfigurationError
from common.frozen import Frozen
from common.privacy.accounting import distributed_noise, noise_multiplier, release_noise
from common.privacy.events import (
    FINEST_SHARE,
    Composition,
    DiscreteGaussian,
    DistributedGaussian,
    SubsampledGaussian,
    Unprotected,
    gaussian,
)
from common.privacy.matrix import participations
from common.tasks.base import Unit

if TYPE_CHECKING:
    from common.aggregation import SecureSum
    from common.plan import TrainingPlan

__all__ = [
    "CentralPrivacy",
    "DistributedPrivacy",
    "HistogramEvaluation",
    "LocalEvaluation",
    "NonPrivate",
    "Privacy",
]


LARGEST_NOISE_MULTIPLIER = 1e5
"""The most noise that a plan may ask for. With more, a float no longer follows the normal
distribution closely enough for how little such a release is charged."""


class Privacy(Frozen):
    """Differential privacy of every holder's updates over the whole run.

    Args:
        epsilon: the target ε of all rounds and local steps together.
        delta: δ; must be below 1/n of the unit at every holder.
        unit: whose privacy is counted.
        clip_norm: C, the L2 bound of one unit's gradient in one step.
        noise_multiplier: σ, the noise's standard deviation over C; None until calibrated.
        adversary: against whom ε holds.
    """

    kind: Literal["dp"] = "dp"
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    unit: Unit
    # Far above where float32 rounds a clipped norm to more than C.
    clip_norm: float = Field(ge=1e-6)
    noise_multiplier: float | None = Field(default=None, gt=0, le=LARGEST_NOISE_MULTIPLIER)
    adversary: Literal["coordinator"] = "coordinator"

    def event(self, sampling_rate: float, steps: int) -> SubsampledGaussian:
        """The accountant's event of ``steps`` local steps."""
        return SubsampledGaussian(sampling_rate, _calibrated_noise(self.noise_multiplier), steps)

    def calibrated(self, plan: TrainingPlan) -> Privacy:
        """The same target with the least noise that meets it over all rounds and local steps."""
        steps = plan.rounds * plan.local_steps
        sigma = noise_multiplier(plan.sampling_rate, steps, self.epsilon, self.delta)
        return self.model_copy(update={"noise_multiplier": _allowed_noise(sigma)})

    def guarantee(self, epsilon: str = "") -> str:
        """The guarantee in one sentence: unit, neighbouring relation, δ, adversary.

        Args:
            epsilon: what to write for ε; its value if left out.
        """
        figure = epsilon or f"{self.epsilon:g}"
        return (
            f"For each {self.unit} at each holder, everything that leaves the holder in this run "
            f"is ({figure}, {self.delta:g})-differentially private under adding or "
            f"removing that {self.unit}, against a {self.adversary} that sees every update and "
            "against whoever gets the model."
        )


SENSITIVITY_MARGIN = 1.002
"""By what factor a unit may move a rounded sum of clipped gradients by more than C: a thousandth
for the arithmetic of floats, and as much for rounding to whole steps (:meth:`longest_step`)."""

FURTHEST_NOISE = 12.0
"""Deviations that no draw of a share of noise exceeds, but with a probability below 1e-32."""


class DistributedPrivacy(Frozen):
    """Differential privacy of the sum over holders, each of which adds a share of the noise.

    Every round is one step of DP-SGD on all holders' data together. A holder sums its units'
    clipped gradients, rounds the sum to whole steps of the ring, adds discrete Gaussian noise and
    masks it (Kairouz, Liu & Steinke 2021, "The distributed discrete Gaussian mechanism for
    federated learning with secure aggregation"). The *unit* is one record or user at one holder;
    neighbours differ by one of them added or removed. The *adversary* sees the sum over the
    survivors of every round, and may know the noise of as many holders as the plan's ``coalition``
    says: those help it. It does not see a single holder's vector: that is what secure aggregation
    is for, and what this rests on.

    Args:
        epsilon: the target ε of all rounds together.
        delta: δ; must be below 1/n of the unit at every holder.
        unit: whose privacy is counted.
        clip_norm: C, the L2 bound of one unit's gradient.
        noise_multiplier: σ, the deviation of the noise of any ``min_holders`` − ``coalition``
            holders together, over what one unit moves their sum by; None until calibrated.
        adversary: against whom ε holds.
    """

    kind: Literal["distributed"] = "distributed"
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    unit: Unit
    clip_norm: float = Field(ge=1e-6)
    noise_multiplier: float | None = Field(default=None, gt=0, le=LARGEST_NOISE_MULTIPLIER)
    adversary: Literal["sum"] = "sum"

    def event(self, sampling_rate: float, steps: int) -> DistributedGaussian:
        """The accountant's event of ``steps`` rounds; every unit is in each."""
        if sampling_rate != 1.0:
            raise ConfigurationError(
                f"noise in the sum is accounted for with every unit in every step, got "
                f"sampling_rate={sampling_rate:g}; set batch_size to 'full'"
            )
        return DistributedGaussian(_calibrated_noise(self.noise_multiplier), steps)

    def calibrated(self, plan: TrainingPlan) -> DistributedPrivacy:
        """The same target with the least noise that meets it over all rounds."""
        sigma = distributed_noise(plan.rounds, self.epsilon, self.delta)
        return self.model_copy(update={"noise_multiplier": _allowed_noise(sigma)})

    def share(self, plan: TrainingPlan) -> float:
        """Deviation of one holder's noise, in the units of a gradient.

        Variances add, so those of t − c holders make σ times the sensitivity.
        """
        sigma = _calibrated_noise(self.noise_multiplier)
        return sigma * SENSITIVITY_MARGIN * self.clip_norm / math.sqrt(_honest(plan))

    def longest_step(self, plan: TrainingPlan) -> float:
        """The longest step of the ring that the sensitivity's margin allows.

        Rounding a sum moves each coordinate by at most half a step, so two neighbours' rounded
        sums differ by at most C and √D steps; a thousandth of C is what the margin has for it. The
        noise of one holder is at least 64 steps, where the sum of discrete Gaussians is one itself
        but for less than any float can say (Kairouz et al. 2021, theorem 1).
        """
        rounding = 1e-3 * self.clip_norm / math.sqrt(_secure_sum(plan).dimension)
        return min(rounding, self.share(plan) / FINEST_SHARE)

    def check_step(self, step: float, plan: TrainingPlan) -> None:
        """Refuse a ring whose steps are longer than the price assumes.

        Raises:
            ConfigurationError: they are.
        """
        longest = self.longest_step(plan)
        if step > longest:
            raise ConfigurationError(
                f"ring.step must be at most {longest:g}, so that rounding stays within the margin "
                f"of the sensitivity and a share of noise has 64 steps, got {step:g}"
            )

    def largest_number(self, plan: TrainingPlan) -> float:
        """What no coordinate of a holder's noised sum exceeds."""
        return plan.most_units * self.clip_norm * SENSITIVITY_MARGIN + FURTHEST_NOISE * self.share(
            plan
        )

    def guarantee(self, epsilon: str = "") -> str:
        """The guarantee in one sentence: unit, neighbouring relation, δ, adversary.

        Args:
            epsilon: what to write for ε; its value if left out.
        """
        figure = epsilon or f"{self.epsilon:g}"
        return (
            f"For each {self.unit} at each holder, the sums of this run are ({figure}, "
            f"{self.delta:g})-differentially private under adding or removing that {self.unit}, "
            "against a coordinator that sees every sum and no single holder's part of it, and "
            "against whoever gets the model and took no part. Who took part knows its own share of "
            "the noise: against a holder it is the guarantee with one holder's help."
        )


def _secure_sum(plan: TrainingPlan) -> SecureSum:
    aggregation = plan.aggregation
    if aggregation.kind != "secure-sum":
        raise ConfigurationError("noise in the sum needs aggregation 'secure-sum'")
    return aggregation


def _honest(plan: TrainingPlan) -> int:
    """Holders whose noise is in every sum and unknown to the adversary."""
    return plan.min_holders - _secure_sum(plan).coalition


class NonPrivate(Frozen):
    """No clipping, no noise, no guarantee."""

    kind: Literal["none"] = "none"

    def event(self, sampling_rate: float, steps: int) -> Unprotected:
        """A release without a guarantee."""
        del sampling_rate, steps
        return Unprotected()

    def calibrated(self, plan: TrainingPlan) -> NonPrivate:
        """Itself: there is nothing to calibrate."""
        del plan
        return self

    def guarantee(self) -> str:
        """The absence of a guarantee, in one sentence."""
        return (
            "No differential privacy: updates leave the holders without clipping and noise, and "
            "may reveal single records."
        )


class CentralPrivacy(Frozen):
    """Differential privacy of whole holders, by a coordinator that all of them trust.

    Holders train without privacy and clip their whole update; the coordinator adds noise to the
    sum. The unit is a *holder*, with everything in it; neighbours differ by one holder added or
    removed. The *adversary* sees the models of all rounds, and neither single updates nor who was
    asked. Against the coordinator there is no guarantee at all, so a holder's own ledger takes its
    update for what it is, unprotected, and a holder whose policy does not say ``unprotected``
    declines. What else a coordinator may publish is not covered: who took part in a round,
    figures of single holders, and that there were enough of them for a run at all.

    Args:
        epsilon: the target ε of all rounds together.
        delta: δ; must be below 1/population.
        clip_norm: C, the L2 bound of one holder's whole update; of the first round, if adaptive.
        population: public, how many holders there are, whether asked or not. Coins and divisor
            follow from it, so a wrong one costs accuracy, and privacy only through δ.
        clipping: ``fixed``, or ``adaptive``: C follows the median norm (Andrew et al. 2021,
            "Differentially private learning with adaptive clipping").
        mechanism: ``gaussian``: independent noise, and each holder asked by a secret coin (McMahan
            et al. 2018, "Learning differentially private recurrent language models"); or
            ``banded``: noise of :mod:`common.privacy.matrix`, and holders asked in turn (DP-FTRL).
        bands: b of the banded mechanism: everyone is asked once in so many rounds.
        noise_multiplier: σ, in units of C, of one round's noise (before it is correlated); None
            until calibrated.
    """

    kind: Literal["central"] = "central"
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    unit: Literal["holder"] = "holder"
    clip_norm: float = Field(ge=1e-6)
    population: int = Field(ge=1)
    clipping: Literal["fixed", "adaptive"] = "fixed"
    mechanism: Literal["gaussian", "banded"] = "gaussian"
    bands: int = Field(default=1, ge=1)
    noise_multiplier: float | None = Field(default=None, gt=0, le=LARGEST_NOISE_MULTIPLIER)
    adversary: Literal["model"] = "model"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mechanism == "banded" and self.clipping == "adaptive":
            raise ValueError(
                "clipping must be fixed with mechanism 'banded': noise that is taken back in later "
                "rounds must have been added on one scale"
            )
        if self.mechanism == "gaussian" and self.bands != 1:
            raise ValueError(f"bands must be 1 with mechanism 'gaussian', got {self.bands}")
        if self.delta * self.population >= 1:
            raise ValueError(
                f"delta must be below 1/population = {1 / self.population:g}, got {self.delta:g}"
            )
        return self

    def event(self, sampling_rate: float, steps: int) -> Unprotected:
        """What an update is to the holder that sends it: a release without a guarantee."""
        del sampling_rate, steps
        return Unprotected()

    def calibrated(self, plan: TrainingPlan) -> CentralPrivacy:
        """The same target with the least noise that meets it over all rounds."""
        if self.mechanism == "banded":
            sigma = noise_multiplier(1.0, 1, self.epsilon, self.delta)
            sigma *= math.sqrt(participations(plan.rounds, self.bands))
        else:
            sigma = noise_multiplier(self.rate(plan), plan.rounds, self.epsilon, self.delta)
        return self.model_copy(update={"noise_multiplier": _allowed_noise(sigma)})

    def rate(self, plan: TrainingPlan) -> float:
        """The share of all holders that is asked in a round, on average."""
        if self.mechanism == "banded":
            return 1 / self.bands
        return 1.0 if plan.cohort is None else min(1.0, plan.cohort / self.population)

    def release(self, plan: TrainingPlan) -> SubsampledGaussian:
        """The accountant's event of all models together, for one holder."""
        sigma = _calibrated_noise(self.noise_multiplier)
        if self.mechanism == "banded":
            return gaussian(sigma / math.sqrt(participations(plan.rounds, self.bands)), 1)
        return SubsampledGaussian(self.rate(plan), sigma, plan.rounds)

    def guarantee(self, epsilon: str = "") -> str:
        """The guarantee in one sentence: unit, neighbouring relation, δ, adversary.

        Args:
            epsilon: what to write for ε; its value if left out.
        """
        figure = epsilon or f"{self.epsilon:g}"
        blind = " and not who took part" if self.mechanism == "gaussian" else ""
        return (
            f"For each holder, with all that it holds, the models of this run are ({figure}, "
            f"{self.delta:g})-differentially private under adding or removing that holder, against "
            f"whoever sees every model{blind}. The coordinator is trusted: it sees updates without "
            "noise, and against it there is no guarantee."
        )


def _allowed_noise(sigma: float) -> float:
    if sigma > LARGEST_NOISE_MULTIPLIER:
        raise ConfigurationError(
            f"this plan needs noise of {sigma:.3g} times what one unit adds, and at most "
            f"{LARGEST_NOISE_MULTIPLIER:g} are allowed; raise epsilon or delta, or release less"
        )
    return sigma


def _calibrated_noise(sigma: float | None) -> float:
    if sigma is None:
        raise ConfigurationError(
            "this plan is not calibrated: noise_multiplier is missing; build it with plan_for"
        )
    return sigma


class LocalEvaluation(Frozen):
    """Holders judge the model for themselves; nothing leaves, so there is nothing to pay.

    A holder whose policy says that its data are public sends its exact metrics.
    """

    kind: Literal["local"] = "local"

    def calibrated(self, releases: int) -> LocalEvaluation:
        """Itself: there is nothing to calibrate."""
        del releases
        return self

    def composition(self, releases: int) -> Composition:
        """Nothing is released."""
        del releases
        return Composition()


class HistogramEvaluation(Frozen):
    """Every evaluation is a release: a noised histogram of each holder's held-out units.

    A unit falls into one cell of it (its score and label, or its rank), so adding or removing one
    moves the histogram by 1. Metrics are computed from the sum over holders.

    Args:
        epsilon: the price of all of a run's evaluations together, for each holder.
        delta: δ of it.
        noise_multiplier: σ of the discrete Gaussian noise in each cell; None until calibrated.
    """

    kind: Literal["histogram"] = "histogram"
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float | None = Field(default=None, gt=0, le=LARGEST_NOISE_MULTIPLIER)

    def calibrated(self, releases: int) -> HistogramEvaluation:
        """The same price with the least noise that so many evaluations need."""
        sigma = release_noise(max(1, releases), self.epsilon, self.delta)
        return self.model_copy(update={"noise_multiplier": _allowed_noise(sigma)})

    def composition(self, releases: int) -> Composition:
        """What a holder releases in so many evaluations."""
        return Composition.of(self.event()) * releases

    def event(self) -> DiscreteGaussian:
        """The accountant's event of one evaluation."""
        return DiscreteGaussian(_calibrated_noise(self.noise_multiplier), 1)
