"""What stands between accepted updates and the strategy: nothing, or a trusted coordinator's noise.

In most plans each holder's update is private by itself, and the strategy sees it as it came
(:class:`Individual`). Where *holders* are the unit (:class:`common.plan.CentralPrivacy` states
neighbours and adversary), the strategy sees one update, the noised mean (:class:`Central`):

1. **Ask.** Each holder by a secret coin, or everybody in turn.
2. **Clip.** Each holder clips its update to C; the coordinator rejects what is longer.
3. **Sum**, and add noise of standard deviation σC to every coordinate.
4. **Divide** by the number of holders *expected*, a public constant. Nobody answering is ordinary.

What the strategy does with the mean is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.guarantees import CentralPrivacy
from common.plan import CLIP_ROUNDING, TrainingPlan
from common.privacy.matrix import banded_square_root, correlated
from common.privacy.noise import OsRandomness, Randomness, poisson_sample
from common.privacy.step import rounded_to_grid
from common.tasks.base import derived_seed
from common.wire import TrainReply, Vector

__all__ = ["Central", "Combination", "Individual", "Memory", "combination_of"]

NDArray = npt.NDArray[np.floating]
Values = npt.NDArray[np.float64]
Memory = Mapping[str, NDArray]
"""What a combination knows from earlier rounds: arrays for the checkpoint, by name."""

Name = Callable[[int], str]
"""Node id → the name of its holder."""

CLIP, NOISE = "central/clip_norm", "central/noise"

QUANTILE = 0.5
"""Adaptive clipping aims C at this quantile of the holders' norms."""

CLIP_RATE = 0.2
"""Learning rate of log C (Andrew et al. 2021, section 3.1, recommend 0.2)."""

BIT_SHARE = 20
"""The bits' noise is the expected cohort over this (Andrew et al. 2021, section 3.1)."""

LARGEST_CLIP_CHANGE = 1e6
"""C stays within this factor of where it began, so that it remains a number."""


def _unpredictable(number: int) -> Randomness:
    del number
    return OsRandomness()


class Combination(Protocol):
    """How a round's replies become what the strategy averages."""

    @property
    def fewest(self) -> int:
        """A round with fewer accepted updates fails."""
        ...

    def clip_norm(self, memory: Memory) -> float | None:
        """What the round's requests state as the bound of an update, if anything."""
        ...

    def cohort(self, present: Sequence[int], name: Name, number: int) -> list[int] | None:
        """Whom to ask in round ``number``; None for whom the plan says."""
        ...

    def combined(
        self, number: int, replies: Sequence[TrainReply], memory: Memory, dimension: int
    ) -> tuple[list[TrainReply], Memory]:
        """What the strategy sees of the accepted replies, and what to remember."""
        ...


@dataclass(frozen=True)
class Individual:
    """The strategy sees each reply as it came.

    Args:
        fewest: a round with fewer accepted updates fails.
    """

    fewest: int

    def clip_norm(self, memory: Memory) -> None:
        """None: the plan bounds gradients."""

    def cohort(self, present: Sequence[int], name: Name, number: int) -> None:
        """None: as the plan says."""

    def combined(
        self,
        number: int,  # noqa: ARG002
        replies: Sequence[TrainReply],
        memory: Memory,  # noqa: ARG002
        dimension: int,  # noqa: ARG002
    ) -> tuple[list[TrainReply], Memory]:
        """The replies."""
        return list(replies), {}


@dataclass(frozen=True)
class Central:
    """The strategy sees the noised mean.

    Args:
        plan: calibrated, its privacy central.
        privacy: of the plan.
        randomness: of a round's coins and noise; unpredictable unless this is a simulation.
    """

    plan: TrainingPlan
    privacy: CentralPrivacy
    randomness: Callable[[int], Randomness] = _unpredictable
    fewest: int = 0

    @property
    def expected(self) -> float:
        """Holders in a round, on average: the public divisor."""
        return self.privacy.rate(self.plan) * self.privacy.population

    def clip_norm(self, memory: Memory) -> float:
        """C of the coming round."""
        return float(memory[CLIP][0]) if CLIP in memory else self.privacy.clip_norm

    def cohort(self, present: Sequence[int], name: Name, number: int) -> list[int]:
        """Whom to ask.

        By a secret coin each, which is what the accountant's sampling is about; or those whose
        turn it is, in an order that the plan's seed decides: nothing is claimed from its secrecy.

        Args:
            present: node ids of the holders that are there, ascending.
            name: of a node's holder.
            number: of the round.
        """
        if self.privacy.mechanism == "gaussian":
            rate = self.privacy.rate(self.plan)
            chosen = poisson_sample(len(present), rate, self.randomness(number))
            return [present[place] for place in chosen.tolist()]
        turn = number % self.privacy.bands
        # By name and not by place: who comes or goes moves nobody else's turn.
        return [node for node in present if self._turn(name(node)) == turn]

    def combined(
        self, number: int, replies: Sequence[TrainReply], memory: Memory, dimension: int
    ) -> tuple[list[TrainReply], Memory]:
        """The noised sum over the expected number of holders, as one reply."""
        clip, randomness = self.clip_norm(memory), self.randomness(number)
        total = np.zeros(dimension)
        for reply in replies:
            total += reply.update * np.float64(reply.weight)
        sigma, bit_sigma = self._noises()
        std = sigma * clip * CLIP_ROUNDING  # of the longest update that is accepted
        fresh = randomness.normal((dimension,), std=std, dtype=torch.float64).numpy()
        noise, remembered = self._shaped(fresh, memory)
        noised = rounded_to_grid(torch.from_numpy(total + noise), std)
        mean: Vector = (noised.numpy() / self.expected).astype(np.float32)
        if bit_sigma is not None:
            remembered = {CLIP: self._next_clip(clip, replies, bit_sigma, randomness)}
        return [TrainReply(mean, 1.0)], remembered

    # -- inside ------------------------------------------------------------------------------

    def _turn(self, holder: str) -> int:
        return derived_seed("turn", self.plan.seed, holder) % self.privacy.bands

    def _noises(self) -> tuple[float, float | None]:
        """σ of the sum in units of C, and of the bits' sum where C adapts.

        A holder's bit, less one half, moves its sum by at most ½, so the bits' noise is 2σ_b times
        their sensitivity. Update and bit together are one Gaussian vector of multiplier z where
        z⁻² = z_Δ⁻² + (2σ_b)⁻² (Andrew et al. 2021, theorem 1): the plan's z, which was calibrated,
        so z_Δ is larger.
        """
        z = self.privacy.noise_multiplier
        if z is None:
            raise AssertionError("plans are calibrated before they run")
        if self.privacy.clipping == "fixed":
            return z, None
        bit_sigma = max(self.expected / BIT_SHARE, z)
        return (z**-2 - (2 * bit_sigma) ** -2) ** -0.5, bit_sigma

    def _shaped(self, fresh: Values, memory: Memory) -> tuple[Values, Memory]:
        """The round's noise, and the rows that the next rounds' depends on."""
        if self.privacy.mechanism == "gaussian":
            return fresh, {}
        rows = sum(key.startswith(NOISE) for key in memory)
        last = [memory[f"{NOISE}/{age}"].astype(np.float64) for age in range(rows)]
        row = correlated(banded_square_root(self.privacy.bands), fresh, last)
        kept = [row, *last][: self.privacy.bands - 1]
        return row, {f"{NOISE}/{age}": each for age, each in enumerate(kept)}

    def _next_clip(
        self, clip: float, replies: Sequence[TrainReply], bit_sigma: float, randomness: Randomness
    ) -> NDArray:
        """C of the next round: C·exp(−η(b̃ − γ)) (Andrew et al. 2021, algorithm 1)."""
        bits = sum((reply.within or 0) - reply.weight / 2 for reply in replies)
        noise = randomness.normal((1,), std=bit_sigma, dtype=torch.float64)
        share = float(rounded_to_grid(noise + bits, bit_sigma)) / self.expected + 0.5
        wanted = clip * math.exp(-CLIP_RATE * (share - QUANTILE))
        first = self.privacy.clip_norm
        low, high = first / LARGEST_CLIP_CHANGE, first * LARGEST_CLIP_CHANGE
        return np.array([min(max(wanted, low), high)])  # files know no arrays without dimensions


def combination_of(
    plan: TrainingPlan, randomness: Callable[[int], Randomness] = _unpredictable
) -> Combination:
    """How a plan's replies are combined.

    Args:
        plan: calibrated.
        randomness: of the coordinator's coins and noise in a round; unpredictable unless this is a
            simulation.
    """
    if isinstance(plan.privacy, CentralPrivacy):
        return Central(plan, plan.privacy, randomness)
    return Individual(plan.min_holders)
