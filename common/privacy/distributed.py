"""Noise in the sum: what each holder adds, and what the coordinator makes of the sum.

The distributed discrete Gaussian mechanism (Kairouz, Liu & Steinke 2021, "The distributed discrete
Gaussian mechanism for federated learning with secure aggregation", algorithms 1 and 2), without the
rotation and the modular clipping that save bits there: the ring is wide enough for every sum.

    holder        sum of clipped gradients, in whole steps of the ring, + its share of the noise
    coordinator   sum over the survivors → mean gradient → the strategy's update

* *Unit*: one record or user at one holder. *Neighbours* differ by one unit added or removed, at one
  holder. It moves the holder's sum by at most C, and the rounded sum by at most C + √D steps.
* *Adversary*: sees every round's sum over the survivors, chooses each round's parameters after the
  sums before, and may know everything about ``coalition`` holders, their noise included. It does
  not see a single holder's vector, which is what masking is for, nor a sum of fewer holders than
  ``min_holders``, nor two sums of one round.
* *Event*: :class:`~common.privacy.events.DistributedGaussian`, once a round, at every holder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from common.errors import ConfigurationError
from common.privacy.accounting import epsilon
from common.privacy.discrete_noise import discrete_gaussian
from common.privacy.events import Composition, DistributedGaussian
from common.privacy.noise import Randomness

if TYPE_CHECKING:
    from common.aggregation import SecureSum
    from common.guarantees import DistributedPrivacy
    from common.plan import TrainingPlan

__all__ = ["Coalition", "against_coalitions", "mean_update", "noised_steps", "rounded_steps"]

Steps = npt.NDArray[np.int64]
"""[D] whole steps of the ring."""


def noised_steps(total: Tensor, plan: TrainingPlan, randomness: Randomness) -> Steps:
    """A holder's part of the sum: whole steps, with its share of the noise in each coordinate.

    Variances add, so the parts of any ``min_holders`` − ``coalition`` holders carry the full noise.
    One part alone carries far less, and must not be seen: it is to be masked.

    Args:
        total: sum of the units' gradients, each clipped to the plan's C, [D] float64.
        plan: calibrated, its noise in the sum.
        randomness: of the noise; no other holder's.

    Returns:
        [D] int64.

    Raises:
        ConfigurationError: the plan has no such noise, is not calibrated, is about another number
            of parameters, or counts in steps that are longer than its guarantee allows.
    """
    privacy, step = _privacy(plan), _step(plan)
    if len(total) != (stated := _secure_sum(plan).dimension):
        # The more coordinates there are, the more can rounding move a sum.
        raise ConfigurationError(f"the plan is for {stated} parameters, and there are {len(total)}")
    # Exact: the step is a power of two.
    noise = discrete_gaussian(len(total), privacy.share(plan) / step, randomness)
    return np.asarray(rounded_steps(total, step) + noise.numpy(), dtype=np.int64)


def rounded_steps(total: Tensor, step: float) -> Steps:
    """The nearest whole numbers of steps, which is at most half a step away in each coordinate.

    Args:
        total: [D] float64.
        step: a power of two.
    """
    return np.asarray(np.rint(total.cpu().numpy() / step), dtype=np.int64)


def mean_update(total: Steps, holders: int, plan: TrainingPlan) -> npt.NDArray[np.float32]:
    """The update of one step of gradient descent on everybody's units: −η · sum / (n · B).

    Post-processing of the sum. The number of survivors is no secret, and does not depend on data.

    Args:
        total: sum of the survivors' parts, in steps: [D].
        holders: n, how many survived.
        plan: calibrated; η is its learning rate and B the expected batch of one holder.

    Returns:
        [D] float32.
    """
    gradient = total.astype(np.float64) * (_step(plan) / (holders * plan.expected_batch_size))
    return np.asarray(-plan.learning_rate * gradient, dtype=np.float32)


@dataclass(frozen=True)
class Coalition:
    """What holds if the coordinator has help.

    Args:
        holders: c, how many others tell the coordinator everything, their noise included.
        epsilon: of all sums of the run, at the plan's δ.
    """

    holders: int
    epsilon: float


def against_coalitions(plan: TrainingPlan) -> list[Coalition]:
    """ε of a run against the coordinator with 0, 1, ... t − 1 holders that help it.

    The noise of t − c holders is left: √((t − c)/(t − ``coalition``)) of the plan's σ, which is no
    less than σ up to the ``coalition`` that the plan is calibrated for. It is about the sums, and
    about units of holders outside the coalition. That nothing but the sums is seen takes secure
    aggregation, whose own bound on a coalition is in docs/secure-aggregation.md.

    Args:
        plan: calibrated, its noise in the sum.
    """
    privacy, threshold = _privacy(plan), plan.min_holders
    whole = privacy.event(plan.sampling_rate, plan.rounds)
    expected = threshold - _secure_sum(plan).coalition

    def left(helpers: int) -> DistributedGaussian:
        sigma = whole.noise_multiplier * math.sqrt((threshold - helpers) / expected)
        return DistributedGaussian(sigma, plan.rounds)

    return [
        Coalition(helpers, epsilon(Composition.of(left(helpers)), privacy.delta))
        for helpers in range(threshold)
    ]


def _privacy(plan: TrainingPlan) -> DistributedPrivacy:
    privacy = plan.privacy
    if privacy.kind != "distributed":
        raise ConfigurationError(
            f"noise is in the sum only where the privacy is 'distributed', got {privacy.kind!r}; "
            "build the plan with aggregation 'secure-sum'"
        )
    return privacy


def _secure_sum(plan: TrainingPlan) -> SecureSum:
    _privacy(plan)
    assert plan.aggregation.kind == "secure-sum"  # the plan has checked that they go together
    return plan.aggregation


def _step(plan: TrainingPlan) -> float:
    """What 1 in the sum stands for, no longer than the price assumes."""
    ring = _secure_sum(plan).ring
    if ring is None:
        raise ConfigurationError("this plan is not calibrated: build it with plan_for")
    _privacy(plan).check_step(ring.step, plan)
    return ring.step
