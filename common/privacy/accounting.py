"""What events cost: ε of a composition at a given δ, and the noise that meets a target.

:func:`epsilon` is the smallest of several figures, *each of which is an upper bound*
(:mod:`common.privacy.bounds` says which and whose), so it is one too. It never warns: a bound that
cannot be computed for some composition is left out, and one of them always can.

Adversary, unit and neighbouring relation are those of :mod:`common.privacy.events`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from common.errors import ConfigurationError
from common.privacy.bounds import prv_bound, quick_bound
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.gaussian import gaussian_mu

__all__ = ["affordable", "epsilon", "noise_multiplier"]

LARGEST_NOISE = 1e7
"""Noise multiplier past which calibration refuses: no model learns anything there."""

TOLERANCE = 1e-3
"""Calibration stops within this fraction below the target."""

MOST_EVALUATIONS = 30
"""Calibration takes three or four evaluations of ε; past this many it returns the best so far."""


def epsilon(composition: Composition, delta: float) -> float:
    """An upper bound of ε for everything in ``composition`` together.

    Args:
        composition: what was released.
        delta: δ in (0, 1). It should be below 1/n for a data set of n units.

    Returns:
        ε in nats: 0 for nothing, infinite if anything was unprotected.

    Raises:
        ConfigurationError: δ out of range.
    """
    _check_delta(delta)
    return min(quick_bound(composition, delta), prv_bound(composition, delta))


def affordable(composition: Composition, limit: float, delta: float) -> bool:
    """Whether :func:`epsilon` is at most ``limit``; quick where a rough bound settles it."""
    _check_delta(delta)
    return quick_bound(composition, delta) <= limit or prv_bound(composition, delta) <= limit


@lru_cache(maxsize=1024)
def noise_multiplier(sampling_rate: float, steps: int, epsilon: float, delta: float) -> float:
    """The least noise multiplier at which the steps cost at most ``epsilon``.

    The cost is measured by :func:`epsilon`, never above the target and at most 0.1 % below.

    Args:
        sampling_rate: q, in (0, 1].
        steps: of the whole run, at least 1.
        epsilon: the target in nats, positive.
        delta: δ in (0, 1).

    Returns:
        σ, the noise's standard deviation over the clip norm.

    Raises:
        ConfigurationError: a value out of range, or a target that only absurd noise would meet.
    """
    _check_delta(delta)
    if not 0.0 < epsilon < math.inf:
        raise ConfigurationError(f"epsilon must be positive and finite, got {epsilon!r}")
    SubsampledGaussian(sampling_rate, 1.0, steps)  # checks both, with the same sentences
    target = _Target(sampling_rate, steps, epsilon, delta)
    sigma = target.unsampled() if sampling_rate == 1.0 else target.subsampled()
    if sigma > LARGEST_NOISE:
        raise ConfigurationError(
            f"epsilon={epsilon:g} at delta={delta:g} over {steps} steps needs noise of more than "
            f"{LARGEST_NOISE:g} times the clip norm; raise epsilon or delta, or take fewer steps"
        )
    return sigma


@dataclass(frozen=True)
class _Target:
    """What calibration aims for: ``steps`` steps at ``sampling_rate`` that cost ``limit``."""

    sampling_rate: float
    steps: int
    limit: float
    delta: float

    def unsampled(self) -> float:
        """σ for q = 1, exactly; enough for every other q, since sampling only helps."""
        sigma = math.sqrt(self.steps) / gaussian_mu(self.limit, self.delta)
        # √ and the quotient round, perhaps to the wrong side.
        while quick_bound(self._composition(sigma, 1.0), self.delta) > self.limit:
            sigma *= 1 + 1e-12
        return sigma

    def subsampled(self) -> float:
        """σ for q < 1, by the secant rule: ε is nearly a power of σ, so log ε a line in log σ.

        ``works`` has always been measured to meet the target, and is what is returned.
        """
        works, slope = self._start()
        over = last_over = self._over(works)
        fails, last, guess = 0.0, works, self._aim(works, over, slope)
        for _ in range(MOST_EVALUATIONS):
            if over >= -TOLERANCE or works <= fails * (1 + 1e-7):
                break
            if not fails < guess < works:
                guess = math.sqrt(works * (fails or works / 4))
            guess_over = self._over(guess)
            if guess_over <= 0:
                works, over = guess, guess_over
            else:
                fails = guess
            if guess_over != last_over:
                slope = (guess_over - last_over) / math.log(guess / last)
            last, last_over = guess, guess_over
            guess = self._aim(last, last_over, slope)
        return works

    def _start(self) -> tuple[float, float]:
        """A σ that works by the quick bound, within 2 %, and d log ε / d log σ there."""
        works = self.unsampled()
        fails = works / 2
        while self._quick(fails) <= self.limit:
            works, fails = fails, fails / 2
        while works > fails * 1.02:
            middle = math.sqrt(fails * works)
            if self._quick(middle) <= self.limit:
                works = middle
            else:
                fails = middle
        slope = math.log(self._quick(works) / self._quick(fails)) / math.log(works / fails)
        return works, slope

    def _aim(self, sigma: float, over: float, slope: float) -> float:
        """Where the line through (σ, ``over``) passes the middle of the tolerance."""
        return sigma * math.exp((-TOLERANCE / 2 - over) / slope) if slope < 0 else 0.0

    def _over(self, sigma: float) -> float:
        """Log of ε over the target: at most 0 where σ meets it."""
        cost = epsilon(self._composition(sigma, self.sampling_rate), self.delta)
        return math.log(cost / self.limit) if cost > 0 else -math.inf

    def _quick(self, sigma: float) -> float:
        return quick_bound(self._composition(sigma, self.sampling_rate), self.delta)

    def _composition(self, sigma: float, sampling_rate: float) -> Composition:
        return Composition.of(SubsampledGaussian(sampling_rate, sigma, self.steps))


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigurationError(f"delta must be above 0 and below 1, got {delta!r}")
