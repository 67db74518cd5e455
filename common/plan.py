"""The plan: one frozen object that says everything about a run, and says it to everyone.

The plan builds the sampler, the clip, the noise and the accountant's event, so that these cannot
disagree. Everything in it is public. "No privacy" is a plan too (:class:`NonPrivate`).
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigurationError
from common.privacy.accounting import noise_multiplier
from common.privacy.events import Composition, SubsampledGaussian, Unprotected
from common.tasks.base import Unit

__all__ = [
    "NonPrivate",
    "Privacy",
    "StrategyPlan",
    "TrainingPlan",
    "fits_size_class",
    "validated",
]

LARGEST_SIZE_CLASS = 10
"""A holder declines a plan if its declared size is more than this many times ``holder_size``."""

LARGEST_UNDERSTATEMENT = 4
"""A holder may have this many times the units that it declares."""


_Model = TypeVar("_Model", bound="Frozen")


def fits_size_class(units: int, size_class: int) -> bool:
    """Whether a holder with so many units may declare ``size_class``."""
    return units <= LARGEST_UNDERSTATEMENT * size_class


def validated(model: type[_Model], values: Mapping[str, Any]) -> _Model:
    """Build ``model`` from ``values``.

    Raises:
        ConfigurationError: one sentence per field: its name, the bound, and what was found.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigurationError(_sentences(error)) from None


def _sentences(error: ValidationError) -> str:
    def sentence(problem: Mapping[str, Any]) -> str:
        message = problem["msg"].removeprefix("Value error, ")
        # "dp" and "none" are the tags of the privacy union, not fields that a user wrote.
        field = ".".join(str(part) for part in problem["loc"] if part not in ("dp", "none"))
        found = f", got {problem['input']!r}" if field and problem["type"] != "missing" else ""
        return f"{field}: {message[0].lower()}{message[1:]}{found}" if field else message

    return "; ".join(sentence(dict(problem)) for problem in error.errors())


class Frozen(BaseModel):
    """Immutable, and strict about unknown keys and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    noise_multiplier: float | None = Field(default=None, gt=0)
    adversary: Literal["coordinator"] = "coordinator"

    def event(self, sampling_rate: float, steps: int) -> SubsampledGaussian:
        """The accountant's event of ``steps`` local steps."""
        if self.noise_multiplier is None:
            raise ConfigurationError(
                "this plan is not calibrated: noise_multiplier is missing; build it with plan_for"
            )
        return SubsampledGaussian(sampling_rate, self.noise_multiplier, steps)

    def calibrated(self, sampling_rate: float, steps: int) -> Privacy:
        """The same target with the smallest noise multiplier that meets it."""
        sigma = noise_multiplier(sampling_rate, steps, self.epsilon, self.delta)
        return self.model_copy(update={"noise_multiplier": sigma})

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


class NonPrivate(Frozen):
    """No clipping, no noise, no guarantee."""

    kind: Literal["none"] = "none"

    def event(self, sampling_rate: float, steps: int) -> Unprotected:
        """A release without a guarantee."""
        del sampling_rate, steps
        return Unprotected()

    def calibrated(self, sampling_rate: float, steps: int) -> NonPrivate:
        """Itself: there is nothing to calibrate."""
        del sampling_rate, steps
        return self

    def guarantee(self) -> str:
        """The absence of a guarantee, in one sentence."""
        return (
            "No differential privacy: updates leave the holders without clipping and noise, and "
            "may reveal single records."
        )


class StrategyPlan(Frozen):
    """How the coordinator combines updates: one of Flower's strategies and its settings.

    Args:
        name: a key of ``server.aggregation.STRATEGIES``.
        learning_rate: the coordinator's, applied to the averaged update.
        momentum: of ``fedavgm``.
        proximal_mu: μ of ``fedprox``, applied in the holders' local steps.
        trim: fraction that ``fedtrimmedavg`` cuts at each end.
        malicious: how many malicious holders ``krum`` must withstand.
    """

    name: str = "fedavg"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    proximal_mu: float = Field(default=0.0, ge=0)
    trim: float = Field(default=0.2, ge=0, lt=0.5)
    malicious: int = Field(default=0, ge=0)


class TrainingPlan(Frozen):
    """A run, described completely.

    Args:
        task: registered name of the task.
        source: whose schema and encoding the task uses.
        preprocessing: the preparation of that source.
        rounds: T, exchanges with the holders.
        cohort: how many holders are asked each round; None for all that are there.
        min_holders: a round with fewer accepted updates fails.
        local_steps: k, optimizer steps a holder takes between download and upload.
        learning_rate: of the local optimizer.
        optimizer: of the local steps.
        momentum: of local SGD.
        sampling_rate: q, the probability with which each unit enters a step (Poisson).
        expected_batch_size: B = q · holder_size, the public divisor of the clipped sum. It never
            depends on how many units a holder really has.
        holder_size: public, nominal number of training units of one holder.
        weighting: ``equal``, or ``size``: by the public size class that each holder declares.
        privacy: the guarantee, or its absence.
        strategy: the coordinator's side of the optimization.
        aggregation: what the coordinator gets to see; only ``plain`` so far.
        average_from: the released model is the mean of the round models from this fraction of
            the rounds on (Polyak averaging; post-processing, so free of charge); 1 for the last.
        evaluate_every: holders evaluate after every so many rounds, and always after the last;
            0 for never. Evaluation stays on the holder unless its policy shares it.
        round_deadline: seconds until a silent holder misses the round.
        max_update_norm: L2 bound on an update where no clipping bounds it already.
        seed: of the initial parameters and the choice of cohorts.
    """

    task: str
    source: str
    preprocessing: str = "default"
    rounds: int = Field(ge=1, le=999_999)
    cohort: int | None = Field(default=None, ge=1)
    min_holders: int = Field(default=1, ge=1)
    local_steps: int = Field(default=1, ge=1, le=100_000)
    learning_rate: float = Field(gt=0)
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    sampling_rate: float = Field(default=1.0, gt=0, le=1)
    expected_batch_size: float = Field(gt=0)
    holder_size: int = Field(ge=1)
    weighting: Literal["equal", "size"] = "equal"
    privacy: Annotated[Privacy | NonPrivate, Field(discriminator="kind")]
    strategy: StrategyPlan = StrategyPlan()
    aggregation: Literal["plain"] = "plain"
    average_from: float = Field(default=1.0, ge=0, le=1)
    evaluate_every: int = Field(default=1, ge=0)
    round_deadline: float = Field(default=600.0, gt=0)
    max_update_norm: float = Field(default=1e4, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cohort is not None and self.cohort < self.min_holders:
            raise ValueError(
                f"cohort must be at least min_holders={self.min_holders}, got {self.cohort}"
            )
        if not math.isclose(self.expected_batch_size, self.sampling_rate * self.holder_size):
            raise ValueError(
                "expected_batch_size must be sampling_rate * holder_size = "
                f"{self.sampling_rate * self.holder_size:g}, got {self.expected_batch_size:g}"
            )
        return self

    # -- privacy -----------------------------------------------------------------------------

    def calibrated(self) -> TrainingPlan:
        """The same plan with the noise that meets its target over all rounds and steps."""
        steps = self.rounds * self.local_steps
        return self.model_copy(
            update={"privacy": self.privacy.calibrated(self.sampling_rate, steps)}
        )

    def round_event(self) -> SubsampledGaussian | Unprotected:
        """What one holder releases in one round."""
        return self.privacy.event(self.sampling_rate, self.local_steps)

    def composition(self) -> Composition:
        """What one holder releases in the whole run."""
        return Composition.of(self.round_event()) * self.rounds

    def divisor(self, size_class: int) -> float:
        """B of a holder: public, from its declared size class where ``weighting`` is ``size``."""
        return self.sampling_rate * self.weight(size_class) * self.holder_size

    def weight(self, size_class: int) -> float:
        """Aggregation weight of a holder: 1, or its size class relative to ``holder_size``."""
        if self.weighting == "equal":
            return 1.0
        return min(size_class / self.holder_size, self.largest_weight)

    @property
    def largest_weight(self) -> float:
        """The largest aggregation weight that a holder may claim."""
        return 1.0 if self.weighting == "equal" else float(LARGEST_SIZE_CLASS)

    def admits(self, size_class: int) -> bool:
        """Whether a holder of that declared size fits the bound on updates that the plan sets."""
        return size_class <= LARGEST_SIZE_CLASS * self.holder_size

    def largest_update_norm(self, dimension: int) -> float:
        """L2 norm that no honest update of ``dimension`` float32 parameters exceeds.

        Under DP, one step moves SGD by at most lr/(1-m) · (Σ‖clipped‖ + ‖noise‖)/B. At most
        40 · ``holder_size`` units (the two limits above) add C each, and ‖N(0, I_d)‖ ≤ √d + t with
        probability 1 - exp(-t²/2) (Gaussian concentration of a 1-Lipschitz function), t = 9.
        Adam moves a coordinate by at most lr·(1-β₁)/√(1-β₂) ≈ 3.2·lr a step (Kingma & Ba 2015,
        section 2.1).
        """
        if self.privacy.kind == "none":
            return self.max_update_norm
        if self.optimizer == "adam":
            return self.local_steps * 3.2 * self.learning_rate * math.sqrt(dimension)
        sigma = self.privacy.noise_multiplier or 0.0
        signal = LARGEST_SIZE_CLASS * LARGEST_UNDERSTATEMENT * self.holder_size
        noise = sigma * (math.sqrt(dimension) + 9.0)
        gradient = self.privacy.clip_norm * (signal + noise) / self.expected_batch_size
        return self.local_steps * self.learning_rate / (1 - self.momentum) * gradient

    def same_but_for_noise(self, other: TrainingPlan) -> bool:
        """Whether both say the same, up to how closely the noise was calibrated.

        Another version of a library may calibrate a little differently; a run goes on with the
        noise that it began with.
        """

        def uncalibrated(plan: TrainingPlan) -> TrainingPlan:
            if plan.privacy.kind == "none":
                return plan
            privacy = plan.privacy.model_copy(update={"noise_multiplier": None})
            return plan.model_copy(update={"privacy": privacy})

        return uncalibrated(self) == uncalibrated(other)

    # -- forms -------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """Sha256 of the canonical form; what ledgers and checkpoints refer to."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON, as sent to holders."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=16)  # a run sends the same text with every request
    def from_json(cls, text: str) -> TrainingPlan:
        """Inverse of :meth:`to_json`; raises ConfigurationError."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"the plan is not JSON: {error}") from None
        return validated(cls, values)

    def to_toml(self) -> str:
        """The plan as people read it."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def from_toml(cls, text: str) -> TrainingPlan:
        """Inverse of :meth:`to_toml`; raises ConfigurationError."""
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"the plan is not TOML: {error}") from None
        return validated(cls, values)
