"""Upper bounds of ε for compositions of events.

Each function returns a bound that holds by itself, or infinity where it cannot say:

* :func:`gaussian_bound`, in microseconds and for Gaussian steps only: exact where nothing is
  subsampled (:mod:`common.privacy.gaussian`). Elsewhere it ignores the sampling, which can only
  help privacy (hockey-stick divergences are jointly convex);
* :func:`renyi_bound`, in milliseconds and for every kind of event (:mod:`common.privacy.renyi`). It
  is the only one that knows selections;
* :func:`prv_bound`, in tenths of a second, for Gaussian steps and discrete Gaussians in any mixture
  (:mod:`common.privacy.prv`): tight, up to an error that is added on top. A case that its numerics
  cannot carry (δ of 10⁻⁸, 10⁸ steps, ε in the hundreds) is left to the others.

For the Gaussian and the PRV bound, noise in shares is a Gaussian step with a thousandth less noise
(:mod:`common.privacy.shares`); the Rényi bound has another proof, with all of it.

All hold for adding and for removing a unit: the Gaussian bound because its pair is symmetric, the
Rényi bound because removing is the worse of the two there (Mironov, Talwar & Zhang 2019, theorem
5), the PRV bound because it takes the worse of both. An event of a kind that is not known is an
error, and not a matter of leaving it out.

What a bound may cost is limited too, since whoever asks chooses σ and with it how many different
mechanisms a history holds. Where there are too many, :func:`coarsen` replaces some by one that
dominates them all, and the bound of that is a bound of the history.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from common.privacy.events import (
    Composition,
    DiscreteGaussian,
    DistributedGaussian,
    Event,
    SubsampledGaussian,
)
from common.privacy.gaussian import gaussian_epsilon
from common.privacy.losses import DiscreteGaussianLoss, Loss, SampledGaussianLoss
from common.privacy.prv import LARGEST_ERROR, composed_epsilon, mesh_for, rounding
from common.privacy.renyi import MOST_RUNS, check_known, divergences, renyi_epsilon
from common.privacy.shares import as_gaussian

__all__ = ["coarsen", "gaussian_bound", "prv_bound", "quick_bound", "renyi_bound"]

logger = logging.getLogger("sotto.privacy")

RENYI_MOST_MECHANISMS = 256
"""Different mechanisms that the Rényi bound takes as they are, at 5 ms each."""

PRV_RELATIVE_ERROR = 0.002
"""The PRV bound's error that we ask for, relative to ε, so that it does not drown a small ε."""

PRV_COARSE_ERROR = 0.02
"""The same for the pass that finds out what ε is, about."""

PRV_MOST_MECHANISMS = 8
"""Different subsampled mechanisms that the PRV bound takes as they are: up to 0.4 s and 32 MB each;
and different discrete Gaussians, of which it has no bound if there are more."""

Additive = SubsampledGaussian | DiscreteGaussian
"""Mechanisms with a known privacy loss variable."""

REMEMBERED = 256
"""Bounds kept. Each keeps its composition, which may be long."""


@lru_cache(maxsize=REMEMBERED)
def quick_bound(composition: Composition, delta: float) -> float:
    """The smaller of the bounds that take milliseconds."""
    return min(gaussian_bound(composition, delta), renyi_bound(composition, delta))


def gaussian_bound(composition: Composition, delta: float) -> float:
    """The Gaussian bound; infinite if there is anything but Gaussian steps."""
    composition = _with_gaussians(composition)
    steps = _gaussians(composition)
    if len(steps) < len(composition.events) or _total(steps) > MOST_RUNS:
        return math.inf
    return gaussian_epsilon(_mu(steps), delta) if steps else 0.0


@lru_cache(maxsize=REMEMBERED)
def renyi_bound(composition: Composition, delta: float) -> float:
    """The Rényi bound, which holds for every kind of event.

    Raises:
        ConfigurationError: an event of a kind that no accountant knows.
    """
    if not composition:
        return 0.0
    for event in composition:
        check_known(event)
    if composition.unprotected or any(event.count > MOST_RUNS for event in composition):
        return math.inf
    others = divergences(Composition(_others(composition)))
    few = Composition(tuple(_simplify(_gaussians(composition), RENYI_MOST_MECHANISMS)))
    return renyi_epsilon(others + divergences(few), delta)


@lru_cache(maxsize=REMEMBERED)
def prv_bound(composition: Composition, delta: float) -> float:
    """The tight bound for Gaussian steps and discrete Gaussians.

    Infinite for any other event, where its numerics do not carry it, and for plain Gaussian steps
    alone, for which the Gaussian bound is exact.
    """
    rough = quick_bound(composition, delta)
    composition = _with_gaussians(composition)
    steps, discrete = _gaussians(composition), _discrete(composition)
    if rough in (0.0, math.inf) or not (discrete or not _unsampled(steps)):
        return math.inf
    if len(steps) + len(discrete) < len(composition.events):
        return math.inf
    if len(discrete) > PRV_MOST_MECHANISMS:
        return math.inf
    mechanisms: list[Additive] = [*_simplify(steps, PRV_MOST_MECHANISMS), *discrete]
    # The error asked for is relative to ε, which a first, ten times cheaper, pass tells.
    coarse = _composed_prv(mechanisms, PRV_COARSE_ERROR * rough, delta)
    return min(coarse, _composed_prv(mechanisms, PRV_RELATIVE_ERROR * min(rough, coarse), delta))


def coarsen(steps: list[SubsampledGaussian], most: int) -> list[SubsampledGaussian]:
    """At most ``most`` mechanisms that together cost no less than ``steps``.

    Steps are grouped, and each becomes its group's largest q and smallest σ. Such a step dominates
    the one it replaces, as a post-processing gives that back:

    * a larger σ: add the Gaussian noise that is missing;
    * a smaller q, for the pair N(0, σ²) and (1 − q')·N(0, σ²) + q'·N(1, σ²) that bounds a step:
      with probability 1 − q/q' put a fresh draw of N(0, σ²) in the outcome's place. The first
      stays as it is, and the second becomes the same with q for q'.

    Domination survives adaptive composition (Zhu, Dong & Wang 2022, "Optimal accounting of
    differential privacy via characteristic function"; Rényi divergences simply add up).

    Args:
        steps: in any number; returned as they are where ``most`` suffice.
        most: at least 1.
    """
    if len(steps) <= most:
        return steps
    # Like the median cut of an image's colours: cut where it saves most, until there are enough.
    groups = [_Group.of(steps)]
    while len(groups) < most:
        widest = max(groups, key=lambda group: group.saved)
        groups.remove(widest)
        groups += [_Group.of(widest.steps[: widest.cut]), _Group.of(widest.steps[widest.cut :])]
    # Two groups may have the same corner: compositions merge those.
    return _gaussians(Composition(tuple(group.corner() for group in groups)))


class _Group(NamedTuple):
    """Steps to be replaced by one mechanism, or to be cut in two before ``steps[cut]``."""

    steps: list[SubsampledGaussian]
    cut: int
    saved: float
    """What the cut would save, in terms of :func:`_price`; -1 where there is nothing to cut."""

    @classmethod
    def of(cls, steps: list[SubsampledGaussian]) -> Self:
        """The group with its best cut, along q or along σ."""
        return max(
            (
                cls._cut(sorted(steps, key=lambda step: step.sampling_rate)),
                cls._cut(sorted(steps, key=lambda step: step.noise_multiplier)),
            ),
            key=lambda group: group.saved,
        )

    @classmethod
    def _cut(cls, steps: list[SubsampledGaussian]) -> Self:
        if len(steps) == 1:
            return cls(steps, 0, -1.0)
        upto, onward = _corner_prices(steps), _corner_prices(steps[::-1])[::-1]
        saved = upto[-1] - (upto[:-1] + onward[1:])
        best = int(np.argmax(saved))
        return cls(steps, best + 1, max(0.0, float(saved[best])))

    def corner(self) -> SubsampledGaussian:
        """As many steps of a mechanism that dominates each of them."""
        return SubsampledGaussian(
            max(step.sampling_rate for step in self.steps),
            min(step.noise_multiplier for step in self.steps),
            _total(self.steps),
        )


def _corner_prices(steps: list[SubsampledGaussian]) -> NDArray[np.float64]:
    """For each i, what the first i + 1 together would be priced at. It only chooses groups.

    A step's price is its χ² divergence, q²(e^(1/σ²) − 1); capped, so as not to overflow.
    """
    rates = np.maximum.accumulate([step.sampling_rate for step in steps])
    noises = np.maximum(np.minimum.accumulate([step.noise_multiplier for step in steps]), 0.1)
    counts = np.cumsum([float(min(step.steps, 10**18)) for step in steps])
    return np.asarray(counts * rates**2 * np.expm1(noises**-2), dtype=np.float64)


def _composed_prv(mechanisms: Sequence[Additive], error: float, delta: float) -> float:
    """The bound, the worse of both directions; infinity where mesh or rounding do not carry it.

    Args:
        mechanisms: at least one.
        error: of ε, in nats, to ask for; it is part of the bound.
        delta: δ.
    """
    counts = [mechanism.count for mechanism in mechanisms]
    delta_error = delta / 1000
    singles = [divergences(Composition.of(mechanism.times(1))) for mechanism in mechanisms]
    mesh = mesh_for(singles, counts, min(error, LARGEST_ERROR), delta_error)
    lost = rounding(sum(counts))  # comes off δ
    if lost > delta / 100 or not mesh.error <= LARGEST_ERROR:
        return math.inf
    try:
        return max(
            composed_epsilon(
                [_loss(mechanism, added=added) for mechanism in mechanisms],
                counts,
                mesh,
                delta - lost,
                delta_error,
            )
            for added in (False, True)
        )
    except (RuntimeError, ValueError, IndexError, ArithmeticError) as reason:
        logger.debug("PRV gave no bound for %s: %s", mechanisms, reason)
        return math.inf


def _loss(mechanism: Additive, *, added: bool) -> Loss:
    if isinstance(mechanism, DiscreteGaussian):
        return DiscreteGaussianLoss(mechanism.noise_multiplier)
    return SampledGaussianLoss(mechanism.sampling_rate, mechanism.noise_multiplier, added=added)


def _with_gaussians(composition: Composition) -> Composition:
    """With plain Gaussian steps in the place of noise in shares; costs no less."""
    return Composition(
        tuple(
            as_gaussian(event) if isinstance(event, DistributedGaussian) else event
            for event in composition
        )
    )


def _gaussians(composition: Composition) -> list[SubsampledGaussian]:
    return [event for event in composition if isinstance(event, SubsampledGaussian)]


def _discrete(composition: Composition) -> list[DiscreteGaussian]:
    return [event for event in composition if isinstance(event, DiscreteGaussian)]


def _others(composition: Composition) -> tuple[Event, ...]:
    return tuple(event for event in composition if not isinstance(event, SubsampledGaussian))


def _unsampled(steps: list[SubsampledGaussian]) -> bool:
    return all(step.sampling_rate == 1.0 for step in steps)


def _simplify(steps: list[SubsampledGaussian], most: int) -> list[SubsampledGaussian]:
    """Plain Gaussian steps as a single one, exactly; of the others at most ``most`` mechanisms."""
    plain = [step for step in steps if step.sampling_rate == 1.0]
    others = coarsen([step for step in steps if step.sampling_rate != 1.0], most)
    if not plain:
        return others
    # Out of an event's range only where ε is infinite or zero anyway.
    return [*others, SubsampledGaussian(1.0, min(max(1 / _mu(plain), 1e-300), 1e300), 1)]


def _mu(steps: list[SubsampledGaussian]) -> float:
    """√Σ k/σ²: the μ of plain Gaussian steps together. Free of overflow, as σ² is not."""
    return math.hypot(*(math.sqrt(step.steps) / step.noise_multiplier for step in steps))


def _total(steps: list[SubsampledGaussian]) -> int:
    return sum(step.steps for step in steps)
