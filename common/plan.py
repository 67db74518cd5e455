"""The plan: one frozen object that says everything about a run, and says it to everyone.

The plan builds the sampler, the clip, the noise and the accountant's event, so that these cannot
disagree. Everything in it is public. "No privacy" is a plan too (:class:`NonPrivate`).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from common.aggregation import Masked, Plain, Secure, SecureSum
from common.errors import ConfigurationError
from common.frozen import Frozen, PublicPlan, validated
from common.guarantees import (
    CentralPrivacy,
    DistributedPrivacy,
    HistogramEvaluation,
    LocalEvaluation,
    NonPrivate,
    Privacy,
)
from common.privacy.events import Composition, Event
from common.tasks.scaling import InputScaling
from common.texts import read_toml

__all__ = [
    "CLIP_ROUNDING",
    "LARGEST_SIZE_CLASS",
    "LARGEST_UNDERSTATEMENT",
    "StrategyPlan",
    "TrainingPlan",
    "fits_size_class",
]

LARGEST_SIZE_CLASS = 10
"""A holder declines a plan if its declared size is more than this many times ``holder_size``."""

MOST_OVER_SELECTION = 10.0
"""Asking more than eleven holders for one update that counts would be a mistake."""

LARGEST_UNDERSTATEMENT = 4
"""A holder may have this many times the units that it declares."""


CLIP_ROUNDING = 1 + 1e-4
"""A clipped update in float32 may be longer than C by this factor."""


def fits_size_class(units: int, size_class: int) -> bool:
    """Whether a holder with so many units may declare ``size_class``."""
    return units <= LARGEST_UNDERSTATEMENT * size_class


class StrategyPlan(Frozen):
    """How the coordinator combines updates: one of Flower's strategies and its settings.

    Args:
        name: a key of ``server.aggregation.STRATEGIES``.
        learning_rate: the coordinator's, applied to the averaged update.
        momentum: of ``fedavgm``.
        proximal_mu: μ of ``fedprox``, applied in the holders' local steps.
        trim: fraction that ``fedtrimmedavg`` cuts at each end.
        malicious: how many malicious holders ``krum`` must withstand.
        buffer: K of ``fedbuff``: so many updates make the next model.
        max_staleness: of ``fedbuff``: an update whose model has been replaced more often than that
            since does not count; None for no such limit.
    """

    name: str = "fedavg"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    proximal_mu: float = Field(default=0.0, ge=0)
    trim: float = Field(default=0.2, ge=0, lt=0.5)
    malicious: int = Field(default=0, ge=0)
    buffer: int = Field(default=10, ge=1)
    max_staleness: int | None = Field(default=None, ge=0)


class TrainingPlan(PublicPlan):
    """A run, described completely.

    Args:
        task: registered name of the task.
        source: whose schema and encoding the task uses.
        preprocessing: the preparation of that source.
        rounds: T, exchanges with the holders.
        cohort: how many holders are asked each round; None for all that are there.
        over_selection: share of the cohort that is asked besides; the round then closes with the
            first ``cohort`` updates that are accepted.
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
        aggregation: what the coordinator gets to see (:mod:`common.aggregation`).
        average_from: the released model is the mean of the round models from this fraction of
            the rounds on (Polyak averaging; post-processing, so free of charge); 1 for the last.
        evaluate_every: holders evaluate after every so many rounds, and always after the last;
            0 for never.
        evaluation: what of it leaves a holder, and at what price.
        scaling: public shifts and scales of the task's inputs, the same at every holder; none
            where the task's own encoding stands.
        round_deadline: seconds until a silent holder misses the round.
        deadline_extensions: a holder that makes progress may take so many deadlines more.
        max_update_norm: L2 bound on an update where no clipping bounds it already.
        seed: of the initial parameters and the choice of cohorts.
    """

    task: str
    source: str
    preprocessing: str = "default"
    rounds: int = Field(ge=1, le=999_999)
    cohort: int | None = Field(default=None, ge=1)
    over_selection: float = Field(default=0.0, ge=0, le=MOST_OVER_SELECTION)
    min_holders: int = Field(default=1, ge=1)
    local_steps: int = Field(default=1, ge=1, le=100_000)
    learning_rate: float = Field(gt=0)
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    sampling_rate: float = Field(default=1.0, gt=0, le=1)
    expected_batch_size: float = Field(gt=0)
    holder_size: int = Field(ge=1)
    weighting: Literal["equal", "size"] = "equal"
    privacy: Annotated[
        Privacy | DistributedPrivacy | NonPrivate | CentralPrivacy, Field(discriminator="kind")
    ]
    strategy: StrategyPlan = StrategyPlan()
    aggregation: Annotated[Plain | Secure | SecureSum, Field(discriminator="kind")] = Plain()
    average_from: float = Field(default=1.0, ge=0, le=1)
    evaluate_every: int = Field(default=1, ge=0)
    evaluation: Annotated[LocalEvaluation | HistogramEvaluation, Field(discriminator="kind")] = (
        LocalEvaluation()
    )
    scaling: tuple[InputScaling, ...] = ()
    round_deadline: float = Field(default=600.0, gt=0)
    deadline_extensions: int = Field(default=9, ge=0, le=1000)
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
        if isinstance(self.privacy, CentralPrivacy):
            self._check_central(self.privacy)
        self.aggregation.check(self)
        if self.over_selection:
            self._check_over_selection()
        return self

    def _check_central(self, privacy: CentralPrivacy) -> None:
        if self.weighting != "equal":
            raise ValueError(
                f"weighting must be 'equal' where holders are the unit, got {self.weighting!r}"
            )
        if privacy.mechanism == "banded" and self.cohort is not None:
            raise ValueError(
                "cohort must be left out with mechanism 'banded', which asks one holder in "
                f"{privacy.bands} (bands) each round, got {self.cohort}"
            )
        if privacy.bands > self.rounds:
            raise ValueError(
                f"bands must be at most rounds={self.rounds}, or some holders are never asked, got "
                f"{privacy.bands}"
            )

    def _check_over_selection(self) -> None:
        """Refuse it where who counts must not depend on who is fast."""
        got = f"got {self.over_selection:g}"
        if self.cohort is None:
            raise ValueError(
                "over_selection must be 0 without a cohort: everybody is asked already, and the "
                f"slowest would never count, {got}"
            )
        if isinstance(self.privacy, CentralPrivacy):
            # The accountant's coin says who is in a sum. Among the first, a holder more pushes
            # another one out, so neighbouring sums differ by two updates, and the fast are in it
            # more often than the coin allows.
            raise ValueError(
                "over_selection must be 0 where holders are the unit: a secret coin decides who is "
                f"in a sum, and who is fast must not, {got}"
            )
        if isinstance(self.aggregation, Masked):
            raise ValueError(
                "over_selection must be 0 where updates are masked: holders agree on who is in the "
                f"sum; dropouts says how many of a cohort it may lose, {got}"
            )

    # -- privacy -----------------------------------------------------------------------------

    def calibrated(self) -> TrainingPlan:
        """The same plan with the noise that meets its target over all rounds and steps."""
        noised = self.model_copy(
            update={
                "privacy": self.privacy.calibrated(self),
                "evaluation": self.evaluation.calibrated(self.evaluations),
            }
        )
        # How finely a masked vector counts depends on the noise in it.
        return noised.model_copy(update={"aggregation": noised.aggregation.calibrated(noised)})

    def round_event(self) -> Event:
        """What one holder releases in one round's update."""
        return self.privacy.event(self.sampling_rate, self.local_steps)

    def composition(self) -> Composition:
        """What one holder releases in the whole run: updates and evaluations."""
        updates = Composition.of(self.round_event()) * self.rounds
        return updates + self.evaluation.composition(self.evaluations)

    # -- rounds ------------------------------------------------------------------------------

    @property
    def asked(self) -> int | None:
        """How many holders are asked to train in a round; None for all that are there."""
        if self.cohort is None:
            return None
        spare = round(self.cohort * self.over_selection, 9)  # 0.1 of 30 is 3, in floats too
        return self.cohort + math.ceil(spare)

    # -- evaluation --------------------------------------------------------------------------

    def evaluates(self, number: int) -> bool:
        """Whether holders evaluate after round ``number``."""
        every = self.evaluate_every
        return every > 0 and (number == self.rounds or number % every == 0)

    @property
    def evaluations(self) -> int:
        """How often holders evaluate in the whole run."""
        every = self.evaluate_every
        return math.ceil(self.rounds / every) if every else 0

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

    def largest_update_norm(self, dimension: int, clip_norm: float | None = None) -> float:
        """L2 norm that no honest update of ``dimension`` float32 parameters exceeds.

        Where holders are the unit it is the clip norm, ``clip_norm`` if the request stated one.

        Under DP, one step moves SGD by at most lr/(1-m) · (Σ‖clipped‖ + ‖noise‖)/B. At most
        40 · ``holder_size`` units (the two limits above) add C each, and ‖N(0, I_d)‖ ≤ √d + t with
        probability 1 - exp(-t²/2) (Gaussian concentration of a 1-Lipschitz function), t = 9. Where
        the noise is in the sum of holders only, the mean of their shares is no longer than one.
        Adam moves a coordinate by at most lr·(1-β₁)/√(1-β₂) ≈ 3.2·lr a step (Kingma & Ba 2015,
        section 2.1).
        """
        if self.privacy.kind == "none":
            return self.max_update_norm
        if self.privacy.kind == "central":
            return (clip_norm or self.privacy.clip_norm) * CLIP_ROUNDING
        if self.optimizer == "adam":
            return self.local_steps * 3.2 * self.learning_rate * math.sqrt(dimension)
        if self.privacy.kind == "distributed":
            noise = self.privacy.share(self)
        else:
            noise = (self.privacy.noise_multiplier or 0.0) * self.privacy.clip_norm
        signal = self.most_units * self.privacy.clip_norm
        gradient = signal + noise * (math.sqrt(dimension) + 9.0)
        step = self.learning_rate / (1 - self.momentum) / self.expected_batch_size
        return self.local_steps * step * gradient

    @property
    def most_units(self) -> int:
        """Units that no holder has more of: whoever has declines the plan."""
        return LARGEST_SIZE_CLASS * LARGEST_UNDERSTATEMENT * self.holder_size

    def differences(self, other: TrainingPlan) -> list[str]:
        """Fields in which this plan, there, and another, here, differ; none if they are the same.

        How closely the noise was calibrated does not count. Another version of a library may do it
        a little differently; a run goes on with the noise that it began with.
        """
        mine, theirs = (plan._uncalibrated().model_dump(mode="json") for plan in (self, other))
        return [
            f"{name} is {value} there and {theirs[name]} here"
            for name, value in mine.items()
            if value != theirs[name]
        ]

    def _uncalibrated(self) -> TrainingPlan:
        parts = {
            name: part.model_copy(update={"noise_multiplier": None})
            for name, part in (("privacy", self.privacy), ("evaluation", self.evaluation))
            if "noise_multiplier" in type(part).model_fields
        }
        aggregation = self.aggregation
        if isinstance(aggregation, Masked):
            aggregation = aggregation.model_copy(update={"ring": None})
        return self.model_copy(update={**parts, "aggregation": aggregation})

    # -- forms -------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """The plan as people read it."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def from_toml(cls, text: str) -> TrainingPlan:
        """Inverse of :meth:`to_toml`; raises ConfigurationError."""
        try:
            values = read_toml(text)
        except ValueError as error:
            raise ConfigurationError(f"the plan is not TOML: {error}") from None
        return validated(cls, values)
