"""What events cost: ε of a composition at a given δ, and the noise that meets a target.

:func:`epsilon` is the smallest of several figures, *each of which is an upper bound*
(:mod:`common.privacy.bounds` says which and whose), so it is one too. It never warns: a bound that
cannot be computed for some composition is left out, and one of them always can.

Adversary, unit and neighbouring relation are those of :mod:`common.privacy.events`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from common.errors import ConfigurationError
from common.privacy.bounds import gaussian_bound, prv_bound, quick_bound, renyi_bound
from common.privacy.events import (
    Composition,
    DiscreteGaussian,
    DistributedGaussian,
    Selection,
    SubsampledGaussian,
)
from common.privacy.gaussian import gaussian_epsilon, gaussian_mu

__all__ = [
    "Crosscheck",
    "affordable",
    "crosscheck",
    "distributed_noise",
    "epsilon",
    "noise_multiplier",
    "release_noise",
    "run_epsilon",
    "selection_noise",
]

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
        ConfigurationError: δ out of range, or an event of a kind that no accountant knows.
    """
    _check_delta(delta)
    return min(quick_bound(composition, delta), prv_bound(composition, delta))


def affordable(composition: Composition, limit: float, delta: float) -> bool:
    """Whether :func:`epsilon` is at most ``limit``; quick where a rough bound settles it."""
    _check_delta(delta)
    return quick_bound(composition, delta) <= limit or prv_bound(composition, delta) <= limit


@dataclass(frozen=True)
class Crosscheck:
    """What each accountant says about the same composition, in nats; ∞ where one has no say.

    Args:
        prv: the PRV bound, its error included.
        renyi: the Rényi bound.
        gaussian: the Gaussian bound, which ignores sampling.
        chosen: the least, which is :func:`epsilon`.
    """

    prv: float
    renyi: float
    gaussian: float
    chosen: float


def crosscheck(composition: Composition, delta: float) -> Crosscheck:
    """The figures that :func:`epsilon` is the least of; arguments and errors are the same."""
    return Crosscheck(
        prv=prv_bound(composition, delta),
        renyi=renyi_bound(composition, delta),
        gaussian=gaussian_bound(composition, delta),
        chosen=epsilon(composition, delta),
    )


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
    target = _Target(
        lambda sigma: Composition.of(SubsampledGaussian(sampling_rate, sigma, steps)),
        epsilon,
        delta,
    )
    # Enough for every q, since sampling only helps; exact for q = 1.
    enough = target.gaussian(steps)
    return target.checked(enough) if sampling_rate == 1.0 else target.least(enough)


@lru_cache(maxsize=1024)
def release_noise(releases: int, epsilon: float, delta: float) -> float:
    """The least σ at which ``releases`` discrete Gaussian releases cost at most ``epsilon``.

    Measured as :func:`noise_multiplier` does. For vectors with continuous Gaussian noise that is
    ``noise_multiplier(1.0, releases, epsilon, delta)``.

    Args:
        releases: of integer vectors that one unit moves by at most 1, see
            :class:`~common.privacy.events.DiscreteGaussian`; at least 1.
        epsilon: the target in nats, positive.
        delta: δ in (0, 1).

    Returns:
        σ of the noise in each coordinate.

    Raises:
        ConfigurationError: a value out of range, or a target that only absurd noise would meet.
    """
    target = _Target(
        lambda sigma: Composition.of(DiscreteGaussian(sigma, releases)), epsilon, delta
    )
    return target.least(target.gaussian(releases))


@lru_cache(maxsize=1024)
def distributed_noise(releases: int, epsilon: float, delta: float) -> float:
    """The least σ at which ``releases`` sums with distributed noise cost at most ``epsilon``.

    Measured as :func:`noise_multiplier` does, of which it is 1.0011 times for q = 1.

    Args:
        releases: of sums, see :class:`~common.privacy.events.DistributedGaussian`; at least 1.
        epsilon: the target in nats, positive.
        delta: δ in (0, 1).

    Returns:
        σ, the standard deviation of the honest survivors' noise together over the sensitivity.

    Raises:
        ConfigurationError: a value out of range, or a target that only absurd noise would meet.
    """
    target = _Target(
        lambda sigma: Composition.of(DistributedGaussian(sigma, releases)), epsilon, delta
    )
    return target.least(target.gaussian(releases))


@lru_cache(maxsize=1024)
def selection_noise(
    sampling_rate: float,
    steps: int,
    expected_runs: float,
    epsilon: float,
    delta: float,
    shape: float = 1.0,
) -> float:
    """The least noise multiplier of each run at which releasing the best costs ``epsilon``.

    Measured as :func:`noise_multiplier` does. For candidates that differ in sampling or steps see
    :func:`run_epsilon`.

    Args:
        sampling_rate: q of each run, in (0, 1].
        steps: of each run, at least 1.
        expected_runs: E[K], see :class:`~common.privacy.events.Selection`.
        epsilon: the target for the whole search, in nats, positive.
        delta: δ in (0, 1).
        shape: η of K's distribution.

    Returns:
        σ, the noise's standard deviation over the clip norm.

    Raises:
        ConfigurationError: a value out of range, or a target that only absurd noise would meet.
    """

    def run(sigma: float) -> Composition:
        candidate = Composition.of(SubsampledGaussian(sampling_rate, sigma, steps))
        return Composition.of(Selection((candidate,), expected_runs, shape))

    target = _Target(run, epsilon, delta)
    return target.least(target.gaussian(steps))


def run_epsilon(
    candidates: Callable[[float], Iterable[Composition]],
    expected_runs: float,
    epsilon: float,
    delta: float,
    shape: float = 1.0,
) -> float:
    """What one run may cost, so that releasing the best of them costs at most ``epsilon``.

    Args:
        candidates: from an ε for one run to what each candidate's run, calibrated to it, releases.
        expected_runs: E[K], see :class:`~common.privacy.events.Selection`.
        epsilon: the target for the whole search, in nats, positive.
        delta: δ in (0, 1), of the whole search; calibrate the candidates at the same.
        shape: η of K's distribution.

    Returns:
        ε for one run, at most ``epsilon``. The search then costs at most the target, and at most
        0.1 % less.

    Raises:
        ConfigurationError: a value out of range, or a target below what any such search costs.
    """

    # A run that is cheaper has more noise, so 1/ε stands for σ here.
    def search(inverse: float) -> Composition:
        selected = Selection(tuple(candidates(1 / inverse)), expected_runs, shape)
        return Composition.of(selected)

    return 1 / _Target(search, epsilon, delta, most=1000 / epsilon).least(2 / epsilon)


@dataclass(frozen=True)
class _Target:
    """What calibration aims for: ``release(σ)`` at a cost of ``limit``, which falls as σ rises."""

    release: Callable[[float], Composition]
    limit: float
    delta: float
    most: float = LARGEST_NOISE

    def __post_init__(self) -> None:
        _check_delta(self.delta)
        if not 0.0 < self.limit < math.inf:
            raise ConfigurationError(f"epsilon must be positive and finite, got {self.limit!r}")
        self.release(1.0)  # its events check their arguments, with the same sentences

    def gaussian(self, runs: int) -> float:
        """σ for so many plain Gaussian releases, exactly."""
        sigma = math.sqrt(runs) / gaussian_mu(self.limit, self.delta)
        # √ and the quotient round, perhaps to the wrong side.
        while gaussian_epsilon(math.sqrt(runs) / sigma, self.delta) > self.limit:
            sigma *= 1 + 1e-12
        return sigma

    def checked(self, sigma: float) -> float:
        """``sigma``, unless it is absurd.

        Raises:
            ConfigurationError: it is.
        """
        if sigma > self.most:
            raise ConfigurationError(
                f"epsilon={self.limit:g} at delta={self.delta:g} needs noise of more than "
                f"{self.most:g} times the sensitivity; raise epsilon or delta, or take fewer "
                "steps, releases or runs"
            )
        return sigma

    def least(self, start: float) -> float:
        """The least σ, by the secant rule: ε is nearly a power of σ, so log ε a line in log σ.

        ``works`` has always been measured to meet the target, and is what is returned.

        Args:
            start: a σ of the right order.
        """
        works, slope = self._bracket(start)
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
        return self.checked(works)

    def _bracket(self, start: float) -> tuple[float, float]:
        """A σ that works by the quick bound, within 2 %, and d log ε / d log σ there."""
        works = start
        while self._quick(works) > self.limit:
            works = 2 * self.checked(works)
        fails = works / 2
        while self._quick(fails) <= self.limit:
            works, fails = fails, fails / 2
        while works > fails * 1.02:
            middle = math.sqrt(fails * works)
            if self._quick(middle) <= self.limit:
                works = middle
            else:
                fails = middle
        fallen = self._quick(works) / self._quick(fails)
        # 0 where ε is: any slope will do then, as the search is safeguarded.
        return works, math.log(fallen) / math.log(works / fails) if fallen > 0 else -1.0

    def _aim(self, sigma: float, over: float, slope: float) -> float:
        """Where the line through (σ, ``over``) passes the middle of the tolerance."""
        return sigma * math.exp((-TOLERANCE / 2 - over) / slope) if slope < 0 else 0.0

    def _over(self, sigma: float) -> float:
        """Log of ε over the target: at most 0 where σ meets it."""
        cost = epsilon(self.release(sigma), self.delta)
        return math.log(cost / self.limit) if cost > 0 else -math.inf

    def _quick(self, sigma: float) -> float:
        return quick_bound(self.release(sigma), self.delta)


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigurationError(f"delta must be above 0 and below 1, got {delta!r}")
